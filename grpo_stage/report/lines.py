"""The lines of a file of any size, one at a time."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any


MAX_LINE_BYTES = 2**23
"""A longer line counts as damaged: no completion is that long, and a file without line breaks would fill memory."""


def records_of(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(where it begins, the object) of each line; None for a damaged line. No lines if there is no such file.

    Raises:
        ValueError: if there is one, and it cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise OSError("not an ordinary file")
        with path.open("rb") as file:
            position = 0
            while line := file.readline(MAX_LINE_BYTES):
                begin, position = position, position + len(line)
                is_whole = line.endswith(b"\n") or len(line) < MAX_LINE_BYTES
                while not is_whole:
                    rest = file.readline(MAX_LINE_BYTES)
                    position += len(rest)
                    is_whole = not rest or rest.endswith(b"\n")
                    line = b""
                yield begin, record_of(line)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error


def record_of(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None if the line is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file, or it is damaged."""
    if not path.is_file() or os.path.getsize(path) > 2**28:
        return {}
    return record_of(path.read_bytes()) or {}
