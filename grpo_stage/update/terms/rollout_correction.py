"""`rollout_correction`: the policy's loss times the ratio of the trainer's probability to the engine's."""

import torch

from grpo_stage.algorithm.correction import correction_weights
from grpo_stage.arguments import GRPOArguments
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.update.terms.term import Term, TermInputs


class RolloutCorrection(Term):
    """See `correction_weights`."""

    def __init__(self, args: GRPOArguments) -> None:
        self._args = args

    @staticmethod
    def of(args: GRPOArguments) -> Term | None:
        return RolloutCorrection(args) if args.rollout_correction != "none" else None

    def factor(self, x: TermInputs, metrics: MetricTracker) -> torch.Tensor:
        args = self._args
        weights = correction_weights(
            x.old_logprobs,
            x.batch.sampling_logprobs,
            x.batch.completion_mask,
            level=args.rollout_correction,
            mode=args.rollout_correction_mode,
            lower=args.rollout_correction_min,
            upper=args.rollout_correction_max,
        )
        x.record_mean(metrics, "rollout_correction/weight_mean", weights)
        outside = (weights <= args.rollout_correction_min) | (weights >= args.rollout_correction_max)
        x.record_mean(metrics, "rollout_correction/bounded_frac", outside)
        return weights
