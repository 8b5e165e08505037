"""Weights that several processes hold together: which they are, and how a process sees some or all of them whole.

Under FSDP2 a unit (a decoder layer; the root has all the rest) is gathered in its own forward pass. Between passes
each process has a shard of every weight, a DTensor. Every gathering is a collective: all processes make the same ones.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether several processes hold the model's weights together."""
    return bool(_units(model))


def rest(model: nn.Module) -> None:
    """Let go of what a forward pass has left whole. Afterwards the model's parameters are this process's shards."""
    for unit in _units(model):
        unit.reshard()


def shards(model: nn.Module, *, trained: bool = True) -> dict[str, torch.Tensor]:
    """This process's part of each weight, by name: the memory that a change of the weight changes.

    Args:
        model: sharded or not.
        trained: only of the weights that are trained.
    """
    rest(model)
    return {name: shard(p.detach()) for name, p in model.named_parameters() if p.requires_grad or not trained}


def shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor of a model at `rest`; the same tensor if it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """In this block each process has the whole model, and a pass through it is no collective. It must not be trained.

    It takes the memory of all weights, on every process.
    """
    units = _units(model)
    groups = [_group(unit) for unit in units]
    after_forward = [None if group is None else group.post_forward_mesh_info for group in groups]
    if units:
        units[0]._get_fsdp_state()._lazy_init()  # a pass through a part of the model must not be the first one
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
    finally:
        for unit, group, mesh in zip(units, groups, after_forward, strict=True):
            if group is not None:
                group.post_forward_mesh_info = mesh
            unit.reshard()


class Block:
    """Modules whose own weights are gathered together."""

    def __init__(self, modules: Iterable[nn.Module], unit: Any = None) -> None:
        self.modules = frozenset(modules)
        self.is_sharded = unit is not None
        self._unit = unit

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """In this block the weights are whole in the modules; their memory is taken back afterwards."""
        if self._unit is not None:
            self._unit.unshard()
        try:
            yield
        finally:
            if self._unit is not None:
                self._unit.reshard()


def blocks(model: nn.Module) -> Sequence[Block]:
    """The model in parts that can be gathered one after another: as FSDP does, or all of it if nothing is sharded."""
    units = _units(model)
    if not units:
        return [Block(model.modules())]
    units[0]._get_fsdp_state()._lazy_init()
    left = set(model.modules())
    found = []
    for unit in reversed(units):  # inner units come after the ones that they are in
        own = left & set(unit.modules())
        left -= own
        found.append(Block(own, unit))
    return found[::-1]


def _units(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _group(unit: Any) -> Any:
    """What holds a unit's weights. Private to torch, as is all that tells how a unit behaves after a forward pass."""
    return unit._get_fsdp_state()._fsdp_param_group
