"""Remedies for a collapse of the policy's entropy: the tokens that it learns from, and what it is paid for doubt.

All statistics are over the tokens that are given: those of the whole optimizer step, over all ranks. None depends on
the order that they are given in.

    N tokens of the step that the loss uses
"""

import math

import torch


def highest_entropy_tokens(entropies: torch.Tensor, quantile: float) -> torch.Tensor:
    r"""The tokens at which the policy is least decided; the others are left out of the policy's loss.

    .. math:: H_t \geq \text{the } \lceil quantile \cdot N \rceil \text{-th highest}

    Wang et al., "Beyond the 80/20 rule" (arXiv:2506.01939), with a quantile of 0.2. TRL interpolates the threshold,
    over the micro-batches that the ranks have in hand.

    Args:
        entropies: [N], in nats.
        quantile: the share that is kept, above 0 and at most 1.

    Returns:
        [N] bool; more than the share where several are equal to the last one.
    """
    if len(entropies) == 0:
        return torch.zeros(0, dtype=torch.bool)
    kept = max(1, -int(-quantile * len(entropies) // 1))
    return entropies >= entropies.topk(kept).values[-1]


def token_covariances(logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    r"""How much learning from a token lowers the entropy.

    .. math:: (\log \pi_t - mean(\log \pi)) (A_t - mean(A))

    Cui et al., "The entropy mechanism of reinforcement learning" (arXiv:2505.22617): the change of the entropy is
    minus the covariance of both, which few tokens make up. verl takes the means over the local micro-batch.

    Args:
        logprobs: [N] under the present policy, without gradient.
        advantages: [N], each that of its completion.

    Returns:
        [N] float64.
    """
    # In float64, by sums that are rounded once: what is equal stays equal, whichever rank's tokens come first.
    centered = [
        values.double() - math.fsum(values.tolist()) / max(1, len(values)) for values in (logprobs, advantages)
    ]
    return centered[0] * centered[1]


def clip_cov_tokens(
    covariances: torch.Tensor, fraction: float, lower: float, upper: float, draws: torch.Tensor
) -> torch.Tensor:
    r"""Clip-Cov: tokens drawn from those of a high covariance, to be left out of the policy's loss.

    .. math:: \lceil fraction \cdot N \rceil \text{ of } \{t: lower \leq cov_t \leq upper\} \text{, or all of them}

    arXiv:2505.22617, with a fraction of 2e-4 and bounds of 1 and 5. verl rounds down to no less than 1, and draws from
    those alone that PPO's clip leaves.

    Args:
        covariances: [N].
        fraction: of all tokens.
        lower: of the covariance.
        upper: of the covariance.
        draws: [N] random numbers. Of the candidates those of the lowest are drawn; of equal ones the higher
            covariance.

    Returns:
        [N] bool.
    """
    candidates = ((covariances >= lower) & (covariances <= upper)).nonzero().squeeze(1)
    order = _order(draws[candidates], -covariances[candidates])
    drawn = candidates[order[: _number(fraction, len(covariances))]]
    return torch.zeros_like(covariances, dtype=torch.bool).index_fill(0, drawn, True)


def kl_cov_tokens(covariances: torch.Tensor, fraction: float, draws: torch.Tensor) -> torch.Tensor:
    r"""KL-Cov: the tokens of the highest covariances, to be held to where they were before the update.

    .. math:: \text{the } \lceil fraction \cdot N \rceil \text{ highest } cov_t

    arXiv:2505.22617, with a fraction of 2e-3 for 7B and 2e-4 for 32B, and a penalty of |log pi - log pi_old| on each.
    verl rounds down to no less than 1.

    Args:
        covariances: [N].
        fraction: of all tokens.
        draws: [N] random numbers. Of tokens of one covariance those of the lowest come first.

    Returns:
        [N] bool.
    """
    drawn = _order(-covariances, draws)[: _number(fraction, len(covariances))]
    return torch.zeros_like(covariances, dtype=torch.bool).index_fill(0, drawn, True)


def adapted_entropy_coefficient(
    coefficient: float, entropy: float, target: float, delta: float, highest: float
) -> float:
    r"""A coefficient of the entropy bonus that is raised while the entropy is under its target, and lowered over it.

    .. math:: clip(c + \Delta, 0, highest) \text{ where } H \leq target \text{, else } clip(c - \Delta, 0, highest)

    Skywork-OR1 (arXiv:2505.22312), which pays the bonus only in steps whose entropy is at most the target. TRL 1.16's
    `use_adaptive_entropy` is this one.

    Args:
        coefficient: the present one.
        entropy: measured in the step that is over, in nats a token.
        target: the same.
        delta: the step.
        highest: the bound.
    """
    return min(max(coefficient + (delta if entropy <= target else -delta), 0.0), highest)


def _order(*keys: torch.Tensor) -> torch.Tensor:
    """[N] places in the ascending order of the first key, of equal ones in that of the second."""
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order


def _number(fraction: float, of: int) -> int:
    return min(of, -int(-fraction * of // 1))
