"""The processes that rewards run in: forked from a clean server, spared by the stop signals, ended with the trainer.

A stop signal reaches more processes than the trainer: Ctrl-C the whole foreground group, LLaMA Board's button every
descendant (SIGABRT, deepest first), a scheduler the whole job (SIGTERM). The trainer then finishes its step, for which
it needs its workers. So the workers, the fork server and multiprocessing's resource tracker block these signals. The
server ends when the trainer's end of a pipe closes, a worker when the trainer tells it to or when the server ends.

    trainer --- fork server --- keeper of a function --- the function's worker --- whatever the function starts

The keeper (`become_keeper`) ends all processes below it, in whatever session or group, when its worker ends, when the
trainer asks for it (`end_kept`), or when the server ends.
"""

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from threading import Lock
from types import ModuleType
from typing import Any, NoReturn

from grpo_stage.survival.descendants import kill_descendants


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGABRT, signal.SIGHUP)
PRELOADED = ("grpo_stage.rewards.loading", "numpy")
"""What the server imports once for all workers. None of it starts threads or touches a GPU."""
FORMULAS = ("math_verify",)
"""The same where workers compare formulas."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
END = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
"""The signal that ends a keeper, one that no terminal, scheduler or user sends."""
ENDING_S = 5.0
"""The time limit of a keeper that kills processes which start ever more of them."""

_main_lock = Lock()


def start_fork_server(others: Sequence[str] = ()) -> None:
    """Start the server that workers are forked from, unless it runs. Returns before it is ready.

    Args:
        others: what it imports beside `PRELOADED`.
    """
    forkserver.set_forkserver_preload([*PRELOADED, *others])
    # A new process inherits the mask, and so blocks the signals from its first moment on.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # starting the tracker unblocks two of them
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def settle_in_worker() -> None:
    """Have this worker block the stop signals, and end with the fork server."""
    # By SIGKILL of the kernel, since an endless loop in C code lets neither a thread nor a signal handler run.
    _settle(signal.SIGKILL)


def become_keeper() -> None:
    """Make this process the keeper of a child, in which the call returns, and which leads a session of its own.

    Called by a worker instead of `settle_in_worker`. What the trainer takes for the worker is the keeper: it ends as
    the child does, with the same exit code or signal.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    _settle(END)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # daemons that the function starts become its children
    keeper = os.getpid()
    worker = os.fork()
    if worker != 0:
        _wait_and_end_all(worker)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(1)
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask | set(STOP_SIGNALS))


def end_kept(process: "WorkerProcess") -> None:
    """End a worker that has a keeper, and all processes that it has started. Waits for the end."""
    assert process.pid is not None
    if process.is_alive():
        with suppress(ProcessLookupError):
            os.kill(process.pid, END)
    process.join(2 * ENDING_S)
    process.kill()
    process.join()


def _settle(at_end_of_server: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # The server ends when no process holds the other end of this pipe: only the trainer may hold it.
    server: Any = forkserver._forkserver
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None
    _prctl(PR_SET_PDEATHSIG, at_end_of_server)
    trainer = multiprocessing.parent_process()
    if trainer is None or not trainer.is_alive():
        os._exit(1)


def set_death_signal(number: int) -> None:
    """Have the kernel send this process a signal when its parent ends."""
    _prctl(PR_SET_PDEATHSIG, number)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _wait_and_end_all(worker: int) -> NoReturn:
    """All that a keeper does: wait for the worker or for `END`, kill what is below, and end as the worker did."""
    # Close the worker's pipes and other files: a reader sees their end once no process holds them.
    for descriptor in map(int, os.listdir("/dev/fd")):
        if descriptor > 2:
            with suppress(OSError):  # the descriptor of the listing itself
                os.close(descriptor)
    status = None
    while status is None and signal.sigwait({signal.SIGCHLD, END}) != END:
        status = _reaped(worker)
    deadline = time.monotonic() + ENDING_S
    while kill_descendants(os.getpid()) and time.monotonic() < deadline:
        time.sleep(0.005)
    ended_by = os.waitstatus_to_exitcode(_reaped(worker) or 0 if status is None else status)
    if ended_by < 0 and -ended_by != signal.SIGKILL:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the worker has left its core dump, if wanted
        signal.signal(-ended_by, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-ended_by])
    if ended_by < 0:
        os.kill(os.getpid(), -ended_by)
    os._exit(ended_by)


def _reaped(worker: int) -> int | None:
    """Reap all children that have ended. Returns the status of the worker, if it is among them."""
    status = None
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            if ended[0] == worker:
                status = ended[1]
    return status


class _WorkerPopen(Popen):
    def terminate(self) -> None:
        self.kill()  # SIGTERM is blocked


class WorkerProcess(ForkServerProcess):
    """A worker that does not import the main script, which may import torch or have no `__main__` guard."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _main_lock:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = ModuleType("__main__")
            try:
                return _WorkerPopen(process_obj)
            finally:
                sys.modules["__main__"] = main


class WorkerContext(ForkServerContext):
    """The multiprocessing context of pebble's workers."""

    Process = WorkerProcess
