"""A user's reward function in a process of its own, which can be killed whatever the function does."""

import asyncio
import faulthandler
import hashlib
import io
import linecache
import math
import multiprocessing
import os
import pickle
import random
import re
import signal
import sys
import threading
import time
import traceback
from array import array
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.pool import ApplyResult, IMapIterator, Pool
from multiprocessing.util import Finalize
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from grpo_stage.rewards.errors import CompletionError, CompletionTimeoutError
from grpo_stage.rewards.workers.processes import WorkerProcess, end_kept, keep, start_fork_server


CLOSE_GRACE_S = 2.0
SHOWN_TASKS = 20
"""Of an async function that takes too long. The pipe that they are written to holds 64 KiB."""
_TASK = "Task"
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$', re.MULTILINE)

# What a worker answers with: the scores; position, problem and traceback of a failure; or why there will be none.
Reply = list[float | None] | tuple[int, str, str] | str


class Evaluable(Protocol):
    """What runs in the worker: see `scoring.RewardFunction`."""

    def evaluate(
        self, arguments: Mapping[str, list[Any]], count: int, wait_for: Callable[[Awaitable[Any]], Any]
    ) -> list[float | None]: ...


class EventLoop:
    """Where a process waits for its async functions.

    One loop for all calls: what a function keeps from call to call, such as an HTTP client, belongs to its loop.
    """

    def __init__(self, stacks: int | None = None) -> None:
        """
        Args:
            stacks: the file descriptor that `dump_at` writes to.
        """
        self.dump_at = math.inf
        """When, by `time.monotonic`, to write where the tasks are: a thread's stack does not show what it awaits."""
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
            return self._loop.run_until_complete(_awaited(awaitable))
        finally:
            if dump is not None:
                dump.cancel()

    def close(self) -> None:
        """End the loop. May be called twice; a later `wait_for` starts a new one."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _dump(self) -> None:
        """Write the tasks as faulthandler does the threads."""
        assert self._stacks is not None
        tasks = sorted(asyncio.all_tasks(self._loop), key=lambda task: (len(task.get_name()), task.get_name()))
        for task in tasks[:SHOWN_TASKS]:
            frames = [
                f'  File "{_as_dumped(frame.f_code.co_filename)}", line {frame.f_lineno} in {frame.f_code.co_name}'
                for frame in reversed(_awaiting_frames(task.get_coro()))
            ]
            os.write(
                self._stacks, "\n".join(["", f"{_TASK} {task.get_name()}:", *frames, ""]).encode("ascii", "replace")
            )


class FunctionWorker:
    """One reward function in its own process, which starts at the first call and lives as long as the run.

    Module-level caches of the function therefore live on from call to call. The process knows nothing of the
    trainer's: it loads the function anew.

    Args:
        name: the function's display name.
        load: returns the function; called in the worker, and so picklable.
        source_file: the file that the function is written in, whose frames are quoted where it takes too long.
        timeout_s: seconds for one call; loading counts towards the first.
        dump_dir: the folder for the stacks of a process that took too long.
    """

    def __init__(
        self, name: str, load: Callable[[], Evaluable], source_file: str | None, timeout_s: float, dump_dir: str | None
    ) -> None:
        self.name, self.timeout_s = name, timeout_s
        self._load, self._source_file, self._dump_dir = load, source_file, dump_dir
        self._process: WorkerProcess | None = None
        self._is_busy = False

    def start(self, arguments: Mapping[str, list[Any]], count: int, seed: int) -> None:
        """Begin a call; `result` waits for its end. The worker's random generators start at `seed`."""
        call = pickle.dumps((dict(arguments), count, seed))
        if self._process is None:
            self._start_process()
        self._read_stacks()  # of a call that ended just before it would have been ended
        self._count = count
        self._deadline = time.monotonic() + self.timeout_s
        self._is_busy = True
        # In a thread, since a worker in which a thread of the function's keeps the GIL leaves the pipe full.
        threading.Thread(target=_send, args=(self._connection, call), daemon=True).start()

    def result(self) -> list[float | None]:
        """The scores of the call begun last.

        Raises:
            CompletionError: if the function failed, took too long, or its process died.
        """
        assert self._process is not None
        if not wait([self._connection, self._process.sentinel], max(0.0, self._deadline - time.monotonic())):
            raise self._expired()
        try:
            reply: Reply | None = self._connection.recv() if self._connection.poll() else None
        except (EOFError, OSError):
            reply = None
        if reply is None:
            raise self._died()
        if isinstance(reply, str):
            self.close()
            where = f"in a batch of {self._count} completions, the first of which is shown"
            raise CompletionError(0, f"failed {where}: {reply}")
        self._is_busy = False
        if isinstance(reply, tuple):
            raise CompletionError(*reply)
        return reply

    def end_if_busy(self) -> None:
        """End the process of a call whose result nobody waited for."""
        if self._is_busy:
            self.close()

    def close(self) -> None:
        """End the process: at once if it is busy. May be called twice; a later `start` starts a new one."""
        if self._process is None:
            return
        if self._is_busy:
            end_kept(self._process)
        self._end()
        self._process, self._is_busy = None, False

    def _start_process(self) -> None:
        start_fork_server()
        self._connection, theirs = Pipe()
        self._stacks, stacks = Pipe(duplex=False)
        start_method = multiprocessing.get_start_method(allow_none=True)
        args = (theirs, stacks, self._load, self.timeout_s, dict(os.environ), start_method)
        # No daemon: those may not have children, and the function may want some.
        process = WorkerProcess(target=_serve, args=args, name=f"reward {self.name}", daemon=False)
        process.start()
        # Also when nobody calls `close`: multiprocessing waits for its children at exit, for ever if need be.
        self._end = Finalize(self, _end, args=(process, self._connection), exitpriority=0)
        self._process = process
        theirs.close()
        stacks.close()

    def _expired(self) -> CompletionError:
        stacks = self._read_stacks()
        self.close()
        problem = [
            f"took longer than {self.timeout_s:g} s (`reward_timeout`) over a batch of {self._count} completions, the "
            "first of which is shown, and was ended."
        ]
        if frame := _innermost_frame(stacks, self._source_file):
            problem.append(f"It was at {frame}.")
        if stacks and self._dump_dir is not None:
            path = Path(self._dump_dir, f"stacks_reward_{self.name}.txt")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(stacks, encoding="utf-8")
                problem.append(f"The stacks of all its threads are in {path}.")
            except OSError as error:
                problem.append(f"The stacks of its threads could not be written to {path}: {error}.")
        problem.append("Make the function faster or raise `reward_timeout`.")
        return CompletionTimeoutError(0, " ".join(problem))

    def _died(self) -> CompletionError:
        assert self._process is not None
        self._process.join(CLOSE_GRACE_S)
        exitcode, stacks = self._process.exitcode, self._read_stacks()
        self.close()
        if exitcode is None:
            how = "closed the pipe to the trainer"
        elif exitcode >= 0:
            how = f"died with exit code {exitcode}"
        else:
            how = f"was ended by signal {-exitcode} ({signal.strsignal(-exitcode)})"
            if exitcode == -signal.SIGKILL:
                how += ", which is most often the system out of memory"
        where = f"in a batch of {self._count} completions, the first of which is shown"
        return CompletionError(0, f"its process {how}, {where}", stacks)

    def _read_stacks(self) -> str:
        read = b""
        while self._stacks.poll() and (part := os.read(self._stacks.fileno(), 65536)):
            read += part
        return read.decode("ascii", errors="replace")


def batch_seed(completion_ids: Sequence[Sequence[int]]) -> int:
    """A seed that depends on the completions alone: what a random reward draws is then the same in a resumed run."""
    digest = hashlib.sha256()
    for ids in completion_ids:
        digest.update(len(ids).to_bytes(8, "little") + array("q", ids).tobytes())
    return int.from_bytes(digest.digest()[:8], "little")


def _send(connection: Connection, call: bytes) -> None:
    with suppress(OSError):  # the worker died or was ended: whoever waits for the result says so
        connection.send_bytes(call)


def _end(process: WorkerProcess, connection: Connection) -> None:
    connection.close()
    process.join(CLOSE_GRACE_S)
    end_kept(process)


def _innermost_frame(stacks: str, source_file: str | None) -> str:
    """Where the thread that runs the function, or a task of it, is: the last line of its own file, if there is one."""
    own_file, wanted = _as_dumped(__file__), _as_dumped(source_file) if source_file else ""
    ours = []
    for stack in stacks.split("\n\n"):
        frames = list(_FRAME.finditer(stack))
        if stack.lstrip().startswith(_TASK) or any(frame["file"] == own_file for frame in frames):
            ours += [frame for frame in frames if frame["file"] == wanted] or frames[:1]
    if not ours:
        return ""
    frame = next((frame for frame in ours if frame["file"] == wanted), ours[0])
    path = source_file if source_file and frame["file"] == wanted else frame["file"]
    line = linecache.getline(path, int(frame["line"])).strip()
    return f"line {frame['line']} of {path}, in {frame['function']}" + (f": `{line}`" if line else "")


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _awaiting_frames(coroutine: Any) -> list[FrameType]:
    """From the outermost to the one that waits."""
    frames = []
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is not None:
            frames.append(frame)
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
    return frames


def _as_dumped(path: str) -> str:
    return path.encode("ascii", "backslashreplace").decode()


# In the worker


def _serve(
    connection: Connection,
    stacks: Connection,
    load: Callable[[], Evaluable],
    timeout_s: float,
    environment: Mapping[str, str],
    start_method: str | None,
) -> None:
    keep()
    # How the trainer's processes start, and not as this one did: a function that works there works here.
    multiprocessing.set_start_method(start_method, force=True)
    _let_children_be_terminated()
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # what is printed before the end by a signal is seen
    faulthandler.enable(stacks.fileno())

    # A little before the trainer ends this process: the stacks of all threads, even where C code keeps the GIL.
    dump_after_s = timeout_s - min(1.0, timeout_s / 5)
    function: Evaluable | None = None
    loop = EventLoop(stacks.fileno())
    _watch_pools(connection.send)
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
            _seed(seed)
            reply = function.evaluate(arguments, count, loop.wait_for)
        except CompletionError as failure:
            reply = (failure.position, failure.problem, failure.traceback)
        faulthandler.cancel_dump_traceback_later()
        connection.send(reply)


def _seeded_load(load: Callable[[], Evaluable]) -> Evaluable:
    _seed(0)
    try:
        return load()
    except Exception as error:  # a user's file may raise anything
        raise CompletionError(0, f"could not be loaded in its process: {error}", traceback.format_exc()) from error


def _watch_pools(report: Callable[[str], None]) -> None:
    """Report it where a `multiprocessing.Pool` waits for ever: for what a process of it was at that died.

    The Pool's own thread looks for such processes, and starts others in their place. It has ended when a Pool is
    terminated, so that what it finds died by itself. That alone is no error, since a function may wait with a limit.
    """
    join_exited = Pool._join_exited_workers  # type: ignore[attr-defined]
    noted: list[tuple[list[Any], int]] = []  # a Pool's list of its processes, and the exit code of one that died

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
            if died and len(died) >= len(pool._cache):  # no job is left that a living process may be at
                report(_pool_problem(died[0]))
                return

    Pool._join_exited_workers = staticmethod(join_and_note)  # type: ignore[attr-defined]


def _awaited_of_pool() -> Any:
    """What the main thread waits for, without a limit, of a `multiprocessing.Pool`; None where it does not."""
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


def _let_children_be_terminated() -> None:
    """What the function starts has to hear SIGTERM, which many programs are ended with; the worker has not.

    One that comes while a child is being forked waits for the child's handler: `Pool.terminate` may send it then.
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


def _seed(seed: int) -> None:
    """Seed the generators that a reward may draw from, of the modules that are loaded."""
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)
