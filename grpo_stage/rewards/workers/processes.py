"""The processes that rewards run in: forked from a clean server, deaf to a stop of the run, gone when the trainer is.

A stop reaches more processes than the trainer: Ctrl-C the whole foreground group, LLaMA Board's button every
descendant (SIGABRT, deepest first), a scheduler the whole job (SIGTERM). The trainer's answer is to finish what it is
at, and for that it needs its workers. So they, the fork server and multiprocessing's resource tracker block these
signals. They end by other means: the server when the trainer's end of a pipe closes, a worker when it is told to or
when the server is gone.

    trainer --- fork server --- keeper of a function --- the function's worker --- whatever the function starts

The keeper (`keep`) ends all that is below it, in whatever session or group, when its worker ends, when the trainer
asks for it (`end_kept`), or when the server is gone.
"""

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from threading import Lock
from types import ModuleType
from typing import Any, NoReturn

from grpo_stage.survival.descendants import kill_descendants


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGABRT, signal.SIGHUP)
# What workers would import one by one otherwise. Nothing that starts threads or touches a GPU.
PRELOADED = ["grpo_stage.rewards.loading", "math_verify", "numpy"]
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
END = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
"""What a keeper ends at: a signal that no terminal, scheduler or user sends."""
ENDING_S = 5.0
"""How long a keeper goes on killing what a process that starts ever more of them leaves behind."""

_main_lock = Lock()


def start_fork_server() -> None:
    """Start the server that workers are forked from, unless it runs; does not wait until it is ready."""
    forkserver.set_forkserver_preload(PRELOADED)
    # A new process inherits the mask: unlike with a handler there is no moment at which it is not yet set.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # starting the tracker unblocks two of them
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def settle_in_worker() -> None:
    """What a worker does first: be deaf to a stop, and end with the fork server whatever it is busy with."""
    # The kernel's doing, since an endless loop in C code lets neither a thread nor a signal handler run.
    _settle(signal.SIGKILL)


def keep() -> None:
    """Go on in a child of this process, in a session of its own; this one stays behind as its keeper.

    To be called in a worker in place of `settle_in_worker`. The keeper is what the trainer knows as the worker: it
    ends as the worker does, with the same exit code or signal.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    _settle(END)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what the function starts as a daemon becomes a child of the keeper's
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
    """End a worker that has a keeper, and all that it has started; waits for the end."""
    assert process.pid is not None
    if process.is_alive():
        with suppress(ProcessLookupError):
            os.kill(process.pid, END)
    process.join(2 * ENDING_S)
    process.kill()
    process.join()


def _settle(at_end_of_server: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # The server ends when nobody holds the other end of this pipe. Only the trainer is to.
    server: Any = forkserver._forkserver
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None
    _prctl(PR_SET_PDEATHSIG, at_end_of_server)
    trainer = multiprocessing.parent_process()
    if trainer is None or not trainer.is_alive():
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _wait_and_end_all(worker: int) -> NoReturn:
    """The keeper's life: wait for the worker or for `END`, kill all that is below, and end as the worker did."""
    # Files that it would hold open for others: the worker's pipes, above all.
    for descriptor in map(int, os.listdir("/dev/fd")):
        if descriptor > 2:
            with suppress(OSError):  # the one that the list was read from
                os.close(descriptor)
    status = None
    while status is None and signal.sigwait({signal.SIGCHLD, END}) != END:
        status = _reaped(worker)
    deadline = time.monotonic() + ENDING_S
    while kill_descendants(os.getpid()) and time.monotonic() < deadline:
        time.sleep(0.005)
    ended_by = os.waitstatus_to_exitcode(_reaped(worker) or 0 if status is None else status)
    if ended_by < 0 and -ended_by != signal.SIGKILL:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the worker has left one, where that is wanted
        signal.signal(-ended_by, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-ended_by])
    if ended_by < 0:
        os.kill(os.getpid(), -ended_by)
    os._exit(ended_by)


def _reaped(worker: int) -> int | None:
    """Take note of all children that have ended; the worker's status, if it is one of them."""
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
    """A worker that does not import the main script again: that may import torch, or be without a `__main__` guard."""

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
    """What pebble starts its workers with."""

    Process = WorkerProcess
