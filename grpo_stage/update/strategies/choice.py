"""The strategy of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator, DistributedType, PartialState

from grpo_stage.update.strategies.fully_sharded import FullySharded
from grpo_stage.update.strategies.replicated import ReplicatedParameters
from grpo_stage.update.strategies.strategy import Strategy


@contextmanager
def cpus_may_shard() -> Iterator[None]:
    """In this block an `Accelerator` uses FSDP where `accelerate launch` asks for it, on CPUs as well.

    PyTorch shards there, but accelerate looks for FSDP with accelerators alone: without a word, every process would
    hold all weights.
    """
    state = PartialState()
    is_asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if not (is_asked and state.distributed_type == DistributedType.MULTI_CPU):
        yield
        return
    state.distributed_type = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        state.distributed_type = DistributedType.MULTI_CPU


def choose_strategy(accelerator: Accelerator) -> Strategy:
    """The strategy that fits how accelerate distributes the parameters."""
    if accelerator.distributed_type == DistributedType.FSDP:
        assert accelerator.is_fsdp2, "the host's checks refuse FSDP1"
        return FullySharded(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from grpo_stage.update.strategies.zero import Zero

        return Zero(accelerator)
    return ReplicatedParameters(accelerator)
