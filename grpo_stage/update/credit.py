"""Scored groups -> their advantages, with the statistics of a batch over all ranks of the generation."""

import dataclasses
import math
from collections.abc import Sequence

import torch

from grpo_stage.algorithm.advantages import ADVANTAGE_ESTIMATORS, RewardTable, tells_apart
from grpo_stage.distributed import all_gather, process_index
from grpo_stage.types import ScoredGroup


Row = tuple[list[float], list[list[float]], list[int]]
"""Totals [G], parts [G][F] and lengths [G] of a group."""


def with_advantages(
    groups: Sequence[ScoredGroup],
    *,
    estimator: str,
    scale_rewards: str,
    weights: Sequence[float],
    penalties: Sequence[float] | None = None,
) -> list[ScoredGroup]:
    """The groups with the advantages that `estimator` gives them. Every rank must call it, if with no groups.

    Args:
        groups: this rank's share of one generation.
        estimator: a key of `ADVANTAGE_ESTIMATORS`.
        scale_rewards: what to divide by.
        weights: of the reward functions.
        penalties: taken off the total of each completion, prompt-major; it stays as it is in the record.
    """
    flat = iter(penalties or [0.0] * sum(len(scored.total_rewards) for scored in groups))
    rows = [([total - next(flat) for total in totals], parts, lengths) for totals, parts, lengths in map(_row, groups)]
    ranks = all_gather(rows)
    first = sum(len(rows_of_rank) for rows_of_rank in ranks[: process_index()])
    everyone = [row for rank in ranks for row in rank]
    if not everyone:
        return []
    table = _table(everyone, weights)
    advantages = ADVANTAGE_ESTIMATORS[estimator](table, scale_rewards)[first : first + len(groups)].tolist()
    return [
        dataclasses.replace(scored, advantages=tuple(of_group))
        for scored, of_group in zip(groups, advantages, strict=True)
    ]


def has_reward_variance(scored: ScoredGroup, weights: Sequence[float]) -> bool:
    """Whether two completions that the same functions applied to have different totals: another group teaches nothing.

    Args:
        scored: a group; its advantages do not matter.
        weights: of the reward functions.
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
