"""A user's reward function in a process of its own, which can be killed whatever the function does."""

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from grpo_stage.rewards.errors import CompletionError, CompletionTimeoutError
from grpo_stage.rewards.function import RewardFunction
from grpo_stage.rewards.workers import function_process
from grpo_stage.rewards.workers.function_process import Reply, serve
from grpo_stage.rewards.workers.processes import WorkerProcess, end_kept, start_fork_server
from grpo_stage.rewards.workers.stacks import line_to_quote


CLOSE_GRACE_S = 2.0


class FunctionWorker:
    """One reward function in its own process, which starts at the first call and lives as long as the run.

    So the function's module-level caches live on from call to call. The process shares nothing with the trainer: it
    loads the function anew.

    Args:
        name: the function's display name.
        load: returns the function. It is pickled, and called in the worker.
        source_file: the function's own file, of which a line is quoted when the function takes too long.
        timeout_s: seconds for one call; loading counts towards the first.
        dump_dir: the folder for the stacks of a function that takes too long.
    """

    def __init__(
        self, name: str, load: Callable[[], RewardFunction], source_file: str, timeout_s: float, dump_dir: str | None
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
        self._read_stacks()  # left by an earlier call that ended just in time
        self._count = count
        self._deadline = time.monotonic() + self.timeout_s
        self._is_busy = True
        # In a thread: the pipe stays full while a thread of the function keeps the GIL of the worker.
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
        """End the process if nobody has waited for the result of its call."""
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
        # Not as a daemon, which may not have children: the function may start some.
        process = WorkerProcess(target=serve, args=args, name=f"reward {self.name}", daemon=False)
        process.start()
        # Even if nobody calls `close`: at exit multiprocessing waits for its children without a limit.
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
        if line := line_to_quote(stacks, self._source_file, function_process.__file__):
            problem.append(f"It was at {line}.")
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


def _send(connection: Connection, call: bytes) -> None:
    with suppress(OSError):  # the worker died or was ended, which `result` reports
        connection.send_bytes(call)


def _end(process: WorkerProcess, connection: Connection) -> None:
    connection.close()
    process.join(CLOSE_GRACE_S)
    end_kept(process)
