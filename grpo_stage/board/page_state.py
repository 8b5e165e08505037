"""The state of each of the Board's pages: one Board serves several tabs and users, each with its own configuration.

A field that is changed by loading fires the same events as one that the user changes. The host then replaces the
values that were just loaded by the default template, no adapters and no datasets. For a configuration of this stage
the handlers below return the loaded values, as long as the fields that they follow from have their loaded values, too.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import wrapt
from gradio.context import LocalContext

from grpo_stage.board.training_process import TrainingProcess
from grpo_stage.host.configuration_file import STAGE


_KEPT_PAGES = 1000


@dataclass(slots=True)
class Page:
    """A browser's tab that shows the Board."""

    loaded: dict[str, Any] = field(default_factory=dict)
    """The values of the configuration that was loaded last, by element id."""
    stage: str = ""
    """The chosen stage."""
    process: TrainingProcess | None = None
    """The process that the page has started, or was opened with, until the page has shown its end."""
    seen: Any = None
    """The state of the process that the page shows."""
    lang: str = "en"
    """The language of the run view."""
    folder: str = ""
    """The output folder of the form."""
    typed: str = ""
    """The output folder that was typed last."""
    output_dir: str = ""
    """The form's output folder, as its field holds it."""
    chosen: str = ""
    """The run that was chosen in the list of runs, below the folder of outputs; empty for that of the form."""
    rate: str = ""
    """The learning rate that the form has set by itself."""
    remedy: Mapping[str, Any] = field(default_factory=dict)
    """The settings of the alarm whose remedy was asked for last."""


_pages: OrderedDict[str, Page] = OrderedDict()


def this_page() -> Page:
    """The page whose event is being handled."""
    request = LocalContext.request.get(None)
    key = (request.session_hash if request else None) or ""
    page = _pages.setdefault(key, Page())
    _pages.move_to_end(key)
    if len(_pages) > _KEPT_PAGES:
        _pages.popitem(last=False)
    return page


def remember(values: Mapping[str, Any]) -> None:
    """Keep the values, by element id, of the configuration that this page has just loaded."""
    this_page().loaded = dict(values)


def _recall(element_id: str, **conditions: Any) -> Any:
    """A loaded value, or None if the user has chosen another model, method or stage since."""
    loaded = this_page().loaded
    is_current = all(loaded.get(f"top.{name}") == value for name, value in conditions.items())
    return loaded.get(element_id) if is_current else None


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
def keep_quiet(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """The warning about a model without a template, which is wrong where a run takes that of its tokenizer."""
    _, template = args
    loaded = _recall("train.extra_args", template=template)
    if loaded is None or json.loads(loaded).get("template", "") is not None:
        wrapped(*args, **kwargs)


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
    """Datasets and packing. If the stage changes to or from GRPO, `tab` handles the datasets."""
    from llamafactory.extras.constants import TRAINING_STAGES

    datasets, packing = wrapped(*args, **kwargs)
    page = this_page()
    stages = page.stage, TRAINING_STAGES[args[0] if args else kwargs["training_stage"]]
    page.stage = stages[1]
    # The event comes twice for one choice; the second time the stage has not changed.
    return (gr.skip(), packing) if STAGE in stages or stages[0] == stages[1] else (datasets, packing)
