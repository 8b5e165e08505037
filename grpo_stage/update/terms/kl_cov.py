"""`covariance_control: kl_cov`: tokens that lower the entropy are held to their old log-probability."""

import torch

from grpo_stage.algorithm.exploration import kl_cov_tokens, token_covariances
from grpo_stage.arguments import GRPOArguments
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.update.terms.term import StepTokens, Term, TermInputs


class KLCov(Term):
    """See `kl_cov_tokens`; the loss of each such token has a penalty on its distance from the old log-probability."""

    looks_at_step = True
    acts_without_advantage = True

    def __init__(self, args: GRPOArguments) -> None:
        self._args = args

    @staticmethod
    def of(args: GRPOArguments) -> Term | None:
        return KLCov(args) if args.covariance_control == "kl_cov" else None

    def anchored(self, tokens: StepTokens) -> torch.Tensor:
        covariances = token_covariances(tokens.logprobs, tokens.advantages)
        return kl_cov_tokens(covariances, self._args.covariance_frac, tokens.draws)

    def summand(self, x: TermInputs, metrics: MetricTracker) -> torch.Tensor | None:
        if x.batch.anchor_mask is None:  # a dummy's
            return None
        return self._args.kl_cov_coef * x.batch.anchor_mask * (x.logprobs - x.old_logprobs).abs()
