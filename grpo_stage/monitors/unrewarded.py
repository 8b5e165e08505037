"""Rollouts without any reward: nothing is learned from them, and a run of such does not end by itself for hours."""

import logging
from collections.abc import Sequence

from grpo_stage.distributed import all_gather
from grpo_stage.monitors.monitor import Monitor, MonitorRequest
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.rewards.errors import NO_REWARD_REMEDY, UnrewardedError
from grpo_stage.types import ScoredGroup


logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are

UNREWARDED_ROLLOUTS, UNREWARDED_PROMPTS = 10, 100
"""A run ends when no reward function applied in this many rollouts in a row, with at least this many prompts."""


class UnrewardedRollouts(Monitor):
    """Warns of a rollout without a reward, and ends the run when `limit` groups in a row have none.

    Args:
        reward_names: of the reward functions.
        limit: groups over all ranks.
        rank: this process.
    """

    def __init__(self, reward_names: Sequence[str], limit: int, rank: int) -> None:
        self._reward_names = reward_names
        self._limit = limit
        self._rank = rank
        self._num_unrewarded = 0  # groups without a reward in a row, over all ranks

    @classmethod
    def of(cls, request: MonitorRequest) -> "UnrewardedRollouts":
        limit = max(UNREWARDED_PROMPTS, UNREWARDED_ROLLOUTS * request.prompts_per_rollout)
        return cls(request.reward_names, limit, request.rank)

    def after_scoring(self, groups: Sequence[ScoredGroup], version: int, metrics: MetricTracker) -> None:
        ranks = all_gather((sum(each.has_reward for each in groups), len(groups)))
        num_rewarded, num_groups = (sum(column) for column in zip(*ranks, strict=True))
        self._num_unrewarded = 0 if num_rewarded > 0 else self._num_unrewarded + num_groups
        problem = (
            f"No reward function applied to any completion ({', '.join(self._reward_names)} all returned None) of "
            f"the {num_groups} prompts that were sampled for step {version + 1}"
        )
        if self._num_unrewarded >= self._limit:
            raise UnrewardedError(
                f"{problem}, nor of the {self._num_unrewarded - num_groups} before them, so that nothing is learned: "
                f"the run is stopped. {NO_REWARD_REMEDY}"
            )
        if num_rewarded == 0 < num_groups and self._rank == 0:
            logger.warning(f"{problem}: nothing is learned from them.")

    def state_dict(self) -> int:
        return self._num_unrewarded

    def load_state_dict(self, state: int) -> None:
        self._num_unrewarded = state
