"""The clipped surrogate, and how token losses are averaged.

A loss is `sum(weights * token_losses)` over every micro-batch of the optimizer step, on every rank. All averaging is
in the weights, whose denominators are counted over the whole step, so the gradient cannot depend on how the same
completions are split over micro-batches, accumulation steps or ranks.

    B completions    T completion tokens, right-padded
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SurrogateOutput:
    """What the surrogate says of each token, all [B, T]."""

    token_losses: torch.Tensor
    ratios: torch.Tensor
    clipped_low: torch.Tensor
    """bool: the lower bound cut the gradient (negative advantage, ratio under 1 - epsilon)."""
    clipped_high: torch.Tensor
    """bool: the upper bound cut the gradient (positive advantage, ratio over 1 + epsilon_high)."""


def clipped_surrogate(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    epsilon: float,
    epsilon_high: float,
) -> SurrogateOutput:
    r"""PPO's clipped objective for each token, negated.

    .. math:: -\min(\rho_t A,\ clip(\rho_t, 1 - \epsilon, 1 + \epsilon_{high}) A),\quad
              \rho_t = \pi_\theta(o_t) / \pi_{old}(o_t)

    DeepSeekMath (arXiv:2402.03300, equation 3) with one epsilon; DAPO (arXiv:2503.14476, "Clip-Higher") decouples the
    upper one.

    Args:
        policy_logprobs: [B, T], with gradient.
        old_logprobs: [B, T] of the policy at the start of the update, without gradient. On-policy it is
            `policy_logprobs.detach()`: the ratio is then exactly 1 and the gradient REINFORCE's.
        advantages: [B].
        epsilon: lower clip range.
        epsilon_high: upper clip range.
    """
    ratios = torch.exp(policy_logprobs - old_logprobs)  # [B, T]
    advantages = advantages.unsqueeze(1)  # [B, 1]
    clipped = ratios.clamp(1 - epsilon, 1 + epsilon_high)
    return SurrogateOutput(
        token_losses=-torch.minimum(ratios * advantages, clipped * advantages),
        ratios=ratios,
        clipped_low=(ratios < 1 - epsilon) & (advantages < 0),
        clipped_high=(ratios > 1 + epsilon_high) & (advantages > 0),
    )


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Counts over all micro-batches and all ranks of one optimizer step, of the completions that the loss uses."""

    num_completions: int
    num_tokens: int
    max_completion_length: int
    """The setting (`max_new_tokens`), not the longest completion seen."""


def _grpo(lengths: torch.Tensor, totals: StepTotals) -> torch.Tensor:
    return 1.0 / (totals.num_completions * lengths)


def _dapo(lengths: torch.Tensor, totals: StepTotals) -> torch.Tensor:
    return torch.full_like(lengths, 1.0 / totals.num_tokens)


def _dr_grpo(lengths: torch.Tensor, totals: StepTotals) -> torch.Tensor:
    return torch.full_like(lengths, 1.0 / (totals.num_completions * totals.max_completion_length))


LOSS_AVERAGES: dict[str, Callable[[torch.Tensor, StepTotals], torch.Tensor]] = {
    "grpo": _grpo,
    "dapo": _dapo,
    "bnpo": _dapo,
    "dr_grpo": _dr_grpo,
}


def token_weights(mask: torch.Tensor, totals: StepTotals, loss_type: str) -> torch.Tensor:
    r"""The weight of each token's loss in the step's loss.

    ========= ======================================== ===================================================
    grpo      1 / (completions x own length)           mean over tokens, then completions (DeepSeekMath, eq. 3)
    dapo      1 / tokens of the step                   mean over all tokens (DAPO, eq. 8)
    bnpo      as dapo                                  TRL averages over the local micro-batch instead
    dr_grpo   1 / (completions x max_new_tokens)       a constant, so that length has no say (Dr. GRPO)
    ========= ======================================== ===================================================

    Args:
        mask: [B, T], 1 on the tokens that the loss uses; a completion left out of the loss is a row of zeros and
            counts in no denominator.
        totals: counts over the whole optimizer step.
        loss_type: a key of `LOSS_AVERAGES`.

    Returns:
        [B, T]; with "grpo" and "dapo" the weights of a whole step sum to 1.

    Raises:
        ValueError: if `loss_type` is unknown.
    """
    if loss_type not in LOSS_AVERAGES:
        raise ValueError(f"loss_type is {loss_type!r}; it is one of {', '.join(LOSS_AVERAGES)}.")
    if totals.num_tokens == 0:  # every completion was left out: nothing to weigh
        return torch.zeros_like(mask)
    mask = mask.to(torch.get_default_dtype()) if not mask.is_floating_point() else mask
    lengths = mask.sum(dim=1).clamp(min=1)  # [B]
    return mask * LOSS_AVERAGES[loss_type](lengths, totals).unsqueeze(1)
