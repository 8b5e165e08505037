"""What an update computes at least, and what the device could: for `update_tflops` and `update_mfu`.

Model FLOPs as PaLM counts them (arXiv:2204.02311, appendix B): those of matrix products, of the tokens that the
gradient needs, each once. What an implementation computes twice (gradient checkpointing, a prompt that is repeated,
padding) takes time and counts as nothing.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from grpo_stage.update.batch import Sequenced


PEAKS = {
    "A100": 312e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
}
"""FLOP/s of dense products in bf16 or fp16, by a part of the name that CUDA gives the device; the first that fits.
From NVIDIA's pages of each, less the factor of 2 that they add for sparsity."""


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of `device` at most, in half precision; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def flops_of_update(model: nn.Module, sequences: Sequence[Sequenced]) -> float:
    """Of the forward and backward pass over `sequences`.

    With N the weights that a token meets (embeddings are looked up, and of experts a token meets some), forward takes
    2 N a token. Backward takes 2 a weight for the gradient of what is below it, if anything below is trained, and 2
    for its own, if it is trained: 6 N in all for a whole model, 4 N under an adapter. The output layer is met where a
    sampled token is predicted. Attention takes 4 x heads x head size x layers for each key that a token sees, and
    twice that in the backward pass; PaLM counts all keys of a sequence, and this those up to the token. A sliding
    window, and what reads images, are not regarded.

    Args:
        model: a causal language model, without DDP.
        sequences: what is trained on. A prompt that several have goes through once.
    """
    prompts = {each.prompt.identity: len(each.prompt.token_ids) for each in sequences}
    lengths = [(len(each.prompt.token_ids), len(each.completion.token_ids)) for each in sequences]
    num_sampled = sum(each.completion.num_sampled for each in sequences)
    return token_flops(model).of_batch(prompts.values(), lengths, num_sampled)


@dataclass(frozen=True, slots=True)
class TokenFlops:
    """FLOPs of a token in the forward and backward pass."""

    body: float
    """In all weights but the output layer."""
    head: float
    """In the output layer."""
    key: float
    """In attention, for each key that the token sees."""
    forward: float
    """Of `body`, the forward pass."""

    def of_batch(
        self, prompts: Iterable[int], completions: Iterable[tuple[int, int]], num_sampled: int | None = None
    ) -> float:
        """Of a batch.

        Args:
            prompts: lengths; each goes through once.
            completions: the length of the prompt that each sees, and its own.
            num_sampled: how many of the completions' tokens the policy wrote; all by default.
        """
        prompts, completions = list(prompts), list(completions)
        if num_sampled is None:
            num_sampled = sum(own for _, own in completions)
        num_tokens = sum(prompts) + sum(own - 1 for _, own in completions)  # the last one predicts nothing
        num_keys = sum(map(_pairs, prompts)) + sum((own - 1) * prompt + _pairs(own - 1) for prompt, own in completions)
        return self.body * num_tokens + self.head * num_sampled + self.key * num_keys


def token_flops(model: nn.Module) -> TokenFlops:
    """Of a causal language model on any device, `meta` included."""
    body, head, forward = _flops_of_weights(model)
    text: Any = _base_model(model).config.get_text_config()
    num_heads = getattr(text, "num_attention_heads", 0)
    head_size = getattr(text, "head_dim", None) or (text.hidden_size // num_heads if num_heads else 0)
    return TokenFlops(body, head, 3 * 4 * num_heads * head_size * text.num_hidden_layers, forward)


def _pairs(length: int) -> int:
    """(token, key) with the key up to the token."""
    return length * (length + 1) // 2


def _flops_of_weights(model: nn.Module) -> tuple[float, float, float]:
    """FLOPs of a token in all weights but the output layer, in that one, and of the first, in the forward pass."""
    base = _base_model(model)
    head = set(base.get_output_embeddings().modules()) if base.get_output_embeddings() is not None else set()
    share = share_of_experts(base.config.get_text_config())
    totals = [0.0, 0.0]
    forward = 0.0
    has_trained = False  # so far, from the bottom
    for name, module in base.named_modules():
        path = name.split(".")
        if "original_module" in path:  # stands beside the copy of it that is trained
            continue
        own = list(
            module.parameters(recurse=isinstance(module, BaseTunerLayer))
        )  # the layer below an adapter is in it
        has_trained = has_trained or any(p.requires_grad for p in own)
        for size, is_trained in _weights(module):
            flops = 2 * size * (share if "experts" in path else 1)
            totals[module in head] += flops * (1 + has_trained + is_trained)
            forward += 0.0 if module in head else flops
    body, of_head = totals
    return body, of_head, forward


def _weights(module: nn.Module) -> Iterator[tuple[int, bool]]:
    """The sizes of the weights that a module multiplies with, and whether they are trained."""
    if isinstance(module, nn.Linear):  # a quantized one packs its weight
        yield module.in_features * module.out_features, module.weight.requires_grad
    elif not isinstance(module, nn.Embedding):
        for p in module.parameters(recurse=False):
            shape = getattr(p, "ds_shape", p.shape)  # under ZeRO-3 a weight is empty between passes
            if len(shape) > 1:
                yield math.prod(shape), p.requires_grad


def share_of_experts(config: Any) -> float:
    """Of a mixture's experts, the share that a token meets; 1 without experts, or if the config does not say."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    of_all = next((number for name in names if (number := getattr(config, name, None))), None)
    of_token = getattr(config, "num_experts_per_tok", None)
    return of_token / of_all if of_all and of_token else 1.0


def _base_model(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
