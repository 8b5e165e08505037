"""What a run was started with, in a file of its output folder: the keys as they were written, code, rows, versions.

Checkpoints hold every value, defaults included; this file holds what its user wrote, which is what is shared.
"""

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


logger = logging.getLogger(f"llamafactory.{__name__}")  # below the host's, whose handlers show it

RUN_FILE = "grpo_run.json"


def write_run_record(folder: str, record: Mapping[str, Any]) -> None:
    """Write the record, which takes the place of that of an earlier run in the folder. A full disk is a warning."""
    path = Path(folder, RUN_FILE)
    unfinished = path.with_name(f".{RUN_FILE}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # there may be no such file, or no folder to have it in
            unfinished.unlink()
        logger.warning(
            f"{path} cannot be written ({error}): the run goes on, and `grpo-stage recipe export` will not know it."
        )


def read_run_record(folder: Path) -> dict[str, Any]:
    """The record of a run.

    Raises:
        ValueError: if the folder is not that of a run, or the file is damaged.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {RUN_FILE}, which a run of `stage: grpo` writes when it starts. Name the `output_dir` "
            "of a run of this version."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Start the run again, or name another one.") from error
    if not isinstance(record, dict) or not isinstance(record.get("recipe"), dict):
        raise ValueError(f"{path} is damaged: it holds no recipe. Start the run again, or name another one.")
    return record
