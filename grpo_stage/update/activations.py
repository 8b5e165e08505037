"""Gradient checkpointing by memory: activations are kept for the backward pass where they fit, which is faster."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size
from peft import PeftModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from grpo_stage.distributed import all_gather
from grpo_stage.update.attention import attention_of
from grpo_stage.update.batch import Sequenced
from grpo_stage.update.head import MAX_LOGITS
from grpo_stage.update.logprobs import Forward


logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are

USABLE = {"cuda": 0.8, "cpu": 0.5}
"""The share of the free memory that activations may take; other processes want some of a CPU's."""
OF_ADAM = 12
"""Bytes for each trained weight: its gradient, and two states of the optimizer, none of which exist yet."""
OF_A_LOGIT = 16
"""Bytes: the logits of a chunk, what is computed from them, and their gradient."""


def keep_activations_if_they_fit(
    forward: Forward,
    model: nn.Module,
    rows: Sequence[Sequenced],
    max_tokens: int,
    autocast: Callable[[], AbstractContextManager],
) -> Callable[[], None] | None:
    """Switch gradient checkpointing off if a micro-batch fits into memory without it. All ranks call it together.

    Args:
        forward: how completions go through the model.
        model: the policy without DDP, with gradient checkpointing, on its device.
        rows: a few completions, to measure a token's activations.
        max_tokens: of a micro-batch, or of the longest sequence if that is longer.
        autocast: the precision of a forward pass.

    Returns:
        What switches it on again; None if it is on.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not base.is_gradient_checkpointing:
        return None
    layers = [module for module in base.modules() if getattr(module, "gradient_checkpointing", False)]

    def switch(is_on: bool) -> None:
        for layer in layers:
            layer.gradient_checkpointing = is_on

    if base.config._attn_implementation == "eager":  # what it keeps grows with the square of the length
        return None
    device = next(model.parameters()).device
    switch(False)
    try:
        needed = _kept_bytes(forward, model, rows, max_tokens, autocast) + OF_A_LOGIT * MAX_LOGITS[device.type]
        needed += OF_ADAM * sum(p.numel() for p in model.parameters() if p.requires_grad)
    except Exception as error:  # PyTorch says by words alone that memory ran out; all else is raised
        if not should_reduce_batch_size(error):
            raise
        needed = math.inf
    free = _free_bytes(device)
    fits = all(all_gather(needed <= free))
    logger.info(
        f"Gradient checkpointing is {'off' if fits else 'on'}: without it a micro-batch of {max_tokens} tokens takes "
        f"about {needed / 2**30:.1f} GiB (measured on a few tokens), and {free / 2**30:.1f} GiB can be used. "
        f"`disable_gradient_checkpointing: {str(not fits).lower()}` in the recipe fixes it."
    )
    if fits:
        return lambda: switch(True)
    switch(True)
    return None


def _kept_bytes(
    forward: Forward, model: nn.Module, rows: Sequence[Sequenced], num_tokens: int, autocast: Any
) -> float:
    """What a forward pass of so many tokens keeps for its backward pass: measured on one row and on all, and drawn
    out as a straight line."""
    (few, of_few), (many, of_many) = (
        (forward.layout.num_tokens(each), _measure(forward, model, each, autocast)) for each in (rows[:1], rows)
    )
    a_token = (of_many - of_few) / (many - few)
    return of_few + a_token * (num_tokens - few)


def _measure(forward: Forward, model: nn.Module, rows: Sequence[Sequenced], autocast: Any) -> int:
    """Bytes that the graph of a forward pass holds, weights left out."""
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = []  # so that no address is used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            held.append(storage)
        return tensor

    batch = forward.layout.tokens(rows)
    with attention_of(model, batch.inputs.shared_prompts), autocast(), saved_tensors_hooks(note, lambda x: x):
        forward.statistics(model, batch, 1.0)
    return sum(storage.nbytes() for storage in held)


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return USABLE["cpu"] * min(psutil.virtual_memory().available, _free_in_container()) / len(all_gather(None))
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return USABLE["cuda"] * (free + unused)


def _free_in_container() -> float:
    """Bytes that the control group of this process leaves; infinite without a limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or `max`
        return math.inf
