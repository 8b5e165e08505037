"""What a `FunctionWorker` runs in its process: calls of one reward function, received and answered over a pipe."""

import faulthandler
import io
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from grpo_stage.rewards.errors import CompletionError
from grpo_stage.rewards.function import RewardFunction
from grpo_stage.rewards.workers.event_loop import EventLoop
from grpo_stage.rewards.workers.pools import watch_pools
from grpo_stage.rewards.workers.processes import become_keeper
from grpo_stage.rewards.workers.seeds import seed_generators


Reply = list[float | None] | tuple[int, str, str] | str
"""The scores; position, problem and traceback of a failure; or why there will be no scores."""


def serve(
    connection: Connection,
    stacks: Connection,
    load: Callable[[], RewardFunction],
    timeout_s: float,
    environment: Mapping[str, str],
    start_method: str | None,
) -> None:
    """The life of the process, from its start until the trainer closes the pipe.

    Args:
        connection: arguments, number of completions and seed come in, replies go out.
        stacks: where stacks are written a little before the time is up.
        load: returns the function.
        timeout_s: seconds for one call.
        environment: the trainer's, since the fork server may have another.
        start_method: of the trainer's own processes.
    """
    become_keeper()
    # The function's own processes start as the trainer's do, not as this one did: what works there works here.
    multiprocessing.set_start_method(start_method, force=True)
    let_children_be_terminated()
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # so that prints before a kill are seen
    faulthandler.enable(stacks.fileno())

    # The stacks of all threads, a little before the trainer ends this process, even while C code keeps the GIL.
    dump_after_s = timeout_s - min(1.0, timeout_s / 5)
    function: RewardFunction | None = None
    loop = EventLoop(stacks.fileno())
    watch_pools(connection.send)
    while True:
        try:
            arguments, count, seed = connection.recv()
        except (EOFError, OSError):  # closed, or the trainer is gone
            return
        faulthandler.dump_traceback_later(dump_after_s, file=stacks.fileno())
        loop.dump_at = time.monotonic() + dump_after_s
        reply: Reply
        try:
            function = function or _seeded_load(load)
            seed_generators(seed)
            reply = function.evaluate(arguments, count, loop.wait_for)
        except CompletionError as failure:
            reply = (failure.position, failure.problem, failure.traceback)
        faulthandler.cancel_dump_traceback_later()
        connection.send(reply)


def _seeded_load(load: Callable[[], RewardFunction]) -> RewardFunction:
    seed_generators(0)
    try:
        return load()
    except Exception as error:  # a user's file may raise anything
        raise CompletionError(0, f"could not be loaded in its process: {error}", traceback.format_exc()) from error


def let_children_be_terminated() -> None:
    """Unblock SIGTERM for the processes that the function starts, which are often ended with it; ignore it here.

    A SIGTERM that comes while a child is being forked, as from `Pool.terminate`, is held until the child ends at it.
    """
    signal.signal(signal.SIGTERM, _ignore)
    os.register_at_fork(before=_hold_terminations, after_in_parent=_hear_terminations, after_in_child=_end_at_them)
    _hear_terminations()


def _hold_terminations() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _hear_terminations() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _end_at_them() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _hear_terminations()


def _ignore(*_: Any) -> None: ...
