"""Where the form holds a key of a recipe: the element, its name in the Board's language, its place in the page."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from grpo_stage.board.fields import FORM_FIELDS


RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "per_device_train_batch_size": "train.batch_size",
        "neftune_noise_alpha": "train.neftune_alpha",
        "pissa_init": "train.use_pissa",
        "finetuning_type": "top.finetuning_type",
        "template": "top.template",
        "quantization_method": "top.quantization_method",
    }
)
"""Keys that a field of the host holds as they are, but under another name: key -> element."""
_OF_SEVERAL: Mapping[str, str] = MappingProxyType(
    {
        "stage": "train.training_stage",
        "model_name_or_path": "top.model_path",
        "adapter_name_or_path": "top.checkpoint_path",
        "quantization_bit": "top.quantization_bit",
        "rope_scaling": "top.rope_scaling",
        **dict.fromkeys(("flash_attn", "use_unsloth", "enable_liger_kernel"), "top.booster"),
        **dict.fromkeys(("bf16", "fp16", "pure_bf16"), "train.compute_type"),
        "deepspeed": "train.ds_stage",
    }
)
"""Keys that a field of the host holds in another form, or together with others."""
EXTRA_ARGUMENTS = "train.extra_args"
FORM_IDS: Mapping[str, str] = MappingProxyType({field.key: f"train.{field.element}" for field in FORM_FIELDS})


@dataclass(frozen=True, slots=True)
class Place:
    """A field, as a reader of the page finds it."""

    label: str
    dom_id: str


def place_of(manager: Any, key: str, language: str) -> Place:
    """The field that holds a key; the extra arguments for a key that has none."""
    from llamafactory.webui.locales import LOCALES

    candidates = (FORM_IDS.get(key), RENAMED.get(key), _OF_SEVERAL.get(key), f"train.{key}", EXTRA_ARGUMENTS)
    element_id = next(one for one in candidates if one is not None and one in manager._id_to_elem)
    element = manager.get_elem_by_id(element_id)
    # A few of the host's fields have one name for all languages.
    label = LOCALES.get(element_id.partition(".")[2], {}).get(language, {}).get("label") or element.label
    named = label if element_id != EXTRA_ARGUMENTS else f"{label}: {key}"
    return Place(named, element.elem_id or f"component-{element._id}")
