"""math-verify in worker processes that can be killed.

Its own time limit is an alarm signal, which fails outside the main thread and cannot interrupt C code; ours ends the
process.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import wait

from pebble import ProcessExpired, ProcessPool

from grpo_stage.rewards.answers.verdict import is_correct, verdict_without_formulas
from grpo_stage.rewards.errors import CompletionError, CompletionTimeoutError
from grpo_stage.rewards.workers.processes import FORMULAS, WorkerContext, settle_in_worker, start_fork_server


logger = logging.getLogger(__name__)

MAX_WORKERS = 8


class AnswerChecker:
    """Decides whether completions are correct, each within a time limit.

    The workers start with the first pair that needs math-verify. They are forked from a server process that has
    already imported it, so that a killed worker is replaced within a fraction of a second.

    Args:
        timeout_s: seconds for all the pairs of one call.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._pool: ProcessPool | None = None
        self._known: dict[tuple[float, str, str], bool | None] = {}

    def check(self, pairs: Sequence[tuple[str, str]], pair_timeout_s: float) -> list[bool | None]:
        """A verdict for each (completion, reference); None where `pair_timeout_s` was reached.

        Each distinct pair is decided once, and the verdicts of the last call are kept: a second reward function that
        asks for the same costs nothing.

        Raises:
            CompletionTimeoutError: if all together took too long.
            CompletionError: if a worker died of anything but its time limit.
        """
        known = {pair: self._known[pair_timeout_s, *pair] for pair in pairs if (pair_timeout_s, *pair) in self._known}
        decided = {pair: verdict_without_formulas(*pair) for pair in dict.fromkeys(pairs) if pair not in known}
        verdicts = known | {pair: verdict for pair, verdict in decided.items() if verdict is not None}
        open_pairs = [pair for pair, verdict in decided.items() if verdict is None]
        if open_pairs:
            pool = self._ready_pool()
            futures = [pool.schedule(is_correct, args=pair, timeout=pair_timeout_s) for pair in open_pairs]
            if undecided := wait(futures, self.timeout_s).not_done:
                self.close()
                first = next(n for n, future in enumerate(futures) if future in undecided)
                raise CompletionTimeoutError(
                    pairs.index(open_pairs[first]),
                    f"took longer than {self.timeout_s:g} s (`reward_timeout`) over a batch of {len(pairs)} "
                    f"completions: math-verify had not decided {len(undecided)}, the first of which is shown. Lower "
                    f"its limit for one completion, `timeout` in `reward_kwargs` (now {pair_timeout_s:g} s), or raise "
                    "`reward_timeout`.",
                )
            for pair, future in zip(open_pairs, futures, strict=True):
                try:
                    verdicts[pair] = future.result()
                except TimeoutError:
                    verdicts[pair] = None
                    logger.warning(
                        "math-verify took longer than %g s (`timeout` in `reward_kwargs`) over the reference %.200r "
                        "and the completion %.200r: the reward is None, not applicable",
                        pair_timeout_s,
                        pair[1],
                        pair[0],
                    )
                except ProcessExpired as error:
                    raise CompletionError(
                        pairs.index(pair),
                        f"the worker process that ran math-verify died with exit code {error.exitcode} "
                        "(negative: the signal that ended it; -9 is most often the system out of memory)",
                    ) from error
        self._known = {(pair_timeout_s, *pair): verdict for pair, verdict in verdicts.items()}
        return [verdicts[pair] for pair in pairs]

    def close(self) -> None:
        """End the workers. May be called twice; a later `check` starts new ones."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def _ready_pool(self) -> ProcessPool:
        if self._pool is None:
            start_fork_server(FORMULAS)
            processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            # At least two, so that one hard completion does not hold up all others.
            workers = max(2, min(MAX_WORKERS, (os.cpu_count() or 1) // processes_here))
            self._pool = ProcessPool(max_workers=workers, initializer=_warm_up, context=WorkerContext())
        return self._pool


def _warm_up() -> None:
    settle_in_worker()
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    is_correct("so $\\frac{x}{2}$", "$x+1$")
    is_correct("so $\\sqrt{2}$", "$\\pi$")
