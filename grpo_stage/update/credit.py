"""Scored groups -> samples with their advantages, by the statistics of a batch over all ranks of the generation."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from grpo_stage.algorithm.advantages import ADVANTAGE_ESTIMATORS
from grpo_stage.algorithm.catalog import ESTIMATORS
from grpo_stage.algorithm.reward_table import RewardTable, tells_apart
from grpo_stage.distributed import all_gather, process_index
from grpo_stage.types import FinishReason, Sample, ScoredGroup


Row = tuple[list[float], list[list[float]], list[int], list[float] | None]
"""Totals [G], parts [G][F], numbers of sampled tokens [G] and the greedy completion's parts [F] of a group."""


class Credit:
    """Gives each completion of a batch its advantage. All ranks call it together.

    Args:
        estimator: a key of `ADVANTAGE_ESTIMATORS`.
        scale_rewards: what advantages are divided by.
        weights: [F] of the reward functions.
        mask_truncated: leave truncated completions out of the loss.
        prompt_weights: [P] what the advantages of each prompt of the dataset are multiplied by; None for 1.
    """

    def __init__(
        self,
        estimator: str,
        scale_rewards: str,
        weights: Sequence[float],
        mask_truncated: bool,
        prompt_weights: Sequence[float] | None = None,
    ) -> None:
        self._estimate = ADVANTAGE_ESTIMATORS[estimator]
        self._is_of_tokens = ESTIMATORS[estimator].is_of_tokens
        self._scale_rewards = scale_rewards
        self._weights = weights
        self._mask_truncated = mask_truncated
        self._prompt_weights = prompt_weights

    def assign(
        self, groups: Sequence[ScoredGroup], penalties: Sequence[float] | None = None
    ) -> list[tuple[Sample, ...]]:
        """The samples of each group, with advantages. Every rank must call it, even without groups.

        Args:
            groups: this rank's share of one generation.
            penalties: taken off the total of each completion, prompt-major; `Sample.total_reward` stays without them.
        """
        num_completions = sum(len(scored.total_rewards) for scored in groups)
        assert penalties is None or len(penalties) == num_completions, "one for each completion"
        flat = iter(penalties or [0.0] * num_completions)
        rows: list[Row] = [
            ([total - next(flat) for total in totals], parts, lengths, greedy)
            for totals, parts, lengths, greedy in map(_row, groups)
        ]
        if self._is_of_tokens:
            return [self._of_tokens(group, row) for group, row in zip(groups, rows, strict=True)]
        ranks = all_gather(rows)
        first = sum(len(rows_of_rank) for rows_of_rank in ranks[: process_index()])
        everyone = [row for rank in ranks for row in rank]
        if not everyone:
            return []
        advantages = self._estimate(_table(everyone, self._weights), self._scale_rewards)[first : first + len(groups)]
        return [
            self._samples(group, (of_group * self._weight(group)).tolist())
            for group, of_group in zip(groups, advantages, strict=True)
        ]

    def _of_tokens(self, group: ScoredGroup, row: Row) -> tuple[Sample, ...]:
        """The estimator compares within the group alone."""
        assert group.energies is not None
        masks = [torch.tensor(each.sampled_mask, dtype=torch.bool) for each in group.group.completions]  # [G] of [T]
        sampled = [each[mask].double() for each, mask in zip(group.energies, masks, strict=True)]
        energies = pad_sequence(sampled, batch_first=True).unsqueeze(0)  # [1, G, sampled]
        table = dataclasses.replace(_table([row], self._weights), energies=energies)
        of_group = self._estimate(table, self._scale_rewards)[0] * self._weight(group)  # [G, sampled]
        own = [values[:length].float() for values, length in zip(of_group, row[2], strict=True)]
        samples = self._samples(group, [values.mean().item() for values in own])
        placed = [torch.zeros(len(m)).masked_scatter(m, values) for m, values in zip(masks, own, strict=True)]
        return tuple(dataclasses.replace(s, token_advantages=each) for s, each in zip(samples, placed, strict=True))

    def _weight(self, group: ScoredGroup) -> float:
        return 1.0 if self._prompt_weights is None else self._prompt_weights[group.group.prompt.index]

    def withhold(self, group: ScoredGroup) -> tuple[Sample, ...]:
        """The samples of a group that no step trains on, with advantages of 0."""
        return self._samples(group, [0.0] * len(group.total_rewards))

    def has_signal(self, group: ScoredGroup, function: int | None = None, min_range: float = 0.0) -> bool:
        """Whether its totals differ, and the loss uses any of its completions.

        Args:
            group: a group.
            function: of the reward function whose rewards have to differ as well; None for the totals alone.
            min_range: by how much at least.
        """
        is_used = any(not self._is_left_out(completion.finish_reason) for completion in group.group.completions)
        if not is_used or not has_reward_variance(group, self._weights):
            return False
        return bool(tells_apart(_table([_row(group)], self._weights), function, min_range))

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
                loss_mask=(0,) * len(completion.token_ids)
                if self._is_left_out(completion.finish_reason)
                else completion.sampled_mask,
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
        [completion.num_sampled for completion in scored.group.completions],
        None if scored.greedy_rewards is None else [_number(reward) for reward in scored.greedy_rewards],
    )


def _table(rows: Sequence[Row], weights: Sequence[float]) -> RewardTable:
    totals, parts, lengths, greedy = zip(*rows, strict=True)
    return RewardTable(
        totals=torch.tensor(totals, dtype=torch.float64),
        parts=torch.tensor(parts, dtype=torch.float64),
        weights=torch.tensor(weights, dtype=torch.float64),
        lengths=torch.tensor(lengths),
        greedy_parts=None if None in greedy else torch.tensor(greedy, dtype=torch.float64),
    )


def _number(reward: float | None) -> float:
    return math.nan if reward is None else reward
