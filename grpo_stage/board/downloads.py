"""What the run view gives to download, beside pictures."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_stage.board.asked import whole_numbers
from grpo_stage.monitors.alarm import History
from grpo_stage.report.facts import facts_of
from grpo_stage.report.page import page_of


_DOWNLOAD_BYTES = 2**22


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


def piece_of(path: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a file from `start` on: whole lines, and where the next part begins."""
    (start,) = whole_numbers({"start": 0, **asked}, "start")
    with path.open("rb") as file:
        file.seek(max(0, start))
        part = file.read(_DOWNLOAD_BYTES)
        part += file.readline()
        return {"text": part.decode(errors="replace"), "next": file.tell() if part else None}
