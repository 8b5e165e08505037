"""What the ranks of a run tell one another; all of it works in a single process, too."""

from typing import TypeVar

import torch
import torch.distributed as dist


T = TypeVar("T")


def all_gather(value: T) -> list[T]:
    """The values of all ranks, in order; `[value]` where there is one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def process_index() -> int:
    """Where this rank's value stands in `all_gather`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_gradients(model: torch.nn.Module) -> None:
    """Give every rank the sum of all ranks' gradients. Each rank must have run the model at least once."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    works = [dist.all_reduce(p.grad, async_op=True) for p in model.parameters() if p.grad is not None]
    for work in works:
        work.wait()
