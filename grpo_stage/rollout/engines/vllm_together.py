"""Ranks of one node that are one engine together (`vllm_tensor_parallel`): each holds a part of every weight.

vLLM runs in each of these ranks and computes the same steps there, so that it has to be asked for the same, in the
same order. So a rank asks for what all of them want, and keeps the answers to its own.
"""

import signal
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed

from grpo_stage.survival.stop import StopRequested


def ask(
    generate: Callable[[list[Any], list[Any]], Sequence[Any]], requests: Sequence[Any], params: Sequence[Any]
) -> Sequence[Any]:
    """vLLM's answers to this rank's requests, which are asked with those of the ranks that it shares its engine with.

    All of these ranks call it together, if with no requests.

    Args:
        generate: asks vLLM in this process.
        requests: this rank's.
        params: vLLM's `SamplingParams` for each of them.
    """
    group = _group()
    everyone: list[Any] = [None] * group.world_size
    distributed.all_gather_object(everyone, (list(requests), list(params)), group=group.cpu_group)
    own = group.rank_in_group
    start = sum(len(theirs) for theirs, _ in everyone[:own])
    answers = generate(*([each for part in parts for each in part] for parts in zip(*everyone, strict=True)))
    return answers[start : start + len(requests)]


def check(own_check: Callable[[], None]) -> None:
    """A safe point of all ranks that share an engine: where one stops, all do, since none can compute without it.

    Raises:
        StopRequested: if it is raised by the check of one of them.
    """
    asked = 0
    try:
        own_check()
    except StopRequested as stop:
        asked = stop.signal
    highest = torch.tensor(asked)
    distributed.all_reduce(highest, op=distributed.ReduceOp.MAX, group=_group().cpu_group)
    if highest:
        raise StopRequested(signal.Signals(int(highest)))


def _group() -> Any:
    """The ranks that share this rank's engine."""
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group()
