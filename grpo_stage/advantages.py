"""Scored groups -> their advantages, with the statistics of a batch over all ranks of the generation."""

import dataclasses
import math
from collections.abc import Sequence

import torch

from .algorithm.advantages import ADVANTAGE_ESTIMATORS, RewardTable
from .distributed import all_gather, process_index
from .types import ScoredGroup


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
    totals = [[_number(total) - next(flat) for total in scored.total_rewards] for scored in groups]
    parts = [[[_number(reward) for reward in row] for row in scored.rewards] for scored in groups]
    lengths = [[len(completion.token_ids) for completion in scored.group.completions] for scored in groups]
    ranks = all_gather((totals, parts, lengths))
    first = sum(len(totals_of_rank) for totals_of_rank, *_ in ranks[: process_index()])
    everyone = [[group for rank in ranks for group in rank[column]] for column in range(3)]
    if not everyone[0]:
        return []
    table = RewardTable(
        totals=torch.tensor(everyone[0], dtype=torch.float64),
        parts=torch.tensor(everyone[1], dtype=torch.float64),
        weights=torch.tensor(weights, dtype=torch.float64),
        lengths=torch.tensor(everyone[2]),
    )
    advantages = ADVANTAGE_ESTIMATORS[estimator](table, scale_rewards)[first : first + len(groups)].tolist()
    return [
        dataclasses.replace(scored, advantages=tuple(of_group))
        for scored, of_group in zip(groups, advantages, strict=True)
    ]


def _number(reward: float | None) -> float:
    return math.nan if reward is None else reward
