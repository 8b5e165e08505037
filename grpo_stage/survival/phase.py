"""A phase of a step: it is measured, it has a time limit, and a stop leaves it on all ranks together."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import psutil
import torch

from grpo_stage.records.metrics import MetricTracker
from grpo_stage.survival.stop import SafeStop
from grpo_stage.survival.watchdog import Watchdog


class Clock:
    """The seconds that a phase takes."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.seconds = 0.0
        """The duration, once the phase is over."""

    def stop(self) -> float:
        self.seconds = time.perf_counter() - self._started
        return self.seconds


class Phases:
    """The phases of a run, one at a time.

    Args:
        stop: hears requests to stop.
        watchdog: ends a phase that takes too long.
        tracker: logs the seconds of each phase.
    """

    def __init__(self, stop: SafeStop, watchdog: Watchdog, tracker: MetricTracker) -> None:
        self._stop = stop
        self._watchdog = watchdog
        self.tracker = tracker
        self.observe: Callable[[str], AbstractContextManager[object]] = nullcontext
        """Entered with the name of each phase, for what is measured beside its seconds."""

    @contextmanager
    def timed(self, name: str) -> Iterator[Clock]:
        """Log the block's seconds as time/{name}, and its memory in GiB as memory/{name}."""
        clock = Clock()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with self.observe(name):
            yield clock
        self.tracker.add(f"time/{name}", clock.stop())
        self.tracker.highest(f"memory/{name}", _memory_bytes() / 2**30)

    @contextmanager
    def phase(self, name: str, *, is_timed: bool = True) -> Iterator[Clock]:
        """A block that a stop leaves on all ranks together, or on none."""
        with self._stop.together(), self.timed(name) if is_timed else nullcontext(Clock()) as clock:
            yield clock

    @contextmanager
    def limited(self, name: str, seconds: float, key: str, *, is_interruptible: bool = False) -> Iterator[None]:
        """A block with a time limit.

        Args:
            name: what is awaited, such as `rollout`.
            seconds: the limit.
            key: the YAML key that sets it.
            is_interruptible: every point of the block is safe, and a request to stop does not wait for its end.

        Raises:
            HangError: in the block, after the limit.
        """
        with (
            self._watchdog.limit(name, seconds, key),
            self._stop.interruptible() if is_interruptible else nullcontext(),
        ):
            yield


def _memory_bytes() -> int:
    """The most that was allocated on the card since the last reset; without a card what the process holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)
