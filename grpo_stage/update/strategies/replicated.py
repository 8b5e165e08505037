"""All parameters in every process: a single one, or several under DDP."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from grpo_stage.distributed import sum_gradients


class ReplicatedParameters:
    """Every process has all parameters, and computes the gradient of its own samples.

    One process, or several under DDP, whose own averaging of gradients is off.
    """

    name = "replicated"
    is_collective = False

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def unwrap(self, model: nn.Module) -> nn.Module:
        return cast(nn.Module, self._accelerator.unwrap_model(model))

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        return self._accelerator.no_sync(model)

    def backward(self, model: nn.Module, loss: torch.Tensor, *, is_last: bool) -> None:
        self._accelerator.backward(loss)

    def num_passes(self, own: int, gather: Callable[[Any], list[Any]]) -> int:
        return max(1, *gather(own))  # they tell each other after each pass whether memory has run out

    def num_frozen_passes(self, own: int) -> int:
        return own

    def any(self, is_due: bool) -> bool:
        return is_due

    def sum_gradients(self, model: nn.Module) -> None:
        sum_gradients(model)

    def has_finite_gradient(self, model: nn.Module) -> bool:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return bool(torch.isfinite(nn.utils.get_total_norm(gradients)))

    def try_backward(self, model: nn.Module, loss: torch.Tensor) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(loss, trained[:1], allow_unused=True)

    def drop_gradient(self, model: nn.Module) -> None:
        model.zero_grad()

    def grad_norm(self, model: nn.Module, norm: Any) -> Any:
        return norm
