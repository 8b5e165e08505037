"""`top_entropy_quantile`: the policy learns from the tokens at which it is least decided."""

import torch

from grpo_stage.algorithm.exploration import highest_entropy_tokens
from grpo_stage.arguments import GRPOArguments
from grpo_stage.update.terms.term import StepTokens, Term


class TopEntropy(Term):
    """See `highest_entropy_tokens`."""

    looks_at_step = True

    def __init__(self, quantile: float) -> None:
        self._quantile = quantile

    @staticmethod
    def of(args: GRPOArguments) -> Term | None:
        return TopEntropy(args.top_entropy_quantile) if args.top_entropy_quantile < 1 else None

    def trained(self, tokens: StepTokens) -> torch.Tensor:
        return highest_entropy_tokens(tokens.entropies, self._quantile)
