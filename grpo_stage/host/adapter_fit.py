"""Whether a LoRA adapter fits the layers of its model, by the adapter's files alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from grpo_stage.host.adapters import adapter_config, adapter_folder
from grpo_stage.host.log import get_logger
from grpo_stage.rewards.models.refusals import may_be_same_model


logger = get_logger(__name__)

_LORA_WEIGHT = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class AdapterOnModel:
    """An adapter and its model, as the keys name them."""

    key: str
    adapter: str
    """Its folder; an adapter on a hub is not checked."""
    subfolder: str | None
    """The adapter's subfolder of that folder."""
    base_key: str
    base: str

    def __str__(self) -> str:
        return f"`{self.key}: {self.adapter}`"

    @property
    def shown_base(self) -> str:
        return f"`{self.base_key}: {self.base}`"


def refuse_misfit(adapter: AdapterOnModel, model: nn.Module, is_resized: bool) -> None:
    """Refuse an adapter whose layers do not fit its model, and warn of one that names another model.

    Args:
        adapter: the adapter.
        model: its model; the weights may be on the meta device.
        is_resized: whether the run adds tokens, so that the output layer of the loaded model may have more rows.

    Raises:
        ValueError: naming the adapter, the layer, both shapes, and the remedy.
    """
    config = adapter_config(adapter.adapter, adapter.subfolder)
    if config is None:
        return
    folder = adapter_folder(adapter.adapter, adapter.subfolder)
    if not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise ValueError(
            f"{adapter} has no weights: there is no {SAFETENSORS_WEIGHTS_NAME} in {folder}. Give the folder that LoRA "
            "training wrote (its `output_dir`)."
        )
    shapes = _lora_shapes(folder / SAFETENSORS_WEIGHTS_NAME, adapter)
    trained_on = config.get("base_model_name_or_path")
    remedy = _remedy(adapter, trained_on)
    modules = dict(model.named_modules())
    missing = [layer for layer, _ in shapes if layer not in modules]
    _refuse_other_shapes(adapter, shapes, modules, is_resized, remedy)
    if missing and len(missing) == len(shapes):
        raise ValueError(
            f"{adapter} does not fit {adapter.shown_base}, which has none of its layers, such as {missing[0]}. "
            f"{remedy}"
        )
    if missing:
        logger.warning_rank0(
            f"{adapter} has {len(missing)} weights of layers that {adapter.shown_base} does not have, such as "
            f"{missing[0]}: they are left out. {remedy}"
        )
    elif not may_be_same_model(trained_on, adapter.base) and adapter.base_key != "reward_model":
        # `other_model_checks` warns of a reward model's adapters.
        logger.warning_rank0(
            f"{adapter} was trained on {trained_on} (`base_model_name_or_path` of its adapter_config.json), and is "
            f"put on {adapter.shown_base}: unless they are the same model in two places, it is noise there. Name the "
            "model that it was trained on."
        )


def _remedy(adapter: AdapterOnModel, trained_on: str | None) -> str:
    if trained_on and may_be_same_model(trained_on, adapter.base):
        return (
            "It was trained on a model of that name, whose layers another version of transformers may call otherwise. "
            "Install the version that trained it, or name another adapter."
        )
    return (
        f"It was trained on {trained_on or 'a model that it does not name'} (`base_model_name_or_path` of its "
        f"adapter_config.json). Name that model in place of {adapter.shown_base}, or another adapter."
    )


def _refuse_other_shapes(
    adapter: AdapterOnModel,
    shapes: Mapping[tuple[str, str], list[int]],
    modules: Mapping[str, nn.Module],
    is_resized: bool,
    remedy: str,
) -> None:
    for (layer, part), shape in shapes.items():
        module = modules.get(layer)
        if not isinstance(module, nn.Linear):
            continue
        found, expected = (shape[1], module.in_features) if part == "A" else (shape[0], module.out_features)
        if found != expected and not (is_resized and part == "B" and layer.endswith("lm_head")):
            raise ValueError(
                f"{adapter} does not fit {adapter.shown_base}: its {layer} has {found} "
                f"{'inputs' if part == 'A' else 'outputs'}, and the model's {expected}. {remedy}"
            )


def _lora_shapes(file: Path, adapter: AdapterOnModel) -> Mapping[tuple[str, str], list[int]]:
    """The shape of each matrix, by layer and matrix, from the file's header alone."""
    if not file.is_file():
        return {}
    try:
        with safe_open(file, framework="pt") as weights:
            named = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(
            f"{adapter} is damaged: {file} cannot be read ({error}). Copy it anew, or name another adapter."
        ) from error
    found = ((_LORA_WEIGHT.fullmatch(name), shape) for name, shape in named.items())
    return {(match["layer"], match["part"]): shape for match, shape in found if match is not None}
