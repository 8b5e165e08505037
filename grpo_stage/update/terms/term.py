"""The base class of the objective's terms, and the inputs of a term.

B completions in a micro-batch    T completion tokens    N tokens of the step that the loss uses, over all ranks
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from grpo_stage.records.metrics import MetricTracker
from grpo_stage.types import SampleBatch


@dataclass(frozen=True, slots=True, eq=False)
class TermInputs:
    """A micro-batch under the policy; what is [B, T] is 0 outside `batch.completion_mask`."""

    batch: SampleBatch
    logprobs: torch.Tensor
    """[B, T] of the policy, with gradient."""
    entropy: torch.Tensor
    """[B, T] of the policy in nats, with gradient if a term needs it."""
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
    old_logprobs: torch.Tensor
    """Of the policy at the start of the update."""
    sampling_logprobs: torch.Tensor
    """The engine's."""
    draws: torch.Tensor
    """float64, random numbers."""
    lengths: tuple[int, ...]
    """The tokens of each completion, 0 for one that the loss leaves out: completions follow one another."""

    def by_completion(self, values: torch.Tensor) -> torch.Tensor:
        """[C, T] of [N] values, 0 behind a completion's end; C completions."""
        return pad_sequence(list(values.split(self.lengths)), batch_first=True)

    def of_completions(self, values: torch.Tensor) -> torch.Tensor:
        """[N] of [C] values, each for every token of its completion."""
        return values.repeat_interleave(torch.tensor(self.lengths))

    def only(self, kept: torch.Tensor) -> "StepTokens":
        """Those of [N] bool; a completion is kept whole or not at all."""
        is_whole = (self.by_completion(kept) == self.by_completion(torch.ones_like(kept))).all(dim=1).tolist()
        lengths = tuple(n if whole else 0 for n, whole in zip(self.lengths, is_whole, strict=True))
        return StepTokens(
            self.logprobs[kept],
            self.entropies[kept],
            self.advantages[kept],
            self.old_logprobs[kept],
            self.sampling_logprobs[kept],
            self.draws[kept],
            lengths,
        )


class Term:
    """One term of the objective. A subclass overrides the methods that it needs; the others change nothing."""

    looks_at_step: ClassVar[bool] = False
    """True where the next four are to be asked before a step, in this order, which takes one more forward pass."""
    entropy_gradient: ClassVar[bool] = False
    """Whether the gradient flows through the entropy."""
    acts_without_advantage: ClassVar[bool] = False
    """Whether completions with an advantage of 0 matter to it: for the gradient, or for how it adapts."""

    def kept(self, tokens: StepTokens) -> torch.Tensor | None:
        """[N] bool, the tokens of the completions that stay in the loss and its averages; None for all."""
        return None

    def prepare(self, tokens: StepTokens) -> None:
        """Take what the step's factors and summands depend on from the tokens that were kept."""

    def trained(self, tokens: StepTokens) -> torch.Tensor | None:
        """[N] bool, the tokens that have a policy loss; None for all."""
        return None

    def anchored(self, tokens: StepTokens) -> torch.Tensor | None:
        """[N] bool, the tokens that are held to their old log-probability; None for none."""
        return None

    def factor(self, x: TermInputs, metrics: MetricTracker) -> torch.Tensor | None:
        """[B, T] or [B, 1], a factor of the policy's loss, without gradient; None for 1."""
        return None

    def summand(self, x: TermInputs, metrics: MetricTracker) -> torch.Tensor | None:
        """[B, T], added to the policy's loss; None for 0."""
        return None

    def reward_penalties(
        self, old_logprobs: Sequence[torch.Tensor], ref_logprobs: Sequence[torch.Tensor]
    ) -> list[float] | None:
        """The penalty on the reward of each completion, from the log-probabilities [T] of its tokens; None for 0."""
        return None

    def adapt(self, metrics: MetricTracker) -> None:
        """Adapt coefficients to the metrics of a step over all ranks. Every rank must call it."""

    def state_dict(self) -> dict[str, Any]:
        """The coefficients that adapt, ready for JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; `state` may hold other terms' as well."""
