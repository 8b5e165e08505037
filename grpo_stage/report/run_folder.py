"""A run as its folder tells it: the log, how it ended, its alarms, its settings."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grpo_stage.arguments import GRPOArguments
from grpo_stage.monitors.alarm import Alarm, History, Watch
from grpo_stage.records.completions import COMPLETIONS_FILE
from grpo_stage.records.run_files import ALARMS_FILE, LOG_FILE
from grpo_stage.report.lines import read_object, records_of
from grpo_stage.report.settings import Settings, settings_of
from grpo_stage.survival.checkpoints import FINISHED_FILE, RESULTS
from grpo_stage.survival.run_lock import LOCK_FILE, refuse_used


TRAINER_STATE = "trainer_state.json"
State = Literal["finished", "running", "stopped", "failed", "unknown"]
_MAX_STEP = 10**18
_SAME_FAULT_LINES, _SAME_FAULT_SHARE = 20, 0.1
"""An alarm of a watch that was silent for at most so many log lines, or this part of all so far, is about the same
fault: what sways around a threshold is one fault."""
_DURATION = re.compile(r"(?:(\d+) days?, )?(\d+):(\d+):(\d+)")
# Neutral, as in the parser: a recipe in a checkpoint has them all, other files do not.
_GENERATION = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended, as far as its folder tells."""

    state: State
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarms:
    """What was wrong with a run."""

    found: Sequence[Alarm]
    are_judged_now: bool
    """Whether the run wrote none, so that its log was judged by the watches of this version."""
    notes: Sequence[str] = ()
    """What could not be judged."""


@dataclass(slots=True, kw_only=True)
class Log:
    """The log lines of a run."""

    history: History = field(default_factory=History)
    total_steps: int | None = None
    elapsed_s: float = 0.0
    """Over all processes that went on with the run."""
    num_lines: int = 0
    num_damaged: int = 0
    not_finite: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Metrics that were NaN or infinite: how often, and at which step first."""
    has_end: bool = False
    """Whether the line is there that ends training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that is known of a run, its completions apart."""

    name: str
    folder: Path
    log: Log
    outcome: Outcome
    alarms: Alarms
    settings: Settings
    num_damaged_alarms: int

    @property
    def steps(self) -> int:
        return self.log.history.step


def read_run(folder: Path, watches: Mapping[str, type[Watch]] | None = None) -> Run:
    """Read a run's folder, its `output_dir`.

    Args:
        folder: the folder.
        watches: judge the log of a run that wrote no alarms; `monitors.table.WATCHES` by default.

    Raises:
        ValueError: if the folder is no run's, naming what is missing.
    """
    checkpoint = newest_checkpoint(folder)
    _refuse_other_folders(folder, checkpoint)
    settings = settings_of(folder, checkpoint)
    alarms, num_damaged_alarms = _written_alarms(folder)
    judge = None
    if alarms is None:
        judge = Judge(_watches() if watches is None else watches, settings.values)
    log = _read_log(_log_lines(folder, checkpoint), judge)
    if judge is not None:
        alarms = Alarms(found=judge.found, are_judged_now=True, notes=judge.notes)
    assert alarms is not None
    return Run(
        name=folder.resolve().name,
        folder=folder,
        log=log,
        outcome=_outcome(folder, log, checkpoint),
        alarms=alarms,
        settings=settings,
        num_damaged_alarms=num_damaged_alarms,
    )


def _watches() -> Mapping[str, type[Watch]]:
    from grpo_stage.monitors.table import (
        WATCHES,  # loads torch and peft, which a run that has its alarms does not need
    )

    return WATCHES


def _refuse_other_folders(folder: Path, checkpoint: Path | None) -> None:
    if not folder.is_dir():
        raise ValueError(f"`{folder}` is no folder. Name the `output_dir` of a run.")
    if checkpoint or any((folder / name).exists() for name in (LOG_FILE, COMPLETIONS_FILE, TRAINER_STATE)):
        return
    runs = sorted(path.parent.name for path in folder.glob(f"*/{LOG_FILE}"))
    inside = f" There are runs in it: {', '.join(runs[:10])}." if runs else ""
    raise ValueError(
        f"`{folder}` is no run's folder: it has no {LOG_FILE} (the log of a run), no {COMPLETIONS_FILE}, no "
        f"{TRAINER_STATE} and no checkpoint.{inside} Name the `output_dir` of a run."
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step; None if there is none."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def _log_lines(folder: Path, checkpoint: Path | None) -> Iterator[Mapping[str, Any] | None]:
    """The lines of the log; without it, those that Trainer keeps."""
    if (folder / LOG_FILE).exists():
        yield from (record for _, record in records_of(folder / LOG_FILE))
        return
    for place in (folder, checkpoint):
        state = read_object(place / TRAINER_STATE) if place else {}
        lines = state.get("log_history")
        if isinstance(lines, list):
            for line in lines:
                is_sound = isinstance(line, dict)
                yield (
                    {**line, "current_steps": line.get("step"), "total_steps": state.get("max_steps")}
                    if (is_sound)
                    else None
                )
            return


def _read_log(lines: Iterator[Mapping[str, Any] | None], judge: "Judge | None") -> Log:
    log = Log()
    before_s = last_s = 0.0
    for line in lines:
        log.num_lines += 1
        step = None if line is None else line.get("current_steps")
        if line is None or not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < _MAX_STEP:
            log.num_damaged += 1
            continue
        numbers: dict[str, Any] = {"current_steps": step}
        for name, value in line.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
                number = _as_float(value)
                if not math.isfinite(number):
                    count, first = log.not_finite.get(name, (0, step))
                    log.not_finite[name] = count + 1, first
                numbers[name] = step if name == "current_steps" else number
        log.history.add(numbers)
        total = line.get("total_steps")
        log.total_steps = total if isinstance(total, int) and 0 < total < _MAX_STEP else log.total_steps
        log.has_end |= "train_loss" in line or "train_runtime" in line
        elapsed_s = _seconds(line.get("elapsed_time"))
        if elapsed_s is not None:
            if elapsed_s < last_s:  # a resumed run counts anew
                before_s += last_s
            last_s = elapsed_s
        if judge is not None:
            judge.see(log.history)
    log.elapsed_s = before_s + last_s
    return log


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number that no float can hold
        return math.inf if value > 0 else -math.inf


def _seconds(text: Any) -> float | None:
    found = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


class Judge:
    """Judges a log line by line, as the run would have done.

    Args:
        watches: by name.
        settings: those that are known; keys of this stage that are not have their defaults.
    """

    def __init__(self, watches: Mapping[str, type[Watch]], settings: Mapping[str, Any]) -> None:
        defaults = {spec.name: spec.default for spec in dataclasses.fields(GRPOArguments)}
        self.found: list[Alarm] = []
        self.notes: list[str] = []
        self._watches: dict[str, Watch] = {}
        self._last_fired: dict[str, float] = {}
        self._num_lines = 0
        known = {**_GENERATION, **defaults, **settings}
        for name, watch in watches.items():
            try:
                self._watches[name] = watch(known)
            except KeyError as error:
                self._leave_out(name, error)

    def see(self, history: History) -> None:
        """Judge the last line of the history."""
        self._num_lines += 1
        for name, watch in list(self._watches.items()):
            try:
                alarm = watch.judge(history)
            except KeyError as error:
                self._leave_out(name, error)
                continue
            if alarm is None:
                continue
            silent = self._num_lines - self._last_fired.get(name, -math.inf)
            if silent > max(_SAME_FAULT_LINES, _SAME_FAULT_SHARE * self._num_lines):
                self.found.append(alarm)
            self._last_fired[name] = self._num_lines

    def _leave_out(self, name: str, missing: KeyError) -> None:
        """A watch may need a key that no file of the folder holds: that is said, and the others go on."""
        self._watches.pop(name, None)
        self.notes.append(f"{name} did not judge this run: its folder does not tell {missing}.")


def _written_alarms(folder: Path) -> tuple[Alarms | None, int]:
    """The alarms that the run wrote, and the number of damaged lines; None for a run without monitors."""
    if not (folder / ALARMS_FILE).exists():
        return None, 0
    found, num_damaged = [], 0
    for _, record in records_of(folder / ALARMS_FILE):
        alarm = _alarm(record)
        if alarm is None:
            num_damaged += 1
        else:
            found.append(alarm)
    return Alarms(found=found, are_judged_now=False), num_damaged


def _alarm(record: Mapping[str, Any] | None) -> Alarm | None:
    if record is None or not isinstance(record.get("monitor"), str) or not isinstance(record.get("step"), int):
        return None
    onset, settings = record.get("onset"), record.get("settings")
    return Alarm(
        monitor=record["monitor"],
        step=record["step"],
        onset=onset if isinstance(onset, int) else record["step"],
        settings=settings if isinstance(settings, Mapping) else {},
        skips_prompts=record.get("skips_prompts") is True,
        seen=str(record.get("seen", "")),
        meaning=str(record.get("meaning", "")),
        remedy=str(record.get("remedy", "")),
    )


def _outcome(folder: Path, log: Log, checkpoint: Path | None) -> Outcome:
    step, total = log.history.step, log.total_steps
    of = f"step {step:,}" + (f" of {total:,}" if total else "")
    noted = read_object(folder / FINISHED_FILE)
    parts = noted.get("parts")
    if isinstance(parts, list) and RESULTS in parts:
        early = f", before the {total:,} that were announced" if total and step < total else ""
        return Outcome(state="finished", text=f"Finished at step {step:,}{early}.")
    try:
        if (folder / LOCK_FILE).exists():
            refuse_used(str(folder))
    except ValueError:
        return Outcome(state="running", text=f"Still running, at {of}.")
    hangs = sorted(path.name for path in folder.glob("stacks_*.txt"))
    going_on = f" The same command goes on from {checkpoint.name}." if checkpoint else " It left no checkpoint."
    if hangs:
        return Outcome(state="failed", text=f"Ended at {of} after a hang (see {', '.join(hangs)}).{going_on}")
    if (folder / LOCK_FILE).exists():
        return Outcome(state="failed", text=f"Its process was killed at {of}, perhaps for want of memory.{going_on}")
    if log.has_end or (total and step >= total):
        return Outcome(state="stopped", text=f"All steps are done ({of}), and the run's end is not noted.{going_on}")
    if checkpoint and checkpoint.name == f"checkpoint-{step}":
        return Outcome(
            state="stopped", text=f"Stopped at {of} with a checkpoint: by a person, or by an error.{going_on}"
        )
    if log.num_lines == 0:
        return Outcome(state="unknown", text="No log line was written.")
    return Outcome(state="failed", text=f"Ended at {of} without its end: by an error, or killed.{going_on}")
