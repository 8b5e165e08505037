"""The Board in a real Chromium, with a real server and a real run."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Browser, Page, expect

from grpo_stage.board.locales import LANGUAGES, texts

from .browser import (
    PATIENCE_MS,
    choose,
    containing,
    dataset_field,
    fold,
    import_recipe,
    open_board,
    step_shown,
    text_field,
    value_of,
)
from .conftest import opened


@pytest.fixture(scope="module")
def recipe_page(chromium: Browser, board_url: str, workplace: Path) -> Iterator[Page]:
    """A page for the tests that import the recipe of the workplace."""
    with opened(chromium, board_url, workplace) as page:
        yield page


def test_languages_switch_live(shared_page: Page) -> None:
    page = shared_page
    for language in (*LANGUAGES[1:], "en"):
        page.get_by_role("listbox").first.click()
        page.get_by_role("option", name=language, exact=True).click()
        elements = texts(language)["elements"]
        expect(page.get_by_role("button", name=elements["grpo_export_btn"]["value"])).to_be_visible()
        for name in ("grpo_num_generations", "grpo_reward_funcs", "grpo_max_new_tokens"):
            expect(page.locator(f"#{name}")).to_contain_text(elements[name]["label"])
        # Markdown takes the back-quotes away.
        said = page.locator("#grpo_overlong_prompts").inner_text().replace("\n", " ")
        assert elements["grpo_overlong_prompts"]["info"].replace("`", "")[:20] in said


def test_fields_that_do_not_apply_are_hidden(shared_page: Page) -> None:
    page = shared_page
    page.get_by_role("button", name="Memory").click()
    expect(page.locator("#grpo_vllm_sleep")).to_be_visible()
    choose(page, "Rollout engine", "hf")
    expect(page.locator("#grpo_vllm_sleep")).to_be_hidden()
    page.get_by_role("button", name="Monitoring").click()
    expect(page.locator("#grpo_num_completions_to_print")).to_be_visible()
    page.get_by_label("Log completions").uncheck()
    expect(page.locator("#grpo_num_completions_to_print")).to_be_hidden()
    page.get_by_role("button", name="Objective").click()
    expect(page.locator("#grpo_ref_model")).to_be_hidden()
    page.locator("#grpo_beta input").fill("0.04")
    page.locator("#grpo_beta input").blur()
    expect(page.locator("#grpo_ref_model")).to_be_visible()


def test_a_filled_form_is_previewed(shared_page: Page, tiny_model_dir: Path) -> None:
    page = shared_page
    choose(page, "Model name", "Custom")
    text_field(page, "Model path").fill(str(tiny_model_dir))
    dataset, chosen = dataset_field(page), page.locator(".token")
    dataset.fill("nowhere")  # no file describes it: the host's answer was an error 500
    dataset.press("Enter")
    expect(chosen.filter(has_text="nowhere")).to_have_count(1)
    dataset.press("Backspace")
    expect(chosen.filter(has_text="nowhere")).to_have_count(0)
    page.keyboard.type("sums")
    page.keyboard.press("Enter")
    choose(page, "Rollout engine", "hf")
    page.locator("#grpo_num_generations input").fill("4")
    page.get_by_role("button", name="Preview command").click()
    expect(page.get_by_text("`reward_funcs` is missing").first).to_be_visible()  # refused, with the reason
    page.locator("#grpo_reward_funcs input").click()
    page.get_by_role("option", name="accuracy", exact=True).click()
    page.locator("#grpo_reward_funcs input").fill("my rewards.py:even")
    page.locator("#grpo_reward_funcs input").press("Enter")
    text_field(page, "Reward weights").fill("1, 0.5")
    page.get_by_role("button", name="Preview command").click()
    preview = page.locator("pre").filter(has_text="llamafactory-cli train")
    expect(preview).to_contain_text("--reward_funcs 'accuracy,my rewards.py:even'")
    expect(preview).to_contain_text("--num_generations 4")
    expect(preview).to_contain_text("--reward_weights '1, 0.5'")
    expect(preview).not_to_contain_text("vllm")


def test_the_panel_comes_and_goes_with_the_stage(shared_page: Page) -> None:
    page = shared_page
    expect(text_field(page, "Learning rate")).to_have_value("3e-3")  # of so narrow a model
    assert value_of(page, "LR scheduler") == "constant_with_warmup"
    assert value_of(page, "Compute type") == "fp32"  # no accelerator here
    choose(page, "Finetuning method", "full")
    expect(text_field(page, "Learning rate")).to_have_value("6e-5")
    choose(page, "Stage", "DPO")
    expect(page.locator("#grpo_tab")).to_be_hidden()
    expect(page.locator("#grpo_run")).to_be_hidden()
    expect(text_field(page, "Learning rate")).to_have_value("5e-5")
    expect(page.get_by_label("LR scheduler", exact=True)).to_have_value("cosine")


def test_rewards_are_tried(recipe_page: Page, workplace: Path) -> None:
    page = recipe_page
    dataset_field(page).fill("sums")
    dataset_field(page).press("Enter")
    choose(page, "Rollout engine", "hf")
    functions = page.locator("#grpo_reward_funcs input")
    functions.fill("accuracy")
    functions.press("Enter")
    fold(page, "rewards")
    page.get_by_role("button", name="Try the rewards").click()
    table = page.locator("#grpo_try_table")
    expect(table).to_be_visible(timeout=120_000)
    expect(table.get_by_text("wrong_answer").first).to_be_visible()
    expect(table.get_by_text("<img src=x onerror").first).to_be_visible()  # text, and no picture
    assert table.locator("img[src=x]").count() == 0
    expect(page.locator("#grpo_try_report textarea")).to_have_value(containing("No model is chosen"))
    functions.fill("my rewards.py:broken")
    functions.press("Enter")
    page.get_by_role("button", name="Try the rewards").click()
    report = page.locator("#grpo_try_report textarea")
    expect(report).to_have_value(containing("ZeroDivisionError"), timeout=120_000)
    assert 'my rewards.py", line 6' in report.input_value()
    expect(table).to_be_hidden()
    page.get_by_role("button", name="Try the rewards").click()
    expect(report).to_have_value(containing("Loading and scoring"))
    page.get_by_role("button", name="Abort").click()
    expect(report).to_have_value("Stopped.")
    import_recipe(page, workplace / "recipe.yaml")
    expect(report).to_be_hidden()  # it is another form's
    assert page.title() != "evil"


def test_a_run_from_a_recipe(recipe_page: Page, workplace: Path, board_url: str) -> None:
    page = recipe_page
    import_recipe(page, workplace / "recipe.yaml")
    expect(page.get_by_label("Model name", exact=True)).to_have_value("Custom")
    expect(page.get_by_label("Chat template", exact=True)).to_have_value("smollm2")
    expect(page.locator("#grpo_num_generations input")).to_have_value("4")
    expect(page.get_by_text("my rewards.py:even").first).to_be_visible()
    page.wait_for_timeout(1500)  # what the host's own handlers would undo, they have undone
    assert value_of(page, "Chat template") == "smollm2"

    page.get_by_role("button", name="Export YAML").click()
    expect(page.locator("#grpo_exported")).to_be_visible()
    with page.expect_download() as download:
        page.locator("#grpo_exported a").first.click()
    exported = yaml.safe_load(Path(download.value.path()).read_text())
    recipe = yaml.safe_load((workplace / "recipe.yaml").read_text())
    texts_of = {key: str(value) for key, value in recipe.items()}
    assert {key: str(exported.get(key)) for key in recipe} == texts_of

    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_text("that you have not confirmed").first).to_be_visible()  # code of the imported recipe
    expect(page.locator("#grpo_confirmed_code")).to_contain_text(f"{workplace.resolve()}/my rewards.py, sha256 ")
    page.locator("#grpo_confirmed_code input[type=checkbox]").check()
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#grpo_run_status")).to_contain_text("of 400", timeout=240_000)
    first = step_shown(page)
    page.locator("#grpo_run_charts").scroll_into_view_if_needed()
    expect(page.locator("#grpo_run_charts .main-svg").first).to_be_visible()
    page.get_by_role("tab", name="Completions").click()
    expect(page.locator("#grpo_run_table").get_by_text("<img src=x onerror").first).to_be_visible()
    deadline = time.monotonic() + 120
    while step_shown(page) < max(first + 2, 11):  # the curves move, and there is a checkpoint
        assert time.monotonic() < deadline
        page.wait_for_timeout(500)
    assert page.title() != "evil"
    assert page.locator("#grpo_run_table img[src=x]").count() == 0

    # A second tab watches the same process, and cannot start another.
    watcher = page.context.browser.new_page(viewport={"width": 1280, "height": 900})  # type: ignore[union-attr]
    watcher.set_default_timeout(PATIENCE_MS)
    watcher.route("https://**", lambda route: route.abort())
    watcher.goto(board_url)
    expect(watcher.locator("#grpo_num_generations input")).to_have_value("4")
    expect(watcher.get_by_text(re.compile(r"Running \d+/400")).first).to_be_visible()
    watcher.get_by_role("button", name="Start", exact=True).click()
    expect(watcher.get_by_text("trains one run at a time").first).to_be_visible()

    page.get_by_role("button", name="Abort").click()
    for one in (page, watcher):
        expect(one.get_by_text(re.compile(r"Stopped at step \d+ of 400")).first).to_be_visible(timeout=120_000)
        expect(one.get_by_text("Loading and scoring")).to_be_hidden()
        expect(one.locator("#grpo_run_status .badge")).to_have_text("Stopped")
    watcher.close()
    checkpoints = sorted((workplace / "saves/Custom/lora/seen").glob("checkpoint-*/grpo_state.json"))
    last = json.loads((workplace / "saves/Custom/lora/seen/trainer_log.jsonl").read_text().splitlines()[-1])
    assert f"checkpoint-{last['current_steps']}" in [path.parent.name for path in checkpoints]

    # Another page, later: the run is there, with its form.
    page = page.context.browser.new_page(viewport={"width": 1280, "height": 900})  # type: ignore[union-attr]
    page.set_default_timeout(PATIENCE_MS)
    open_board(page, board_url)
    choose(page, "Model name", "Custom")
    choose(page, "Output dir", "seen")
    expect(page.locator("#grpo_run_status")).to_contain_text(f"Step {last['current_steps']} of 400")
    expect(page.locator("#grpo_run_status .badge")).to_have_text("Stopped")
    divergence = page.locator("#grpo_run_charts figure").filter(has_text="(KL)")
    expect(divergence).to_have_count(0)  # it is for those who ask for it
    page.get_by_role("button", name="More charts").click()
    expect(divergence).to_be_visible()
    expect(page.locator("#grpo_num_generations input")).to_have_value("4")
    page.get_by_role("tab", name="Completions").click()
    page.locator("#grpo_run_step").fill("1")
    expect(page.locator("#grpo_run_table").get_by_text("Completions of step 1: 2 groups.")).to_be_visible()
    page.close()
