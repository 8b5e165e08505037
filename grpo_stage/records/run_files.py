"""The logs of a run as curves and completions, read while they grow.

A further read costs only the new lines. A file that was replaced (a resumed run cuts its logs off at its checkpoint)
is read from its beginning. A damaged line is left out and counted.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal

from grpo_stage.records.completions import COMPLETIONS_FILE


LOG_FILE, ALARMS_FILE = "trainer_log.jsonl", "alarms.jsonl"
Order = Literal["best", "worst", "sampled"]

_MAX_STEP = 10**18
_STEP = re.compile(rb'\n\{"step": (\d{1,18}),')  # ten times as fast as with ^
Point = tuple[int, float]


class _GrowingFile:
    """The whole lines of a file, each returned once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None
        self.position = 0
        """How many bytes were returned so far."""
        self.error = ""
        """Why the file cannot be read; empty where it can, or where there is none."""

    @property
    def version(self) -> tuple[Any, ...]:
        """Another one whenever the content is another."""
        return self._identity, self.position, self.error

    def read_new(self) -> tuple[bytes, bool]:
        """The new whole lines, and whether they are the first of the file: then the earlier ones no longer count."""
        before = self.version
        self.error = ""
        try:
            if not stat.S_ISREG(self._path.stat().st_mode):  # opening a pipe would wait for its writer
                raise OSError("not an ordinary file")
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                is_new = (status.st_dev, status.st_ino) != self._identity or status.st_size < self.position
                if is_new:
                    self._identity, self.position = (status.st_dev, status.st_ino), 0
                file.seek(self.position)
                added = file.read()
        except OSError as error:
            self._identity, self.position = None, 0
            self.error = "" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
            return b"", self.version != before
        added = added[: added.rfind(b"\n") + 1]  # the last line may be half written
        self.position += len(added)
        return added, is_new


class MetricCurves(_GrowingFile):
    """Every metric of a run's log by step."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / LOG_FILE)
        self._points: dict[str, list[Point]] = {}
        self.progress: dict[str, Any] = {}
        """The last line."""
        self.num_damaged_lines = 0

    def update(self) -> bool:
        """Read the new lines. Returns False if there are none."""
        added, is_new = self.read_new()
        if is_new:
            self._points, self.progress, self.num_damaged_lines = {}, {}, 0
        for line in added.split(b"\n")[:-1]:
            record = _record(line)
            step = record.get("current_steps")
            if not isinstance(step, int) or not 0 <= step < _MAX_STEP:
                self.num_damaged_lines += 1
                continue
            self.progress = record
            for name, value in record.items():
                if _is_number(value):
                    self._points.setdefault(name, []).append((step, value))
        return bool(added) or is_new

    def matching(self, patterns: Sequence[str], max_points: int) -> dict[str, list[Point]]:
        """The curves whose names match, in the order of the patterns, each of at most `max_points` points.

        A longer curve keeps its first and last point, and the lowest and highest of each of equal parts between.
        """
        names = dict.fromkeys(name for pattern in patterns for name in self._points if fnmatch(name, pattern))
        return {name: thinned(self._points[name], max_points) for name in names}


class AlarmLines(_GrowingFile):
    """The alarms of a run, as `monitors.alarms` writes them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / ALARMS_FILE)
        self.records: list[dict[str, Any]] = []
        """In the order in which they were raised."""
        self.num_damaged_lines = 0

    def update(self) -> bool:
        """Read the new lines. Returns False if there are none."""
        added, is_new = self.read_new()
        if is_new:
            self.records, self.num_damaged_lines = [], 0
        for line in added.split(b"\n")[:-1]:
            record = _record(line)
            if _is_alarm(record):
                self.records.append(record)
            else:
                self.num_damaged_lines += 1
        return bool(added) or is_new


def thinned(points: Sequence[Point], max_points: int) -> list[Point]:
    """At most `max_points` (4 or more) of the points: the lowest and the highest value of each of equal parts."""
    if len(points) <= max_points:
        return list(points)
    first, *inner, last = points
    num_parts = (max_points - 2) // 2
    bounds = [i * len(inner) // num_parts for i in range(num_parts + 1)]
    kept = [first]
    for start, end in pairwise(bounds):
        part = range(start, end)
        extremes = {min(part, key=lambda i: inner[i][1]), max(part, key=lambda i: inner[i][1])}
        kept += [inner[i] for i in sorted(extremes)]
    return [*kept, last]


class CompletionPages(_GrowingFile):
    """The completions of a run, a page at a time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / COMPLETIONS_FILE)
        self._spans: dict[int, list[tuple[int, int]]] = {}
        """Where in the file the lines of each step are, in bytes."""
        self._num_damaged: dict[int | None, int] = {}
        """Damaged lines of each step, counted when the step is read; those before the first step under None."""

    @property
    def num_damaged_lines(self) -> int:
        """Damaged lines in the part that was read so far."""
        return sum(self._num_damaged.values())

    def update(self) -> bool:
        """Find the new lines. Returns False if there are none."""
        start = self.position
        added, is_new = self.read_new()
        if is_new:
            self._spans, self._num_damaged, start = {}, {}, 0
        spans = list(_runs_of_steps(added))
        if not self._spans:
            self._num_damaged[None] = added[: spans[0][1] if spans else None].count(b"\n")
        for step, begin, end in spans:
            self._spans.setdefault(step, []).append((start + begin, start + end))
        return bool(added) or is_new

    @property
    def steps(self) -> Sequence[int]:
        """The steps that have completions, ascending."""
        return sorted(self._spans)

    def at_step(self, step: int, order: Order) -> list[dict[str, Any]]:
        """The records of a step, as they were sampled or by reward; records without a reward come last.

        Raises:
            KeyError: if the step has no completions.
            OSError: if the file can no longer be read.
        """
        with self._path.open("rb") as file:
            lines = [line for span in self._spans[step] for line in _lines_of(file, *span)]
        records = [record for line in lines if _is_completion(record := _record(line))]
        self._num_damaged[step] = len(lines) - len(records)
        if order == "sampled":
            return records
        sign = -1 if order == "best" else 1
        return sorted(records, key=lambda record: (record["reward"] is None, sign * (record["reward"] or 0.0)))


def _lines_of(file: BinaryIO, begin: int, end: int) -> list[bytes]:
    file.seek(begin)
    return file.read(end - begin).split(b"\n")[:-1]


def _record(line: bytes) -> dict[str, Any]:
    """The object of a line; an empty one if the line is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _is_number(value: Any) -> bool:
    """Whether the value is a number that can be drawn."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _is_alarm(record: dict[str, Any]) -> bool:
    texts = ("monitor", "seen", "meaning", "remedy", "action")
    is_whole = all(isinstance(record.get(name), str) for name in texts) and isinstance(record.get("settings"), dict)
    return is_whole and isinstance(record.get("step"), int)


def _is_completion(record: dict[str, Any]) -> bool:
    texts = [record.get(name) or "" for name in ("prompt", "completion", "reference")]
    rewards = record.get("rewards", {})
    if "completion" not in record or not isinstance(rewards, dict) or not all(isinstance(text, str) for text in texts):
        return False
    numbers = [record.get("reward"), record.get("advantage"), *rewards.values()]
    return all(value is None or isinstance(value, float) or _is_number(value) for value in numbers)


def _runs_of_steps(lines: bytes) -> Iterator[tuple[int, int, int]]:
    """(step, begin, end) of neighboring lines of one step; every line begins with its step."""
    begin, current = 0, None
    for match in _STEP.finditer(b"\n" + lines):
        step = int(match.group(1))
        if step != current:
            if current is not None:
                yield current, begin, match.start()
            begin, current = match.start(), step
    if current is not None:
        yield current, begin, len(lines)
