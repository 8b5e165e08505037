"""`rollout_rejection`: completions that engine and trainer see too differently are left out of the loss."""

import torch

from grpo_stage.algorithm.correction import rejection_mask
from grpo_stage.arguments import GRPOArguments
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.update.terms.term import StepTokens, Term


class RolloutRejection(Term):
    """See `rejection_mask`."""

    looks_at_step = True

    def __init__(self, args: GRPOArguments) -> None:
        self._args = args
        self._counts = 0.0, 0.0  # completions of the step that were left out, and all of them

    @staticmethod
    def of(args: GRPOArguments) -> Term | None:
        return RolloutRejection(args) if args.rollout_rejection != "none" else None

    def kept(self, tokens: StepTokens) -> torch.Tensor:
        args, everything = self._args, torch.ones_like(tokens.logprobs)
        kept = rejection_mask(
            tokens.by_completion(tokens.old_logprobs),
            tokens.by_completion(tokens.sampling_logprobs),
            tokens.by_completion(everything),
            level=args.rollout_rejection,
            lower=args.rollout_rejection_min,
            upper=args.rollout_rejection_max,
        ).squeeze(1)  # [C]
        num_used = sum(length > 0 for length in tokens.lengths)
        self._counts = (1 - kept).sum().item(), float(num_used)
        return tokens.of_completions(kept).bool()

    def adapt(self, metrics: MetricTracker) -> None:
        """Log the share of the step's completions that were left out."""
        metrics.add("rollout_rejection/rejected_frac", *self._counts)
