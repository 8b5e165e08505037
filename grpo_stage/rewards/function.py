"""A reward function: the arguments that it names, a call with them, and what it may return."""

import asyncio
import contextlib
import difflib
import inspect
import json
import math
import os
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from grpo_stage.rewards.error_hints import NOT_SUPPLIED, explanation_of
from grpo_stage.rewards.errors import CompletionError, shorten
from grpo_stage.rewards.options import BATCH_ARGUMENTS
from grpo_stage.rewards.user_code import RewardCode
from grpo_stage.types import Prompt


@runtime_checkable
class ReadsColumns(Protocol):
    """A built-in function that can say before a run what is wrong with its columns."""

    def check_columns(self, prompts: Sequence[Prompt]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """A callable with its settings, and the arguments that it takes from a batch."""

    name: str
    function: Callable[..., Any]
    settings: Mapping[str, Any]
    required: tuple[str, ...]
    """Arguments without a default: of `BATCH_ARGUMENTS`, or dataset columns."""
    optional: tuple[str, ...]
    """Arguments with a default that are no settings."""
    takes_everything: bool
    """It has a `**kwargs`."""
    source: RewardCode | None = None
    """Where it is defined; None for a built-in function."""

    @classmethod
    def bind(cls, name: str, function: Any, settings: Mapping[str, Any]) -> "RewardFunction":
        """Read the signature of `function` and fix its settings.

        Raises:
            ValueError: if it cannot be called with keyword arguments, or does not name one of the settings.
        """
        if not callable(function) or inspect.isclass(function):
            remedy = (
                f"; name an object of the class, such as `judge = {function.__name__}()`" if callable(function) else ""
            )
            kind = "a class" if callable(function) else f"of type {type(function).__name__}"
            raise ValueError(f"reward {name!r} is {kind}: it must be a function or a callable object{remedy}")
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError as error:
            raise ValueError(
                f"reward {name!r}: Python cannot say which arguments {function!r} takes; wrap it in a `def`"
            ) from error
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
        if positional:
            raise ValueError(f"reward {name!r} takes {positional} by position only: arguments are given by name")
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes_everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        for key in settings:
            if key in BATCH_ARGUMENTS:
                raise ValueError(f"reward_kwargs of {name!r} sets {key!r}, which every batch brings: remove it")
            if not takes_everything and key not in [p.name for p in named]:
                raise ValueError(
                    f"reward_kwargs of {name!r} sets {key!r}, which the function does not name; "
                    f"it names {[p.name for p in named]}"
                )
        free = [p for p in named if p.name not in settings]
        return cls(
            name=name,
            function=function,
            settings=dict(settings),
            required=tuple(p.name for p in free if p.default is p.empty),
            optional=tuple(p.name for p in free if p.default is not p.empty),
            takes_everything=takes_everything,
        )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError where a prompt lacks what the function requires."""
        for name in self.required:
            if name == "references":
                missing = [p.index for p in prompts if not (p.reference or "").strip()]
            elif name in BATCH_ARGUMENTS:
                continue
            else:
                missing = [p.index for p in prompts if name not in p.columns]
            if not missing:
                continue
            lacking = f"{len(missing)} of {len(prompts)} prompts lack (the first at index {missing[0]})"
            if name == "references":
                raise ValueError(
                    f"reward {self.name!r} needs a reference answer, which {lacking}: give each row a last assistant "
                    "turn, or name the column that holds the answer with `reference_column`"
                )
            raise ValueError(f"reward {self.name!r} takes an argument {name!r}{_missing(name, lacking, prompts)}")
        function: Any = self.function
        if isinstance(function, ReadsColumns):
            function.check_columns(prompts)

    def arguments_from(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The part of the batch that the function is called with."""
        names = batch.keys() if self.takes_everything else (*self.required, *self.optional)
        return {name: batch[name] for name in names if name in batch}

    def evaluate(
        self, arguments: Mapping[str, Any], count: int, wait_for: Callable[[Awaitable[Any]], Any]
    ) -> list[float | None]:
        """One score for each of `count` completions.

        Args:
            arguments: `arguments_from` a batch.
            count: the completions of that batch.
            wait_for: returns what an async function's awaitable returns.

        Raises:
            CompletionError: if the function raises, or returns anything but one finite number or None per completion.
        """
        where = f"in a batch of {count} completions, the first of which is shown"
        try:
            # Copies for each call: a function may change its arguments, and no other function or step shall see that.
            copies = {name: _copied(value) for name, value in (*arguments.items(), *self.settings.items())}
            scores = self.function(**copies)
            if inspect.isawaitable(scores):
                scores = wait_for(scores)
        except CompletionError:
            raise
        # A user's function may raise anything; all of it stops the run.
        except (Exception, SystemExit, KeyboardInterrupt, asyncio.CancelledError) as failure:
            problem = f"raised {type(failure).__name__} {where}. {explanation_of(failure)}".rstrip(". ")
            raise CompletionError(0, problem, traceback.format_exc()) from failure
        if hasattr(scores, "tolist"):  # numpy's and torch's way to Python objects, here and for single elements
            scores = scores.tolist()
        if not isinstance(scores, list | tuple):
            raise CompletionError(0, f"returned {type(scores).__name__} {where}: it must return a list of numbers")
        if len(scores) != count:
            raise CompletionError(0, f"returned {len(scores)} scores {where}: it must return one for each")
        return [_checked(score, position) for position, score in enumerate(scores)]


@contextlib.contextmanager
def working_directory_kept() -> Iterator[None]:
    """A change of the working directory within the block is undone at its end."""
    folder = os.open(".", getattr(os, "O_PATH", os.O_RDONLY))  # the folder may have been removed, or not be readable
    try:
        yield
    finally:
        os.fchdir(folder)
        os.close(folder)


def _missing(name: str, lacking: str, prompts: Sequence[Prompt]) -> str:
    """The end of a message about an argument without a default that some prompts have no column for."""
    columns = sorted({column for p in prompts for column in p.columns})
    if name in columns:
        return (
            f", a dataset column that {lacking}. Write `{name}=None` in the function if those can do without it: it "
            "then gets None for them, and can return None, which is `not applicable`"
        )
    if name in NOT_SUPPLIED:
        return f", which is {NOT_SUPPLIED[name]}"
    for column, value in sorted(prompts[0].columns.items()):
        if isinstance(value, Mapping) and name in value:
            field = json.dumps({name: f"{column}.{name}"})
            return f", which {lacking}. Column {column!r} has a field of that name: write `reward_columns: {field}`"
    near = difflib.get_close_matches(name, [*BATCH_ARGUMENTS, *columns], n=1)
    return (
        f", a dataset column that {lacking}{f'; did you mean {near[0]!r}?' if near else '.'} The dataset's columns "
        f"are {columns}; beside them a function can take {', '.join(BATCH_ARGUMENTS)}, fields of a column by "
        "`reward_columns`, and settings from `reward_kwargs`"
    )


def _copied(value: Any) -> Any:
    """Copies of lists and mappings to any depth. Cheaper than `deepcopy`, which keeps a note of every number."""
    if isinstance(value, list):
        return [_copied(each) if isinstance(each, list | dict) else each for each in value]
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return value


def _checked(score: Any, position: int) -> float | None:
    """One returned score as a finite number or None, or CompletionError."""
    if hasattr(score, "tolist"):
        score = score.tolist()
    if score is None:
        return None
    if not isinstance(score, Real):
        raise CompletionError(
            position, f"returned {shorten(repr(score))} ({type(score).__name__}): a score is a number or None"
        )
    try:
        value = float(score)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise CompletionError(position, f"returned {value}: a score is finite; None says that none applies")
    return value
