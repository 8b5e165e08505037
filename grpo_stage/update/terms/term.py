"""What a term of the objective is, and what it is computed from.

B completions in a micro-batch    T completion tokens    N tokens of the step that the loss uses, over all ranks
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from grpo_stage.records.metrics import MetricTracker
from grpo_stage.types import SampleBatch


@dataclass(frozen=True, slots=True, eq=False)
class TermInputs:
    """A micro-batch under the policy; what is [B, T] is 0 outside `batch.completion_mask`."""

    batch: SampleBatch
    logprobs: torch.Tensor
    """[B, T] of the policy, with gradient."""
    entropy: torch.Tensor
    """[B, T] of the policy in nats, with gradient where a term asks for it."""
    old_logprobs: torch.Tensor
    """[B, T] of the policy at the start of the update."""

    def record_mean(self, metrics: MetricTracker, name: str, values: torch.Tensor) -> None:
        """Log the mean of [B, T] values over the tokens that the loss uses."""
        mask = self.batch.loss_mask
        metrics.add(name, (values.detach() * mask).sum(), mask.sum())


@dataclass(frozen=True, slots=True, eq=False)
class StepTokens:
    """All tokens of a step that the loss uses, before its first micro-batch; each [N]."""

    logprobs: torch.Tensor
    """Of the present policy."""
    entropies: torch.Tensor
    """Of the present policy, in nats."""
    advantages: torch.Tensor
    """Each that of its completion."""
    draws: torch.Tensor
    """float64, random numbers."""


class Term:
    """One term; what a kind of term does not do it leaves as it is here."""

    looks_at_step: ClassVar[bool] = False
    """True where `trained` or `anchored` is to be asked before a step, which takes one more forward pass."""
    entropy_gradient: ClassVar[bool] = False
    """True where the gradient flows through the entropy."""

    def trained(self, tokens: StepTokens) -> torch.Tensor | None:
        """[N] bool, the tokens that the policy's loss is taken of; None for all."""
        return None

    def anchored(self, tokens: StepTokens) -> torch.Tensor | None:
        """[N] bool, the tokens that are held to their old log-probability; None for none."""
        return None

    def factor(self, x: TermInputs, metrics: MetricTracker) -> torch.Tensor | None:
        """[B, T] or [B, 1], what the policy's loss is multiplied with, without gradient."""
        return None

    def summand(self, x: TermInputs, metrics: MetricTracker) -> torch.Tensor | None:
        """[B, T], what is added to the policy's loss."""
        return None

    def reward_penalties(
        self, old_logprobs: Sequence[torch.Tensor], ref_logprobs: Sequence[torch.Tensor]
    ) -> list[float] | None:
        """What is taken off the reward of each completion, given its tokens' log-probabilities [T]."""
        return None

    def adapt(self, metrics: MetricTracker) -> None:
        """Change what adapts by what a step has measured on all ranks, each of which calls this."""

    def state_dict(self) -> dict[str, Any]:
        """What adapts, ready for JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; `state` may hold other terms' as well."""
