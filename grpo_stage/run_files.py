"""What a run leaves in its folder, for whoever looks at it: curves and completions, read as they grow.

Reading again costs what was added since. A file that was replaced (a resumed run takes its logs up where its
checkpoint stands) is read from its beginning.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from .completions_log import COMPLETIONS_FILE


LOG_FILE = "trainer_log.jsonl"
Order = Literal["best", "worst", "sampled"]

_STEP = re.compile(rb'\n\{"step": (\d+),')  # ten times as fast as with ^
Point = tuple[int, float]


class _GrowingFile:
    """Whole lines of a file, handed out once each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None
        self.position = 0
        """Bytes that were handed out."""

    def read_new(self) -> tuple[bytes, bool]:
        """The whole lines added since, and whether they are the file's first: then forget the earlier ones."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            is_gone = self.position > 0
            self._identity, self.position = None, 0
            return b"", is_gone
        with file:
            status = self._path.stat()
            is_new = (status.st_dev, status.st_ino) != self._identity or status.st_size < self.position
            if is_new:
                self._identity, self.position = (status.st_dev, status.st_ino), 0
            file.seek(self.position)
            added = file.read()
        added = added[: added.rfind(b"\n") + 1]  # the last line may be half written
        self.position += len(added)
        return added, is_new


class MetricCurves:
    """Every metric of a run's log by step."""

    def __init__(self, folder: Path) -> None:
        self._file = _GrowingFile(folder / LOG_FILE)
        self._points: dict[str, list[Point]] = {}
        self.progress: dict[str, Any] = {}
        """The last line."""

    def update(self) -> bool:
        """Read what is new; False where nothing is."""
        added, is_new = self._file.read_new()
        if is_new:
            self._points, self.progress = {}, {}
        for line in added.splitlines():
            self.progress = json.loads(line)
            step = self.progress["current_steps"]
            for name, value in self.progress.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._points.setdefault(name, []).append((step, value))
        return bool(added) or is_new

    def matching(self, patterns: Sequence[str], max_points: int) -> dict[str, list[Point]]:
        """The curves whose names match, in the order of the patterns, each of at most `max_points` points.

        A longer curve is cut into as many equal parts; a part's point is its last step, and the mean of its values.
        """
        names = dict.fromkeys(name for pattern in patterns for name in self._points if fnmatch(name, pattern))
        return {name: thinned(self._points[name], max_points) for name in names}


def thinned(points: Sequence[Point], max_points: int) -> list[Point]:
    """At most `max_points` points in place of more."""
    if len(points) <= max_points:
        return list(points)
    bounds = [i * len(points) // max_points for i in range(max_points + 1)]
    parts = [points[start:end] for start, end in pairwise(bounds)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


class CompletionPages:
    """The completions of a run, a page at a time."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / COMPLETIONS_FILE
        self._file = _GrowingFile(self._path)
        self._steps: list[int] = []
        self._spans: list[tuple[int, int]] = []
        """Bytes of the file that hold each step's lines."""

    def update(self) -> bool:
        """Find what is new; False where nothing is."""
        start = self._file.position
        added, is_new = self._file.read_new()
        if is_new:
            self._steps, self._spans, start = [], [], 0
        for step, begin, end in _runs_of_steps(added):
            if self._steps and self._steps[-1] == step:
                self._spans[-1] = (self._spans[-1][0], start + end)
            else:
                self._steps.append(step)
                self._spans.append((start + begin, start + end))
        return bool(added) or is_new

    @property
    def steps(self) -> Sequence[int]:
        """The steps that have completions, ascending."""
        return self._steps

    def at_step(self, step: int, order: Order) -> list[dict[str, Any]]:
        """The records of a step; by reward, those without one last, or as they were sampled.

        Raises:
            KeyError: if the step has no completions.
        """
        position = bisect_left(self._steps, step)
        if position == len(self._steps) or self._steps[position] != step:
            raise KeyError(step)
        begin, end = self._spans[position]
        with self._path.open("rb") as file:
            file.seek(begin)
            records = [json.loads(line) for line in file.read(end - begin).splitlines()]
        if order == "sampled":
            return records
        sign = -1 if order == "best" else 1
        return sorted(records, key=lambda record: (record["reward"] is None, sign * (record["reward"] or 0.0)))


def _runs_of_steps(lines: bytes) -> Iterator[tuple[int, int, int]]:
    """(step, begin, end) of neighbouring lines of one step; every line begins with its step."""
    begin, current = 0, None
    for match in _STEP.finditer(b"\n" + lines):
        step = int(match.group(1))
        if step != current:
            if current is not None:
                yield current, begin, match.start()
            begin, current = match.start(), step
    if current is not None:
        yield current, begin, len(lines)
