"""The surrogates, and the table that makes a `loss_type` of one of them and a way to average (`averages`).

B completions    T completion tokens, right-padded
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from grpo_stage.algorithm.ratios import bounded, importance_ratios, mean_over_tokens


KL_EPS = 1e-8
"""Added to the probability of all other tokens before its logarithm is taken; verl's and Stable-RL's constant."""


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
    gates: torch.Tensor | None = None
    """What a soft weight leaves of a token's gradient, 1 at ratio 1; None where the loss has none."""


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
        advantages: [B], or [B, T] where each token has its own.
        epsilon: lower clip range.
        epsilon_high: upper clip range.
        delta: above 1 + epsilon_high; None for no bound.
        mask: [B, T], see `importance_ratios`.
        level: whose ratio, see `importance_ratios`.
    """
    ratios = importance_ratios(policy_logprobs, old_logprobs, mask, level)  # [B, T]
    advantages = _by_token(advantages)
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
        advantages: [B] or [B, T].
        epsilon_high: the bound is 1 + epsilon_high.

    Returns:
        `clipped_high` marks the bounded weights, of either sign of the advantage; nothing is clipped low.
    """
    ratios = importance_ratios(policy_logprobs, old_logprobs).detach()  # [B, T]
    weights = ratios.clamp(max=1 + epsilon_high)
    return SurrogateOutput(
        token_losses=-weights * _by_token(advantages) * policy_logprobs,
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
        advantages: [B] or [B, T].
        temperature_pos: above 0.
        temperature_neg: above 0.

    Returns:
        Nothing counts as clipped.
    """
    ratios = importance_ratios(policy_logprobs, old_logprobs)  # [B, T]
    advantages = _by_token(advantages)
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
    ratios = torch.exp(bounded(mean_over_tokens(kept, mask))).expand_as(log_ratios)
    return SurrogateOutput(
        token_losses=-ratios * advantages,
        ratios=ratios,
        clipped_low=(log_ratios < -epsilon) & (advantages < 0),
        clipped_high=(log_ratios > epsilon_high) & (advantages > 0),
    )


def vespo_surrogate(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
) -> SurrogateOutput:
    r"""REINFORCE with a gate for the whole completion: both a large and a small ratio fade its gradient.

    .. math:: -sg[\phi(W)]\ A \log \pi_\theta(o_t),\quad \phi(W) = W^k e^{\lambda (1 - W)},\quad
              W = \prod_t \rho_t

    VESPO (arXiv:2602.10693), with k and lambda by the sign of A: 2 and 3 for A >= 0, 3 and 2 below, in the authors'
    code and in TRL 1.x. The gate is 1 at W = 1 and highest at W = k / lambda. W is the product of the ratios, not
    their geometric mean: long completions far from the policy fade altogether. Both multiply W with the weights of a
    correction, which is refused here. Both clamp log W to [-18.4, 20], and its terms to 20
    in size; here the gate is computed from its logarithm, which needs no bound.

    Args:
        policy_logprobs: [B, T], with gradient.
        old_logprobs: [B, T], without.
        advantages: [B].
        mask: [B, T], 1 on the tokens of a completion.
        k_pos: at least 0, of completions with an advantage of 0 or more.
        lambda_pos: above 0, of the same.
        k_neg: at least 0, of the others.
        lambda_neg: above 0, of the others.

    Returns:
        `ratios` are W and `gates` phi(W), the same for each token of a completion; nothing counts as clipped.
    """
    log_ratios = (policy_logprobs.detach() - old_logprobs) * mask  # [B, T]
    log_w = log_ratios.sum(dim=1, keepdim=True)  # [B, 1]
    w = torch.exp(bounded(log_w))
    advantages = advantages.unsqueeze(1)  # [B, 1]
    k = torch.full_like(w, k_pos).masked_fill(advantages < 0, k_neg)
    decay = torch.full_like(w, lambda_pos).masked_fill(advantages < 0, lambda_neg)
    gates = torch.exp(decay + k * log_w - decay * w).expand_as(policy_logprobs)
    never = torch.zeros_like(policy_logprobs, dtype=torch.bool)
    return SurrogateOutput(
        token_losses=-gates * advantages * policy_logprobs,
        ratios=w.expand_as(policy_logprobs),
        clipped_low=never,
        clipped_high=never,
        gates=gates,
    )


def total_variation(policy_logprobs: torch.Tensor, sampling_logprobs: torch.Tensor) -> torch.Tensor:
    r"""Total variation between two policies that tell the sampled token from all others, and no more.

    .. math:: |\pi_\theta(o_t) - \mu(o_t)|

    DPPO (arXiv:2602.04879), "Binary-TV": a lower bound of the total variation over the whole vocabulary.

    Args:
        policy_logprobs: any shape.
        sampling_logprobs: same shape.

    Returns:
        Same shape, from 0 to 1.
    """
    return (policy_logprobs.exp() - sampling_logprobs.exp()).abs()


def binary_kl(policy_logprobs: torch.Tensor, sampling_logprobs: torch.Tensor) -> torch.Tensor:
    r"""KL(sampling || policy) between two policies that tell the sampled token from all others, and no more.

    .. math:: \mu \log \frac{\mu}{\pi_\theta} + (1 - \mu) \log \frac{1 - \mu}{1 - \pi_\theta}

    DPPO (arXiv:2602.04879), "Binary-KL": a lower bound of the KL over the whole vocabulary. As in verl, 1e-8 is added
    to the probabilities of the others.

    Args:
        policy_logprobs: any shape.
        sampling_logprobs: same shape.

    Returns:
        Same shape, in nats.
    """
    others = [-torch.expm1(logprobs.clamp(max=0)) for logprobs in (policy_logprobs, sampling_logprobs)]
    apart = torch.log((others[1] + KL_EPS) / (others[0] + KL_EPS))
    return sampling_logprobs.exp() * (sampling_logprobs - policy_logprobs) + others[1] * apart


def divergence_masked_surrogate(
    policy_logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    epsilon: float,
    epsilon_high: float,
    *,
    ratio_max: float,
    divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> SurrogateOutput:
    r"""REINFORCE with importance weights, without the tokens that would leave a trust region of a divergence.

    .. math:: -sg[M_t \min(\frac{\pi_\theta}{\mu}, c)]\ A \log \pi_\theta(o_t),\quad
              M_t = 0 \text{ where } A > 0,\ \pi_\theta > \mu,\ D > \epsilon_{high}
              \text{ or } A < 0,\ \pi_\theta < \mu,\ D > \epsilon \text{, else } 1

    DPPO (arXiv:2602.04879). A ratio clip stops rare tokens early and frequent ones late; a divergence does neither.
    Both the trust region and the ratio are relative to the policy that sampled, mu, as in the authors' code
    (Stable-RL), which needs no correction of the rollout beside it; verl's functions take the trainer's own
    old log-probabilities. The bound c is 10 in Stable-RL; verl's functions fall back to 20, its configuration has 3
    and its script for DPPO 10000.

    Args:
        policy_logprobs: [B, T], with gradient.
        sampling_logprobs: [B, T], the engine's.
        advantages: [B] or [B, T].
        epsilon: bound of the divergence for tokens of negative advantage.
        epsilon_high: the same for positive ones. The authors' script in verl has 0.15 for `total_variation` and
            0.05 nats for `binary_kl`, on both sides.
        ratio_max: c.
        divergence: `total_variation` or `binary_kl`.

    Returns:
        `clipped_low` and `clipped_high` mark the tokens that are left out.
    """
    log_ratios = policy_logprobs.detach() - sampling_logprobs  # [B, T]
    advantages = _by_token(advantages)
    apart = divergence(policy_logprobs.detach(), sampling_logprobs)
    too_low = (advantages < 0) & (log_ratios < 0) & (apart > epsilon)
    too_high = (advantages > 0) & (log_ratios > 0) & (apart > epsilon_high)
    ratios = torch.exp(bounded(log_ratios))
    weights = ratios.clamp(max=ratio_max).masked_fill(too_low | too_high, 0.0)
    return SurrogateOutput(
        token_losses=-weights * advantages * policy_logprobs,
        ratios=ratios,
        clipped_low=too_low,
        clipped_high=too_high,
    )


def policy_gradient(
    policy_logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor
) -> SurrogateOutput:
    r"""REINFORCE as it stands, without a ratio.

    .. math:: -A \log \pi_\theta(o_t)

    GPG (arXiv:2504.02546). Right on-policy alone: nothing tells that a sample is another policy's. The paper's
    advantage is the reward minus the group's mean, undivided (`dr_grpo`), times alpha, all completions over those of
    groups whose rewards differ: what `mask_zero_std_groups` and `dynamic_sampling` make of the denominator, counted
    in tokens. verl's `gpg` counts rewards other than 0 for alpha instead.

    Args:
        policy_logprobs: [B, T], with gradient.
        old_logprobs: [B, T], for the metrics.
        advantages: [B] or [B, T].

    Returns:
        Nothing counts as clipped.
    """
    never = torch.zeros_like(policy_logprobs, dtype=torch.bool)
    return SurrogateOutput(
        token_losses=-_by_token(advantages) * policy_logprobs,
        ratios=importance_ratios(policy_logprobs, old_logprobs).detach(),
        clipped_low=never,
        clipped_high=never,
    )


def dro_surrogate(
    policy_logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, beta: float
) -> SurrogateOutput:
    r"""REINFORCE with a spring that holds each token to its old log-probability.

    .. math:: -A \log \pi_\theta(o_t) + \frac{\beta}{2} (\log \rho_t)^2

    Direct Reward Optimization (arXiv:2405.19107) without its value network, for each token, as verl's `dro` and
    Tinker's have it; Tinker's holds to the engine's log-probability. The gradient is 0 at log rho = A / beta: an
    advantage that is divided by a deviation moves that optimum, so that undivided ones are meant.

    Args:
        policy_logprobs: [B, T], with gradient.
        old_logprobs: [B, T], without.
        advantages: [B] or [B, T].
        beta: above 0.

    Returns:
        Nothing counts as clipped.
    """
    reinforce = policy_gradient(policy_logprobs, old_logprobs, advantages)
    spring = 0.5 * beta * (policy_logprobs - old_logprobs).square()
    return replace(reinforce, token_losses=reinforce.token_losses + spring)


def _by_token(advantages: torch.Tensor) -> torch.Tensor:
    """[B, 1] of completions, or [B, T] of tokens."""
    return advantages if advantages.dim() == 2 else advantages.unsqueeze(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """What of the recipe the surrogates look at."""

    epsilon: float
    epsilon_high: float
    delta: float | None = None
    importance_sampling_level: str = "token"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    dppo_ratio_max: float = 20.0
    dro_beta: float = 0.0

    @classmethod
    def of(cls, args: Any) -> "LossSettings":
        """Of arguments that have the fields by their names; an upper clip range that is None is the lower one."""
        given = {field.name: getattr(args, field.name) for field in fields(cls)}
        upper = args.epsilon if args.epsilon_high is None else args.epsilon_high
        return cls(**{**given, "epsilon_high": upper})


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """What a surrogate is computed from; shapes as in `clipped_surrogate`."""

    policy_logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    sampling_logprobs: torch.Tensor | None = None
    """[B, T], the engine's: what `dppo_tv` and `dppo_kl` compare with."""


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


def _luspo(x: TokenInputs, settings: LossSettings) -> SurrogateOutput:
    """GSPO with each completion's loss times its length (arXiv:2602.05261): the sum over its tokens."""
    return _clipped(x, replace(settings, importance_sampling_level="sequence"))


def _vespo(x: TokenInputs, settings: LossSettings) -> SurrogateOutput:
    return vespo_surrogate(
        x.policy_logprobs,
        x.old_logprobs,
        x.advantages,
        x.mask,
        k_pos=settings.vespo_k_pos,
        lambda_pos=settings.vespo_lambda_pos,
        k_neg=settings.vespo_k_neg,
        lambda_neg=settings.vespo_lambda_neg,
    )


def _dppo(
    x: TokenInputs, settings: LossSettings, divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> SurrogateOutput:
    if x.sampling_logprobs is None:
        raise ValueError("A divergence from the policy that sampled needs `sampling_logprobs`.")
    return divergence_masked_surrogate(
        x.policy_logprobs,
        x.sampling_logprobs,
        x.advantages,
        settings.epsilon,
        settings.epsilon_high,
        ratio_max=settings.dppo_ratio_max,
        divergence=divergence,
    )


def _gpg(x: TokenInputs, settings: LossSettings) -> SurrogateOutput:
    return policy_gradient(x.policy_logprobs, x.old_logprobs, x.advantages)


def _dro(x: TokenInputs, settings: LossSettings) -> SurrogateOutput:
    return dro_surrogate(x.policy_logprobs, x.old_logprobs, x.advantages, settings.dro_beta)


@dataclass(frozen=True, slots=True)
class Loss:
    """A `loss_type`; `catalog.LOSS_TYPES` has its other names, and the keys that it reads."""

    surrogate: Callable[[TokenInputs, LossSettings], SurrogateOutput]
    average: str
    """The average of its paper, a key of `averages.AVERAGES`."""


LOSSES: dict[str, Loss] = {
    "grpo": Loss(_clipped, "seq_mean_token_mean"),
    "dr_grpo": Loss(_clipped, "seq_mean_token_sum_norm"),
    "dapo": Loss(_clipped, "token_mean"),
    "cispo": Loss(_cispo, "token_mean"),
    "sapo": Loss(_sapo, "seq_mean_token_mean"),
    "gmpo": Loss(_gmpo, "seq_mean_token_mean"),
    "luspo": Loss(_luspo, "seq_mean_token_sum"),
    "vespo": Loss(_vespo, "token_mean"),
    "dppo_tv": Loss(partial(_dppo, divergence=total_variation), "token_mean"),
    "dppo_kl": Loss(partial(_dppo, divergence=binary_kl), "token_mean"),
    "gpg": Loss(_gpg, "token_mean"),
    "dro": Loss(_dro, "token_mean"),
}
