"""Reward functions by name: built-ins, `path/file.py:function`, `package.module:function`."""

import dataclasses
import difflib
import importlib
import inspect
import logging
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from grpo_stage.records.redaction import MASK, mask, strings_in
from grpo_stage.rewards.builtin import correctness, shaping, structure
from grpo_stage.rewards.suite import REWARD_MODEL, RewardFunction, RewardSuite, working_directory_kept
from grpo_stage.rewards.user_code import RewardCode, check_loaded, describe, file_of, locate
from grpo_stage.rewards.user_modules import first_on_path, module_of
from grpo_stage.rewards.workers.answer_checker import AnswerChecker, RewardContext
from grpo_stage.rewards.workers.function_worker import FunctionWorker
from grpo_stage.rewards.workers.processes import start_fork_server


logger = logging.getLogger(f"llamafactory.{__name__}")  # below the host's, whose handlers show it

BUILTIN_REWARDS: Mapping[str, Callable[..., Callable[..., Any]]] = MappingProxyType(
    {
        "accuracy": correctness.accuracy,
        "exact_match": correctness.exact_match,
        "format": structure.think_answer_format,
        "tag_count": structure.tag_count,
        "length": shaping.length,
        "overlong": shaping.overlong,
        "repetition": shaping.repetition,
        "regex": structure.regex,
    }
)
"""Name -> factory: called with a `RewardContext` and the settings out of `reward_kwargs`, it returns the function."""

OPEN_ENDED = frozenset({"regex"})
"""Built-ins that may take for ever: a pattern can backtrack for hours."""
CHECKED = frozenset({"accuracy", "length"})
"""Built-ins that ask the `AnswerChecker`."""

KNOWN = (
    f"Built in are {', '.join(BUILTIN_REWARDS)}; "
    "a function of your own is `path/file.py:function` or `package.module:function`; `reward_model` is the model that "
    "the key of that name gives"
)


def load_rewards(
    names: Sequence[str],
    weights: Sequence[float] | None,
    kwargs: Mapping[str, Mapping[str, Any]] | None,
    *,
    max_new_tokens: int,
    timeout_s: float,
    dump_dir: str | None = None,
    fields: Collection[str] = (),
    announce: Callable[[str], object] = logger.info,
) -> RewardSuite:
    """The suite that `reward_funcs`, `reward_weights` and `reward_kwargs` describe.

    Args:
        names: built-in names, `reward_model`, `path/file.py:function` (relative to the working directory) or
            `package.module:function` (looked for in the working directory, then on `sys.path`).
        weights: one for each name; 1 each where None.
        kwargs: settings, by the function's display name: `fn` for `file.py:fn`.
        max_new_tokens: the default length of `length` and `overlong`.
        timeout_s: seconds that one function may take for the completions of one rollout.
        dump_dir: the folder that the stacks of a function that took longer are written to.
        fields: the arguments that `reward_columns` names.
        announce: is told of each function's code before any of it is loaded.

    Raises:
        ValueError: on anything the user has to mend.
    """
    if not names:
        raise ValueError(f"reward_funcs is empty: name one at least. {KNOWN}")
    display_names = [name.rpartition(":")[2].strip() for name in names]
    for display_name, spec in zip(display_names, names, strict=True):
        if display_names.count(display_name) > 1:
            raise ValueError(
                f"reward_funcs: two functions are called {display_name!r} ({spec!r} is one): metrics and "
                "reward_kwargs go by these names, so they must differ; rename one"
            )
        if display_name == REWARD_MODEL != spec.strip():
            raise ValueError(
                f"reward_funcs: {spec!r} would be called {REWARD_MODEL!r}, which is the name of the model that the "
                "key of that name gives; rename it"
            )
    kwargs = kwargs or {}
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"reward_kwargs is {mask(kwargs)!r}: it must map a function's name to its settings")
    for key, settings in kwargs.items():
        if key not in display_names:
            raise ValueError(
                f"reward_kwargs names {key!r}, which is not in reward_funcs: there are {_listed(display_names)}"
            )
        if not isinstance(settings, Mapping):
            raise ValueError(
                f"reward_kwargs[{key!r}] is {mask({key: settings})[key]!r}: it must map settings to values"
            )
        if MASK in strings_in(settings):
            raise ValueError(
                f"reward_kwargs[{key!r}] has `{MASK}` where a secret was taken out of the recipe. Write the value, or "
                "read it in the function from an environment variable, which no file holds (docs/security.md)"
            )
    if REWARD_MODEL in kwargs:
        raise ValueError(f"reward_kwargs of {REWARD_MODEL!r}: a model has no settings there: remove them")
    checked_weights = _check_weights(weights, names)
    context = RewardContext(max_new_tokens, AnswerChecker(timeout_s))
    for code in describe(names, Path.cwd()):
        announce(f"Reward code that will run: {code}.")
    functions, workers = [], {}
    for spec, name in zip(names, display_names, strict=True):
        if spec.strip() == REWARD_MODEL:
            continue
        described = spec.strip(), name, dict(kwargs.get(name, {})), Path.cwd()
        with working_directory_kept():
            function = _load(*described, context)
        functions.append(function)
        if _runs_in_worker(spec.strip(), function.function):
            source_file = function.source.file if function.source else structure.__file__
            load = partial(_load_in_worker, *described, function.source)
            workers[name] = FunctionWorker(name, load, str(source_file), timeout_s, dump_dir)
    for field in fields:
        if not any(field in (*f.required, *f.optional) or f.takes_everything for f in functions):
            raise ValueError(
                f"`reward_columns` has {field!r}, and no function of `reward_funcs` ({_listed(display_names)}) takes "
                "an argument of that name: it would have no effect. Name it as the function does, or leave it out."
            )
    if workers or not CHECKED.isdisjoint(display_names):
        start_fork_server()  # it gets ready while the model is loaded
    return RewardSuite(display_names, functions, checked_weights, context, workers)


def _runs_in_worker(spec: str, function: Callable[..., Any]) -> bool:
    """True for what may never end and needs nothing of this process: a callable object is how to say that it does."""
    return spec in OPEN_ENDED if spec in BUILTIN_REWARDS else inspect.isroutine(function)


def _check_weights(weights: Sequence[float] | None, names: Sequence[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names):
        raise ValueError(
            f"reward_weights has {len(weights)} values for {len(names)} reward functions ({_listed(names)}): give one "
            "for each"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"reward_weights {list(weights)}: weights must be finite")
    if not any(weights):
        raise ValueError(f"reward_weights {list(weights)}: all are 0, so that nothing could be learned")
    return [float(weight) for weight in weights]


def _load(
    spec: str,
    name: str,
    settings: Mapping[str, Any],
    folder: Path,
    context: RewardContext | None = None,
) -> RewardFunction:
    """The function that `spec` names, looked for in `folder`. In a worker there is no context."""
    if spec in BUILTIN_REWARDS:
        return RewardFunction.bind(name, _configure(spec, settings, context), {})
    place, _, attribute = spec.rpartition(":")
    if not place:
        near = difflib.get_close_matches(spec, BUILTIN_REWARDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown reward {spec!r}: {hint}{KNOWN}")
    code = locate(spec, folder)
    module = (_module_from_file if place.endswith(".py") else _module_by_name)(place, spec, folder)
    if not hasattr(module, attribute):
        raise ValueError(
            f"reward {spec!r}: {place} has no {attribute!r}; its functions are {_listed(_functions(module))}"
        )
    function = getattr(module, attribute)
    source = check_loaded(code, module, function)
    return dataclasses.replace(RewardFunction.bind(name, function, settings), source=source)


def _configure(name: str, settings: Mapping[str, Any], context: RewardContext | None) -> Callable[..., Any]:
    factory = BUILTIN_REWARDS[name]
    parameters = list(inspect.signature(factory).parameters.values())[1:]
    known = [parameter.name for parameter in parameters]
    for key in settings:
        if key not in known:
            raise ValueError(f"reward_kwargs of {name!r} sets {key!r}: its settings are {_listed(known) or 'none'}")
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in settings:
            raise ValueError(f"reward {name!r} needs the setting {parameter.name!r}: give it in reward_kwargs")
    try:
        return factory(context, **settings)
    except ValueError as error:
        raise ValueError(f"reward_kwargs of {name!r}: {error}") from error


def _load_in_worker(
    spec: str, name: str, settings: Mapping[str, Any], folder: Path, source: RewardCode | None
) -> RewardFunction:
    """As `_load`, for good: what the function imports late, and the processes that it starts, find its neighbors.

    Raises:
        ValueError: as `_load`; and if the file is not what it was when the run began.
    """
    if source is not None:
        source.check_unchanged()
    function = _load(spec, name, settings, folder)
    place = spec.rpartition(":")[0]
    if place:
        sys.path.insert(0, str(file_of(place, folder).parent if place.endswith(".py") else folder))
    return function


def _module_from_file(place: str, spec: str, folder: Path) -> ModuleType:
    path = file_of(place, folder)
    try:
        return module_of(path)
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # a user's file may raise anything
        raise ValueError(f"reward {spec!r}: loading {path} failed with {type(error).__name__}: {error}") from error


def _module_by_name(place: str, spec: str, folder: Path) -> ModuleType:
    try:
        with first_on_path(folder):
            return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ValueError(f"reward {spec!r}: importing {place} failed, since it imports {error.name!r}") from error
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # a user's module may raise anything
        raise ValueError(f"reward {spec!r}: importing {place} failed with {type(error).__name__}: {error}") from error


def _functions(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


def _listed(names: Any) -> str:
    return ", ".join(names) or "none"
