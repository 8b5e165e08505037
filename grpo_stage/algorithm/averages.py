"""The ways to average the losses of tokens over an optimizer step.

A loss is `sum(weights * token_losses)` over every micro-batch of the optimizer step, on every rank. All averaging is
in the weights, whose denominators are counted over the whole step, so the gradient cannot depend on how the same
completions are split over micro-batches, accumulation steps or ranks.

    B completions    T completion tokens, right-padded
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from grpo_stage.algorithm.losses import LOSSES


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Counts over all micro-batches and all ranks of one optimizer step, of the completions that the loss uses."""

    num_completions: int
    num_tokens: int
    max_completion_length: int
    """The setting (`max_new_tokens`), not the longest completion seen."""
    num_left_out: int = 0
    """Completions of the step that the loss does not use: `dr_grpo` alone counts them."""


def _token_mean(lengths: torch.Tensor, totals: StepTotals) -> torch.Tensor:
    return torch.full_like(lengths, 1.0 / totals.num_tokens)


def _token_sum(lengths: torch.Tensor, totals: StepTotals) -> torch.Tensor:
    return torch.ones_like(lengths)


def _seq_mean_token_mean(lengths: torch.Tensor, totals: StepTotals) -> torch.Tensor:
    return 1.0 / (totals.num_completions * lengths)


def _seq_mean_token_sum(lengths: torch.Tensor, totals: StepTotals) -> torch.Tensor:
    return torch.full_like(lengths, 1.0 / totals.num_completions)


def _seq_mean_token_sum_norm(lengths: torch.Tensor, totals: StepTotals) -> torch.Tensor:
    num_sampled = totals.num_completions + totals.num_left_out
    return torch.full_like(lengths, 1.0 / (num_sampled * totals.max_completion_length))


AVERAGES: dict[str, Callable[[torch.Tensor, StepTotals], torch.Tensor]] = {
    "token_mean": _token_mean,
    "token_sum": _token_sum,
    "seq_mean_token_mean": _seq_mean_token_mean,
    "seq_mean_token_sum": _seq_mean_token_sum,
    "seq_mean_token_sum_norm": _seq_mean_token_sum_norm,
}
"""`loss_aggregation` to a function of lengths [B] and totals, which gives the weight of a token of each completion
[B]. The names are those of verl's `loss_agg_mode`."""


def token_weights(mask: torch.Tensor, totals: StepTotals, loss_type: str, aggregation: str = "auto") -> torch.Tensor:
    r"""The weight of each token's loss in the step's loss.

    ======================= ============================== ========================================================
    token_mean              1 / tokens of the step         mean over all tokens (DAPO, eq. 8)
    token_sum               1                              sum over all tokens: it grows with the batch
    seq_mean_token_mean     1 / (completions x own length) mean over tokens, then completions (DeepSeekMath, eq. 3)
    seq_mean_token_sum      1 / completions                sum over tokens, mean over completions (LUSPO)
    seq_mean_token_sum_norm 1 / (sampled x max_new_tokens) a constant, so that length has no say (Dr. GRPO)
    ======================= ============================== ========================================================

    verl's `loss_agg_mode` has the same five. Its `seq-mean-token-sum-norm` divides by the padded length of the
    batch where no factor is given. TRL's bnpo averages over the local micro-batch; here it is dapo.

    Args:
        mask: [B, T], 1 on the tokens that the loss uses; a completion left out of the loss is a row of zeros and
            counts in no denominator but that of "seq_mean_token_sum_norm" (all completions that were sampled, as in
            TRL), which does not depend on how many are left out.
        totals: counts over the whole optimizer step.
        loss_type: a key of `LOSSES`.
        aggregation: a key of `AVERAGES`, or "auto" for that of the loss.

    Returns:
        [B, T]; those of a whole step sum to 1 where the average is a mean alone.

    Raises:
        ValueError: if `loss_type` or `aggregation` is unknown.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type is {loss_type!r}; it is one of {', '.join(LOSSES)}.")
    average = LOSSES[loss_type].average if aggregation == "auto" else aggregation
    if average not in AVERAGES:
        raise ValueError(f"loss_aggregation is {aggregation!r}; it is one of auto, {', '.join(AVERAGES)}.")
    if totals.num_tokens == 0:
        return mask  # zeros: every completion was left out
    mask = mask.to(torch.get_default_dtype()) if not mask.is_floating_point() else mask
    lengths = mask.sum(dim=1).clamp(min=1)  # [B]
    return mask * AVERAGES[average](lengths, totals).unsqueeze(1)
