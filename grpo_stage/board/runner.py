"""LLaMA Board's runner for this stage: from the form to a run's arguments, and to and from saved configurations.

A saved configuration has the values of the host's elements alone, so that it also opens without this package. The
panel's values are in the host's own "extra arguments", under their names in a recipe.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from llamafactory.extras.constants import (
    LLAMABOARD_CONFIG,
    MULTIMODAL_SUPPORTED_MODELS,
    TRAINING_ARGS,
    TRAINING_STAGES,
)
from llamafactory.webui.common import DEFAULT_CONFIG_DIR, calculate_pixels, get_save_dir, load_args
from llamafactory.webui.locales import ALERTS
from llamafactory.webui.runner import Runner

from grpo_stage.board import imported_code, page_state
from grpo_stage.board.fields import FORM_FIELDS, effective
from grpo_stage.board.locales import PREFIX, message
from grpo_stage.board.places import EXTRA_ARGUMENTS, FORM_IDS
from grpo_stage.board.process import WatchedRunner
from grpo_stage.board.tables import harmless
from grpo_stage.host.configuration_file import STAGE
from grpo_stage.host.parser import check, effective_defaults
from grpo_stage.records.redaction import errors_masked, secrets_in
from grpo_stage.rewards.user_code import GAME
from grpo_stage.survival.run_lock import refuse_used


STAGE_NAME = next(name for name, stage in TRAINING_STAGES.items() if stage == STAGE)
_READERS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "train.learning_rate": (float, "a number"),
    "train.num_train_epochs": (float, "a number"),
    "train.max_grad_norm": (float, "a number"),
    "train.max_samples": (int, "a whole number"),
    "top.quantization_bit": (lambda text: text == "none" or int(text), "a whole number"),
}
"""The host's text fields that contain numbers; the host's error on a wrong number does not name the field."""
_PIXELS = tuple(f"train.{kind}_{bound}_pixels" for kind in ("image", "video") for bound in ("max", "min"))


def grpo_runner(host_runner: type[Runner]) -> type[Runner]:
    """The Board's runner class; the host's own for all other stages."""
    assert host_runner is Runner
    return GRPORunner


class GRPORunner(WatchedRunner):
    """Runs the training of the form. What the stage refuses is refused before a process starts."""

    def _initialize(self, data: dict[Component, Any], do_train: bool, from_preview: bool) -> str:
        if not do_train or not self._is_grpo(data):
            return super()._initialize(data, do_train, from_preview)
        if error := super()._initialize(self._with_rounds(data), do_train, from_preview):
            return error
        try:
            arguments = self._parse_train_args(data)
            with errors_masked(arguments):
                check(arguments)
            if not from_preview:
                refuse_used(arguments["output_dir"])  # before the host writes its form into the folder
                self._refuse_unconfirmed(arguments, data)
        except ValueError as refusal:
            return harmless(str(refusal))
        return ""

    def _parse_train_args(self, data: dict[Component, Any]) -> dict[str, Any]:
        if not self._is_grpo(data):
            return super()._parse_train_args(data)

        def value(element_id: str) -> Any:
            return data[self.manager.get_elem_by_id(element_id)]

        for element_id, (read, wanted) in self._readers(data).items():
            _refuse_unless(read, wanted, element_id, value(element_id))
        arguments = super()._parse_train_args(self._with_rounds(data))
        values = {key: value(element_id) for key, element_id in FORM_IDS.items()}
        extra = _extra_arguments(value(EXTRA_ARGUMENTS))
        return stage_arguments(arguments, values, extra)

    def _with_rounds(self, data: dict[Component, Any]) -> dict[Component, Any]:
        """The form with the prompts of the game that is its environment, if no dataset is chosen."""
        game = (self._value(data, FORM_IDS["environment"]) or "").strip()
        if self._value(data, "train.dataset") or not game.startswith(GAME):
            return data
        return {**data, self.manager.get_elem_by_id("train.dataset"): [game]}

    def _readers(self, data: Mapping[Component, Any]) -> Mapping[str, tuple[Callable[[str], Any], str]]:
        """How to read the host's fields for texts that a run needs as numbers, and what is wanted of each."""
        if self._value(data, "top.model_name") not in MULTIMODAL_SUPPORTED_MODELS:
            return _READERS
        return {**_READERS, **dict.fromkeys(_PIXELS, (calculate_pixels, "a number of pixels, such as 768*768"))}

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
        for update in super()._launch(data, do_train):
            process = page_state.this_page().process
            if process is not None and process.data is data:  # the process was started, and may have ended already
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
        path = os.path.join(DEFAULT_CONFIG_DIR, config_path)
        if os.path.isfile(path) and not self._is_configuration(path):
            return self._broken(lang, path)
        return self.restored(super().load_args(lang, config_path))

    def check_output_dir(
        self, lang: str, model_name: str, finetuning_type: str, output_dir: str
    ) -> dict[Component, Any]:
        folder = get_save_dir(model_name, finetuning_type, output_dir) if model_name and output_dir else ""
        path = os.path.join(folder, LLAMABOARD_CONFIG)
        if folder and os.path.isdir(folder) and not os.path.isfile(path):
            # A run of the command line: it can be shown, but it has no form to fill in.
            return {self.manager.get_elem_by_id("train.output_box"): ALERTS["warn_output_dir_exists"][lang]}
        if folder and os.path.isfile(path) and not self._is_configuration(path):
            return self._broken(lang, path)
        return self.restored(super().check_output_dir(lang, model_name, finetuning_type, output_dir))

    def _is_configuration(self, path: str) -> bool:
        """Whether the host can load a file into its form."""
        saved = load_args(path)
        if not isinstance(saved, dict) or not saved.keys() <= self.manager._id_to_elem.keys():
            return False
        try:
            return isinstance(json.loads(saved.get(EXTRA_ARGUMENTS, "{}")), dict)
        except (TypeError, ValueError):
            return False

    def _broken(self, lang: str, path: str) -> dict[Component, Any]:
        said = message("broken_configuration", lang, file=path)
        gr.Warning(said)
        return {self.manager.get_elem_by_id("train.output_box"): said}

    def restored(self, loaded: dict[Component, Any]) -> dict[Component, Any]:
        """The values that the host loaded, with the panel's values from the extra arguments, or their defaults."""
        by_id = {self.manager.get_id_by_elem(element): value for element, value in loaded.items()}
        if by_id.get("train.training_stage") != STAGE_NAME:
            return loaded
        extra = json.loads(by_id[EXTRA_ARGUMENTS])
        for field in FORM_FIELDS:
            given = field.key in extra and field.takes(extra[field.key])
            by_id[FORM_IDS[field.key]] = field.to_widget(extra.pop(field.key) if given else field.default)
        by_id[EXTRA_ARGUMENTS] = json.dumps(extra, ensure_ascii=False)
        page_state.remember(by_id)
        return {self.manager.get_elem_by_id(element_id): value for element_id, value in by_id.items()}

    def trial_arguments(self, data: dict[Component, Any]) -> dict[str, Any]:
        """The arguments that a try of the rewards needs, whether or not a model is chosen.

        Raises:
            ValueError: if no dataset is chosen, or the value of a field is wrong.
        """
        if not self._value(self._with_rounds(data), "train.dataset"):
            raise ValueError(ALERTS["err_no_dataset"][self._value(data, "top.lang")])
        try:
            arguments = self.arguments_so_far(data)
        except json.JSONDecodeError as error:
            raise ValueError(ALERTS["err_json_schema"][self._value(data, "top.lang")]) from error
        self._refuse_unconfirmed(arguments, data)
        return {key: value for key, value in arguments.items() if key != "output_dir"}

    def checked_form(self, data: Mapping[Component, Any]) -> tuple[list[str], dict[str, Any] | None]:
        """What is wrong in the fields themselves, and the arguments of the rest; None if there can be none.

        A field that is wrong counts as empty. What the form lacks altogether is left to the stage's own check.
        """
        get, problems, sound = self.manager.get_elem_by_id, [], dict(data)
        for element_id, (read, wanted) in self._readers(data).items():
            try:
                _refuse_unless(read, wanted, element_id, self._value(data, element_id))
            except ValueError as refusal:
                problems.append(str(refusal))
                sound[get(element_id)] = get(element_id).value
        for field in FORM_FIELDS:
            try:
                field.to_argument(self._value(data, FORM_IDS[field.key]))
            except ValueError as refusal:
                problems.append(str(refusal))
                sound[get(FORM_IDS[field.key])] = field.initial
        sound[get("train.dataset")] = self._value(data, "train.dataset") or []
        try:
            _extra_arguments(self._value(data, EXTRA_ARGUMENTS))
        except json.JSONDecodeError:
            problems.append(f"`extra_args`: {ALERTS['err_json_schema'][self._value(data, 'top.lang')]}")
            sound[get(EXTRA_ARGUMENTS)] = "{}"
        except ValueError as refusal:
            problems.append(str(refusal))
            sound[get(EXTRA_ARGUMENTS)] = "{}"
        output_dir = self._value(data, "train.output_dir")
        try:
            arguments = self.arguments_so_far(sound, output_dir or "trial")
            self._refuse_unconfirmed(arguments, data)
        except ValueError as refusal:
            return [*problems, str(refusal)], None
        return problems, arguments if output_dir else {**arguments, "output_dir": ""}

    def arguments_so_far(self, data: Mapping[Component, Any], output_dir: str = "trial") -> dict[str, Any]:
        """The arguments of a form in which no model and no output folder may be chosen yet.

        Raises:
            ValueError: if the value of a field is wrong.
        """
        get = self.manager.get_elem_by_id
        model_name = self._value(data, "top.model_name") or "Custom"  # the host makes it a part of a path
        return self._parse_train_args({**data, get("top.model_name"): model_name, get("train.output_dir"): output_dir})

    def _refuse_unconfirmed(self, arguments: Mapping[str, Any], data: Mapping[Component, Any]) -> None:
        imported, confirmed = (self._value(data, name) for name in (imported_code.IMPORTED, imported_code.CONFIRMED))
        imported_code.refuse_unconfirmed(arguments, imported, confirmed, self._value(data, "top.lang"))

    def _is_grpo(self, data: Mapping[Component, Any]) -> bool:
        return data[self.manager.get_elem_by_id("train.training_stage")] == STAGE_NAME


def _keep_private(arguments: Mapping[str, Any], *files: Path) -> None:
    """Make files readable for their owner alone if they hold secrets: the Board runs a recipe from such files."""
    if secrets_in(arguments):
        for file in filter(os.path.isfile, files):
            os.chmod(file, 0o600)


def _refuse_unless(read: Callable[[str], Any], wanted: str, element_id: str, text: Any) -> None:
    try:
        read(text)
    except (TypeError, ValueError) as error:
        key = element_id.partition(".")[2]
        raise ValueError(f"`{key}: {text}` is not {wanted}, which this field takes.") from error


def _extra_arguments(text: str) -> Any:
    """The "extra arguments". A key may occur only once: JSON alone would take the last of several."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise ValueError(f"`{key}` stands {count} times in the extra arguments. Leave one of them.")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def stage_arguments(arguments: Mapping[str, Any], values: Mapping[str, Any], extra: Any) -> dict[str, Any]:
    """The run's arguments. A default is left out if the form cannot tell it from a choice.

    Args:
        arguments: the host's arguments, from its own fields and the extra arguments.
        values: the values of the panel's widgets, by key.
        extra: the "extra arguments", which the user wrote. They win over fields, and null removes a key.

    Raises:
        ValueError: if a value does not fit its field, or a key is both in the panel and in the extra arguments.
    """
    if not isinstance(extra, dict):
        raise ValueError(f"The extra arguments are {extra!r}: write a mapping in braces.")
    if arguments["stage"] != STAGE:
        raise ValueError(f"The extra arguments have `stage: {arguments['stage']}`: choose the stage in its list.")
    if "output_dir" in extra and not extra["output_dir"]:
        raise ValueError(
            f"The extra arguments have `output_dir: {json.dumps(extra['output_dir'])}`, and a run needs a folder. "
            'Leave it out of them: its folder stands under "Output dir".'
        )
    default = effective_defaults()
    # The host's form writes False and empty text if nothing was chosen.
    is_choice = {key: value is not None and value is not False and value != "" for key, value in arguments.items()}
    shown = {key: value for key, value in arguments.items() if is_choice[key] or (value is False and default.get(key))}
    shown.pop("per_device_eval_batch_size", None)  # an evaluation samples all its prompts at once
    panel = panel_arguments(values, shown)
    if "eval_dataset" in panel:  # as the host does with a `val_size`
        shown |= {"eval_strategy": "steps", "eval_steps": shown["save_steps"]}
    for key in panel.keys() & extra.keys():
        if panel[key] != extra[key]:
            raise ValueError(
                f"`{key}` is {panel[key]!r} in the panel and {extra[key]!r} in the extra arguments. Leave it out of "
                "the extra arguments."
            )
    return {key: value for key, value in {**shown, **panel, **extra}.items() if value is not None}


def panel_arguments(values: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The panel's arguments: the fields that have an effect and differ from their defaults.

    Raises:
        ValueError: if a value does not fit its field.
    """
    panel = {field.key: field.to_argument(values[field.key]) for field in FORM_FIELDS}
    evaluates = bool(panel["eval_dataset"] or arguments.get("val_size"))
    written = {key: value for key, value in panel.items() if value is not None}
    run = effective(written, eval_strategy="steps" if evaluates else "no")
    return {field.key: run[field.key] for field in FORM_FIELDS if run[field.key] != field.default}
