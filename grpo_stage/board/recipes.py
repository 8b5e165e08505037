"""Import and export of recipes in LLaMA Board: from a YAML file to the form's values, and back.

An import loses nothing: keys without a field, and values that a field cannot hold, go into the "extra arguments".
There `null` removes a value that the form would add by itself.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import gradio as gr
from gradio.components import Component

from grpo_stage.board import imported_code, page_state
from grpo_stage.board.fields import BASICS, FORM_FIELDS
from grpo_stage.board.places import EXTRA_ARGUMENTS, FORM_IDS, RENAMED
from grpo_stage.board.runner import STAGE_NAME, GRPORunner
from grpo_stage.host.configuration_file import STAGE, interpolates
from grpo_stage.host.known_models import name_of
from grpo_stage.host.parser import DERIVED_KEYS, effective_defaults, typed
from grpo_stage.host.recipe_sections import recipe_text


_NO_FIELD = frozenset({"image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels", "output_dir"})
"""Keys whose value has another form in the host's field of that name."""


def import_recipe(runner: GRPORunner, recipe: Mapping[str, Any]) -> dict[Component, Any]:
    """The form's values for a recipe, by element.

    Raises:
        ValueError: if the recipe is one of another stage, or has an unknown key or a value of another type.
    """
    if recipe.get("stage") != STAGE:
        raise ValueError(
            f"The file has `stage: {recipe.get('stage', 'none')}`, and this panel is for `stage: {STAGE}`. Choose "
            "another file, or load that stage's configuration by its own means."
        )
    wanted = {key: value for key, value in typed(dict(recipe)).items() if value is not None}
    # The form keeps `${oc.env:NAME}` as it is written, so that no file gets the variable's value.
    texts = {key for key, value in wanted.items() if isinstance(value, str | dict | list)}
    wanted |= {key: value for key, value in recipe.items() if key in texts and interpolates(value)}
    effective = {**effective_defaults(), "lora_alpha": 2 * wanted.get("lora_rank", 8), **wanted}
    form = _form_values(runner, wanted, effective)
    made = _arguments_of(runner, form)
    form[EXTRA_ARGUMENTS] = json.dumps(_differences(made, wanted, effective), ensure_ascii=False)
    page_state.remember(form)
    return {runner.manager.get_elem_by_id(element_id): value for element_id, value in form.items()}


def _form_values(runner: GRPORunner, wanted: Mapping[str, Any], effective: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every input element, by id: the recipe's if the element can hold it, else the initial one."""
    elements = {
        element_id: element
        for element_id, element in runner.manager._id_to_elem.items()
        if element_id.startswith(("top.", "train."))
    }
    form = {element_id: element.value for element_id, element in elements.items() if _is_input(element)}
    for key, value in effective.items():
        element_id = RENAMED.get(key, f"train.{key}")
        if element_id in form and key not in _NO_FIELD and element_id != EXTRA_ARGUMENTS:
            held = _as_held(elements[element_id], value)
            form[element_id] = form[element_id] if held is None else held
    for field in FORM_FIELDS:
        value = wanted.get(field.key, field.default)
        form[FORM_IDS[field.key]] = field.to_widget(value if field.takes(value) else field.default)
    model_path = effective["model_name_or_path"]
    form |= {
        "train.training_stage": STAGE_NAME,
        "top.model_name": (name_of(model_path) or "Custom") if model_path else None,  # the host's name for others
        "top.model_path": model_path or "",
        "top.checkpoint_path": [_as_path(path) for path in _items(effective["adapter_name_or_path"])],
        "top.quantization_bit": str(effective["quantization_bit"] or "none"),
        "top.rope_scaling": "none",
        "top.booster": _booster(effective),
        "train.dataset": _items(effective["dataset"]),
        "train.output_dir": _as_path(str(effective["output_dir"])) if wanted.get("output_dir") else "",
        "train.compute_type": next((name for name in ("bf16", "fp16", "pure_bf16") if effective[name]), "fp32"),
        EXTRA_ARGUMENTS: "{}",
        imported_code.IMPORTED: imported_code.of_recipe(effective),
    }
    skipped = {"top.lang", "top.hub_name", "train.config_path", "train.current_time", "train.swanlab_link"}
    return {element_id: value for element_id, value in form.items() if element_id not in skipped}


def _is_input(element: Any) -> bool:
    return isinstance(element, gr.Dropdown | gr.Textbox | gr.Slider | gr.Checkbox | gr.Number)


def _as_held(element: Any, value: Any) -> Any:
    """A key's value in the form of the host's element, or None if the element cannot hold it."""
    if isinstance(element, gr.Slider):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number and element.minimum <= value <= element.maximum else None
    if isinstance(element, gr.Checkbox):
        return value if isinstance(value, bool) else None
    if isinstance(element, gr.Textbox):
        return None if isinstance(value, dict | list) or value is None else str(value)
    if isinstance(element, gr.Dropdown) and not element.multiselect:
        value = getattr(value, "value", value)  # of an enum member
        choices = [choice for _, choice in element.choices]
        return value if isinstance(value, str) and (value in choices or element.allow_custom_value) else None
    return None


def _arguments_of(runner: GRPORunner, form: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a run would get from these values of the form."""
    data = dict.fromkeys(runner.manager.get_elem_list())
    data |= {runner.manager.get_elem_by_id(element_id): value for element_id, value in form.items()}
    if not form["top.model_name"]:
        data[runner.manager.get_elem_by_id("top.model_name")] = "Custom"  # the host joins it into a path
    return runner._parse_train_args(data)


def _differences(made: Mapping[str, Any], wanted: Mapping[str, Any], effective: Mapping[str, Any]) -> dict[str, Any]:
    """The extra arguments that are needed: the recipe's own values, and null for keys that the recipe lacks."""
    typed_made = typed(dict(made))
    needless = {key: value for key, value in effective_defaults().items() if key not in DERIVED_KEYS}
    own = {
        key: value
        for key, value in wanted.items()
        if (typed_made[key] != value if key in typed_made else key not in needless or needless[key] != value)
    }
    # These are not the recipe's to take away: their fields are empty then, and what a user chooses there counts.
    ours = {k: value for k, value in typed_made.items() if k not in wanted and k not in ("output_dir", "dataset")}
    not_its = [key for key, value in ours.items() if value != effective.get(key)]
    return {**own, **dict.fromkeys(not_its)}


def _booster(effective: Mapping[str, Any]) -> str:
    if effective["use_unsloth"]:
        return "unsloth"
    if effective["enable_liger_kernel"]:
        return "liger_kernel"
    return "flashattn2" if str(getattr(effective["flash_attn"], "value", effective["flash_attn"])) == "fa2" else "auto"


def _as_path(path: str) -> str:
    """The path with a separator: the host looks for a path without one in its own folder."""
    return path if os.path.sep in path else os.path.join(".", path)


def _items(value: Any) -> list[str]:
    return [item.strip() for item in value.split(",")] if isinstance(value, str) else list(value or [])


def export_recipe(arguments: Mapping[str, Any]) -> str:
    """A run's arguments as a YAML file to share, without secrets, in the sections of the host's examples."""
    sections = {field.key: field.group.lower() for field in FORM_FIELDS if field.group != BASICS}
    return recipe_text(arguments, "# llamafactory-cli train grpo.yaml", sections)
