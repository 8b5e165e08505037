"""Importance weights between the engine, which sampled, and the trainer, which learns.

The two compute the same policy with other kernels and precisions. What is sampled from the one and learned as the
other's is slightly off-policy, however fresh it is.

    B completions    T completion tokens, right-padded
"""

import torch

from grpo_stage.algorithm.ratios import bounded


def correction_weights(
    old_logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    level: str,
    mode: str,
    lower: float,
    upper: float,
) -> torch.Tensor:
    r"""What the policy's loss of each token is multiplied with.

    .. math:: token:\ w_t = \pi_{old}(o_t) / \pi_{sampling}(o_t),\quad sequence:\ w = \prod_t w_t

    Truncated to [lower, upper] (TIS, "Your efficient RL framework secretly brings you off-policy RL training", Yao et
    al. 2025), or set to 0 outside of it (masked). TRL 0.24 truncates tokens at 2.0; TRL 1.16's default masks sequences
    at 3.0; ms-swift and verl have it off by default. TRL weighs the policy's loss alone and adds the KL afterwards,
    ms-swift weighs the sum: here as in TRL.

    Args:
        old_logprobs: [B, T], the trainer's own at the start of the update, without gradient.
        sampling_logprobs: [B, T], the engine's.
        mask: [B, T], 1 on the tokens of a completion.
        level: `token` or `sequence`.
        mode: `truncate` or `mask`.
        lower: at most 1.
        upper: at least 1.

    Returns:
        [B, T]; what stands outside of the mask is of no meaning.

    Raises:
        ValueError: if `level` or `mode` is unknown.
    """
    if level not in ("token", "sequence") or mode not in ("truncate", "mask"):
        raise ValueError(f"level is {level!r}, one of token, sequence; mode is {mode!r}, one of truncate, mask.")
    log_ratios = (old_logprobs - sampling_logprobs) * mask  # [B, T]
    if level == "sequence":
        log_ratios = log_ratios.sum(dim=1, keepdim=True).expand_as(log_ratios)
    weights = torch.exp(bounded(log_ratios))
    if mode == "truncate":
        return weights.clamp(lower, upper)
    return torch.where((weights >= lower) & (weights <= upper), weights, torch.zeros_like(weights))


def off_policy_mask(
    policy_logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    r"""Leaves out completions that are bad and have become improbable: there is nothing to unlearn in them.

    .. math:: M = 0 \text{ where } A < 0 \text{ and }
              \frac{1}{|o|} \sum_t \log \frac{\pi_{sampling}(o_t)}{\pi_\theta(o_t)} > threshold \text{, else } 1

    DeepSeek-V3.2 (arXiv:2512.02556), off-policy sequence masking; TRL 1.16's `off_policy_mask_threshold`.

    Args:
        policy_logprobs: [B, T], without gradient.
        sampling_logprobs: [B, T], the engine's.
        advantages: [B].
        mask: [B, T], 1 on the tokens of a completion.
        threshold: in nats a token, above 0.

    Returns:
        [B, 1], 1 for the completions that are kept.
    """
    drift = ((sampling_logprobs - policy_logprobs) * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # [B]
    return 1.0 - ((advantages < 0) & (drift > threshold)).to(mask.dtype).unsqueeze(1)
