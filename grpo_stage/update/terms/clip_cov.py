"""`covariance_control: clip_cov`: tokens that lower the entropy are left out of the policy's loss."""

import torch

from grpo_stage.algorithm.exploration import clip_cov_tokens, token_covariances
from grpo_stage.arguments import GRPOArguments
from grpo_stage.update.terms.term import StepTokens, Term


class ClipCov(Term):
    """See `clip_cov_tokens`."""

    looks_at_step = True

    def __init__(self, args: GRPOArguments) -> None:
        self._args = args

    @staticmethod
    def of(args: GRPOArguments) -> Term | None:
        return ClipCov(args) if args.covariance_control == "clip_cov" else None

    def trained(self, tokens: StepTokens) -> torch.Tensor:
        covariances = token_covariances(tokens.logprobs, tokens.advantages)
        bounds = self._args.clip_cov_min, self._args.clip_cov_max
        return ~clip_cov_tokens(covariances, self._args.covariance_frac, *bounds, tokens.draws)
