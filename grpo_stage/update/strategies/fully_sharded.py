"""FSDP2: each process holds a shard of every parameter, its gradient and its optimizer state."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._pytree import tree_map

from grpo_stage.distributed import all_gather, process_index
from grpo_stage.update import sharding


SHARD_FILE = "grpo_shard_{rank}.pt"
"""In every checkpoint: one process's shards of the trained weights and of the optimizer's states."""


class FullySharded:
    """PyTorch's FSDP2, as accelerate applies it.

    A layer is gathered for its own passes, forward and backward, so that every pass is a collective of all processes.
    In the backward pass gradients are averaged over processes; the loss is multiplied by their number to have the sum.
    """

    name = "FSDP2"
    is_collective = True

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        plugin = accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            # accelerate would have gradients summed, and log-probabilities returned, in half precision as well.
            dtype = plugin.mixed_precision_policy.param_dtype
            plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()  # kept back until the last pass, gradients would be whole in every process

    def backward(self, model: nn.Module, loss: torch.Tensor, *, is_last: bool) -> None:
        self._accelerator.backward(loss * self._accelerator.num_processes)

    def num_passes(self, own: int, gather: Callable[[Any], list[Any]]) -> int:
        return max(1, *gather(own))

    def num_frozen_passes(self, own: int) -> int:
        return max(all_gather(own))

    def any(self, is_due: bool) -> bool:
        return any(all_gather(is_due))

    def sum_gradients(self, model: nn.Module) -> None:
        """The backward passes have done it."""

    def has_finite_gradient(self, model: nn.Module) -> bool:
        gradients = [sharding.shard(p.grad) for p in model.parameters() if p.grad is not None]
        return bool(torch.isfinite(nn.utils.get_total_norm(gradients)))

    def try_backward(self, model: nn.Module, loss: torch.Tensor) -> None:
        loss.backward()
        model.zero_grad()

    def begin(self, model: nn.Module) -> None:
        """accelerate has done it."""

    def distribute(self, model: nn.Module) -> nn.Module:
        return fsdp2_prepare_model(self._accelerator, model)

    def drop_gradient(self, model: nn.Module) -> None:
        model.zero_grad()

    def grad_norm(self, model: nn.Module, norm: Any) -> Any:
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return sharding.state_dict(model, is_adapter=isinstance(model, PeftModel))

    def save(self, model: nn.Module, optimizer: Any, folder: str) -> None:
        state = {"weights": sharding.shards(model), "optimizer": tree_map(_packed, optimizer.state_dict())}
        torch.save(state, os.path.join(folder, SHARD_FILE.format(rank=process_index())))

    @torch.no_grad()
    def load(self, model: nn.Module, optimizer: Any | None, folder: str) -> None:
        file = os.path.join(folder, SHARD_FILE.format(rank=process_index()))
        state = torch.load(file, map_location="cpu", weights_only=True)
        for name, tensor in sharding.shards(model).items():
            tensor.copy_(state["weights"][name])
        if optimizer is not None:
            mesh = next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
            device = self._accelerator.device

            def unpack(value: Any) -> Any:
                if not _is_packed(value):
                    return value
                placements = [Replicate() if dim is None else Shard(dim) for dim in value["placements"]]
                return DTensor.from_local(
                    value["shard"].to(device), mesh, placements, shape=torch.Size(value["shape"]),
                    stride=tuple(value["stride"]),
                )  # fmt: skip

            optimizer.load_state_dict(tree_map(unpack, state["optimizer"], is_leaf=_is_packed))


def _packed(value: Any) -> Any:
    """A sharded tensor without its process group, which no file holds."""
    if not isinstance(value, DTensor):
        return value
    return {
        "shard": value.to_local(),
        "placements": [each.dim if isinstance(each, Shard) else None for each in value.placements],
        "shape": list(value.shape),
        "stride": list(value.stride()),
    }


def _is_packed(value: Any) -> bool:
    return isinstance(value, dict) and "placements" in value
