"""A run that is asked to stop leaves what it is at, at a safe point, so that a checkpoint can be saved."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from .distributed import all_gather


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGABRT)
"""Ctrl-C; what schedulers, `kill` and torchrun send; what LLaMA Board's stop sends."""
SAME_REQUEST_S = 2.0
"""Signals this close to the first are the same request: a terminal and torchrun both pass on one Ctrl-C."""


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
        """Handle the signals. In another thread than the main one (Ray's workers) Python cannot: nothing is done."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous: dict[signal.Signals, Any] = {each: signal.signal(each, self._handle) for each in STOP_SIGNALS}
        self._is_listening = True
        try:
            yield
        finally:
            self._is_listening = False
            self.signal = None  # one that came after the last safe point has nothing left to stop
            for each, handler in previous.items():
                signal.signal(each, signal.SIG_DFL if handler is None else handler)

    def check(self) -> None:
        """A safe point of this rank.

        Raises:
            StopRequested: if a signal has come.
        """
        if self.signal is not None:
            raise StopRequested(self.signal)

    def check_together(self) -> None:
        """A safe point that all ranks come to: one that was asked takes the others with it."""
        asked = [each for each in all_gather(self.signal) if each is not None]
        if asked:
            raise StopRequested(asked[0])

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
