"""Importance ratios, and how far a log-ratio counts before its exponential leaves the range of its dtype.

B completions    T completion tokens, right-padded
"""

import math

import torch


LEVELS = ("token", "sequence", "sequence_token")
HEADROOM = 8.0
"""In nats. The largest ratio stays a factor of 2980 under the largest number: what it is multiplied with, advantages
and importance weights, does not make it infinite."""


def bounded(log_ratios: torch.Tensor) -> torch.Tensor:
    r"""Log-ratios that can be exponentiated in their dtype, with the gradient that they have without the bound.

    .. math:: \min(x, \log(max) - 8),\quad \text{derivative } 1 \text{ everywhere}

    exp(89) is infinite in float32. Where a clip ends the gradient, or an advantage of 0 or a mask the loss, autograd
    multiplies that infinity by 0 and gives NaN where 0 is right. With the bound (80.7 in float32, 701 in float64) it
    multiplies a finite number. The derivative does not end at the bound: a loss that does grow with the ratio (a
    negative advantage without `delta`) has a gradient of 1e35 there, whose norm is infinite, so that the step is
    skipped and said and not taken for one that has nothing to learn.

    Args:
        log_ratios: any shape, finite.

    Returns:
        Same shape.
    """
    limit = math.log(torch.finfo(log_ratios.dtype).max) - HEADROOM
    return log_ratios.clamp(max=limit).detach() + (log_ratios - log_ratios.detach())


def importance_ratios(
    policy_logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor | None = None, level: str = "token"
) -> torch.Tensor:
    r"""How much more probable the policy makes what was sampled, of each token or of the whole completion.

    .. math:: token:\ \rho_t = \pi_\theta(o_t) / \pi_{old}(o_t),\quad
              sequence:\ s = \exp(\frac{1}{|o|} \sum_t \log \rho_t),\quad
              sequence\_token:\ s_t = sg[s] \cdot \pi_\theta(o_t) / sg[\pi_\theta(o_t)]

    The sequence ratio is that of GSPO (arXiv:2507.18071), the geometric mean of its tokens'; GSPO-token has its value
    with each token's own gradient, so that tokens of a completion may be weighed differently. TRL and ms-swift give
    [B, 1] for a sequence, which broadcasts to the same.

    Args:
        policy_logprobs: [B, T], with gradient.
        old_logprobs: [B, T], without.
        mask: [B, T], 1 on the tokens of a completion; needed where the level is not `token`.
        level: one of `LEVELS`.

    Returns:
        [B, T].

    Raises:
        ValueError: if `level` is unknown, or the mask is missing where it is needed.
    """
    if level not in LEVELS:
        raise ValueError(f"importance_sampling_level is {level!r}; it is one of {', '.join(LEVELS)}.")
    if level == "token":
        return torch.exp(bounded(policy_logprobs - old_logprobs))
    if mask is None:
        raise ValueError(f"importance_sampling_level {level!r} is a mean over tokens, which needs their mask.")
    ratios = torch.exp(bounded(mean_over_tokens(policy_logprobs - old_logprobs, mask))).expand_as(policy_logprobs)
    if level == "sequence":
        return ratios
    return ratios.detach() * torch.exp(policy_logprobs - policy_logprobs.detach())


def mean_over_tokens(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, 1] of [B, T]; 0 where a completion has no token (a dummy)."""
    return (values * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
