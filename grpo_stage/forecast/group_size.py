r"""What a group of G completions is worth, for each G, from k samples of each of n prompts.

A prompt whose completions are right with probability p gives a group of which m ~ Binomial(G, p) are right. Then

    dead share      D(p)    = p^G + (1-p)^G, the groups that DAPO samples again (arXiv:2503.14476)
    size of update  sd      = sqrt(m (G-m)) / G, the group's standard deviation (arXiv:2607.00152)
    its mean        E sd    = sum_m C(G,m) p^m (1-p)^(G-m) sqrt(m (G-m)) / G
    its square      E sd^2  = (G-1)/G p (1-p), which the gradient's variance is made of (VIP, arXiv:2602.01601)

The share x/k of the samples that are right is a poor stand-in for p: of a prompt with p = .05, 16 samples are all
wrong in 44 % of cases, and 0^G + 1^G = 1 would call it dead for ever. So rates have a distribution over prompts with a
posterior given all the counts, and each prompt's rate has a posterior given that and its own count. The distribution
is a Beta, with a share of prompts at 0 and one at 1 beside it: prompts that no sampling answers, and ones that all do.

Draws: R draws from the posterior. In each, prompts are also weighed anew (Bayesian bootstrap, Rubin 1981), since other
prompts could have been chosen: quantiles over the draws are intervals for the prompts' population.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]

SIZES = (2, 4, 8, 16, 32, 64)
NUM_DRAWS = 500
NUM_RESAMPLED = 200
"""Groups of each size that are drawn for each prompt where rewards are not binary."""
_MEANS = 50
_CONCENTRATIONS = np.geomspace(0.1, 300.0, 24)
"""Of the Beta distribution, a + b: from rates that are nearly all 0 or 1, to rates that are nearly the same."""
_SHARES = np.r_[0.0, 0.03, 0.1:0.95:0.1]
"""Of the prompts whose rate is 0, and of those whose rate is 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMoments:
    """Means over prompts for each group size; all [R, S]."""

    sizes: tuple[int, ...]
    """[S]."""
    dead: Array
    """Share of groups whose rewards are all equal."""
    std: Array
    """Mean of the group's standard deviation (population form), in units of the reward."""
    square: Array
    """Mean of its square."""


def binary_moments(
    num_right: Sequence[int],
    num_samples: Sequence[int],
    sizes: Sequence[int],
    rng: np.random.Generator,
    num_draws: int = NUM_DRAWS,
) -> GroupMoments:
    """The moments where a reward has two values, taken as 0 and 1.

    Args:
        num_right: [n], of each prompt's samples.
        num_samples: [n], each at least 1.
        sizes: [S] group sizes.
        rng: of the draws.
        num_draws: R.

    Raises:
        ValueError: if there is no prompt, or a prompt without samples.
    """
    x, k = np.asarray(num_right, dtype=float), np.asarray(num_samples, dtype=float)
    if x.size == 0 or np.any(k < 1):
        raise ValueError("There has to be a prompt, and each needs at least one sample.")
    rates = rate_draws(x, k, rng, num_draws)
    weights = prompt_weights(len(x), num_draws, rng)
    dead, std, square = [], [], []
    for size in sizes:
        dead.append(np.sum(weights * (rates**size + (1 - rates) ** size), axis=1))
        std.append(np.sum(weights * expected_std(rates, size), axis=1))
        square.append(np.sum(weights * (size - 1) / size * rates * (1 - rates), axis=1))
    return GroupMoments(
        sizes=tuple(sizes), dead=np.clip(np.stack(dead, 1), 0.0, 1.0), std=np.stack(std, 1), square=np.stack(square, 1)
    )


def expected_std(rates: Array, size: int) -> Array:
    """E sd_G for each rate."""
    from scipy.special import gammaln, xlog1py, xlogy

    total = np.zeros_like(rates)
    for m in range(1, size):
        log_ways = gammaln(size + 1) - gammaln(m + 1) - gammaln(size - m + 1)
        probability = np.exp(log_ways + xlogy(m, rates) + xlog1py(size - m, -rates))
        total += probability * np.sqrt(m * (size - m)) / size
    return total


def rate_draws(x: Array, k: Array, rng: np.random.Generator, num_draws: int) -> Array:
    """[R, n] draws of the prompts' rates, given all the counts.

    The prior of the distribution over prompts: for the Beta's mean Jeffreys', for a + b even over its logarithm; for
    the shares at 0 and at 1 one half for none, the rest spread evenly. A maximum instead of a posterior would put all
    rates at 0 where all samples are wrong, with certainty.
    """
    from scipy.special import betaln

    angles = (np.arange(_MEANS) + 0.5) / _MEANS * np.pi / 2
    mean, concentration = np.meshgrid(np.sin(angles) ** 2, _CONCENTRATIONS, indexing="ij")
    a, b = (mean * concentration).ravel(), ((1 - mean) * concentration).ravel()
    at_0, at_1 = (one.ravel() for one in np.meshgrid(_SHARES, _SHARES, indexing="ij"))
    is_possible = at_0 + at_1 < 0.99
    at_0, at_1 = at_0[is_possible, None], at_1[is_possible, None]
    prior = np.where(at_0 == 0, 1.0, 1 / (len(_SHARES) - 1)) * np.where(at_1 == 0, 1.0, 1 / (len(_SHARES) - 1))
    logs = np.log(prior) + np.zeros_like(a)  # [shares, Beta]
    with np.errstate(divide="ignore"):
        for (right, of), count in zip(*np.unique(np.stack([x, k], 1), axis=0, return_counts=True), strict=True):
            inner = (1 - at_0 - at_1) * np.exp(betaln(a + right, b + of - right) - betaln(a, b))
            logs += count * np.log(inner + at_0 * (right == 0) + at_1 * (right == of))
    posterior = np.exp(logs - logs.max())
    chosen = rng.choice(posterior.size, size=num_draws, p=posterior.ravel() / posterior.sum())
    share, beta = np.unravel_index(chosen, posterior.shape)
    a, b, at_0, at_1 = (one[:, None] for one in (a[beta], b[beta], at_0[share, 0], at_1[share, 0]))
    inner = (1 - at_0 - at_1) * np.exp(betaln(a + x, b + k - x) - betaln(a, b))  # [R, n]
    end = at_0 * (x == 0) + at_1 * (x == k)
    is_inner = rng.random(inner.shape) * (inner + end) < inner
    return np.where(is_inner, rng.beta(a + x, b + k - x), (x > 0).astype(float))


def prompt_weights(num_prompts: int, num_draws: int, rng: np.random.Generator) -> Array:
    """[R, n], each row adding up to 1: the Bayesian bootstrap over prompts."""
    return rng.dirichlet(np.ones(num_prompts), size=num_draws)


def resampled_moments(
    rewards: Sequence[Sequence[float]],
    sizes: Sequence[int],
    rng: np.random.Generator,
    num_draws: int = NUM_DRAWS,
) -> GroupMoments:
    """The moments of rewards with any values, from groups that are drawn out of each prompt's samples.

    A group of at most k is drawn without replacement: its moments are unbiased. A larger one is drawn with
    replacement, which makes its variance (k-1)/k of the true one in the mean: deviations are divided by the root of
    that. And such a group would never have a reward that the samples lack, so that a prompt with k equal rewards would
    be dead for ever: there each completion is another one as often as one sample differs where all others are equal.

    Args:
        rewards: [n] prompts, each with at least 2 samples.
        sizes: [S] group sizes, ascending.
        rng: of the draws.
        num_draws: R.

    Raises:
        ValueError: if there is no prompt, or one with fewer than 2 samples.
    """
    if not rewards or any(len(of) < 2 for of in rewards):
        raise ValueError("There has to be a prompt, and each needs at least two samples.")
    pool = np.concatenate([np.asarray(of, dtype=float) for of in rewards])
    change = _change_of_equals(rewards)
    moments = np.zeros((3, len(rewards), len(sizes)))
    for i, of in enumerate(rewards):
        values = np.asarray(of, dtype=float)
        count = len(values)
        for j, size in enumerate(sizes):
            correction = 1.0
            if size <= count:
                order = np.argsort(rng.random((NUM_RESAMPLED, count)), axis=1)
                groups = values[order[:, :size]]
            else:
                correction = count / (count - 1)
                groups = rng.choice(values, size=(NUM_RESAMPLED, size))
                if np.all(values == values[0]):
                    is_changed = rng.random(groups.shape) < change
                    groups = np.where(is_changed, rng.choice(pool, size=groups.shape), groups)
            variance = groups.var(axis=1) * correction
            is_dead = groups.max(axis=1) == groups.min(axis=1)
            moments[:, i, j] = is_dead.mean(), np.sqrt(variance).mean(), variance.mean()
    weights = prompt_weights(len(rewards), num_draws, rng)
    dead, std, square = (weights @ one for one in moments)
    # A larger group is never dead more often, while one drawn with replacement has fewer different rewards.
    dead = np.minimum.accumulate(np.clip(dead, 0.0, 1.0), axis=1)
    return GroupMoments(sizes=tuple(sizes), dead=dead, std=std, square=square)


def _change_of_equals(rewards: Sequence[Sequence[float]]) -> float:
    """How often a sample differs from all the others of its prompt, where these are equal.

    Where it never does, half a case is taken.
    """
    num_cases = num_differing = 0
    for of in rewards:
        counts = np.sort(np.unique(np.asarray(of), return_counts=True)[1])
        if len(counts) == 1:
            num_cases += len(of)
        elif len(counts) == 2 and counts[0] == 1:
            differing = 2 if len(of) == 2 else 1  # of two samples either is the one that differs
            num_cases, num_differing = num_cases + differing, num_differing + differing
    return max(num_differing, 0.5) / max(num_cases, 1)


def signal(moments: GroupMoments, contrast: Array, agreement: Array) -> Array:
    r"""The signal of a step's gradient for each group size at an equal number of completions: [R, S], any unit.

    A group's update is the mean of A_i s_i over its completions, s_i the gradient of log pi, A_i = (r_i - mean) / sd.
    With s_i = r_i beta_j + noise for prompt j, it is sd beta_j + noise of variance tau / G if the group is not dead,
    and 0 if it is. A step of B completions averages B / G groups. Of the prompts' contrasts beta_j a part is common to
    all prompts; that part is what training on other prompts improves. Its square in the mean update, over the variance
    of the update, is per completion

        (E sd)^2 / [ (1 - D) + contrast G (E sd^2 - agreement (E sd)^2) ]    x  agreement contrast

        contrast = |beta_j|^2 / tau,  agreement = |common part|^2 / |beta_j|^2

    Large groups estimate each prompt's baseline better and are seldom dead; with small ones a step sees more prompts.
    Where contrast is 0 the second term is gone, and the signal grows with G about as (G - 1) / G does: what VIP's
    variances of RLOO and Dr. GRPO (arXiv:2602.01601) say of a fixed set of prompts.

    Args:
        moments: of the rewards.
        contrast: [R], at least 0.
        agreement: [R], in [0, 1].
    """
    sizes = np.asarray(moments.sizes, dtype=float)
    c, rho = contrast[:, None], agreement[:, None]
    between = c * sizes * np.maximum(moments.square - rho * moments.std**2, 0.0)
    noise = 1.0 - moments.dead + between
    return np.divide(moments.std**2, noise, out=np.zeros_like(noise), where=noise > 0)


def interval(draws: Array, confidence: float = 0.95) -> tuple[float, float, float]:
    """The mean of draws, and the ends of their central interval."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(np.mean(draws)), float(low), float(high)


def length_that_ends(lengths: Sequence[int], has_ended: Sequence[bool], share: float) -> int | None:
    """The number of tokens within which `share` of the completions end; None where too few have ended to tell.

    Truncated completions say only that they are longer than they are: Kaplan and Meier's estimate (1958).

    Args:
        lengths: of the completions.
        has_ended: whether each ended by itself.
        share: in (0, 1].
    """
    length, ended = np.asarray(lengths), np.asarray(has_ended)
    running = 1.0
    for tokens in np.unique(length[ended]):
        running *= 1.0 - np.sum(ended & (length == tokens)) / np.sum(length >= tokens)
        if 1.0 - running >= share - 1e-12:
            return int(tokens)
    return None
