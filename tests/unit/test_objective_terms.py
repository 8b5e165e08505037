"""`Objective` as loops over numbers: every loss with each of its terms, which tokens are chosen, what adapts.

Written from docs/algorithm.md and the papers it names. As in test_objective_oracle.py the oracle knows no tensors, no
padding and no masks, and shares no code with the package. Gradients are central differences of the oracle, in which
what a formula detaches stays where it was.
"""

import itertools
import json
import math
import random
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from grpo_stage.arguments import GRPOArguments
from grpo_stage.records import metrics as metrics_module
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.types import Completion, FinishReason, Prompt, Sample, SampleBatch, SamplingSettings, Step
from grpo_stage.update import gradient, objective
from grpo_stage.update.batch import PaddedLayout
from grpo_stage.update.logprobs import Forward, FrozenPass
from grpo_stage.update.strategies.replicated import ReplicatedParameters
from grpo_stage.update.terms.entropy_bonus import EntropyBonus
from grpo_stage.update.terms.kl_penalty import KLPenalty
from grpo_stage.update.token_budget import PolicyBudget


@dataclass
class Row:
    """One completion, without padding; a list has one number a token."""

    advantage: float
    policy: list[float]
    old: list[float]
    sampling: list[float]
    ref: list[float]
    entropy: list[float]
    learned: list[float]
    held: list[float]
    weights: list[float]
    """Of each token in the step's loss; 0 for a completion that is left out."""

    @property
    def is_used(self) -> bool:
        return any(self.weights)


# All that the oracle looks at, none of it the package's default.
SETTINGS: dict[str, Any] = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "epsilon": 0.15,
    "epsilon_high": 0.25,
    "delta": None,
    "sapo_temperature_pos": 0.8,
    "sapo_temperature_neg": 1.6,
    "beta": 0.0,
    "kl_estimator": "k3",
    "use_bias_correction_kl": False,
    "kl_in_reward": False,
    "rollout_correction": "none",
    "rollout_correction_mode": "truncate",
    "rollout_correction_min": 0.8,
    "rollout_correction_max": 1.3,
    "off_policy_mask_threshold": None,
    "entropy_coef": 0.0,
    "top_entropy_quantile": 1.0,
    "covariance_control": "none",
    "kl_cov_coef": 0.7,
}
OBJECTIVES: list[dict[str, Any]] = [
    *(
        {"loss_type": loss, "importance_sampling_level": level}
        for loss in ("grpo", "bnpo", "dapo", "dr_grpo")
        for level in ("token", "sequence", "sequence_token")
    ),
    *({"loss_type": loss} for loss in ("cispo", "sapo", "gspo", "gspo_token", "gmpo")),
    {"loss_type": "dapo", "delta": 1.35},
    {"loss_type": "gspo", "delta": 1.35},
    {"loss_type": "grpo", "epsilon_high": None},
]
# `learned` and `held` are not keys of a recipe: that the tokens are chosen at all.
KLS: list[dict[str, Any]] = [
    {"beta": 0.3, "kl_estimator": estimator, "use_bias_correction_kl": corrected}
    for estimator in ("k1", "k2", "k3")
    for corrected in (False, True)
]
CORRECTIONS: list[dict[str, Any]] = [
    {"rollout_correction": level, "rollout_correction_mode": mode}
    for level in ("token", "sequence")
    for mode in ("truncate", "mask")
]
ALONE: list[dict[str, Any]] = [
    {},
    *KLS,
    {"beta": 0.3, "kl_estimator": "k1", "kl_in_reward": True},
    {"entropy_coef": 0.4},
    {"learned": True},
    {"held": True},
    *CORRECTIONS,
    {"off_policy_mask_threshold": 0.15},
]
TOGETHER: list[dict[str, Any]] = [
    {"entropy_coef": 0.4, "learned": True, "held": True, "off_policy_mask_threshold": 0.15, **kl, **correction}
    for kl, correction in zip(KLS, itertools.cycle(CORRECTIONS), strict=False)
]
CELLS = [loss | terms for loss, terms in itertools.product(OBJECTIVES, ALONE + TOGETHER)]
random.Random(0).shuffle(CELLS)  # so that what is broken is seen early, whatever it is
SEEDS = range(8)


def f64(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def ratios(above: list[float], below: list[float]) -> list[float]:
    return [math.exp(a) / math.exp(b) for a, b in zip(above, below, strict=True)]


def random_rows(seed: int, count: int = 7) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        length = int(rng.integers(1, 6))
        old = rng.normal(-1.5, 0.7, length)
        policy = old + rng.normal(0.0, 0.2) + rng.normal(0.0, 0.3, length)
        rows.append(
            Row(
                advantage=float((-1.5, 1.2, -0.4, 0.7, 0.0)[index % 5]),
                policy=policy.tolist(),
                old=old.tolist(),
                sampling=(old + rng.normal(0.0, 0.3, length)).tolist(),
                ref=(policy + rng.normal(0.0, 0.6, length)).tolist(),
                entropy=rng.uniform(0.1, 3.0, length).tolist(),
                learned=rng.integers(0, 2, length).astype(float).tolist(),
                held=rng.integers(0, 2, length).astype(float).tolist(),
                weights=(rng.uniform(0.1, 1.0, length) * (index % 7 != 2)).tolist(),
            )
        )
    return rows


# The loss of a token


def surrogate(row: Row, policy: list[float], s: dict[str, Any]) -> list[float]:
    """The policy's loss of each token by the table of `loss_type`, at log-probabilities `policy`."""
    A, low, n = row.advantage, s["epsilon"], len(policy)
    high = low if s["epsilon_high"] is None else s["epsilon_high"]
    rho, detached = ratios(policy, row.old), ratios(row.policy, row.old)
    loss = s["loss_type"]
    if loss == "cispo":
        return [-min(r, 1 + high) * A * p for r, p in zip(detached, policy, strict=True)]
    if loss == "sapo":
        tau = s["sapo_temperature_pos"] if A > 0 else s["sapo_temperature_neg"]
        return [-4 / tau / (1 + math.exp(-tau * (r - 1))) * A for r in rho]
    if loss == "gmpo":
        logs = [min(math.log(r), high) if A > 0 else max(math.log(r), -low) for r in rho]
        return [-A * math.exp(mean(logs))] * n
    level = {"gspo": "sequence", "gspo_token": "sequence_token"}.get(loss, s["importance_sampling_level"])
    if level == "sequence":
        rho = [math.prod(rho) ** (1 / n)] * n
    elif level == "sequence_token":
        rho = [math.prod(detached) ** (1 / n) * own for own in ratios(policy, row.policy)]
    bound = math.inf if s["delta"] is None else s["delta"]
    return [-min(min(r, bound) * A, clip(r, 1 - low, 1 + high) * A) for r in rho]


def correction(row: Row, s: dict[str, Any]) -> tuple[list[float], list[bool]]:
    """The weight of each token, and whether a bound has made it so."""
    weights = ratios(row.old, row.sampling)
    if s["rollout_correction"] == "sequence":
        weights = [math.prod(weights)] * len(weights)
    low, high = s["rollout_correction_min"], s["rollout_correction_max"]
    bounded = [not low < w < high for w in weights]
    if s["rollout_correction_mode"] == "truncate":
        return [clip(w, low, high) for w in weights], bounded
    return [w if low <= w <= high else 0.0 for w in weights], bounded


def is_off_policy(row: Row, s: dict[str, Any]) -> bool:
    drift = mean([math.log(r) for r in ratios(row.sampling, row.policy)])
    return row.advantage < 0 and drift > s["off_policy_mask_threshold"]


def estimate(name: str, policy: float, ref: float) -> float:
    log_ratio = policy - ref
    return {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": math.exp(-log_ratio) + log_ratio - 1}[name]


def token_losses(row: Row, policy: list[float], s: dict[str, Any]) -> list[float]:
    """The loss of each token, all terms of it, at log-probabilities `policy`."""
    losses = surrogate(row, policy, s)
    if s["rollout_correction"] != "none":
        losses = [loss * w for loss, w in zip(losses, correction(row, s)[0], strict=True)]
    if s["off_policy_mask_threshold"] is not None and is_off_policy(row, s):
        losses = [0.0] * len(losses)
    for t, p in enumerate(policy):
        if s.get("learned") and not row.learned[t]:
            losses[t] = 0.0
        if s.get("held") and row.held[t]:
            losses[t] += s["kl_cov_coef"] * abs(p - row.old[t])
        losses[t] -= s["entropy_coef"] * row.entropy[t]
        if s["beta"] > 0 and not s["kl_in_reward"]:
            weight = math.exp(p - row.old[t]) if s["use_bias_correction_kl"] else 1.0
            losses[t] += s["beta"] * weight * estimate(s["kl_estimator"], p, row.ref[t])
    return losses


def row_gradient(row: Row, s: dict[str, Any], step: float = 1e-6) -> list[float]:
    """Of the weighted loss by each token's log-probability."""

    def loss(t: int, by: float) -> float:
        policy = [p + by * (t == u) for u, p in enumerate(row.policy)]
        return math.fsum(w * x for w, x in zip(row.weights, token_losses(row, policy, s), strict=True))

    return [(loss(t, step) - loss(t, -step)) / (2 * step) for t in range(len(row.policy))]


def expected_metrics(rows: list[Row], s: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Sums and counts of docs/metrics.md, but for `clip_ratio`."""
    used = [row for row in rows if row.is_used]
    count = sum(len(row.policy) for row in used)
    totals = {"entropy": math.fsum(sum(row.entropy) for row in used)}
    if s["beta"] > 0:
        totals["kl"] = math.fsum(
            estimate("k3", p, r) for row in used for p, r in zip(row.policy, row.ref, strict=True)
        )
    if s["rollout_correction"] != "none":
        unbounded = s | {"rollout_correction_min": 0.0, "rollout_correction_max": math.inf}
        totals["sampling/importance_sampling_ratio/mean"] = math.fsum(
            sum(correction(row, unbounded)[0]) for row in used
        )
        totals["rollout_correction/weight_mean"] = math.fsum(sum(correction(row, s)[0]) for row in used)
        totals["rollout_correction/bounded_frac"] = sum(sum(correction(row, s)[1]) for row in used)
    if s.get("learned"):
        totals["token_selection/learned_frac"] = sum(sum(row.learned) for row in used)
    if s.get("held"):
        totals["token_selection/held_frac"] = sum(sum(row.held) for row in used)
    metrics = {name: (total, float(count)) for name, total in totals.items()}
    if s["off_policy_mask_threshold"] is not None:
        metrics["off_policy_masked_frac"] = sum(is_off_policy(row, s) for row in used), float(len(used))
    return metrics


def arguments(s: dict[str, Any]) -> GRPOArguments:
    control = {"covariance_control": "kl_cov"} if s.get("held") else {}
    return GRPOArguments(**{key: value for key, value in s.items() if key not in ("learned", "held")} | control)


def beta_of(of: Any) -> float:
    return next(term.beta for term in of.terms if isinstance(term, KLPenalty))


def entropy_coef_of(of: Any) -> float:
    return next(term.coefficient for term in of.terms if isinstance(term, EntropyBonus))


def package_losses(
    of: Any, rows: list[Row], s: dict[str, Any], metrics: MetricTracker
) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Losses of an `Objective`, and the gradients of their weighted sum by log-probabilities and entropies."""
    rubbish = np.random.default_rng(3)
    width = max(len(row.policy) for row in rows) + 2

    def padded(name: str, filler: bool = True) -> torch.Tensor:
        missing = [width - len(row.policy) for row in rows]
        return f64(
            [
                getattr(row, name) + (rubbish.normal(-2.0, 1.0, n) if filler else np.zeros(n)).tolist()
                for row, n in zip(rows, missing, strict=True)
            ]
        )

    mask = f64([[float(t < len(row.policy)) for t in range(width)] for row in rows])
    weights = padded("weights", filler=False)
    batch = SampleBatch(
        inputs=None,
        completion_ids=torch.zeros(len(rows), width),
        completion_mask=mask,
        loss_mask=(weights > 0).double(),
        loss_weights=weights,
        advantages=f64([row.advantage for row in rows]),
        sampling_logprobs=padded("sampling"),
        policy_versions=torch.zeros(len(rows)),
        old_logprobs=padded("old"),
        ref_logprobs=padded("ref") if s["beta"] > 0 else None,
        trained_mask=padded("learned") if s.get("learned") else None,
        anchor_mask=padded("held") if s.get("held") else None,
    )
    policy, entropy = padded("policy").requires_grad_(), padded("entropy").requires_grad_()
    losses = of.token_losses(batch, policy, entropy, metrics)
    assert losses.shape == mask.shape
    total = (batch.loss_weights * losses).sum()
    slopes = torch.autograd.grad(total, (policy, entropy), allow_unused=True, materialize_grads=True)
    for slope in slopes:
        assert (slope[batch.loss_weights == 0] == 0).all()
    values, by_policy, by_entropy = (
        [tokens[: len(row.policy)] for row, tokens in zip(rows, each.tolist(), strict=True)]
        for each in (losses, *slopes)
    )
    return values, by_policy, by_entropy


def check_cell(module: ModuleType, options: dict[str, Any], seed: int) -> None:
    s, rows, metrics = SETTINGS | options, random_rows(seed), MetricTracker()
    values, by_policy, by_entropy = package_losses(module.Objective(arguments(s)), rows, s, metrics)
    for row, value, slope, entropy_slope in zip(rows, values, by_policy, by_entropy, strict=True):
        assert value == pytest.approx(token_losses(row, row.policy, s), rel=1e-9, abs=1e-12), options
        assert slope == pytest.approx(row_gradient(row, s), rel=1e-6, abs=1e-9), options
        assert entropy_slope == pytest.approx([-s["entropy_coef"] * w for w in row.weights], rel=1e-12), options
    measured = {name: both for name, both in metrics.state_dict()["means"].items() if "clip_ratio" not in name}
    expected = expected_metrics(rows, s)
    assert measured.keys() == expected.keys()
    for name, both in expected.items():
        assert measured[name] == pytest.approx(both, rel=1e-9), name


def check_token_losses(module: ModuleType) -> None:
    """`module` is `grpo_stage.update.objective`."""
    for options, seed in zip(CELLS, itertools.cycle(SEEDS), strict=False):
        check_cell(module, options, seed)


def test_token_losses_are_the_sum_that_is_written() -> None:
    check_token_losses(objective)


def test_the_data_reach_every_bound() -> None:
    """Otherwise the comparison above says nothing of them."""
    rows = [row for seed in SEEDS for row in random_rows(seed)]
    tokens = [(row, r) for row in rows for r in ratios(row.policy, row.old)]
    for is_reached in (
        lambda A, r: A > 0 and r > 1.25,
        lambda A, r: A < 0 and r < 0.85,
        lambda A, r: A < 0 and r > 1.35,
        lambda A, r: A > 0 and 0.85 < r < 1.25,
        lambda A, r: A == 0,
    ):
        assert 0.05 < mean([is_reached(row.advantage, r) for row, r in tokens]) < 0.4
    masked = [[is_off_policy(row, {"off_policy_mask_threshold": bound}) for row in rows] for bound in (0.0, 0.15)]
    assert 0.35 > mean(masked[0]) > mean(masked[1]) + 0.03 > 0.1
    for options in CORRECTIONS:
        assert 0.2 < mean([bounded for row in rows for bounded in correction(row, SETTINGS | options)[1]]) < 0.8


def test_a_token_by_hand() -> None:
    """Ratio 1.1, engine's half of the trainer's, entropy 2, log pi - log pi_ref = ln 2."""
    old = math.log(0.1)
    row = Row(
        advantage=2.0, policy=[math.log(0.11)], old=[old], sampling=[math.log(0.05)], ref=[math.log(0.055)],
        entropy=[2.0], learned=[1.0], held=[1.0], weights=[1.0],
    )  # fmt: skip
    s = SETTINGS | {
        "rollout_correction": "token",
        "rollout_correction_max": 1.5,
        "entropy_coef": 0.5,
        "beta": 0.1,
        "kl_estimator": "k2",
        "kl_cov_coef": 3.0,
        "learned": True,
        "held": True,
    }
    expected = -1.1 * 2 * 1.5 + 3 * math.log(1.1) - 0.5 * 2 + 0.1 * math.log(2) ** 2 / 2
    assert token_losses(row, row.policy, s) == pytest.approx([expected])
    values, (slope,), _ = package_losses(objective.Objective(arguments(s)), [row], s, MetricTracker())
    assert values == [pytest.approx([expected])]
    assert slope == pytest.approx([-1.1 * 2 * 1.5 + 3 + 0.1 * math.log(2)])


# The choice of tokens


def on_ranks(module: ModuleType, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each call returns, all made at once, each as if by a rank of its own."""
    this, values, meeting = threading.local(), [None] * len(calls), threading.Barrier(len(calls))

    def all_gather(value: Any) -> list[Any]:
        values[this.rank] = value
        meeting.wait(60)
        everyones = list(values)
        meeting.wait(60)
        return everyones

    def run(rank: int) -> Any:
        this.rank = rank
        try:
            return calls[rank]()
        except BaseException:
            meeting.abort()
            raise

    with (
        patch.object(module, "all_gather", all_gather),
        patch.object(metrics_module, "all_gather", all_gather),
        patch.object(module, "process_index", lambda: this.rank),
        ThreadPoolExecutor(len(calls)) as pool,
    ):
        return list(pool.map(run, range(len(calls))))


def selected(of: Any, rows: list[Row], step: int = 3, seed: int = 5) -> tuple[list[Any], list[Any]]:
    """`Objective.mark`, where a completion is known by its old log-probabilities; nothing of one that is left out."""
    samples = [
        sample_of(
            Prompt(index=zlib.crc32(str(row.old).encode()), token_ids=(0,), messages=(), reference=None),
            [0] * len(row.policy), row.policy, advantage=row.advantage, is_used=row.is_used,
        )
        for row in rows
    ]  # fmt: skip
    policies, entropies = [f64(row.policy) for row in rows], [f64(row.entropy) for row in rows]
    marked = of.mark(samples, policies, entropies, f"{seed} {step}")
    masks = [[each.trained_mask, each.anchor_mask] for each in marked]
    assert all((mask == 0).all() for row, both in zip(rows, masks, strict=True) if not row.is_used for mask in both)
    learned, held = (
        [both[kind].tolist() if row.is_used else [] for row, both in zip(rows, masks, strict=True)] for kind in (0, 1)
    )
    return learned, held


def sample_of(
    prompt: Prompt, tokens: Sequence[int], sampling: Sequence[float], *, advantage: float, is_used: bool, **known: Any
) -> Sample:
    """Of no policy version that a step could have."""
    completion = Completion(
        token_ids=tuple(tokens), sampling_logprobs=tuple(sampling), finish_reason=FinishReason.STOP, text=""
    )
    return Sample(
        prompt=prompt, completion=completion, policy_version=-5, rewards=(0.0,), total_reward=0.0,
        advantage=advantage, loss_mask=(int(is_used),) * len(tokens), **known,
    )  # fmt: skip


def highest(values: list[float], share: float) -> set[int]:
    number = math.ceil(share * len(values) - 1e-9)
    return set(sorted(range(len(values)), key=lambda i: -values[i])[:number])


def token_covariances(rows: list[Row]) -> list[float]:
    tokens = [(p, row.advantage) for row in rows for p in row.policy]
    center, middle = (mean(values) for values in zip(*tokens, strict=True))
    return [(p - center) * (a - middle) for p, a in tokens]


def per_completion(tokens: set[int], rows: list[Row]) -> list[list[float]]:
    """1 on the tokens that are named by their place among those of the used completions."""
    places = itertools.count()
    return [[float(next(places) in tokens) for _ in row.policy] if row.is_used else [] for row in rows]


def places(completions: list[list[float]]) -> set[int]:
    return {i for i, token in enumerate(itertools.chain(*completions)) if token}


QUANTILE = {"top_entropy_quantile": 0.3}
CLIP_COV = {"covariance_control": "clip_cov", "covariance_frac": 0.12, "clip_cov_min": 0.05, "clip_cov_max": 0.8}
KL_COV = {"covariance_control": "kl_cov", "covariance_frac": 0.12}


def check_selection(module: ModuleType) -> None:
    """`module` is `grpo_stage.update.objective`."""
    for seed, options in itertools.product(
        range(3), ({}, QUANTILE, CLIP_COV, KL_COV, QUANTILE | CLIP_COV, QUANTILE | KL_COV)
    ):
        of = module.Objective(arguments(SETTINGS | options))
        assert of.looks_at_step == bool(options)
        rows = random_rows(seed, 24)
        used = [row for row in rows if row.is_used]
        entropies = [h for row in used for h in row.entropy]
        tokens = set(range(len(entropies)))
        covariances = token_covariances(used)
        learned = highest(entropies, 0.3) if "top_entropy_quantile" in options else tokens
        held = highest(covariances, 0.12) if options.get("covariance_control") == "kl_cov" else set()
        if options.get("covariance_control") == "clip_cov":
            candidates = {t for t in tokens if 0.05 <= covariances[t] <= 0.8}
            number = math.ceil(0.12 * len(tokens))
            assert len(candidates) > number + 3, "or nothing is drawn"
            alone = module.Objective(arguments(SETTINGS | CLIP_COV))
            drawn = tokens - places(selected(alone, rows)[0])
            assert drawn <= candidates
            assert len(drawn) == number
            learned = learned - drawn
        whole = selected(of, rows)
        assert whole == (per_completion(learned, rows), per_completion(held, rows))
        assert selected(of, rows) == whole, "by nothing but the step, the seed and the completions"
        assert tuple(each[::-1] for each in selected(of, rows[::-1])) == whole, "in whatever order"
        # Ranks with many completions, with none, and with the rest.
        bounds = [(0, 11), (11, 11), (11, 24)]
        parts = on_ranks(
            module,
            [partial(selected, of, rows[first:last]) for first, last in bounds],
        )
        assert tuple([tokens for part in parts for tokens in part[kind]] for kind in (0, 1)) == whole
        left_out = [replace(row, weights=[0.0] * len(row.weights)) for row in rows]
        assert selected(of, left_out) == ([[]] * 24, [[]] * 24)
    # Most tokens have the covariance of others: which of them are held depends on neither their order nor the ranks.
    num_drawn = 0
    for seed in range(6):
        rows = random_rows(seed, 24)
        tied = [replace(row, policy=[-1.0 - (p < -1.5) for p in row.policy]) for row in rows]
        of = module.Objective(arguments(SETTINGS | KL_COV))
        _, held = whole = selected(of, tied)
        used = [row for row in tied if row.is_used]
        covariances = token_covariances(used)
        lowest = min(covariances[t] for t in places(held))
        assert len(places(held)) == math.ceil(0.12 * len(covariances))
        assert {t for t, value in enumerate(covariances) if value > lowest + 1e-9} <= places(held)
        order = np.random.default_rng(seed).permutation(24).tolist()
        shuffled = selected(of, [tied[i] for i in order])
        parts = on_ranks(module, [partial(selected, of, tied[a:b]) for a, b in ((0, 5), (5, 5), (5, 24))])
        for kind in (0, 1):
            assert shuffled[kind] == [whole[kind][i] for i in order]
            assert [tokens for part in parts for tokens in part[kind]] == whole[kind]
        num_drawn += len({str(selected(of, tied, step)) for step in range(8)}) > 2
    assert num_drawn > 2, "the data must have ties at the bound, or they are not tested"
    rows = random_rows(2, 24)
    used = [row for row in rows if row.is_used]
    covariances = token_covariances(used)
    tokens = set(range(len(covariances)))
    few = module.Objective(arguments(SETTINGS | CLIP_COV | {"covariance_frac": 0.9}))
    learned, _ = selected(few, rows)
    assert places(learned) == tokens - {t for t in tokens if 0.05 <= covariances[t] <= 0.8}, "all candidates"
    of = module.Objective(arguments(SETTINGS | CLIP_COV))
    draws = {(step, seed): str(selected(of, rows, step, seed)) for step in (*range(6), 11) for seed in (*range(6), 11)}
    assert len(set(draws.values())) == len(draws), "another draw for another step or seed"


def test_tokens_are_chosen_as_written() -> None:
    check_selection(objective)


# What adapts


def check_adaptation(module: ModuleType) -> None:
    """`module` is `grpo_stage.update.objective`. Each step by what is paid in it."""
    kl = {"beta": 0.3, "kl_target": 0.2}
    entropy = {
        "entropy_coef": 0.02, "entropy_target": 0.9, "entropy_coef_delta": 0.015, "entropy_coef_max": 0.04
    }  # fmt: skip
    plain = {"beta": 0.3, "entropy_coef": 0.02}
    for seed, options in enumerate((kl, entropy, kl | entropy, entropy | {"entropy_coef": 0.0}, plain)):
        s, rng = SETTINGS | options, np.random.default_rng(seed)
        of = module.Objective(arguments(s))
        # Nothing is paid for an entropy that no step has measured yet.
        beta, coefficient, is_paid = s["beta"], s["entropy_coef"], "entropy_target" not in s
        reached = set()
        for _ in range(25):
            assert of.entropy_gradient == (s["entropy_coef"] > 0 or "entropy_target" in s)
            paid = coefficient if is_paid else 0.0
            check_what_is_paid(of, s, beta, paid)
            steps = [
                {
                    "kl": (float(rng.choice([0.0, 0.19, 0.2, 0.202, 0.9])) * count, count),
                    "entropy": (float(rng.choice([0.5, 0.9, 1.4])) * count, count),
                }
                for count in rng.choice([0.0, 2.0, 8.0], 2)
            ]
            trackers = [MetricTracker() for _ in steps]
            for tracker, step in zip(trackers, steps, strict=True):
                tracker.load_state_dict({"means": step, "sums": {}, "minima": {}, "maxima": {}})
            others = module.Objective(arguments(s))
            others.load_state_dict(of.state_dict())
            on_ranks(module, [lambda: of.adapt(trackers[0]), lambda: others.adapt(trackers[1])])  # noqa: B023
            assert others.state_dict() == of.state_dict(), "all ranks alike"
            logged = trackers[0].state_dict()["means"]
            assert logged.pop("kl") == steps[0]["kl"]
            assert logged.pop("entropy") == steps[0]["entropy"]
            expected = {"beta": beta} if "kl_target" in s else {}
            expected |= {"entropy_coef": paid} if "entropy_target" in s else {}
            assert logged == {name: (pytest.approx(value), 1.0) for name, value in expected.items()}
            count = sum(step["kl"][1] for step in steps)
            if count > 0 and "kl_target" in s:
                measured = sum(step["kl"][0] for step in steps) / count
                beta *= 1 + 0.1 * clip(measured / s["kl_target"] - 1, -0.2, 0.2)
            if count > 0 and "entropy_target" in s:
                measured = sum(step["entropy"][0] for step in steps) / count
                is_paid = measured <= s["entropy_target"]
                change = s["entropy_coef_delta"] if is_paid else -s["entropy_coef_delta"]
                coefficient = clip(coefficient + change, 0.0, s["entropy_coef_max"])
                reached |= {f"is paid: {is_paid}", coefficient}
        assert reached >= ({"is paid: True", "is paid: False", 0.0, 0.04} if "entropy_target" in s else set())


def check_what_is_paid(of: Any, s: dict[str, Any], beta: float, paid: float) -> None:
    """By losses, by gradients and by the penalty on rewards; the coefficients are those that are given."""
    (row,) = random_rows(0, 1)
    now = s | {"beta": beta, "entropy_coef": paid}
    (values,), (slope,), (entropy_slope,) = package_losses(of, [row], now, MetricTracker())
    assert values == pytest.approx(token_losses(row, row.policy, now), rel=1e-9)
    assert slope == pytest.approx(row_gradient(row, now), rel=1e-6, abs=1e-8)
    assert entropy_slope == pytest.approx([-paid * w for w in row.weights], abs=1e-15)
    assert entropy_coef_of(of) == pytest.approx(paid, abs=1e-15)
    if beta == 0:
        return
    (penalty,) = of.reward_penalties([f64(row.policy)], [f64(row.ref)])
    expected = sum(estimate(s["kl_estimator"], p, r) for p, r in zip(row.policy, row.ref, strict=True))
    assert penalty == pytest.approx(beta * expected, rel=1e-9, abs=1e-12)


def test_coefficients_adapt_as_written() -> None:
    check_adaptation(objective)


def check_penalty_and_state(module: ModuleType) -> None:
    """`module` is `grpo_stage.update.objective`."""
    rows = random_rows(1)
    for name in ("k1", "k2", "k3"):
        of = module.Objective(arguments(SETTINGS | {"beta": 0.3, "kl_in_reward": True, "kl_estimator": name}))
        actual = of.reward_penalties([f64(row.policy) for row in rows], [f64(row.ref) for row in rows])
        expected = [0.3 * sum(map(estimate, [name] * len(r.policy), r.policy, r.ref)) for r in rows]
        assert actual == pytest.approx(expected, rel=1e-9)

    s = SETTINGS | {
        "beta": 0.3, "kl_target": 0.2, "entropy_coef": 0.02, "entropy_target": 0.9, "entropy_coef_delta": 0.007,
    }  # fmt: skip

    def after(of: Any, entropies: Sequence[float]) -> Iterator[tuple[float, float, dict[str, Any]]]:
        for value in entropies:
            tracker = MetricTracker()
            tracker.add("kl", value)
            tracker.add("entropy", value)
            of.adapt(tracker)
            yield beta_of(of), entropy_coef_of(of), of.state_dict()

    for before in ([0.1], [1.4], [0.1, 1.4], [1.4, 0.1]):
        of, resumed = module.Objective(arguments(s)), module.Objective(arguments(s))
        *_, (beta, paid, state) = after(of, before)
        *_, _ = after(resumed, [1.4 if before[-1] < 1 else 0.1] * 3)  # which is otherwise in all that is kept
        assert (beta_of(resumed), entropy_coef_of(resumed)) != (beta, paid)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert (beta_of(resumed), entropy_coef_of(resumed), resumed.state_dict()) == (beta, paid, state)
        rest = [0.1, 1.4, 1.4, 0.1, 0.1]
        assert [*after(resumed, rest)] == [*after(of, rest)]


def test_the_penalty_and_the_state() -> None:
    check_penalty_and_state(objective)


# Its use in the gradient


VOCAB = 5
TEMPERATURE = 0.7


class Table(torch.nn.Module):
    """A policy whose logits are a row of weights, by the last token, and a pattern that tells all prefixes apart."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(f64(table))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, **_: Any
    ) -> Any:
        phases = ((input_ids + 1) * attention_mask * (position_ids + 1).double().sqrt()).cumsum(dim=1)
        pattern = (phases.unsqueeze(-1) * torch.arange(1, VOCAB + 1)).sin()
        return SimpleNamespace(logits=self.table[input_ids] + pattern)


def distribution(table: list[list[float]], prefix: list[int]) -> list[float]:
    phase = math.fsum((token + 1) * math.sqrt(place + 1) for place, token in enumerate(prefix))
    logits = [x + math.sin(phase * (v + 1)) for v, x in enumerate(table[prefix[-1]])]
    powers = [math.exp(x / TEMPERATURE) for x in logits]
    return [x / math.fsum(powers) for x in powers]


@dataclass
class Update:
    """What a step trains on: a completion for each prompt."""

    prompts: list[list[int]]
    completions: list[list[int]]
    advantages: list[float]
    is_truncated: list[bool]
    sampling: list[list[float]]
    old: list[list[float]] | None
    ref: list[list[float]]


def rows_of(table: list[list[float]], u: Update, s: dict[str, Any]) -> list[Row]:
    """The completions as the policy `table` sees them, with the tokens that its statistics choose."""
    rows = []
    for i, completion in enumerate(u.completions):
        drawn_from = [distribution(table, u.prompts[i] + completion[:t]) for t in range(len(completion))]
        policy = [math.log(p[token]) for p, token in zip(drawn_from, completion, strict=True)]
        rows.append(
            Row(
                advantage=u.advantages[i], policy=policy, old=policy if u.old is None else u.old[i],
                sampling=u.sampling[i], ref=u.ref[i],
                entropy=[-math.fsum(x * math.log(x) for x in p) for p in drawn_from],
                learned=[], held=[], weights=[],
            )
        )  # fmt: skip
    used = [row for row, is_out in zip(rows, u.is_truncated, strict=True) if not is_out]
    count = sum(len(row.policy) for row in used)
    for row, is_out in zip(rows, u.is_truncated, strict=True):
        own = 1 / count if s["loss_type"] in ("dapo", "cispo") else 1 / (len(used) * len(row.policy))
        row.weights = [0.0 if is_out else own] * len(row.policy)
    top = highest([h for row in used for h in row.entropy], s["top_entropy_quantile"])
    held = highest(token_covariances(used), s["covariance_frac"])
    for row, own_learned, own_held in zip(rows, per_completion(top, rows), per_completion(held, rows), strict=True):
        row.learned, row.held = own_learned, own_held
    return rows


def step_loss(table: list[list[float]], here: list[Row], u: Update, s: dict[str, Any]) -> float:
    """`here` are the rows at the point of which the gradient is taken."""
    total = 0.0
    for row, now in zip(here, rows_of(table, u, s), strict=True):
        if row.is_used:
            losses = token_losses(replace(row, entropy=now.entropy), now.policy, s)
            total += math.fsum(w * loss for w, loss in zip(row.weights, losses, strict=True))
    return total


def check_gradient(module: ModuleType) -> None:
    """`module` is `grpo_stage.update.gradient`: a step's whole gradient, in the policy's weights."""
    terms: dict[str, Any] = {
        "beta": 0.3, "entropy_coef": 0.2, "rollout_correction": "token", "off_policy_mask_threshold": 0.05,
        "top_entropy_quantile": 0.6, "covariance_control": "kl_cov", "covariance_frac": 0.3, "learned": True,
        "held": True,
    }  # fmt: skip
    runs = [("dapo", True), ("dapo", False), ("grpo", True), ("gspo_token", True), ("cispo", True)]
    for seed, (loss, is_reused) in enumerate(runs):
        s = SETTINGS | {"loss_type": loss, "mask_truncated_completions": True} | terms
        table, u = random_update(np.random.default_rng(seed), is_reused)
        here = rows_of(table, u, s)
        assert any(row.is_used and is_off_policy(row, s) for row in here)
        expected = [[0.0] * VOCAB for _ in table]
        for last, token in itertools.product(range(VOCAB), repeat=2):
            losses = []
            for by in (1e-5, -1e-5):
                moved = [list(logits) for logits in table]
                moved[last][token] += by
                losses.append(step_loss(moved, here, u, s))
            expected[last][token] = (losses[0] - losses[1]) / 2e-5
        for budget in (1, 14, 1000):
            loss_of_step, slope = package_gradient(module, table, u, s, budget)
            assert loss_of_step == pytest.approx(step_loss(table, here, u, s), rel=1e-5, abs=1e-6)
            for actual, row in zip(slope, expected, strict=True):
                assert actual == pytest.approx(row, rel=1e-4, abs=2e-6)


def random_update(rng: np.random.Generator, is_reused: bool) -> tuple[list[list[float]], Update]:
    """A policy, and what it trains on."""
    table = rng.normal(0.0, 0.8, (VOCAB, VOCAB)).tolist()
    lengths = [int(n) for n in rng.integers(1, 6, 8)]
    u = Update(
        # None is the beginning of another: no two tokens come from one distribution.
        prompts=[[0], [1], [2], [3], [4, 0], [4, 1], [4, 2], [4, 3]],
        completions=[rng.integers(0, VOCAB, n).tolist() for n in lengths],
        advantages=rng.permutation([-1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 0.25, -0.25]).tolist(),
        is_truncated=[i in (2, 5) for i in range(8)],
        sampling=[[0.0] * n for n in lengths],
        old=None,
        ref=[[0.0] * n for n in lengths],
    )
    policy = [row.policy for row in rows_of(table, u, SETTINGS | {"covariance_frac": 1.0})]

    def near(deviation: float) -> list[list[float]]:
        drifts = rng.normal(0.0, deviation, len(policy))
        return [
            (np.array(row) + drift + rng.normal(0.0, deviation, len(row))).tolist()
            for row, drift in zip(policy, drifts, strict=True)
        ]

    return table, replace(u, sampling=near(0.25), ref=near(0.4), old=near(0.2) if is_reused else None)


def package_gradient(
    module: ModuleType, table: list[list[float]], u: Update, s: dict[str, Any], budget: int
) -> tuple[float, list[list[float]]]:
    """The loss of a step and its gradient, in micro-batches of at most `budget` tokens."""
    args = arguments(s | {"max_tokens_per_micro_batch": budget})
    forward, tokens = Forward(PaddedLayout(0, torch.device("cpu"))), PolicyBudget(budget, 0)
    accelerator: Any = SimpleNamespace(
        no_sync=lambda model: nullcontext(),
        unwrap_model=lambda model: model,
        backward=lambda loss: loss.backward(),
    )
    strategy = ReplicatedParameters(accelerator)
    policy_gradient = module.PolicyGradient(
        grpo_args=args,
        objective=objective.Objective(args),
        sampling=SamplingSettings(num_generations=1, max_new_tokens=5, temperature=TEMPERATURE),
        forward=forward,
        budget=tokens,
        frozen=FrozenPass(forward, tokens, nullcontext, TEMPERATURE, strategy),
        strategy=strategy,
        autocast=nullcontext,
        device=torch.device("cpu"),
        gather=lambda value: [value],
    )
    samples = tuple(
        sample_of(
            Prompt(index=i, token_ids=tuple(prompt), messages=(), reference=None),
            u.completions[i],
            u.sampling[i],
            advantage=u.advantages[i],
            is_used=not u.is_truncated[i],
            old_logprobs=None if u.old is None else f64(u.old[i]),
            ref_logprobs=f64(u.ref[i]),
        )
        for i, prompt in enumerate(u.prompts)
    )
    data = Step(samples=samples, logprob_temperature=TEMPERATURE)
    model = Table(table)
    loss, *_ = policy_gradient.accumulate(model, data, number=0)
    assert model.table.grad is not None
    return loss.item(), model.table.grad.tolist()


def test_the_gradient_of_a_step_is_the_objectives() -> None:
    check_gradient(gradient)
