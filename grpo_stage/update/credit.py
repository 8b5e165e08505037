"""Scored groups -> samples with their advantages, by the statistics of a batch over all ranks of the generation."""

import math
from collections.abc import Sequence

import torch

from grpo_stage.algorithm.advantages import ADVANTAGE_ESTIMATORS, RewardTable, tells_apart
from grpo_stage.distributed import all_gather, process_index
from grpo_stage.types import FinishReason, Sample, ScoredGroup


Row = tuple[list[float], list[list[float]], list[int]]
"""Totals [G], parts [G][F] and lengths [G] of a group."""


class Credit:
    """Gives each completion of a batch its advantage. All ranks call it together.

    Args:
        estimator: a key of `ADVANTAGE_ESTIMATORS`.
        scale_rewards: what advantages are divided by.
        weights: [F] of the reward functions.
        mask_truncated: leave truncated completions out of the loss.
    """

    def __init__(self, estimator: str, scale_rewards: str, weights: Sequence[float], mask_truncated: bool) -> None:
        self._estimator = estimator
        self._scale_rewards = scale_rewards
        self._weights = weights
        self._mask_truncated = mask_truncated

    def assign(
        self, groups: Sequence[ScoredGroup], penalties: Sequence[float] | None = None
    ) -> list[tuple[Sample, ...]]:
        """The samples of each group, with advantages. Every rank must call it, even without groups.

        Args:
            groups: this rank's share of one generation.
            penalties: taken off the total of each completion, prompt-major; `Sample.total_reward` stays without them.
        """
        flat = iter(penalties or [0.0] * sum(len(scored.total_rewards) for scored in groups))
        rows = [
            ([total - next(flat) for total in totals], parts, lengths) for totals, parts, lengths in map(_row, groups)
        ]
        ranks = all_gather(rows)
        first = sum(len(rows_of_rank) for rows_of_rank in ranks[: process_index()])
        everyone = [row for rank in ranks for row in rank]
        if not everyone:
            return []
        table = _table(everyone, self._weights)
        advantages = ADVANTAGE_ESTIMATORS[self._estimator](table, self._scale_rewards)[first : first + len(groups)]
        return [self._samples(*each) for each in zip(groups, advantages.tolist(), strict=True)]

    def withhold(self, group: ScoredGroup) -> tuple[Sample, ...]:
        """The samples of a group that no step trains on, with advantages of 0."""
        return self._samples(group, [0.0] * len(group.total_rewards))

    def has_signal(self, group: ScoredGroup) -> bool:
        """Whether the group's rewards differ, and the loss uses any of its completions."""
        is_used = any(not self._is_left_out(completion.finish_reason) for completion in group.group.completions)
        return is_used and has_reward_variance(group, self._weights)

    def _is_left_out(self, finish_reason: FinishReason) -> bool:
        return self._mask_truncated and finish_reason is FinishReason.LENGTH

    def _samples(self, group: ScoredGroup, advantages: Sequence[float]) -> tuple[Sample, ...]:
        no_logprobs = (None,) * len(advantages)
        return tuple(
            Sample(
                prompt=group.group.prompt,
                completion=completion,
                policy_version=group.group.policy_version,
                rewards=rewards,
                total_reward=total,
                advantage=advantage,
                loss_mask=(0 if self._is_left_out(completion.finish_reason) else 1,) * len(completion.token_ids),
                old_logprobs=old,
                ref_logprobs=ref,
            )
            for completion, rewards, total, advantage, old, ref in zip(
                group.group.completions,
                group.rewards,
                group.total_rewards,
                advantages,
                group.old_logprobs or no_logprobs,
                group.ref_logprobs or no_logprobs,
                strict=True,
            )
        )


def has_reward_variance(scored: ScoredGroup, weights: Sequence[float]) -> bool:
    """Whether two completions that the same functions applied to have different totals. If not, all advantages are 0.

    Args:
        scored: a group.
        weights: [F] of the reward functions.
    """
    return bool(tells_apart(_table([_row(scored)], weights)))


def _row(scored: ScoredGroup) -> Row:
    return (
        [_number(total) for total in scored.total_rewards],
        [[_number(reward) for reward in row] for row in scored.rewards],
        [len(completion.token_ids) for completion in scored.group.completions],
    )


def _table(rows: Sequence[Row], weights: Sequence[float]) -> RewardTable:
    totals, parts, lengths = zip(*rows, strict=True)
    return RewardTable(
        totals=torch.tensor(totals, dtype=torch.float64),
        parts=torch.tensor(parts, dtype=torch.float64),
        weights=torch.tensor(weights, dtype=torch.float64),
        lengths=torch.tensor(lengths),
    )


def _number(reward: float | None) -> float:
    return math.nan if reward is None else reward
