"""Dynamic sampling: batches of groups whose rewards differ.

A group whose rewards are all equal has advantages of 0 and teaches nothing. DAPO (arXiv:2503.14476, "Dynamic
Sampling") leaves such groups out and samples further prompts until the batch is full.

    waiting groups of the rollout before -> [batch full?] -> roll out, drop, [full?] -> roll out, drop, ... -> batch
                                                                          what is too much waits for the next batch

Every rollout is of as many prompts as the batch has groups, so fewer than a batch ever wait, and none waits longer
than to the next batch. All ranks see the same groups in the same order, whatever their number: they decide alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from grpo_stage.distributed import all_gather
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.rollout.queue import group_state, load_group, load_tensors, tensors_state
from grpo_stage.types import Prompt, ScoredGroup


T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchGroup:
    """A group that a batch is made of."""

    scored: ScoredGroup
    """Its advantages are to be computed: they may depend on the other groups of the batch."""
    old_logprobs: tuple[torch.Tensor, ...] | None = None
    """Per completion, those of the policy that sampled it, where that is an earlier one; None where it is the present
    one, whose log-probabilities are to be had at any time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """A batch, and what it took."""

    groups: list[BatchGroup]
    """This rank's share."""
    dropped: list[ScoredGroup]
    """What this rank sampled in vain."""
    num_sampled: int
    """Groups that this rank sampled."""
    num_rollouts: int
    num_kept: int
    """Groups in the batch, over all ranks."""
    num_waiting: int
    """Groups that are left for the next batch, over all ranks."""


class DynamicSampling:
    """Fills batches, and keeps what was sampled too much. Used by all ranks alike.

    Args:
        max_resample_times: rollouts beyond the first that one batch may take.
        teaches: whether a group may be part of a batch.
        rank: this process.
        world_size: how many processes share the work.
    """

    def __init__(
        self, max_resample_times: int, teaches: Callable[[ScoredGroup], bool], rank: int, world_size: int
    ) -> None:
        self.num_waiting = 0
        """Groups that wait, over all ranks."""
        self._max_resample_times = max_resample_times
        self._teaches = teaches
        self._rank = rank
        self._world_size = world_size
        self._waiting: tuple[BatchGroup, ...] = ()  # this rank's share

    def fill(
        self,
        count: int,
        roll_out: Callable[[], Sequence[ScoredGroup]],
        may_roll_out: Callable[[], bool],
        old_logprobs: Callable[[Sequence[ScoredGroup]], Sequence[torch.Tensor]],
    ) -> Filled:
        """A batch of `count` groups over all ranks, or of fewer where rollouts or prompts come to an end.

        Args:
            count: how many groups make the batch.
            roll_out: samples and scores this rank's share of `count` further prompts.
            may_roll_out: whether there are prompts left; the same on all ranks.
            old_logprobs: those of groups that the present policy has sampled: a flat list over their completions.
        """
        pool = _dealt_together(self._waiting)
        dropped: list[ScoredGroup] = []
        num_rollouts = num_sampled = 0
        while len(pool) < count and num_rollouts <= self._max_resample_times and may_roll_out():
            share = roll_out()
            everyone = _dealt_together([each if self._teaches(each) else None for each in share])
            pool += [BatchGroup(scored=each) for each in everyone if each is not None]
            dropped += [each for each in share if not self._teaches(each)]
            num_rollouts += 1
            num_sampled += len(share)
        batch, rest = pool[:count], pool[count:]
        # What waits was sampled just now. The update moves the policy, so its log-probabilities are taken before.
        waiting = [each.scored for each in rest[self._rank :: self._world_size]]
        logprobs = iter(old_logprobs(waiting))
        self._waiting = tuple(
            BatchGroup(scored=each, old_logprobs=tuple(next(logprobs) for _ in each.group.completions))
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

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable and exact, as `RolloutBuffer.state_dict`; of this rank."""
        waiting = [
            {"group": group_state(each.scored), "old_logprobs": tensors_state(each.old_logprobs)}
            for each in self._waiting
        ]
        return {"num_waiting": self.num_waiting, "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any], prompts: Sequence[Prompt]) -> None:
        """Restore what `state_dict` gave. `prompts` is the dataset that the indices point into."""
        self.num_waiting = state["num_waiting"]
        self._waiting = tuple(
            BatchGroup(
                scored=load_group(each["group"], prompts),
                old_logprobs=load_tensors(each["old_logprobs"]),
            )
            for each in state["waiting"]
        )

    def undo(self) -> Callable[[], None]:
        """A function that puts the groups that wait now back in their place."""
        num_waiting, waiting = self.num_waiting, self._waiting

        def restore() -> None:
            self.num_waiting, self._waiting = num_waiting, waiting

        return restore


def fresh_rows(groups: Sequence[BatchGroup]) -> frozenset[int]:
    """Where in the flat list of the groups' completions those of the present policy stand."""
    is_fresh = [each.old_logprobs is None for each in groups for _ in each.scored.group.completions]
    return frozenset(row for row, fresh in enumerate(is_fresh) if fresh)


def record_filled(tracker: MetricTracker, filled: Filled, count: int, is_counter: bool) -> None:
    """Metrics of a batch.

    =================================== ===============================================================================
    dynamic_sampling/num_rollouts       rollouts that a batch took
    dynamic_sampling/frac_dropped       share of the sampled groups that were left out
    dynamic_sampling/num_kept           groups of a batch, over all ranks
    dynamic_sampling/num_waiting        groups sampled too much, which wait for the next batch
    dynamic_sampling/num_short_batches  batches that were not full, since the last log line
    =================================== ===============================================================================

    Args:
        tracker: where they are added.
        filled: the batch.
        count: the groups of a full one.
        is_counter: True on the one rank that counts.
    """
    tracker.add("dynamic_sampling/num_rollouts", filled.num_rollouts)
    tracker.add("dynamic_sampling/frac_dropped", len(filled.dropped), filled.num_sampled)
    tracker.add("dynamic_sampling/num_kept", filled.num_kept)
    tracker.add("dynamic_sampling/num_waiting", filled.num_waiting)
    tracker.count("dynamic_sampling/num_short_batches", float(is_counter and filled.num_kept < count))


def _dealt_together(share: Sequence[T]) -> list[T]:
    """All ranks' shares in the order that they were dealt from: what `[rank::world_size]` took apart."""
    shares = all_gather(list(share))
    return [each[i] for i in range(max(map(len, shares))) for each in shares if i < len(each)]
