"""The Board's "try the rewards": `grpo-stage try-rewards` in a process of its own, and its result as a table.

In its own process a user's function is loaded anew at each trial, can be ended if it hangs, and frees its memory.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from grpo_stage.board.tables import number
from grpo_stage.rewards.trial import SHOWN_KINDS


Source = Literal["reference", "model"]
POLL_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class Trial:
    """The state of a trial: its seconds so far, and at its end either a table or an error."""

    elapsed_s: float
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    error: str | None = None
    is_done: bool = False


def try_rewards(arguments: Mapping[str, Any], num_rows: int, source: Source) -> Iterator[Trial]:
    """Score completions of the run's first prompts; closing the iterator ends the process."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="grpo-stage-trial-") as folder:
        recipe, answer, errors = (Path(folder) / name for name in ("recipe.yaml", "answer.json", "errors.txt"))
        recipe.write_text(yaml.safe_dump(dict(arguments), allow_unicode=True), encoding="utf-8")
        command = [sys.executable, "-m", "grpo_stage.tools.cli", "try-rewards", str(recipe)]
        command += ["--rows", str(num_rows), "--completions", source, "--json", str(answer)]
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
            )
        try:
            while process.poll() is None:
                yield Trial(time.monotonic() - started)
                time.sleep(POLL_INTERVAL_S)
        finally:
            if process.poll() is None:
                process.terminate()  # its reward workers end with the process
                process.wait()
        elapsed_s = time.monotonic() - started
        if not answer.is_file():  # with a result, an exit code tells whether something was found
            said = errors.read_text(encoding="utf-8", errors="replace").strip()
            said = said.rpartition("grpo-stage: ")[2]  # the host's warnings come before it
            yield Trial(elapsed_s, error=said or f"Exit code {process.returncode}", is_done=True)
            return
        found = json.loads(answer.read_text(encoding="utf-8"))
    names = found["functions"]
    rows = [(row["prompt"], row) for row in found["rows"] if row["kind"] in SHOWN_KINDS or not row["reference"]]
    # The means of each attack stand below, with the number of prompts in the place of one.
    rows += [(f"{score['num_prompts']} x", score) for score in found["attacks"]]
    yield Trial(
        elapsed_s,
        headers=names,
        rows=[
            [
                prompt,
                row["kind"],
                row["completion"],
                *(number(row["rewards"][name]) for name in names),
                number(row["reward"]),
            ]
            for prompt, row in rows
        ],
        notes=[*found["findings"], *found["notes"]],
        is_done=True,
    )
