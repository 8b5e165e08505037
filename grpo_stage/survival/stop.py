"""Stops on request: before training at once, during training at a safe point and with a checkpoint.

This module is imported before torch, so that a stop also works during the long imports.
"""

import _thread
import atexit
import faulthandler
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

from grpo_stage.survival.descendants import kill_descendants


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGABRT, signal.SIGHUP)
"""Ctrl-C; what schedulers, `kill` and torchrun send; what LLaMA Board's stop sends; a terminal that is closed."""
SAME_REQUEST_S = 2.0
"""Signals this close to the first are the same request: a terminal and torchrun both pass on one Ctrl-C."""
LEAVING_S = 2.0
"""How long a process that does not train yet may take to remove temporary folders and end its own processes."""

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], None]

_before: dict[signal.Signals, Any] = {}
"""The handlers before `end_at_once`."""


def end_at_once() -> None:
    """Have a stop signal end this process at once, with exit code 128 + n, until a `SafeStop` listens or `leave`."""

    def end(signum: int, frame: FrameType | None) -> None:
        # Not through logging or threading: the signal may have interrupted code that holds their locks.
        os.write(2, f"\nStopped by {signal.Signals(signum).name} outside of training: nothing is lost.\n".encode())
        _handle_stops_with(signal.SIG_IGN)  # others may pass on the same request; the process ends soon in any case
        _thread.start_new_thread(_end_anyway, (128 + signum,))
        # Not by an exception: numpy's import would retry on one, and `datasets` would take the data for unhashable.
        atexit._run_exitfuncs()
        os._exit(128 + signum)

    _before.update(_handle_stops_with(_in_this_process(end)))


def leave() -> None:
    """Undo `end_at_once`, if it was called."""
    while _before:
        _restore(*_before.popitem())


@contextmanager
def ending_at_once() -> Iterator[None]:
    """`end_at_once` for the block."""
    end_at_once()
    try:
        yield
    finally:
        leave()


def run_and_pass_on(command: Sequence[str], **kwargs: Any) -> "subprocess.CompletedProcess[bytes]":
    """Run torchrun until its processes have ended, and pass on signals that only this process got."""
    with subprocess.Popen(command, **kwargs) as process:
        asked: list[int] = []

        def pass_on(signum: int, frame: FrameType | None) -> None:
            asked.append(signum)
            # A terminal sends these two to torchrun as well, and torchrun leaves at once on a second signal.
            if signum not in (signal.SIGINT, signal.SIGHUP) or not _is_in_foreground():
                process.send_signal(signal.SIGTERM)

        _handle_stops_with(_in_this_process(pass_on))
        returncode = process.wait()
    return subprocess.CompletedProcess(command, 128 + asked[0] if asked and returncode else returncode)


def hand_on_stops(hand_on: Callable[[int], None]) -> None:
    """Have `hand_on` called with each stop signal of this process, which has processes elsewhere that train.

    It does nothing unless `end_at_once` was called.
    """
    if _before:
        _handle_stops_with(_in_this_process(lambda signum, frame: hand_on(signum)))


def _is_in_foreground() -> bool:
    """Whether this process and its children get the signals of a terminal."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:  # there is no terminal, or no longer
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _handle_stops_with(handler: Any) -> dict[signal.Signals, Any]:
    """Set the handler of every stop signal, except a SIGHUP that nohup ignores. Returns the earlier handlers."""
    handled = [each for each in STOP_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN]
    return {each: signal.signal(each, handler) for each in handled}


def _restore(signum: signal.Signals, handler: Any) -> None:
    if handler is not None:
        signal.signal(signum, handler)
        return
    signal.signal(signum, signal.SIG_DFL)  # the earlier handler was not set by Python's `signal`
    if faulthandler.is_enabled():  # faulthandler had handled SIGABRT
        faulthandler.disable()
        faulthandler.enable()


def _in_this_process(handler: Handler) -> Handler:
    """The handler for this process alone: a forked process that inherits it does what the system does by default."""
    owner = os.getpid()

    def handle(signum: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handler(signum, frame)
        else:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    return handle


def _end_anyway(exit_code: int) -> None:
    """End a process whose main thread waits for a lock that the signal has interrupted."""
    time.sleep(LEAVING_S)
    try:
        kill_descendants(os.getpid())
    finally:
        os._exit(exit_code)


class RunStopped(BaseException):
    """The run ends before its last step, on purpose. Not an Exception, so that no code handles it as a failure."""

    def __init__(self, reason: str) -> None:
        """
        Args:
            reason: such as `stopped by SIGTERM`.
        """
        super().__init__(reason)
        self.checkpoint: str | None = None
        """The checkpoint of what was trained; None if no step was finished."""


class StopRequested(RunStopped):
    """A signal has asked for a stop."""

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(f"stopped by {signum.name}")
        self.signal = signum


class SafeStop:
    """Turns the first stop signal into a request; a second one acts as it would without this class."""

    def __init__(self, rank: int = 0) -> None:
        self.signal: signal.Signals | None = None
        """The signal that asked for the stop."""
        self._rank = rank
        self._asked_at = 0.0
        self._is_listening = False
        self._raises_at_once = False
        self._error: BaseException | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals in this block; inside another such block nothing changes.

        Python handles signals in the main thread alone: in other threads (Ray's workers) the block does nothing.
        """
        if self._is_listening or threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = _handle_stops_with(_in_this_process(self._handle))
        self._is_listening = True
        try:
            yield
        finally:
            self._is_listening = False
            self.signal = None  # after the last safe point a request has nothing left to stop
            for each, handler in previous.items():
                _restore(each, handler)

    def check(self) -> None:
        """A safe point of this rank.

        Raises:
            StopRequested: if a signal has come.
        """
        if self.signal is not None:
            raise StopRequested(self.signal)

    def check_together(self) -> None:
        """A safe point for all ranks: if one of them was asked to stop, all stop."""
        self.gather(None)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order, and a safe point as `check_together`, in one message."""
        from grpo_stage.distributed import all_gather  # imports torch

        ranks = all_gather((self.signal, value))
        asked = [signum for signum, _ in ranks if signum is not None]
        if asked:
            raise StopRequested(asked[0])
        return [each for _, each in ranks]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A stop leaves this block on all ranks or on none: otherwise the others would wait for ever."""
        with suppress(StopRequested):  # `signal` is set then, so the next line raises on every rank
            yield
        self.check_together()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """In this block every point is safe, and a request does not wait for its end."""
        self._raises_at_once = True
        try:
            self.check()
            yield
        finally:
            self._raises_at_once = False

    def interrupt(self, error: BaseException) -> None:
        """Raise `error` in the main thread as soon as it runs Python. Call it from another thread, in `listening`.

        This sends a signal, which also ends a sleep or a wait.
        """
        if self._is_listening:
            self._error = error
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self.signal is None:
            self.signal, self._asked_at = signal.Signals(signum), time.monotonic()
            if self._rank == 0:  # not through logging: the signal may have interrupted code that holds its locks
                os.write(2, b"\nStopping at the next safe point, with a checkpoint. Once more stops at once.\n")
            if self._raises_at_once:
                raise StopRequested(self.signal)
        elif time.monotonic() - self._asked_at > SAME_REQUEST_S:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
