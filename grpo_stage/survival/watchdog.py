"""Time limits on what a run waits for: a hang ends the run, says what was awaited, and leaves the stacks."""

import faulthandler
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


GRACE_S = 10.0
"""How long the main thread may take to leave the block after the limit; in native code it may never leave."""
LAST_RESORT_S = 600.0
"""How long the last resort may take, a checkpoint of a large model included, before the process is ended anyway."""


class HangError(BaseException):
    """Something took longer than its time limit. Not an Exception, so that no code around it handles it."""


class Watchdog:
    """Limits the time of one block at a time, from a thread of its own."""

    def __init__(
        self,
        folder: str,
        rank: int,
        interrupt: Callable[[BaseException], None],
        last_resort: Callable[[HangError], None],
    ) -> None:
        """
        Args:
            folder: where the stacks go.
            rank: the rank of this process.
            interrupt: raises an error in the watched thread, if that still runs Python.
            last_resort: ends the process, from the watching thread, if the watched thread does not answer.
        """
        self._folder = Path(folder)
        self._rank = rank
        self._interrupt = interrupt
        self._last_resort = last_resort

    @contextmanager
    def limit(self, what: str, seconds: float, key: str) -> Iterator[None]:
        """Let the block take at most `seconds`.

        Args:
            what: a short name of what is awaited, such as `rollout`.
            seconds: the limit.
            key: the YAML key that sets it.

        Raises:
            HangError: in the block, after the limit.
        """
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done, what, seconds, key), daemon=True)
        watcher.start()
        # For a hang in native code that holds the interpreter's lock: then even the watching thread does not run.
        faulthandler.dump_traceback_later(seconds + GRACE_S + LAST_RESORT_S, exit=True, file=2)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            done.set()
            watcher.join()  # an interruption that is under way arrives here, not later

    def _watch(self, done: threading.Event, what: str, seconds: float, key: str) -> None:
        if done.wait(seconds):
            return
        stacks = self._folder / f"stacks_{what}_rank{self._rank}.txt"
        where = f"is in {stacks}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with stacks.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as failure:  # the run has to end all the same
            faulthandler.dump_traceback(all_threads=True)
            where = f"is in this run's terminal output, since {stacks} cannot be written: {failure}"
        error = HangError(
            f"The {what} took longer than {seconds:g} s (`{key}`) on rank {self._rank}, so the run is ended. Where "
            f"every thread was {where}. Raise `{key}` if it only needs more time."
        )
        self._interrupt(error)
        if not done.wait(GRACE_S):
            self._last_resort(error)
