"""What went wrong in the Board as a person meets it: several tabs, files that are not as they should be, odd input."""

import re
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
    import_recipe,
    open_board,
    open_run,
    text_field,
    value_of,
    write_run,
)


NUM_TABS = 6  # and the first: a browser has six connections to a server


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


def test_a_recipe_does_not_choose_what_is_read(page: Page, workplace: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((workplace / "recipe.yaml").read_text())
    outside = tmp_path / "outside"
    write_run(outside, [{"reward": 0.5}], [(1, "a secret")])
    for i, folder in enumerate((str(outside), f"saves/../../../../../../../{outside}")):
        (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump({**recipe, "output_dir": folder}))
        import_recipe(page, tmp_path / f"{i}.yaml")
        expect(page.get_by_label("Output dir", exact=True)).to_have_value(folder)
        status(page, "The output folder of the recipe is not below saves")
        expect(page.locator("#grpo_run_table")).to_be_hidden()
    open_run(page, str(outside))
    status(page, "Step 1 of 100")
    expect(page.locator("#grpo_run_table").get_by_text("a secret")).to_be_visible()


def test_a_change_of_stage_keeps_the_datasets_that_fit(page: Page) -> None:
    chosen = page.locator(".token").filter(has_text="sums")
    page.get_by_label("Dataset", exact=True).first.fill("sums")
    page.get_by_label("Dataset", exact=True).first.press("Enter")
    expect(chosen.first).to_be_visible()
    for stage, is_kept in (("Supervised Fine-Tuning", True), ("GRPO", True), ("DPO", False)):
        choose(page, "Stage", stage)
        page.wait_for_timeout(1500)  # the host's own handlers have done what they do
        (expect(chosen).not_to_have_count if is_kept else expect(chosen).to_have_count)(0)


def test_the_view_says_what_it_cannot_show(page: Page, saves: Path) -> None:
    write_run(saves / "sound", [{"reward": 0.5}, {"reward": 0.75}], [(1, "of the sound run")])
    write_run(saves / "damaged", [{"reward": 0.5}])
    with (saves / "damaged" / "trainer_log.jsonl").open("ab") as log:
        log.write(b'{"torn": \n\xff\xfe\x00\n')
    append_line(saves / "damaged", current_steps=3, reward=0.25)
    (saves / "unreadable" / "trainer_log.jsonl").mkdir(parents=True)
    choose(page, "Model name", "Custom")
    open_run(page, "sound")
    expect(page.locator("#grpo_plot_reward canvas")).to_be_visible()
    expect(page.get_by_text("of the sound run")).to_be_visible()
    open_run(page, "unreadable")
    status(page, "trainer_log.jsonl cannot be read")
    expect(page.locator("#grpo_plot_reward")).to_be_hidden()
    expect(page.get_by_text("of the sound run")).to_be_hidden()
    open_run(page, "damaged")
    status(page, "Damaged lines of trainer_log.jsonl that are left out: 2.")
    status(page, "Step 3 of 100")


def test_curves_are_drawn(page: Page, saves: Path) -> None:
    write_run(saves / "curves", [{"reward": 0.5}])
    choose(page, "Model name", "Custom")
    open_run(page, "curves")
    blue, orange = (0x4C, 0x78, 0xA8), (0xF5, 0x85, 0x18)
    wait_for_color(page, blue)  # a single point, on a constant
    assert num_pixels(page, orange) == 0
    for step in range(2, 10):
        append_line(saves / "curves", current_steps=step, reward=0.5, **{"rewards/format/mean": 0.1 * step})
    wait_for_color(page, orange)


def num_pixels(page: Page, color: tuple[int, int, int]) -> int:
    """Pixels of about this color in the plot of rewards, above its legend."""
    return page.evaluate(
        """color => {
            const canvas = document.querySelector('#grpo_plot_reward canvas');
            if (!canvas) return 0;
            const height = Math.floor(canvas.height * 0.7);
            const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, height).data;
            let count = 0;
            for (let i = 0; i < data.length; i += 4)
                if (data[i + 3] > 200 && color.every((part, j) => Math.abs(part - data[i + j]) < 12)) count++;
            return count;
        }""",
        list(color),
    )


def wait_for_color(page: Page, color: tuple[int, int, int]) -> None:
    for _ in range(100):
        if num_pixels(page, color) > 4:
            return
        page.wait_for_timeout(200)
    raise AssertionError(f"Nothing is drawn in {color}.")


def test_steps_pages_and_texts(page: Page, saves: Path) -> None:
    long_text = "first line\n\n    an indented one\n" + "word " * 2000 + "THE END"
    write_run(saves / "texts", [{"reward": 0.5}], [(step, long_text) for step in (1, 2, 3) for _ in range(9)])
    choose(page, "Model name", "Custom")
    open_run(page, "texts")
    cell = page.locator("#grpo_run_table td").nth(1)
    expect(cell).to_contain_text("THE END")
    assert re.search(r"first line\n\n +an indented one\n", cell.inner_text())
    assert cell.bounding_box()["height"] < 500  # type: ignore[index]
    step, number = page.locator("#grpo_run_step input"), page.locator("#grpo_run_page input")
    for typed, said in (
        ("-5", "There is no step -5"),
        ("1e99", "There is no step 1e+99"),
        ("2", "step 2: 1 to 8 of 9"),
    ):
        step.fill(typed)
        step.blur()
        status(page, said)
    for typed, shown in (("-5", "1"), ("99", "2"), ("1e99", "2")):
        number.fill(typed)
        number.blur()
        expect(number).to_have_value(shown)
        status(page, f"page {shown} of 2")
    page.get_by_role("button", name="Next", exact=True).click()
    expect(number).to_have_value("2")
