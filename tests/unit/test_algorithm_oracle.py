"""The papers' formulas as loops over numbers, and what the package makes of the same numbers.

Nothing here shares code with `grpo_stage.algorithm`: the oracle knows no tensors, no padding and no masks, only
completions of different lengths.

    DeepSeekMath  arXiv:2402.03300, equation 3 (objective), equation 4 (k3)
    DAPO          arXiv:2503.14476, equation 8 (mean over tokens), two clip bounds
    Dr. GRPO      arXiv:2503.20783 (a constant denominator, advantages without division)
"""

import itertools
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch

from grpo_stage.algorithm import advantages, averages, kl, losses, reward_table


NAN = math.nan
LOSS_TYPES = ("grpo", "dapo", "dr_grpo")
Scale = Literal["group", "batch", "none"]
SCALES: tuple[Scale, ...] = ("group", "batch", "none")
STD_EPS = 1e-4  # TRL's constant; verl has 1e-6


# The oracle


def sample_std(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def oracle_advantages(rewards: list[list[float]], scale: Scale) -> list[list[float]]:
    given = [r for group in rewards for r in group if not math.isnan(r)]
    result = []
    for group in rewards:
        scored = [r for r in group if not math.isnan(r)]
        if len(set(scored)) < 2:
            result.append([0.0] * len(group))
            continue
        mean = math.fsum(scored) / len(scored)
        divisor = {"group": sample_std(scored) + STD_EPS, "batch": sample_std(given) + STD_EPS, "none": 1.0}[scale]
        result.append([0.0 if math.isnan(r) else (r - mean) / divisor for r in group])
    return result


def oracle_k3(policy: float, ref: float) -> float:
    return math.exp(ref) / math.exp(policy) - math.log(math.exp(ref) / math.exp(policy)) - 1.0


@dataclass
class OracleCompletion:
    """One completion: log-probabilities of its tokens, no padding."""

    policy: list[float]
    old: list[float]
    ref: list[float]
    advantage: float
    used: bool = True
    """False: truncated and masked, in no sum and in no denominator but the constant of Dr. GRPO."""


@dataclass
class OracleStep:
    """The loss of a whole optimizer step, its gradient by hand, and the number of tokens clipped on each side."""

    loss: float
    gradient: list[list[float]]
    clipped_low: int
    clipped_high: int


def oracle_step(
    completions: list[OracleCompletion], loss_type: str, beta: float, low: float, high: float, max_length: int
) -> OracleStep:
    """Minus the objective of the papers, over the completions of a step."""
    used = [c for c in completions if c.used]
    step = OracleStep(0.0, [[0.0] * len(c.policy) for c in completions], 0, 0)
    for row, c in enumerate(completions):
        if not c.used:
            continue
        for t in range(len(c.policy)):
            ratio = math.exp(c.policy[t]) / math.exp(c.old[t])
            clipped = min(max(ratio, 1.0 - low), 1.0 + high)
            objective = min(ratio * c.advantage, clipped * c.advantage) - beta * oracle_k3(c.policy[t], c.ref[t])
            too_high = c.advantage > 0 and ratio > 1.0 + high
            too_low = c.advantage < 0 and ratio < 1.0 - low
            slope = 0.0 if too_high or too_low else ratio * c.advantage
            slope -= beta * (1.0 - math.exp(c.ref[t]) / math.exp(c.policy[t]))
            denominator = {
                "grpo": len(used) * len(c.policy),
                "dapo": sum(len(other.policy) for other in used),
                "dr_grpo": len(completions) * max_length,
            }[loss_type]
            step.loss -= objective / denominator
            step.gradient[row][t] -= slope / denominator
            step.clipped_low += too_low
            step.clipped_high += too_high
    return step


# The package on the same numbers


def padded(rows: list[list[float]], width: int, filler: np.random.Generator) -> torch.Tensor:
    """Right-padded with rubbish: nothing may depend on what stands there."""
    return torch.tensor(
        [row + filler.normal(-2.0, 1.0, width - len(row)).tolist() for row in rows], dtype=torch.float64
    )


def package_step(
    module: ModuleType,
    k3: Any,
    completions: list[OracleCompletion],
    loss_type: str,
    beta: float,
    low: float,
    high: float,
    max_length: int,
    micro_batches: list[list[int]],
) -> OracleStep:
    """What the trainer does: `micro_batches` lists the rows of each, and each is padded to its own width."""
    filler = np.random.default_rng(7)
    used = [c for c in completions if c.used]
    totals = averages.StepTotals(
        num_completions=len(used),
        num_tokens=sum(len(c.policy) for c in used),
        max_completion_length=max_length,
        num_left_out=len(completions) - len(used),
    )
    step = OracleStep(0.0, [[] for _ in completions], 0, 0)
    for rows in micro_batches:
        batch = [completions[row] for row in rows]
        width = max(len(c.policy) for c in batch) + 1
        mask = torch.tensor([[float(c.used and t < len(c.policy)) for t in range(width)] for c in batch]).double()
        policy = padded([c.policy for c in batch], width, filler).requires_grad_()
        old = padded([c.old for c in batch], width, filler)
        ref = padded([c.ref for c in batch], width, filler)
        advantage = torch.tensor([c.advantage for c in batch], dtype=torch.float64)
        surrogate = module.clipped_surrogate(policy, old, advantage, low, high)
        weights = averages.token_weights(mask, totals, loss_type)
        loss = (weights * (surrogate.token_losses + beta * k3(policy, ref))).sum()
        (gradient,) = torch.autograd.grad(loss, policy)
        assert surrogate.ratios.shape == surrogate.token_losses.shape == mask.shape
        torch.testing.assert_close(surrogate.ratios, (policy - old).exp())
        assert (gradient[mask == 0] == 0).all()
        step.loss += loss.item()
        step.clipped_low += int((surrogate.clipped_low & (mask > 0)).sum())
        step.clipped_high += int((surrogate.clipped_high & (mask > 0)).sum())
        for row, values in zip(rows, gradient.tolist(), strict=True):
            step.gradient[row] = values[: len(completions[row].policy)]
    return step


def random_rewards(rng: np.random.Generator, num_prompts: int, num_generations: int) -> list[list[float]]:
    """Rewards on a coarse grid, so that groups with equal rewards occur; some are not applicable."""
    rewards = rng.integers(-2, 3, (num_prompts, num_generations)) / 2 + rng.choice([0.0, 0.1])
    rewards[rng.random(rewards.shape) < 0.15] = NAN
    return rewards.tolist()


def random_completions(rng: np.random.Generator, rewards: list[list[float]], scale: Scale) -> list[OracleCompletion]:
    """Ragged completions off-policy enough to reach both clip bounds, a quarter of them masked."""
    completions = []
    for advantage in itertools.chain.from_iterable(oracle_advantages(rewards, scale)):
        length = int(rng.integers(1, 8))
        old = rng.normal(-1.5, 0.7, length)
        completions.append(
            OracleCompletion(
                policy=(old + rng.normal(0.0, 0.4, length)).tolist(),
                old=old.tolist(),
                ref=(old + rng.normal(0.0, 0.6, length)).tolist(),
                advantage=advantage,
                used=bool(rng.random() > 0.25),
            )
        )
    completions[0].used = True
    return completions


def check_advantages(module: ModuleType) -> None:
    """`module` is `grpo_stage.algorithm.advantages`."""
    rng = np.random.default_rng(0)
    for _, scale in itertools.product(range(25), SCALES):
        rewards = random_rewards(rng, num_prompts=int(rng.integers(1, 5)), num_generations=int(rng.integers(2, 7)))
        actual = module.group_advantages(torch.tensor(rewards, dtype=torch.float64), scale)
        expected = torch.tensor(oracle_advantages(rewards, scale), dtype=torch.float64)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
        variance = reward_table.has_reward_variance(torch.tensor(rewards, dtype=torch.float64)).tolist()
        assert variance == [len({r for r in group if not math.isnan(r)}) > 1 for group in rewards]
    # Means that round: a rest of 1e-17 divided by a deviation of 0 plus 1e-4 would pass for an advantage.
    for value, size, scale in itertools.product((0.1, 1 / 3, 0.7, 1e6 + 0.1), (3, 6, 7), SCALES):
        equal = torch.full((1, size), value)
        assert (module.group_advantages(equal, scale) == 0).all()
        assert not reward_table.has_reward_variance(equal).any()
    # Sums that round: .3 beside .1 + .2, in the first place and the last, beside what does not apply.
    for row, scale in itertools.product(
        ([0.3, 0.1 + 0.2, 0.3], [0.1 + 0.2, NAN, 0.3], [0.3e6, 0.3e6, 0.1e6 + 0.2e6]), SCALES
    ):
        rounded = torch.tensor([row], dtype=torch.float64)
        assert (module.group_advantages(rounded, scale) == 0).all()
        assert not reward_table.has_reward_variance(rounded).any()
    # Small differences are differences, at any scale.
    for unit in (1e-300, 1e-12, 1e-6, 1.0, 1e9):
        differ = torch.tensor([[unit, unit * (1 + 1e-7)], [0.0, unit * 1e-7]], dtype=torch.float64)
        assert reward_table.has_reward_variance(differ).all()
        assert (module.group_advantages(differ, "none") != 0).all()


def check_kl(module: ModuleType) -> None:
    """`module` is `grpo_stage.algorithm.kl`."""
    rng = np.random.default_rng(1)
    policy, ref = rng.normal(-2.0, 1.0, (2, 5, 6))
    expected = [[oracle_k3(p, r) for p, r in zip(*rows, strict=True)] for rows in zip(policy, ref, strict=True)]
    x = torch.tensor(policy).requires_grad_()
    actual = module.k3(x, torch.tensor(ref))
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-13)
    assert actual.requires_grad
    (gradient,) = torch.autograd.grad(actual.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor(1.0 - np.exp(ref - policy)), rtol=1e-11, atol=1e-13)


def check_losses(module: ModuleType) -> None:
    """`module` is `grpo_stage.algorithm.losses`."""
    rng = np.random.default_rng(2)
    clipped_low = clipped_high = 0
    for loss_type, scale, beta in itertools.product(LOSS_TYPES, SCALES, (0.0, 0.04)):
        rewards = random_rewards(rng, num_prompts=3, num_generations=4)
        completions = random_completions(rng, rewards, scale)
        low, high = (0.2, 0.28) if rng.random() < 0.7 else (0.2, 0.2)
        expected = oracle_step(completions, loss_type, beta, low, high, max_length=9)
        order = rng.permutation(len(completions)).tolist()
        for micro_batches in ([order], [order[:5], order[5:6], order[6:]], [[row] for row in order]):
            actual = package_step(module, kl.k3, completions, loss_type, beta, low, high, 9, micro_batches)
            assert actual.loss == pytest.approx(expected.loss, rel=1e-11, abs=1e-13)
            for actual_row, expected_row in zip(actual.gradient, expected.gradient, strict=True):
                assert actual_row == pytest.approx(expected_row, rel=1e-10, abs=1e-13)
            assert (actual.clipped_low, actual.clipped_high) == (expected.clipped_low, expected.clipped_high)
        clipped_low, clipped_high = clipped_low + expected.clipped_low, clipped_high + expected.clipped_high
    assert min(clipped_low, clipped_high) > 10, "the data must reach both bounds, or they are not tested"


# The tests


def test_advantages_are_the_papers() -> None:
    check_advantages(advantages)


def test_k3_is_the_papers() -> None:
    check_kl(kl)


def test_step_loss_and_gradient_are_the_papers() -> None:
    check_losses(losses)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        # mean 1/2, sample variance 4 * (1/4) / 3 = 1/3
        ("group", 0.5 / (math.sqrt(1 / 3) + 1e-4)),
        ("batch", 0.5 / (math.sqrt(1 / 3) + 1e-4)),
        ("none", 0.5),
    ],
)
def test_advantages_by_hand(scale: Scale, expected: float) -> None:
    actual = advantages.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64), scale)
    assert actual.tolist() == [pytest.approx([expected, -expected, -expected, expected], rel=1e-14)]
    if scale != "none":
        assert actual[0, 0].item() == pytest.approx(0.865875, abs=1e-6)


def test_batch_scale_by_hand() -> None:
    # Eight rewards of mean 5/8: squares 5 * (3/8)^2 + 3 * (5/8)^2 = 15/8, variance 15/56. The means stay the groups'.
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    std = math.sqrt(15 / 56) + 1e-4
    expected = [[0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std], [0.25 / std, 0.25 / std, 0.25 / std, -0.75 / std]]
    assert advantages.group_advantages(rewards, "batch").tolist() == [
        pytest.approx(row, rel=1e-14) for row in expected
    ]


def test_not_applicable_is_excluded_and_not_zero() -> None:
    # Two rewards are left: mean 1/2, sample variance 1/2. Counted as zeros they would give mean 1/4.
    rewards = torch.tensor([[1.0, NAN, 0.0, NAN], [NAN, NAN, 5.0, NAN], [NAN, NAN, NAN, NAN]], dtype=torch.float64)
    value = 0.5 / (math.sqrt(0.5) + 1e-4)
    actual = advantages.group_advantages(rewards, "group")
    assert actual[0].tolist() == pytest.approx([value, 0.0, -value, 0.0], rel=1e-14)
    assert actual[1:].tolist() == [[0.0] * 4, [0.0] * 4]
    assert reward_table.has_reward_variance(rewards).tolist() == [True, False, False]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rewards", [torch.zeros(4), torch.zeros(2, 1), torch.zeros(1, 2, 3)])
def test_malformed_rewards_are_refused(rewards: torch.Tensor, scale: Scale) -> None:
    with pytest.raises(ValueError, match="rewards"):
        advantages.group_advantages(rewards, scale)


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="std"):
        advantages.group_advantages(torch.zeros(1, 2), "std")  # type: ignore[arg-type]
    totals = averages.StepTotals(num_completions=1, num_tokens=1, max_completion_length=1)
    with pytest.raises(ValueError, match="ppo"):
        averages.token_weights(torch.ones(1, 1), totals, "ppo")


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope", "low", "high"),
    [
        (2.0, 1.5, -2.4, 0.0, False, True),  # min(3, 1.2 * 2): it has gone up enough
        (2.0, 0.5, -1.0, -1.0, False, False),  # min(1, 0.8 * 2): too low for a good one, pulled back up
        (-2.0, 1.5, 3.0, 3.0, False, False),  # min(-3, -2.4): too high for a bad one, pushed down
        (-2.0, 0.5, 1.6, 0.0, True, False),  # min(-1, -1.6): it has gone down enough
        (2.0, 1.0, -2.0, -2.0, False, False),
        (0.0, 1.5, 0.0, 0.0, False, False),
    ],
)
def test_clip_by_hand(advantage: float, ratio: float, loss: float, slope: float, low: bool, high: bool) -> None:
    policy = torch.tensor([[math.log(ratio) - 1.0]], dtype=torch.float64, requires_grad=True)
    old = torch.full_like(policy, -1.0).detach()
    output = losses.clipped_surrogate(policy, old, torch.tensor([advantage], dtype=torch.float64), 0.2, 0.2)
    (gradient,) = torch.autograd.grad(output.token_losses.sum(), policy)
    assert output.token_losses.item() == pytest.approx(loss, abs=1e-14)
    assert gradient.item() == pytest.approx(slope, abs=1e-14)
    assert (output.clipped_low.item(), output.clipped_high.item()) == (low, high)


def test_clip_higher_by_hand() -> None:
    # DAPO: 0.8 below and 1.28 above. Under one epsilon of 0.2 the first ratio would be clipped too.
    ratios = torch.tensor([[1.25, 1.3, 0.75], [1.25, 1.3, 0.75]], dtype=torch.float64)
    output = losses.clipped_surrogate(ratios.log(), torch.zeros(2, 3).double(), torch.tensor([1.0, -1.0]), 0.2, 0.28)
    assert output.token_losses.tolist() == [pytest.approx([-1.25, -1.28, -0.75]), pytest.approx([1.25, 1.3, 0.8])]
    assert output.clipped_high.tolist() == [[False, True, False], [False, False, False]]
    assert output.clipped_low.tolist() == [[False, False, False], [False, False, True]]


def test_k3_by_hand() -> None:
    # 1/2 - ln(1/2) - 1, and with the roles changed 2 - ln 2 - 1.
    half, quarter = torch.tensor(0.5, dtype=torch.float64).log(), torch.tensor(0.25, dtype=torch.float64).log()
    assert kl.k3(half, quarter).item() == pytest.approx(math.log(2) - 0.5, rel=1e-14)
    assert kl.k3(quarter, half).item() == pytest.approx(1 - math.log(2), rel=1e-14)


def test_k3_estimates_the_divergence_from_the_reference() -> None:
    # Its mean over the policy's own tokens is KL(policy || reference) exactly, and not KL(reference || policy).
    policy, ref = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5])
    estimate = (torch.tensor(policy) * kl.k3(torch.tensor(policy).log(), torch.tensor(ref).log())).sum().item()
    assert estimate == pytest.approx(float((policy * np.log(policy / ref)).sum()), rel=1e-12)
    assert estimate != pytest.approx(float((ref * np.log(ref / policy)).sum()), rel=1e-2)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        # Completions of 3 and 1 tokens, and a truncated one that is left out; at most 5 tokens.
        ("grpo", [[1 / 6, 1 / 6, 1 / 6], [1 / 2, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        ("dapo", [[1 / 4, 1 / 4, 1 / 4], [1 / 4, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        ("dr_grpo", [[1 / 15, 1 / 15, 1 / 15], [1 / 15, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    ],
)
def test_token_weights_by_hand(loss_type: str, expected: list[list[float]]) -> None:
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    totals = averages.StepTotals(num_completions=2, num_tokens=4, max_completion_length=5, num_left_out=1)
    assert averages.token_weights(mask, totals, loss_type).tolist() == [pytest.approx(row) for row in expected]


def test_no_completion_is_left_out_unless_that_is_said() -> None:
    totals = averages.StepTotals(num_completions=2, num_tokens=4, max_completion_length=5)
    assert averages.token_weights(torch.ones(2, 2), totals, "dr_grpo").tolist() == [[pytest.approx(1 / 10)] * 2] * 2


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_step_of_nothing_but_masked_completions_weighs_nothing(loss_type: str) -> None:
    totals = averages.StepTotals(num_completions=0, num_tokens=0, max_completion_length=5)
    weights = averages.token_weights(torch.zeros(2, 3), totals, loss_type)
    assert torch.equal(weights, torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo"])
def test_a_mask_of_whole_numbers_is_never_a_loss_of_zero(loss_type: str, dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0]])
    totals = averages.StepTotals(num_completions=1, num_tokens=2, max_completion_length=5)
    expected = averages.token_weights(mask.float(), totals, loss_type)
    torch.testing.assert_close(averages.token_weights(mask.to(dtype), totals, loss_type), expected)
