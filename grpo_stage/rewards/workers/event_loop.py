"""Async reward functions: one event loop a process, and stacks of the tasks of one that takes too long."""

import asyncio
import math
import os
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grpo_stage.rewards.workers.stacks import task_stack


SHOWN_TASKS = 20
"""No more tasks of an async function are written: the pipe that takes the stacks holds 64 KiB."""


class EventLoop:
    """The loop in which a process waits for its async functions.

    One for all calls: what a function keeps from call to call, such as an HTTP client, belongs to its loop.
    """

    def __init__(self, stacks: int | None = None) -> None:
        """
        Args:
            stacks: the file descriptor that the stacks of tasks are written to; None to write none.
        """
        self.dump_at = math.inf
        """When, by `time.monotonic`, to write the stacks of tasks: those of threads do not show what a task awaits."""
        self._stacks = stacks
        self._loop: asyncio.AbstractEventLoop | None = None

    def wait_for(self, awaitable: Awaitable[Any]) -> Any:
        """What `awaitable` returns or raises."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        dump = None
        if self._stacks is not None:
            dump = self._loop.call_later(max(0.0, self.dump_at - time.monotonic()), self._dump)
        try:
            if not _is_inside_a_loop():
                return self._loop.run_until_complete(_awaited(awaitable))
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(self._loop.run_until_complete, _awaited(awaitable)).result()
        finally:
            if dump is not None:
                dump.cancel()

    def close(self) -> None:
        """End the loop. May be called twice; a later `wait_for` starts a new one."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _dump(self) -> None:
        assert self._stacks is not None
        tasks = sorted(asyncio.all_tasks(self._loop), key=lambda task: (len(task.get_name()), task.get_name()))
        for task in tasks[:SHOWN_TASKS]:
            os.write(self._stacks, task_stack(task).encode("ascii", "replace"))


def _is_inside_a_loop() -> bool:
    """Whether this thread runs an event loop already, as a notebook's does: it cannot run a second one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
