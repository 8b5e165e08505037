"""A process that is asked to stop: at once before training, and from then on at a safe point, with a checkpoint.

Imported before torch is, so that a stop during the long imports is heard, too.
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
"""How long a process that trains nothing yet may take to tidy up: its temporary folders, and processes of its own."""

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], None]

_before: dict[signal.Signals, Any] = {}
"""The handlers before `end_at_once`."""


def end_at_once() -> None:
    """Have a stop signal end this process at once, with exit code 128 + n, until a `SafeStop` listens or `leave`."""

    def end(signum: int, frame: FrameType | None) -> None:
        # Not through logging and threading, whose locks this may have interrupted.
        os.write(2, f"\nStopped by {signal.Signals(signum).name} outside of training: nothing is lost.\n".encode())
        _handle_stops_with(signal.SIG_IGN)  # the same request, passed on by others; it ends soon in any case
        _thread.start_new_thread(_end_anyway, (128 + signum,))
        # No exception: numpy's import takes one for a reason to try again, and `datasets` for data it cannot hash.
        atexit._run_exitfuncs()
        os._exit(128 + signum)

    _before.update(_handle_stops_with(_in_this_process(end)))


def leave() -> None:
    """Undo `end_at_once`, if that was called."""
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
    """Run torchrun until its processes have ended, and pass on to it what only this process is sent."""
    with subprocess.Popen(command, **kwargs) as process:
        asked: list[int] = []

        def pass_on(signum: int, frame: FrameType | None) -> None:
            asked.append(signum)
            # A terminal sends these two to torchrun as well, which takes a second one for an order to leave at once.
            if signum not in (signal.SIGINT, signal.SIGHUP) or not _is_in_foreground():
                process.send_signal(signal.SIGTERM)

        _handle_stops_with(_in_this_process(pass_on))
        returncode = process.wait()
    return subprocess.CompletedProcess(command, 128 + asked[0] if asked and returncode else returncode)


def _is_in_foreground() -> bool:
    """Whether a terminal sends its signals to this process and its children."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:  # there is none, or none any more
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _handle_stops_with(handler: Any) -> dict[signal.Signals, Any]:
    """Set the handler of every stop signal, but not of a SIGHUP that nohup has ignored; returns the earlier ones."""
    handled = [each for each in STOP_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN]
    return {each: signal.signal(each, handler) for each in handled}


def _restore(signum: signal.Signals, handler: Any) -> None:
    if handler is not None:
        signal.signal(signum, handler)
        return
    signal.signal(signum, signal.SIG_DFL)  # set by other means than Python's `signal`
    if faulthandler.is_enabled():  # whose SIGABRT it was
        faulthandler.disable()
        faulthandler.enable()


def _in_this_process(handler: Handler) -> Handler:
    """The handler; a process that is forked from this one and inherits it has the system's default instead."""
    owner = os.getpid()

    def handle(signum: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handler(signum, frame)
        else:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    return handle


def _end_anyway(exit_code: int) -> None:
    """End a process whose main thread waits for what it has interrupted itself."""
    time.sleep(LEAVING_S)
    try:
        kill_descendants(os.getpid())
    finally:
        os._exit(exit_code)


class StopRequested(BaseException):
    """Not an Exception: nothing on the way out may take it for a failure that can be handled."""

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(f"stopped by {signum.name}")
        self.signal = signum
        self.checkpoint: str | None = None
        """Where what was trained is; None where no step was finished."""


class SafeStop:
    """Makes a request of the first stop signal, and lets a second one act as it would without us."""

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
        """Handle the signals; inside another such block this one changes nothing.

        In another thread than the main one (Ray's workers) Python cannot: nothing is done.
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
            self.signal = None  # one that came after the last safe point has nothing left to stop
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
        """A safe point that all ranks come to: one that was asked takes the others with it."""
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
        """Every rank leaves this block by a stop, or none: the others would wait for ever for the one that left."""
        with suppress(StopRequested):  # `signal` is set then, so that the next line raises it on every rank
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
        """Raise `error` in the main thread, as soon as that runs Python; from another thread, and only in `listening`.

        A signal rather than the interpreter's own means: it also ends a sleep or a wait.
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
            if self._rank == 0:  # not through logging, whose locks this may have interrupted
                os.write(2, b"\nStopping at the next safe point, with a checkpoint. Once more stops at once.\n")
            if self._raises_at_once:
                raise StopRequested(self.signal)
        elif time.monotonic() - self._asked_at > SAME_REQUEST_S:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
