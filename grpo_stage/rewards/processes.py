"""The processes that rewards run in: forked from a clean server, deaf to a stop of the run, gone when the trainer is.

A stop reaches more processes than the trainer: Ctrl-C the whole foreground group, LLaMA Board's button every
descendant (SIGABRT, deepest first), a scheduler the whole job (SIGTERM). The trainer's answer is to finish what it is
at, and for that it needs its workers. So they, the fork server and multiprocessing's resource tracker block these
signals. They end by other means: the server when the trainer's end of a pipe closes, a worker when it is told to or
when the server is gone.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from threading import Lock
from types import ModuleType
from typing import Any


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGABRT)
# What workers would import one by one otherwise. Nothing that starts threads or touches a GPU.
PRELOADED = ["grpo_stage.rewards", "math_verify", "numpy"]
PR_SET_PDEATHSIG = 1

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
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # The server ends when nobody holds the other end of this pipe. Only the trainer is to.
    server: Any = forkserver._forkserver
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None
    if sys.platform == "linux":
        # The kernel's doing, since an endless loop in C code lets neither a thread nor a signal handler run.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    trainer = multiprocessing.parent_process()
    if trainer is None or not trainer.is_alive():
        os._exit(1)


def guard_group() -> None:
    """Have this process's group killed when the process is gone, with all that it has started.

    Who kills the worker itself has no time for that where the trainer was killed: then it is the kernel. What a
    `multiprocessing.Pool` has started would wait for ever for its next task.
    """
    gone, here = os.pipe()
    if os.fork() == 0:
        os.close(here)
        os.read(gone, 1)  # until nobody holds the other end
        os.killpg(0, signal.SIGKILL)
    os.close(gone)
    ends = [here]
    os.register_at_fork(after_in_child=lambda: os.close(ends.pop()) if ends else None)


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
