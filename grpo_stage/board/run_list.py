"""The runs below the Board's folder of outputs."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_stage.board.run_state import RunState, state_of
from grpo_stage.board.training_process import TrainingProcess
from grpo_stage.records.activity import ACTIVITY_FILE
from grpo_stage.records.completions import COMPLETIONS_FILE
from grpo_stage.records.run_files import LOG_FILE, record_of
from grpo_stage.records.run_record import RUN_FILE


MAX_RUNS = 300
_DEPTH = 4
_TAIL_BYTES = 2**16
_MARKS = (LOG_FILE, COMPLETIONS_FILE, RUN_FILE, ACTIVITY_FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedRun:
    """A run in the list."""

    name: str
    """Its folder below the folder of outputs."""
    state: RunState
    step: int | None
    total_steps: int | None
    reward: float | None
    """The last one of its log."""
    changed: float
    """When its log was written last, as a Unix time."""


def runs_below(root: Path, processes: Mapping[str, TrainingProcess]) -> list[ListedRun]:
    """The runs, the latest first; at most `MAX_RUNS`.

    Args:
        root: the folder.
        processes: those that this Board started, by output folder.
    """
    found = sorted(((_changed(folder), folder) for folder in _folders(root, _DEPTH)), reverse=True)
    return [_listed(root, folder, changed, processes.get(str(folder))) for changed, folder in found[:MAX_RUNS]]


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # another user's, or gone since
        return
    if any(entry.name in _MARKS for entry in entries):
        yield folder
        return
    for entry in entries:
        if depth and entry.is_dir() and not entry.name.startswith(("checkpoint-", ".")):
            yield from _folders(Path(entry.path), depth - 1)


def _changed(folder: Path) -> float:
    return max((file.stat().st_mtime for name in _MARKS if (file := folder / name).exists()), default=0.0)


def _listed(root: Path, folder: Path, changed: float, process: TrainingProcess | None) -> ListedRun:
    progress, reward = _end_of_log(folder / LOG_FILE)
    step, total = progress.get("current_steps"), progress.get("total_steps")
    return ListedRun(
        name=folder.relative_to(root).as_posix(),
        state=state_of(folder, progress, process),
        step=step if isinstance(step, int) else None,
        total_steps=total if isinstance(total, int) else None,
        reward=reward,
        changed=changed,
    )


def _end_of_log(path: Path) -> tuple[Mapping[str, Any], float | None]:
    """The last sound line of a log, and the last reward near its end."""
    if not path.is_file():
        return {}, None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().split(b"\n")
    records = [record for line in lines if isinstance((record := record_of(line)).get("current_steps"), int)]
    rewards = [record["reward"] for record in records if isinstance(record.get("reward"), int | float)]
    return (records[-1] if records else {}), (float(rewards[-1]) if rewards else None)
