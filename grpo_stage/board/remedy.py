"""The remedy of an alarm, put into the form."""

import json
from collections.abc import Mapping
from typing import Any

import gradio as gr
from gradio.components import Component

from grpo_stage.algorithm.conditions import as_lines
from grpo_stage.board.fields import FORM_FIELDS
from grpo_stage.board.locales import message
from grpo_stage.board.runner import EXTRA_ARGUMENTS, FORM_IDS, GRPORunner
from grpo_stage.board.tables import fenced


_FIELDS = {field.key: field for field in FORM_FIELDS}
_RENAMED = {"per_device_train_batch_size": "train.batch_size"}


def with_settings(
    runner: GRPORunner, settings: Mapping[str, Any], data: Mapping[Component, Any], lang: str
) -> dict[Component, Any]:
    """What changes in the form, by element, so that a run has these settings.

    Args:
        runner: of the Board.
        settings: keys of a recipe with their values.
        data: the form's values, by element.
        lang: of what is said.
    """
    element_of = runner.manager.get_elem_by_id
    changed: dict[Component, Any] = {}
    extra = json.loads(data[element_of(EXTRA_ARGUMENTS)] or "{}")
    for key, value in settings.items():
        held = _held(runner, key, value)
        if held is None or key in extra:  # the extra arguments win over the fields
            extra[key] = value
        if held is not None:
            element, shown = held
            changed[element] = shown
    said = f"{message('remedy_applied', lang)}\n\n{fenced(as_lines(settings), 'yaml')}"
    return {
        **changed,
        element_of(EXTRA_ARGUMENTS): json.dumps(extra, ensure_ascii=False),
        element_of("train.output_box"): said,
    }


def _held(runner: GRPORunner, key: str, value: Any) -> tuple[Component, Any] | None:
    """The field that can hold a setting, with its value there; None if there is none."""
    if key in _FIELDS:
        own = _FIELDS[key]
        return (runner.manager.get_elem_by_id(FORM_IDS[key]), own.to_widget(value)) if own.takes(value) else None
    element: Any = runner.manager._id_to_elem.get(_RENAMED.get(key, f"train.{key}"))
    if isinstance(element, gr.Slider) and element.minimum <= value <= element.maximum:
        return element, value
    if isinstance(element, gr.Textbox) and isinstance(value, int | float | str):
        return element, str(value)
    return None
