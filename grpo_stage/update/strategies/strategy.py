"""What depends on how the policy's parameters are distributed over processes."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn


class Strategy(Protocol):
    """One way to distribute the parameters. `model` is the policy as accelerate has wrapped it, or not."""

    name: str
    """As checkpoints note it: their parts fit the same strategy and number of processes alone."""
    is_collective: bool
    """Whether a pass through the model needs all processes: they make the same number of passes, in the same order,
    and a process that runs out of memory in one cannot make it again."""

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The policy itself."""

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        """In this block the passes of one step add up their gradients."""

    def backward(self, model: nn.Module, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add the gradient of a micro-batch to that of the step, which ends with the last one."""

    def num_passes(self, own: int, gather: Callable[[Any], list[Any]]) -> int:
        """How many passes with gradient this process makes that has `own` micro-batches."""

    def num_frozen_passes(self, own: int) -> int:
        """How many passes without gradient it makes that has `own` micro-batches."""

    def any(self, is_due: bool) -> bool:
        """Whether this process makes a pass: where passes are collective it does if one is due on any process."""

    def sum_gradients(self, model: nn.Module) -> None:
        """Leave the gradient of all samples: on every process, or each process's part of it."""

    def has_finite_gradient(self, model: nn.Module) -> bool:
        """Whether the gradient that this process holds is finite. It communicates with no other."""

    def try_backward(self, model: nn.Module, loss: torch.Tensor) -> None:
        """Go back from `loss` to a trained weight, and leave no gradient."""

    def drop_gradient(self, model: nn.Module) -> None:
        """Leave no gradient, so that the optimizer's step changes nothing."""

    def grad_norm(self, model: nn.Module, norm: Any) -> Any:
        """Trainer's norm of the whole gradient, as a number or a plain tensor. The optimizer's step comes next."""


class ShardedStrategy(Strategy, Protocol):
    """A strategy whose passes are collective: the processes hold weights, gradients or optimizer together."""

    def begin(self, model: nn.Module) -> None:
        """Called once accelerate has distributed the policy."""

    def distribute(self, model: nn.Module) -> nn.Module:
        """Another model (the reference), distributed as the policy is."""

    def state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The whole weights that a save of the policy holds, on the CPU of the first process; empty on the others."""

    def save(self, model: nn.Module, optimizer: Any, folder: str) -> None:
        """Write this process's part of weights and optimizer."""

    def load(self, model: nn.Module, optimizer: Any | None, folder: str) -> None:
        """Go on from what `save` wrote."""
