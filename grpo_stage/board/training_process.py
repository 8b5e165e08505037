"""The Board's training process.

LLaMA Board trains in one process at a time. In the host, each page reads the process's errors and waits for its end.
Then two pages take the errors from each other, and after a page is closed nobody reads them: the process waits for a
reader. Here one thread reads and waits, and all pages ask it.
"""

import threading
import time
from collections.abc import Callable, Mapping
from subprocess import Popen
from typing import Any


_KEPT_BYTES = 20_000
_BLOCK = 4096
_LAST_WORDS_S = 2.0


class TrainingProcess:
    """A training process, and the form that it was started from."""

    def __init__(self, process: "Popen[str]", data: Mapping[Any, Any], at_end: Callable[[], None]) -> None:
        """Follow a process.

        Args:
            process: a process whose standard error is a pipe.
            data: the form's values, by element.
            at_end: called once the process has ended, before the pages are told.
        """
        self._process = process
        self.data = data
        self.was_aborted = False
        self.started = time.time()
        """When it was started, as a Unix time."""
        self._at_end = at_end
        self._ended = threading.Event()
        self._errors = b""
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        threading.Thread(target=self._follow, daemon=True).start()

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended and all its errors are read."""
        return self._ended.is_set()

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.returncode

    @property
    def errors(self) -> str:
        """The end of the process's standard error."""
        return self._errors.decode(errors="replace")

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as pipe:
            while block := pipe.buffer.read1(_BLOCK):  # type: ignore[attr-defined]
                self._errors = (self._errors + block)[-_KEPT_BYTES:]

    def _follow(self) -> None:
        self._process.wait()
        self._reader.join(_LAST_WORDS_S)  # a child process may hold the pipe open for longer
        if self._process.returncode != 0 and not self.was_aborted:
            print(self.errors)
        self._at_end()
        self._ended.set()
