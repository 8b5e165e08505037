"""Weights that several processes hold together: which they are, and how a process sees some or all of them whole.

Between passes each process has a shard of every weight, and a pass gathers what it needs. Every gathering is a
collective: all processes make the same ones. Under FSDP2 a weight is a DTensor, and a unit (a decoder layer; the root
has all the rest) is gathered in its own forward pass. Under ZeRO-3 the shard is an attribute of a weight (`ds_tensor`)
whose own data is empty, and hooks on each module gather the module's own weights.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from grpo_stage.distributed import process_index


def is_sharded(model: nn.Module) -> bool:
    """Whether several processes hold the model's weights together."""
    return bool(_units(model) or _of_zero3(model))


def rest(model: nn.Module) -> None:
    """Let go of what a forward pass has left whole. Afterwards the model's parameters are this process's shards."""
    for unit in _units(model):
        unit.reshard()
    parameters = _of_zero3(model)
    for p in parameters:
        p.ds_active_sub_modules.clear()  # a backward pass that ends in the middle of the model leaves entries
    if left := [p for p in parameters if p.ds_status.name == "AVAILABLE"]:
        left[0].partition(param_list=left)


def shards(model: nn.Module, *, trained: bool = True) -> dict[str, torch.Tensor]:
    """This process's part of each weight, by name: the memory that a change of the weight changes.

    Args:
        model: sharded or not.
        trained: only of the weights that are trained.
    """
    rest(model)
    return {name: shard(p).detach() for name, p in model.named_parameters() if p.requires_grad or not trained}


def shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor."""
    if isinstance(tensor, DTensor):
        return _detached(tensor).to_local()
    return getattr(tensor, "ds_tensor", tensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor of a model at `rest`, without a gradient; its own memory if it is not sharded."""
    if isinstance(tensor, DTensor):
        return _detached(tensor).full_tensor()
    if not hasattr(tensor, "ds_tensor"):
        return tensor.detach()
    with _gathering([tensor]):
        return tensor.detach().clone()


def state_dict(model: nn.Module, *, is_adapter: bool) -> dict[str, torch.Tensor]:
    """The whole weights that a save of the model holds, on the CPU of the first process; empty on the others.

    One is gathered at a time.

    Args:
        model: sharded or not.
        is_adapter: only of what is trained: the rest is in files already.
    """
    rest(model)
    owned: dict[str, torch.Tensor] = {**dict(model.named_parameters(remove_duplicate=False))}
    if is_adapter:
        owned = {name: p for name, p in owned.items() if p.requires_grad}
    else:
        owned |= dict(model.named_buffers(remove_duplicate=False))
        owned = {name: owned[name] for name in model.state_dict() if name in owned}
    found: dict[int, torch.Tensor] = {}  # a tied weight stays one tensor, which is saved once
    for tensor in owned.values():
        if id(tensor) not in found:
            all_of_it = whole(tensor)
            found[id(tensor)] = all_of_it.cpu() if process_index() == 0 else torch.empty(0)
    return {name: found[id(tensor)] for name, tensor in owned.items()} if process_index() == 0 else {}


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """In this block each process has the whole model, and a pass through it is no collective. It must not be trained.

    It takes the memory of all weights, on every process.
    """
    if parameters := _of_zero3(model):
        rest(model)
        with _gathering(parameters), ExitStack() as hooks:
            for module in model.modules():
                hooks.enter_context(_without_hooks(module))
            yield
        return
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
    """Modules whose own weights are gathered together.

    Args:
        modules: in no other block.
        gather: makes a block of code in which they are; nothing if they are not sharded.
    """

    def __init__(
        self, modules: Iterable[nn.Module], gather: Callable[[], AbstractContextManager[Any]] | None = None
    ) -> None:
        self.modules = frozenset(modules)
        self.is_sharded = gather is not None
        self.gathered: Callable[[], AbstractContextManager[Any]] = gather or nullcontext
        """In this block the weights are whole in the modules; their memory is taken back afterwards."""


def blocks(model: nn.Module) -> Sequence[Block]:
    """The model in parts that can be gathered one after another: decoder layers, and the rest; all of it if nothing is
    sharded."""
    units = _units(model)
    is_zero3 = bool(_of_zero3(model))
    if units:
        units[0]._get_fsdp_state()._lazy_init()
    elif is_zero3:
        rest(model)
        units = [model, *_layers(model)]
    else:
        return [Block(model.modules())]
    left = set(model.modules())
    found = []
    for unit in reversed(units):  # inner units come after the ones that they are in
        own = left & set(unit.modules())
        left -= own
        found.append(Block(own, partial(_gathering, _own(own)) if is_zero3 else partial(_unsharded, unit)))
    return found[::-1]


def unhook(module: nn.Module) -> None:
    """Have ZeRO-3 leave the module's own weights alone in its passes, for good."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__module__", "").startswith("deepspeed."):
                del hooks[key]


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    kept = [(hooks, dict(hooks)) for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    unhook(module)
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)


def _gathering(parameters: Sequence[Any]) -> AbstractContextManager[Any]:
    """A block in which each process has these weights of a ZeRO-3 model whole; they must be at `rest` before."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


@contextmanager
def _unsharded(unit: Any) -> Iterator[None]:
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def _detached(tensor: DTensor) -> DTensor:
    return cast(DTensor, tensor.detach())


def _of_zero3(model: nn.Module) -> list[Any]:
    return [p for p in model.parameters() if hasattr(p, "ds_tensor")]


def _own(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [p for module in modules for p in module.parameters(recurse=False)]


def _layers(model: nn.Module) -> list[nn.Module]:
    """What a model's own class says is not to be split over devices: its decoder layers."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in names]


def _units(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _group(unit: Any) -> Any:
    """What holds a unit's weights. Private to torch, as is all that tells how a unit behaves after a forward pass."""
    return unit._get_fsdp_state()._fsdp_param_group
