"""Log-ratios beyond the range of float32: every loss and divergence beside its formula in float64, or its limit.

exp(89) is infinite in float32, and infinity times 0 is NaN: of a clip that ends the gradient, of an advantage of 0, of
a token that the loss leaves out.
"""

import itertools
import math
from types import ModuleType
from typing import Any

import pytest
import torch

from grpo_stage.algorithm import kl, losses, ratios
from grpo_stage.arguments import GRPOArguments
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.types import SampleBatch
from grpo_stage.update.objective import Objective


LOG_RATIOS = (-1000.0, -100.0, -89.0, -2.0, 0.0, 0.1, 2.0, 60.0, 90.0, 100.0, 1000.0, 1e6)
LOW, HIGH, POS, NEG, BETA, MOST = 0.2, 0.28, 0.8, 1.6, 0.3, 20.0
HUGE = 1e30
"""From here on a number need not be right, but of the right sign and as large: its square is infinite in float32."""


def exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def times(a: float, b: float) -> float:
    """With 0 for 0 times infinity: what is multiplied by 0 is no part of the loss."""
    return 0.0 if a == 0 or b == 0 else a * b


def surrogate(loss: str, x: float, policy: float, A: float, delta: float | None) -> tuple[float, float]:
    """Loss of a completion of one token, and its derivative by the token's log-probability."""
    r = exp(x)
    if loss == "cispo":
        weight = min(r, 1 + HIGH)
        return -weight * A * policy, -weight * A
    if loss == "sapo":
        tau = POS if A > 0 else NEG
        above = exp(-tau * (r - 1)) if r < math.inf else 0.0  # 1 / gate - 1
        slope = 0.0 if above == 0 else 4 * above / (1 + above) ** 2 * r
        return -4 / tau / (1 + above) * A, -slope * A
    if loss == "gmpo":
        is_cut = (A > 0 and x > HIGH) or (A < 0 and x < -LOW)
        kept = exp(min(x, HIGH) if A > 0 else max(x, -LOW))
        return -times(kept, A), 0.0 if is_cut else -times(r, A)
    if loss == "vespo":
        k, rate = (2.0, 3.0) if A >= 0 else (3.0, 2.0)
        gate = exp(rate + k * x - rate * r)
        return -gate * A * policy, -gate * A
    if loss in ("dppo_tv", "dppo_kl"):
        p, q = exp(policy), exp(policy - x)  # old stands for what sampled
        apart = abs(p - q) if loss == "dppo_tv" else -q * x + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
        weight = 0.0 if (A > 0 and p > q and apart > HIGH) or (A < 0 and p < q and apart > LOW) else min(r, MOST)
        return -weight * A * policy, -weight * A
    if loss in ("gpg", "dro"):
        pull = BETA if loss == "dro" else 0.0
        return -A * policy + pull / 2 * x**2, -A + pull * x
    bounded = r if delta is None else min(r, delta)
    is_cut = (A > 0 and r > 1 + HIGH) or (A < 0 and r < 1 - LOW) or (delta is not None and A < 0 and r > delta)
    return -min(times(bounded, A), clip(r, 1 - LOW, 1 + HIGH) * A), 0.0 if is_cut else -times(r, A)


def check_number(actual: float, expected: float, what: Any) -> None:
    assert not math.isnan(actual), what
    if abs(expected) < HUGE:
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6), what
    else:
        assert math.copysign(1, expected) * actual >= HUGE, what


def check_surrogates(module: ModuleType) -> None:
    """`module` is `grpo_stage.algorithm.losses`."""
    levels = ("token", "sequence", "sequence_token")
    objectives = [(loss, level) for loss in module.LOSSES for level in (levels if loss == "dapo" else levels[:1])]
    cells = itertools.product(objectives, (1.5, 0.0, -1.5), (None, 3.0), LOG_RATIOS)
    for (loss, level), A, delta, x in cells:
        policy_value = -0.5 + min(x, 0.0)
        # The second token is beyond the completion: no part of the loss, however far its ratio has gone.
        policy = torch.tensor([[policy_value, -0.5]], requires_grad=True)
        old = torch.tensor([[policy_value - x, -500.0]])
        mask = torch.tensor([[1.0, 0.0]])
        options = module.LossSettings(
            epsilon=LOW, epsilon_high=HIGH, delta=delta, importance_sampling_level=level,
            sapo_temperature_pos=POS, sapo_temperature_neg=NEG, dppo_ratio_max=MOST, dro_beta=BETA,
        )  # fmt: skip
        inputs = module.TokenInputs(policy, old, torch.tensor([A]), mask, sampling_logprobs=old)
        output = module.LOSSES[loss].surrogate(inputs, options)
        value = (mask * output.token_losses).sum()
        (gradient,) = torch.autograd.grad(value, policy)
        what = (loss, level, A, delta, x)
        expected = surrogate(loss, x, policy_value, A, delta)
        check_number(value.item(), expected[0], what)
        check_number(gradient[0, 0].item(), expected[1], what)
        assert gradient[0, 1] == 0, what
        assert torch.isfinite(output.ratios).all()


def check_divergences(module: ModuleType) -> None:
    """`module` is `grpo_stage.algorithm.kl`."""
    for y in LOG_RATIOS:  # of the reference to the policy
        policy_value = -0.5 + min(-y, 0.0)
        policy = torch.tensor([policy_value, -300.0], requires_grad=True)
        ref, old = torch.tensor([policy_value + y, -0.5]), torch.tensor([policy_value, -305.0])
        mask = torch.tensor([1.0, 0.0])
        for corrected in (False, True):
            estimate = module.k3(policy, ref)
            if corrected:  # at ratio 1 the derivative is that of k2
                estimate = module.bias_corrected(estimate, policy, old)
            value = (mask * estimate).sum()
            (gradient,) = torch.autograd.grad(value, policy)
            check_number(value.item(), exp(y) - y - 1, (y, corrected))
            if not corrected or y < 60:  # beyond, a difference of two infinite numbers
                check_number(gradient[0].item(), -y if corrected else 1 - exp(y), (y, corrected))
            assert gradient[1] == 0, (y, corrected)
    # A token that is left out, whose ratio to the policy that sampled it has gone beyond the range.
    policy = torch.tensor([-300.0], requires_grad=True)
    estimate = module.bias_corrected(module.k3(policy, torch.tensor([-299.5])), policy, torch.tensor([-500.0]))
    (gradient,) = torch.autograd.grad((0.0 * estimate).sum(), policy)
    assert gradient.item() == 0.0
    # What the policy has all but given up, and the reference has not: the terms of the product rule cancel.
    policy = torch.tensor([-100.5], requires_grad=True)
    estimate = module.bias_corrected(module.k3(policy, torch.tensor([-0.5])), policy, torch.tensor([-0.5]))
    (gradient,) = torch.autograd.grad(estimate.sum(), policy)
    assert gradient.item() == pytest.approx(0.0, abs=1e-6)


def check_bound(module: ModuleType) -> None:
    """`module` is `grpo_stage.algorithm.ratios`."""
    for dtype, limit in ((torch.float32, 88.72 - 8), (torch.float64, 709.78 - 8)):
        x = torch.tensor([-1e9, -3.0, 0.0, 80.0, limit + 1, 1e9], dtype=dtype, requires_grad=True)
        bounded = module.bounded(x)
        assert bounded[:4].tolist() == x[:4].tolist(), "to the bit"
        assert bounded[4:].tolist() == pytest.approx([limit, limit], abs=0.01)
        (gradient,) = torch.autograd.grad(bounded.sum(), x)
        assert gradient.tolist() == [1.0] * 6


def test_surrogates_beyond_the_range() -> None:
    check_surrogates(losses)


def test_divergences_beyond_the_range() -> None:
    check_divergences(kl)


def test_the_bound_ends_no_gradient() -> None:
    check_bound(ratios)


@pytest.mark.parametrize("what", ["learned", "rollout_correction", "off_policy_mask_threshold"])
def test_a_token_that_is_left_out_has_no_gradient_however_far_it_has_gone(what: str) -> None:
    """A bad completion, whose ratio nothing bounds; the factor that leaves it out is 0."""
    options = {
        "learned": {},
        "rollout_correction": {"rollout_correction": "token", "rollout_correction_mode": "mask"},
        "off_policy_mask_threshold": {"off_policy_mask_threshold": 0.1},
    }[what]
    policy = torch.tensor([[-0.5]], requires_grad=True)
    batch = SampleBatch(
        inputs=None, completion_ids=torch.zeros(1, 1),
        completion_mask=torch.ones(1, 1), loss_mask=torch.ones(1, 1), loss_weights=torch.ones(1, 1),
        advantages=torch.tensor([-5.0]), sampling_logprobs=torch.tensor([[0.0]]),
        policy_versions=torch.tensor([0]), old_logprobs=torch.tensor([[-120.0]]),
        trained_mask=torch.zeros(1, 1) if what == "learned" else None,
    )  # fmt: skip
    of = Objective(GRPOArguments(**options))  # type: ignore[arg-type]
    metrics = MetricTracker()
    token_losses = of.token_losses(batch, policy, torch.zeros(1, 1), metrics)
    (gradient,) = torch.autograd.grad(token_losses.sum(), policy)
    assert token_losses.tolist() == [[0.0]]
    assert gradient.tolist() == [[0.0]]
    assert all(math.isfinite(total) for total, _ in metrics.state_dict()["means"].values())
