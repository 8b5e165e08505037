"""What a watch finds, and what it looks at."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something is wrong with a run."""

    monitor: str
    """The watch's name in `table.WATCHES`."""
    step: int
    """The optimizer step whose log line shows it, counted from 1."""
    onset: int
    """The last step at which the run was sound, as far as the watch can tell: a recovery goes back to before it."""
    seen: str
    """What was seen, with the figures."""
    meaning: str
    """What it means for the run."""
    remedy: str
    """What to do, in words."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The remedy as YAML keys, which `on_alarm: recover` applies; empty where no key mends it."""
    skips_prompts: bool = False
    """Whether a recovery leaves out the prompts that the run sampled between its last sound step and the fault."""


@dataclass(frozen=True, slots=True)
class Series:
    """One metric by step, ascending."""

    steps: Sequence[int]
    values: Sequence[float]

    def __len__(self) -> int:
        return len(self.values)

    def last(self, count: int) -> "Series":
        """The last `count` points, or all if there are fewer."""
        start = max(0, len(self) - count)
        return Series(self.steps[start:], self.values[start:])


class History:
    """The log lines of a run so far: what `trainer_log.jsonl` holds, by metric."""

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        """
        Args:
            lines: see `add`.
        """
        self._steps: dict[str, list[int]] = {}
        self._values: dict[str, list[float]] = {}
        self.step = 0
        """That of the last line."""
        for line in lines:
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a log line: metrics by name, and its step as `step` (Trainer) or `current_steps` (trainer_log.jsonl)."""
        self.step = int(line.get("step", line.get("current_steps", self.step)))
        for name, value in line.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._steps.setdefault(name, []).append(self.step)
                self._values.setdefault(name, []).append(float(value))

    def series(self, name: str) -> Series:
        """A metric's values; empty where it was never logged."""
        return Series(self._steps.get(name, []), self._values.get(name, []))

    def names(self) -> Sequence[str]:
        return list(self._values)


class Watch:
    """Judges a run by its log, for one kind of fault.

    It keeps no state: the same history gives the same verdict, in a run, after a resume, and in `grpo-stage report`.
    `judge` is called after each log line, so its work must not grow with the length of the history.

    Args:
        settings: every key of the run with its value, as `RunArguments.values` gives them.
    """

    is_advice: ClassVar[bool] = False
    """True where the run may be right all the same: its alarm ends a run only if `on_alarm` names the watch."""

    has_remedy: ClassVar[bool] = True
    """False where no key of a recipe mends the fault, so that going back would only repeat it."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def judge(self, history: History) -> Alarm | None:
        """The alarm that the last line gives, or None. It may be given again as long as the fault lasts."""
        raise NotImplementedError
