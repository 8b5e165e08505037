"""Rejection of completions and normalized correction weights, as loops over numbers that share no code.

verl's `rollout_rs` (`seq_sum_k1`, `seq_mean_k1`) and `rollout_is_batch_normalize`.
"""

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from grpo_stage.algorithm import correction


def f64(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def padded(rows: list[list[float]], width: int, rng: np.random.Generator) -> torch.Tensor:
    return f64([row + rng.normal(-2, 1, width - len(row)).tolist() for row in rows])


def random_batch(rng: np.random.Generator, count: int = 40) -> tuple[list[list[float]], list[list[float]]]:
    lengths = rng.integers(1, 8, count)
    sampling = [rng.uniform(-3, -0.1, n) for n in lengths]
    old = [row + rng.normal(0, 0.2) + rng.normal(0, 0.3, len(row)) for row in sampling]
    return [row.tolist() for row in old], [row.tolist() for row in sampling]


def check_rejection(module: ModuleType) -> None:
    """`module` is `grpo_stage.algorithm.correction` or a mutant of it."""
    rng = np.random.default_rng(0)
    old, sampling = random_batch(rng)
    mask = f64([[float(t < len(row)) for t in range(9)] for row in old])
    tensors = padded(old, 9, rng), padded(sampling, 9, rng), mask
    for level, lower, upper in (("sequence", 0.6, 1.9), ("geometric", 0.85, 1.25), ("geometric", 0.0, 1.1)):
        expected = []
        for o, s in zip(old, sampling, strict=True):
            ratio = math.prod(math.exp(a) / math.exp(b) for a, b in zip(o, s, strict=True))
            ratio = ratio ** (1 / len(o)) if level == "geometric" else ratio
            expected.append([float(lower <= ratio <= upper)])
        actual = module.rejection_mask(*tensors, level=level, lower=lower, upper=upper)
        assert actual.tolist() == expected
        assert 0.2 < np.mean(expected) < 0.9, "both bounds must be reached"


def check_normalization(module: ModuleType) -> None:
    """`module` is `grpo_stage.algorithm.correction` or a mutant of it."""
    rng = np.random.default_rng(1)
    old, sampling = random_batch(rng, 12)
    used = [bool(each) for each in rng.random(12) > 0.25]
    for level in ("token", "sequence"):
        raw = [[math.exp(a - b) for a, b in zip(o, s, strict=True)] for o, s in zip(old, sampling, strict=True)]
        if level == "sequence":
            raw = [[math.prod(row)] * len(row) for row in raw]
        cut = [[min(max(w, 0.5), 1.5) for w in row] for row in raw]
        counted = [w for row, u in zip(cut, used, strict=True) if u for w in (row if level == "token" else row[:1])]
        mean = math.fsum(counted) / len(counted)
        # Three micro-batches, or ranks: the sums are those of the step.
        parts, sums, count = [], 0.0, 0.0
        for rows in ([0, 1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 11]):
            mask = f64([[float(t < len(old[row])) for t in range(9)] for row in rows])
            weights = module.correction_weights(
                padded([old[row] for row in rows], 9, rng),
                padded([sampling[row] for row in rows], 9, rng),
                mask,
                level=level,
                mode="truncate",
                lower=0.5,
                upper=1.5,
            )
            of_part = module.weight_totals(weights, mask * f64([[float(used[row])] for row in rows]), level)
            sums, count = sums + of_part[0].item(), count + of_part[1].item()
            parts.append((rows, weights))
        for rows, weights in parts:
            actual = module.normalized_weights(weights, sums, count)
            for position, row in enumerate(rows):
                expected = [w / mean for w in cut[row]]
                assert actual[position, : len(old[row])].tolist() == pytest.approx(expected, rel=1e-10)


def test_rejection_is_of_the_completions_ratio() -> None:
    check_rejection(correction)


def test_weights_are_divided_by_their_mean_over_the_step() -> None:
    check_normalization(correction)


@pytest.mark.parametrize(
    ("level", "kept"),
    [
        # Ratios of 2 and 1/2 are one of 1; 1.5 and 1.5 are 2.25 together, 1.5 in the mean; 0.4 alone.
        ("sequence", [1.0, 0.0, 0.0]),
        ("geometric", [1.0, 1.0, 0.0]),
    ],
)
def test_rejection_by_hand(level: str, kept: list[float]) -> None:
    old = f64([[2.0, 0.5], [1.5, 1.5], [0.4, 9.0]]).log()
    mask = f64([[1, 1], [1, 1], [1, 0]])
    actual = correction.rejection_mask(old, torch.zeros(3, 2), mask, level=level, lower=0.5, upper=2.0)
    assert actual.flatten().tolist() == kept
    assert actual.shape == (3, 1)


def test_the_bounds_are_of_trainer_over_engine() -> None:
    # verl's are of the reverse: it would leave out the first and keep the second.
    old, sampling = f64([[2.5], [0.4]]).log(), torch.zeros(2, 1)
    actual = correction.rejection_mask(old, sampling, torch.ones(2, 1), level="sequence", lower=0.5, upper=3.0)
    assert actual.tolist() == [[1.0], [0.0]]


def test_a_dummy_is_kept_and_counts_for_nothing() -> None:
    zero = torch.zeros(1, 1)
    assert correction.rejection_mask(zero, zero, zero, level="geometric", lower=0.5, upper=2.0).tolist() == [[1.0]]
    for level in ("token", "sequence"):
        assert [each.item() for each in correction.weight_totals(torch.ones(1, 1), zero, level)] == [0.0, 0.0]


def test_ratios_beyond_the_range_of_floats_are_rejected() -> None:
    old, sampling = torch.tensor([[1000.0], [-1000.0]]), torch.zeros(2, 1)
    actual = correction.rejection_mask(old, sampling, torch.ones(2, 1), level="sequence", lower=0.5, upper=2.0)
    assert actual.tolist() == [[0.0], [0.0]]


def test_weights_that_are_all_zero_stay_zero() -> None:
    # All are masked: there is no mean to divide by.
    assert correction.normalized_weights(torch.zeros(2, 2), 0.0, 4.0).tolist() == [[0.0] * 2] * 2
    assert correction.normalized_weights(torch.ones(2, 2), 0.0, 0.0).tolist() == [[1.0] * 2] * 2


def test_unknown_levels_are_refused() -> None:
    zeros = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="token"):
        correction.rejection_mask(zeros, zeros, zeros, level="token", lower=0.5, upper=2.0)
    with pytest.raises(ValueError, match="geometric"):
        correction.weight_totals(zeros, zeros, "geometric")
