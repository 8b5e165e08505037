"""What is logged of a rollout, by hand."""

import math
from collections.abc import Sequence
from types import ModuleType
from unittest.mock import patch

import pytest

from grpo_stage.records import metrics
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup, ScoredGroup


def scored(rewards: list[list[float | None]], totals: list[float | None]) -> ScoredGroup:
    completion = Completion(
        token_ids=(1, 2), sampling_logprobs=(0.0, 0.0), finish_reason=FinishReason.STOP, text="x"
    )  # fmt: skip
    prompt = Prompt(index=0, token_ids=(1,), messages=(), reference=None)
    return ScoredGroup(
        group=RolloutGroup(prompt=prompt, completions=(completion,) * len(rewards), policy_version=0),
        rewards=tuple(tuple(row) for row in rewards),
        total_rewards=tuple(totals),
    )


# Two functions, weights 1 and 2; the last group has no reward.
GROUPS = [
    scored([[1.0, 0.0], [0.0, 1.0], [0.0, None]], [1.0, 2.0, 0.0]),
    scored([[1.0, 0.5], [1.0, 0.5], [None, None]], [2.0, 2.0, None]),
    scored([[None, None], [None, None], [None, None]], [None, None, None]),
]


def recorded(
    module: ModuleType, groups: list[ScoredGroup], others: list[ScoredGroup], weights: Sequence[float] = (1.0, 2.0)
) -> dict[str, float]:
    """Of a rank with `groups` beside one with `others`."""
    tracker = module.MetricTracker()
    rows = [row for group in others for row in group.rewards]
    with patch.object(module, "all_gather", lambda value: [value, rows]):
        module.record_rollout(tracker, groups, ("a", "b"), weights)
    return tracker.take()


def check_rollout(module: ModuleType) -> None:
    """`module` is `grpo_stage.records.metrics`."""
    logged = recorded(module, GROUPS, [])
    # Group 1: totals 1, 2, 0, mean 1, sample variance (0 + 1 + 1) / 2. Group 2: 0. The third has no totals.
    assert logged["reward"] == pytest.approx(7 / 5)
    assert logged["reward_std"] == pytest.approx((1.0 + 0.0) / 2)
    # In the first, two completions that both functions applied to differ.
    assert logged["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert logged["frac_reward_none"] == pytest.approx(1 / 3)
    assert logged["rewards/a/mean"] == pytest.approx(3 / 5)
    assert logged["rewards/b/mean"] == pytest.approx(2 / 4)
    # TRL's: over all completions that the function applied to, whatever their group.
    # a: 1, 0, 0, 1, 1, mean 3/5, squares 3 * 0.16 + 2 * 0.36 = 1.2, over 4. b: 0, 1, 1/2, 1/2: 1/2 over 3.
    assert logged["rewards/a/std"] == pytest.approx(math.sqrt(1.2 / 4))
    assert logged["rewards/b/std"] == pytest.approx(math.sqrt(0.5 / 3))
    assert logged["rewards/a/frac_not_applicable"] == pytest.approx(4 / 9)
    assert logged["rewards/b/frac_not_applicable"] == pytest.approx(5 / 9)
    # Shared by two ranks, or all of another's: the same deviation, which every rank adds once.
    for first in range(4):
        shared = recorded(module, GROUPS[:first], GROUPS[first:])
        assert shared.get("rewards/a/std") == pytest.approx(logged["rewards/a/std"])
    # A function of weight 0 keeps nobody apart.
    unequal = [scored([[1.0, 0.0], [0.0, None]], [1.0, 0.0])]
    assert recorded(module, unequal, [])["frac_reward_zero_std"] == 1
    assert recorded(module, unequal, [], weights=(1.0, 0.0))["frac_reward_zero_std"] == 0
    nothing = recorded(module, GROUPS[2:], [])
    assert not {"reward", "reward_std", "rewards/a/mean", "rewards/a/std"} & nothing.keys()
    assert nothing["frac_reward_none"] == 1


def test_a_rollout_is_logged_as_written() -> None:
    check_rollout(metrics)
