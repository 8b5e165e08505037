"""Every `loss_type`, `advantage_estimator`, KL form and correction as loops over numbers, from the papers.

As in test_algorithm_oracle.py: the oracle knows no tensors, no padding and no masks, and shares no code with the
package.

    GSPO    arXiv:2507.18071 (sequence ratio, token form)       CISPO   arXiv:2506.13585 (bounded weights)
    SAPO    arXiv:2511.20347 (soft gate)                        GMPO    arXiv:2507.20673 (geometric mean)
    RLOO    arXiv:2402.14740 (leave one out)                    GDPO    arXiv:2601.05242 (each reward on its own)
    OPO     arXiv:2505.23585 (baseline by length)               pass@k  arXiv:2503.19595 (best of the group)
    REINFORCE++  arXiv:2501.03262 (whitening over the batch)    Dual clip  arXiv:1912.09729
"""

import itertools
import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from grpo_stage.algorithm import advantages, averages, correction, exploration, kl, losses
from grpo_stage.algorithm.catalog import canonical
from grpo_stage.algorithm.ratios import importance_ratios
from grpo_stage.algorithm.reward_table import RewardTable, tells_apart


NAN = math.nan
STD_EPS = 1e-4
# (loss_type, importance_sampling_level): all that are offered.
OBJECTIVES = [
    *itertools.product(("grpo", "bnpo", "dapo", "dr_grpo"), ("token", "sequence", "sequence_token")),
    *((loss, "token") for loss in ("cispo", "sapo", "gspo", "gspo_token", "gmpo")),
]
MAX_LENGTH = 9


# The losses


@dataclass
class Case:
    """One completion, without padding."""

    policy: list[float]
    old: list[float]
    advantage: float
    used: bool = True
    sampling: list[float] = field(default_factory=list)
    ref: list[float] = field(default_factory=list)


def f64(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def oracle_tokens(
    c: Case, loss_type: str, level: str, s: dict[str, Any]
) -> tuple[list[float], list[list[float]], int]:
    """Objective of each token (to be maximized), its derivative by each token's log-probability, tokens clipped."""
    low, high, n, A = s["epsilon"], s["epsilon_high"], len(c.policy), c.advantage
    rho = [math.exp(p) / math.exp(o) for p, o in zip(c.policy, c.old, strict=True)]
    values, slopes, cut = [], [[0.0] * n for _ in range(n)], 0
    level = {"gspo": "sequence", "gspo_token": "sequence_token"}.get(loss_type, level)
    whole = math.exp(math.fsum(p - o for p, o in zip(c.policy, c.old, strict=True)) / n)
    for t in range(n):
        if loss_type == "cispo":
            weight = min(rho[t], 1.0 + high)
            values.append(weight * A * c.policy[t])
            slopes[t][t] = weight * A
            cut += rho[t] > 1.0 + high
        elif loss_type == "sapo":
            tau = s["pos"] if A > 0 else s["neg"]
            gate = sigmoid(tau * (rho[t] - 1.0))
            values.append(4.0 / tau * gate * A)
            slopes[t][t] = 4.0 * gate * (1.0 - gate) * rho[t] * A
        elif loss_type == "gmpo":
            kept = [
                min(r, math.exp(high)) if A > 0 else max(r, math.exp(-low))  # min(rho A, clip(rho) A) for this sign
                for r in rho
            ]
            product = math.prod(kept) ** (1.0 / n)
            values.append(product * A)
            for u in range(n):
                is_cut = (A > 0 and rho[u] > math.exp(high)) or (A < 0 and rho[u] < math.exp(-low))
                slopes[t][u] = 0.0 if is_cut else product * A / n
            cut += (A > 0 and rho[t] > math.exp(high)) or (A < 0 and rho[t] < math.exp(-low))
        else:
            r = rho[t] if level == "token" else whole
            bounded = min(r, s["delta"]) if s["delta"] is not None else r
            values.append(min(bounded * A, clip(r, 1.0 - low, 1.0 + high) * A))
            is_cut = (A > 0 and r > 1.0 + high) or (A < 0 and r < 1.0 - low)
            is_cut |= s["delta"] is not None and A < 0 and r > s["delta"]
            cut += is_cut and A != 0
            if not is_cut:
                for u in range(n) if level == "sequence" else [t]:
                    slopes[t][u] = r * A / n if level == "sequence" else r * A
    return values, slopes, cut


def oracle_weight(c: Case, cases: list[Case], loss_type: str) -> float:
    used = [other for other in cases if other.used]
    if loss_type in ("grpo", "sapo", "gspo", "gspo_token", "gmpo"):
        return 1.0 / (len(used) * len(c.policy))
    if loss_type == "dr_grpo":
        return 1.0 / (len(cases) * MAX_LENGTH)
    return 1.0 / sum(len(other.policy) for other in used)


def oracle_loss(cases: list[Case], loss_type: str, level: str, s: dict[str, Any]) -> tuple[float, list[Any], int]:
    loss, gradient, cut = 0.0, [[0.0] * len(c.policy) for c in cases], 0
    for row, c in enumerate(cases):
        if not c.used:
            continue
        values, slopes, cut_here = oracle_tokens(c, loss_type, level, s)
        weight = oracle_weight(c, cases, loss_type)
        cut += cut_here
        for t in range(len(c.policy)):
            loss -= weight * values[t]
            for u in range(len(c.policy)):
                gradient[row][u] -= weight * slopes[t][u]
    return loss, gradient, cut


def padded(rows: list[list[float]], width: int, filler: np.random.Generator) -> torch.Tensor:
    """Right-padded with rubbish: nothing may depend on what stands there."""
    return f64([row + filler.normal(-2.0, 1.0, width - len(row)).tolist() for row in rows])


def package_loss(
    module: ModuleType, cases: list[Case], loss_type: str, level: str, s: dict[str, Any], parts: list[list[int]]
) -> tuple[float, list[Any], int]:
    filler = np.random.default_rng(7)
    names = {"loss_type": loss_type, "importance_sampling_level": level}
    loss_type, level = (names | canonical(names)).values()
    used = [c for c in cases if c.used]
    totals = averages.StepTotals(
        num_completions=len(used),
        num_tokens=sum(len(c.policy) for c in used),
        max_completion_length=MAX_LENGTH,
        num_left_out=len(cases) - len(used),
    )
    settings = module.LossSettings(
        epsilon=s["epsilon"],
        epsilon_high=s["epsilon_high"],
        delta=s["delta"],
        importance_sampling_level=level,
        sapo_temperature_pos=s["pos"],
        sapo_temperature_neg=s["neg"],
    )
    loss, gradient, cut = 0.0, [[] for _ in cases], 0
    for rows in parts:
        batch = [cases[row] for row in rows]
        width = max(len(c.policy) for c in batch) + 2
        mask = f64([[float(t < len(c.policy)) for t in range(width)] for c in batch])
        policy = padded([c.policy for c in batch], width, filler).requires_grad_()
        inputs = module.TokenInputs(
            policy,
            padded([c.old for c in batch], width, filler),
            f64([c.advantage for c in batch]),
            mask,
        )
        output = module.LOSSES[loss_type].surrogate(inputs, settings)
        in_loss = mask * f64([[float(c.used)] for c in batch])
        part = (averages.token_weights(in_loss, totals, loss_type) * output.token_losses).sum()
        (slope,) = torch.autograd.grad(part, policy)
        assert (slope[in_loss == 0] == 0).all()
        assert output.ratios.shape == output.token_losses.shape == mask.shape
        loss += part.item()
        clipped = output.clipped_low | output.clipped_high
        clipped = clipped if output.clipped_delta is None else clipped | output.clipped_delta
        cut += int((clipped & (in_loss > 0)).sum())
        for row, values in zip(rows, slope.tolist(), strict=True):
            gradient[row] = values[: len(cases[row].policy)]
    return loss, gradient, cut


def random_cases(rng: np.random.Generator, count: int = 12) -> list[Case]:
    cases = []
    for _ in range(count):
        length = int(rng.integers(1, 8))
        old = rng.normal(-1.5, 0.7, length)
        drift = rng.normal(0.0, 0.25)  # the whole completion's, for sequence ratios to reach the bounds
        cases.append(
            Case(
                policy=(old + drift + rng.normal(0.0, 0.4, length)).tolist(),
                old=old.tolist(),
                advantage=float(rng.choice([-1.5, -0.4, 0.0, 0.7, 1.2])),
                used=bool(rng.random() > 0.25),
                sampling=(old + rng.normal(0.0, 0.3, length)).tolist(),
                ref=(old + rng.normal(0.0, 0.5, length)).tolist(),
            )
        )
    cases[0].used = True
    return cases


def check_losses(module: ModuleType) -> None:
    """`module` is `grpo_stage.algorithm.losses`."""
    rng = np.random.default_rng(11)
    for (loss_type, level), delta in itertools.product(OBJECTIVES, (None, 1.35)):
        total_cut = 0
        for _ in range(4):
            s = {"epsilon": 0.15, "epsilon_high": 0.25, "delta": delta, "pos": 0.8, "neg": 1.6}
            cases = random_cases(rng)
            expected = oracle_loss(cases, loss_type, level, s)
            order = rng.permutation(len(cases)).tolist()
            for parts in ([order], [order[:5], order[5:6], order[6:]], [[row] for row in order]):
                loss, gradient, cut = package_loss(module, cases, loss_type, level, s, parts)
                assert loss == pytest.approx(expected[0], rel=1e-10, abs=1e-12)
                for actual_row, expected_row in zip(gradient, expected[1], strict=True):
                    assert actual_row == pytest.approx(expected_row, rel=1e-9, abs=1e-12)
                assert cut == expected[2]
            total_cut += expected[2]
        assert total_cut > 3 or loss_type == "sapo", "the data must reach the bounds, or they are not tested"


def test_losses_are_the_papers() -> None:
    check_losses(losses)


def surrogate_of(loss_type: str, ratios: list[float], advantage: float, **settings: Any) -> tuple[Any, list[float]]:
    old = torch.full((1, len(ratios)), -1.0).double()
    policy = (old + f64([ratios]).log()).requires_grad_()
    inputs = losses.TokenInputs(policy, old, f64([advantage]), torch.ones_like(old), sampling_logprobs=old)
    settings |= canonical({"loss_type": loss_type})
    loss_type = settings.pop("loss_type", loss_type)
    output = losses.LOSSES[loss_type].surrogate(inputs, losses.LossSettings(**settings))
    (gradient,) = torch.autograd.grad(output.token_losses.sum(), policy)
    return output, gradient[0].tolist()


def test_dual_clip_by_hand() -> None:
    # A = -2: at ratio 4 the loss stops at 3 * 2 and has no gradient; at 2.5 it is 5, and pushes on.
    output, gradient = surrogate_of("dapo", [4.0, 2.5, 0.5], -2.0, epsilon=0.2, epsilon_high=0.2, delta=3.0)
    assert output.token_losses[0].tolist() == pytest.approx([6.0, 5.0, 1.6])
    assert gradient == pytest.approx([0.0, 5.0, 0.0])
    assert output.clipped_delta.tolist() == [[True, False, False]]
    # A good completion is clipped at 1.2 long before.
    output, gradient = surrogate_of("dapo", [4.0, 1.1], 2.0, epsilon=0.2, epsilon_high=0.2, delta=3.0)
    assert output.token_losses[0].tolist() == pytest.approx([-2.4, -2.2])
    assert gradient == pytest.approx([0.0, -2.2])
    assert not output.clipped_delta.any()


def test_cispo_by_hand() -> None:
    # The bound is 1 + 1: a ratio of 4 weighs 2 and keeps its gradient. Log-probabilities: ln 4 - 1 and ln 1/2 - 1.
    output, gradient = surrogate_of("cispo", [4.0, 0.5], 3.0, epsilon=0.2, epsilon_high=1.0)
    assert gradient == pytest.approx([-6.0, -1.5])
    assert output.token_losses[0].tolist() == pytest.approx([-6.0 * (math.log(4) - 1), -1.5 * (-math.log(2) - 1)])
    assert output.clipped_high.tolist() == [[True, False]]


def test_gspo_by_hand() -> None:
    # Ratios of 2 and 1/2 make one of 1, and 1.44 and 1 one of 1.2: clipped or not, it is the whole completion.
    output, gradient = surrogate_of("gspo", [2.0, 0.5], 3.0, epsilon=0.1, epsilon_high=0.1)
    assert output.ratios[0].tolist() == pytest.approx([1.0, 1.0])
    assert gradient == pytest.approx([-3.0, -3.0])  # two tokens' losses, each half of it from each token
    output, gradient = surrogate_of("gspo", [1.44, 1.0], 3.0, epsilon=0.1, epsilon_high=0.1)
    assert output.token_losses[0].tolist() == pytest.approx([-3.3, -3.3])
    assert gradient == pytest.approx([0.0, 0.0])
    output, gradient = surrogate_of("gspo", [1.44, 1.0], -3.0, epsilon=0.1, epsilon_high=0.1)
    assert output.token_losses[0].tolist() == pytest.approx([3.6, 3.6])
    assert gradient == pytest.approx([3.6, 3.6])


def test_sapo_by_hand() -> None:
    # At ratio 1 the gate is 2 / tau, and the gradient REINFORCE's; at 2, 4 s(1), with slope 4 s(1) (1 - s(1)) 2.
    output, gradient = surrogate_of("sapo", [1.0, 2.0], 1.0, epsilon=0.2, epsilon_high=0.2)
    one = 1 / (1 + math.exp(-1))
    assert output.token_losses[0].tolist() == pytest.approx([-2.0, -4 * one])
    assert gradient == pytest.approx([-1.0, -8 * one * (1 - one)])
    output, gradient = surrogate_of("sapo", [1.0], -1.0, epsilon=0.2, epsilon_high=0.2)
    assert output.token_losses.item() == pytest.approx(2.0 / 1.05)
    assert gradient == pytest.approx([1.0])


def test_gmpo_by_hand() -> None:
    # exp(0.4) is 1.49: ratios of 4 and 1 give the root of 1.49 for a good completion, and 2 for a bad one.
    output, gradient = surrogate_of("gmpo", [4.0, 1.0], 1.0, epsilon=0.4, epsilon_high=0.4)
    assert output.token_losses[0].tolist() == pytest.approx([-math.exp(0.2)] * 2)
    assert gradient == pytest.approx([0.0, -math.exp(0.2)])
    output, gradient = surrogate_of("gmpo", [4.0, 1.0], -1.0, epsilon=0.4, epsilon_high=0.4)
    assert output.token_losses[0].tolist() == pytest.approx([2.0] * 2)
    assert gradient == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("loss_type", losses.LOSSES)
def test_on_policy_every_loss_is_reinforce(loss_type: str) -> None:
    _, gradient = surrogate_of(loss_type, [1.0, 1.0, 1.0], -0.7, epsilon=0.2, epsilon_high=0.2)
    assert gradient == pytest.approx([0.7, 0.7, 0.7])


def test_gspo_token_has_gspos_gradient_where_its_tokens_weigh_alike() -> None:
    for ratios in ([1.1, 0.9, 1.02], [1.5, 1.4, 0.2]):
        for advantage in (1.0, -1.0):
            of_both = [
                surrogate_of(loss, ratios, advantage, epsilon=0.2, epsilon_high=0.2) for loss in ("gspo", "gspo_token")
            ]
            torch.testing.assert_close(of_both[0][0].token_losses, of_both[1][0].token_losses)
            assert of_both[0][1] == pytest.approx(of_both[1][1])


def test_a_sequence_needs_its_mask() -> None:
    with pytest.raises(ValueError, match="mask"):
        importance_ratios(torch.zeros(1, 2), torch.zeros(1, 2), level="sequence")
    with pytest.raises(ValueError, match="tokens"):
        importance_ratios(torch.zeros(1, 2), torch.zeros(1, 2), level="tokens")


# The advantages


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    return math.sqrt(math.fsum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def known(values: list[float]) -> list[float]:
    return [v for v in values if not math.isnan(v)]


def oracle_advantages(estimator: str, scale: str, parts: Any, weights: list[float], lengths: Any) -> list[list[float]]:
    """`parts` is [P][G][F]."""
    applied = [
        [tuple(f for f, w in enumerate(weights) if w != 0 and not math.isnan(row[f])) for row in group]
        for group in parts
    ]
    totals = [
        [math.fsum(weights[f] * row[f] for f in own) if own else NAN for row, own in zip(*both, strict=True)]
        for both in zip(parts, applied, strict=True)
    ]
    everyone = [(g, i) for g, group in enumerate(totals) for i in range(len(group)) if applied[g][i]]
    result = [[0.0] * len(group) for group in totals]
    for g, i in everyone:
        own = totals[g][i]
        # Those that it is compared with, itself included: the same functions applied to them.
        peers = [(h, j) for h, j in everyone if applied[h][j] == applied[g][i]]
        if estimator != "reinforce_plus_plus":
            peers = [(h, j) for h, j in peers if h == g]
        theirs = [totals[h][j] for h, j in peers]
        others = [totals[h][j] for h, j in peers if (h, j) != (g, i)]
        value = 0.0
        if estimator == "gdpo":
            for f in applied[g][i]:
                column = [parts[h][j][f] for h, j in peers]
                if len(set(column)) > 1:
                    value += weights[f] * (parts[g][i][f] - mean(column)) / (deviation(column) + STD_EPS)
        elif len(set(theirs)) < 2:
            value = 0.0
        elif estimator == "reinforce_plus_plus":
            value = (own - mean(theirs)) / (deviation(theirs) + STD_EPS)
        elif estimator == "rloo":
            value = own - mean(others)
        elif estimator == "passk":
            value = max(0.0, own - max(others))
        elif estimator == "opo":
            value = own - math.fsum(lengths[h][j] * totals[h][j] for h, j in peers) / sum(
                lengths[h][j] for h, j in peers
            )
        else:
            value = own - mean(theirs)
        result[g][i] = value / (deviation(theirs) + STD_EPS) if scale == "group" else value
    if scale == "batch" and estimator != "reinforce_plus_plus":
        whitened = estimator in ("reinforce_plus_plus_baseline", "gdpo")
        divisor = deviation([result[g][i] if whitened else totals[g][i] for g, i in everyone]) + STD_EPS
        result = [[a / divisor for a in row] for row in result]
    return result


ESTIMATORS = [
    (estimator, scale)
    for estimator, scales in {
        "grpo": ("group", "batch", "none"),
        "dr_grpo": ("none",),
        "rloo": ("none", "batch"),
        "reinforce_plus_plus": ("batch",),
        "reinforce_plus_plus_baseline": ("batch",),
        "gdpo": ("batch",),
        "passk": ("none", "group", "batch"),
        "opo": ("none",),
    }.items()
    for scale in scales
]


def reward_table(parts: Any, weights: list[float], lengths: Any) -> Any:
    parts = torch.tensor(parts, dtype=torch.float64)
    weighted = parts * torch.tensor(weights, dtype=torch.float64)
    applies = ~parts.isnan() & (torch.tensor(weights) != 0)
    totals = torch.where(applies, weighted, 0.0).sum(-1).masked_fill(~applies.any(-1), NAN)
    return RewardTable(
        totals=totals,
        parts=parts,
        weights=torch.tensor(weights, dtype=torch.float64),
        lengths=torch.tensor(lengths),
    )


def advantages_of(module: ModuleType, estimator: str, scale: str, table: Any) -> torch.Tensor:
    names = {"advantage_estimator": estimator, "scale_rewards": scale}
    estimator, scale = (names | canonical(names)).values()
    return module.ADVANTAGE_ESTIMATORS[estimator](table, scale)


def check_advantages(module: ModuleType) -> None:
    """`module` is `grpo_stage.algorithm.advantages`."""
    rng = np.random.default_rng(5)
    for _, (estimator, scale) in itertools.product(range(25), ESTIMATORS):
        shape = int(rng.integers(1, 5)), int(rng.integers(2, 7)), int(rng.integers(1, 4))
        parts = rng.integers(-1, 2, shape) / 2
        parts[rng.random(shape) < 0.15] = NAN
        weights = rng.choice([0.0, 0.5, 1.0, -2.0], shape[2]).tolist()
        weights[0] = weights[0] or 1.0
        lengths = rng.integers(1, 9, shape[:2]).tolist()
        actual = advantages_of(module, estimator, scale, reward_table(parts, weights, lengths))
        expected = f64(oracle_advantages(estimator, scale, parts.tolist(), weights, lengths))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, msg=f"{estimator} {scale}")
    for value, size, (estimator, scale) in itertools.product((0.1, 1 / 3, 1e6 + 0.1), (3, 7), ESTIMATORS):
        table = reward_table(np.full((2, size, 1), value), [1.0], np.arange(1, 2 * size + 1).reshape(2, size))
        assert (advantages_of(module, estimator, scale, table) == 0).all()
    # One sum by two ways, and one that cancels: totals that rounding alone tells apart, at any scale.
    for unit, (estimator, scale) in itertools.product((1e-9, 1.0, 1e9), ESTIMATORS):
        for group, weights in (
            ([[1, 0, 0], [0, 1, 1], [1, 0, 0]], [0.3, 0.1, 0.2]),
            ([[1, -1, -1], [0, 0, 0], [0, 0, 0]], [0.3, 0.1, 0.2]),
        ):
            if estimator == "gdpo" and group[0] != [1, -1, -1]:  # which sees each function
                continue
            table = reward_table(unit * np.array([group]), weights, [[1, 2, 3]])
            assert (advantages_of(module, estimator, scale, table) == 0).all(), estimator
            assert not tells_apart(table).any()
    # What differs beside what cancels: both sides of the tolerance.
    table = reward_table([[[1.0, -1.0], [1.0, -1.0 + 1e-8], [1.0, -1.0 + 1e-11]]], [1.0, 1.0], [[1, 1, 1]])
    assert tells_apart(table).all()
    advantage = module.ADVANTAGE_ESTIMATORS["grpo"](table, "none")[0].tolist()
    assert advantage[0] == advantage[2] == pytest.approx(-1e-8 / 3, rel=1e-6)
    assert advantage[1] == pytest.approx(2e-8 / 3, rel=1e-6)


def test_advantages_are_the_papers() -> None:
    check_advantages(advantages)


def by_hand(estimator: str, scale: str, parts: Any, weights: Any = (1.0,), lengths: Any = None) -> list[list[float]]:
    lengths = lengths or [[1] * len(group) for group in parts]
    table = reward_table(parts, list(weights), lengths)
    return advantages_of(advantages, estimator, scale, table).tolist()


def test_estimators_by_hand() -> None:
    group = [[[1.0], [0.0], [0.0], [2.0]]]
    assert by_hand("rloo", "none", group) == [pytest.approx([1 / 3, -1.0, -1.0, 5 / 3])]
    assert by_hand("passk", "none", group) == [pytest.approx([0.0, 0.0, 0.0, 1.0])]
    assert by_hand("passk", "none", [[[2.0], [0.0], [2.0]]]) == [[0.0, 0.0, 0.0]], "two best ones: neither is needed"
    assert by_hand("dr_grpo", "none", group) == [pytest.approx([0.25, -0.75, -0.75, 1.25])]
    # Lengths 1, 1, 1, 5: the baseline is (1 + 5 * 2) / 8.
    assert by_hand("opo", "none", group, lengths=[[1, 1, 1, 5]]) == [pytest.approx([-0.375, -1.375, -1.375, 0.625])]
    # One prompt all wrong, one all right: no group teaches, the batch does. Mean 1/2, sample variance 1/3.
    batch = [[[0.0], [0.0]], [[1.0], [1.0]]]
    value = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert by_hand("reinforce_plus_plus", "batch", batch) == [pytest.approx([-value] * 2), pytest.approx([value] * 2)]
    assert by_hand("reinforce_plus_plus_baseline", "batch", batch) == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(("estimator", "scale"), ESTIMATORS)
def test_a_completion_whose_accuracy_timed_out_is_no_wrong_one(estimator: str, scale: str) -> None:
    """Of four completions of one format three are right, and the last is not known: nothing tells them apart."""
    assert by_hand(estimator, scale, [[[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, NAN]]], (1.0, 1.0)) == [[0.0] * 4]
    # Two right, one wrong: the three are as if they were alone, whatever the fourth's format is.
    for form in (0.0, 1.0):
        group = [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [form, NAN]]
        ours = by_hand(estimator, scale, [group], (1.0, 1.0))[0]
        assert ours[3] == 0.0
        if scale != "batch":  # whose deviation is over all that have a reward
            assert ours[:3] == pytest.approx(by_hand(estimator, scale, [group[:3]], (1.0, 1.0))[0])
    # Two that timed out are compared with each other; a function of weight 0 keeps nobody apart.
    group = [[1.0, 1.0], [1.0, 0.0], [1.0, NAN], [0.0, NAN]]
    if (estimator, scale) == ("grpo", "group"):  # each pair: +-1/2 over a deviation of 1/sqrt 2
        value = 0.5 / (math.sqrt(0.5) + 1e-4)
        assert by_hand(estimator, scale, [group], (1.0, 1.0))[0] == pytest.approx([value, -value, value, -value])
    assert by_hand(estimator, scale, [group], (1.0, 0.0)) == by_hand(
        estimator, scale, [[[row[0], 0.0] for row in group]], (1.0, 0.0)
    )


def test_mixed_prompts_are_compared_as_they_were() -> None:
    """A function that applies to some prompts only applies to all completions of a group or to none."""
    parts = [[[1.0, NAN], [0.0, NAN]], [[1.0, 3.0], [0.0, 0.0]]]
    value = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert by_hand("grpo", "group", parts, (1.0, 1.0))[0] == pytest.approx([value, -value])
    assert by_hand("grpo", "none", parts, (1.0, 1.0)) == [pytest.approx([0.5, -0.5]), pytest.approx([2.0, -2.0])]
    # Without groups, each of the two kinds is a batch of its own: 4 is no better than 1, but the best of its kind.
    assert by_hand("reinforce_plus_plus", "batch", parts, (1.0, 1.0))[0] == pytest.approx([value, -value])


def test_gdpo_tells_apart_what_the_sum_does_not() -> None:
    # The paper's case: two binary rewards, of which (0, 1) beside (0, 0) and (1, 1) beside (0, 0) are alike to grpo.
    parts = [[[0.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]]
    of_grpo = by_hand("grpo", "group", parts, weights=(1.0, 1.0))
    assert of_grpo[0] == pytest.approx(of_grpo[1], rel=1e-3)
    of_gdpo = by_hand("gdpo", "batch", parts, weights=(1.0, 1.0))
    assert of_gdpo[1][0] == pytest.approx(2 * of_gdpo[0][0])
    # Each part is +-1/sqrt 2; sums 1, 2 of these; their deviation is sqrt((1 + 4) * 2 * 1/2 / 3).
    part = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert of_gdpo[0][0] == pytest.approx(part / (math.sqrt(10 * part**2 / 3) + 1e-4))


@pytest.mark.parametrize("estimator", ["rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "passk", "opo"])
def test_malformed_rewards_are_refused(estimator: str) -> None:
    table = RewardTable(
        totals=torch.zeros(2, 1), parts=torch.zeros(2, 1, 1), weights=torch.ones(1), lengths=torch.ones(2, 1)
    )
    with pytest.raises(ValueError, match="rewards must be"):
        advantages.ADVANTAGE_ESTIMATORS[estimator](table, "none")


def test_malformed_parts_and_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="functions"):
        advantages.decoupled_advantages(torch.zeros(2, 2), torch.ones(2))
    with pytest.raises(ValueError, match="scale_rewards is 'std'"):
        advantages.best_of_group_advantages(torch.zeros(2, 2), "std")  # type: ignore[arg-type]


# The divergence


def check_kl(module: ModuleType) -> None:
    """`module` is `grpo_stage.algorithm.kl`. Values and gradients of every form, token by token."""
    rng = np.random.default_rng(3)
    for policy, old, ref in rng.normal(-2.0, 0.8, (40, 3)).tolist():
        values = {
            "k1": math.log(math.exp(policy) / math.exp(ref)),
            "k2": math.log(math.exp(policy) / math.exp(ref)) ** 2 / 2,
            "k3": math.exp(ref - policy) - 1 - (ref - policy),
        }
        slopes = {"k1": 1.0, "k2": policy - ref, "k3": 1 - math.exp(ref - policy)}
        ratio = math.exp(policy) / math.exp(old)
        for name in values:
            x = f64(policy).requires_grad_()
            plain = module.KL_ESTIMATORS[name](x, f64(ref))
            corrected = module.bias_corrected(plain, x, f64(old))
            for actual, value, slope in (
                (plain, values[name], slopes[name]),
                (corrected, ratio * values[name], ratio * values[name] + ratio * slopes[name]),
            ):
                (gradient,) = torch.autograd.grad(actual, x, retain_graph=True)
                assert actual.item() == pytest.approx(value, rel=1e-10, abs=1e-12)
                assert gradient.item() == pytest.approx(slope, rel=1e-10, abs=1e-12)
    assert module.adapted_coefficient(0.1, 0.3, 0.1) == pytest.approx(0.1 * 1.02), "far over: 0.1 x 0.2 more"
    assert module.adapted_coefficient(0.1, 0.0, 0.1) == pytest.approx(0.1 * 0.98), "far under: 0.1 x 0.2 less"
    assert module.adapted_coefficient(0.1, 0.11, 0.1) == pytest.approx(0.1 * 1.01)
    assert module.adapted_coefficient(0.1, 0.1, 0.1) == pytest.approx(0.1)


def test_kl_forms_are_the_papers() -> None:
    check_kl(kl)


def test_which_gradients_are_those_of_the_divergence() -> None:
    """Over all three tokens of a policy, exactly: what is offered in the loss, and why k1 alone is not.

    k2, and k1 and k3 with the correction, have the gradient of KL(policy || ref); k3 alone that of KL(ref || policy);
    k1's is 0. In the reward it is k1 that has it, as REINFORCE weighs the score function by it.
    """
    logits = f64([0.3, -0.5, 0.1]).requires_grad_()
    ref = f64([0.2, 0.3, 0.5]).log()
    policy = logits.log_softmax(0)

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    sampled = policy.detach().exp()  # each token is drawn as often as the policy says
    divergence = gradient((policy.exp() * (policy - ref)).sum())
    reversed_one = gradient((ref.exp() * (ref - policy)).sum())
    forms = {name: estimate(policy, ref) for name, estimate in kl.KL_ESTIMATORS.items()}
    corrected = {name: kl.bias_corrected(form, policy, policy.detach()) for name, form in forms.items()}
    torch.testing.assert_close(gradient((sampled * forms["k2"]).sum()), divergence)
    torch.testing.assert_close(gradient((sampled * corrected["k1"]).sum()), divergence)
    torch.testing.assert_close(gradient((sampled * corrected["k3"]).sum()), divergence)
    torch.testing.assert_close(gradient((sampled * forms["k3"]).sum()), reversed_one)
    torch.testing.assert_close(gradient((sampled * forms["k1"]).sum()), torch.zeros(3).double(), atol=1e-15, rtol=0)
    assert not torch.allclose(gradient((sampled * corrected["k2"]).sum()), divergence, rtol=0.05)
    in_reward = {name: gradient((sampled * form.detach() * policy).sum()) for name, form in forms.items()}
    torch.testing.assert_close(in_reward["k1"], divergence)
    assert not torch.allclose(in_reward["k3"], divergence, rtol=0.05)
    assert not torch.allclose(in_reward["k2"], divergence, rtol=0.05)


# The correction


def oracle_correction(c: Case, level: str, mode: str, lower: float, upper: float) -> list[float]:
    ratios = [math.exp(old) / math.exp(sampling) for old, sampling in zip(c.old, c.sampling, strict=True)]
    if level == "sequence":
        ratios = [math.prod(ratios)] * len(ratios)
    if mode == "truncate":
        return [clip(r, lower, upper) for r in ratios]
    return [r if lower <= r <= upper else 0.0 for r in ratios]


def check_correction(module: ModuleType) -> None:
    """`module` is `grpo_stage.algorithm.correction`."""
    rng, filler = np.random.default_rng(9), np.random.default_rng(1)
    cases = random_cases(rng, 30)
    width = 10
    mask = f64([[float(t < len(c.old)) for t in range(width)] for c in cases])
    policy, old, sampling = (
        padded([getattr(c, k) for c in cases], width, filler) for k in ("policy", "old", "sampling")
    )
    for level, mode in itertools.product(("token", "sequence"), ("truncate", "mask")):
        for lower, upper in ((0.0, 1.2), (0.8, 2.0), (0.7, 1.1)):
            weights = module.correction_weights(old, sampling, mask, level=level, mode=mode, lower=lower, upper=upper)
            assert weights.shape == mask.shape
            for c, row in zip(cases, weights.tolist(), strict=True):
                expected = oracle_correction(c, level, mode, lower, upper)
                assert row[: len(expected)] == pytest.approx(expected, rel=1e-11)
    advantage = f64([c.advantage for c in cases])
    left_out = 0
    for threshold in (0.05, 0.2):
        kept = module.off_policy_mask(policy, sampling, advantage, mask, threshold)
        assert kept.shape == (30, 1)
        for c, actual in zip(cases, kept[:, 0].tolist(), strict=True):
            drift = mean([math.log(math.exp(s) / math.exp(p)) for s, p in zip(c.sampling, c.policy, strict=True)])
            expected = 0.0 if c.advantage < 0 and drift > threshold else 1.0
            assert actual == expected
            left_out += expected == 0.0
    assert 2 < left_out < 30


def test_corrections_are_the_papers() -> None:
    check_correction(correction)


def test_correction_by_hand() -> None:
    # The trainer finds the first token three times as probable as the engine did, the second half as probable.
    sampling = f64([[-2.0, -2.0, 0.0]])
    old = sampling + f64([[3.0, 0.5, 1.0]]).log()
    mask = f64([[1.0, 1.0, 0.0]])

    def weights(**options: Any) -> list[float]:
        return correction.correction_weights(old, sampling, mask, **options)[0, :2].tolist()

    assert weights(level="token", mode="truncate", lower=0.0, upper=2.0) == pytest.approx([2.0, 0.5])
    assert weights(level="token", mode="truncate", lower=0.8, upper=2.0) == pytest.approx([2.0, 0.8])
    assert weights(level="token", mode="mask", lower=0.0, upper=2.0) == pytest.approx([0.0, 0.5])
    assert weights(level="sequence", mode="truncate", lower=0.0, upper=2.0) == pytest.approx([1.5, 1.5])
    assert weights(level="sequence", mode="mask", lower=0.0, upper=1.4) == pytest.approx([0.0, 0.0])
    with pytest.raises(ValueError, match="level is 'tokens'"):
        weights(level="tokens", mode="mask", lower=0.0, upper=2.0)


# Exploration


def check_exploration(module: ModuleType) -> None:
    """`module` is `grpo_stage.algorithm.exploration`."""
    rng = np.random.default_rng(4)
    for count, share in itertools.product((1, 7, 40), (0.01, 0.2, 0.5, 1.0)):
        entropies = rng.permutation(np.linspace(0.0, 3.0, count)).tolist()
        number = math.ceil(share * count - 1e-12)
        highest = sorted(entropies, reverse=True)[:number]
        kept = module.highest_entropy_tokens(f64(entropies), share)
        assert kept.tolist() == [entropy in highest for entropy in entropies]

        logprobs, advantage = rng.normal(-1.0, 1.0, count).tolist(), rng.normal(0.0, 2.0, count).tolist()
        expected = [(p - mean(logprobs)) * (a - mean(advantage)) for p, a in zip(logprobs, advantage, strict=True)]
        covariances = module.token_covariances(f64(logprobs), f64(advantage))
        assert covariances.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-13)

        draws = rng.random(count).tolist()
        held = module.kl_cov_tokens(f64(expected), share, f64(draws))
        assert held.tolist() == [value in sorted(expected, reverse=True)[:number] for value in expected]
        coarse = rng.integers(-1, 2, count).astype(float).tolist()  # most are equal to others
        held = module.kl_cov_tokens(f64(coarse), share, f64(draws))
        first = sorted(range(count), key=lambda i: (-coarse[i], draws[i]))[:number]
        assert held.tolist() == [i in first for i in range(count)]

        candidates = {i for i, value in enumerate(expected) if 0.3 <= value <= 2.0}
        drawn = module.clip_cov_tokens(f64(expected), share, 0.3, 2.0, f64(draws))
        lowest = sorted(candidates, key=lambda i: draws[i])[:number]
        assert drawn.tolist() == [i in lowest for i in range(count)]
    adapted = module.adapted_entropy_coefficient
    assert adapted(0.01, 0.2, 0.3, 0.002, 0.05) == pytest.approx(0.012), "under the target: more"
    assert adapted(0.01, 0.3, 0.3, 0.002, 0.05) == pytest.approx(0.012), "at the target: more"
    assert adapted(0.01, 0.4, 0.3, 0.002, 0.05) == pytest.approx(0.008), "over it: less"
    assert adapted(0.001, 0.4, 0.3, 0.002, 0.05) == 0.0
    assert adapted(0.049, 0.2, 0.3, 0.002, 0.05) == 0.05


def test_exploration_is_the_papers() -> None:
    check_exploration(exploration)


def test_nothing_is_selected_of_nothing() -> None:
    assert exploration.highest_entropy_tokens(torch.zeros(0), 0.5).tolist() == []
