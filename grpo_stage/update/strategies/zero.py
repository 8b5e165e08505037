"""DeepSpeed: each process has a part of the optimizer's state (ZeRO-1), of the gradient (2) and the weights (3)."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from grpo_stage.distributed import all_gather, process_index
from grpo_stage.update import sharding
from grpo_stage.update.head import Halves


PART_FILE = "grpo_zero_{rank}.pt"
"""In every checkpoint: one process's part of weights and optimizer."""


class Zero:
    """DeepSpeed's engine, as accelerate makes it, driven step by step.

    accelerate would let every backward pass be followed by a step of the optimizer. Here the passes of a step add up,
    and the engine's own step comes where Trainer asks for the gradient's norm: it clips, steps and forgets the
    gradient in one call, and only then knows the norm. DeepSpeed takes the mean over processes; the loss is multiplied
    by their number to have the sum.

    Under ZeRO-3 hooks gather a module's weights for its own passes. DeepSpeed compares over the processes which
    modules were called in a pass, so all of them call the same: the output layer, which is called once for each chunk
    of completion tokens, has its weights gathered with the whole model's pass instead. Weights are not gathered ahead
    of their module: what DeepSpeed expects to come next is often the other kind of pass, with a gradient or without.
    """

    is_collective = True

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._has_gradient = False
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        zero = config["zero_optimization"]
        self._stage = int(zero["stage"])
        self._offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        self.name = f"ZeRO-{self._stage}"
        config["gradient_accumulation_steps"] = 1
        config["train_batch_size"] = config["train_micro_batch_size_per_gpu"] * accelerator.num_processes
        if self._stage == 3:
            zero["stage3_prefetch_bucket_size"] = 0
        self._config = config
        self._others: list[Any] = []  # engines; one that is let go of takes its hooks off the model

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model.module if isinstance(model, deepspeed.DeepSpeedEngine) else model

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, model: nn.Module, loss: torch.Tensor, *, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self._accelerator.num_processes, scale_wrt_gas=False)
        self._has_gradient = True

    def num_passes(self, own: int, gather: Callable[[Any], list[Any]]) -> int:
        return max(1, *gather(own))

    def num_frozen_passes(self, own: int) -> int:
        return max(all_gather(own)) if self._stage == 3 else own

    def any(self, is_due: bool) -> bool:
        return any(all_gather(is_due)) if self._stage == 3 else is_due

    def sum_gradients(self, model: nn.Module) -> None:
        """The backward passes have done it."""

    def has_finite_gradient(self, model: nn.Module) -> bool:
        return bool(torch.isfinite(nn.utils.get_total_norm(list(self._gradients()))))

    def try_backward(self, model: nn.Module, loss: torch.Tensor) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        # In this way no hook of DeepSpeed's sees a gradient, which it would keep.
        torch.autograd.grad(loss, trained[:1], allow_unused=True)

    def drop_gradient(self, model: nn.Module) -> None:
        self._has_gradient = False
        self._engine.zero_grad()
        if self._stage == 0:
            return
        optimizer = self._engine.optimizer
        optimizer.zero_grad()
        optimizer.averaged_gradients.clear()
        # As its own step does: the next pass is the first, which overwrites what an offloading optimizer has kept.
        optimizer.micro_step_id = 0 if self._stage == 3 else -1
        if self._offloads:
            optimizer.reset_cpu_buffers()

    def grad_norm(self, model: nn.Module, norm: Any) -> Any:
        if not self._has_gradient:
            return 0.0
        self._has_gradient = False
        if self._stage == 0:
            norm = nn.utils.get_total_norm(list(self._gradients()))
            self._engine.step()
            return norm
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def begin(self, model: nn.Module) -> None:
        if self._stage == 3:
            _gather_output_layer_with(model)

    def distribute(self, model: nn.Module) -> nn.Module:
        """Only ZeRO-3 divides the weights of a model that is not trained."""
        config = copy.deepcopy(self._config)
        config["zero_optimization"]["stage"] = 3 if self._stage == 3 else 0
        engine, *_ = deepspeed.initialize(model=model, config=config)
        engine.eval()
        self._others.append(engine)
        self.begin(engine.module)
        return engine.module

    def state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return sharding.state_dict(model, is_adapter=isinstance(model, PeftModel))

    def save(self, model: nn.Module, optimizer: Any, folder: str) -> None:
        if self._stage == 0 and process_index() > 0:
            return  # all have the same
        state = {"masters": [each.detach() for each in self._masters()], "weights": self._own_weights(model)}
        with self._base_optimizer() as base:
            torch.save(state | {"optimizer": base.state_dict()}, self._part_file(folder))

    @torch.no_grad()
    def load(self, model: nn.Module, optimizer: Any | None, folder: str) -> None:
        state = torch.load(self._part_file(folder), map_location="cpu", weights_only=True)
        for tensor, kept in zip(self._masters(), state["masters"], strict=True):
            tensor.copy_(kept)
        for name, tensor in self._own_weights(model).items():
            tensor.copy_(state["weights"][name])
        if self._stage in (1, 2):
            self._engine.optimizer.update_lp_params()
        if optimizer is not None:
            with self._base_optimizer() as base:
                base.load_state_dict(state["optimizer"])

    @property
    def _engine(self) -> Any:
        return self._accelerator.deepspeed_engine_wrapped.engine

    def _gradients(self) -> Iterator[torch.Tensor]:
        """This process's part of the step's gradient; all of it under stage 0."""
        if self._stage == 0 or self._offloads:
            owners = self._engine.module.parameters() if self._stage == 0 else self._masters()
            yield from (p.grad for p in owners if p.grad is not None)
        else:
            for gradients in self._engine.optimizer.averaged_gradients.values():
                yield from gradients or ()

    def _masters(self) -> list[torch.Tensor]:
        """What the optimizer moves, in float32: this process's part; the weights themselves under stage 0."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        with self._base_optimizer() as base:
            return [p for group in base.param_groups for p in group["params"]]

    def _own_weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Where the weights are not made from the masters."""
        return sharding.shards(model) if self._stage in (0, 3) else {}

    @contextmanager
    def _base_optimizer(self) -> Iterator[torch.optim.Optimizer]:
        """PyTorch's optimizer below DeepSpeed's, with its parameters: ZeRO-3 gives it those for a step alone."""
        optimizer = self._engine.optimizer
        if self._stage == 3:
            optimizer._set_fp32_optimizer_param_groups()
        try:
            yield getattr(optimizer, "optimizer", optimizer)
        finally:
            if self._stage == 3:
                optimizer._clear_fp32_optimizer_param_groups()

    def _part_file(self, folder: str) -> str:
        return os.path.join(folder, PART_FILE.format(rank=process_index() if self._stage > 0 else 0))


def _gather_output_layer_with(model: nn.Module) -> None:
    """Have the weights of the output layer gathered for the whole model's pass, however often the layer is called."""
    halves = Halves.of(model)
    if halves is None:
        return
    for module in halves.head.module.modules():
        sharding.unhook(module)
        for p in module.parameters(recurse=False):
            deepspeed.zero.register_external_parameter(model, p)
