"""`rollout_correction`: the policy's loss times the ratio of the trainer's probability to the engine's."""

import torch

from grpo_stage.algorithm.correction import correction_weights, importance_weights, normalized_weights, weight_totals
from grpo_stage.arguments import GRPOArguments
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.update.terms.term import StepTokens, Term, TermInputs


class RolloutCorrection(Term):
    """See `correction_weights`."""

    def __init__(self, args: GRPOArguments) -> None:
        self._args = args
        self.looks_at_step = args.rollout_correction_normalize  # type: ignore[misc]
        self._totals = 0.0, 0.0  # of the step's weights, over all ranks

    @staticmethod
    def of(args: GRPOArguments) -> Term | None:
        return RolloutCorrection(args) if args.rollout_correction != "none" else None

    def prepare(self, tokens: StepTokens) -> None:
        mask = tokens.by_completion(torch.ones_like(tokens.logprobs))
        old, sampling = map(tokens.by_completion, (tokens.old_logprobs, tokens.sampling_logprobs))
        weights = self._weights(old, sampling, mask)
        total, count = weight_totals(weights, mask, self._args.rollout_correction)
        self._totals = total.item(), count.item()

    def factor(self, x: TermInputs, metrics: MetricTracker) -> torch.Tensor:
        args, batch = self._args, x.batch
        raw = importance_weights(
            x.old_logprobs, batch.sampling_logprobs, batch.completion_mask, args.rollout_correction
        )
        x.record_mean(metrics, "sampling/importance_sampling_ratio/mean", raw)
        if (used := raw[batch.loss_mask.bool()]).numel() > 0:
            metrics.lowest("sampling/importance_sampling_ratio/min", used.min().item())
            metrics.highest("sampling/importance_sampling_ratio/max", used.max().item())
        weights = self._weights(x.old_logprobs, batch.sampling_logprobs, batch.completion_mask)
        x.record_mean(metrics, "rollout_correction/weight_mean", weights)
        outside = (weights <= args.rollout_correction_min) | (weights >= args.rollout_correction_max)
        x.record_mean(metrics, "rollout_correction/bounded_frac", outside)
        return normalized_weights(weights, *self._totals) if self.looks_at_step else weights

    def _weights(self, old: torch.Tensor, sampling: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        args = self._args
        return correction_weights(
            old,
            sampling,
            mask,
            level=args.rollout_correction,
            mode=args.rollout_correction_mode,
            lower=args.rollout_correction_min,
            upper=args.rollout_correction_max,
        )
