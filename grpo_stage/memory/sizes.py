"""Bytes of a model's weights, by what is trained and what is not, from shapes alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from grpo_stage.memory.optimizers import Trained


@dataclass(frozen=True, slots=True)
class Quantization:
    """How bitsandbytes holds the linear layers of a frozen base."""

    bits: int
    """4 or 8."""
    has_double: bool = True
    """Whether the scales of 4 bits are quantized as well (`double_quantization`)."""

    def bytes_of(self, weight: torch.Tensor) -> float:
        """Of a linear layer's matrix: 4 bits with a scale for each 64 elements, or 8 with one for each row."""
        count = weight.numel()
        if self.bits == 8:
            return count + 4 * weight.shape[0]
        scale = 1 + 4 / 256 if self.has_double else 4
        return count / 2 + scale * count / 64


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one model, bytes."""

    num_parameters: int
    """Of the base, adapters left out."""
    frozen: float
    """Weights that are not trained."""
    trained: float
    """Weights that are trained and are no adapter's."""
    adapters: float
    """Weights of adapters."""
    largest_dequantized: float
    """The copy that a quantized layer makes of its matrix to compute with; 0 without quantization."""
    trainable: tuple[Trained, ...]

    @property
    def weights(self) -> float:
        return self.frozen + self.trained + self.adapters

    @property
    def gradients(self) -> float:
        """In the precision of the weights that they are of."""
        return float(sum(each.numel * each.itemsize for each in self.trainable))


def sizes_of(model: Any, quantization: Quantization | None = None) -> Sizes:
    """Count the weights of a model on any device, `meta` included; a weight that layers share counts once."""
    quantized = {} if quantization is None else {id(weight): weight for weight in _quantized_weights(model)}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    frozen = trained = adapters = 0.0
    count, trainable = 0, []
    is_adapted = isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        is_adapter = is_adapted and parameter.requires_grad
        size = float(parameter.nbytes)
        if quantization is not None and id(parameter) in quantized:
            size = quantization.bytes_of(parameter)
        count += 0 if is_adapter else parameter.numel()
        if is_adapter:
            adapters += size
        elif parameter.requires_grad:
            trained += size
        else:
            frozen += size
        if parameter.requires_grad:
            trainable.append(Trained(name, parameter.shape, parameter.itemsize, id(parameter) in embeddings))
    largest = max((float(weight.nbytes) for weight in quantized.values()), default=0.0)
    return Sizes(count, frozen, trained, adapters, largest, tuple(trainable))


def _quantized_weights(model: Any) -> Iterator[torch.Tensor]:
    """Those of linear layers but the output layer; a mixture's experts are no linear layers in transformers 5."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    output = base.get_output_embeddings()
    for module in base.modules():
        if isinstance(module, nn.Linear) and module is not output and not module.weight.requires_grad:
            yield module.weight
