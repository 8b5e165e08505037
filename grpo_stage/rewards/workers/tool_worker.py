"""The tools of a run in a process of their own, which can be killed whatever a tool does."""

import multiprocessing
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from typing import Any

from grpo_stage.rewards.workers.processes import WorkerProcess, end_kept, start_fork_server
from grpo_stage.rewards.workers.tool_process import Loaded, Reply, Request, serve


_POLL_S = 0.2
"""How long a stop may wait to be seen."""


class ToolError(RuntimeError):
    """The tools of a run cannot be called: no answer to the model, but the end of the run."""


class ToolWorker:
    """The process of the tools, which starts at the first call and lives as long as the run.

    Args:
        load: returns the tools. It is pickled, and called in the worker.
        timeout_s: seconds for one call.
        patience_s: seconds after which a call is slow, and others are not kept waiting for it.
    """

    def __init__(self, load: Callable[[], Loaded], timeout_s: float, patience_s: float = 5.0) -> None:
        self.check: Callable[[], None] = lambda: None
        """Called now and then while calls are waited for; an exception from it ends them."""
        self._load, self._timeout_s, self._patience_s = load, timeout_s, patience_s
        self._numbers = count()
        self._process: WorkerProcess | None = None

    def begin(self, requests: Sequence[Request]) -> list[int]:
        """Have these calls run. Returns their numbers. Calls of one episode's environment run one after another, in
        the order of their requests, others at the same time."""
        numbers = [next(self._numbers) for _ in requests]
        self._tell((dict(zip(numbers, requests, strict=True)), ()))
        return numbers

    def replies(self, is_needed: bool = True) -> dict[int, Reply]:
        """The replies that are new, by number, once all calls have ended or are slow.

        Args:
            is_needed: wait for one in any case, unless no call is under way.

        Raises:
            ToolError: if the tools cannot be loaded, or their process has ended.
        """
        self._tell(is_needed)
        assert self._process is not None
        try:
            while not wait([self._connection, self._process.sentinel], _POLL_S):
                self.check()
            replies = self._connection.recv() if self._connection.poll() else None
        except (EOFError, OSError):
            replies = None
        except BaseException:
            self.close()
            raise
        if isinstance(replies, dict):
            return replies
        self._process.join(_POLL_S)
        exit_code = self._process.exitcode
        self.close()
        raise ToolError(replies or f"The process of the tools ended with exit code {exit_code} during a call.")

    def run(self, requests: Sequence[Request]) -> list[Reply]:
        """Begin these calls and wait for them. The replies are in order.

        Raises:
            ToolError: if the tools cannot be loaded, or their process has ended.
        """
        numbers = self.begin(requests)
        replies: dict[int, Reply] = {}
        while not replies.keys() >= set(numbers):
            replies |= self.replies()
        return [replies[number] for number in numbers]

    def end(self, episodes: Collection[int]) -> None:
        """End the environments of these episodes, unless the process has ended with all of them."""
        if self._process is not None:
            self._tell(({}, list(episodes)))

    def _tell(self, message: Any) -> None:
        if self._process is None:
            self._start()
        with suppress(OSError):  # it has ended, which `replies` sees
            self._connection.send(message)

    def close(self) -> None:
        """End the process and all that it has started. May be called twice; a later `run` starts a new one."""
        if self._process is not None:
            self._end()
            self._process = None

    def _start(self) -> None:
        start_fork_server()
        self._connection, theirs = Pipe()
        start_method = multiprocessing.get_start_method(allow_none=True)
        args = (theirs, self._load, self._timeout_s, self._patience_s, dict(os.environ), start_method)
        process = WorkerProcess(target=serve, args=args, name="tools", daemon=False)
        process.start()
        # Even if nobody calls `close`: at exit multiprocessing waits for its children without a limit.
        self._end = Finalize(self, _end, args=(process, self._connection), exitpriority=0)
        self._process = process
        theirs.close()


def _end(process: WorkerProcess, connection: Connection) -> None:
    connection.close()
    end_kept(process)
