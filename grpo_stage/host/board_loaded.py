"""What a configuration that was loaded into the form says, for those fields that the host fills anew by itself.

A field that a load changes fires the same events as one that a person changes, and the host then puts the default
template, no adapters and no datasets in place of those that were loaded a moment ago. For a configuration of this
stage these handlers give back what was loaded, as long as the fields that they follow from are the loaded ones.
"""

from collections.abc import Mapping
from typing import Any

import gradio as gr
import wrapt

from .registration import STAGE


_loaded: dict[str, Any] = {}


def remember(values: Mapping[str, Any]) -> None:
    """Keep the values, by element id, of the configuration that was loaded last."""
    _loaded.clear()
    _loaded.update(values)


def _recall(element_id: str, **conditions: Any) -> Any:
    """A loaded value, or None where another model, method or stage has been chosen since."""
    is_current = all(_loaded.get(f"top.{name}") == value for name, value in conditions.items())
    return _loaded.get(element_id) if is_current else None


@wrapt.decorator
def keep_model(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> tuple[str, str]:
    """Path and template of a model."""
    path, template = wrapped(*args, **kwargs)
    model_name = args[0] if args else kwargs["model_name"]
    return (
        _recall("top.model_path", model_name=model_name) or path,
        _recall("top.template", model_name=model_name) or template,
    )


@wrapt.decorator
def keep_checkpoints(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> gr.Dropdown:
    """Adapters or checkpoint of a model and tuning method."""
    dropdown = wrapped(*args, **kwargs)
    model_name, finetuning_type = args
    value = _recall("top.checkpoint_path", model_name=model_name, finetuning_type=finetuning_type)
    return (
        gr.Dropdown(**dropdown.constructor_args | {"value": value, "allow_custom_value": True}) if value else dropdown
    )


@wrapt.decorator
def keep_dataset(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Datasets and packing: for this stage the event of a person's own choice sees to them."""
    from llamafactory.extras.constants import TRAINING_STAGES

    training_stage = args[0] if args else kwargs["training_stage"]
    return (gr.skip(), False) if TRAINING_STAGES[training_stage] == STAGE else wrapped(*args, **kwargs)
