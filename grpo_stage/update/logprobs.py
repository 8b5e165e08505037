"""Log-probabilities of completions under a model: with gradient for the policy, without for the rest.

B completions in a micro-batch    T completion tokens    M sampled ones in all, without padding    V vocabulary
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from grpo_stage.algorithm.advantages import gradient_energies
from grpo_stage.types import ModelInputs, TokenBatch
from grpo_stage.update.attention import attention_of
from grpo_stage.update.batch import Layout, Sequenced
from grpo_stage.update.head import Halves, TokenStatistics, statistics_of_logits
from grpo_stage.update.strategies.strategy import Strategy
from grpo_stage.update.token_budget import OutOfMemory, PolicyBudget


T = TypeVar("T")
Tensors = tuple[torch.Tensor, ...]


@dataclass
class Forward:
    """How completions go through a model: the same way in every pass of a run."""

    layout: Layout
    """How completions and their prompts are placed."""
    is_chunked: bool = True
    """Whether logits are computed for a part of the tokens at a time, rather than by the model for all."""

    def statistics(self, model: nn.Module, batch: TokenBatch, temperature: float) -> TokenStatistics:
        """What the policy says of each completion token.

        The policy is the distribution that was sampled from: logits are divided by the sampling temperature.

        Args:
            model: a causal language model, wrapped (DDP) or not, in `attention_of` the batch. Gradients flow if they
                are enabled, through the entropies as well.
            batch: a micro-batch in this layout.
            temperature: the sampling temperature.

        Returns:
            [B, T] each, 0 outside the completion mask.
        """
        mask = batch.completion_mask.bool()
        targets = batch.completion_ids[mask]  # [M]
        halves = Halves.of(model) if self.is_chunked else None
        if halves is None:
            of_tokens = statistics_of_logits(_logits(model, batch.inputs), targets, temperature)
        else:
            body, head, arguments = halves.body, halves.head, _arguments(batch.inputs)

            def in_chunks() -> TokenStatistics:
                hidden = body(**arguments).last_hidden_state.flatten(0, 1)  # [R x N, hidden]
                return head.statistics(hidden[batch.inputs.predictors[: len(targets)]], targets, temperature)

            of_tokens = halves.call(model, in_chunks, **arguments)
        return TokenStatistics(*(torch.zeros_like(batch.completion_mask).masked_scatter(mask, x) for x in of_tokens))


def _arguments(inputs: ModelInputs) -> dict[str, Any]:
    arguments = {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask,
        "position_ids": inputs.position_ids,
        "use_cache": False,
        **inputs.images,
    }
    return arguments if inputs.shared_prompts is None else arguments | {"shared_prompts": inputs.shared_prompts}


def _logits(model: Any, inputs: ModelInputs) -> torch.Tensor:
    """[M, V] as the model itself computes them."""
    length = inputs.input_ids.size(1)
    rows, columns = inputs.predictors // length, inputs.predictors % length
    kept = length - int(columns.min())
    arguments = _arguments(inputs)
    if takes_logits_to_keep(model):
        arguments["logits_to_keep"] = kept
    logits = model(**arguments).logits[:, -kept:]
    return logits.flatten(0, 1)[rows * kept + columns - (length - kept)]


class FrozenPass:
    """A forward pass without gradient over any number of completions, in micro-batches.

    Args:
        forward: how completions go through a model.
        budget: how many tokens go through a model at once.
        autocast: the precision of a forward pass.
        temperature: the sampling temperature.
        strategy: how the parameters are distributed. Where passes are collective, every rank makes each call below,
            if with no sequences.
    """

    def __init__(
        self,
        forward: Forward,
        budget: PolicyBudget,
        autocast: Callable[[], AbstractContextManager],
        temperature: float,
        strategy: Strategy,
    ) -> None:
        self.forward = forward
        self._strategy = strategy
        self._budget = budget
        self._autocast = autocast
        self._temperature = temperature

    def logprobs(self, model: nn.Module, sequences: Sequence[Sequenced], temperature: float | None = None) -> Tensors:
        """[T] of each completion, on the CPU, under `model` as it is now.

        At the sampling temperature, unless another is given.
        """
        return self._run(model, sequences, lambda of: (of.logprobs,), temperature)[0]

    def logprobs_and_entropies(self, model: nn.Module, sequences: Sequence[Sequenced]) -> tuple[Tensors, Tensors]:
        """[T] of each completion, twice, on the CPU, at the sampling temperature."""
        logprobs, entropies = self._run(model, sequences, lambda of: (of.logprobs, of.entropies))
        return logprobs, entropies

    def energies(self, model: nn.Module, sequences: Sequence[Sequenced]) -> Tensors:
        """[T] `gradient_energies` of each completion, on the CPU, at the sampling temperature."""
        return self._run(model, sequences, lambda of: (gradient_energies(of.logprobs, of.collisions),))[0]

    def sum(
        self, model: nn.Module, sequences: Sequence[Sequenced], measure: Callable[[TokenBatch], torch.Tensor]
    ) -> torch.Tensor | None:
        """The sum of what `measure` gives for each micro-batch, on the CPU; None without any.

        Args:
            model: see `logprobs`.
            sequences: see `logprobs`.
            measure: called in the model's precision, with the model attending as the batch needs it.
        """
        parts = [part.cpu() for _, part in self._micro_batches(model, sequences, measure)]
        return torch.stack(parts).sum(dim=0) if parts else None

    def _run(
        self,
        model: nn.Module,
        sequences: Sequence[Sequenced],
        wanted: Callable[[TokenStatistics], Tensors],
        temperature: float | None = None,
    ) -> list[Tensors]:
        """What is wanted of the statistics, by completion."""
        temperature = self._temperature if temperature is None else temperature
        found: dict[int, list[torch.Tensor]] = {}

        def run(batch: TokenBatch) -> Tensors:
            return wanted(self.forward.statistics(model, batch, temperature))

        for positions, outcome in self._micro_batches(model, sequences, run):
            for row, position in enumerate(positions):
                length = len(sequences[position].completion.token_ids)
                found[position] = [each[row, :length].cpu() for each in outcome]
        if not found:
            return [(), ()]
        return [tuple(each) for each in zip(*(found[i] for i in range(len(found))), strict=True)]

    @torch.no_grad()
    def _micro_batches(
        self, model: nn.Module, sequences: Sequence[Sequenced], run: Callable[[TokenBatch], T]
    ) -> Iterator[tuple[list[int], T]]:
        """Positions of the sequences of each micro-batch, and what `run` gives for it."""
        layout = self.forward.layout
        remaining = list(range(len(sequences)))

        def attempt(batch: TokenBatch) -> T:
            with attention_of(model, batch.inputs.shared_prompts), self._autocast():
                return run(batch)

        num_chunks = len(list(layout.split(sequences, self._budget.max_tokens)))
        for _ in range(self._strategy.num_frozen_passes(num_chunks) - num_chunks):
            self._budget.attempt(partial(attempt, layout.dummy()))
        while remaining:
            of_remaining = [sequences[position] for position in remaining]
            done: set[int] = set()
            for chunk in layout.split(of_remaining, self._budget.max_tokens):
                batch = layout.tokens([of_remaining[i] for i in chunk])
                outcome = self._budget.attempt(partial(attempt, batch))
                if isinstance(outcome, OutOfMemory):
                    self._budget.give_way(len(chunk), batch.inputs.input_ids.numel(), outcome)
                    break
                positions = [remaining[i] for i in chunk]
                done.update(positions)
                yield positions, outcome
            remaining = [position for position in remaining if position not in done]


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model, wrapped or not, can compute the logits of the last tokens alone."""
    while hasattr(model, "module"):  # DDP
        model = model.module
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    return "logits_to_keep" in inspect.signature(model.forward).parameters
