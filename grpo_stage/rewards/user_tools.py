"""The tools that a recipe names: functions of a user's file, and the public methods of an environment's class.

`locate_tools` finds their files without running any of them; `load_tools` runs them, and makes of each tool what the
model is told of it: a JSON schema out of its types and its docstring.
"""

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_stage.rewards.games import game_class, locate_game, made
from grpo_stage.rewards.user_code import GAME, RewardCode, file_of, locate
from grpo_stage.rewards.user_modules import module_of
from grpo_stage.rewards.workers.tool_process import RESET, REWARD


EXAMPLE = (
    "def add(a: int, b: int) -> int:\n"
    '    """Add two numbers.\n\n'
    "    Args:\n"
    "        a: the first number.\n"
    "        b: the second number.\n"
    '    """'
)


@dataclass(frozen=True, slots=True)
class LoadedTools:
    """The tools of a run as Python objects."""

    functions: Mapping[str, Callable[..., Any]]
    """By name."""
    environment: type | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSet:
    """What a run knows of its tools."""

    schemas: tuple[Mapping[str, Any], ...]
    """For each tool, as `transformers.utils.get_json_schema` makes it, without what it returns."""
    code: Mapping[str, str]
    """The hash of each file, by the key and the name that the recipe has for it."""
    has_environment: bool
    has_reward: bool
    """The environment has a `get_reward`."""
    is_game: bool
    """The environment is a game of a package, and not a class of the user's."""
    load: Callable[[], LoadedTools]
    """For a worker, which refuses files that have changed since."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(schema["function"]["name"] for schema in self.schemas)


def locate_tools(tools: Sequence[str], environment: str | None, folder: Path) -> list[RewardCode]:
    """The code of the functions, and then of the environment. Nothing of it is imported.

    Raises:
        ValueError: unless each is a name in a file of the user's.
    """
    found = [_located("tools", spec, "function", folder) for spec in tools]
    names = [code.spec.rpartition(":")[2] for code in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"`tools: {', '.join(tools)}` has two functions called {name!r}: rename one of them.")
    return found if environment is None else [*found, _located("environment", environment, "Class", folder)]


def load_tools(
    tools: Sequence[str], environment: str | None, folder: Path, announce: Callable[[str], object]
) -> ToolSet:
    """The tools that the keys `tools` and `environment` name.

    Args:
        tools: `path/file.py:function` each.
        environment: `path/file.py:Class`, `textarena:Name`, or None.
        folder: where relative paths start.
        announce: is told of the code before any of it is loaded.

    Raises:
        ValueError: for a file that cannot be loaded, and for what is no tool, naming what it lacks.
    """
    code = locate_tools(tools, environment, folder)
    for each in code:
        announce(f"Tool code that will run: {each}.")
    loaded = _load(code, environment is not None)
    schemas = [_schema(f"`tools: {code[i].spec}`", f) for i, f in enumerate(loaded.functions.values())]
    if loaded.environment is not None:
        schemas += _schemas_of_environment(code[-1].spec, loaded.environment)
    names = [schema["function"]["name"] for schema in schemas]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"`tools` and `environment` both have a tool called {name!r}: rename the function or the method."
            )
    keys = [*("tools" for _ in loaded.functions), *(["environment"] if environment is not None else [])]
    return ToolSet(
        schemas=tuple(schemas),
        code={f"{key}/{each.spec.rpartition(':')[2]}": each.sha256 for key, each in zip(keys, code, strict=True)},
        has_environment=environment is not None,
        has_reward=loaded.environment is not None and callable(getattr(loaded.environment, REWARD, None)),
        is_game=environment is not None and environment.startswith(GAME),
        load=partial(_load_in_worker, tuple(code), environment is not None),
    )


def _located(key: str, spec: str, kind: str, folder: Path) -> RewardCode:
    if key == "environment" and spec.startswith(GAME):
        return locate_game(spec)
    place, _, name = spec.strip().rpartition(":")
    if not place.endswith(".py") or not name.isidentifier():
        raise ValueError(
            f"`{key}: {spec}` does not name a {kind.lower()} of a file of yours: what a model may call is Python code "
            f"that you have written or read. Write `{key}: path/file.py:{kind}`, the path from the working directory."
        )
    file = file_of(place, folder)
    if not file.is_file():
        raise ValueError(f"`{key}: {spec}`: there is no file {file}; a relative path starts at the working directory.")
    try:
        code = locate(spec, folder)
    except ValueError as error:
        raise ValueError(
            f"`{key}: {spec}`: {file} cannot be a file of tools, since it is Python's own or cannot be read. Write "
            "what the model may call in a file of your own."
        ) from error
    if code.is_installed:
        raise ValueError(
            f"`{key}: {spec}`: {file} belongs to an installed package, whose code a recipe alone must not run. Write "
            f"a {kind.lower()} in a file of your own that calls it."
        )
    return code


def _load_in_worker(code: Sequence[RewardCode], has_environment: bool) -> LoadedTools:
    """As `_load`, for good: what a tool imports late finds the neighbors of its file."""
    for each in code:
        each.check_unchanged()
        if each.spec.startswith(GAME):
            made(each.spec.removeprefix(GAME))
        else:
            sys.path.insert(0, str(each.file.parent))
    return _load(code, has_environment)


def _load(code: Sequence[RewardCode], has_environment: bool) -> LoadedTools:
    objects = [_object(each) for each in code]
    functions = objects[:-1] if has_environment else objects
    for each, function in zip(code, functions, strict=False):
        if not inspect.isroutine(function):
            raise ValueError(
                f"`tools: {each.spec}` is {type(function).__name__}: a tool is a function. A class with methods that "
                "the model may call is an `environment`."
            )
    if has_environment and not inspect.isclass(objects[-1]):
        raise ValueError(
            f"`environment: {code[-1].spec}` is {type(objects[-1]).__name__}: an environment is a class, of which "
            "each completion has an object of its own. A function that the model may call belongs into `tools`."
        )
    named = {each.spec.rpartition(":")[2]: function for each, function in zip(code, functions, strict=False)}
    return LoadedTools(named, objects[-1] if has_environment else None)


def _object(code: RewardCode) -> Any:
    if code.spec.startswith(GAME):
        return game_class(code.spec)
    name = code.spec.rpartition(":")[2]
    try:
        module: ModuleType = module_of(code.file)
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # a user's file may raise anything
        raise ValueError(f"{code.file} cannot be loaded: {type(error).__name__}: {error}. Mend it.") from error
    if not hasattr(module, name):
        raise ValueError(f"{code.file} has no {name!r} (`{code.spec}`).")
    found = getattr(module, name)
    home = getattr(inspect.unwrap(found) if callable(found) else found, "__module__", module.__name__)
    if home != module.__name__:
        raise ValueError(
            f"{name!r} is only imported in {code.file} (`{code.spec}`), so that the file that is named is not the "
            f"code that runs. Write a `def` or a `class` of your own there that uses it."
        )
    return found


def _schemas_of_environment(spec: str, environment: type) -> list[dict[str, Any]]:
    key = f"`environment: {spec}`"
    if not callable(getattr(environment, RESET, None)):
        raise ValueError(
            f"{key} has no method `reset`. Write `def reset(self, **row)`: it is called with the columns of the row "
            "before each completion, and may return a text that is appended to the prompt."
        )
    parameters = [p for p in inspect.signature(environment).parameters.values() if p.default is p.empty]
    if needed := [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]:
        raise ValueError(f"{key} needs {', '.join(needed)} to be made: each completion makes one as `Class()`.")
    bare: Any = object.__new__(environment)  # its methods are bound, and `__init__` has not run
    names = [
        name
        for name, _ in inspect.getmembers(environment, inspect.isroutine)
        if not name.startswith("_") and name not in (RESET, REWARD)
    ]
    if not names:
        raise ValueError(
            f"{key} has no tools: its public methods beside `reset` and `get_reward` are what the model may call. "
            "Give it one, with types and a docstring."
        )
    return [_schema(f"{key}, method `{name}`", getattr(bare, name)) for name in names]


def _schema(what: str, function: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    try:
        schema = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, TypeError, ValueError) as error:
        raise ValueError(
            f"{what} cannot be told to the model: {error}. A tool has a type for each argument and a docstring with "
            f"a line for each under `Args:`, such as\n{EXAMPLE}"
        ) from error
    described = {key: value for key, value in schema["function"].items() if key != "return"}
    described.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": described}


def row_seed(columns_as_json: str) -> int:
    """The seed of an environment's `reset` for a row: the same for all completions of its prompt, in every epoch."""
    return int.from_bytes(hashlib.blake2b(columns_as_json.encode(), digest_size=7).digest())
