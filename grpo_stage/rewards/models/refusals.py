"""Refusals of a reward model by its files: a value head that does not fit, another base, an adapter of another kind.

They come before a model is loaded, and this module loads no torch.
"""

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_stage.rollout.engines.lora import lora_extras


if TYPE_CHECKING:
    import torch


logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are

HEAD_WEIGHT, HEAD_BIAS = "v_head.summary.weight", "v_head.summary.bias"
"""The names under which the host keeps a value head."""


def refuse_extras(config: Mapping[str, Any], path: str) -> None:
    """Raise ValueError unless an adapter_config.json is that of a plain LoRA."""
    extras = list(lora_extras(config))
    if str(config.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq")):  # those change the base
        extras.append("init_lora_weights")
    if extras:
        listed = ", ".join(f"`{key}: {config[key]}`" for key in extras)
        raise ValueError(
            f"`reward_model: {path}` is not possible with `reward_model_type: lora`: its adapter_config.json has "
            f"{listed}, and only a plain LoRA can be put on the policy's base. Write `reward_model_type: full` with "
            "the reward model's base as `reward_model` and this adapter as `reward_model_adapters`."
        )


def refuse_other_base(base: str | None, path: str, own: str) -> None:
    """Raise ValueError unless an adapter (`reward_model_type: lora`) was trained on the policy's own base.

    On another base of the same shape there would be scores too, and no sign that they mean nothing.

    Args:
        base: `base_model_name_or_path` of its adapter_config.json.
        path: its folder.
        own: `model_name_or_path`.
    """
    if not may_be_same_model(base, own):
        raise ValueError(
            f"`reward_model: {path}` with `reward_model_type: lora` stands on another model than the policy: its "
            f"adapter_config.json has `base_model_name_or_path: {base}`, and this run `model_name_or_path: {own}`, "
            f"on which its scores would mean nothing. Write `reward_model_type: full`, `reward_model: {base}` and "
            f"`reward_model_adapters: {path}`; or, if both are the same model in two places, write {own} into that "
            "adapter_config.json."
        )


def warn_of_other_base(base: str | None, path: str, own: str) -> None:
    """Warn if `reward_model_adapters` were trained on another model than the `reward_model` of the recipe."""
    if not may_be_same_model(base, own):
        logger.warning(
            f"`reward_model_adapters: {path}` was trained on {base} (`base_model_name_or_path` of its "
            f"adapter_config.json), and is put on `reward_model: {own}`: unless they are the same model in two "
            "places, its scores mean nothing."
        )


def may_be_same_model(base: str | None, path: str) -> bool:
    """True unless `base` is known to be another model: paths are compared resolved, and names of a hub as text."""
    return not base or os.path.realpath(base) == os.path.realpath(path)


def refuse_head(head: "Mapping[str, torch.Tensor] | None", key: str, path: str, hidden_size: int) -> None:
    """Raise ValueError unless `head` is a value head for a model of that hidden size.

    Args:
        head: the tensors of its file; None if there is no file.
        key: the YAML key that names the folder.
        path: the folder.
        hidden_size: H.
    """
    if head is None:
        raise ValueError(
            f"`{key}: {path}` has no value head (value_head.safetensors or value_head.bin), so that it would score "
            "at random. Give the folder that LLaMA-Factory's `stage: rm` wrote; what it wrote with LoRA is an "
            "adapter, which `reward_model_type: full` takes as `reward_model_adapters`."
        )
    found = {name: list(tensor.shape) for name, tensor in head.items()}
    expected = {HEAD_WEIGHT: [1, hidden_size], HEAD_BIAS: [1]}
    if any(found.get(name) != shape for name, shape in expected.items()):
        raise ValueError(
            f"`{key}: {path}` has a value head that does not fit, so that it would score at random: its file holds "
            f"{found}, and {expected} is expected, as LLaMA-Factory's `stage: rm` writes it for this model. Give the "
            "folder that it wrote, with the base that it was trained on."
        )
