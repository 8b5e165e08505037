"""A reward model's LoRA adapter (`reward_model_type: lora`) on the base that the policy stands on."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn import functional

from grpo_stage.rewards.models.refusals import refuse_extras


class AdapterOnPolicy:
    """A reward model's LoRA adapter, added to the outputs of the policy's layers while the policy's own is off.

    It is no adapter of PEFT's: as one it would be a part of the policy's state, of its saves and of its optimizer.
    The weights of the policy are never touched.
    """

    def __init__(self, policy: PeftModel, config: LoraConfig, weights: Mapping[str, torch.Tensor], path: str) -> None:
        """
        Args:
            policy: its base is the one that the adapter was trained on.
            config: of the adapter.
            weights: `<module>.lora_A.weight` and `<module>.lora_B.weight`, as PEFT saves them.
            path: the adapter's folder, for messages.

        Raises:
            ValueError: if it is not a plain LoRA, or does not fit the policy's base.
        """
        refuse_extras(config.to_dict(), path)
        self._policy = policy
        self._scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        self._layers: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
        names = sorted({name.rpartition(".lora_")[0] for name in weights})
        modules: dict[str, Any] = dict(policy.named_modules())
        for name in names:
            down, up = (weights.get(f"{name}.lora_{part}.weight") for part in "AB")
            module = modules.get(name)
            shape = (getattr(module, "in_features", None), getattr(module, "out_features", None))
            if module is None or down is None or up is None or shape != (down.shape[1], up.shape[0]):
                raise ValueError(
                    f"`reward_model: {path}` does not fit the policy's base: its adapter changes {name}, which the "
                    f"base {'has in another shape' if module is not None else 'does not have'}. An adapter "
                    "(`reward_model_type: lora`) has to be trained on the very `model_name_or_path` of this run; "
                    "write `reward_model_type: full` with the reward model's own base as `reward_model` and this "
                    "adapter as `reward_model_adapters`."
                )
            self._layers.append((module, down, up))

    @contextmanager
    def activate(self) -> Iterator[nn.Module]:
        """Yield the policy as the reward model's backbone."""
        policy = self._policy
        requires_grad = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
        hooks = []
        try:
            # Here and not in `__init__`, since the policy may be placed on its device later.
            self._layers = [
                (module, down.to(module.weight.device), up.to(module.weight.device))
                for module, down, up in self._layers
            ]
            with policy.disable_adapter():
                for module, down, up in self._layers:
                    hooks.append(module.register_forward_hook(partial(_add_lora, down, up, self._scale)))
                yield policy
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, required in requires_grad:  # PEFT switches those of its adapter
                parameter.requires_grad_(required)


def _add_lora(
    down: torch.Tensor,
    up: torch.Tensor,
    scale: float,
    module: nn.Module,
    inputs: tuple[Any, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    hidden = functional.linear(inputs[0].to(down.dtype), down)
    return (output + functional.linear(hidden, up) * scale).to(output.dtype)
