"""How far a log-ratio counts before its exponential leaves the range of its dtype."""

import math

import torch


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
