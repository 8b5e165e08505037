"""What must hold of the mathematics for any numbers."""

import itertools
import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_stage.algorithm.advantages import group_advantages
from grpo_stage.algorithm.averages import StepTotals, token_weights
from grpo_stage.algorithm.kl import k3
from grpo_stage.algorithm.losses import clipped_surrogate
from grpo_stage.algorithm.reward_table import has_reward_variance


LOSS_TYPES = ("grpo", "dapo", "dr_grpo")
MAX_LENGTH = 9
Scale = Literal["group", "batch", "none"]
SCALES: tuple[Scale, ...] = ("group", "batch", "none")

# Multiples of 1/8: sums and differences are exact, so that a shift loses no digit.
EIGHTHS = st.integers(-80, 80).map(lambda n: n / 8)
any_scale = st.sampled_from(SCALES)
any_loss_type = st.sampled_from(LOSS_TYPES)
any_seed = st.integers(0, 2**31 - 1)

reproducibly = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def reward_tables(draw: Any, with_nan: bool = False) -> torch.Tensor:
    """[P, G] float64."""
    num_prompts, num_generations = draw(st.integers(1, 5)), draw(st.integers(2, 8))
    value = st.one_of(EIGHTHS, st.just(math.nan)) if with_nan else EIGHTHS
    row = st.lists(value, min_size=num_generations, max_size=num_generations)
    return torch.tensor(draw(st.lists(row, min_size=num_prompts, max_size=num_prompts)), dtype=torch.float64)


# Advantages


@reproducibly
@given(reward_tables(with_nan=True), EIGHTHS, any_scale)
def test_a_shift_of_all_rewards_changes_nothing(rewards: torch.Tensor, shift: float, scale: Scale) -> None:
    torch.testing.assert_close(
        group_advantages(rewards + shift, scale), group_advantages(rewards, scale), rtol=1e-10, atol=1e-12
    )


@reproducibly
@given(reward_tables(with_nan=True), st.lists(EIGHTHS, min_size=5, max_size=5), st.sampled_from(("group", "none")))
def test_each_group_has_its_own_baseline(rewards: torch.Tensor, shifts: list[float], scale: Scale) -> None:
    shifted = rewards + torch.tensor(shifts[: len(rewards)], dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(
        group_advantages(shifted, scale), group_advantages(rewards, scale), rtol=1e-10, atol=1e-12
    )


@reproducibly
@given(reward_tables(with_nan=True), st.floats(0.1, 100.0), st.sampled_from(("group", "batch")))
def test_the_unit_of_the_reward_matters_as_little_as_the_constant(
    rewards: torch.Tensor, factor: float, scale: Scale
) -> None:
    # Of n = P G <= 40 rewards in eighths one at least differs: the deviation is over (1/8) / sqrt(n) > 0.01.
    plain, scaled = group_advantages(rewards, scale), group_advantages(rewards * factor, scale)
    torch.testing.assert_close(scaled, plain, rtol=1e-4 / (0.01 * min(factor, 1.0)), atol=1e-12)


@reproducibly
@given(reward_tables(with_nan=True), st.floats(0.1, 100.0))
def test_without_division_advantages_keep_the_unit(rewards: torch.Tensor, factor: float) -> None:
    torch.testing.assert_close(
        group_advantages(rewards * factor, "none"), group_advantages(rewards, "none") * factor, rtol=1e-9, atol=1e-10
    )


@reproducibly
@given(reward_tables(with_nan=True), any_scale, any_seed)
def test_advantages_follow_their_completions(rewards: torch.Tensor, scale: Scale, seed: int) -> None:
    rng = np.random.default_rng(seed)
    order = torch.tensor(np.stack([rng.permutation(rewards.shape[1]) for _ in range(len(rewards))]))
    torch.testing.assert_close(
        group_advantages(rewards.gather(1, order), scale),
        group_advantages(rewards, scale).gather(1, order),
        rtol=1e-12,
        atol=1e-14,
    )


@reproducibly
@given(reward_tables(with_nan=True), any_scale)
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order(rewards: torch.Tensor, scale: Scale) -> None:
    result = group_advantages(rewards, scale)
    torch.testing.assert_close(result.sum(1), torch.zeros(len(rewards)).double(), rtol=0, atol=1e-10)
    for group, values in zip(rewards.tolist(), result.tolist(), strict=True):
        scored = sorted((r, a) for r, a in zip(group, values, strict=True) if not math.isnan(r))
        assert all(a <= b for (_, a), (_, b) in itertools.pairwise(scored))


@reproducibly
@given(
    st.one_of(st.sampled_from((0.1, 1 / 3, 0.7, 1e-3, 16777217.0)), st.floats(-1e6, 1e6)),
    st.integers(2, 33),
    any_scale,
    st.sampled_from((torch.float32, torch.float64)),
    st.booleans(),
)
def test_equal_rewards_teach_exactly_nothing(
    value: float, size: int, scale: Scale, dtype: torch.dtype, with_nan: bool
) -> None:
    rewards = torch.full((2, size), value, dtype=dtype)
    rewards[1, 0] += abs(value) + 1.0  # a group that differs must not leak into the other
    if with_nan:
        rewards[0, size // 2] = math.nan
    result = group_advantages(rewards, scale)
    assert torch.equal(result[0], torch.zeros(size, dtype=dtype))
    assert (result[1] != 0).all()
    assert result.dtype == dtype
    assert has_reward_variance(rewards).tolist() == [False, True]


@reproducibly
@given(reward_tables(with_nan=True), st.sampled_from(("group", "none")))
def test_not_applicable_is_as_if_it_had_not_been_sampled(rewards: torch.Tensor, scale: Scale) -> None:
    result = group_advantages(rewards, scale)
    assert torch.isfinite(result).all()
    for group, values in zip(rewards, result, strict=True):
        given_ones = ~group.isnan()
        assert (values[~given_ones] == 0).all()
        if given_ones.sum() >= 2:
            alone = group_advantages(group[given_ones].unsqueeze(0), scale)[0]
            torch.testing.assert_close(values[given_ones], alone, rtol=1e-12, atol=1e-14)
        else:
            assert (values == 0).all()


@reproducibly
@given(reward_tables(with_nan=True), any_scale, st.integers(0, 5))
def test_ranks_agree_when_the_batch_is_gathered(rewards: torch.Tensor, scale: Scale, cut: int) -> None:
    # The order in which ranks are gathered has no say, and what only looks at groups needs no gathering.
    cut = min(cut, len(rewards))
    first, second = rewards[:cut], rewards[cut:]
    gathered, other_way = group_advantages(rewards, scale), group_advantages(torch.cat([second, first]), scale)
    torch.testing.assert_close(torch.cat([other_way[len(second) :], other_way[: len(second)]]), gathered)
    if scale != "batch":
        local = [group_advantages(part, scale) for part in (first, second) if len(part)]
        torch.testing.assert_close(torch.cat(local), gathered)


def test_batch_scale_of_one_rank_is_not_the_batch() -> None:
    rewards = torch.tensor([[0.0, 1.0], [0.0, 8.0]], dtype=torch.float64)
    gathered = group_advantages(rewards, "batch")
    assert not torch.allclose(group_advantages(rewards[:1], "batch"), gathered[:1], rtol=0.1)
    assert gathered[1, 1] / gathered[0, 1] == pytest.approx(8.0)  # one divisor for all


# The divergence


@reproducibly
@given(st.lists(st.tuples(st.floats(-20.0, 0.0), st.floats(-20.0, 0.0)), min_size=1, max_size=20))
def test_k3_is_never_negative_and_zero_where_both_agree(pairs: list[tuple[float, float]]) -> None:
    policy, ref = torch.tensor(pairs, dtype=torch.float64).T
    value = k3(policy, ref)
    assert (value >= 0).all()
    assert (k3(policy.float(), ref.float()) >= 0).all()
    assert (value[(policy - ref).abs() > 1e-3] > 1e-8).all()
    assert torch.equal(k3(policy, policy.clone()), torch.zeros_like(policy))


def test_k3_keeps_its_sign_in_float32_where_the_policies_almost_agree() -> None:
    # exp(x) - x - 1 as it is written falls to -6e-8 here, a KL below 0 in the log.
    close = torch.logspace(-9, 0, 2000)
    log_ratios = torch.cat([close, -close])
    value = k3(torch.zeros_like(log_ratios), log_ratios)
    assert (value >= 0).all()
    exact = torch.expm1(log_ratios.double()) - log_ratios.double()
    torch.testing.assert_close(value, exact.float(), rtol=1e-4, atol=1e-10)


def test_k3_pulls_towards_the_reference() -> None:
    policy = torch.tensor([-1.0, -3.0, -2.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(k3(policy, torch.full((3,), -2.0).double()).sum(), policy)
    assert gradient.sign().tolist() == [1.0, -1.0, 0.0]


# The loss of a step


class Step:
    """A step's completions as [B, T] tensors, with garbage in the padding."""

    def __init__(self, seed: int, num_completions: int = 7, mask_some: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

        shape = (num_completions, MAX_LENGTH - 1)
        self.old = normal(*shape, scale=0.7) - 1.5
        self.policy = self.old + normal(*shape, scale=0.3)
        self.ref = self.old + normal(*shape, scale=0.3)
        self.advantages = normal(num_completions, scale=1.0)
        lengths = torch.randint(1, shape[1] + 1, (num_completions,), generator=generator)
        self.mask = (torch.arange(shape[1]) < lengths.unsqueeze(1)).double()
        if mask_some:
            self.mask[1::3] = 0.0

    @property
    def totals(self) -> StepTotals:
        return StepTotals(
            num_completions=int((self.mask.sum(1) > 0).sum()),
            num_tokens=int(self.mask.sum()),
            max_completion_length=MAX_LENGTH,
            num_left_out=int((self.mask.sum(1) == 0).sum()),
        )

    def loss(self, policy: torch.Tensor, rows: Any, loss_type: str, beta: float, width: int | None = None) -> Any:
        """The share of `rows`, with no more columns than `width`."""
        cut = slice(None, width)
        surrogate = clipped_surrogate(policy[rows][:, cut], self.old[rows][:, cut], self.advantages[rows], 0.2, 0.28)
        weights = token_weights(self.mask[rows][:, cut], self.totals, loss_type)
        return (weights * (surrogate.token_losses + beta * k3(policy[rows][:, cut], self.ref[rows][:, cut]))).sum()

    def loss_and_gradient(self, parts: list[list[int]], loss_type: str, beta: float, trim: bool) -> tuple[Any, Any]:
        """Accumulated over micro-batches, as the trainer does; `trim` cuts each to its longest completion."""
        policy = self.policy.clone().requires_grad_()
        total = 0.0
        for rows in parts:
            width = max(1, int(self.mask[rows].sum(1).max())) if trim else None
            loss = self.loss(policy, rows, loss_type, beta, width)
            loss.backward()
            total += loss.item()
        return total, policy.grad


@reproducibly
@given(any_seed, any_loss_type, st.sampled_from((0.0, 0.04)), st.lists(st.integers(1, 6), max_size=4), st.booleans())
def test_the_split_into_micro_batches_changes_nothing(
    seed: int, loss_type: str, beta: float, cuts: list[int], trim: bool
) -> None:
    step = Step(seed)
    order = np.random.default_rng(seed).permutation(7)
    parts = [part.tolist() for part in np.split(order, sorted(set(cuts)))]
    whole_loss, whole_gradient = step.loss_and_gradient([list(range(7))], loss_type, beta, trim=False)
    split_loss, split_gradient = step.loss_and_gradient(parts, loss_type, beta, trim)
    assert split_loss == pytest.approx(whole_loss, rel=1e-11, abs=1e-13)
    torch.testing.assert_close(split_gradient, whole_gradient, rtol=1e-12, atol=1e-15)


@reproducibly
@given(any_seed, any_loss_type, st.integers(1, 9))
def test_padding_changes_nothing(seed: int, loss_type: str, extra: int) -> None:
    step, padded = Step(seed), Step(seed)
    for name, filler in (("old", -3.0), ("policy", -9.0), ("ref", 0.0), ("mask", 0.0)):
        tensor = getattr(step, name)
        setattr(padded, name, torch.cat([tensor, tensor.new_full((len(tensor), extra), filler)], dim=1))
    loss, gradient = step.loss_and_gradient([list(range(7))], loss_type, 0.04, trim=False)
    padded_loss, padded_gradient = padded.loss_and_gradient([list(range(7))], loss_type, 0.04, trim=False)
    assert padded_loss == pytest.approx(loss, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(padded_gradient[:, :-extra], gradient, rtol=1e-12, atol=1e-15)
    assert (padded_gradient[:, -extra:] == 0).all()


@reproducibly
@given(any_seed, st.sampled_from(("grpo", "dapo")))
def test_a_masked_completion_is_as_if_it_had_not_been_sampled(seed: int, loss_type: str) -> None:
    step = Step(seed)
    kept = [row for row in range(7) if step.mask[row].any()]
    loss, gradient = step.loss_and_gradient([list(range(7))], loss_type, 0.04, trim=False)
    alone = Step(seed)
    for name in ("old", "policy", "ref", "mask", "advantages"):
        setattr(alone, name, getattr(alone, name)[kept])
    alone_loss, alone_gradient = alone.loss_and_gradient([list(range(len(kept)))], loss_type, 0.04, trim=False)
    assert len(kept) < 7
    assert loss == pytest.approx(alone_loss, rel=1e-12)
    torch.testing.assert_close(gradient[kept], alone_gradient)


@reproducibly
@given(any_seed, st.lists(st.booleans(), min_size=7, max_size=7))
def test_the_constant_of_dr_grpo_is_one_whatever_is_masked(seed: int, masked: list[bool]) -> None:
    step = Step(seed, mask_some=False)
    plain = token_weights(step.mask, step.totals, "dr_grpo")
    step.mask *= 1.0 - torch.tensor([masked]).double().T
    torch.testing.assert_close(token_weights(step.mask, step.totals, "dr_grpo"), plain * step.mask, rtol=0, atol=0)


@reproducibly
@given(any_seed, st.sampled_from(("grpo", "dapo")))
def test_the_weights_of_a_step_sum_to_one(seed: int, loss_type: str) -> None:
    step = Step(seed)
    parts = [token_weights(step.mask[rows], step.totals, loss_type) for rows in ([0, 3], [1], [2, 4, 5, 6])]
    assert sum(part.sum().item() for part in parts) == pytest.approx(1.0, rel=1e-12)


@reproducibly
@given(any_seed)
def test_under_dr_grpo_a_token_weighs_the_same_whatever_the_lengths(seed: int) -> None:
    step = Step(seed)
    weights = token_weights(step.mask, step.totals, "dr_grpo")
    assert torch.equal(weights, step.mask * weights.max())
    assert weights.max().item() == pytest.approx(1 / (7 * MAX_LENGTH))


@reproducibly
@given(any_seed, any_loss_type)
def test_the_gradient_on_policy_is_reinforce(seed: int, loss_type: str) -> None:
    step = Step(seed)
    logits = torch.randn(7, MAX_LENGTH - 1, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits.requires_grad_()
    policy = logits.log_softmax(-1)[..., 2]
    weights = token_weights(step.mask, step.totals, loss_type)
    output = clipped_surrogate(policy, policy.detach(), step.advantages, 0.2, 0.28)
    (gradient,) = torch.autograd.grad((weights * output.token_losses).sum(), logits, retain_graph=True)
    reinforce = -(weights * step.advantages.unsqueeze(1) * policy).sum()
    (expected,) = torch.autograd.grad(reinforce, logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    assert (output.ratios == 1).all()
    assert not (output.clipped_low | output.clipped_high).any()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_gradient_is_the_derivative(loss_type: str, beta: float) -> None:
    step = Step(seed=3)
    ratios = (step.policy - step.old).exp()
    # The loss has kinks at the bounds, where a difference quotient means nothing.
    assert min((ratios - 0.8).abs().min(), (ratios - 1.28).abs().min()) > 1e-4
    assert torch.autograd.gradcheck(
        lambda policy: step.loss(policy, list(range(7)), loss_type, beta), step.policy.clone().requires_grad_()
    )


@reproducibly
@given(any_seed, st.floats(0.01, 0.5), st.floats(0.0, 0.5))
def test_where_the_gradient_is_cut(seed: int, epsilon: float, extra: float) -> None:
    step = Step(seed)
    policy = step.policy.clone().requires_grad_()
    output = clipped_surrogate(policy, step.old, step.advantages, epsilon, epsilon + extra)
    (gradient,) = torch.autograd.grad(output.token_losses.sum(), policy)
    cut = output.clipped_low | output.clipped_high
    assert not (output.clipped_low & output.clipped_high).any()
    assert (gradient[cut] == 0).all()
    assert (gradient[~cut] != 0).all()
    # Never less pessimistic than the unclipped surrogate.
    assert (output.token_losses >= -output.ratios * step.advantages.unsqueeze(1) - 1e-15).all()
