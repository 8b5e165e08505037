"""How a batch is filled: with all groups of one rollout, or with groups whose rewards differ.

A group whose rewards are all equal has advantages of 0: the policy learns nothing from it. DAPO (arXiv:2503.14476,
"Dynamic Sampling") leaves such groups out and samples further prompts until the batch is full.

    waiting groups of the rollout before -> [batch full?] -> roll out, drop, [full?] -> roll out, drop, ... -> batch
                                                                          surplus groups wait for the next batch

Every rollout has as many prompts as the batch has groups. So fewer groups than a batch wait, and none of them longer
than until the next batch. All ranks see all groups in the same order, and so make the same decisions.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from transformers import TrainingArguments

from grpo_stage.arguments import GRPOArguments
from grpo_stage.distributed import all_gather
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.rollout.serialization import load_scored, scored_state
from grpo_stage.types import Prompt, ScoredGroup


T = TypeVar("T")
logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are

RollOut = Callable[[], Sequence[ScoredGroup]]
"""Samples and scores this rank's share of further prompts, as many over all ranks as the batch has groups."""
Question = Callable[[], bool]
FrozenLogprobs = Callable[[Sequence[ScoredGroup]], Sequence[torch.Tensor]]
"""[T] of each completion of groups that the present policy has sampled, prompt-major."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """A batch, and what it took to fill it."""

    groups: Sequence[ScoredGroup]
    """This rank's share."""
    dropped: Sequence[ScoredGroup] = ()
    """Groups that this rank sampled and the batch left out."""
    num_sampled: int
    """Groups that this rank sampled."""
    num_rollouts: int
    num_kept: int
    """Groups in the batch, over all ranks."""
    num_waiting: int = 0
    """Groups that are left for the next batch, over all ranks."""


class Filling(Protocol):
    """A way to fill batches. All ranks call it together."""

    num_waiting: int
    """Groups that wait for the next batch, over all ranks."""

    def fill(self, count: int, roll_out: RollOut, may_roll_out: Question, logprobs: FrozenLogprobs) -> Filled:
        """A batch of `count` groups over all ranks, or of fewer if there are no further rollouts or prompts.

        Args:
            count: how many groups a full batch has.
            roll_out: samples and scores further prompts.
            may_roll_out: whether there are prompts left; the same on all ranks.
            logprobs: log-probabilities under the present policy.
        """

    def report(self, filled: Filled, count: int, step: int, has_prompts: bool, tracker: MetricTracker) -> None:
        """Log what it took to fill the batch of a step.

        Args:
            filled: the batch.
            count: how many groups a full batch has.
            step: the step's number, from 1.
            has_prompts: whether further prompts were available.
            tracker: gets the metrics.
        """

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> None: ...


class PlainSampling:
    """The batch is all groups of one rollout."""

    num_waiting = 0

    def fill(self, count: int, roll_out: RollOut, may_roll_out: Question, logprobs: FrozenLogprobs) -> Filled:
        groups = roll_out()
        return Filled(groups=groups, num_sampled=len(groups), num_rollouts=1, num_kept=count)

    def report(self, filled: Filled, count: int, step: int, has_prompts: bool, tracker: MetricTracker) -> None: ...

    def state_dict(self) -> None: ...

    def load_state_dict(self, state: None) -> None: ...


class DynamicSampling:
    """Fills batches with groups that have a signal, and keeps surplus groups for the next batch.

    Args:
        prompts: the dataset.
        max_resample_times: rollouts beyond the first that one batch may take.
        has_signal: whether a group may be part of a batch.
        rank: this process.
        world_size: how many processes share the work.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        max_resample_times: int,
        has_signal: Callable[[ScoredGroup], bool],
        rank: int,
        world_size: int,
    ) -> None:
        self.num_waiting = 0
        self._prompts = prompts
        self._max_resample_times = max_resample_times
        self._has_signal = has_signal
        self._rank = rank
        self._world_size = world_size
        self._waiting: tuple[ScoredGroup, ...] = ()  # this rank's share, with old log-probabilities

    def fill(self, count: int, roll_out: RollOut, may_roll_out: Question, logprobs: FrozenLogprobs) -> Filled:
        pool = gather_in_deal_order(self._waiting)
        dropped: list[ScoredGroup] = []
        num_rollouts = num_sampled = 0
        while len(pool) < count and num_rollouts <= self._max_resample_times and may_roll_out():
            share = roll_out()
            everyone = gather_in_deal_order([each if self._has_signal(each) else None for each in share])
            pool += [each for each in everyone if each is not None]
            dropped += [each for each in share if not self._has_signal(each)]
            num_rollouts += 1
            num_sampled += len(share)
        batch, rest = pool[:count], pool[count:]
        # The present policy has sampled the waiting groups. Their old log-probabilities are taken now, since the
        # update changes the policy.
        waiting = rest[self._rank :: self._world_size]
        flat = iter(logprobs(waiting))
        self._waiting = tuple(
            dataclasses.replace(each, old_logprobs=tuple(next(flat) for _ in each.group.completions))
            for each in waiting
        )
        self.num_waiting = len(rest)
        return Filled(
            groups=batch[self._rank :: self._world_size],
            dropped=dropped,
            num_sampled=num_sampled,
            num_rollouts=num_rollouts,
            num_kept=len(batch),
            num_waiting=len(rest),
        )

    def report(self, filled: Filled, count: int, step: int, has_prompts: bool, tracker: MetricTracker) -> None:
        """See `Filling.report`.

        =================================== ===========================================================================
        dynamic_sampling/num_rollouts       rollouts that a batch took
        dynamic_sampling/frac_dropped       share of the sampled groups that were left out
        dynamic_sampling/num_kept           groups of a batch, over all ranks
        dynamic_sampling/num_waiting        surplus groups, which wait for the next batch
        dynamic_sampling/num_short_batches  batches that were not full, since the last log line
        =================================== ===========================================================================
        """
        is_short = self._rank == 0 and filled.num_kept < count
        tracker.add("dynamic_sampling/num_rollouts", filled.num_rollouts)
        tracker.add("dynamic_sampling/frac_dropped", len(filled.dropped), filled.num_sampled)
        tracker.add("dynamic_sampling/num_kept", filled.num_kept)
        tracker.add("dynamic_sampling/num_waiting", filled.num_waiting)
        tracker.count("dynamic_sampling/num_short_batches", float(is_short))
        if not is_short:
            return
        where = f"The batch of step {step} has {filled.num_kept} of {count} groups"
        if filled.num_kept == 0:
            logger.warning(f"{where}: nothing is learned from it. The task is too hard or too easy for the policy.")
        elif has_prompts:
            logger.warning(
                f"{where}: in {filled.num_rollouts} rollouts (`max_resample_times: {self._max_resample_times}`) no "
                "more were found whose rewards differ. It is trained on as it is. Where that is the rule, the task is "
                "too hard or too easy for the policy."
            )
        else:
            logger.info(f"{where}, the last of the epoch.")

    def state_dict(self) -> dict[str, Any]:
        """The waiting groups of this rank, exact and ready for JSON."""
        return {"num_waiting": self.num_waiting, "waiting": [scored_state(each) for each in self._waiting]}

    def undo(self) -> Callable[[], None]:
        """A function that puts the groups that wait now back in their place."""
        num_waiting, waiting = self.num_waiting, self._waiting

        def put_back() -> None:
            self.num_waiting, self._waiting = num_waiting, waiting

        return put_back

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_waiting = state["num_waiting"]
        self._waiting = tuple(load_scored(each, self._prompts) for each in state["waiting"])


def choose_filling(
    grpo_args: GRPOArguments,
    args: TrainingArguments,
    prompts: Sequence[Prompt],
    reward_names: Sequence[str],
    has_signal: Callable[..., bool],
) -> Filling:
    """The way to fill batches that the recipe asks for.

    Args:
        grpo_args: the recipe.
        args: Trainer's.
        prompts: the dataset.
        reward_names: of the reward functions, in order.
        has_signal: see `Credit.has_signal`.
    """
    if not grpo_args.dynamic_sampling:
        return PlainSampling()
    metric = grpo_args.filter_metric
    function = None if metric is None else reward_names.index(metric)
    fits = partial(has_signal, function=function, min_range=grpo_args.filter_min_range)
    return DynamicSampling(prompts, grpo_args.max_resample_times, fits, args.process_index, args.world_size)


def gather_in_deal_order(share: Sequence[T]) -> list[T]:
    """The shares of all ranks in their original order: the inverse of dealing by `[rank::world_size]`."""
    shares = all_gather(list(share))
    return [each[i] for i in range(max(map(len, shares))) for each in shares if i < len(each)]
