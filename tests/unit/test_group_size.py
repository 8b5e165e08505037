"""The value of a group size, from samples: against exact sums, prompts of known rates, and a simulated step."""

import itertools
import math

import numpy as np
import pytest
import torch

from grpo_stage.forecast.contrast import completion_sketch, contrasts, sketch
from grpo_stage.forecast.group_size import (
    GroupMoments,
    binary_moments,
    expected_std,
    interval,
    length_that_ends,
    resampled_moments,
    signal,
)


def exact(rates: np.ndarray, size: int) -> tuple[float, float]:
    """Dead share and mean standard deviation, from all outcomes of a group."""
    dead = std = 0.0
    for outcome in itertools.product((0.0, 1.0), repeat=size):
        probability = np.prod([rates if one else 1 - rates for one in outcome], axis=0).mean()
        mean = sum(outcome) / size
        std += probability * math.sqrt(sum((one - mean) ** 2 for one in outcome) / size)
        dead += probability * (len(set(outcome)) == 1)
    return float(dead), float(std)


def test_the_expected_deviation_is_that_of_all_outcomes() -> None:
    rates = np.array([0.0, 0.03, 0.5, 0.8, 1.0])
    for size in (2, 3, 8):
        assert expected_std(rates, size).mean() == pytest.approx(exact(rates, size)[1], abs=1e-12)
    assert expected_std(np.array([0.5]), 8)[0] == pytest.approx(0.46, abs=0.005)  # the maximum that rlvr-audit states


def beta(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.beta(0.5, 1.5, size=count)


def part_hopeless(rng: np.random.Generator, count: int) -> np.ndarray:
    """No Beta distribution: half of the prompts are never right."""
    return np.where(rng.random(count) < 0.5, 0.0, rng.uniform(0.2, 0.8, size=count))


@pytest.mark.parametrize(("population", "num_samples"), [(beta, 16), (part_hopeless, 4)])
def test_intervals_cover_what_is_true_of_the_prompts_at_their_rate(population, num_samples: int) -> None:
    """Also beyond the k samples: of groups of 16, whose dead share 4 samples a prompt cannot show."""
    rng = np.random.default_rng(1)
    sizes = (4, 16)
    many = population(rng, 200_000)
    truth = {size: (np.mean(many**size + (1 - many) ** size), expected_std(many, size).mean()) for size in sizes}
    covered = {name: 0 for size in sizes for name in ((size, 0), (size, 1))}
    trials = 50
    for _ in range(trials):
        right = rng.binomial(num_samples, population(rng, 64))
        found = binary_moments(right, [num_samples] * 64, sizes, rng, num_draws=150)
        for size, which in covered:
            draws = (found.dead, found.std)[which][:, sizes.index(size)]
            _, low, high = interval(draws)
            covered[size, which] += low <= truth[size][which] <= high
    # Of 50 intervals of 95 % fewer than 43 cover in 1 of 100 tests.
    assert all(count >= 43 for count in covered.values()), covered
    assert sum(covered.values()) < 4 * trials  # neither are they so wide that they always do


def test_the_rates_are_not_the_plain_shares() -> None:
    """Of prompts with p = .05, 16 samples are all wrong in 44 % of cases: the plain share calls their groups dead."""
    rng = np.random.default_rng(0)
    right = rng.binomial(16, 0.05, size=400)
    shares = right / 16
    truth = 0.05**64 + 0.95**64
    plain = np.mean(shares**64 + (1 - shares) ** 64)
    found = interval(binary_moments(right, [16] * 400, (64,), rng).dead[:, 0])
    assert plain > 0.4 > 0.1 > truth
    assert found[1] <= 0.1
    assert found[0] < 0.15


@pytest.mark.parametrize(
    ("right", "num_samples", "low", "high"),
    [
        ([0] * 64, 16, 0.9, 1.0),  # all wrong: nearly all groups of 8 are dead, but not for certain
        ([16] * 64, 16, 0.9, 1.0),
        ([1], 2, 0.0, 0.9),  # one prompt, two samples
        ([0], 2, 0.0, 1.0),
    ],
)
def test_extreme_counts_have_an_answer(right: list[int], num_samples: int, low: float, high: float) -> None:
    found = binary_moments(right, [num_samples] * len(right), (8,), np.random.default_rng(0))
    mean, lowest, highest = interval(found.dead[:, 0])
    assert low <= lowest <= mean <= highest <= high
    assert lowest < highest
    if len(right) == 1:
        assert highest - lowest > 0.3  # two samples say little


def test_no_samples_are_refused() -> None:
    for right, samples in (([], []), ([0], [0])):
        with pytest.raises(ValueError, match="at least one sample"):
            binary_moments(right, samples, (2,), np.random.default_rng(0))
    with pytest.raises(ValueError, match="at least two samples"):
        resampled_moments([[1.0]], (2,), np.random.default_rng(0))


def test_resampling_finds_the_deviation_of_rewards_with_many_values() -> None:
    """Of normal rewards in groups of G the mean standard deviation is known (c4), and its square is (G-1)/G."""
    rng = np.random.default_rng(0)
    found = resampled_moments(rng.normal(size=(200, 8)).tolist(), (4, 16), rng, num_draws=60)
    for j, size in enumerate((4, 16)):
        c4 = math.sqrt(2 / size) * math.exp(math.lgamma(size / 2) - math.lgamma((size - 1) / 2))
        assert found.std[:, j].mean() == pytest.approx(c4, rel=0.05)
        assert found.square[:, j].mean() == pytest.approx((size - 1) / size, rel=0.08)
        assert found.dead[:, j].max() < 0.02


def test_resampling_agrees_with_the_rates_where_a_reward_has_two_values() -> None:
    rng = np.random.default_rng(0)
    rates = rng.uniform(0.1, 0.9, size=100)
    outcomes = (rng.random((100, 16)) < rates[:, None]).astype(float)
    found = resampled_moments(outcomes.tolist(), (2, 8), rng, num_draws=60)
    for j, size in enumerate((2, 8)):
        dead, std = exact(rates, size)
        assert found.dead[:, j].mean() == pytest.approx(dead, abs=0.06)
        assert found.std[:, j].mean() == pytest.approx(std, abs=0.03)


def test_equal_rewards_are_not_dead_for_ever() -> None:
    rng = np.random.default_rng(0)
    found = resampled_moments([[0.0] * 4] * 6 + [[0.0, 0.0, 0.0, 0.5]] * 6, (2, 64), rng, num_draws=60)
    dead_of_2, dead_of_64 = found.dead.mean(axis=0)
    assert dead_of_2 > 0.7
    some = resampled_moments([[0.0, 0.0, 0.5, 1.0]] * 6, (2, 4, 8), rng, num_draws=60).dead
    assert np.all(np.diff(some, axis=1) <= 0)  # though 8 of these four, with replacement, may be equal
    assert dead_of_64 < 0.7  # a prompt with four equal rewards has another one in 64 with a fair chance


def simulated_signal(
    size: int, rates: np.ndarray, contrast: float, agreement: float, rng: np.random.Generator
) -> float:
    """The squared length of the common part in the mean update of a prompt, over its variance, a completion; any unit.

    Groups are drawn, advantages divided by the group's deviation, and gradients added up, as a run does.
    """
    dimension, prompts = 24, 30_000
    common = np.zeros(dimension)
    common[0] = 1.0
    own = rng.normal(size=(prompts, dimension))
    own[:, 0] = 0.0
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    beta_j = math.sqrt(contrast) * (math.sqrt(agreement) * common + math.sqrt(1 - agreement) * own)
    r = (rng.random((prompts, size)) < rng.choice(rates, size=(prompts, 1))).astype(float)
    std = r.std(axis=1, keepdims=True)
    advantage = np.divide(r - r.mean(axis=1, keepdims=True), std, out=np.zeros_like(r), where=std > 0)
    noise = rng.normal(size=(prompts, dimension)) * np.sqrt((advantage**2).sum(axis=1, keepdims=True) / dimension)
    update = (advantage * r).sum(axis=1, keepdims=True) * beta_j / size + noise / size
    mean = update.mean(axis=0)
    variance = np.sum(update.var(axis=0))
    return float(mean[0] ** 2 / variance / size)


@pytest.mark.parametrize(
    ("contrast", "agreement", "low", "high"),
    [(0.0025, 0.2, 32, 64), (0.5, 0.2, 4, 8), (20.0, 0.2, 2, 4)],
)
def test_the_signal_is_that_of_a_simulated_step_and_so_is_its_best_size(
    contrast: float, agreement: float, low: int, high: int
) -> None:
    rng = np.random.default_rng(0)
    sizes = (2, 4, 8, 16, 32, 64)
    rates = np.array([0.05, 0.3, 0.5, 0.7, 1.0])
    moments = GroupMoments(
        sizes=sizes,
        dead=np.array([[np.mean(rates**g + (1 - rates) ** g) for g in sizes]]),
        std=np.array([[expected_std(rates, g).mean() for g in sizes]]),
        square=np.array([[np.mean((g - 1) / g * rates * (1 - rates)) for g in sizes]]),
    )
    found = signal(moments, np.array([contrast]), np.array([agreement]))[0]
    true = np.array([simulated_signal(g, rates, contrast, agreement, rng) for g in sizes])
    np.testing.assert_allclose(found / found.max(), true / (contrast * agreement) / found.max(), rtol=0.25, atol=0.03)
    assert low <= sizes[int(np.argmax(found))] <= high
    assert true[int(np.argmax(found))] >= 0.85 * true.max()


@pytest.mark.parametrize(("contrast", "agreement"), [(0.05, 0.5), (0.4, 1.0), (0.4, 0.0)])
def test_contrast_and_agreement_are_found_in_gradients(contrast: float, agreement: float) -> None:
    rng = np.random.default_rng(0)
    dimension, noise = 400, 5.0
    common = rng.normal(size=dimension)
    common /= np.linalg.norm(common)
    estimates = []
    for _ in range(12):
        sketches, rewards = [], []
        for _ in range(12):
            own = rng.normal(size=dimension)
            own -= common * (own @ common)
            own /= np.linalg.norm(own)
            size = math.sqrt(contrast * noise)
            beta_j = size * (math.sqrt(agreement) * common + math.sqrt(1 - agreement) * own)
            r = (rng.random(16) < rng.uniform(0.2, 0.8)).astype(float)
            s = r[:, None] * beta_j + rng.normal(size=(16, dimension)) * math.sqrt(noise / dimension) + 3.0
            sketches.append([torch.tensor(row) for row in s])
            rewards.append(r.tolist())
        found = contrasts(sketches, rewards)
        assert found is not None
        draws = found.draws(rng, 100)
        estimates.append([draw.mean() for draw in draws])
    c, rho = np.mean(estimates, axis=0)
    assert c == pytest.approx(contrast, abs=0.25 * contrast + 0.01)
    assert rho == pytest.approx(agreement, abs=0.15)


def test_prompts_of_equal_rewards_have_no_contrast() -> None:
    sketches = [[torch.ones(4)] * 4] * 3
    assert contrasts(sketches, [[1.0] * 4, [0.0] * 4, [0.0, 1.0, 0.0, 1.0]]) is None


def test_a_sketch_keeps_scalar_products() -> None:
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(300, 70, generator=generator), torch.randn(501, generator=generator)]
    second = [one + 0.5 * torch.randn(one.shape, generator=generator) for one in first]
    true = sum(float((a * b).sum()) for a, b in zip(first, second, strict=True))
    assert float(sketch(first, 4096) @ sketch(second, 4096)) == pytest.approx(true, rel=0.1)


def test_the_gradient_is_that_of_the_completion_s_log_probability(tiny_model_dir) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.requires_grad_(False)
    weight = model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    model.train()
    prompt, completion = [5, 6, 7], [8, 9]
    found = completion_sketch(model, prompt, completion, temperature=0.7)
    assert model.training
    assert weight.grad is None
    logits = model(torch.tensor([prompt + completion])).logits[0] / 0.7
    total = sum(torch.log_softmax(logits[2 + i], -1)[token] for i, token in enumerate(completion))
    total.backward()
    torch.testing.assert_close(found, sketch([weight.grad]))


@pytest.mark.parametrize(
    ("lengths", "ended", "found"),
    [
        (range(1, 101), [True] * 100, 95),
        ([*range(1, 97), 96, 96, 96, 96], [True] * 96 + [False] * 4, 95),
        ([10] * 90 + [16] * 10, [True] * 90 + [False] * 10, None),  # more than 5 % were cut: nobody knows
        # one was cut at 5, where nobody else had ended: of the 20 others 19 ended by 19
        ([5, *range(1, 21)], [False] + [True] * 20, 20),
        ([4], [False], None),
    ],
)
def test_the_length_that_ends_95_percent(lengths, ended: list[bool], found: int | None) -> None:
    assert length_that_ends(list(lengths), ended, 0.95) == found
