"""What the ranks of a run tell one another; all of it works in a single process, too."""

import gc
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
    """Give every rank the sum of all ranks' gradients, in which one that a rank lacks is 0.

    A rank lacks the gradients of what its completions never reach, such as an expert of a mixture. A parameter for
    which no rank has one keeps none, so that the optimizer passes it by.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    trainable = [p for p in model.parameters() if p.requires_grad]
    is_reached = torch.tensor([p.grad is not None for p in trainable], dtype=torch.uint8, device=trainable[0].device)
    dist.all_reduce(is_reached, op=dist.ReduceOp.MAX)
    works = []
    for p, reached in zip(trainable, is_reached.tolist(), strict=True):
        if reached:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            works.append(dist.all_reduce(p.grad, async_op=True))
    for work in works:
        work.wait()


def leave_process_group() -> None:
    """Destroy the process group, at the end of a run that nothing refers to any more.

    gloo's threads end with the last reference to the group. DDP has one, in a trainer that is garbage in cycles. A
    thread that still lets go of a tensor while the interpreter exits aborts the process (SIGABRT).
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
