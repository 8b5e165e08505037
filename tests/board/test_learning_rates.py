"""The learning rate that the form starts with, and when it follows another choice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_stage.board import tab
from grpo_stage.board.page_state import this_page
from grpo_stage.board.tab import SANE_VALUES
from grpo_stage.host.learning_rates import LORA_ALPHA, start_rate

from .conftest import REPOSITORY, Board


def model_of(width: Any, **others: Any) -> str:
    Path("model").mkdir(exist_ok=True)
    Path("model", "config.json").write_text(json.dumps({"hidden_size": width, **others}))
    return "model"


@pytest.mark.parametrize(
    ("width", "lora", "full"),
    [(576, "3e-4", "7e-6"), (1536, "1e-4", "3e-6"), (4096, "4e-5", "1e-6"), (8192, "2e-5", "5e-7")],
)
def test_a_wider_model_gets_a_lower_rate_and_all_weights_one_still_lower(width: int, lora: str, full: str) -> None:
    rates = [start_rate(method, model_of(width)) for method in ("lora", "oft", "full", "freeze")]
    assert rates == [lora, lora, full, full]


def test_a_model_for_images_has_the_width_of_its_language_model() -> None:
    assert start_rate("lora", model_of(1000, text_config={"hidden_size": 576})) == "3e-4"
    assert start_rate("lora", model_of(1000, text_config=None)) == "2e-4"


@pytest.mark.parametrize("model", ["", "Custom", "some/model", ".", "a b\0c", "model/config.json"])
def test_a_model_whose_config_is_not_here_gets_the_rate_of_a_large_one(model: str) -> None:
    model_of(576)
    assert start_rate("lora", model) == "4e-5"


WIDTHS = {
    "quickstart/model": 576,
    "Qwen/Qwen2.5-1.5B": 1536,
    "Qwen/Qwen2.5-1.5B-Instruct": 1536,
    "Qwen/Qwen2.5-7B-Instruct": 3584,
}
RECIPES = sorted(
    path
    for path in (REPOSITORY / "yaml_examples").glob("*.yaml")
    if "stage: grpo" in path.read_text()
    # What they say is to be expected was measured at other rates, the one with a random model.
    and path.stem not in ("images_squares", "tools_guessing_game")
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_examples_have_the_rates_of_their_models(path: Path) -> None:
    recipe = yaml.safe_load(path.read_text())
    method = recipe["finetuning_type"]
    assert float(start_rate(method, model_of(WIDTHS[recipe["model_name_or_path"]]))) == recipe["learning_rate"]
    assert method == "full" or recipe.get("lora_alpha", 2 * recipe["lora_rank"]) == LORA_ALPHA


def test_the_rate_follows_model_and_method_until_the_user_has_one(
    board: Board, event_of: Callable[[str], Any], turn_to: Callable[[str], None]
) -> None:
    choose, follow = event_of("choose"), event_of("follow")
    turn_to("page")
    folder = str(REPOSITORY / "yaml_examples" / "data")
    before = ["5e-5", "bf16", *["host's"] * len(SANE_VALUES)]
    _, earlier, rate, *others = choose("GRPO", "lora", "", folder, [], None, *before)
    assert (earlier, rate, others[1]) == (before, "4e-5", 32)
    rate = follow("GRPO", "lora", model_of(576), rate)
    assert rate == "3e-4"
    assert follow("GRPO", "full", "model", rate) == "7e-6"
    assert "value" not in follow("GRPO", "lora", "model", "1e-6")  # the user's own
    assert "value" not in follow("DPO", "lora", "model", this_page().rate)
    # What the form has set goes with the stage, and what the user has changed stays.
    _, _, *left = choose("DPO", "full", "model", folder, [], earlier, "7e-6", "pure_bf16", *others[1:])
    assert left == ["5e-5", "pure_bf16", *before[2:]]


def test_a_models_path_is_known_while_the_hosts_file_of_paths_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    name, hub = "Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"
    for content, path in ((None, hub), ({}, hub), ({"path_dict": {}}, hub), ({"path_dict": {name: "/own"}}, "/own")):
        monkeypatch.setattr(tab, "load_config", lambda content=content: content)
        assert tab._path_of(name) == path
    assert tab._path_of("a model that nobody knows") == ""
