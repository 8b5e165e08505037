"""Logs of one JSON object a line, to which a resumed run appends."""

import atexit
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


logger = logging.getLogger(f"llamafactory.{__name__}")  # below the host's logger, whose handlers show the messages

WARNING_INTERVAL_S = 600.0
MAX_WAITING_BYTES = 2**28
"""Most bytes of lines that wait for the disk. Beyond that the oldest lines are dropped."""


class LineLog:
    """A file of whole lines. Lines that the disk does not take wait for the next attempt."""

    def __init__(self, path: str | Path) -> None:
        self._path = os.path.abspath(path)  # fixed now: a reward function may change the working directory
        self._waiting: list[bytes] = []
        self._warned_at = -math.inf

    def append(self, lines: Iterable[str]) -> None:
        """Write lines, and those that wait. If the disk does not take them, warn: training can go on."""
        self._waiting += [f"{line}\n".encode() for line in lines]
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            _append_all(self._path, b"".join(self._waiting))
        except OSError as error:
            self._warn(error)
            atexit.unregister(self._close)
            atexit.register(self._close)  # after the last step, a stop or an error
        else:
            self._waiting = []
            atexit.unregister(self._close)

    def _close(self) -> None:
        """Try a last time to write the lines that wait."""
        self.append([])
        if self._waiting:
            logger.warning(f"{len(self._waiting)} lines are lost that {self._path} could not be given.")

    def keep(self, keeps: Callable[[dict[str, Any]], bool]) -> None:
        """Replace the log by the lines that `keeps` accepts, at once; a line that a kill cut off is dropped, too.

        Raises:
            OSError: if that fails; the log then stays as it is.
        """
        if not os.path.exists(self._path):
            return
        with open(self._path, "rb") as file:
            lines = file.readlines()
        kept = [line for line in lines if (record := _record(line)) is not None and keeps(record)]
        if len(kept) == len(lines):
            return
        temporary = f"{self._path}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.writelines(kept)
            os.replace(temporary, self._path)
        except OSError as error:
            raise OSError(
                error.errno,
                f"The lines of the steps that are done again could not be taken out of {self._path}: {error}. Free "
                "space on its disk, or mend the folder's permissions, and start the run again",
            ) from error

    def _warn(self, error: OSError) -> None:
        if time.monotonic() - self._warned_at >= WARNING_INTERVAL_S:
            self._warned_at = time.monotonic()
            logger.warning(
                f"{self._path} cannot be written: {error}. {len(self._waiting)} lines wait in memory until it can, "
                "and the run goes on. Free space on its disk, or mend the folder's permissions: without, the next "
                "checkpoint fails, too, and ends the run."
            )
        while sum(map(len, self._waiting)) > MAX_WAITING_BYTES:
            del self._waiting[0]


def _append_all(path: str, content: bytes) -> None:
    """Append to a file all of `content` or nothing."""
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            remaining = memoryview(content)
            while remaining:
                remaining = remaining[file.write(remaining) :]
        except OSError:
            file.truncate(size)
            raise


def _record(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None if a kill cut the line off."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
