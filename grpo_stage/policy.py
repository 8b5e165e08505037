"""The policy's log-probabilities, and the reference it is held to.

B completions in a micro-batch    T completion tokens    V vocabulary
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from .types import PolicyBatch


def token_logprobs(
    model: nn.Module, batch: PolicyBatch, temperature: float, *, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each completion token, and the entropy of the distribution it was drawn from.

    Logits are computed for completion tokens alone, and divided by the sampling temperature: the policy is the
    distribution that was sampled from.

    Args:
        model: a causal language model, wrapped (DDP) or not. Gradients flow if they are enabled.
        batch: a micro-batch.
        temperature: the sampling temperature.
        with_entropy: also return the entropy.

    Returns:
        [B, T] log-probabilities and [B, T] entropies in nats (without gradient; None unless asked for), both float32
        and 0 outside the completion mask.
    """
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
    logits = output.logits[:, -num_tokens - 1 : -1].float() / temperature  # [B, T, V]
    log_normalizer = logits.logsumexp(dim=-1)  # [B, T]
    logprobs = logits.gather(-1, batch.completion_ids.unsqueeze(-1)).squeeze(-1) - log_normalizer  # [B, T]
    mask = batch.completion_mask.bool()
    entropy = None
    if with_entropy:
        with torch.no_grad():
            probabilities = (logits - log_normalizer.unsqueeze(-1)).exp_()
            entropy = (log_normalizer - probabilities.mul_(logits).sum(dim=-1)).masked_fill(~mask, 0.0)
    return logprobs.masked_fill(~mask, 0.0), entropy


def disable_dropout(model: nn.Module) -> None:
    """Turn dropout off for good: the ratio compares two passes through the same network."""
    module: Any
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # Some architectures keep the rate on the module or read it from the config, and call F.dropout themselves.
        for owner in (module, getattr(module, "config", None)):
            for name, value in vars(owner).items() if owner is not None else ():
                if isinstance(value, float) and ("drop" in name or "jitter" in name):
                    setattr(owner, name, 0.0)


class ReferencePolicy(Protocol):
    """The policy at the start of the run, or another model: what the KL term holds the policy to."""

    def activate(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        """Yield the reference; `policy` (unwrapped) is itself again afterwards."""


class AdapterOffReference:
    """The base model: right where training starts from a new adapter, which changes nothing at first."""

    @contextmanager
    def activate(self, policy: Any) -> Iterator[nn.Module]:
        with policy.disable_adapter():
            yield policy


class InitialWeightsReference:
    """The trainable weights as they were at the start, swapped in for the reference pass.

    Right wherever the start is not "adapter off": a continued adapter (whose start is what SFT taught), PiSSA (whose
    base is only a residual), freeze and full tuning. It costs a copy of the trainable weights alone.
    """

    def __init__(self, policy: nn.Module) -> None:
        self._initial = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}

    @contextmanager
    def activate(self, policy: nn.Module) -> Iterator[nn.Module]:
        parameters = dict(policy.named_parameters())
        trained = {name: parameters[name].data for name in self._initial}
        try:
            for name, initial in self._initial.items():
                parameters[name].data = initial
            yield policy
        finally:
            for name, data in trained.items():
                parameters[name].data = data


class ModelReference:
    """Another model (`ref_model`)."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model.eval()

    @contextmanager
    def activate(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield self._model


def takes_logits_to_keep(model: Any) -> bool:
    while hasattr(model, "module"):  # DDP
        model = model.module
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    return "logits_to_keep" in inspect.signature(model.forward).parameters
