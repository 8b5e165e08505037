"""Arguments of the questions that the run view's script asks: they come from a page, and may be anything."""

import math
from collections.abc import Mapping
from typing import Any

from grpo_stage.records.run_files import is_number


def whole_numbers(asked: Mapping[str, Any], *names: str) -> list[int]:
    """Arguments of a question.

    Raises:
        ValueError: if one is no whole number.
    """
    values = [asked.get(name) for name in names]
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise ValueError(f"{dict(zip(names, values, strict=True))} are no whole numbers.")
    return values  # type: ignore[return-value]


def number_or_none(value: Any) -> float | None:
    """A number of a question; None for anything else."""
    return float(value) if is_number(value) and math.isfinite(value) else None
