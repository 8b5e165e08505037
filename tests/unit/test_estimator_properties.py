"""What must hold of every `advantage_estimator` for any rewards."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_stage.algorithm.advantages import ADVANTAGE_ESTIMATORS
from grpo_stage.algorithm.catalog import ESTIMATORS
from grpo_stage.algorithm.reward_table import RewardTable


ROWS = [(name, scale) for name in ADVANTAGE_ESTIMATORS for scale in ESTIMATORS[name].scales]
EIGHTHS = st.integers(-80, 80).map(lambda n: n / 8)  # sums and differences are exact
reproducibly = settings(max_examples=25, deadline=None, derandomize=True)
NOT_CENTERED = ("passk", "opo", "remax", "optimal_token_baseline")
any_row = pytest.mark.parametrize(("estimator", "scale"), ROWS)


def table(parts: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor) -> RewardTable:
    """The greedy completion has the rewards of its group's first one; energies differ from token to token."""
    applies = ~parts.isnan()
    totals = (parts.nan_to_num(nan=0.0) * weights).sum(-1).masked_fill(~applies.any(-1), math.nan)
    positions = torch.arange(1, int(lengths.max()) + 6)
    return RewardTable(
        totals=totals,
        parts=parts,
        weights=weights,
        lengths=lengths,
        greedy_parts=parts[:, 0].clone(),
        energies=((lengths.unsqueeze(-1) * positions) % 7).to(parts.dtype) / 4,
    )


@st.composite
def tables(draw: Any, with_nan: bool = True) -> RewardTable:
    num_prompts, num_generations, num_functions = (draw(st.integers(*r)) for r in ((1, 4), (2, 6), (1, 3)))
    value = st.one_of(EIGHTHS, st.just(math.nan)) if with_nan else EIGHTHS
    count = num_prompts * num_generations
    rewards = draw(st.lists(value, min_size=count * num_functions, max_size=count * num_functions))
    lengths = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    return table(
        torch.tensor(rewards, dtype=torch.float64).view(num_prompts, num_generations, num_functions),
        torch.tensor(lengths).view(num_prompts, num_generations),
        torch.tensor(
            draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=num_functions, max_size=num_functions))
        ).double(),
    )


def advantages(estimator: str, scale: str, rewards: RewardTable) -> torch.Tensor:
    return ADVANTAGE_ESTIMATORS[estimator](rewards, scale)


@any_row
@reproducibly
@given(rewards=tables(), shift=EIGHTHS)
def test_a_shift_of_all_rewards_changes_nothing(
    estimator: str, scale: str, rewards: RewardTable, shift: float
) -> None:
    # A completion that fewer functions apply to would be shifted by less: each total is shifted by the same instead.
    shifted = replace(rewards, totals=rewards.totals + shift, parts=rewards.parts + shift)
    if estimator == "remax":  # a greedy completion's total is that of its parts
        shifted = table(rewards.parts + shift, rewards.lengths, rewards.weights)
    torch.testing.assert_close(
        advantages(estimator, scale, shifted), advantages(estimator, scale, rewards), rtol=1e-9, atol=1e-9
    )


@any_row
@reproducibly
@given(rewards=tables(), factor=st.floats(0.5, 50.0))
def test_the_unit_of_the_reward(estimator: str, scale: str, rewards: RewardTable, factor: float) -> None:
    """Undivided advantages have it, divided ones do not, but for the constant beside a deviation of 0.01 or more."""
    if estimator == "gdpo":  # of several functions that cancel the constants alone would be left, and be whitened
        rewards = table(rewards.parts[..., :1], rewards.lengths, rewards.weights[:1])
    scaled = table(rewards.parts * factor, rewards.lengths, rewards.weights)
    plain = advantages(estimator, scale, rewards)
    expected = plain * factor if scale == "none" else plain
    tolerance = 1e-9 if scale == "none" else 0.05
    torch.testing.assert_close(advantages(estimator, scale, scaled), expected, rtol=tolerance, atol=1e-8)


@any_row
@reproducibly
@given(rewards=tables(), seed=st.integers(0, 2**31 - 1))
def test_advantages_follow_their_completions(estimator: str, scale: str, rewards: RewardTable, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts, own = torch.tensor(rng.permutation(len(rewards.totals))), rewards.totals.size(1)
    order = torch.tensor(rng.permutation(own))
    assert rewards.greedy_parts is not None
    assert rewards.energies is not None
    moved = RewardTable(
        totals=rewards.totals[prompts][:, order],
        parts=rewards.parts[prompts][:, order],
        weights=rewards.weights,
        lengths=rewards.lengths[prompts][:, order],
        greedy_parts=rewards.greedy_parts[prompts],
        energies=rewards.energies[prompts][:, order],
    )
    torch.testing.assert_close(
        advantages(estimator, scale, moved),
        advantages(estimator, scale, rewards)[prompts][:, order],
        rtol=1e-9,
        atol=1e-9,
    )


@any_row
@reproducibly
@given(
    value=st.one_of(st.sampled_from((0.1, 1 / 3, 16777217.0)), st.floats(-1e6, 1e6)),
    size=st.integers(2, 17),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    with_nan=st.booleans(),
)
def test_equal_rewards_teach_exactly_nothing(
    estimator: str, scale: str, value: float, size: int, dtype: torch.dtype, with_nan: bool
) -> None:
    parts = torch.full((2, size, 2), value, dtype=dtype)
    if with_nan:
        parts[0, size // 2] = math.nan
    lengths = torch.arange(1, 2 * size + 1).view(2, size)
    equal = table(parts, lengths, torch.ones(2, dtype=dtype))
    result = advantages(estimator, scale, equal)
    assert torch.equal(result, torch.zeros_like(result))
    assert result.dtype == dtype
    if estimator != "reinforce_plus_plus":  # which has no groups
        parts[1, 0] += abs(value) + 1.0
        result = advantages(estimator, scale, table(parts, lengths, torch.ones(2, dtype=dtype)))
        assert (result[0] == 0).all(), "the other group must not leak into this one"
        assert (result[1] != 0).any()


@any_row
@reproducibly
@given(rewards=tables())
def test_what_does_not_apply_has_no_advantage_and_no_say(estimator: str, scale: str, rewards: RewardTable) -> None:
    result = advantages(estimator, scale, rewards)
    assert torch.isfinite(result).all()
    absent = rewards.totals.isnan()
    assert (result[absent] == 0).all()
    longer = replace(rewards, lengths=torch.where(absent, rewards.lengths + 5, rewards.lengths))
    torch.testing.assert_close(advantages(estimator, scale, longer), result)


@pytest.mark.parametrize(("estimator", "scale"), [row for row in ROWS if row[0] not in NOT_CENTERED])
@reproducibly
@given(rewards=tables())
def test_they_sum_to_zero(estimator: str, scale: str, rewards: RewardTable) -> None:
    """In each group, and for what has no groups in the batch."""
    result = advantages(estimator, scale, rewards)
    sums = result.sum() if estimator == "reinforce_plus_plus" else result.sum(dim=1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-8)


@reproducibly
@given(rewards=tables())
def test_opo_sums_to_zero_by_length(rewards: RewardTable) -> None:
    result = advantages("opo", "none", rewards)
    sums = (result * rewards.lengths).sum(dim=1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-8)


@reproducibly
@given(rewards=tables(with_nan=False))
def test_rloo_is_unbiased_where_grpo_is_shrunk(rewards: RewardTable) -> None:
    size = rewards.totals.size(1)
    torch.testing.assert_close(
        advantages("rloo", "none", rewards), advantages("grpo", "none", rewards) * size / (size - 1)
    )
