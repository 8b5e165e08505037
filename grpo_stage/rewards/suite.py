"""All the reward functions of a run: their scores for a rollout, and the weighted sum of them."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grpo_stage import __version__
from grpo_stage.rewards.builtin.context import RewardContext
from grpo_stage.rewards.errors import CompletionError, RewardError
from grpo_stage.rewards.function import RewardFunction, working_directory_kept
from grpo_stage.rewards.options import REWARD_MODEL
from grpo_stage.rewards.workers.event_loop import EventLoop
from grpo_stage.rewards.workers.function_worker import FunctionWorker
from grpo_stage.rewards.workers.seeds import batch_seed
from grpo_stage.types import Completion, Prompt, Reward, RolloutGroup, TrainingProgress


MAX_MAGNITUDE = 1e15
"""The largest reward in magnitude, weighted or not. The sum of its squares over a batch stays far below the largest
float32 (3.4e38), in which losses and gradients are computed."""


class RewardSuite:
    """The reward functions of a run.

    Args:
        names: what metrics and tables call the rewards; unique.
        functions: of all names but `REWARD_MODEL`.
        weights: one for each name.
        context: shared by the built-in functions.
        workers: by name, of the functions that run in processes of their own.
    """

    model: Reward
    """Scores `REWARD_MODEL`. It may need the policy, and so is set once the policy is loaded."""
    progress: TrainingProgress
    """What functions get as `trainer_state`. The trainer sets it before every call of `score`."""

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
        """The scores of each name. Functions in processes of their own run at the same time."""
        count, seed = len(batch["completions"]), batch_seed(batch["completion_ids"])
        scores: dict[str, list[float | None]] = {}
        in_workers = [function for function in self._functions if function.name in self._workers]
        here = [function for function in self._functions if function.name not in self._workers]
        try:
            for function in in_workers:
                self._workers[function.name].start(function.arguments_from(batch), count, seed)
            if REWARD_MODEL in self.names:
                scores[REWARD_MODEL] = [score for group in self.model(groups) for score in group]
            for function in (*here, *in_workers):
                try:
                    if function.name in self._workers:
                        scores[function.name] = self._workers[function.name].result()
                        continue
                    with working_directory_kept():
                        scores[function.name] = function.evaluate(
                            function.arguments_from(batch), count, self._loop.wait_for
                        )
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
        self._context.graders.close()
        for worker in self._workers.values():
            worker.close()


def _flatten(groups: Sequence[RolloutGroup], columns: Iterable[str]) -> dict[str, list[Any]]:
    """Each argument as a list over all completions, prompt-major. Batch arguments hide columns of the same name."""
    rows = [(group.prompt, completion) for group in groups for completion in group.completions]
    return {column: [prompt.columns.get(column) for prompt, _ in rows] for column in sorted(columns)} | {
        "prompts": [prompt.text for prompt, _ in rows],
        "completions": [completion.text for _, completion in rows],
        "completion_ids": [list(completion.token_ids) for _, completion in rows],
        "messages": [
            [dict(message) for message in (*prompt.messages, *_messages_of(completion))] for prompt, completion in rows
        ],
        "final_turns": [completion.final_turn for _, completion in rows],
        "environment_rewards": [completion.environment_reward for _, completion in rows],
        "references": [prompt.reference for prompt, _ in rows],
    }


def _messages_of(completion: Completion) -> list[dict[str, str]]:
    """With tools, those of its turns."""
    return [
        {"role": "assistant" if turn.is_sampled else "observation", "content": turn.text} for turn in completion.turns
    ]


def _error(name: str, failure: CompletionError, batch: Mapping[str, Any]) -> RewardError:
    """`failure` as the error of the run, which shows function, prompt and completion."""
    return failure.error_type(
        name,
        failure.problem,
        prompt=batch["prompts"][failure.position],
        completion=batch["completions"][failure.position],
        traceback=failure.traceback,
    )


def _check_magnitude(scores: Sequence[float | None], weight: float) -> None:
    """Refuse finite rewards so large that their advantages or the squares of those overflow."""
    for position, score in enumerate(scores):
        if score is not None and not max(abs(score), abs(weight * score)) <= MAX_MAGNITUDE:
            weighted = "" if weight == 1 else f", {weight * score:g} with its weight of {weight:g},"
            raise CompletionError(
                position,
                f"returned {score:g}{weighted} which is beyond {MAX_MAGNITUDE:g} in magnitude: such rewards overflow "
                "when they are squared, for standard deviations and gradients, and nothing is learned. Bound or "
                "rescale what the function returns, for example to -1 to 1; None says that none applies",
            )
