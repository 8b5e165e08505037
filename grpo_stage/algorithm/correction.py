"""Importance weights between the engine, which sampled, and the trainer, which learns.

The two compute the same policy with other kernels and precisions. What is sampled from the one and learned as the
other's is slightly off-policy, however fresh it is.

    B completions    T completion tokens, right-padded
"""

import math

import torch

from grpo_stage.algorithm.ratios import bounded


def importance_weights(
    old_logprobs: torch.Tensor, sampling_logprobs: torch.Tensor, mask: torch.Tensor, level: str
) -> torch.Tensor:
    r"""How much more probable the trainer finds what the engine sampled, before any bound.

    .. math:: token:\ w_t = \pi_{old}(o_t) / \pi_{sampling}(o_t),\quad sequence:\ w = \prod_t w_t

    Args:
        old_logprobs: [B, T], the trainer's own at the start of the update, without gradient.
        sampling_logprobs: [B, T], the engine's.
        mask: [B, T], 1 on the tokens of a completion.
        level: `token` or `sequence`.

    Returns:
        [B, T]; what stands outside of the mask is of no meaning.

    Raises:
        ValueError: if `level` is unknown.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"level is {level!r}; it is one of token, sequence.")
    log_ratios = (old_logprobs - sampling_logprobs) * mask  # [B, T]
    if level == "sequence":
        log_ratios = log_ratios.sum(dim=1, keepdim=True).expand_as(log_ratios)
    return torch.exp(bounded(log_ratios))


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
    if mode not in ("truncate", "mask"):
        raise ValueError(f"mode is {mode!r}; it is one of truncate, mask.")
    weights = importance_weights(old_logprobs, sampling_logprobs, mask, level)
    if mode == "truncate":
        return weights.clamp(lower, upper)
    return torch.where((weights >= lower) & (weights <= upper), weights, torch.zeros_like(weights))


def weight_totals(weights: torch.Tensor, mask: torch.Tensor, level: str) -> tuple[torch.Tensor, torch.Tensor]:
    r"""What a micro-batch adds to the mean of the step's correction weights: their sum and their number.

    .. math:: token:\ \sum_t w_t,\ \text{tokens};\quad sequence:\ \sum_i w_i,\ \text{completions}

    Sums over all micro-batches and all ranks of the optimizer step make the mean that `normalized_weights` divides
    by. verl's are over the micro-batch or, where it computes them before the update, the whole rollout.

    Args:
        weights: [B, T] of `correction_weights`, as they are used: truncated, or masked.
        mask: [B, T], 1 on the tokens that the loss uses.
        level: `token` or `sequence`, as in `correction_weights`.

    Returns:
        The sum and the count, of no dimension.

    Raises:
        ValueError: if `level` is unknown.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"level is {level!r}; it is one of token, sequence.")
    counted = mask if level == "token" else mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (weights * counted).sum(), counted.sum()


def normalized_weights(weights: torch.Tensor, total: float, count: float) -> torch.Tensor:
    r"""Correction weights divided by their mean, so that they change the sizes of gradients relative to each other.

    .. math:: w / (\frac{1}{N} \sum_{step} w)

    verl's `rollout_is_batch_normalize`: after the truncation, and not where the mean is 1e-8 or less.

    Args:
        weights: any shape.
        total: the sum over all micro-batches and ranks of the step, from `weight_totals`.
        count: their number, likewise.

    Returns:
        Same shape.
    """
    mean = total / count if count > 0 else 0.0
    return weights / mean if mean > 1e-8 else weights


def rejection_mask(
    old_logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    level: str,
    lower: float,
    upper: float,
) -> torch.Tensor:
    r"""Leaves out completions that the trainer finds far more, or far less, probable than the engine did.

    .. math:: M = 1 \text{ where } lower \leq r \leq upper \text{, else } 0,\quad
              sequence:\ r = \prod_t \frac{\pi_{old}(o_t)}{\pi_{sampling}(o_t)},\quad
              geometric:\ r = \Big(\prod_t \frac{\pi_{old}(o_t)}{\pi_{sampling}(o_t)}\Big)^{1 / |o|}

    verl's `rollout_rs`: `seq_sum_k1` is `sequence` and `seq_mean_k1` is `geometric`, which does not reject a
    completion for its length. verl compares the reversed ratio, engine over trainer, with its bounds: the same where
    they are each other's reciprocals. The completions that are kept weigh what they did.

    Args:
        old_logprobs: [B, T], the trainer's own at the start of the update, without gradient.
        sampling_logprobs: [B, T], the engine's.
        mask: [B, T], 1 on the tokens of a completion.
        level: `sequence` or `geometric`.
        lower: from 0 to 1.
        upper: at least 1.

    Returns:
        [B, 1], 1 for the completions that are kept.

    Raises:
        ValueError: if `level` is unknown.
    """
    if level not in ("sequence", "geometric"):
        raise ValueError(f"level is {level!r}; it is one of sequence, geometric.")
    log_ratios = ((old_logprobs - sampling_logprobs) * mask).sum(dim=1, keepdim=True)  # [B, 1]
    if level == "geometric":
        log_ratios = log_ratios / mask.sum(dim=1, keepdim=True).clamp(min=1)
    lowest = math.log(lower) if lower > 0 else -math.inf
    return ((log_ratios >= lowest) & (log_ratios <= math.log(upper))).to(mask.dtype)


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
