"""The terms, in the order in which they are applied."""

from collections.abc import Callable

from grpo_stage.arguments import GRPOArguments
from grpo_stage.update.terms.clip_cov import ClipCov
from grpo_stage.update.terms.entropy_bonus import EntropyBonus
from grpo_stage.update.terms.kl_cov import KLCov
from grpo_stage.update.terms.kl_penalty import KLPenalty
from grpo_stage.update.terms.off_policy_mask import OffPolicyMask
from grpo_stage.update.terms.rollout_correction import RolloutCorrection
from grpo_stage.update.terms.rollout_rejection import RolloutRejection
from grpo_stage.update.terms.term import Term
from grpo_stage.update.terms.top_entropy import TopEntropy


TERMS: tuple[Callable[[GRPOArguments], Term | None], ...] = (
    RolloutRejection.of,
    RolloutCorrection.of,
    OffPolicyMask.of,
    TopEntropy.of,
    ClipCov.of,
    KLCov.of,
    EntropyBonus.of,
    KLPenalty.of,
)
"""Each function returns the term that a recipe needs, or None."""
