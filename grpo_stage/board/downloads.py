"""What the run view gives to download, beside pictures and the completions as they are."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from grpo_stage.monitors.alarm import History
from grpo_stage.report.facts import facts_of
from grpo_stage.report.page import page_of


def curves_as_csv(history: History) -> str:
    """Every metric by step, not thinned: a column for each, a row for each step."""
    names = [name for name in history.names() if name != "current_steps"]
    rows: dict[int, dict[str, float]] = {}
    for name in names:
        series = history.series(name)
        for step, value in zip(series.steps, series.values, strict=True):
            rows.setdefault(step, {})[name] = value
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["step", *names])
    writer.writerows([step, *(rows[step].get(name, "") for name in names)] for step in sorted(rows))
    return text.getvalue()


def report_of(folders: Sequence[Path]) -> str:
    """The page of `grpo-stage report`.

    Raises:
        ValueError: if a folder is no run's.
    """
    return page_of(facts_of(folders))
