"""What went wrong in the Board as a person meets it: several tabs, files that are not as they should be, odd input."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Browser, BrowserContext, Page, expect

from grpo_stage.board.locales import texts

from .browser import (
    PATIENCE_MS,
    append_line,
    choose,
    dataset_field,
    import_recipe,
    open_board,
    open_run,
    text_field,
    value_of,
    write_run,
)


NUM_TABS = 6  # and the first: a browser has six connections to a server


@pytest.fixture(scope="module")
def page(shared_page: Page) -> Page:
    """One page for the tests that need no tab of their own."""
    return shared_page


@pytest.fixture
def saves(workplace: Path) -> Path:
    return workplace / "saves" / "Custom" / "lora"


@pytest.fixture
def browser_window(chromium: Browser) -> Iterator[BrowserContext]:
    """Whose tabs share the browser's connections."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE_MS)
    yield context
    context.close()


@pytest.fixture
def new_tab(browser_window: BrowserContext, board_url: str, workplace: Path) -> Callable[[], Page]:
    def open_one() -> Page:
        (workplace / "llamaboard_cache" / "user_config.yaml").unlink(missing_ok=True)
        page = browser_window.new_page()
        open_board(page, board_url)
        return page

    return open_one


def status(page: Page, text: str) -> None:
    """Wait until the run view says this."""
    expect(page.locator("#grpo_run_status")).to_contain_text(text)


def test_tabs_are_each_others_strangers_and_all_live(
    new_tab: Callable[[], Page], workplace: Path, saves: Path, tiny_model_dir: Path
) -> None:
    first = new_tab()
    import_recipe(first, workplace / "recipe.yaml")
    expect(text_field(first, "Model path")).to_have_value(str(tiny_model_dir))
    tabs = []
    for i in range(NUM_TABS):
        write_run(saves / f"tab{i}", [{"reward": 0.5}])
        tabs.append(new_tab())
        choose(tabs[i], "Model name", "Custom")
        open_run(tabs[i], f"tab{i}")
        status(tabs[i], "Step 1 of 100")
        assert value_of(tabs[i], "Chat template") == "default"
        expect(text_field(tabs[i], "Model path")).to_have_value("")
    for i in range(NUM_TABS):
        append_line(saves / f"tab{i}", current_steps=2 + i, reward=0.5)
    for i, tab in enumerate(tabs):
        status(tab, f"Step {2 + i} of 100")
    expect(text_field(first, "Model path")).to_have_value(str(tiny_model_dir))


def test_a_change_of_stage_keeps_the_datasets_that_fit(page: Page) -> None:
    chosen = page.locator(".token").filter(has_text="sums")
    dataset_field(page).fill("sums")
    dataset_field(page).press("Enter")
    expect(chosen.first).to_be_visible()
    for stage, is_kept in (("Supervised Fine-Tuning", True), ("GRPO", True), ("DPO", False)):
        choose(page, "Stage", stage)
        page.wait_for_timeout(1500)  # the host's own handlers have done what they do
        (expect(chosen).not_to_have_count if is_kept else expect(chosen).to_have_count)(0)
    choose(page, "Stage", "GRPO")
    expect(page.locator("#grpo_tab")).to_be_visible()


BROKEN = {
    "syntax": (b"stage: grpo\nbeta: [1, 2\nseed: : x\n", "Line 3"),
    "duplicate": (b"stage: grpo\nbeta: 0.1\nbeta: 0.2\n", "Line 3: the key `beta` stands in line 2 already"),
    "list": (b"- stage: grpo\n", "Line 1: it is a list"),
    "bomb": (
        b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 10)),
        "more than 10000 values",
    ),
    "UTF-16": ("stage: grpo\n".encode("utf-16"), "saved as UTF-16"),
    "hostile": (b"stage: '<img src=x onerror=document.title=1>![x](http://x.invalid/y)'\n", "<img src=x onerror="),
}


def test_a_broken_recipe_is_said_and_leaves_the_form_as_it_was(page: Page, workplace: Path, tmp_path: Path) -> None:
    import_recipe(page, workplace / "recipe.yaml")
    for name, (content, said) in BROKEN.items():
        (tmp_path / f"{name}.yaml").write_bytes(content)
        page.locator("#grpo_tab input[type=file]").set_input_files(tmp_path / f"{name}.yaml")
        expect(page.locator(".prose").get_by_text(said).first).to_be_visible()
        expect(page.get_by_text(texts("en")["messages"]["imported"])).to_be_hidden()
        assert page.locator(".wrap .error").count() == 0
        assert page.locator("img[src=x]").count() == 0
        expect(page.locator("#grpo_num_generations input")).to_have_value("4")
    expect(page.locator(".toast-body").first).to_be_visible()  # it stays until it is closed
    for close in page.locator(".toast-close").all():
        close.click()
    expect(page.locator(".toast-body")).to_have_count(0)


def test_a_recipe_does_not_choose_what_is_read(page: Page, workplace: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((workplace / "recipe.yaml").read_text())
    outside = tmp_path / "outside"
    write_run(outside, [{"reward": 0.5}], [(1, "a secret")])
    for i, folder in enumerate((str(outside), f"saves/../../../../../../../{outside}")):
        (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump({**recipe, "output_dir": folder}))
        import_recipe(page, tmp_path / f"{i}.yaml")
        expect(page.get_by_label("Output dir", exact=True)).to_have_value(folder)
        status(page, "The output folder of the recipe is not below saves")
        expect(page.get_by_role("tab", name="Completions")).to_be_hidden()
    open_run(page, str(outside))
    status(page, "Step 1 of 100")
    page.get_by_role("tab", name="Completions").click()
    expect(page.locator("#grpo_run_table").get_by_text("a secret")).to_be_visible()
