"""Estimators of the KL divergence between the policy and the reference, from the sampled tokens alone."""

import torch


def k3(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    r"""Per-token estimate of KL(policy || reference): unbiased, never negative, of low variance.

    .. math:: \frac{\pi_{ref}}{\pi_\theta} - \log\frac{\pi_{ref}}{\pi_\theta} - 1

    GRPO's own estimator (DeepSeekMath, arXiv:2402.03300, equation 4; Schulman, "Approximating KL divergence", 2020).
    ms-swift and verl clamp the log-ratio to [-20, 20] and the result to 10; TRL and this function do not: a ratio that
    large is a fault to be seen.

    Args:
        policy_logprobs: log-probabilities under the policy, any shape; the gradient flows through them.
        ref_logprobs: log-probabilities under the reference, same shape.

    Returns:
        The estimate, same shape.
    """
    log_ratio = ref_logprobs - policy_logprobs
    return torch.expm1(log_ratio) - log_ratio
