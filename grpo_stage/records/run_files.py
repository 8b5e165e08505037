"""The logs of a run, read while they grow.

A further read costs only the new lines. A file that was replaced (a resumed run cuts its logs off at its checkpoint)
is read from its beginning. A damaged line is left out and counted.
"""

import json
import math
import os
import stat
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from grpo_stage.monitors.alarm import History


LOG_FILE, ALARMS_FILE = "trainer_log.jsonl", "alarms.jsonl"
_MAX_STEP = 10**18
Point = tuple[int, float]


class GrowingFile:
    """The whole lines of a file, each returned once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None
        self.position = 0
        """Where the lines end that `read_new` has returned or skipped, in bytes."""
        self.skipped = (0, 0)
        """Where the lines begin and end that `read_new` has skipped and `read_skipped` has not returned yet."""
        self.error = ""
        """Why the file cannot be read; empty where it can, or where there is none."""

    @property
    def version(self) -> tuple[Any, ...]:
        """Another one whenever the content is another."""
        return self._identity, self.position, self.skipped, self.error

    def read_new(self, max_bytes: int = -1, end_bytes: int = -1) -> tuple[bytes, bool]:
        """The new whole lines, and whether they are the first of the file: then the earlier ones no longer count.

        Args:
            max_bytes: leave lines after so many bytes to the next call.
            end_bytes: of a file that was not read before, skip the lines before so many bytes at its end.
        """
        before = self.version
        self.error = ""
        try:
            if not stat.S_ISREG(self._path.stat().st_mode):  # opening a pipe would wait for its writer
                raise OSError("not an ordinary file")
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                is_new = (status.st_dev, status.st_ino) != self._identity or status.st_size < self.position
                if is_new:
                    self._identity = status.st_dev, status.st_ino
                    self.position = _line_near_end(file, status.st_size, end_bytes) if end_bytes >= 0 else 0
                    self.skipped = 0, self.position
                file.seek(self.position)
                added = file.read(max_bytes)
                if len(added) == max_bytes:
                    added += file.readline()
        except OSError as error:
            self._identity, self.position, self.skipped = None, 0, (0, 0)
            self.error = "" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
            return b"", self.version != before
        added = added[: added.rfind(b"\n") + 1]  # the last line may be half written
        self.position += len(added)
        return added, is_new

    def read_skipped(self, max_bytes: int) -> tuple[bytes, int]:
        """The next whole lines of those that `read_new` has skipped, about so many bytes, and where they begin.

        Raises:
            OSError: if the file can no longer be read.
        """
        begin, end = self.skipped
        if begin == end:
            return b"", begin
        with self._path.open("rb") as file:
            file.seek(begin)
            lines = file.read(min(max_bytes, end - begin))
            if begin + len(lines) < end:
                lines += file.readline()
        self.skipped = (begin + len(lines), end) if lines else (end, end)  # it was cut since: `read_new` will see that
        return lines, begin


def _line_near_end(file: BinaryIO, size: int, num_bytes: int) -> int:
    """Where the first whole line among the last bytes of a file begins; 0 where there is none."""
    if size <= num_bytes:
        return 0
    file.seek(size - num_bytes)
    return file.tell() if file.readline().endswith(b"\n") else 0


class MetricCurves(GrowingFile):
    """Every metric of a run's log by step."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / LOG_FILE)
        self.history = History()
        """Every finite number of the log."""
        self.progress: dict[str, Any] = {}
        """The last line."""
        self.num_damaged_lines = 0

    def update(self) -> bool:
        """Read the new lines. Returns False if there are none."""
        added, is_new = self.read_new()
        if is_new:
            self.history, self.progress, self.num_damaged_lines = History(), {}, 0
        for line in added.split(b"\n")[:-1]:
            record = record_of(line)
            step = record.get("current_steps")
            if not isinstance(step, int) or not 0 <= step < _MAX_STEP:
                self.num_damaged_lines += 1
                continue
            self.progress = record
            numbers = {name: value for name, value in record.items() if is_number(value) and name != "step"}
            self.history.add(numbers)
        return bool(added) or is_new

    def matching(self, patterns: Sequence[str]) -> dict[str, list[Point]]:
        """The curves whose names match, in the order of the patterns."""
        known = self.history.names()
        names = dict.fromkeys(name for pattern in patterns for name in known if fnmatch(name, pattern))
        curves = {name: self.history.series(name) for name in names}
        return {name: list(zip(each.steps, each.values, strict=True)) for name, each in curves.items()}


class AlarmLines(GrowingFile):
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
            record = record_of(line)
            if _is_alarm(record):
                self.records.append(record)
            else:
                self.num_damaged_lines += 1
        return bool(added) or is_new


def record_of(line: bytes) -> dict[str, Any]:
    """The object of a line; an empty one if the line is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def is_number(value: Any) -> bool:
    """Whether the value is a number that can be drawn."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _is_alarm(record: dict[str, Any]) -> bool:
    texts = ("monitor", "seen", "meaning", "remedy", "action")
    is_whole = all(isinstance(record.get(name), str) for name in texts) and isinstance(record.get("settings"), dict)
    return is_whole and isinstance(record.get("step"), int)
