"""The state of a run, from its folder and from the process that this Board started, if it did."""

import contextlib
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grpo_stage.board.training_process import TrainingProcess
from grpo_stage.records.activity import ACTIVITY_FILE
from grpo_stage.report.lines import read_object
from grpo_stage.report.run_folder import newest_checkpoint
from grpo_stage.survival.checkpoints import FINISHED_FILE, RESULTS
from grpo_stage.survival.run_lock import LOCK_FILE, refuse_used


Kind = Literal[
    "none", "preparing", "running", "evaluating", "saving", "stopping", "stopped", "failed", "killed", "finished"
]
LIVE: tuple[Kind, ...] = ("preparing", "running", "evaluating", "saving", "stopping")
_OF_ACTIVITY: Mapping[str, Kind] = {
    "training": "running",
    "evaluation": "evaluating",
    "saving": "saving",
    "stopping": "stopping",
}
_BY_ABORT = f"stopped by {signal.SIGABRT.name}"
"""What the run notes at the Board's "Abort", whose badge says it."""
_ENDS: tuple[Kind, ...] = ("finished", "stopped", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a run does, or how it ended."""

    kind: Kind
    doing: str = ""
    """What is being prepared: `starting`, or a name of `records.activity.Preparing`."""
    seconds: float | None = None
    """For how long."""
    done: list[tuple[str, float]] = field(default_factory=list)
    """What was prepared before, with the seconds that it took."""
    error: str = ""
    """The last error in words, or why the run was stopped."""
    log: str = ""
    """What the error left in the log."""
    checkpoint: str = ""
    """The name of the newest checkpoint."""


def state_of(folder: Path, progress: Mapping[str, Any], process: TrainingProcess | None) -> RunState:
    """The state of the run in a folder.

    Args:
        folder: its output folder.
        progress: the last line of its log; empty where there is none.
        process: the one that this Board started in the folder last.
    """
    noted = read_object(folder / ACTIVITY_FILE)
    if process is not None and noted.get("since", 0) < process.started:
        noted = {}  # that of an earlier run
    newest = newest_checkpoint(folder)
    checkpoint = newest.name if newest else ""
    if _is_alive(folder, process):
        return _live(noted, progress, process)
    name = noted.get("activity")
    error, log = str(noted.get("error") or ""), str(noted.get("log") or "")
    error = "" if error == _BY_ABORT else error
    if process is not None and process.returncode and not process.was_aborted and name != "stopped":
        return RunState(
            kind="failed", error=error or _last_words(process.errors), log=process.errors or log, checkpoint=checkpoint
        )
    if process is not None and process.was_aborted and not _is_done(progress):
        return RunState(kind="stopped", error=error, log=log, checkpoint=checkpoint)
    if name in _ENDS:
        return RunState(kind=name, error=error, log=log, checkpoint=checkpoint)
    if name is not None or (folder / LOCK_FILE).exists():
        return RunState(kind="killed", doing=str(name or ""), checkpoint=checkpoint)
    return RunState(kind=_of_files(folder, progress, checkpoint), checkpoint=checkpoint)  # of an earlier version


def _is_alive(folder: Path, process: TrainingProcess | None) -> bool:
    if process is not None and not process.has_ended:
        return True
    try:
        if (folder / LOCK_FILE).exists():
            refuse_used(str(folder))
    except ValueError:
        return True
    return False


def _live(noted: Mapping[str, Any], progress: Mapping[str, Any], process: TrainingProcess | None) -> RunState:
    name, done = noted.get("activity"), noted.get("done")
    since = noted.get("since")
    kind = _OF_ACTIVITY.get(str(name), "preparing")
    if not noted:
        since = process.started if process is not None else None
        kind = "running" if progress and process is None else "preparing"
    elif process is not None and name in _ENDS:  # it has said so, and its process still ends
        kind = "saving" if name == "finished" else "stopping"
    if process is not None and process.was_aborted:
        kind = "stopping"
    is_new = name is None or name in _ENDS
    return RunState(
        kind=kind,
        doing="starting" if is_new else str(name),
        seconds=max(0.0, time.time() - since) if isinstance(since, int | float) else None,
        done=[(str(what), float(took)) for what, took in done] if isinstance(done, list) and not is_new else [],
    )


def _of_files(folder: Path, progress: Mapping[str, Any], checkpoint: str) -> Kind:
    parts = read_object(folder / FINISHED_FILE).get("parts")
    if (isinstance(parts, list) and RESULTS in parts) or _is_done(progress):
        return "finished"
    if checkpoint or progress:
        return "stopped"
    return "none"


def _is_done(progress: Mapping[str, Any]) -> bool:
    return bool(progress) and progress.get("current_steps") == progress.get("total_steps")


def _last_words(errors: str) -> str:
    """The last line that says something: of a traceback the error itself."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def log_of(folder: Path, name: str, max_bytes: int = 30_000) -> str:
    """The end of a log in the folder; empty if there is none."""
    with contextlib.suppress(FileNotFoundError), (folder / name).open("rb") as file:
        file.seek(max(0, (folder / name).stat().st_size - max_bytes))
        return file.read().decode(errors="replace")
    return ""
