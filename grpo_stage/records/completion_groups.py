"""The completions of a run by group: the completions of one prompt at one step, found in a file of any size.

The file is scanned once, its end first, so that the newest groups are known at once; as it grows only its new part is.
What stays in memory is where each group is and what it earned; texts are read when they are asked for.
"""

import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from grpo_stage.records.completions import COMPLETIONS_FILE
from grpo_stage.records.run_files import GrowingFile, is_number, record_of


Order = Literal["sampled", "best", "worst", "spread"]
ORDERS: tuple[Order, ...] = get_args(Order)
_BLOCK_BYTES = 2**23
# The start of a line, as `CompletionsLog` writes it; ten times as fast as with ^.
_HEAD = re.compile(rb'\n\{"step": (\d{1,18}), (?:"prompt_index": (-?\d{1,18}), )?')
_REWARD = b'"reward": '  # cannot be in a text, whose quotes are escaped
_TRUNCATED = b'"finish_reason": "length"'


@dataclass(slots=True)
class Group:
    """The completions of one prompt at one step."""

    step: int
    prompt: int
    """The prompt's index in the dataset; below 0 a number of ours, where the file has no index."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Where its lines are in the file, in bytes."""
    num: int = 0
    num_truncated: int = 0
    rewards: list[float] = field(default_factory=list)
    """Total rewards, of those that have one."""

    @property
    def mean(self) -> float | None:
        return math.fsum(self.rewards) / len(self.rewards) if self.rewards else None

    @property
    def range(self) -> float:
        """The highest reward less the lowest."""
        return max(self.rewards) - min(self.rewards) if self.rewards else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which groups are wanted: those with a completion that is all of this."""

    step: int | None = None
    text: str = ""
    """Occurs in the line of the completion: its prompt, text or reference. ASCII letters match in either case."""
    lowest: float | None = None
    highest: float | None = None
    is_truncated: bool = False

    def may_take(self, group: Group) -> bool:
        if self.step is not None and group.step != self.step:
            return False
        if self.is_truncated and not group.num_truncated:
            return False
        return (self.lowest is None and self.highest is None) or any(map(self._is_in_range, group.rewards))

    def takes(self, line: bytes, record: dict[str, Any]) -> bool:
        """Whether a line's completion is wanted."""
        if self.is_truncated and record.get("finish_reason") != "length":
            return False
        if (self.lowest is not None or self.highest is not None) and not self._is_in_range(record["reward"]):
            return False
        return self.needle in line.lower()

    @property
    def needle(self) -> bytes:
        """The text as it is in the file."""
        return json.dumps(self.text, ensure_ascii=False)[1:-1].encode("utf-8", "replace").lower()

    def _is_in_range(self, reward: float | None) -> bool:
        low, high = self.lowest, self.highest
        return reward is not None and (low is None or reward >= low) and (high is None or reward <= high)


class CompletionGroups(GrowingFile):
    """The groups of a run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / COMPLETIONS_FILE)
        self._forget()

    def _forget(self) -> None:
        self._by_step: dict[int, dict[int, Group]] = {}
        self._steps_of_prompt: dict[int, list[int]] = {}
        self._own_numbers: dict[str, int] = {}
        self._num_headless = 0
        self._damaged: set[int] = set()
        """Where lines are that begin as they should and are damaged all the same, as far as they were read."""

    @property
    def num_damaged_lines(self) -> int:
        """Damaged lines, as far as they are known: inside a line, damage shows when its group is read."""
        return self._num_headless + len(self._damaged)

    def update(self, seconds: float = math.inf) -> bool:
        """Find the new lines, for about so many seconds. Returns whether all are found."""
        deadline = time.monotonic() + seconds
        while True:
            lines, is_new = self.read_new(_BLOCK_BYTES, end_bytes=_BLOCK_BYTES)
            start = self.position - len(lines)
            if is_new:
                self._forget()
            if not lines:
                try:
                    lines, start = self.read_skipped(_BLOCK_BYTES)
                except OSError:  # the file is gone since: the next call finds that, or the one that took its place
                    return False
            if not lines:
                return True
            self._scan(lines, start)
            if time.monotonic() > deadline:
                return False

    def _scan(self, lines: bytes, offset: int) -> None:
        block = b"\n" + lines
        found = [(match.start(), match[1], match[2]) for match in _HEAD.finditer(block)]
        self._num_headless += lines.count(b"\n") - len(found)
        group: Group | None = None
        key: tuple[Any, Any] | None = None
        begin = 0
        for i, (start, step, prompt) in enumerate(found):
            end = found[i + 1][0] if i + 1 < len(found) else len(lines)
            if prompt is None:
                number = self._number_of(lines[start:end])
                if number is None:
                    self._damaged.add(offset + start)
                    continue
                prompt = b"%d" % number
            if key != (step, prompt) or group is None:
                if group is not None:
                    group.spans.append((offset + begin, offset + start))
                key, begin = (step, prompt), start
                group = self._group(int(step), int(prompt))
            group.num += 1
            # The reward is near the end of its line.
            place = lines.rfind(_REWARD, start, end)
            if place >= 0:
                value = _as_number(lines[place + len(_REWARD) : min(end, place + 40)])
                if value is not None:
                    group.rewards.append(value)
                group.num_truncated += lines.find(_TRUNCATED, place, end) >= 0
        if group is not None:
            group.spans.append((offset + begin, offset + len(lines)))

    def _group(self, step: int, prompt: int) -> Group:
        of_step = self._by_step.setdefault(step, {})
        if prompt not in of_step:
            of_step[prompt] = Group(step, prompt)
            self._steps_of_prompt.setdefault(prompt, []).append(step)
        return of_step[prompt]

    def _number_of(self, line: bytes) -> int | None:
        """A number for the prompt of a line without an index, as earlier versions wrote it."""
        record = record_of(line.split(b"\n", 1)[0])
        prompt = record.get("prompt")
        if not record:
            return None
        return self._own_numbers.setdefault(prompt if isinstance(prompt, str) else "", -1 - len(self._own_numbers))

    @property
    def steps(self) -> Sequence[int]:
        """The steps that have completions, ascending."""
        return sorted(self._by_step)

    def at(self, step: int, prompt: int) -> Group | None:
        return self._by_step.get(step, {}).get(prompt)

    def at_step(self, step: int) -> Sequence[Group]:
        """The groups of a step, as they stand in the file."""
        return sorted(self._by_step.get(step, {}).values(), key=lambda group: min(group.spans))

    def of_prompt(self, prompt: int) -> Sequence[Group]:
        """The groups of a prompt, by step."""
        return [self._by_step[step][prompt] for step in sorted(self._steps_of_prompt.get(prompt, ()))]

    def ordered(self, wanted: Filter, order: Order) -> Sequence[Group]:
        """The groups that may be wanted, by what is known of them without reading them; later steps come first."""
        steps = [wanted.step] if wanted.step is not None else sorted(self._by_step, reverse=True)
        groups = [group for step in steps for group in self.at_step(step) if wanted.may_take(group)]
        if order == "sampled":
            return groups
        if order == "spread":
            return sorted(groups, key=lambda group: -group.range)
        sign = -1 if order == "best" else 1
        means = {id(group): group.mean for group in groups}
        return sorted(groups, key=lambda group: _last_if_none(means[id(group)], sign))

    def search(
        self, wanted: Filter, order: Order, start: int, count: int, seconds: float
    ) -> tuple[list[tuple[Group, list[dict[str, Any]]]], int | None]:
        """At most `count` groups that are wanted, with their records, and where a next search goes on.

        Each record has `is_match`: whether the filter takes it.

        Args:
            wanted: which.
            order: of the groups.
            start: 0, or where an earlier search ended.
            count: the most that are returned.
            seconds: the search ends after this time, with what it found until then.

        Raises:
            OSError: if the file can no longer be read.
        """
        groups, found = self.ordered(wanted, order), []
        deadline = time.monotonic() + seconds
        needle = wanted.needle
        with self._path.open("rb") as file:
            for i in range(start, len(groups)):
                lines = list(_lines_of(file, groups[i]))
                if not needle or any(needle in line.lower() for _, line in lines):
                    records = self._records(lines, wanted)
                    if any(record["is_match"] for record in records):
                        found.append((groups[i], records))
                is_last = i + 1 == len(groups)
                if not is_last and (len(found) == count or time.monotonic() > deadline):
                    return found, i + 1
        return found, None

    def records(self, group: Group) -> list[dict[str, Any]]:
        """The sound records of a group, as they were sampled.

        Raises:
            OSError: if the file can no longer be read.
        """
        with self._path.open("rb") as file:
            return self._records(_lines_of(file, group), Filter())

    def _records(self, lines: Any, wanted: Filter) -> list[dict[str, Any]]:
        records = []
        for place, line in lines:
            record = record_of(line)
            if _HEAD.match(b"\n" + line) is None:  # counted already
                continue
            if not _is_completion(record):
                self._damaged.add(place)
                continue
            records.append({**record, "is_match": wanted.takes(line, record), "place": place})
        return records


def _lines_of(file: Any, group: Group) -> Iterator[tuple[int, bytes]]:
    """(where it begins, the line) of each line of a group."""
    for begin, end in sorted(group.spans):
        file.seek(begin)
        place = begin
        for line in file.read(end - begin).split(b"\n")[:-1]:
            yield place, line
            place += len(line) + 1


def _as_number(text: bytes) -> float | None:
    """The number that a text begins with."""
    number = text.split(b",", 1)[0].split(b"}", 1)[0]
    try:
        value = float(number)
    except ValueError:  # null
        return None
    return value if math.isfinite(value) else None


def _last_if_none(mean: float | None, sign: int) -> tuple[bool, float]:
    return mean is None, sign * (mean or 0.0)


def _is_completion(record: dict[str, Any]) -> bool:
    texts = [record.get(name) or "" for name in ("prompt", "completion", "reference")]
    rewards = record.setdefault("rewards", {})
    record.setdefault("reward", None)
    if "completion" not in record or not isinstance(rewards, dict) or not all(isinstance(text, str) for text in texts):
        return False
    numbers = [record["reward"], record.get("advantage"), *rewards.values()]
    return all(value is None or isinstance(value, float) or is_number(value) for value in numbers)
