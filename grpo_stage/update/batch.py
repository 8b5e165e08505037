"""Completions -> micro-batches under a token budget, with every token's weight in the step's loss.

B completions in a micro-batch    T completion tokens    M sampled tokens of a micro-batch, without padding
R rows of N tokens, as a layout places a micro-batch
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch

from grpo_stage.algorithm.averages import StepTotals, token_weights
from grpo_stage.types import (
    Completion,
    FinishReason,
    ImageReader,
    ModelInputs,
    Prompt,
    RolloutGroup,
    Sample,
    SampleBatch,
    TokenBatch,
)
from grpo_stage.update.attention import Family, SharedPrompts


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


ENOUGH_FOR_A_CPU = 512
"""Tokens that go through the model together on a CPU: more takes memory and no less time (docs/performance.md)."""


class Layout(ABC):
    """How the tokens of completions and their prompts are placed for the model.

    Args:
        pad_token_id: fills what has to be filled; any id is right, since masks come from lengths.
        device: where the tensors go.
        images: reads those of prompts; None in a run without.
    """

    def __init__(self, pad_token_id: int, device: torch.device, images: ImageReader | None = None) -> None:
        self._pad_token_id = pad_token_id
        self._device = device
        self.images = images

    @abstractmethod
    def split(self, sequences: Sequence[Sequenced], max_tokens: int) -> Iterator[list[int]]:
        """Positions of the sequences that go through the model together, in at most `max_tokens` tokens.

        The longest come first, so that a budget that does not fit into memory fails at once and not hours later. A
        sequence longer than the budget goes alone.
        """

    @abstractmethod
    def num_tokens(self, sequences: Sequence[Sequenced]) -> int:
        """How many tokens of the budget these sequences take together."""

    @abstractmethod
    def inputs(self, sequences: Sequence[Sequenced]) -> ModelInputs:
        """The sequences as the model gets them."""

    def tokens(self, sequences: Sequence[Sequenced]) -> TokenBatch:
        """The sequences as one batch."""
        longest = max(len(each.completion.token_ids) for each in sequences)
        completion_ids = torch.full((len(sequences), longest), self._pad_token_id)  # [B, T]
        completion_mask = torch.zeros(completion_ids.shape)  # [B, T]
        for row, each in enumerate(sequences):
            length = len(each.completion.token_ids)
            completion_ids[row, :length] = torch.tensor(each.completion.token_ids)
            completion_mask[row, :length] = 1
            if each.completion.turns:
                completion_mask[row, :length] = torch.tensor(each.completion.sampled_mask, dtype=torch.float)
        return TokenBatch(
            inputs=self.inputs(sequences),
            completion_ids=completion_ids.to(self._device),
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
            inputs=tokens.inputs,
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
        token_ids = (self._pad_token_id,)
        completion = Completion(
            token_ids=token_ids, sampling_logprobs=(0.0,), finish_reason=FinishReason.STOP, text=""
        )
        zero = torch.zeros(1, 1, device=self._device)
        inputs = self.inputs([Row(Prompt(index=0, token_ids=token_ids, messages=(), reference=None), completion)])
        return SampleBatch(
            inputs=replace(inputs, counts=torch.zeros_like(inputs.counts)),
            completion_ids=torch.full((1, 1), self._pad_token_id, device=self._device),
            completion_mask=zero,
            loss_mask=zero,
            loss_weights=zero,
            advantages=torch.zeros(1, device=self._device),
            sampling_logprobs=zero,
            policy_versions=torch.tensor([-1], device=self._device),
        )

    def _positions(self, prompt: Prompt) -> torch.Tensor:
        """[K, prompt tokens]."""
        if self.images is None:
            return torch.arange(len(prompt.token_ids)).unsqueeze(0)
        return self.images.positions(prompt)

    def _of_images(
        self, prompts: Sequence[Prompt], places: Sequence[tuple[int, int]], shape: torch.Size
    ) -> dict[str, torch.Tensor]:
        """What the model takes beside tokens and positions.

        Args:
            prompts: in the order of their tokens.
            places: the row of each, and its column there.
            shape: [R, N].
        """
        if self.images is None:
            return {}
        arguments = self.images.arguments(prompts)
        types = torch.zeros(shape, dtype=torch.long)
        for prompt, (row, column) in zip(prompts, places, strict=True):
            if (own := self.images.token_types(prompt)) is None:
                break
            types[row, column : column + len(own)] = own
        else:
            arguments["token_type_ids"] = types
        return {name: each.to(self._device) for name, each in arguments.items()}


class PaddedLayout(Layout):
    """Padded rows: each completion is one row, with its own copy of the prompt."""

    def split(self, sequences: Sequence[Sequenced], max_tokens: int) -> Iterator[list[int]]:
        """Sequences of similar length go together, so that little is padded."""
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

    def num_tokens(self, sequences: Sequence[Sequenced]) -> int:
        prompts = [len(each.prompt.token_ids) for each in sequences]
        completions = [len(each.completion.token_ids) for each in sequences]
        return len(sequences) * (max(prompts, default=0) + max(completions, default=0))

    def inputs(self, sequences: Sequence[Sequenced]) -> ModelInputs:
        longest_prompt = max(len(each.prompt.token_ids) for each in sequences)
        length = longest_prompt + max(len(each.completion.token_ids) for each in sequences)
        input_ids = torch.full((len(sequences), length), self._pad_token_id)  # [B, N]
        attention_mask = torch.zeros_like(input_ids)  # [B, N]
        positions = [self._positions(each.prompt) for each in sequences]
        position_ids = torch.zeros((len(positions[0]), *input_ids.shape), dtype=torch.long)  # [K, B, N]
        counts = torch.zeros(input_ids.shape)  # [B, N]
        predictors = []
        starts = [longest_prompt - len(each.prompt.token_ids) for each in sequences]
        for row, (each, start) in enumerate(zip(sequences, starts, strict=True)):
            token_ids = each.prompt.token_ids + each.completion.token_ids
            if self.images is not None and token_ids[-1] == self.images.placeholder:
                token_ids = (*token_ids[:-1], self._pad_token_id)  # it predicts nothing, and has no image
            input_ids[row, start : start + len(token_ids)] = torch.tensor(token_ids)
            attention_mask[row, start : start + len(token_ids)] = 1
            of_row = [positions[row], _next(positions[row], len(each.completion.token_ids))]
            position_ids[:, row, start : start + len(token_ids)] = torch.cat(of_row, dim=1)
            counts[row, start : start + len(token_ids) - 1] = 1
            # What is predicted at a position is the next token.
            first = row * length + longest_prompt - 1
            predictors.append(_of_sampled(torch.arange(first, first + len(each.completion.token_ids)), each))
        return ModelInputs(
            input_ids=input_ids.to(self._device),
            position_ids=_without_one(position_ids).to(self._device),
            predictors=torch.cat(predictors).to(self._device),
            counts=counts.to(self._device),
            attention_mask=attention_mask.to(self._device),
            images=self._of_images([each.prompt for each in sequences], list(enumerate(starts)), input_ids.shape),
        )


class SharedPromptLayout(Layout):
    """One stream without padding: a prompt once, and behind it its completions, which share it.

    A completion's last token predicts nothing that is asked for, and does not go through the model.
    """

    def split(self, sequences: Sequence[Sequenced], max_tokens: int) -> Iterator[list[int]]:
        """The completions of a prompt go together, as far as they fit; other prompts join while that saves time."""
        enough = min(max_tokens, ENOUGH_FOR_A_CPU) if self._device.type == "cpu" else max_tokens
        families = sorted(_families(sequences), key=lambda each: _length(sequences, each), reverse=True)
        chunk: list[int] = []
        size = 0
        for family in families:
            prompt = len(sequences[family[0]].prompt.token_ids)
            if chunk and size + _length(sequences, family) > enough:
                yield chunk
                chunk, size = [], 0
            is_new = True
            for position in family:
                more = len(sequences[position].completion.token_ids) - 1 + prompt * is_new
                if chunk and size + more > max_tokens:
                    yield chunk
                    chunk, size, more = [], 0, len(sequences[position].completion.token_ids) - 1 + prompt
                chunk.append(position)
                size += more
                is_new = False
        if chunk:
            yield chunk

    def num_tokens(self, sequences: Sequence[Sequenced]) -> int:
        return sum(_length(sequences, family) for family in _families(sequences))

    def inputs(self, sequences: Sequence[Sequenced]) -> ModelInputs:
        input_ids: list[int] = []
        position_ids, counts, families = [], [], []
        predictors: dict[int, torch.Tensor] = {}
        prompts: list[Prompt] = []
        places = []
        for positions in _families(sequences):
            prompts.append(sequences[positions[0]].prompt)
            places.append((0, len(input_ids)))
            prompt = prompts[-1].token_ids
            lengths = []
            input_ids += prompt
            of_prompt = self._positions(prompts[-1])
            position_ids.append(of_prompt)
            counts.append(torch.full((len(prompt),), float(len(positions))))
            end_of_prompt = torch.tensor([len(input_ids) - 1])
            for position in positions:
                fed = sequences[position].completion.token_ids[:-1]
                lengths.append(len(fed))
                of_all = torch.cat([end_of_prompt, len(input_ids) + torch.arange(len(fed))])
                predictors[position] = _of_sampled(of_all, sequences[position])
                input_ids += fed
                position_ids.append(_next(of_prompt, len(fed)))
                counts.append(torch.ones(len(fed)))
            families.append(Family(len(prompt), tuple(lengths)))
        return ModelInputs(
            input_ids=torch.tensor([input_ids]).to(self._device),
            position_ids=_without_one(torch.cat(position_ids, dim=1).unsqueeze(1)).to(self._device),
            predictors=torch.cat([predictors[i] for i in range(len(sequences))]).to(self._device),
            counts=torch.cat(counts).unsqueeze(0).to(self._device),
            shared_prompts=SharedPrompts(families, self._device),
            images=self._of_images(prompts, places, torch.Size((1, len(input_ids)))),
        )


def _next(positions: torch.Tensor, count: int) -> torch.Tensor:
    """[K, count] positions that go on behind those of a prompt, [K, prompt tokens]."""
    return (positions.max() + 1 + torch.arange(count)).expand(len(positions), -1)


def _without_one(position_ids: torch.Tensor) -> torch.Tensor:
    """[K, R, N] positions as models take them: [R, N] where they count in one dimension."""
    return position_ids.squeeze(0) if len(position_ids) == 1 else position_ids


def _of_sampled(predictors: torch.Tensor, sequence: Sequenced) -> torch.Tensor:
    """Those of a completion's [T] predictors that predict a sampled token: the others never reach the output layer."""
    completion = sequence.completion
    return predictors[torch.tensor(completion.sampled_mask, dtype=torch.bool)] if completion.turns else predictors


def _families(sequences: Sequence[Sequenced]) -> list[list[int]]:
    """Positions of the sequences with the same prompt, the longest completion first."""
    by_prompt: dict[Any, list[int]] = defaultdict(list)
    for position, each in enumerate(sequences):
        by_prompt[each.prompt.identity].append(position)
    return [
        sorted(positions, key=lambda position: len(sequences[position].completion.token_ids), reverse=True)
        for positions in by_prompt.values()
    ]


def _length(sequences: Sequence[Sequenced], family: Sequence[int]) -> int:
    """Tokens of a family in the stream."""
    completions = sum(len(sequences[position].completion.token_ids) - 1 for position in family)
    return len(sequences[family[0]].prompt.token_ids) + completions
