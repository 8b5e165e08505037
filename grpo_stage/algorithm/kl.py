"""Estimators of the KL divergence between the policy and the reference, from the sampled tokens alone.

Their values and their gradients are different matters. In the loss, the gradient of the divergence is that of k2, or
of k1 and k3 times the ratio (`bias_corrected`); k3's own is the gradient of the reversed divergence, and k1's has a
mean of zero. In the reward, which passes no gradient, it is k1 that gives the divergence's (arXiv:2510.01555,
arXiv:2506.09477).
"""

from collections.abc import Callable

import torch

from grpo_stage.algorithm.ratios import bounded


def k1(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    r"""Per-token estimate of KL(policy || reference): unbiased, of high variance, and of either sign.

    .. math:: \log \pi_\theta - \log \pi_{ref}

    Schulman, "Approximating KL divergence" (2020).

    Args:
        policy_logprobs: log-probabilities under the policy, any shape.
        ref_logprobs: log-probabilities under the reference, same shape.

    Returns:
        The estimate, same shape.
    """
    return policy_logprobs - ref_logprobs


def k2(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    r"""Per-token estimate of KL(policy || reference): biased, never negative, with the divergence's own gradient.

    .. math:: \frac{1}{2} (\log \pi_\theta - \log \pi_{ref})^2

    Schulman, "Approximating KL divergence" (2020); verl calls it `mse`.

    Args:
        policy_logprobs: log-probabilities under the policy, any shape.
        ref_logprobs: log-probabilities under the reference, same shape.

    Returns:
        The estimate, same shape.
    """
    return 0.5 * (policy_logprobs - ref_logprobs).square()


def k3(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    r"""Per-token estimate of KL(policy || reference): unbiased, never negative, of low variance.

    .. math:: \frac{\pi_{ref}}{\pi_\theta} - \log\frac{\pi_{ref}}{\pi_\theta} - 1

    GRPO's own estimator (DeepSeekMath, arXiv:2402.03300, equation 4; Schulman, "Approximating KL divergence", 2020).
    ms-swift and verl clamp the log-ratio to [-20, 20] and the result to 10; TRL and this function do not: a ratio that
    large is a fault to be seen. Only what the dtype cannot hold is bounded (`ratios.bounded`).

    Args:
        policy_logprobs: log-probabilities under the policy, any shape; the gradient flows through them.
        ref_logprobs: log-probabilities under the reference, same shape.

    Returns:
        The estimate, same shape.
    """
    log_ratio = ref_logprobs - policy_logprobs
    return torch.expm1(bounded(log_ratio)) - log_ratio


KL_ESTIMATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def bias_corrected(kl: torch.Tensor, policy_logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
    r"""An estimate weighed by the ratio: in value and in gradient that of the present policy's divergence.

    .. math:: \frac{\pi_\theta}{\pi_{old}}\ k

    DeepSeek-V3.2 (arXiv:2512.02556) and TRL's `use_bias_correction_kl`, for k3; verl's `k3+` has k2's gradient
    instead. Of each token, also where the policy's ratio is that of a sequence.

    Args:
        kl: the estimate k1 or k3 of each token, with gradient.
        policy_logprobs: same shape, with gradient.
        old_logprobs: of the policy that sampled, same shape, without gradient.

    Returns:
        Same shape.
    """
    return torch.exp(bounded(policy_logprobs - old_logprobs)) * kl


def adapted_coefficient(coefficient: float, kl: float, target: float) -> float:
    r"""A coefficient that is raised while the divergence is over its target, and lowered while it is under it.

    .. math:: \beta (1 + 0.1\ clip(kl / target - 1, -0.2, 0.2))

    Ziegler et al. (arXiv:1909.08593), whose divergence is a whole completion's; here it is the `kl` that is logged,
    the mean over tokens. verl and OpenRLHF have the gain 0.1 follow from a horizon.

    Args:
        coefficient: the present one.
        kl: measured in the step that is over.
        target: above 0.
    """
    return coefficient * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))
