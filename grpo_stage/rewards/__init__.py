"""Rewards: what a completion is worth. docs/rewards.md is the user's page."""

from grpo_stage.rewards.errors import RewardError, RewardTimeoutError
from grpo_stage.rewards.registry import BUILTIN_REWARDS, load_rewards
from grpo_stage.rewards.scoring import REWARD_MODEL, RewardSuite


__all__ = [
    "BUILTIN_REWARDS",
    "REWARD_MODEL",
    "RewardError",
    "RewardSuite",
    "RewardTimeoutError",
    "load_rewards",
]
