"""Everything that depends on how the policy's parameters are distributed over processes."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from grpo_stage.distributed import sum_gradients


class Strategy(Protocol):
    """One way to distribute the parameters. `model` is the policy as accelerate has wrapped it, or not."""

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The policy itself."""

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        """In this block a backward pass sums no gradients over processes."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a micro-batch to that of the step."""

    def num_passes(self, own: int, gather: Callable[[Any], list[Any]]) -> int:
        """How many passes this process makes that has `own` micro-batches: every backward may be a collective."""

    def sum_gradients(self, model: nn.Module) -> None:
        """Give every process the gradient of all samples."""

    def has_finite_gradient(self, model: nn.Module) -> bool:
        """Whether this process's gradient is finite."""


class ReplicatedParameters:
    """Every process has all parameters, and computes the gradient of its own samples.

    One process, or several under DDP, whose own averaging of gradients is off.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def unwrap(self, model: nn.Module) -> nn.Module:
        return cast(nn.Module, self._accelerator.unwrap_model(model))

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        return self._accelerator.no_sync(model)

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    def num_passes(self, own: int, gather: Callable[[Any], list[Any]]) -> int:
        return max(1, *gather(own))

    def sum_gradients(self, model: nn.Module) -> None:
        sum_gradients(model)

    def has_finite_gradient(self, model: nn.Module) -> bool:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return bool(torch.isfinite(nn.utils.get_total_norm(gradients)))


def choose_strategy(accelerator: Accelerator) -> Strategy:
    """The strategy that fits how accelerate distributes the parameters."""
    sharded = (DistributedType.DEEPSPEED, DistributedType.FSDP)
    assert accelerator.distributed_type not in sharded, "the host's checks refuse what shards parameters"
    return ReplicatedParameters(accelerator)
