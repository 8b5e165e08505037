"""The loss of a token: a surrogate and terms. Tables say which ones there are (`LOSSES`, `terms.table`).

B completions in a micro-batch    T completion tokens
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import and_, or_
from typing import Any, TypeVar

import torch

from grpo_stage.algorithm.catalog import LOSS_TYPES
from grpo_stage.algorithm.losses import LOSSES, LossSettings, SurrogateOutput, TokenInputs
from grpo_stage.arguments import GRPOArguments
from grpo_stage.distributed import all_gather, process_index
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.types import Sample, SampleBatch
from grpo_stage.update.terms.table import TERMS
from grpo_stage.update.terms.term import StepTokens, TermInputs


T = TypeVar("T")


class Objective:
    """The recipe's loss."""

    def __init__(self, args: GRPOArguments) -> None:
        self.terms = [term for build in TERMS if (term := build(args)) is not None]
        self.entropy_gradient = any(term.entropy_gradient for term in self.terms)
        """Whether the gradient flows through the entropy."""
        self.looks_at_step = any(term.looks_at_step for term in self.terms)
        """Whether `mark` has to be called before a step."""
        self._acts_without_advantage = not LOSS_TYPES[args.loss_type].vanishes_without_advantage or any(
            term.acts_without_advantage for term in self.terms
        )
        self._skips = not args.disable_zero_advantage_skipping
        self._loss = LOSSES[args.loss_type]
        self._settings = LossSettings.of(args)

    def token_losses(
        self, batch: SampleBatch, logprobs: torch.Tensor, entropy: torch.Tensor, metrics: MetricTracker
    ) -> torch.Tensor:
        """The loss of each token of a micro-batch, [B, T]; `batch.loss_weights` average them.

        Args:
            batch: the micro-batch.
            logprobs: [B, T] of the policy, with gradient.
            entropy: [B, T] of the policy, with gradient if `entropy_gradient`.
            metrics: gets the metrics of the micro-batch.
        """
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        inputs = TokenInputs(logprobs, old_logprobs, batch.advantages, batch.completion_mask, batch.sampling_logprobs)
        surrogate = self._loss.surrogate(inputs, self._settings)
        x = TermInputs(batch, logprobs, entropy, old_logprobs)
        losses = surrogate.token_losses
        for term in self.terms:
            if (factor := term.factor(x, metrics)) is not None:
                losses = losses * factor
        if batch.trained_mask is not None:
            x.record_mean(metrics, "token_selection/learned_frac", batch.trained_mask)
            losses = losses * batch.trained_mask
        if batch.anchor_mask is not None:
            x.record_mean(metrics, "token_selection/held_frac", batch.anchor_mask)
        for term in self.terms:
            if (summand := term.summand(x, metrics)) is not None:
                losses = losses + summand
        _record_clipping(metrics, x, surrogate)
        return losses

    def has_gradient(self, sample: Sample) -> bool:
        """Whether a sample has to go through the model; if not, every term of its loss is 0 whatever the policy says.

        With `disable_zero_advantage_skipping` each sample has to.
        """
        return not self._skips or sample.teaches or (sample.is_used and self._acts_without_advantage)

    def mark(
        self,
        samples: Sequence[Sample],
        logprobs: Sequence[torch.Tensor],
        entropies: Sequence[torch.Tensor],
        key: str,
    ) -> tuple[Sample, ...]:
        """The samples of this rank as the terms want them in this step; each rank calls this.

        Completions that a term leaves out lose their `loss_mask`, and tokens get a `trained_mask` and an
        `anchor_mask`, by statistics over all ranks.

        Args:
            samples: this rank's share of a step.
            logprobs: [T] of each, of the present policy.
            entropies: [T] of each, of the present policy.
            key: random draws for a sample depend on `key` and on the sample's tokens alone, not on the order of the
                samples or the number of ranks.
        """
        masks = [torch.tensor(sample.loss_mask, dtype=torch.bool) for sample in samples]
        tokens, own = _gathered(samples, masks, logprobs, entropies, key)
        everything = torch.ones_like(tokens.logprobs, dtype=torch.bool)
        kept = reduce(and_, _given(term.kept(tokens) for term in self.terms), everything)
        tokens, everything = tokens.only(kept), everything[kept]
        for term in self.terms:
            term.prepare(tokens)
        trained = reduce(and_, _given(term.trained(tokens) for term in self.terms), everything)
        anchored = reduce(or_, _given(term.anchored(tokens) for term in self.terms), ~everything)
        nothing = torch.zeros_like(kept)
        lengths = [int(mask.sum()) for mask in masks]
        marks = (
            each[own].float().split(lengths)
            for each in (kept, nothing.masked_scatter(kept, trained), nothing.masked_scatter(kept, anchored))
        )
        return tuple(
            dataclasses.replace(
                sample,
                loss_mask=sample.loss_mask if is_kept.all() else (0,) * len(mask),
                trained_mask=torch.zeros(len(mask)).masked_scatter(mask, is_trained),
                anchor_mask=torch.zeros(len(mask)).masked_scatter(mask, is_anchored),
            )
            for sample, mask, is_kept, is_trained, is_anchored in zip(samples, masks, *marks, strict=True)
        )

    def reward_penalties(
        self, old_logprobs: Sequence[torch.Tensor], ref_logprobs: Sequence[torch.Tensor]
    ) -> list[float]:
        """The penalty of `kl_in_reward` for each completion, from the log-probabilities [T] of its tokens."""
        (penalties,) = _given(term.reward_penalties(old_logprobs, ref_logprobs) for term in self.terms)
        return penalties

    def adapt(self, metrics: MetricTracker) -> None:
        """Adapt the coefficients to the metrics of a step over all ranks. Every rank must call it."""
        for term in self.terms:
            term.adapt(metrics)

    def state_dict(self) -> dict[str, Any]:
        """The coefficients, ready for JSON."""
        return {name: value for term in self.terms for name, value in term.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for term in self.terms:
            term.load_state_dict(state)


def _gathered(
    samples: Sequence[Sample],
    masks: Sequence[torch.Tensor],
    logprobs: Sequence[torch.Tensor],
    entropies: Sequence[torch.Tensor],
    key: str,
) -> tuple[StepTokens, slice]:
    """The tokens of all ranks that the loss uses, and where this rank's are among them."""
    lengths = [int(mask.sum()) for mask in masks]
    old = [
        own if sample.old_logprobs is None else sample.old_logprobs
        for own, sample in zip(logprobs, samples, strict=True)
    ]
    mine = [
        torch.cat([torch.zeros(0), *each])
        for each in (
            *([tokens[mask] for tokens, mask in zip(values, masks, strict=True)] for values in (logprobs, entropies)),
            [
                torch.full((len(mask),), s.advantage)[mask] if s.token_advantages is None else s.token_advantages[mask]
                for s, mask in zip(samples, masks, strict=True)
            ],
            [tokens[mask] for tokens, mask in zip(old, masks, strict=True)],
            [torch.tensor(s.completion.sampling_logprobs)[mask] for s, mask in zip(samples, masks, strict=True)],
            [
                _draws(n, f"{key} {sample.prompt.index} {sample.completion.token_ids}")
                for n, sample in zip(lengths, samples, strict=True)
            ],
        )
    ]
    ranks = all_gather((mine, lengths))
    everyone = [torch.cat(each) for each in zip(*(tokens for tokens, _ in ranks), strict=True)]
    first = sum(len(tokens[0]) for tokens, _ in ranks[: process_index()])
    all_lengths = tuple(length for _, of_rank in ranks for length in of_rank)
    logprob, entropy, advantage, old_logprob, sampling, draws = everyone
    return StepTokens(logprob, entropy, advantage, old_logprob, sampling, draws, all_lengths), slice(
        first, first + len(mine[0])
    )


def _given(values: Iterable[T | None]) -> list[T]:
    return [value for value in values if value is not None]


def _draws(length: int, key: str) -> torch.Tensor:
    """[length] random numbers that depend on `key` alone; in float64, so that no two are equal."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
    return torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _record_clipping(metrics: MetricTracker, x: TermInputs, surrogate: SurrogateOutput) -> None:
    """clip_ratio/low_mean, high_mean, delta_mean, region_mean (TRL's names).

    The share of the tokens that the loss uses whose gradient the lower bound, the upper, `delta`, any of them cut.
    gate_mean: what a loss with a gate leaves of the gradient (TRL's vespo/phi_seq_mean).
    """
    clipped = {"low_mean": surrogate.clipped_low, "high_mean": surrogate.clipped_high}
    if surrogate.clipped_delta is not None:
        clipped["delta_mean"] = surrogate.clipped_delta
    clipped["region_mean"] = torch.stack(list(clipped.values())).any(dim=0)
    for name, tokens in clipped.items():
        x.record_mean(metrics, f"clip_ratio/{name}", tokens)
    if surrogate.gates is not None:
        x.record_mean(metrics, "gate_mean", surrogate.gates)
