"""`off_policy_mask_threshold`: completions of negative advantage that have become improbable have no policy loss."""

import torch

from grpo_stage.algorithm.correction import off_policy_mask
from grpo_stage.arguments import GRPOArguments
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.update.terms.term import Term, TermInputs


class OffPolicyMask(Term):
    """See `off_policy_mask`."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    @staticmethod
    def of(args: GRPOArguments) -> Term | None:
        threshold = args.off_policy_mask_threshold
        return None if threshold is None else OffPolicyMask(threshold)

    def factor(self, x: TermInputs, metrics: MetricTracker) -> torch.Tensor:
        batch = x.batch
        kept = off_policy_mask(
            x.logprobs.detach(), batch.sampling_logprobs, batch.advantages, batch.completion_mask, self._threshold
        )
        completions = batch.loss_mask.amax(dim=1, keepdim=True)  # [B, 1]
        metrics.add("off_policy_masked_frac", ((1 - kept) * completions).sum(), completions.sum())
        return kept
