"""Recipes of TRL, Open-R1, ms-swift and verl in the Board: `grpo-stage recipe import` and its account of every key."""

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from grpo_stage.board.locales import message, texts
from grpo_stage.board.tables import table
from grpo_stage.board.tool_process import ToolState, run_tool
from grpo_stage.host.recipe_text import has_key, text_of


TRL_VERSIONS = tuple(f"0.{minor}" for minor in range(14, 25))
SUFFIXES = (".sh", ".bash", ".txt")
"""Of files with a command line, beside YAML."""
_SHOWN_CHARACTERS = 300


def is_of_another_system(path: str) -> bool:
    """Whether a file that was chosen cannot be one of this stage: a script, or a YAML mapping without a `stage`.

    Raises:
        ValueError: if it cannot be read.
    """
    if Path(path).suffix in SUFFIXES:
        return bool(text_of(Path(path)))
    return not has_key(path, "stage")


def port(path: str, trl: str, devices_there: int | None, devices_here: int) -> Iterator[ToolState]:
    """Make a recipe of ours of the file; closing the iterator ends the process.

    Args:
        path: of the file.
        trl: the version whose defaults a file of TRL's goes with.
        devices_there: how many devices it is for; None for what it says.
        devices_here: how many this machine trains with.
    """
    words = ["recipe", "import", path, "--trl", trl, "--devices", str(devices_here)]
    words += ["--source-devices", str(devices_there)] if devices_there else []
    return run_tool(words)


def account_view(found: Mapping[str, Any], language: str) -> str:
    """What became of each key, those that change what is learned first."""
    fates = texts(language)["fates"]
    lines = sorted(found["keys"], key=lambda one: (not one["changes_learning"], one["fate"] == "left", one["fate"]))
    rows = [
        [
            "!" if line["changes_learning"] else "",
            line["key"],
            "" if line["fate"] == "default" else _shown(line["value"]),
            fates[line["fate"]],
            "\n".join(f"{key}: {_shown(value)}" for key, value in line["ours"].items()),
            line["note"],
        ]
        for line in lines
    ]
    num_open = sum(line["changes_learning"] for line in lines)
    head = message("port_head", language, system=found["system"], count=len(lines), open=num_open)
    shares = [0.4, 3, 2.5, 1.6, 4, 5]
    account = table(message("port_headers", language).split("|"), rows, shares)
    refusal = f'<p class="grpo-bad">{escape(found["refusal"])}</p>' if found["refusal"] else ""
    return f"<details open><summary>{escape(head)}</summary>{refusal}{account}</details>"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
