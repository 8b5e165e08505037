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
    assert len(verdicts) == 9 * 6 + 9 * 8 + 8 * 4 + 10 * 2 + 3 * 3


@pytest.mark.parametrize(("row", "column", "verdict"), cells())
def test_a_cell_is_true(row: str, column: str, verdict: str) -> None:
    needed = NEEDS.get(row, {}) | NEEDS.get(column, {})
    if "kl_in_reward: true" in (row, column):
        if "kl_estimator" not in row:
            needed["kl_estimator"] = "k1"
        if row == "advantage_estimator: grpo" or "advantage_estimator" not in row:
            needed["scale_rewards"] = "none"
    options = needed | yaml.safe_load(row) | yaml.safe_load(column)
    arguments = GRPOArguments(reward_funcs="accuracy", **options)
    if verdict == "yes":
        arguments.validate()
        return
    with pytest.raises(ValueError, match="`") as refusal:
        arguments.validate()
    keys = set(re.findall(r"`(\w+)", str(refusal.value)))
    assert keys & {row.split(":")[0], column.split(":")[0]}
