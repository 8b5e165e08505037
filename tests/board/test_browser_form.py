"""The form as a person uses it before a run: the check, a recipe of another system, and the first recipe."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from grpo_stage.board.locales import texts

from .browser import EVIL, choose, darken, fold, open_board, serious_faults, text_field


OF_TRL = f"""
model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
dataset_name: sums
num_generations: 16
per_device_train_batch_size: 16
max_completion_length: 64
reward_funcs: [accuracy, "{EVIL.replace('"', "'")}"]
"""
OURS = ("#grpo_wizard", "#grpo_tab", "#grpo_check_panel")


@pytest.fixture(scope="module")
def page(shared_page: Page) -> Page:
    """One page for all: a recipe that is imported leaves nothing of what was in the form before."""
    return shared_page


def test_problems_stand_beside_their_fields(page: Page) -> None:
    page.locator("#grpo_num_generations input").fill("1")
    fold(page, "memory")
    page.locator("#grpo_vllm_gpu_util input").fill("3")
    fold(page, "memory")
    text_field(page, "Learning rate").fill("fast")
    page.locator("#grpo_check_btn").click()
    problems = page.locator("#grpo_check_result ol")
    for said in ("`learning_rate: fast`", "`num_generations: 1`", "`vllm_gpu_util: 3", "`reward_funcs` is missing"):
        expect(problems).to_contain_text(said.replace("`", ""))
    page.get_by_role("button", name="Abort").click()
    expect(problems).to_be_hidden()
    choose_language(page, "zh")
    page.locator("#grpo_check_btn").click()
    link = problems.get_by_role("link", name=texts("zh")["elements"]["grpo_vllm_gpu_util"]["label"])
    expect(link).to_be_visible()
    field = page.locator("#grpo_vllm_gpu_util input")
    expect(field).to_be_hidden()
    link.click()
    expect(field).to_be_focused()
    assert page.locator("#grpo_vllm_gpu_util").evaluate("field => getComputedStyle(field).outlineStyle") == "solid"
    choose_language(page, "en")
    page.get_by_role("button", name="Abort").click()


def choose_language(page: Page, language: str) -> None:
    page.get_by_role("listbox").first.click()
    page.get_by_role("option", name=language, exact=True).click()
    expect(page.locator("#grpo_check_btn")).to_have_text(texts(language)["elements"]["grpo_check_btn"]["value"])


def test_another_systems_recipe_and_then_the_first_one(
    page: Page, board_url: str, tmp_path: Path, tiny_model_dir: Path, missing_tool: Callable[[str], None]
) -> None:
    (tmp_path / "trl.yaml").write_text(OF_TRL)
    page.locator("#grpo_tab input[type=file]").set_input_files(tmp_path / "trl.yaml")
    account = page.locator("#grpo_port_account")
    expect(account).to_contain_text("max_completion_length", timeout=120_000)
    expect(account).to_contain_text("renamed")
    expect(account).to_contain_text("<img src=x")
    expect(page.locator("#grpo_num_generations input")).to_have_value("16")
    expect(text_field(page, "Model path")).to_have_value("Qwen/Qwen2.5-1.5B-Instruct")

    other = page.context.browser.new_page()  # type: ignore[union-attr]
    open_board(other, board_url)
    expect(other.locator("#grpo_port_account")).to_be_hidden()
    expect(other.locator("#grpo_num_generations input")).to_have_value("8")
    other.close()

    dataset = page.locator("#grpo_wizard_dataset input")
    dataset.fill("sums")
    dataset.press("Enter")
    page.locator("#grpo_wizard_model").get_by_role("textbox").fill(str(tiny_model_dir))
    page.locator("#grpo_wizard_btn").click()
    result = page.locator("#grpo_check_result")
    expect(result).to_contain_text("A step: 4 prompts x 4 completions = 16 completions", timeout=120_000)
    expect(result).to_contain_text("It fits:", timeout=120_000)  # the last part
    expect(result).to_contain_text("<img src=x onerror")
    expect(account).to_be_hidden()  # it is of another form
    expect(page.locator("#grpo_max_steps input")).to_have_value("20")
    assert page.locator("#grpo_check_panel img, #grpo_tab img[src=x]").count() == 0
    assert page.title() != "evil"
    assert serious_faults(page, OURS, missing_tool) == []

    # The same recipe's model is asked, while a list is open in the dark.
    choose(page, "Rollout engine", "hf")
    page.locator("#grpo_probe_btn").click()
    darken(page)
    page.locator("#grpo_wizard_rewards input").click()
    expect(page.get_by_role("option", name="exact_match", exact=True)).to_be_visible()
    assert serious_faults(page, OURS, missing_tool) == []
    page.keyboard.press("Escape")
    expect(result).to_contain_text(texts("en")["messages"]["probe_result"], timeout=120_000)
    expect(result.get_by_role("row").filter(has_text="prompts x samples")).to_contain_text(" x 8")
    expect(result.get_by_role("row").filter(has_text="tokens a second")).to_contain_text(re.compile(r"[1-9]\d*$"))
    expect(result.locator("li").first).not_to_be_empty()  # what it means for the recipe
    expect(result.get_by_role("status")).to_have_count(0)
    assert serious_faults(page, OURS, missing_tool) == []
