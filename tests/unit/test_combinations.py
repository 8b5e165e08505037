"""docs/combinations.md says what the code does: every cell of its tables is tried."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_stage.arguments import GRPOArguments


PAGE = Path(__file__).resolve().parents[2] / "docs" / "combinations.md"
# What a value needs beside itself, as the page says in words.
NEEDS: dict[str, dict[str, Any]] = {
    "loss_type: cispo": {"epsilon_high": 4.0},
    "loss_type: dro": {"dro_beta": 0.1},
    "loss_type: gpg": {"num_iterations": 1},
    "covariance_control: kl_cov": {"num_iterations": 2},
    "use_bias_correction_kl: true": {"beta": 0.1},
    "kl_in_reward: false": {"beta": 0.1},
    "kl_in_reward: true": {"beta": 0.1},
}


def cells() -> list[tuple[str, str, str]]:
    found = []
    for block in PAGE.read_text(encoding="utf-8").split("\n\n"):
        if not block.startswith("|"):
            continue
        header, _, *rows = [
            [cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in block.splitlines()
        ]
        found += [(row[0], column, cell) for row in rows for column, cell in zip(header[1:], row[1:], strict=True)]
    return found


def test_the_tables_are_read() -> None:
    verdicts = [cell for *_, cell in cells()]
    assert set(verdicts) == {"yes", "refused"}
    assert len(verdicts) == 15 * 6 + 15 * 9 + 10 * 4 + 12 * 2 + 3 * 3


def options_of(row: str, column: str) -> dict[str, Any]:
    """The keys of a cell, and what they need."""
    needed = NEEDS.get(row, {}) | NEEDS.get(column, {})
    if "kl_in_reward: true" in (row, column):
        if "kl_estimator" not in row:
            needed["kl_estimator"] = "k1"
        if row == "advantage_estimator: grpo" or "advantage_estimator" not in row:
            needed["scale_rewards"] = "none"
    return needed | yaml.safe_load(row) | yaml.safe_load(column)


@pytest.mark.parametrize(("row", "column", "verdict"), cells())
def test_a_cell_is_true(row: str, column: str, verdict: str) -> None:
    options = options_of(row, column)
    if verdict == "yes":
        GRPOArguments(reward_funcs="accuracy", **options).validate()
    else:
        check_refusal(options, row.split(":")[0], column.split(":")[0])


def check_refusal(options: dict[str, Any], *keys: str) -> None:
    """The options are refused, and one of the keys is named."""
    with pytest.raises(ValueError, match="`") as refusal:
        GRPOArguments(reward_funcs="accuracy", **options).validate()
    assert set(re.findall(r"`(\w+)", str(refusal.value))) & set(keys)


# What the page says in words


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize(
    "column", ["rollout_correction: token", "top_entropy_quantile: 0.3", "covariance_control: clip_cov"]
)
def test_nothing_is_done_to_single_tokens_of_a_sequence(loss: str, column: str) -> None:
    options = {"loss_type": loss} | yaml.safe_load(column)
    check_refusal(options | {"importance_sampling_level": "sequence"}, column.split(":")[0])
    GRPOArguments(reward_funcs="accuracy", importance_sampling_level="sequence_token", **options).validate()


@pytest.mark.parametrize(
    "options", [{"delta": 3.0}, {"loss_type": "sapo", "sapo_temperature_neg": 2.0}, {"off_policy_mask_threshold": 0.1}]
)
def test_what_acts_on_negative_advantages_needs_some(options: dict[str, Any]) -> None:
    check_refusal({"advantage_estimator": "passk", **options}, *options)
    GRPOArguments(reward_funcs="accuracy", advantage_estimator="rloo", **options).validate()


@pytest.mark.parametrize(("scale", "is_refused"), [("auto", True), ("group", True), ("batch", False), ("none", False)])
def test_the_kl_in_the_reward_is_not_divided_by_the_group(scale: str, is_refused: bool) -> None:
    options = {"beta": 0.1, "kl_in_reward": True, "kl_estimator": "k1", "scale_rewards": scale}
    if is_refused:
        check_refusal(options, "scale_rewards")
    else:
        GRPOArguments(reward_funcs="accuracy", **options).validate()
