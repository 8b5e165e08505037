"""Reports of a `multiprocessing.Pool` that waits for ever, since one of its processes died."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.pool import ApplyResult, IMapIterator, Pool
from types import FrameType
from typing import Any


def watch_pools(report: Callable[[str], None]) -> None:
    """Call `report` with the problem when the main thread waits for ever for a job of a process that died.

    A thread of each Pool looks for its dead processes, and starts others in their place. This watches what the thread
    finds. The thread ends before a Pool is terminated, so that a process that it finds died by itself. That alone is
    no error, since a function may wait with a limit.
    """
    join_exited = Pool._join_exited_workers  # type: ignore[attr-defined]
    noted: list[tuple[list[Any], int]] = []  # the list of a Pool's processes, and the exit code of a dead one

    def join_and_note(processes: list[Any]) -> bool:
        before = list(processes)
        has_joined = join_exited(processes)
        died = [process.exitcode for process in before if process not in processes and process.exitcode]
        if died and not noted:
            threading.Thread(target=look_out, daemon=True).start()
        noted.extend((processes, exit_code) for exit_code in died)
        return has_joined

    def look_out() -> None:
        while True:
            time.sleep(0.1)
            pool: Any = getattr(_awaited_of_pool(), "_pool", None)
            died = [code for processes, code in noted if pool is not None and processes is pool._pool]
            if died and len(died) >= len(pool._cache):  # no job is left to the living processes
                report(_pool_problem(died[0]))
                return

    Pool._join_exited_workers = staticmethod(join_and_note)  # type: ignore[attr-defined]


def _awaited_of_pool() -> Any:
    """The result of a `multiprocessing.Pool` that the main thread waits for without a limit, or None."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code in _POOL_WAITS and frame.f_locals.get("timeout") is None:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


_POOL_WAITS = (ApplyResult.wait.__code__, IMapIterator.next.__code__)


def _pool_problem(exit_code: int) -> str:
    if exit_code > 0:
        how = (
            f"died with exit code {exit_code}. Its error is in the run's terminal output. The most frequent one: it "
            "could not import what it was sent, which has to be defined at the top level of a module, by the time "
            "that the Pool is made"
        )
    else:
        how = f"was ended by signal {-exit_code} ({signal.strsignal(-exit_code)})"
        if exit_code == -signal.SIGKILL:
            how += ", which is most often the system out of memory"
    return f"a process of its `multiprocessing.Pool` {how}. The Pool would wait for ever for what that process was at"
