"""Log-probabilities and entropies from a model's last hidden states, without the logits of all tokens at once.

M completion tokens    H hidden size    V vocabulary
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from peft import PeftModel
from torch import nn


T = TypeVar("T")
MAX_LOGITS = {"cuda": 2**27, "cpu": 2**25}
"""Logits that are held at once: 512 and 128 MiB in float32, times a few for what is computed from them."""


class TokenStatistics(NamedTuple):
    """What is known of each token, [M] float32 each."""

    logprobs: torch.Tensor
    """The log-probability."""
    entropies: torch.Tensor
    """Of the distribution that it is from, in nats."""
    collisions: torch.Tensor
    """The sum of the squared probabilities of that distribution; without gradient."""


@dataclass(frozen=True, slots=True)
class OutputLayer:
    """A causal language model's last layer, as its forward pass applies it: hidden states [M, H] -> logits [M, V].

    Any module can be the layer: adapted (LoRA), trained whole, quantized, computed in float32.
    """

    module: nn.Module
    vocabulary: int
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> "OutputLayer | None":
        """That of an unwrapped Hugging Face model; None if it has none that is known."""
        module = model.get_output_embeddings()
        if module is None:
            return None
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        return cls(module, config.vocab_size, scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.module(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def statistics(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, max_logits: int | None = None
    ) -> TokenStatistics:
        """Of the tokens `targets` [M], predicted from `hidden` [M, H], at `temperature`.

        Forward and backward hold at most `max_logits` logits at a time (`MAX_LOGITS`): the tokens go through in
        chunks, and the backward pass computes the logits of a chunk again, except those of the last one, which it
        still has.
        """
        chunk = max(1, (max_logits or MAX_LOGITS[hidden.device.type]) // self.vocabulary)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        call = _Call(self, temperature, chunk, torch.is_grad_enabled(), _autocast(hidden.device.type))
        return TokenStatistics(*_InChunks.apply(call, hidden, targets, *trained))


@dataclass(frozen=True, slots=True)
class Halves:
    """A causal language model as a body, which gives hidden states, and an output layer."""

    model: Any
    """The Hugging Face model of both; adapters are layers of it."""
    body: nn.Module
    head: OutputLayer

    @classmethod
    def of(cls, model: Any) -> "Halves | None":
        """Those of a model, wrapped or not; None if it is not made of two."""
        while hasattr(model, "module"):  # DDP
            model = model.module
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        body = getattr(model, "base_model", model)
        head = OutputLayer.of(model) if hasattr(model, "get_output_embeddings") else None
        return None if body is model or head is None else cls(model, body, head)

    def call(self, wrapped: nn.Module, run: Callable[[], T], **arguments: Any) -> T:
        """What `run` gives in the place of the model's forward pass, inside of all that wraps the model.

        Args:
            wrapped: the model as it was given to `of`; its wrappers and hooks act as in every forward pass.
            run: calls body and head.
            **arguments: for the wrappers to see.
        """
        own = vars(self.model).get("forward")
        self.model.forward = lambda *args, **kwargs: run()
        try:
            return wrapped(**arguments)
        finally:
            del self.model.forward
            if own is not None:
                self.model.forward = own


def statistics_of_logits(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> TokenStatistics:
    """The same from whole logits [M, V]."""
    logits = logits.float() / temperature
    logprobs = logits.log_softmax(dim=-1)  # [M, V]
    probabilities = logprobs.exp()
    entropies = -(probabilities * logprobs).sum(dim=-1)
    collisions = probabilities.detach().square().sum(dim=-1)
    return TokenStatistics(logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropies, collisions)


@dataclass(frozen=True, slots=True)
class _Call:
    """What a call needs besides tensors."""

    head: OutputLayer
    temperature: float
    chunk: int
    has_gradient: bool
    autocast: Callable[[], Any]

    def logits(self, hidden: torch.Tensor, is_kept: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """A chunk's hidden states [m, H] and logits [m, V]; joined by a graph if they are kept for the gradient."""
        is_kept = is_kept and self.has_gradient
        with torch.set_grad_enabled(is_kept), self.autocast():
            states = hidden.detach().requires_grad_(is_kept)
            return states, self.head(states)

    def scaled(self, logits: torch.Tensor) -> torch.Tensor:
        """[m, V] float32, divided by the temperature; may be `logits` itself."""
        logits = logits.detach().float()
        return logits if self.temperature == 1.0 else logits / self.temperature


def _autocast(device_type: str) -> Callable[[], Any]:
    """The autocast of the forward pass, for the backward pass, which PyTorch runs without."""
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype, enabled=enabled)


class _InChunks(torch.autograd.Function):
    """(hidden [M, H], targets [M], the layer's trained parameters) -> log-probabilities, entropies, collisions [M].

    With z the logits, l = z / temperature, p = softmax(l) and H the entropy:

        d log p_y / d l = 1[y] - p        d H / d l = -p (log p + H)
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, hidden: torch.Tensor, targets: torch.Tensor, *trained: nn.Parameter
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.call, ctx.trained = call, trained
        columns = []
        for part in _parts(len(hidden), call.chunk):
            states, logits = call.logits(hidden[part], is_kept=part.stop == len(hidden))
            scaled = call.scaled(logits)  # [m, V]
            normalizers = scaled.logsumexp(dim=-1, keepdim=True)  # [m, 1]
            logprobs = scaled.gather(-1, targets[part].unsqueeze(-1)) - normalizers  # [m, 1]
            p = (scaled - normalizers).exp_()  # [m, V]
            collisions = torch.linalg.vector_norm(p, dim=-1).square()  # [m]
            entropies = normalizers.squeeze(-1) - p.mul_(scaled).sum(dim=-1)  # [m]
            columns.append((logprobs.squeeze(-1), entropies, collisions, normalizers.squeeze(-1)))
            ctx.kept = states, logits
        logprobs, entropies, collisions, normalizers = (torch.cat(column) for column in zip(*columns, strict=True))
        if not call.has_gradient:
            ctx.kept = None
        ctx.save_for_backward(hidden, targets, normalizers, entropies)
        ctx.mark_non_differentiable(collisions)
        ctx.set_materialize_grads(False)
        return logprobs, entropies, collisions

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, targets, normalizers, entropies = ctx.saved_tensors
        call: _Call = ctx.call
        of_logprobs = torch.zeros_like(normalizers) if slopes[0] is None else slopes[0]
        of_hidden = torch.empty_like(hidden)
        of_trained: list[torch.Tensor | None] = [None] * len(ctx.trained)
        for part in _parts(len(hidden), call.chunk):
            is_last = part.stop == len(hidden)
            states, logits = ctx.kept if is_last else call.logits(hidden[part], is_kept=True)
            log_p = call.scaled(logits) - normalizers[part].unsqueeze(-1)  # [m, V]
            slope_of_y = of_logprobs[part].unsqueeze(-1)  # [m, 1]
            if slopes[1] is None:
                slope = log_p.exp_().mul_(-slope_of_y)
            else:
                p = log_p.exp()
                log_p.add_(entropies[part].unsqueeze(-1)).mul_(slopes[1][part].unsqueeze(-1)).add_(slope_of_y)
                slope = log_p.mul_(p).neg_()
            slope.scatter_add_(-1, targets[part].unsqueeze(-1), slope_of_y)
            slope = slope.div_(call.temperature).to(logits.dtype)
            own, *of_parameters = torch.autograd.grad(logits, [states, *ctx.trained], slope, allow_unused=True)
            of_hidden[part] = own
            of_trained = [_sum(total, more) for total, more in zip(of_trained, of_parameters, strict=True)]
        ctx.kept = None
        return None, of_hidden, None, *of_trained


def _parts(length: int, chunk: int) -> Iterator[slice]:
    """Consecutive slices of at most `chunk`; one, empty, of nothing."""
    for start in range(0, max(length, 1), chunk):
        yield slice(start, min(start + chunk, length))


def _sum(total: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    return more if total is None else total if more is None else total.add_(more)
