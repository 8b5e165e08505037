"""Places of the formulas that random numbers do not reach: ties, exact bounds, scales, single tokens, empty input."""

import math
from typing import Any

import pytest
import torch

from grpo_stage.algorithm import advantages, correction, exploration, losses, reward_table
from grpo_stage.algorithm.ratios import importance_ratios


NAN = math.nan


def f64(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def table(parts: Any, weights: Any) -> reward_table.RewardTable:
    """Lists for parts [P][G][F] and weights [F]."""
    parts, weights = f64(parts), f64(weights)
    totals = (parts * weights).nansum(dim=-1).masked_fill(parts.isnan().all(dim=-1), NAN)
    return reward_table.RewardTable(totals=totals, parts=parts, weights=weights, lengths=torch.ones(totals.shape))


def test_the_tolerance_of_rewards_is_1e_9() -> None:
    for difference, is_seen in ((0.9e-9, False), (1.1e-9, True)):
        assert reward_table.has_reward_variance(f64([[1.0, 1.0 + difference]])).tolist() == [is_seen]
        assert reward_table.has_reward_variance(f64([[-1.0 - difference, -1.0]])).tolist() == [is_seen]


def test_rewards_that_differ_by_rounding_have_one_advantage() -> None:
    for sign in (1, -1):
        (row,) = advantages.group_advantages(sign * f64([[0.3, 0.1 + 0.2, 1.0]])).tolist()
        assert row[0] == row[1]


def test_the_tolerance_is_relative_to_what_a_total_was_added_up_from() -> None:
    """Totals 0 and d, added up from 1 - 1: equal up to d = 2e-9 in any unit, whatever other groups hold."""
    for unit in (1.0, 1e-6, 1e6):
        for difference, is_seen in ((1.6e-9, False), (2.5e-9, True)):
            pair = [[1.0, -1.0], [1.0 + difference, -1.0]]
            assert reward_table.tells_apart(table([pair], [unit, unit])).tolist() == [is_seen]
            in_parts = [[[unit * part for part in row] for row in pair], [[1e12, 1e12], [1e12, 1e12]]]
            assert reward_table.tells_apart(table(in_parts, [1.0, 1.0])).tolist() == [is_seen, False]


def test_the_larger_of_two_neighbors_sets_their_tolerance() -> None:
    """In the middle, at the upper and at the lower end of a group's order."""
    rewards, difference = [0.0, 1.0, 1.0 + 1e-7], f64([[0.0, 1.0, 1.0]])
    for addends in ([1.0, 1e6, 1.0], [1.0, 1.0, 1e6]):
        assert torch.equal(reward_table.settled(f64([rewards]), f64([addends])), difference)
    assert reward_table.settled(f64([rewards]), f64([[1e6, 1.0, 1.0]])).tolist() == [rewards]


def test_each_prompt_is_told_apart_by_itself() -> None:
    """The second prompt's completions differ, but the functions that applied to them do as well."""
    parts = [[[0.0, 1.0], [1.0, 1.0]], [[0.0, NAN], [1.0, 1.0]], [[0.0, NAN], [1.0, NAN]]]
    assert reward_table.tells_apart(table(parts, [1.0, 1.0])).tolist() == [True, False, True]


def test_parts_that_cancel_are_nothing_in_any_unit() -> None:
    """Advantages of two functions that contradict each other but for a share d of them."""
    for unit in (1.0, 1e-12):
        for difference, is_seen in ((1.6e-9, False), (2.5e-9, True)):
            weights = f64([1.0, 1.0 + difference]) * unit
            rewards = f64([[[0.0, 1.0], [1.0, 0.0]]] + [[[0.0, 0.0], [1.0, 1.0]]] * 9)
            result = advantages.decoupled_advantages(rewards, weights)
            assert (result[0] != 0).tolist() == [is_seen, is_seen]
            assert (result[1:] != 0).all()


def test_a_token_of_a_sequence_has_its_own_gradient() -> None:
    """In `sequence_token` the loss of one token moves that token alone; in `sequence` all of its completion."""
    for level, expected in (("sequence_token", [1.0, 0.0]), ("sequence", [0.5, 0.5])):
        policy = f64([[-1.0, -1.0]]).requires_grad_()
        mask = torch.ones(1, 2, dtype=torch.float64)
        ratios = importance_ratios(policy, f64([[-1.0, -1.0]]), mask, level)
        (gradient,) = torch.autograd.grad(ratios[0, 0], policy)
        assert gradient[0].tolist() == expected


@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_the_ratio_of_a_completion_without_tokens_is_1(level: str) -> None:
    zero = torch.zeros(1, 1)
    assert importance_ratios(zero, zero, zero, level).tolist() == [[1.0]]


def test_a_ratio_at_a_bound_is_not_clipped() -> None:
    for advantage, ratio in ((1.0, 1.5), (-1.0, 0.5), (-1.0, 2.0)):
        ratios = f64([[ratio]])
        output = losses.clipped_surrogate(ratios.log(), f64([[0.0]]), f64([advantage]), 0.5, 0.5, delta=2.0)
        assert output.ratios.item() == ratio, "exactly"
        assert output.clipped_delta is not None
        assert not (output.clipped_low | output.clipped_high | output.clipped_delta).any()
    assert not losses.cispo_surrogate(f64([[1.5]]).log(), f64([[0.0]]), f64([1.0]), 0.5).clipped_high.any()
    for advantage, log_ratio in ((1.0, 0.5), (-1.0, -0.5)):
        output = losses.gmpo_surrogate(
            f64([[log_ratio]]), f64([[0.0]]), f64([advantage]), f64([[1.0]]), 0.5, 0.5
        )  # fmt: skip
        assert not (output.clipped_low | output.clipped_high).any()


def test_gmpo_says_which_bound_clips() -> None:
    for advantage, log_ratio, clipped in ((1.0, 0.6, (False, True)), (-1.0, -0.6, (True, False))):
        output = losses.gmpo_surrogate(f64([[log_ratio]]), f64([[0.0]]), f64([advantage]), f64([[1.0]]), 0.5, 0.5)
        assert (output.clipped_low.item(), output.clipped_high.item()) == clipped


def test_unknown_levels_and_modes_are_refused() -> None:
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="importance_sampling_level is 'tokens'"):
        importance_ratios(one, one, one, "tokens")
    with pytest.raises(ValueError, match="mode is 'masks'"):
        correction.correction_weights(one, one, one, level="token", mode="masks", lower=0.0, upper=2.0)


def test_a_weight_at_a_bound_is_kept() -> None:
    same, mask = torch.full((1, 2), -1.0), torch.ones(1, 2)
    for level in ("token", "sequence"):
        weights = correction.correction_weights(same, same, mask, level=level, mode="mask", lower=1.0, upper=1.0)
        assert weights.tolist() == [[1.0, 1.0]]


def test_the_drift_of_a_completion_is_its_mean_also_of_a_single_token() -> None:
    bad = torch.tensor([-1.0])
    for drift, kept in ((0.5, 1.0), (0.75, 0.0)):  # at the threshold, and over it
        policy, sampling = torch.tensor([[-drift, -9.0]]), torch.zeros(1, 2)
        assert correction.off_policy_mask(policy, sampling, bad, torch.tensor([[1.0, 0.0]]), 0.5).item() == kept


def test_covariances_at_the_bounds_are_candidates_and_of_equal_draws_the_higher_one_goes() -> None:
    covariances, draws = f64([0.5, 1.0, 2.0, 3.0]), torch.zeros(4)
    assert exploration.clip_cov_tokens(covariances, 1.0, 1.0, 2.0, draws).tolist() == [False, True, True, False]
    assert exploration.clip_cov_tokens(covariances, 0.25, 1.0, 2.0, draws).tolist() == [False, False, True, False]


def test_no_tokens_have_no_covariances() -> None:
    assert exploration.token_covariances(torch.zeros(0), torch.zeros(0)).tolist() == []
