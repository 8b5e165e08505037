"""LLaMA Board's runner, knowing the stage: from the form to a run's arguments, and to and from saved configurations.

A saved configuration holds the values of the host's elements alone, so that it opens without this package as well; the
panel's stand among the host's own "extra arguments", under the names that they have in a recipe.
"""

import json
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from gradio.components import Component
from llamafactory.extras.constants import LLAMABOARD_CONFIG, TRAINING_ARGS, TRAINING_STAGES
from llamafactory.webui.common import DEFAULT_CONFIG_DIR, get_save_dir
from llamafactory.webui.locales import ALERTS
from llamafactory.webui.runner import Runner

from ..redaction import errors_masked, secrets_in
from . import board_code, board_loaded
from .board_fields import FORM_FIELDS, effective
from .locales import PREFIX
from .parser import check, effective_defaults
from .registration import STAGE


STAGE_NAME = next(name for name, stage in TRAINING_STAGES.items() if stage == STAGE)
EXTRA_ARGUMENTS = "train.extra_args"
FORM_IDS = {field.key: f"train.{field.element}" for field in FORM_FIELDS}


def grpo_runner(host_runner: type[Runner]) -> type[Runner]:
    """The Board's runner class; the host's own for all other stages."""
    assert host_runner is Runner
    return GRPORunner


class GRPORunner(Runner):
    """Runs the form's training; refuses what the stage refuses before a process is started."""

    def _initialize(self, data: dict[Component, Any], do_train: bool, from_preview: bool) -> str:
        error = super()._initialize(data, do_train, from_preview)
        if error or not do_train or not self._is_grpo(data):
            return error
        try:
            arguments = self._parse_train_args(data)
            with errors_masked(arguments):
                check(arguments)
            if not from_preview:
                self._refuse_unconfirmed(arguments, data)
        except ValueError as refusal:
            return str(refusal)
        return ""

    def _parse_train_args(self, data: dict[Component, Any]) -> dict[str, Any]:
        arguments = super()._parse_train_args(data)
        if not self._is_grpo(data):
            return arguments
        values = {key: data[self.manager.get_elem_by_id(element_id)] for key, element_id in FORM_IDS.items()}
        extra = json.loads(data[self.manager.get_elem_by_id(EXTRA_ARGUMENTS)])
        return stage_arguments(arguments, values, extra)

    def _build_config_dict(self, data: dict[Component, Any]) -> dict[str, Any]:
        config = super()._build_config_dict(data)
        config = {element_id: v for element_id, v in config.items() if not element_id.startswith(f"train.{PREFIX}")}
        if self._is_grpo(data):
            extra = json.loads(config[EXTRA_ARGUMENTS])
            values = {key: data[self.manager.get_elem_by_id(element_id)] for key, element_id in FORM_IDS.items()}
            panel = panel_arguments(values, self._parse_train_args(data))
            config[EXTRA_ARGUMENTS] = json.dumps({**panel, **extra}, ensure_ascii=False)
        return config

    def _launch(self, data: dict[Component, Any], do_train: bool) -> Generator[dict[Component, Any], None, None]:
        if do_train and self._is_grpo(data):  # a page that is opened while the run lasts gets its form back
            board_loaded.remember({self.manager.get_id_by_elem(element): value for element, value in data.items()})
        for update in super()._launch(data, do_train):
            if self.running and do_train and self._is_grpo(data):
                arguments = self._parse_train_args(data)
                folder = Path(arguments["output_dir"])
                _keep_private(arguments, folder / LLAMABOARD_CONFIG, folder / TRAINING_ARGS)
            yield update

    def save_args(self, data: dict[Component, Any]) -> dict[Component, str]:
        said: dict[Component, str] = super().save_args(data)
        if self._is_grpo(data):
            name = data[self.manager.get_elem_by_id("train.config_path")]
            _keep_private(self._parse_train_args(data), Path(DEFAULT_CONFIG_DIR, name))
        return said

    def load_args(self, lang: str, config_path: str) -> dict[Component, Any]:
        return self.restored(super().load_args(lang, config_path))

    def check_output_dir(
        self, lang: str, model_name: str, finetuning_type: str, output_dir: str
    ) -> dict[Component, Any]:
        folder = get_save_dir(model_name, finetuning_type, output_dir) if model_name and output_dir else ""
        if folder and os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, LLAMABOARD_CONFIG)):
            # A run of the command line: there is something to see, and no form to fill in.
            return {self.manager.get_elem_by_id("train.output_box"): ALERTS["warn_output_dir_exists"][lang]}
        return self.restored(super().check_output_dir(lang, model_name, finetuning_type, output_dir))

    def restored(self, loaded: dict[Component, Any]) -> dict[Component, Any]:
        """What the host loaded, with the panel's values out of the extra arguments; one not there has its default."""
        by_id = {self.manager.get_id_by_elem(element): value for element, value in loaded.items()}
        if by_id.get("train.training_stage") != STAGE_NAME:
            return loaded
        extra = json.loads(by_id[EXTRA_ARGUMENTS])
        for field in FORM_FIELDS:
            given = field.key in extra and field.takes(extra[field.key])
            by_id[FORM_IDS[field.key]] = field.to_widget(extra.pop(field.key) if given else field.default)
        by_id[EXTRA_ARGUMENTS] = json.dumps(extra, ensure_ascii=False)
        board_loaded.remember(by_id)
        return {self.manager.get_elem_by_id(element_id): value for element_id, value in by_id.items()}

    def trial_arguments(self, data: Mapping[Component, Any]) -> dict[str, Any]:
        """The arguments that a try of the rewards needs, whether or not a model is chosen.

        Raises:
            ValueError: if no dataset is chosen, or a field holds what it cannot.
        """
        values = dict(data)
        get = self.manager.get_elem_by_id
        if not values[get("train.dataset")]:
            raise ValueError(ALERTS["err_no_dataset"][values[get("top.lang")]])
        if not values[get("top.model_name")]:
            values[get("top.model_name")] = "Custom"  # the host joins it into a path
        values[get("train.output_dir")] = "trial"
        try:
            arguments = self._parse_train_args(values)
        except json.JSONDecodeError as error:
            raise ValueError(ALERTS["err_json_schema"][values[get("top.lang")]]) from error
        self._refuse_unconfirmed(arguments, values)
        return {key: value for key, value in arguments.items() if key != "output_dir"}

    def _refuse_unconfirmed(self, arguments: Mapping[str, Any], data: Mapping[Component, Any]) -> None:
        imported, confirmed, lang = (data[self.manager.get_elem_by_id(name)] for name in (*board_code.IDS, "top.lang"))
        board_code.refuse_unconfirmed(arguments, imported, confirmed, lang)

    def _is_grpo(self, data: Mapping[Component, Any]) -> bool:
        return data[self.manager.get_elem_by_id("train.training_stage")] == STAGE_NAME


def _keep_private(arguments: Mapping[str, Any], *files: Path) -> None:
    """Files from which the Board runs a recipe hold its secrets, as they must: they are for their owner alone."""
    if secrets_in(arguments):
        for file in filter(os.path.isfile, files):
            os.chmod(file, 0o600)


def stage_arguments(arguments: Mapping[str, Any], values: Mapping[str, Any], extra: Any) -> dict[str, Any]:
    """The run's arguments, each once; what equals its default is left out where the form could not say otherwise.

    Args:
        arguments: what the host makes of its own fields and of the extra arguments.
        values: what the panel's widgets hold, by key.
        extra: the "extra arguments", which come last: they are the person's own words, and null takes a key back.

    Raises:
        ValueError: if a value is not what its field takes, or stands in the panel and in the extra arguments.
    """
    if not isinstance(extra, dict):
        raise ValueError(f"The extra arguments are {extra!r}: write a mapping in braces.")
    if arguments["stage"] != STAGE:
        raise ValueError(f"The extra arguments have `stage: {arguments['stage']}`: choose the stage in its list.")
    default = effective_defaults()
    # The host's form writes False and empty text where nothing was chosen.
    is_choice = {key: value is not None and value is not False and value != "" for key, value in arguments.items()}
    shown = {key: value for key, value in arguments.items() if is_choice[key] or (value is False and default.get(key))}
    shown.pop("per_device_eval_batch_size", None)  # an evaluation samples all of its prompts at once
    panel = panel_arguments(values, shown)
    if "eval_dataset" in panel:  # as the host does where there is a `val_size`
        shown |= {"eval_strategy": "steps", "eval_steps": shown["save_steps"]}
    for key in panel.keys() & extra.keys():
        if panel[key] != extra[key]:
            raise ValueError(
                f"`{key}` is {panel[key]!r} in the panel and {extra[key]!r} in the extra arguments. Leave it out of "
                "the extra arguments."
            )
    return {key: value for key, value in {**shown, **panel, **extra}.items() if value is not None}


def panel_arguments(values: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the panel adds to the host's arguments: its fields that apply and are not at their default.

    Raises:
        ValueError: if a value is not what its field takes.
    """
    panel = {field.key: field.to_argument(values[field.key]) for field in FORM_FIELDS}
    evaluates = bool(panel["eval_dataset"] or arguments.get("val_size"))
    written = {key: value for key, value in panel.items() if value is not None}
    run = effective(written, eval_strategy="steps" if evaluates else "no")
    return {field.key: run[field.key] for field in FORM_FIELDS if run[field.key] != field.default}
