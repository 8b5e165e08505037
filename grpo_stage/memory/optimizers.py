"""Bytes of an optimizer's states, from the shapes of the weights that it trains."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch


class Trained(NamedTuple):
    """A weight that is trained."""

    name: str
    shape: torch.Size
    itemsize: int
    """Bytes of an element; states are in the weight's own precision, unless an optimizer says otherwise."""
    is_embedding: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


_BLOCK, _SMALLEST_IN_8_BITS = 256, 4096
"""bitsandbytes keeps a float32 scale for each block, and weights below the second number in float32."""


def _of_full_states(count: int) -> Callable[[Trained], float]:
    return lambda weight: count * weight.numel * weight.itemsize


def _of_8_bit_states(count: int) -> Callable[[Trained], float]:
    def size(weight: Trained) -> float:
        # Trainer keeps the states of embeddings in 32 bits.
        if weight.numel < _SMALLEST_IN_8_BITS or weight.is_embedding:
            return count * 4 * weight.numel
        return count * (weight.numel + 4 * math.ceil(weight.numel / _BLOCK))

    return size


def _of_adafactor(weight: Trained) -> float:
    if len(weight.shape) < 2:
        return 4 * weight.numel
    return 4 * (weight.numel / weight.shape[-1] + weight.numel / weight.shape[-2])


def galore_states(rank: int) -> Callable[[Trained], float]:
    """GaLore's (arXiv:2403.03507): AdamW's of a projected gradient, and the projection itself, for matrices."""

    def size(weight: Trained) -> float:
        if len(weight.shape) != 2 or weight.is_embedding:
            return 2 * weight.numel * weight.itemsize
        short, long = sorted(weight.shape)
        return weight.itemsize * min(rank, short) * (2 * long + short)

    return size


STATES: dict[str, Callable[[Trained], float]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "adamw_hf"), _of_full_states(2)),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), _of_8_bit_states(2)),
    "paged_adamw_32bit": _of_full_states(2),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit"), _of_full_states(1)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), _of_8_bit_states(1)),
    "adafactor": _of_adafactor,
    **dict.fromkeys(("adagrad", "rmsprop"), _of_full_states(1)),
    "sgd": _of_full_states(0),
}
"""By the value of `optim`."""


def state_bytes(optim: str, weights: Iterable[Trained]) -> float | None:
    """Bytes of all states; None for an optimizer whose states are not known here."""
    size = STATES.get(optim)
    return None if size is None else float(sum(size(weight) for weight in weights))
