"""The surrogates, how token losses are averaged, and the table that makes a `loss_type` of the two.

A loss is `sum(weights * token_losses)` over every micro-batch of the optimizer step, on every rank. All averaging is
in the weights, whose denominators are counted over the whole step, so the gradient cannot depend on how the same
completions are split over micro-batches, accumulation steps or ranks.

    B completions    T completion tokens, right-padded
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from grpo_stage.algorithm.ratios import bounded


LEVELS = ("token", "sequence", "sequence_token")


@dataclass(frozen=True, slots=True)
class SurrogateOutput:
    """What the surrogate says of each token, all [B, T]."""

    token_losses: torch.Tensor
    ratios: torch.Tensor
    clipped_low: torch.Tensor
    """bool: the lower bound cut the gradient (negative advantage, ratio under 1 - epsilon)."""
    clipped_high: torch.Tensor
    """bool: the upper bound cut the gradient (positive advantage, ratio over 1 + epsilon_high)."""
    clipped_delta: torch.Tensor | None = None
    """bool: `delta` cut the gradient (negative advantage, ratio over delta); None without a delta."""


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
    ratios = torch.exp(bounded(_mean_over_tokens(policy_logprobs - old_logprobs, mask))).expand_as(policy_logprobs)
    if level == "sequence":
        return ratios
    return ratios.detach() * torch.exp(policy_logprobs - policy_logprobs.detach())


def clipped_surrogate(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    epsilon: float,
    epsilon_high: float,
    *,
    delta: float | None = None,
    mask: torch.Tensor | None = None,
    level: str = "token",
) -> SurrogateOutput:
    r"""PPO's clipped objective for each token, negated.

    .. math:: -\min(\min(\rho_t, \delta) A,\ clip(\rho_t, 1 - \epsilon, 1 + \epsilon_{high}) A)

    DeepSeekMath (arXiv:2402.03300, equation 3) with one epsilon; DAPO (arXiv:2503.14476, "Clip-Higher") decouples the
    upper one. `delta` bounds the ratio of a completion with a negative advantage, which PPO leaves unbounded above
    (dual clip, arXiv:1912.09729); verl, EasyR1 and OpenRLHF write it as a bound c A on the objective, with c = 3
    always on in verl: the same for c = delta. TRL's `delta` is this one.

    Args:
        policy_logprobs: [B, T], with gradient.
        old_logprobs: [B, T] of the policy at the start of the update, without gradient. On-policy it is
            `policy_logprobs.detach()`: the ratio is then exactly 1 and the gradient REINFORCE's.
        advantages: [B].
        epsilon: lower clip range.
        epsilon_high: upper clip range.
        delta: above 1 + epsilon_high; None for no bound.
        mask: [B, T], see `importance_ratios`.
        level: whose ratio, see `importance_ratios`.
    """
    ratios = importance_ratios(policy_logprobs, old_logprobs, mask, level)  # [B, T]
    advantages = advantages.unsqueeze(1)  # [B, 1]
    clipped = ratios.clamp(1 - epsilon, 1 + epsilon_high)
    bounded = ratios if delta is None else ratios.clamp(max=delta)
    return SurrogateOutput(
        token_losses=-torch.minimum(bounded * advantages, clipped * advantages),
        ratios=ratios,
        clipped_low=(ratios < 1 - epsilon) & (advantages < 0),
        clipped_high=(ratios > 1 + epsilon_high) & (advantages > 0),
        clipped_delta=None if delta is None else (ratios > delta) & (advantages < 0),
    )


def cispo_surrogate(
    policy_logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, epsilon_high: float
) -> SurrogateOutput:
    r"""REINFORCE with a bounded importance weight: no token loses its gradient, as a clipped one does.

    .. math:: -sg[\min(\rho_t, 1 + \epsilon_{high})]\ A \log \pi_\theta(o_t)

    CISPO (MiniMax-M1, arXiv:2506.13585), which bounds the weight from above alone. TRL and ms-swift take
    `epsilon_high` for the bound itself (their 5.0 is 4.0 here); EasyR1 bounds it from below as well.

    Args:
        policy_logprobs: [B, T], with gradient.
        old_logprobs: [B, T], without.
        advantages: [B].
        epsilon_high: the bound is 1 + epsilon_high.

    Returns:
        `clipped_high` marks the bounded weights, of either sign of the advantage; nothing is clipped low.
    """
    ratios = importance_ratios(policy_logprobs, old_logprobs).detach()  # [B, T]
    weights = ratios.clamp(max=1 + epsilon_high)
    return SurrogateOutput(
        token_losses=-weights * advantages.unsqueeze(1) * policy_logprobs,
        ratios=ratios,
        clipped_low=torch.zeros_like(ratios, dtype=torch.bool),
        clipped_high=ratios > 1 + epsilon_high,
    )


def sapo_surrogate(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    temperature_pos: float,
    temperature_neg: float,
) -> SurrogateOutput:
    r"""A soft gate in the place of the clip: the gradient fades as the ratio leaves 1, and never breaks off.

    .. math:: -\frac{4}{\tau} \sigma(\tau (\rho_t - 1)) A,\quad
              \tau = \tau_{pos} \text{ where } A > 0 \text{, else } \tau_{neg}

    SAPO (arXiv:2511.20347), whose temperatures are 1.0 and 1.05: a higher one fades faster. At ratio 1 the gradient is
    REINFORCE's. EasyR1 takes the positive temperature for an advantage of 0, where the loss is 0 either way.

    Args:
        policy_logprobs: [B, T], with gradient.
        old_logprobs: [B, T], without.
        advantages: [B].
        temperature_pos: above 0.
        temperature_neg: above 0.

    Returns:
        Nothing counts as clipped.
    """
    ratios = importance_ratios(policy_logprobs, old_logprobs)  # [B, T]
    advantages = advantages.unsqueeze(1)  # [B, 1]
    temperatures = torch.full_like(advantages, temperature_neg).masked_fill(advantages > 0, temperature_pos)
    gates = 4 / temperatures * torch.sigmoid(temperatures * (ratios - 1))
    never = torch.zeros_like(ratios, dtype=torch.bool)
    return SurrogateOutput(token_losses=-gates * advantages, ratios=ratios, clipped_low=never, clipped_high=never)


def gmpo_surrogate(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    epsilon: float,
    epsilon_high: float,
) -> SurrogateOutput:
    r"""The geometric mean of a completion's clipped ratios, which an outlier moves less than the arithmetic one.

    .. math:: -A \exp(\frac{1}{|o|} \sum_t \ell_t),\quad
              \ell_t = \min(\log \rho_t, \epsilon_{high}) \text{ where } A > 0 \text{, else }
              \max(\log \rho_t, -\epsilon)

    GMPO (arXiv:2507.20673), which clips each token, and the log of its ratio: the bounds are exp(-epsilon) and
    exp(epsilon_high), 0.4 each in the paper and in verl's `geo_mean`. Unlike GSPO's, the mean is taken after the clip.

    Args:
        policy_logprobs: [B, T], with gradient.
        old_logprobs: [B, T], without.
        advantages: [B].
        mask: [B, T], 1 on the tokens of a completion.
        epsilon: lower clip range of the log-ratio.
        epsilon_high: upper clip range of the log-ratio.
    """
    log_ratios = policy_logprobs - old_logprobs  # [B, T]
    advantages = advantages.unsqueeze(1)  # [B, 1]
    kept = torch.where(advantages > 0, log_ratios.clamp(max=epsilon_high), log_ratios.clamp(min=-epsilon))
    ratios = torch.exp(bounded(_mean_over_tokens(kept, mask))).expand_as(log_ratios)
    return SurrogateOutput(
        token_losses=-ratios * advantages,
        ratios=ratios,
        clipped_low=(log_ratios < -epsilon) & (advantages < 0),
        clipped_high=(log_ratios > epsilon_high) & (advantages > 0),
    )


def _mean_over_tokens(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, 1] of [B, T]; 0 where a completion has no token (a dummy)."""
    return (values * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Counts over all micro-batches and all ranks of one optimizer step, of the completions that the loss uses."""

    num_completions: int
    num_tokens: int
    max_completion_length: int
    """The setting (`max_new_tokens`), not the longest completion seen."""
    num_left_out: int = 0
    """Completions of the step that the loss does not use: `dr_grpo` alone counts them."""


def _over_completions(lengths: torch.Tensor, totals: StepTotals) -> torch.Tensor:
    return 1.0 / (totals.num_completions * lengths)


def _over_tokens(lengths: torch.Tensor, totals: StepTotals) -> torch.Tensor:
    return torch.full_like(lengths, 1.0 / totals.num_tokens)


def _over_constant(lengths: torch.Tensor, totals: StepTotals) -> torch.Tensor:
    num_sampled = totals.num_completions + totals.num_left_out
    return torch.full_like(lengths, 1.0 / (num_sampled * totals.max_completion_length))


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """What of the recipe the surrogates look at."""

    epsilon: float
    epsilon_high: float
    delta: float | None = None
    importance_sampling_level: str = "token"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """What a surrogate is computed from; shapes as in `clipped_surrogate`."""

    policy_logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor


def _clipped(x: TokenInputs, settings: LossSettings) -> SurrogateOutput:
    return clipped_surrogate(
        x.policy_logprobs,
        x.old_logprobs,
        x.advantages,
        settings.epsilon,
        settings.epsilon_high,
        delta=settings.delta,
        mask=x.mask,
        level=settings.importance_sampling_level,
    )


def _cispo(x: TokenInputs, settings: LossSettings) -> SurrogateOutput:
    return cispo_surrogate(x.policy_logprobs, x.old_logprobs, x.advantages, settings.epsilon_high)


def _sapo(x: TokenInputs, settings: LossSettings) -> SurrogateOutput:
    temperatures = settings.sapo_temperature_pos, settings.sapo_temperature_neg
    return sapo_surrogate(x.policy_logprobs, x.old_logprobs, x.advantages, *temperatures)


def _gmpo(x: TokenInputs, settings: LossSettings) -> SurrogateOutput:
    clip_range = settings.epsilon, settings.epsilon_high
    return gmpo_surrogate(x.policy_logprobs, x.old_logprobs, x.advantages, x.mask, *clip_range)


@dataclass(frozen=True, slots=True)
class Loss:
    """A `loss_type`; `catalog.LOSS_TYPES` has its other names, and the keys that it reads."""

    surrogate: Callable[[TokenInputs, LossSettings], SurrogateOutput]
    average: Callable[[torch.Tensor, StepTotals], torch.Tensor]
    """Lengths [B] and totals to the weight of a token of each completion [B]."""


LOSSES: dict[str, Loss] = {
    "grpo": Loss(_clipped, _over_completions),
    "dr_grpo": Loss(_clipped, _over_constant),
    "dapo": Loss(_clipped, _over_tokens),
    "cispo": Loss(_cispo, _over_tokens),
    "sapo": Loss(_sapo, _over_completions),
    "gmpo": Loss(_gmpo, _over_completions),
}


def token_weights(mask: torch.Tensor, totals: StepTotals, loss_type: str) -> torch.Tensor:
    r"""The weight of each token's loss in the step's loss.

    ======================= ================================== ====================================================
    grpo, sapo, gmpo        1 / (completions x own length)     mean over tokens, then completions (DeepSeekMath, eq. 3)
    dapo, cispo             1 / tokens of the step             mean over all tokens (DAPO, eq. 8)
    dr_grpo                 1 / (sampled x max_new_tokens)     a constant, so that length has no say (Dr. GRPO)
    ======================= ================================== ====================================================

    Args:
        mask: [B, T], 1 on the tokens that the loss uses; a completion left out of the loss is a row of zeros and
            counts in no denominator but that of "dr_grpo" (all completions that were sampled, as in TRL), which does
            not depend on how many are left out.
        totals: counts over the whole optimizer step.
        loss_type: a key of `LOSSES`.

    Returns:
        [B, T]; except with "dr_grpo" the weights of a whole step sum to 1.

    Raises:
        ValueError: if `loss_type` is unknown.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type is {loss_type!r}; it is one of {', '.join(LOSSES)}.")
    if totals.num_tokens == 0:  # every completion was left out: nothing to weigh
        return torch.zeros_like(mask)
    mask = mask.to(torch.get_default_dtype()) if not mask.is_floating_point() else mask
    lengths = mask.sum(dim=1).clamp(min=1)  # [B]
    return mask * LOSSES[loss_type].average(lengths, totals).unsqueeze(1)
