"""Pictures of LLaMA Board's GRPO panel and run view, for docs/.

Start the Board in the repository's root, after a run of a recipe that logs its completions:

    llamafactory-cli train yaml_examples/quickstart.yaml
    GRADIO_SERVER_PORT=7860 llamafactory-cli webui
    python benchmarks/board_screenshots.py http://127.0.0.1:7860 yaml_examples/quickstart.yaml docs --width 1280
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("recipe", type=Path, help="is imported into the form; its run is shown")
    parser.add_argument(
        "output",
        type=Path,
        help="the folder of board_panel.png, board_check.png, board_run.png and board_completions.png",
    )
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--language", default="en")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--skip-panel", action="store_true", help="leave board_panel.png as it is")
    args = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": args.width, "height": 1000})
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        page.route("https://**", lambda route: route.abort())  # web fonts
        take(page, args)
        browser.close()


def take(page: Page, args: argparse.Namespace) -> None:
    page.goto(args.url)
    page.wait_for_function("document.querySelector('input[aria-label=\"Output dir\"]')?.value.startsWith('train_')")
    page.get_by_label("Stage", exact=True).click()
    page.get_by_role("option", name="GRPO", exact=True).click()
    page.locator("#grpo_tab input[type=file]").set_input_files(args.recipe)
    expect(page.locator("#grpo_run_status")).to_contain_text("Step")
    if args.language != "en":
        page.get_by_role("listbox").first.click()
        page.get_by_role("option", name=args.language, exact=True).click()
    if args.dark:
        page.evaluate("document.body.classList.add('dark')")
    page.set_viewport_size({"width": args.width, "height": 5200})  # plots are drawn once they are near the screen
    page.wait_for_timeout(4000)
    page.locator("#grpo_run").screenshot(path=args.output / "board_run.png")
    page.locator("#grpo_view").get_by_role("tab").nth(1).click()
    page.wait_for_timeout(2000)
    page.locator("#grpo_run").screenshot(path=args.output / "board_completions.png")
    if args.skip_panel:
        return
    page.locator("#grpo_tab").screenshot(path=args.output / "board_panel.png")
    page.locator("#grpo_check_btn").click()
    expect(page.locator("#grpo_check_result table")).to_have_count(2, timeout=240_000)  # rewards and memory
    expect(page.locator("#grpo_check_result [role=status]")).to_have_count(0, timeout=240_000)  # all is there
    page.locator("#grpo_check_panel").screenshot(path=args.output / "board_check.png")


if __name__ == "__main__":
    main()
