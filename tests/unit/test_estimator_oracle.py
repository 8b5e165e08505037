"""ReMax, the optimal token baseline, and the range of a group's rewards, as loops over numbers.

As in test_algorithm_oracle.py: the oracle shares no code with the package.

    ReMax  arXiv:2310.10505 (the reward of a greedy completion)    OTB  arXiv:2602.07078 (a baseline for each token)
"""

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from grpo_stage.algorithm import advantages, reward_table


NAN = math.nan


def f64(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def table(parts: Any, weights: list[float], **more: Any) -> Any:
    """`parts` [P, G, F]; totals are sums over the functions that apply."""
    parts = f64(parts)
    applies = ~parts.isnan() & (f64(weights) != 0)
    totals = torch.where(applies, parts * f64(weights), 0.0).sum(-1).masked_fill(~applies.any(-1), NAN)
    lengths = more.pop("lengths", torch.ones(parts.shape[:2], dtype=torch.long))
    return reward_table.RewardTable(totals=totals, parts=parts, weights=f64(weights), lengths=lengths, **more)


def applied(row: list[float], weights: list[float]) -> tuple[int, ...]:
    return tuple(f for f, w in enumerate(weights) if w != 0 and not math.isnan(row[f]))


def total(row: list[float], weights: list[float]) -> float:
    return math.fsum(weights[f] * row[f] for f in applied(row, weights))


def random_parts(rng: np.random.Generator) -> tuple[Any, list[float]]:
    shape = int(rng.integers(1, 4)), int(rng.integers(2, 6)), int(rng.integers(1, 3))
    parts = rng.integers(-1, 2, shape) / 2
    parts[rng.random(shape) < 0.2] = NAN
    return parts, [1.0, *rng.choice([0.0, 0.5, -2.0], shape[2] - 1).tolist()]


# ReMax


def check_remax(module: ModuleType) -> None:
    """`module` is `grpo_stage.algorithm.advantages` or a mutant of it."""
    rng = np.random.default_rng(1)
    for _ in range(40):
        parts, weights = random_parts(rng)
        greedy = rng.integers(-1, 2, (len(parts), parts.shape[2])) / 2
        greedy[rng.random(greedy.shape) < 0.2] = NAN
        expected = [
            [
                total(row, weights) - total(own, weights)
                if applied(row, weights) and applied(row, weights) == applied(own, weights)
                else 0.0
                for row in group
            ]
            for group, own in zip(parts.tolist(), greedy.tolist(), strict=True)
        ]
        actual = module.ADVANTAGE_ESTIMATORS["remax"](table(parts, weights, greedy_parts=f64(greedy)), "none")
        torch.testing.assert_close(actual, f64(expected), rtol=1e-12, atol=1e-14)


def test_remax_is_the_papers() -> None:
    check_remax(advantages)


def test_remax_by_hand() -> None:
    actual = advantages.remax_advantages(f64([[1.0, 0.0, NAN, 0.5], [1.0, 1.0, 1.0, 1.0]]), f64([0.5, 0.0]))
    assert actual.tolist() == [[0.5, -0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]


def test_remax_of_a_greedy_completion_that_no_function_applies_to() -> None:
    assert advantages.remax_advantages(f64([[1.0, 0.0]]), f64([NAN])).tolist() == [[0.0, 0.0]]


def test_remax_takes_a_single_completion() -> None:
    assert advantages.remax_advantages(f64([[1.0], [0.25]]), f64([0.5, 0.5])).tolist() == [[0.5], [-0.25]]


def test_remax_of_a_reward_that_rounding_alone_tells_from_the_greedy_one_is_zero() -> None:
    assert advantages.remax_advantages(f64([[0.1 + 0.2, 1.0]]), f64([0.3]))[0, 0] == 0
    # One sum by two ways, in which the weighted rewards stand: .3 beside .1 + .2.
    rewards = table([[[1, 0, 0], [0, 1, 1]]], [0.3, 0.1, 0.2], greedy_parts=f64([[1, 0, 0]]))
    assert advantages.ADVANTAGE_ESTIMATORS["remax"](rewards, "none").tolist() == [[0.0, 0.0]]


def test_remax_does_not_change_with_a_shift_of_all_rewards() -> None:
    rng = np.random.default_rng(2)
    rewards, greedy = f64(rng.integers(-8, 8, (3, 4)) / 8), f64(rng.integers(-8, 8, 3) / 8)
    plain = advantages.remax_advantages(rewards, greedy)
    assert torch.equal(advantages.remax_advantages(rewards + 5, greedy + 5), plain)


@pytest.mark.parametrize(("rewards", "greedy"), [((2, 3), (3,)), ((2, 3), (2, 1)), ((2,), (2,)), ((2, 0), (2,))])
def test_malformed_inputs_of_remax_are_refused(rewards: tuple[int, ...], greedy: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="greedy"):
        advantages.remax_advantages(torch.zeros(rewards), torch.zeros(greedy))


def test_remax_without_a_greedy_completion_is_refused() -> None:
    with pytest.raises(ValueError, match="greedy"):
        advantages.ADVANTAGE_ESTIMATORS["remax"](table([[[1.0], [0.0]]], [1.0]), "none")


# The optimal token baseline


def oracle_token_advantages(rewards: list[float], energies: list[list[float]]) -> list[list[float]]:
    """Of one group; `energies` of each completion's tokens, without padding; nothing in it is padded or masked."""
    scored = [i for i, r in enumerate(rewards) if not math.isnan(r)]
    result = [[0.0] * len(e) for e in energies]
    if len({rewards[i] for i in scored}) < 2:
        return result
    baseline, baselines = NAN, []
    for t in range(max(map(len, energies))):
        there = [i for i in scored if len(energies[i]) > t]
        if len(there) >= 2:  # one alone has nothing to be compared with: the baseline stays
            spent = [math.fsum(e + 1e-8 for e in energies[i][: t + 1]) for i in there]
            baseline = math.fsum(w * rewards[i] for w, i in zip(spent, there, strict=True)) / math.fsum(spent)
        baselines.append(baseline)
    for i in scored:
        result[i] = [rewards[i] - baselines[t] for t in range(len(energies[i]))]
    return result


def padded(rows: list[list[float]], width: int, rng: np.random.Generator) -> torch.Tensor:
    return f64([row + rng.uniform(0, 9, width - len(row)).tolist() for row in rows])


def check_token_baseline(module: ModuleType) -> None:
    """`module` is `grpo_stage.algorithm.advantages` or a mutant of it."""
    rng = np.random.default_rng(4)
    for _ in range(40):
        parts, weights = random_parts(rng)
        num_prompts, num_generations = parts.shape[:2]
        lengths = rng.integers(1, 7, (num_prompts, num_generations))
        energies = [[rng.uniform(0, 2, n).tolist() for n in group] for group in lengths]
        expected: list[Any] = []
        for group, own in zip(parts.tolist(), energies, strict=True):
            merged = [[0.0] * len(e) for e in own]
            for functions in {applied(row, weights) for row in group} - {()}:
                rewards = [total(row, weights) if applied(row, weights) == functions else NAN for row in group]
                # The others are not there at all.
                theirs = [e if not math.isnan(r) else [] for r, e in zip(rewards, own, strict=True)]
                for i, row in enumerate(oracle_token_advantages(rewards, theirs)):
                    merged[i] = row if row else merged[i]
            expected.append(merged)
        width = int(lengths.max()) + 1
        given = torch.stack([padded(group, width, rng) for group in energies])
        rewards_table = table(parts, weights, lengths=torch.tensor(lengths), energies=given)
        actual = module.ADVANTAGE_ESTIMATORS["optimal_token_baseline"](rewards_table, "none")
        for p in range(num_prompts):
            for i in range(num_generations):
                n = lengths[p][i]
                assert actual[p, i, :n].tolist() == pytest.approx(expected[p][i], rel=1e-10, abs=1e-12)
                assert (actual[p, i, n:] == 0).all()


def test_the_optimal_token_baseline_is_the_papers() -> None:
    check_token_baseline(advantages)


def test_the_optimal_token_baseline_by_hand() -> None:
    # Energies 1 and 3 at the first token: (1 x 1 + 3 x 0) / 4. Summed up to the second: 1 + 2 and 3 + 0, so 3 / 6.
    # The third token is the first completion's alone, for which the baseline stays.
    energies = f64([[[1.0, 2.0, 5.0], [3.0, 0.0, 7.0]]])
    actual = advantages.optimal_token_advantages(f64([[1.0, 0.0]]), energies, torch.tensor([[3, 2]]))
    assert actual[0, 0].tolist() == pytest.approx([0.75, 0.5, 0.5], rel=1e-7)
    assert actual[0, 1].tolist() == pytest.approx([-0.25, -0.5, 0.0], rel=1e-7)


def test_equal_energies_make_it_the_groups_mean() -> None:
    rng = np.random.default_rng(3)
    rewards = f64(rng.integers(0, 3, (4, 5)) / 2)
    lengths = torch.full((4, 5), 6)
    for energy in (0.0, 0.7):  # also of a policy that is certain of each token
        actual = advantages.optimal_token_advantages(rewards, torch.full((4, 5, 6), energy).double(), lengths)
        expected = advantages.group_advantages(rewards, "none").unsqueeze(-1).expand(4, 5, 6)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_equal_rewards_have_token_advantages_of_exactly_zero() -> None:
    rng = np.random.default_rng(5)
    energies, lengths = f64(rng.uniform(0, 2, (2, 4, 6))), torch.tensor(rng.integers(1, 7, (2, 4)))
    for value in (0.1, 1 / 3, 1e6 + 0.1):
        assert (advantages.optimal_token_advantages(torch.full((2, 4), value), energies, lengths) == 0).all()
    only = f64([[0.5, NAN, NAN, NAN], [NAN] * 4])
    assert (advantages.optimal_token_advantages(only, energies, lengths) == 0).all()


def test_a_shift_of_all_rewards_does_not_change_token_advantages() -> None:
    rng = np.random.default_rng(6)
    energies, lengths = f64(rng.uniform(0, 2, (3, 4, 6))), torch.tensor(rng.integers(1, 7, (3, 4)))
    rewards = f64(rng.integers(-8, 8, (3, 4)) / 8)
    plain = advantages.optimal_token_advantages(rewards, energies, lengths)
    torch.testing.assert_close(
        advantages.optimal_token_advantages(rewards + 3, energies, lengths), plain, rtol=1e-9, atol=1e-12
    )
    assert plain.abs().max() > 0.1


def test_the_energy_is_the_squared_gradient_by_the_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 3, 6, 2, 2])
    logprobs = logits.log_softmax(-1)[torch.arange(5), tokens]
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    probabilities = logits.softmax(-1)
    actual = advantages.gradient_energies(logprobs.detach(), probabilities.square().sum(-1).detach())
    torch.testing.assert_close(actual, gradient.square().sum(-1))
    # A certain token has none, which rounding does not make negative.
    one = torch.tensor([0.0, -1e-9])
    assert (advantages.gradient_energies(one, torch.tensor([1.0 - 1e-7, 1.0])) >= 0).all()


def test_malformed_inputs_of_the_token_baseline_are_refused() -> None:
    with pytest.raises(ValueError, match="energies"):
        advantages.optimal_token_advantages(torch.zeros(1, 2), torch.zeros(1, 3, 4), torch.ones(1, 2))
    with pytest.raises(ValueError, match="energies"):
        advantages.ADVANTAGE_ESTIMATORS["optimal_token_baseline"](table([[[1.0], [0.0]]], [1.0]), "none")


# The range


def oracle_range(group: list[list[float]], weights: list[float], function: int | None) -> float:
    if function is not None:
        values = [row[function] for row in group if not math.isnan(row[function])]
        return max(values) - min(values) if values else 0.0
    best = 0.0
    for functions in {applied(row, weights) for row in group} - {()}:
        values = [total(row, weights) for row in group if applied(row, weights) == functions]
        best = max(best, max(values) - min(values))
    return best


def check_ranges() -> None:
    """`module` is `grpo_stage.algorithm.advantages` or a mutant of it."""
    rng = np.random.default_rng(8)
    seen = set()
    for _ in range(60):
        parts, weights = random_parts(rng)
        rewards = table(parts, weights)
        for function in (None, *range(len(weights))):
            for bound in (0.0, 0.3, 0.5, 0.9):
                expected = [oracle_range(group, weights, function) > bound for group in parts.tolist()]
                assert reward_table.tells_apart(rewards, function, bound).tolist() == expected
                seen |= {(function is None, bound, each) for each in expected}
        assert torch.equal(reward_table.tells_apart(rewards), reward_table.tells_apart(rewards, None, 0.0))
    assert len(seen) == 16, "each bound must keep some groups and leave out others"


def test_a_group_is_kept_by_the_range_of_its_rewards() -> None:
    check_ranges()


def test_a_range_of_exactly_the_bound_is_not_above_it() -> None:
    rewards = table([[[1.0], [0.5]], [[1.0], [0.5 - 1e-6]]], [1.0])
    assert reward_table.tells_apart(rewards, None, 0.5).tolist() == [False, True]
    # Nor is one that is above it by rounding alone: .3 - .1 is 0.19999999999999998, and .8 - .6 0.20000000000000007.
    rounded = table([[[0.3], [0.1]], [[0.8], [0.6]]], [1.0])
    assert reward_table.tells_apart(rounded, None, 0.2).tolist() == [False, False]


def test_one_function_decides_where_it_is_chosen() -> None:
    # First accuracy is the same and a shaping reward is not; then both differ and the total does not.
    rewards = table([[[1.0, 0.0], [1.0, 0.2]], [[1.0, 0.0], [0.0, 1.0]]], [1.0, 1.0])
    assert reward_table.tells_apart(rewards).tolist() == [True, False]
    assert reward_table.tells_apart(rewards, 0).tolist() == [False, True]
    assert reward_table.tells_apart(rewards, 1).tolist() == [True, True]
    assert reward_table.tells_apart(rewards, 1, 0.2).tolist() == [False, True]
