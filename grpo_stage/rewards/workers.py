"""math-verify in worker processes that can be killed.

Its own time limit is an alarm signal, which fails outside the main thread and cannot interrupt C code; ours ends the
process.
"""

import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import ModuleType
from typing import Any

from pebble import ProcessExpired, ProcessPool

from grpo_stage.rewards.answers import is_correct, is_same_text
from grpo_stage.rewards.errors import CompletionError


logger = logging.getLogger(__name__)

MAX_WORKERS = 8
ORPHAN_GRACE_S = 10.0


class AnswerChecker:
    """Decides whether completions are correct, each within a time limit.

    The workers start at the first question that needs them. They are forked from a server process that has imported
    math-verify and nothing of this process, so one that was killed is replaced within a fraction of a second.

    Args:
        timeout_s: seconds for one completion.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._pool: ProcessPool | None = None
        self._known: dict[tuple[str, str], bool | None] = {}

    def check(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """A verdict for each (completion, reference); None where the time limit was reached.

        Each distinct pair is decided once, and the last call's verdicts are kept: a second reward function that
        asks the same costs nothing.

        Raises:
            CompletionError: if a worker died for another reason than the limit.
        """
        verdicts = {pair: self._known[pair] for pair in pairs if pair in self._known}
        verdicts |= {pair: True for pair in pairs if pair not in verdicts and is_same_text(*pair)}
        open_pairs = [pair for pair in dict.fromkeys(pairs) if pair not in verdicts]
        if open_pairs:
            pool = self._ready_pool()
            args = [(*pair, self.timeout_s + ORPHAN_GRACE_S) for pair in open_pairs]
            futures = [pool.schedule(_judge, args=arg, timeout=self.timeout_s) for arg in args]
            for pair, future in zip(open_pairs, futures, strict=True):
                try:
                    verdicts[pair] = future.result()
                except TimeoutError:
                    verdicts[pair] = None
                    logger.warning(
                        "math-verify took longer than %g s (`reward_timeout`) over the reference %.200r and the "
                        "completion %.200r: the reward is None, not applicable",
                        self.timeout_s,
                        pair[1],
                        pair[0],
                    )
                except ProcessExpired as error:
                    raise CompletionError(
                        pairs.index(pair),
                        f"the worker process that ran math-verify died with exit code {error.exitcode} "
                        "(negative: the signal that ended it; -9 is most often the system out of memory)",
                    ) from error
        self._known = verdicts
        return [verdicts[pair] for pair in pairs]

    def close(self) -> None:
        """End the workers. May be called twice; a later `check` starts new ones."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def _ready_pool(self) -> ProcessPool:
        if self._pool is None:
            context = _Context()
            context.set_forkserver_preload(["math_verify"])
            processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            # Two at least, so that one hard completion does not hold up all others.
            workers = max(2, min(MAX_WORKERS, (os.cpu_count() or 1) // processes_here))
            self._pool = ProcessPool(max_workers=workers, initializer=_warm_up, context=context)
        return self._pool


@dataclass(frozen=True)
class RewardContext:
    """What built-in rewards know beside their settings."""

    max_new_tokens: int
    checker: AnswerChecker
    counters: Counter[str] = field(default_factory=Counter)

    def judge(self, name: str, completions: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """1, 0 or None for each completion; time-outs are counted as `name`'s."""
        verdicts = self.checker.check(list(zip(completions, references, strict=True)))
        if timeouts := verdicts.count(None):
            self.counters[f"{name}/timeouts"] += timeouts
        return [None if verdict is None else float(verdict) for verdict in verdicts]


class _Process(ForkServerProcess):
    """A worker that does not import the main script again: that may import torch, or be without a `__main__` guard."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return ForkServerProcess._Popen(process_obj)
        finally:
            sys.modules["__main__"] = main


class _Context(ForkServerContext):
    Process = _Process


def _warm_up() -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    is_correct("so $\\frac{1}{2}$ or 1/3", "$0.5$")


def _judge(completion: str, reference: str, limit_s: float) -> bool:
    # Where the trainer was killed, nobody else ends this process. SIGALRM's default action does, even in C code.
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        return is_correct(completion, reference)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
