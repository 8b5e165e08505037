"""A subcommand of `grpo-stage` in a process of its own, and its result as far as it is written.

In its own process a user's function is loaded anew each time, can be ended if it hangs, and frees its memory.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


POLL_INTERVAL_S = 0.5
CONFIG = "{config}"
"""Stands in the words of a command for the file of the recipe."""


@dataclass(frozen=True, slots=True)
class ToolState:
    """What is known of a command that runs or has run."""

    elapsed_s: float
    answer: Mapping[str, Any] | None = None
    """The content of its `--json` file, which may grow while it runs."""
    error: str | None = None
    """Why it has ended without an answer."""
    is_done: bool = False


def run_tool(words: Sequence[str], arguments: Mapping[str, Any] | None = None) -> Generator[ToolState, None, None]:
    """Run `grpo-stage` with these words and `--json`; closing the iterator ends the process.

    Args:
        words: the subcommand and its options; `CONFIG` among them stands for a file with the arguments.
        arguments: of a run.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="grpo-stage-tool-") as folder:
        recipe, file, errors = (Path(folder) / name for name in ("recipe.yaml", "answer.json", "errors.txt"))
        if arguments is not None:
            recipe.write_text(yaml.safe_dump(dict(arguments), allow_unicode=True), encoding="utf-8")
        command = [sys.executable, "-m", "grpo_stage.tools.cli", *words, "--json", str(file)]
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [str(recipe) if word == CONFIG else word for word in command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        try:
            while process.poll() is None:
                yield ToolState(time.monotonic() - started, _read(file))
                time.sleep(POLL_INTERVAL_S)
        finally:
            if process.poll() is None:
                process.terminate()  # its reward workers end with the process
                process.wait()
        elapsed_s, answer = time.monotonic() - started, _read(file)
        if answer is not None:  # with a result, an exit code tells whether something was found
            yield ToolState(elapsed_s, answer, is_done=True)
            return
        said = errors.read_text(encoding="utf-8", errors="replace").strip()
        said = said.rpartition("grpo-stage: ")[2]  # the host's warnings come before it
        yield ToolState(elapsed_s, error=said or f"Exit code {process.returncode}", is_done=True)


def _read(file: Path) -> dict[str, Any] | None:
    """The answer; it is written at once each time."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
