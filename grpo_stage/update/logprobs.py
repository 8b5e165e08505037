"""Log-probabilities of completions under a model: with gradient for the policy, without for the rest.

B completions in a micro-batch    T completion tokens    V vocabulary
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from grpo_stage.algorithm.advantages import gradient_energies
from grpo_stage.types import TokenBatch
from grpo_stage.update.batch import PaddedLayout, Sequenced
from grpo_stage.update.token_budget import OutOfMemory, PolicyBudget


Tensors = tuple[torch.Tensor, ...]


def token_logprobs(
    model: nn.Module,
    batch: TokenBatch,
    temperature: float,
    *,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each completion token, and the entropy of the distribution at its position.

    Logits are computed for completion tokens alone, and divided by the sampling temperature: the policy is the
    distribution that was sampled from.

    Args:
        model: a causal language model, wrapped (DDP) or not. Gradients flow if they are enabled.
        batch: a micro-batch.
        temperature: the sampling temperature.
        with_entropy: also return the entropy.
        entropy_gradient: let the gradient flow through the entropy as well.

    Returns:
        [B, T] log-probabilities and [B, T] entropies in nats (None unless asked for), both float32 and 0 outside the
        completion mask.
    """
    logits = completion_logits(model, batch, temperature)  # [B, T, V]
    log_normalizer = logits.logsumexp(dim=-1)  # [B, T]
    logprobs = logits.gather(-1, batch.completion_ids.unsqueeze(-1)).squeeze(-1) - log_normalizer  # [B, T]
    mask = batch.completion_mask.bool()
    entropy = None
    if with_entropy and entropy_gradient:
        probabilities = (logits - log_normalizer.unsqueeze(-1)).exp()
        entropy = (log_normalizer - (probabilities * logits).sum(dim=-1)).masked_fill(~mask, 0.0)
    elif with_entropy:
        with torch.no_grad():
            probabilities = (logits - log_normalizer.unsqueeze(-1)).exp_()
            entropy = (log_normalizer - probabilities.mul_(logits).sum(dim=-1)).masked_fill(~mask, 0.0)
    return logprobs.masked_fill(~mask, 0.0), entropy


def completion_logits(model: nn.Module, batch: TokenBatch, temperature: float) -> torch.Tensor:
    """[B, T, V] float32, each position's over the token that follows, divided by the temperature."""
    num_tokens = batch.completion_ids.size(1)
    position_ids = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    kwargs = {"logits_to_keep": num_tokens + 1} if takes_logits_to_keep(model) else {}
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=position_ids,
        use_cache=False,
        **kwargs,
    )
    # The logits at a position are those of the next token.
    return output.logits[:, -num_tokens - 1 : -1].float() / temperature


def token_energies(model: nn.Module, batch: TokenBatch, temperature: float) -> torch.Tensor:
    """[B, T], `gradient_energies` of each completion token under the policy that was sampled from."""
    logits = completion_logits(model, batch, temperature)  # [B, T, V]
    log_normalizer = logits.logsumexp(dim=-1)  # [B, T]
    logprobs = logits.gather(-1, batch.completion_ids.unsqueeze(-1)).squeeze(-1) - log_normalizer  # [B, T]
    return gradient_energies(logprobs, ((2 * logits).logsumexp(dim=-1) - 2 * log_normalizer).exp())


class FrozenPass:
    """A forward pass without gradient over any number of completions, in micro-batches.

    Args:
        layout: how completions become batches.
        budget: how many tokens go through a model at once.
        autocast: the precision of a forward pass.
        temperature: the sampling temperature.
    """

    def __init__(
        self,
        layout: PaddedLayout,
        budget: PolicyBudget,
        autocast: Callable[[], AbstractContextManager],
        temperature: float,
    ) -> None:
        self._layout = layout
        self._budget = budget
        self._autocast = autocast
        self._temperature = temperature

    def logprobs(self, model: nn.Module, sequences: Sequence[Sequenced], temperature: float | None = None) -> Tensors:
        """[T] of each completion, on the CPU, under `model` as it is now.

        At the sampling temperature, unless another is given.
        """
        temperature = self._temperature if temperature is None else temperature
        return self._run(sequences, lambda batch: token_logprobs(model, batch, temperature)[:1])[0]

    def logprobs_and_entropies(self, model: nn.Module, sequences: Sequence[Sequenced]) -> tuple[Tensors, Tensors]:
        """[T] of each completion, twice, on the CPU, at the sampling temperature."""
        logprobs, entropies = self._run(
            sequences, lambda batch: token_logprobs(model, batch, self._temperature, with_entropy=True)
        )
        return logprobs, entropies

    def energies(self, model: nn.Module, sequences: Sequence[Sequenced]) -> Tensors:
        """[T] of each completion, on the CPU, at the sampling temperature; see `token_energies`."""
        return self._run(sequences, lambda batch: (token_energies(model, batch, self._temperature),))[0]

    def rows(self, sequences: Sequence[Sequenced], forward: Callable[[TokenBatch], torch.Tensor]) -> Tensors:
        """The row of each completion in what `forward` gives, [B, 1, ...], on the CPU."""
        return self._run(sequences, lambda batch: (forward(batch),))[0]

    @torch.no_grad()
    def _run(
        self, sequences: Sequence[Sequenced], forward: Callable[[TokenBatch], Sequence[torch.Tensor | None]]
    ) -> list[Tensors]:
        """What `forward` gives, [B, T] each, by completion."""
        found: dict[int, list[torch.Tensor]] = {}

        def run(batch: TokenBatch) -> Sequence[torch.Tensor | None]:
            with self._autocast():
                return forward(batch)

        while len(found) < len(sequences):
            for positions in self._layout.split(sequences, self._budget.max_tokens):
                batch = self._layout.tokens([sequences[position] for position in positions])
                outcome = self._budget.attempt(partial(run, batch))
                if isinstance(outcome, OutOfMemory):
                    self._budget.give_way(batch.input_ids.shape, outcome)
                    break
                for row, position in enumerate(positions):
                    length = len(sequences[position].completion.token_ids)
                    found[position] = [each[row, :length].cpu() for each in outcome if each is not None]
        if not found:
            return [(), ()]
        return [tuple(each) for each in zip(*(found[i] for i in range(len(found))), strict=True)]


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model, wrapped or not, can compute the logits of the last tokens alone."""
    while hasattr(model, "module"):  # DDP
        model = model.module
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    return "logits_to_keep" in inspect.signature(model.forward).parameters
