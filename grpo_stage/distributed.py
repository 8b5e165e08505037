"""Communication between the ranks of a run. Everything here also works in a single process."""

import gc
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.distributed as dist


T = TypeVar("T")
_objects: dict[Any, Any] = {}
"""The group that `all_gather` communicates in, by the run's own group."""


def gather_on_cpu(timeout: timedelta) -> None:
    """Have `all_gather` communicate on the CPU from now on, and wait for the slowest rank for as long as `timeout`.

    On the device, a rank that samples for long would have the others' watchdog (NCCL's) end the run, and each message
    would be copied there and back. All ranks call it together; nothing happens in a single process.
    """
    if dist.is_available() and dist.is_initialized():
        _objects[dist.group.WORLD] = dist.new_group(backend="gloo", timeout=timeout)


def all_gather(value: T) -> list[T]:
    """The values of all ranks, in order; `[value]` where there is one process.

    Raises:
        RuntimeError: if a rank is gone, or does not answer in time.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_objects.get(dist.group.WORLD))
    return values


def process_index() -> int:
    """The position of this rank's value in `all_gather`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_gradients(model: torch.nn.Module) -> None:
    """Give every rank the sum of all ranks' gradients; a gradient that a rank lacks counts as 0.

    A rank lacks the gradients of parameters that its completions never reach, such as an expert of a mixture. If no
    rank has a gradient for a parameter, it keeps none, and the optimizer ignores it.
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


def import_before_the_group() -> None:
    """Import what takes the process group into its functions' default arguments if there is one at the import.

    Such references would keep gloo's threads at the end of the run (see `leave_process_group`). accelerate imports
    DeepSpeed in every run in which it is installed.
    """
    if find_spec("deepspeed") is not None:
        import_module("deepspeed")


def leave_process_group() -> None:
    """Destroy the process group, at the end of a run to which no reference is left.

    gloo's threads end with the last reference to the group. DDP holds one, in a trainer that only garbage collection
    frees. A thread that releases a tensor while the interpreter exits aborts the process (SIGABRT).
    """
    if dist.is_available() and dist.is_initialized():
        _objects.clear()
        gc.collect()
        dist.destroy_process_group()
