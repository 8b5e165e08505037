"""Logs of one JSON object a line, to which a resumed run appends."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def keep_lines(path: str | Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a log with the lines that `keep` accepts, all at once. A line torn by a kill is dropped, too."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        lines = file.readlines()
    kept = [line for line in lines if (record := _record(line)) is not None and keep(record)]
    if len(kept) == len(lines):
        return
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        file.writelines(kept)
    os.replace(temporary, path)


def _record(line: bytes) -> dict[str, Any] | None:
    """None for what is left of a line that was being written when its process was killed."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
