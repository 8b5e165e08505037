"""Reward functions loaded by name: built-ins, `path/file.py:function`, `package.module:function`."""

import dataclasses
import difflib
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_stage.rewards.builtin.context import RewardContext
from grpo_stage.rewards.code.sandbox import BWRAP, check_sandbox
from grpo_stage.rewards.function import RewardFunction, working_directory_kept
from grpo_stage.rewards.options import REWARD_MODEL, display_name
from grpo_stage.rewards.registry import BUILTIN_REWARDS, names_that_ask_checker, run_programs
from grpo_stage.rewards.suite import RewardSuite
from grpo_stage.rewards.user_code import RewardCode, check_loaded, describe, file_of, locate
from grpo_stage.rewards.user_modules import first_on_path, module_of
from grpo_stage.rewards.workers.answer_checker import AnswerChecker
from grpo_stage.rewards.workers.function_worker import FunctionWorker
from grpo_stage.rewards.workers.processes import FORMULAS, start_fork_server


logger = logging.getLogger(f"llamafactory.{__name__}")  # below the host's, whose handlers show it


def load_rewards(
    names: Sequence[str],
    weights: Sequence[float] | None,
    kwargs: Mapping[str, Mapping[str, Any]] | None,
    *,
    max_new_tokens: int,
    timeout_s: float,
    dump_dir: str | None = None,
    fields: Collection[str] = (),
    code_sandbox: str = BWRAP,
    announce: Callable[[str], object] = logger.info,
) -> RewardSuite:
    """The suite that `reward_funcs`, `reward_weights` and `reward_kwargs` describe, as `check_rewards` lets them pass.

    Args:
        names: built-in names, `reward_model`, `path/file.py:function` (relative to the working directory) or
            `package.module:function` (looked for in the working directory, then on `sys.path`).
        weights: one for each name; 1 each where None.
        kwargs: settings, by the function's display name: `fn` for `file.py:fn`.
        max_new_tokens: the default length of `length` and `overlong`.
        timeout_s: seconds that one function may take for the completions of one rollout.
        dump_dir: the folder that the stacks of a function that took longer are written to.
        fields: the arguments that `reward_columns` names.
        code_sandbox: where programs of completions run, for functions that run any.
        announce: is told of each function's code before any of it is loaded.

    Raises:
        ValueError: on anything that the user has to mend.
    """
    for code in describe(names, Path.cwd()):
        announce(f"Reward code that will run: {code}.")
    display_names = [display_name(name) for name in names]
    if run_programs(display_names):
        check_sandbox(code_sandbox)
    context = RewardContext(max_new_tokens, AnswerChecker(timeout_s), timeout_s=timeout_s, code_sandbox=code_sandbox)
    functions, workers = [], {}
    for spec, name in zip(names, display_names, strict=True):
        if spec.strip() == REWARD_MODEL:
            continue
        item = _Item(spec.strip(), name, dict((kwargs or {}).get(name, {})), Path.cwd())
        with working_directory_kept():
            function = item.load(context)
        functions.append(function)
        if item.runs_in_worker(function):
            source_file = function.source.file if function.source else inspect.getfile(function.function)
            load = partial(item.load_in_worker, function.source)
            workers[name] = FunctionWorker(name, load, str(source_file), timeout_s, dump_dir)
    _check_fields(fields, functions, display_names)
    asks_checker = bool(names_that_ask_checker(display_names))
    if workers or asks_checker:
        start_fork_server(FORMULAS if asks_checker else ())  # it gets ready while the model is loaded
    weights = [1.0] * len(names) if weights is None else weights
    return RewardSuite(display_names, functions, weights, context, workers)


@dataclass(frozen=True, slots=True)
class _Item:
    """An item of `reward_funcs` with its settings. It travels to a worker, which loads the function anew."""

    spec: str
    name: str
    settings: Mapping[str, Any]
    folder: Path
    """Where relative paths start, and where modules are looked for first."""

    def load(self, context: RewardContext | None = None) -> RewardFunction:
        """The function. In a worker there is no context."""
        if self.spec in BUILTIN_REWARDS:
            return RewardFunction.bind(self.name, _configured(self.spec, self.settings, context), {})
        place, _, attribute = self.spec.rpartition(":")
        if not place:
            raise _unknown(self.spec)
        code = locate(self.spec, self.folder)
        module = (_module_from_file if place.endswith(".py") else _module_by_name)(place, self.spec, self.folder)
        if not hasattr(module, attribute):
            raise ValueError(
                f"reward {self.spec!r}: {place} has no {attribute!r}; its functions are {_listed(_functions(module))}"
            )
        function = getattr(module, attribute)
        source = check_loaded(code, module, function)
        return dataclasses.replace(RewardFunction.bind(self.name, function, self.settings), source=source)

    def runs_in_worker(self, function: RewardFunction) -> bool:
        """True for what may never end and needs nothing of this process: a callable object is how to say it does."""
        if self.spec in BUILTIN_REWARDS:
            return BUILTIN_REWARDS[self.spec].may_never_end
        return inspect.isroutine(function.function)

    def load_in_worker(self, source: RewardCode | None) -> RewardFunction:
        """As `load`, for good: what the function imports late, and the processes that it starts, find its neighbors.

        Raises:
            ValueError: as `load`; and if the file is not what it was when the run began.
        """
        if source is not None:
            source.check_unchanged()
        function = self.load()
        place = self.spec.rpartition(":")[0]
        if place:
            in_file = place.endswith(".py")
            sys.path.insert(0, str(file_of(place, self.folder).parent if in_file else self.folder))
        return function


def _configured(name: str, settings: Mapping[str, Any], context: RewardContext | None) -> Callable[..., Any]:
    """A built-in function with its settings."""
    factory = BUILTIN_REWARDS[name].factory
    parameters = list(inspect.signature(factory).parameters.values())[1:]
    known = [parameter.name for parameter in parameters]
    for key in settings:
        if key not in known:
            raise ValueError(f"reward_kwargs of {name!r} sets {key!r}: its settings are {_listed(known)}")
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in settings:
            raise ValueError(f"reward {name!r} needs the setting {parameter.name!r}: give it in reward_kwargs")
    try:
        return factory(context, **settings)
    except ValueError as error:
        raise ValueError(f"reward_kwargs of {name!r}: {error}") from error


def _unknown(spec: str) -> ValueError:
    near = difflib.get_close_matches(spec, BUILTIN_REWARDS, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return ValueError(
        f"reward {spec!r} is not known. {hint}Built in are {', '.join(BUILTIN_REWARDS)}; a function of your own is "
        "`path/file.py:function` or `package.module:function`; `reward_model` is the model that the key of that name "
        "gives"
    )


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


def _check_fields(fields: Iterable[str], functions: Sequence[RewardFunction], display_names: Sequence[str]) -> None:
    """Refuse an argument of `reward_columns` that no function takes."""
    for field in fields:
        if not any(field in (*f.required, *f.optional) or f.takes_everything for f in functions):
            raise ValueError(
                f"`reward_columns` has {field!r}, and no function of `reward_funcs` ({_listed(display_names)}) takes "
                "an argument of that name: it would have no effect. Name it as the function does, or leave it out."
            )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
