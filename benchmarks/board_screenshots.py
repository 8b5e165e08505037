"""Pictures of LLaMA Board's GRPO panel and run view, for docs/.

Start the Board in the repository's root, after a run of a recipe that logs its completions:

    llamafactory-cli train yaml_examples/quickstart.yaml
    GRADIO_SERVER_PORT=7860 llamafactory-cli webui
    python benchmarks/board_screenshots.py http://127.0.0.1:7860 yaml_examples/quickstart.yaml docs

A picture is named after its subject and what differs from a page of 1280 pixels in English and light:
`board_panel.png`, `board_run_390_zh_dark.png`.
"""

import argparse
import shutil
from itertools import product
from pathlib import Path

from llamafactory.webui.locales import LOCALES
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

from grpo_stage.board.locales import texts


SUBJECTS = ("panel", "run", "completions", "check")
CHECK_MS = 240_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("recipe", type=Path, help="is imported into the form; its run is shown")
    parser.add_argument("output", type=Path, help="a folder")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--widths", nargs="+", type=int, default=[1280], help="of the page, in pixels")
    parser.add_argument("--languages", nargs="+", default=["en"])
    parser.add_argument("--themes", nargs="+", choices=("light", "dark"), default=["light"])
    args = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for width, language, theme in product(args.widths, args.languages, args.themes):
            page = browser.new_page(viewport={"width": width, "height": 1000})
            page.set_default_timeout(60_000)
            expect.set_options(timeout=60_000)
            page.route("https://**", lambda route: route.abort())  # web fonts
            open_run(page, args.url, args.recipe, language, theme)
            parts = [str(width)] * (width != 1280) + [language] * (language != "en") + [theme] * (theme != "light")
            for subject in args.subjects:
                shown = SHOW[subject](page, language)
                picture(shown, args.output / f"{'_'.join(['board', subject, *parts])}.png")
            page.close()
        browser.close()


def open_run(page: Page, url: str, recipe: Path, language: str, theme: str) -> None:
    """The Board with the recipe in its form, and its run in the view."""
    page.goto(url)
    page.wait_for_function("[...document.querySelectorAll('input')].some(each => each.value.startsWith('train_'))")
    choose_language(page, "en")  # a page opens in the language of the one before
    page.get_by_label("Stage", exact=True).click()
    page.get_by_role("option", name="GRPO", exact=True).click()
    page.locator("#grpo_tab input[type=file]").set_input_files(recipe)
    expect(page.locator("#grpo_run_status .badge")).to_have_text(texts("en")["view"]["state_finished"])
    choose_language(page, language)
    expect(page.locator("#grpo_run_status .badge")).to_have_text(texts(language)["view"]["state_finished"])
    if theme == "dark":
        page.evaluate("document.body.classList.add('dark')")


def choose_language(page: Page, language: str) -> None:
    page.get_by_role("listbox").first.click()
    page.get_by_role("option", name=language, exact=True).click()
    page.wait_for_timeout(1000)


def panel(page: Page, language: str) -> Locator:
    return page.locator("#grpo_tab")


def check(page: Page, language: str) -> Locator:
    """A check that has come to its end, of another run: the folder of the one that is shown is in use."""
    field = page.get_by_label(LOCALES["output_dir"][language]["label"], exact=True)
    field.fill("another")
    field.press("Enter")
    result, words = page.locator("#grpo_check_result"), texts(language)["messages"]
    page.locator("#grpo_check_btn").click()
    expect(result).to_contain_text(words["check_fits"].split("{")[0], timeout=CHECK_MS)  # memory comes last
    expect(result.locator("[role=status]")).to_have_count(0, timeout=CHECK_MS)
    return page.locator("#grpo_check_panel")


def run(page: Page, language: str) -> Locator:
    page.locator("#grpo_view").get_by_role("tab").nth(0).click()
    # Plots are drawn once they are near the screen.
    size = page.viewport_size
    assert size is not None
    page.set_viewport_size({**size, "height": 9000 if size["width"] < 600 else 6000})
    page.wait_for_function("!document.querySelector('#grpo_view figure:not(:has(.main-svg))')")
    return page.locator("#grpo_run")


def completions(page: Page, language: str) -> Locator:
    page.locator("#grpo_view").get_by_role("tab").nth(1).click()
    expect(page.locator("#grpo_run_table .answer").first).to_be_visible()
    return page.locator("#grpo_run")


SHOW = {"panel": panel, "check": check, "run": run, "completions": completions}


def picture(shown: Locator, file: Path) -> None:
    """A small file: 256 colors are enough for text and lines."""
    shown.page.wait_for_timeout(500)
    shown.screenshot(path=file, animations="disabled")
    Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
