"""Reward functions called with the arguments they name, and their scores combined."""

import asyncio
import contextlib
import difflib
import inspect
import json
import math
import os
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from grpo_stage import __version__
from grpo_stage.arguments import BATCH_ARGUMENTS
from grpo_stage.rewards.error_hints import NOT_SUPPLIED, explanation_of
from grpo_stage.rewards.errors import CompletionError, RewardError, shorten
from grpo_stage.rewards.user_code import RewardCode
from grpo_stage.rewards.workers.answer_checker import RewardContext
from grpo_stage.rewards.workers.function_worker import EventLoop, FunctionWorker, batch_seed
from grpo_stage.types import Prompt, Reward, RolloutGroup, TrainingProgress


REWARD_MODEL = "reward_model"
"""The name in `reward_funcs` of the model that `reward_model` names."""
MAX_MAGNITUDE = 1e15
"""Of a reward, weighted or not. Squares of it, summed over a batch, stay far inside float32 (3.4e38), in which losses
and gradients are computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """A callable, its settings, and what it wants of a batch."""

    name: str
    function: Callable[..., Any]
    settings: Mapping[str, Any]
    required: tuple[str, ...]
    """Batch arguments or dataset columns without a default."""
    optional: tuple[str, ...]
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
            if name in BATCH_ARGUMENTS and name != "references":
                continue
            if name == "references":
                missing = [p.index for p in prompts if not (p.reference or "").strip()]
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

    def wanted(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of the batch the function is called with."""
        names = batch.keys() if self.takes_everything else (*self.required, *self.optional)
        return {name: batch[name] for name in names if name in batch}

    def evaluate(
        self, arguments: Mapping[str, Any], count: int, wait_for: Callable[[Awaitable[Any]], Any]
    ) -> list[float | None]:
        """One score for each of `count` completions.

        Args:
            arguments: what `wanted` chose of a batch.
            count: how many completions it has.
            wait_for: returns what an async function's awaitable returns.

        Raises:
            CompletionError: if the function raises, or returns anything but one finite number or None per completion.
        """
        where = f"in a batch of {count} completions, the first of which is shown"
        try:
            # Copies for each call: what a function does to its arguments is no other function's or step's concern.
            own = {name: _copied(value) for name, value in (*arguments.items(), *self.settings.items())}
            scores = self.function(**own)
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
    """Whoever changes the working directory in this block has changed it for the block alone."""
    folder = os.open(".", getattr(os, "O_PATH", os.O_RDONLY))  # it may have no path any more, or not be readable
    try:
        yield
    finally:
        os.fchdir(folder)
        os.close(folder)


def _copied(value: Any) -> Any:
    """Lists and mappings as copies, whatever they are nested in. Cheaper than `deepcopy`, which notes each number."""
    if isinstance(value, list):
        return [_copied(each) if isinstance(each, list | dict) else each for each in value]
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return value


def _missing(name: str, lacking: str, prompts: Sequence[Prompt]) -> str:
    """What to say of an argument without a default that some of the prompts have no column for."""
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


def _error(name: str, failure: CompletionError, batch: Mapping[str, Any]) -> RewardError:
    """`failure` with what the user needs to find it."""
    return failure.error_type(
        name,
        failure.problem,
        prompt=batch["prompts"][failure.position],
        completion=batch["completions"][failure.position],
        traceback=failure.traceback,
    )


def _checked(score: Any, position: int) -> float | None:
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


def _check_magnitude(scores: Sequence[float | None], weight: float) -> None:
    """Refuse a reward whose advantage, or the square of it, is infinite though the reward is not."""
    for position, score in enumerate(scores):
        if score is not None and not max(abs(score), abs(weight * score)) <= MAX_MAGNITUDE:
            weighted = "" if weight == 1 else f", {weight * score:g} with its weight of {weight:g},"
            raise CompletionError(
                position,
                f"returned {score:g}{weighted} which is beyond {MAX_MAGNITUDE:g} in magnitude: such rewards overflow "
                "when they are squared, for standard deviations and gradients, and nothing is learned. Bound or "
                "rescale what the function returns, for example to -1 to 1; None says that none applies",
            )


class RewardSuite:
    """The reward functions of a run.

    Args:
        names: what metrics and tables call the rewards; unique.
        functions: those of them that are functions: all but `REWARD_MODEL`.
        weights: one for each name.
        context: what the built-in ones share.
        workers: of the functions that run in processes of their own, by name.
    """

    model: Reward
    """What scores `REWARD_MODEL`. It may need the policy, and so is set once that is loaded."""
    progress: TrainingProgress
    """What functions get as `trainer_state`. The trainer sets it before it has completions scored."""

    def __init__(
        self,
        names: Sequence[str],
        functions: Sequence[RewardFunction],
        weights: Sequence[float],
        context: RewardContext,
        workers: Mapping[str, FunctionWorker],
    ) -> None:
        self._functions = tuple(functions)
        self._workers = dict(workers)
        self._context = context
        self._loop = EventLoop()
        self._taken: Counter[str] = Counter()
        self._columns: set[str] = set()
        self.progress = TrainingProgress()
        self.names = tuple(names)
        self.weights = tuple(weights)

    @property
    def code(self) -> dict[str, str]:
        """What each function's code is: the hash of its file, or the version of this package for a built-in one."""
        return {f.name: f.source.sha256 if f.source else f"grpo-stage {__version__}" for f in self._functions}

    @property
    def counters(self) -> dict[str, int]:
        """What was counted since the start of the run, e.g. `{"accuracy/timeouts": 3}`."""
        return dict(self._context.counters)

    def take_counters(self) -> dict[str, int]:
        """What was counted since the last call of this method."""
        new = self._context.counters - self._taken
        self._taken = self._context.counters.copy()
        return dict(new)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError where a function needs references or a column that a prompt does not have.

        A column of any prompt that was ever checked is a list in every batch from then on, with None for prompts
        that lack it: what a function gets does not depend on which prompts are in the batch.
        """
        self._columns.update(column for prompt in prompts for column in prompt.columns)
        for function in self._functions:
            function.check(prompts)

    def score(self, groups: Sequence[RolloutGroup]) -> list[list[list[float | None]]]:
        """Score every completion with every function: [P][G][F], unweighted; None where a function does not apply.

        Raises:
            ValueError: as `check`.
            RewardTimeoutError: if a function takes longer than the limit.
            RewardError: if a function fails otherwise, or returns what is not a score.
        """
        self.check([group.prompt for group in groups])
        batch = _flatten(groups, self._columns) | {"trainer_state": self.progress}
        if not batch["completions"]:
            return [[] for _ in groups]
        by_name = self._score(groups, batch)
        for name, weight in zip(self.names, self.weights, strict=True):
            try:
                _check_magnitude(by_name[name], weight)
            except CompletionError as failure:
                raise _error(name, failure, batch) from failure
        flat = iter([list(scores) for scores in zip(*(by_name[name] for name in self.names), strict=True)])
        return [[next(flat) for _ in group.completions] for group in groups]

    def _score(self, groups: Sequence[RolloutGroup], batch: Mapping[str, Any]) -> dict[str, list[float | None]]:
        """The scores of each name. Functions with a process of their own are at it all at the same time."""
        count, seed = len(batch["completions"]), batch_seed(batch["completion_ids"])
        scores: dict[str, list[float | None]] = {}
        in_workers = [function for function in self._functions if function.name in self._workers]
        here = [function for function in self._functions if function.name not in self._workers]
        try:
            for function in in_workers:
                self._workers[function.name].start(function.wanted(batch), count, seed)
            if REWARD_MODEL in self.names:
                scores[REWARD_MODEL] = [score for group in self.model(groups) for score in group]
            for function in (*here, *in_workers):
                try:
                    if function.name in self._workers:
                        scores[function.name] = self._workers[function.name].result()
                        continue
                    with working_directory_kept():  # a worker's is that function's own
                        scores[function.name] = function.evaluate(function.wanted(batch), count, self._loop.wait_for)
                except CompletionError as failure:
                    raise _error(function.name, failure, batch) from (failure.__cause__ or failure)
        finally:
            for worker in self._workers.values():
                worker.end_if_busy()
        return scores

    def total(self, rewards: Sequence[float | None]) -> float | None:
        """The weighted sum of one completion's rewards over the functions that applied; None where none did.

        A function of weight 0 is only logged: it neither adds nor counts as one that applied.
        """
        pairs = zip(self.weights, rewards, strict=True)
        applied = [weight * reward for weight, reward in pairs if reward is not None and weight != 0]
        return math.fsum(applied) if applied else None

    def close(self) -> None:
        """End the worker processes. May be called twice."""
        self._loop.close()
        self._context.checker.close()
        for worker in self._workers.values():
            worker.close()


def _flatten(groups: Sequence[RolloutGroup], columns: Iterable[str]) -> dict[str, list[Any]]:
    """Every argument a function can name, a list over all completions, prompt-major. Ours win over dataset columns."""
    rows = [(group.prompt, completion) for group in groups for completion in group.completions]
    return {column: [prompt.columns.get(column) for prompt, _ in rows] for column in sorted(columns)} | {
        "prompts": [prompt.text for prompt, _ in rows],
        "completions": [completion.text for _, completion in rows],
        "completion_ids": [list(completion.token_ids) for _, completion in rows],
        "messages": [[dict(message) for message in prompt.messages] for prompt, _ in rows],
        "references": [prompt.reference for prompt, _ in rows],
    }
