"""Completions -> micro-batches under a token budget, with every token's weight in the step's loss.

B completions in a micro-batch    T completion tokens    L prompt + completion tokens
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from grpo_stage.algorithm.averages import StepTotals, token_weights
from grpo_stage.types import Completion, Prompt, RolloutGroup, Sample, SampleBatch, TokenBatch


class Sequenced(Protocol):
    """Anything with a prompt and a completion, which go through the model as one sequence: a `Row` or a `Sample`."""

    @property
    def prompt(self) -> Prompt: ...
    @property
    def completion(self) -> Completion: ...


class Row(NamedTuple):
    """A completion and its prompt, before anything else is known of them."""

    prompt: Prompt
    completion: Completion


def rows_of(groups: Sequence[RolloutGroup]) -> list[Row]:
    """The completions of groups, prompt-major."""
    return [Row(group.prompt, completion) for group in groups for completion in group.completions]


def count_totals(samples: Sequence[Sample], max_new_tokens: int) -> StepTotals:
    """This rank's part of the step's denominators: all completions, those that the loss uses, and their tokens."""
    lengths = [sum(sample.loss_mask) for sample in samples if sample.is_used]
    return StepTotals(
        num_completions=len(lengths),
        num_tokens=sum(lengths),
        max_completion_length=max_new_tokens,
        num_left_out=len(samples) - len(lengths),
    )


class PaddedLayout:
    """A batch as padded rows: each completion is one row, with its own copy of the prompt.

    Args:
        pad_token_id: fills the rows; any id is right, since masks come from lengths.
        device: where the tensors go.
    """

    def __init__(self, pad_token_id: int, device: torch.device) -> None:
        self._pad_token_id = pad_token_id
        self._device = device

    def split(self, sequences: Sequence[Sequenced], max_tokens: int) -> Iterator[list[int]]:
        """Positions of the sequences that go through the model together, in at most `max_tokens` padded tokens.

        Sequences of similar length go together, so that little is padded. The longest come first, so that a budget
        that does not fit into memory fails at once and not hours later. A sequence longer than the budget goes alone.
        """
        lengths = [(len(each.prompt.token_ids), len(each.completion.token_ids)) for each in sequences]
        chunk: list[int] = []
        for position in sorted(range(len(sequences)), key=lambda position: sum(lengths[position]), reverse=True):
            prompts, completions = zip(*(lengths[each] for each in [*chunk, position]), strict=True)
            if chunk and (max(prompts) + max(completions)) * (len(chunk) + 1) > max_tokens:
                yield chunk
                chunk = []
            chunk.append(position)
        if chunk:
            yield chunk

    def shape(self, sequences: Sequence[Sequenced]) -> tuple[int, int]:
        """[B, L] of the sequences as one batch; that of a dummy where there are none."""
        prompts = [len(each.prompt.token_ids) for each in sequences]
        completions = [len(each.completion.token_ids) for each in sequences]
        return max(1, len(sequences)), max(prompts, default=1) + max(completions, default=1)

    def tokens(self, sequences: Sequence[Sequenced]) -> TokenBatch:
        """The sequences as one batch."""
        prompt_length = max(len(each.prompt.token_ids) for each in sequences)
        completion_length = max(len(each.completion.token_ids) for each in sequences)
        input_ids = torch.full((len(sequences), prompt_length + completion_length), self._pad_token_id)  # [B, L]
        attention_mask = torch.zeros_like(input_ids)  # [B, L]
        completion_mask = torch.zeros(len(sequences), completion_length)  # [B, T]
        for row, each in enumerate(sequences):
            prompt_ids, completion_ids = each.prompt.token_ids, each.completion.token_ids
            start, end = prompt_length - len(prompt_ids), prompt_length + len(completion_ids)
            input_ids[row, start:end] = torch.tensor(prompt_ids + completion_ids)
            attention_mask[row, start:end] = 1
            completion_mask[row, : len(completion_ids)] = 1
        return TokenBatch(
            input_ids=input_ids.to(self._device),
            attention_mask=attention_mask.to(self._device),
            completion_ids=input_ids[:, prompt_length:].to(self._device),
            completion_mask=completion_mask.to(self._device),
        )

    def samples(
        self, samples: Sequence[Sample], totals: StepTotals, loss_type: str, aggregation: str = "auto"
    ) -> SampleBatch:
        """The samples as one batch.

        Args:
            samples: a part of this rank's share of the step. An optional field is set in all of them or in none.
            totals: denominators of the step over all ranks.
            loss_type: see `token_weights`.
            aggregation: see `token_weights`.
        """
        tokens = self.tokens(samples)

        def padded(values: Callable[[Sample], Sequence[float] | torch.Tensor | None]) -> torch.Tensor | None:
            """[B, T], 0 behind each sample's values."""
            result = torch.zeros(tokens.completion_mask.shape)
            for row, sample in zip(result, samples, strict=True):
                if (own := values(sample)) is None:
                    return None
                row[: len(own)] = torch.as_tensor(own)
            return result.to(self._device)

        loss_mask, sampling = padded(lambda s: s.loss_mask), padded(lambda s: s.completion.sampling_logprobs)
        assert loss_mask is not None
        assert sampling is not None
        return SampleBatch(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            completion_ids=tokens.completion_ids,
            completion_mask=tokens.completion_mask,
            loss_mask=loss_mask,
            loss_weights=token_weights(loss_mask, totals, loss_type, aggregation),
            advantages=torch.tensor([sample.advantage for sample in samples], device=self._device)
            if (of_tokens := padded(lambda s: s.token_advantages)) is None
            else of_tokens,
            sampling_logprobs=sampling,
            policy_versions=torch.tensor([sample.policy_version for sample in samples], device=self._device),
            old_logprobs=padded(lambda s: s.old_logprobs),
            ref_logprobs=padded(lambda s: s.ref_logprobs),
            trained_mask=padded(lambda s: s.trained_mask),
            anchor_mask=padded(lambda s: s.anchor_mask),
        )

    def dummy(self) -> SampleBatch:
        """A batch of weight 0, for a rank that has fewer micro-batches than the others."""
        zero = torch.zeros(1, 1, device=self._device)
        return SampleBatch(
            input_ids=torch.full((1, 2), self._pad_token_id, device=self._device),
            attention_mask=torch.ones(1, 2, dtype=torch.long, device=self._device),
            completion_ids=torch.full((1, 1), self._pad_token_id, device=self._device),
            completion_mask=zero,
            loss_mask=zero,
            loss_weights=zero,
            advantages=torch.zeros(1, device=self._device),
            sampling_logprobs=zero,
            policy_versions=torch.tensor([-1], device=self._device),
        )
