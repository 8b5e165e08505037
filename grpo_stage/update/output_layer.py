"""The output layer in float32 (`cast_lm_head_to_fp32`), whatever precision the rest of the model computes in."""

from functools import partial
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn import functional


def compute_output_layer_in_float32(model: Any) -> None:
    """Have `model`, with or without an adapter, compute its logits from its last hidden states in float32.

    In half precision the rounding of the logits moves a log-probability by up to 0.03 at logits of 10 (MiniMax-M1,
    arXiv:2506.13585, found the output layer to be the main source of the difference between engine and trainer). The
    weights keep their precision; each pass makes a float32 copy of the layer's.

    Raises:
        ValueError: if the layer is no plain linear one, such as a quantized one.
    """
    head = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        layers = [head.original_module, *head.modules_to_save.values()]
    else:
        layers = [getattr(head, "base_layer", head)]  # under LoRA
    for layer in layers:
        if type(layer) is not nn.Linear:
            raise ValueError(
                f"`cast_lm_head_to_fp32: true` is not possible: the model's output layer is of the type "
                f"{type(layer).__name__}, and only a plain linear layer can compute in float32. Leave it out."
            )
        layer.forward = partial(_in_float32, layer)  # type: ignore[method-assign]


def _in_float32(layer: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if layer.bias is None else layer.bias.float()
        return functional.linear(hidden.float(), layer.weight.float(), bias)
