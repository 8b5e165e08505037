"""The losses `luspo`, `vespo`, `dppo_tv`, `dppo_kl`, `gpg` and `dro`, and every way to average, as loops over numbers.

As in test_algorithm_oracle.py: the oracle knows no tensors, no padding and no masks, and shares no code with the
package. The `check_*` functions take the module under test, which may be a mutant of it.

    LUSPO  arXiv:2602.05261 (GSPO times the length)      VESPO  arXiv:2602.10693 (gamma weight of the whole completion)
    DPPO   arXiv:2602.04879 (a divergence, not a ratio)  GPG    arXiv:2504.02546 (no ratio)
    DRO    arXiv:2405.19107 (a quadratic penalty)
"""

import itertools
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from grpo_stage.algorithm import averages, losses


LOSSES = ("luspo", "vespo", "dppo_tv", "dppo_kl", "gpg", "dro")
OWN_AVERAGE = {"luspo": "seq_mean_token_sum"}  # all others: token_mean
AVERAGES = ("token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
MAX_LENGTH = 9
SETTINGS: dict[str, Any] = {
    "epsilon": 0.1,
    "epsilon_high": 0.15,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 2.5,
    "vespo_lambda_neg": 1.5,
    "dppo_ratio_max": 1.4,
    "dro_beta": 0.3,
}


@dataclass
class Case:
    """One completion, without padding."""

    policy: list[float]
    old: list[float]
    sampling: list[float]
    advantage: float | list[float]
    used: bool = True

    def advantages(self) -> list[float]:
        return self.advantage if isinstance(self.advantage, list) else [self.advantage] * len(self.policy)


def f64(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# The oracle


def binary_kl(q: float, p: float) -> float:
    """Of two coins that show the token with probability q and p."""
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


def oracle_tokens(c: Case, loss: str) -> tuple[list[float], list[list[float]], list[int]]:
    """Objective of each token, to be maximized; its slope by each token's log-probability; 1 where a bound cut."""
    s, n = SETTINGS, len(c.policy)
    values, slopes, cut = [], [[0.0] * n for _ in range(n)], [0] * n
    pi, pi_old, mu = ([math.exp(x) for x in row] for row in (c.policy, c.old, c.sampling))
    for t, A in enumerate(c.advantages()):
        if loss == "luspo":
            ratio = math.prod(p / o for p, o in zip(pi, pi_old, strict=True)) ** (1 / n)
            values.append(min(ratio * A, min(max(ratio, 1 - s["epsilon"]), 1 + s["epsilon_high"]) * A))
            cut[t] = int((A > 0 and ratio > 1 + s["epsilon_high"]) or (A < 0 and ratio < 1 - s["epsilon"]))
            for u in range(n):
                slopes[t][u] = 0.0 if cut[t] else ratio * A / n
        elif loss == "vespo":
            weight = math.prod(p / o for p, o in zip(pi, pi_old, strict=True))
            k, rate = (
                (s["vespo_k_pos"], s["vespo_lambda_pos"]) if A >= 0 else (s["vespo_k_neg"], s["vespo_lambda_neg"])
            )
            gate = weight**k * math.exp(rate * (1 - weight))
            values.append(gate * A * c.policy[t])
            slopes[t][t] = gate * A
        elif loss in ("dppo_tv", "dppo_kl"):
            apart = abs(pi[t] - mu[t]) if loss == "dppo_tv" else binary_kl(mu[t], pi[t])
            too_high = A > 0 and pi[t] > mu[t] and apart > s["epsilon_high"]
            too_low = A < 0 and pi[t] < mu[t] and apart > s["epsilon"]
            cut[t] = int(too_high or too_low)
            weight = 0.0 if cut[t] else min(pi[t] / mu[t], s["dppo_ratio_max"])
            values.append(weight * A * c.policy[t])
            slopes[t][t] = weight * A
        elif loss == "gpg":
            values.append(A * c.policy[t])
            slopes[t][t] = A
        else:
            away = c.policy[t] - c.old[t]
            values.append(A * c.policy[t] - s["dro_beta"] / 2 * away**2)
            slopes[t][t] = A - s["dro_beta"] * away
    return values, slopes, cut


def oracle_weight(c: Case, cases: list[Case], average: str) -> float:
    """Of each token of a completion in the loss of the step."""
    used = [other for other in cases if other.used]
    return {
        "token_mean": 1 / sum(len(other.policy) for other in used),
        "token_sum": 1.0,
        "seq_mean_token_mean": 1 / len(used) / len(c.policy),
        "seq_mean_token_sum": 1 / len(used),
        "seq_mean_token_sum_norm": 1 / len(cases) / MAX_LENGTH,
    }[average]


def oracle_step(cases: list[Case], loss: str, average: str) -> tuple[float, list[list[float]], int]:
    total, gradient, num_cut = 0.0, [[0.0] * len(c.policy) for c in cases], 0
    for row, c in enumerate(cases):
        if not c.used:
            continue
        values, slopes, cut = oracle_tokens(c, loss)
        weight = oracle_weight(c, cases, average)
        num_cut += sum(cut)
        total -= weight * math.fsum(values)
        for u in range(len(c.policy)):
            gradient[row][u] = -weight * math.fsum(slope[u] for slope in slopes)
    return total, gradient, num_cut


# The package on the same numbers


def package_step(
    module: ModuleType, cases: list[Case], loss: str, aggregation: str, parts: list[list[int]]
) -> tuple[float, list[list[float]], int]:
    filler = np.random.default_rng(7)  # what stands in the padding must not matter
    used = [c for c in cases if c.used]
    totals = averages.StepTotals(
        num_completions=len(used),
        num_tokens=sum(len(c.policy) for c in used),
        max_completion_length=MAX_LENGTH,
        num_left_out=len(cases) - len(used),
    )
    total, gradient, num_cut = 0.0, [[] for _ in cases], 0
    for rows in parts:
        batch = [cases[row] for row in rows]
        width = max(len(c.policy) for c in batch) + 2

        def padded(values: list[list[float]], low: float, high: float, width: int = width) -> torch.Tensor:
            return f64([row + filler.uniform(low, high, width - len(row)).tolist() for row in values])

        policy = padded([c.policy for c in batch], -3, -0.1).requires_grad_()
        mask = f64([[float(t < len(c.policy)) for t in range(width)] for c in batch])
        by_token = any(isinstance(c.advantage, list) for c in cases)
        inputs = module.TokenInputs(
            policy_logprobs=policy,
            old_logprobs=padded([c.old for c in batch], -3, -0.1),
            advantages=padded([c.advantages() for c in batch], -2, 2)
            if by_token
            else f64([c.advantage for c in batch]),
            mask=mask,
            sampling_logprobs=padded([c.sampling for c in batch], -3, -0.1),
        )
        output = module.LOSSES[loss].surrogate(inputs, module.LossSettings(**SETTINGS))
        in_loss = mask * f64([[float(c.used)] for c in batch])
        part = (averages.token_weights(in_loss, totals, loss, aggregation) * output.token_losses).sum()
        (slope,) = torch.autograd.grad(part, policy)
        assert output.ratios.shape == output.token_losses.shape == mask.shape
        assert (slope[in_loss == 0] == 0).all()
        total += part.item()
        num_cut += int(((output.clipped_low | output.clipped_high) & (in_loss > 0)).sum())
        for row, values in zip(rows, slope.tolist(), strict=True):
            gradient[row] = values[: len(cases[row].policy)]
    return total, gradient, num_cut


def random_cases(rng: np.random.Generator, by_token: bool = False, count: int = 12) -> list[Case]:
    cases = []
    for _ in range(count):
        length = int(rng.integers(1, 8))
        sampling = rng.uniform(-3.0, -0.2, length)
        old = np.minimum(sampling + rng.normal(0.0, 0.1, length), -0.05)
        drift = rng.normal(0.0, 0.15)
        policy = np.minimum(old + drift + rng.normal(0.0, 0.4, length), -0.05)
        values = [-1.5, -0.4, 0.0, 0.7, 1.2]
        cases.append(
            Case(
                policy=policy.tolist(),
                old=old.tolist(),
                sampling=sampling.tolist(),
                advantage=rng.choice(values, length).tolist() if by_token else float(rng.choice(values)),
                used=bool(rng.random() > 0.25),
            )
        )
    cases[0].used = True
    return cases


def splits(rng: np.random.Generator, count: int) -> list[list[list[int]]]:
    order = rng.permutation(count).tolist()
    return [[order], [order[:5], order[5:6], order[6:]], [[row] for row in order]]


def check_losses(module: ModuleType) -> None:
    """`module` is `grpo_stage.algorithm.losses` or a mutant of it."""
    rng = np.random.default_rng(3)
    for loss, by_token in itertools.product(LOSSES, (False, True)):
        if by_token and loss in ("luspo", "vespo"):
            continue
        num_cut = 0
        for aggregation in ("auto", *AVERAGES):
            cases = random_cases(rng, by_token)
            average = OWN_AVERAGE.get(loss, "token_mean") if aggregation == "auto" else aggregation
            expected = oracle_step(cases, loss, average)
            for parts in splits(rng, len(cases)):
                actual = package_step(module, cases, loss, aggregation, parts)
                assert actual[0] == pytest.approx(expected[0], rel=1e-8, abs=1e-12), loss
                for actual_row, expected_row in zip(actual[1], expected[1], strict=True):
                    assert actual_row == pytest.approx(expected_row, rel=1e-8, abs=1e-12), loss
                assert actual[2] == expected[2], loss
            num_cut += expected[2]
        assert num_cut > 3 or loss in ("vespo", "gpg", "dro"), f"{loss}: the data must reach the bounds"


# The tests


def test_losses_are_the_papers() -> None:
    check_losses(losses)


def surrogate(loss: str, policy: list[float], old: list[float], advantage: float, **inputs: Any) -> Any:
    """Of one completion, from probabilities; and the gradient of the sum of its token losses."""
    logprobs = f64([policy]).log().requires_grad_()
    given = {"sampling_logprobs": f64([old]).log(), **inputs}
    x = losses.TokenInputs(logprobs, f64([old]).log(), f64([advantage]), torch.ones_like(logprobs), **given)
    output = losses.LOSSES[loss].surrogate(x, losses.LossSettings(**{"epsilon": 0.2, "epsilon_high": 0.2, **OPTIONS}))
    (gradient,) = torch.autograd.grad(output.token_losses.sum(), logprobs)
    return output, gradient[0].tolist()


OPTIONS: dict[str, Any] = {"dro_beta": 0.5}


def test_luspo_weighs_a_completion_by_its_length() -> None:
    # A ratio of 1.1 in each token: every token's loss is -1.1 x 2, and the completion's three of them, over 2.
    output, gradient = surrogate("luspo", [0.55, 0.22, 0.11], [0.5, 0.2, 0.1], 2.0)
    assert output.token_losses[0].tolist() == pytest.approx([-2.2] * 3)
    assert gradient == pytest.approx([-2.2] * 3)
    totals = averages.StepTotals(num_completions=2, num_tokens=4, max_completion_length=5, num_left_out=1)
    mask = f64([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert averages.token_weights(mask, totals, "luspo").tolist() == [[0.5] * 3, [0.5, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "gate"),
    [
        (1.0, 2.0, 1.0),
        (1.0, -2.0, 1.0),
        (2 / 3, 1.0, 4 / 9 * math.e),  # the highest gate there is, at W = k / lambda
        (1.5, -1.0, 3.375 / math.e),
        (2.0, 1.0, 4 * math.exp(-3)),
        (2.0, -1.0, 8 * math.exp(-2)),
        (0.5, 0.0, 0.25 * math.exp(1.5)),
    ],
)
def test_vespo_by_hand(ratio: float, advantage: float, gate: float) -> None:
    # Two tokens whose ratios multiply to `ratio`; the paper's exponents 2 and 3, rates 3 and 2.
    output, gradient = surrogate("vespo", [0.25 * ratio * 0.8, 0.4 / 0.8], [0.25, 0.4], advantage)
    assert output.gates[0].tolist() == pytest.approx([gate] * 2)
    assert output.ratios[0].tolist() == pytest.approx([ratio] * 2)
    assert gradient == pytest.approx([-gate * advantage] * 2)


def test_dppo_compares_with_the_policy_that_sampled() -> None:
    # From 0.5 to 0.75 is 0.25, above 0.2; from 0.01 to 0.15 a ratio of 15, and no more than 0.14.
    output, gradient = surrogate("dppo_tv", [0.75, 0.15], [0.5, 0.01], 1.0)
    assert output.clipped_high.tolist() == [[True, False]]
    assert gradient == pytest.approx([0.0, -15.0])
    output, gradient = surrogate("dppo_tv", [0.75, 0.15], [0.5, 0.01], -1.0)
    assert not output.clipped_low.any()
    assert gradient == pytest.approx([1.5, 15.0])
    # KL of coins with 0.5 and 0.75 is ln(2/3)/2 + ln(2)/2 = 0.144: inside of 0.2. From 0.5 to 0.9 it is 0.511.
    output, gradient = surrogate("dppo_kl", [0.75, 0.9], [0.5, 0.5], 1.0)
    assert output.clipped_high.tolist() == [[False, True]]
    assert gradient == pytest.approx([-1.5, 0.0])
    # The trainer's own old policy has no say.
    output, gradient = surrogate("dppo_tv", [0.5, 0.5], [0.1, 0.9], 1.0, sampling_logprobs=f64([[0.5, 0.5]]).log())
    assert gradient == pytest.approx([-1.0, -1.0])
    # A ratio above `dppo_ratio_max`, 20 by default, weighs as much as that.
    _, gradient = surrogate("dppo_tv", [0.15], [0.001], 1.0)
    assert gradient == pytest.approx([-20.0])


@pytest.mark.parametrize("loss", ["dppo_tv", "dppo_kl"])
def test_dppo_needs_the_engines_log_probabilities(loss: str) -> None:
    with pytest.raises(ValueError, match="sampling"):
        surrogate(loss, [0.5], [0.5], 1.0, sampling_logprobs=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dppo_kl_at_the_ends_of_the_range(dtype: torch.dtype) -> None:
    # A probability of 1, rounded or overshot by rounding, and of 0: no infinity and no NaN.
    policy = torch.tensor([[0.0, 1e-7, -1e-9, -100.0, 0.0]], dtype=dtype, requires_grad=True)
    sampling = torch.tensor([[0.0, 0.0, -3.0, 0.0, -100.0]], dtype=dtype)
    for advantage in (1.0, -1.0):
        x = losses.TokenInputs(
            policy, sampling, torch.tensor([advantage], dtype=dtype), torch.ones_like(policy), sampling
        )
        output = losses.LOSSES["dppo_kl"].surrogate(x, losses.LossSettings(epsilon=0.05, epsilon_high=0.05))
        (gradient,) = torch.autograd.grad(output.token_losses.sum(), policy)
        assert output.token_losses.isfinite().all()
        assert gradient.isfinite().all()
        cut = output.clipped_high if advantage > 0 else output.clipped_low
        assert cut.tolist() == [[False, False, advantage > 0, advantage < 0, advantage > 0]]


def test_gpg_has_no_ratio() -> None:
    output, gradient = surrogate("gpg", [0.9, 0.1], [0.1, 0.9], -1.5)
    assert gradient == pytest.approx([1.5, 1.5])
    assert output.token_losses[0].tolist() == pytest.approx([1.5 * math.log(0.9), 1.5 * math.log(0.1)])


def test_dro_by_hand() -> None:
    # beta 0.5: at twice the probability the penalty is 0.25 ln(2)^2, with slope 0.5 ln 2.
    output, gradient = surrogate("dro", [0.5, 0.5], [0.25, 0.5], 1.0)
    two = math.log(2)
    assert output.token_losses[0].tolist() == pytest.approx([two + 0.25 * two**2, two])
    assert gradient == pytest.approx([-1.0 + 0.5 * two, -1.0])


def test_dro_has_its_optimum_where_the_advantage_says() -> None:
    # The gradient is 0 at log pi - log pi_old = A / beta.
    for advantage in (-0.3, 0.4):
        _, gradient = surrogate("dro", [0.3 * math.exp(advantage / 0.5)], [0.3], advantage)
        assert gradient == pytest.approx([0.0], abs=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_it_is_reinforce(loss: str) -> None:
    for advantage in (-0.7, 0.0, 1.3):
        _, gradient = surrogate(loss, [0.5, 0.25, 0.9], [0.5, 0.25, 0.9], advantage)
        assert gradient == pytest.approx([-advantage] * 3, abs=1e-14)


@pytest.mark.parametrize("loss", ["luspo", "gpg", "dro"])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_gradients_are_those_of_the_function(loss: str, advantage: float) -> None:
    """By finite differences. The other losses have a detached weight: they are no functions with that derivative."""
    old = f64([[0.5, 0.25, 0.4]]).log()

    def function(policy: torch.Tensor) -> torch.Tensor:
        x = losses.TokenInputs(policy, old, f64([advantage]), torch.ones_like(old), old)
        return losses.LOSSES[loss].surrogate(x, losses.LossSettings(**SETTINGS)).token_losses.sum()

    assert torch.autograd.gradcheck(function, f64([[0.52, 0.25, 0.39]]).log().requires_grad_())


@pytest.mark.parametrize("log_ratio", [-1e6, -1000.0, -100.0, -89.0, 0.0, 60.0, 89.0, 100.0, 1000.0, 1e6])
@pytest.mark.parametrize("advantage", [1.5, 0.0, -1.5])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_ratio_makes_nan(loss: str, advantage: float, log_ratio: float) -> None:
    policy = torch.tensor([[-0.5 + min(log_ratio, 0.0), -0.5]], requires_grad=True)
    other = torch.tensor([[-0.5 - max(log_ratio, 0.0), -500.0]])
    mask = torch.tensor([[1.0, 0.0]])  # the second token is beyond the completion
    x = losses.TokenInputs(policy, other, torch.tensor([advantage]), mask, other)
    output = losses.LOSSES[loss].surrogate(x, losses.LossSettings(epsilon=0.2, epsilon_high=0.28, dro_beta=0.1))
    value = (mask * output.token_losses).sum()
    (gradient,) = torch.autograd.grad(value, policy)
    assert not value.isnan()
    assert not gradient.isnan().any()
    assert gradient[0, 1] == 0
    assert advantage != 0 or loss == "dro" or gradient[0, 0] == 0


# The averages


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # Completions of 3 and 1 tokens, and a truncated one that is left out; at most 5 tokens.
        ("token_mean", [[1 / 4] * 3, [1 / 4, 0, 0], [0, 0, 0]]),
        ("token_sum", [[1.0] * 3, [1.0, 0, 0], [0, 0, 0]]),
        ("seq_mean_token_mean", [[1 / 6] * 3, [1 / 2, 0, 0], [0, 0, 0]]),
        ("seq_mean_token_sum", [[1 / 2] * 3, [1 / 2, 0, 0], [0, 0, 0]]),
        ("seq_mean_token_sum_norm", [[1 / 15] * 3, [1 / 15, 0, 0], [0, 0, 0]]),
    ],
)
@pytest.mark.parametrize("loss_type", losses.LOSSES)
def test_averages_by_hand(loss_type: str, aggregation: str, expected: list[list[float]]) -> None:
    mask = f64([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    totals = averages.StepTotals(num_completions=2, num_tokens=4, max_completion_length=5, num_left_out=1)
    weights = averages.token_weights(mask, totals, loss_type, aggregation)
    assert weights.tolist() == [pytest.approx(row) for row in expected]


@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [
        ("grpo", "seq_mean_token_mean"),
        ("dapo", "token_mean"),
        ("dr_grpo", "seq_mean_token_sum_norm"),
        ("luspo", "seq_mean_token_sum"),
        ("vespo", "token_mean"),
        ("dppo_tv", "token_mean"),
        ("gpg", "token_mean"),
    ],
)
def test_auto_is_what_the_loss_has(loss_type: str, aggregation: str) -> None:
    mask = f64([[1, 1, 1], [1, 0, 0]])
    totals = averages.StepTotals(num_completions=2, num_tokens=4, max_completion_length=5, num_left_out=1)
    own = averages.token_weights(mask, totals, loss_type)
    assert torch.equal(own, averages.token_weights(mask, totals, loss_type, "auto"))
    assert torch.equal(own, averages.token_weights(mask, totals, loss_type, aggregation))


@pytest.mark.parametrize("aggregation", AVERAGES)
def test_a_step_without_completions_weighs_nothing(aggregation: str) -> None:
    totals = averages.StepTotals(num_completions=0, num_tokens=0, max_completion_length=5)
    assert torch.equal(averages.token_weights(torch.zeros(2, 3), totals, "dapo", aggregation), torch.zeros(2, 3))


def test_an_unknown_average_is_refused() -> None:
    totals = averages.StepTotals(num_completions=1, num_tokens=1, max_completion_length=1)
    with pytest.raises(ValueError, match="loss_aggregation"):
        averages.token_weights(torch.ones(1, 1), totals, "dapo", "token-mean")


def test_all_averages_are_known() -> None:
    assert tuple(averages.AVERAGES) == AVERAGES
    assert {loss.average for loss in losses.LOSSES.values()} <= set(AVERAGES)
