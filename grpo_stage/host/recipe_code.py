"""The code that a recipe from elsewhere would run: one list for LLaMA Board and for the command line."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from grpo_stage.host.adapters import items
from grpo_stage.rewards.user_code import describe, is_code


TRUSTED, BARE = "trust_remote_code", "run_code_without_sandbox"
CODE_KEYS = ("reward_funcs", "tools", "environment")
"""The keys whose items may name code in files."""


def code_names(recipe: Mapping[str, Any]) -> list[str]:
    """The parts of a recipe that run code: functions that are not built in, tools, and the keys that let other code
    run."""
    functions = [name.strip() for key in CODE_KEYS for name in items(recipe.get(key))]
    return [*filter(is_code, functions), *(key for key in (TRUSTED, BARE) if recipe.get(key))]


def code_of(recipe: Mapping[str, Any], names: Collection[str], folder: Path) -> dict[str, str]:
    """What would run of the code that `names` lists: from a text that changes with a file to one that is shown.

    Args:
        recipe: its keys.
        names: those of `code_names` that are asked for.
        folder: where relative paths start.

    Raises:
        ValueError: if a function cannot be a reward function.
    """
    asked = [name for name in code_names(recipe) if name in names]
    found = {f"{code.spec} {code.sha256}": str(code) for code in describe(filter(is_code, asked), folder)}
    if TRUSTED in asked:
        found[TRUSTED] = f"{TRUSTED}: Python code from the repository of {recipe.get('model_name_or_path')}"
    if BARE in asked:
        found[BARE] = f"{BARE}: programs that the model writes, with all your rights"
    return found


def own_files(recipe: Mapping[str, Any], folder: Path) -> list[Path]:
    """The files of the reward functions that are not of an installed package: what there is to read.

    Raises:
        ValueError: as `code_of`.
    """
    functions = filter(is_code, code_names(recipe))
    return list(dict.fromkeys(code.file for code in describe(functions, folder) if not code.is_installed))
