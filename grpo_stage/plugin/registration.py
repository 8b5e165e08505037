"""Every change to the host, as one table: `ROWS`.

`_autoload` applies a row right after its module is executed; `install()` applies it to a module that is imported
already; `uninstall()` takes all rows back. On a host that the stage was not made for only the guards are applied: they
refuse `stage: grpo` with the reason, and change nothing for other stages.
"""

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import wrapt

from grpo_stage import _autoload
from grpo_stage.host.configuration_file import STAGE, read_command_line, stage_of
from grpo_stage.plugin import ray_workers
from grpo_stage.plugin.contract import (
    SUPPORTED_HOST,
    UnsupportedHostError,
    check_contract,
    installed_version,
    is_supported_version,
)
from grpo_stage.survival.failure import failures_reported
from grpo_stage.survival.stop import leave, run_and_pass_on


MEGATRON = {"USE_MCA": "Megatron-Core's trainers", "USE_MEGATRON_BRIDGE": "Megatron Bridge's trainers"}
"""Switches of the host that lead to other trainers, which parse arguments of their own."""


@dataclass(frozen=True, slots=True)
class Row:
    """One change to the host. A list or a mapping is changed in place, since other modules may have imported it."""

    module: str
    attribute: str
    replace: Callable[[Any], Any]
    """From the host's own value to ours."""
    why: str
    is_guard: bool = False
    """A guard only refuses, and is applied on every host."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The present value at a row's place, and the host's own value."""

    module: ModuleType
    current: Any
    original: Any


_applied: dict[Row, Applied] = {}


def install() -> None:
    """Apply every row, to the modules that are imported now and to the others once they are. May be called twice."""
    _autoload.register()


def uninstall() -> None:
    """Give the host its own values back.

    Raises:
        RuntimeError: if other code has changed one of them since: its change would be undone as well.
    """
    for row, applied in _applied.items():
        if getattr(applied.module, row.attribute) is not applied.current:
            raise RuntimeError(
                f"{row.module}.{row.attribute} was changed again after grpo-stage had changed it, so that it cannot "
                "be put back. Undo the other change first."
            )
    _autoload.unregister()
    for row, applied in _applied.items():
        if isinstance(applied.current, list | dict):
            _fill(applied.current, applied.original)
        else:
            setattr(applied.module, row.attribute, applied.original)
    _applied.clear()


def on_import(module: ModuleType) -> None:
    """Apply the rows of a module that was just executed and still has the host's own values."""
    is_supported = is_supported_version()
    for row in ROWS:
        # A missing attribute cannot be changed; the contract check in the guards names it.
        if row.module != module.__name__ or not (row.is_guard or is_supported) or not hasattr(module, row.attribute):
            continue
        original = getattr(module, row.attribute)
        if isinstance(original, list | dict):
            saved = original.copy()
            _fill(original, row.replace(saved))
            _applied[row] = Applied(module, original, saved)
        else:
            setattr(module, row.attribute, current := row.replace(original))
            _applied[row] = Applied(module, current, original)


def _fill(container: Any, content: Any) -> None:
    """Replace the content of a list or a mapping."""
    container.clear()
    if isinstance(container, dict):
        container.update(content)
    else:
        container.extend(content)


def run_cli() -> None:
    """Run `llamafactory-cli` on this process's command line."""
    from llamafactory.cli import main

    main()


def _add_grpo_arguments(argument_classes: list[type]) -> list[type]:
    from llamafactory.hparams.finetuning_args import FinetuningArguments

    from grpo_stage.plugin.finetuning_args import GRPOFinetuningArguments

    return [GRPOFinetuningArguments if cls is FinetuningArguments else cls for cls in argument_classes]


def _read_json_from_paths(module: ModuleType) -> SimpleNamespace:
    def load(source: Any) -> Any:
        return json.loads(source.read_text(encoding="utf-8")) if isinstance(source, Path) else json.load(source)

    return SimpleNamespace(**{**vars(module), "load": load})


def _add_grpo_to_stages(stages: dict[str, str]) -> dict[str, str]:
    """The Board's list of stages with GRPO after PPO."""
    names = list(stages)
    names.insert(names.index("PPO") + 1 if "PPO" in names else len(names), "GRPO")
    return {name: stages.get(name, STAGE) for name in names}


def _run_torchrun(module: ModuleType) -> SimpleNamespace:
    """A `subprocess` for the host's launcher, which splits arguments at spaces and may end before torchrun."""

    def run(command: list[str], **kwargs: Any) -> Any:
        arguments = sys.argv[1:]
        words = " ".join(arguments).split()
        if not words or stage_of(read_command_line(arguments)) != STAGE:
            return module.run(command, **kwargs)
        return run_and_pass_on([*command[: -len(words)], *arguments], env=kwargs["env"])

    return SimpleNamespace(**{**vars(module), "run": run})


def _by(module: str, function: str) -> Callable[[Any], Any]:
    """Replace the host's value by the result of `function`; its module is imported together with the Board."""
    return lambda original: getattr(importlib.import_module(f"grpo_stage.board.{module}"), function)(original)


@wrapt.decorator
def _refuse_unsupported_host(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    given = args[0] if args else kwargs.get("args")
    if stage_of(read_command_line(sys.argv[1:]) if given is None else given) == STAGE:
        _refuse_megatron()
        check_contract()
    else:
        leave()
    return wrapped(*args, **kwargs)


@wrapt.decorator
def _dispatch_stage(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from grpo_stage.host import parser

    config = args[0] if args else kwargs["config"]
    if stage_of(config["args"]) != STAGE:
        leave()
        parser.refuse_grpo_keys(config["args"])
        return wrapped(*args, **kwargs)

    from grpo_stage.distributed import import_before_the_group
    from grpo_stage.plugin.launch import run

    _autoload.without_collection(import_before_the_group)
    exit_code: Any = None
    try:
        with failures_reported():
            run(parser.parse(config["args"]), config["callbacks"])
    except SystemExit as stop:  # all ranks end; the error's frames refer to the trainer, and so to the group
        exit_code = stop.code
    if ray_workers.is_in_one():  # Ray destroys the group itself
        ray_workers.end(exit_code)
        return
    _leave_process_group()
    if exit_code is not None:
        raise SystemExit(exit_code)


@wrapt.decorator
def _refuse_megatron_launch(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if any(map(_autoload.is_enabled, MEGATRON)) and _launches_grpo():
        _refuse_megatron()
    return wrapped(*args, **kwargs)


@wrapt.decorator
def _refuse_v1_launch(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if _launches_grpo():
        raise _wrong_mode("USE_V1", "LLaMA-Factory's v1 trainers")
    return wrapped(*args, **kwargs)


def _launches_grpo() -> bool:
    return sys.argv[1:2] == ["train"] and stage_of(read_command_line(sys.argv[2:])) == STAGE


def _refuse_megatron() -> None:
    for switch, trainers in MEGATRON.items():
        if _autoload.is_enabled(switch):
            raise _wrong_mode(switch, trainers)


def _wrong_mode(switch: str, trainers: str) -> UnsupportedHostError:
    return UnsupportedHostError(
        f"`stage: grpo` cannot run with {switch}=1, which asks for {trainers}: they have no GRPO. Installed "
        f"is llamafactory {installed_version()}, supported is {SUPPORTED_HOST} with its default trainers. Unset "
        f"{switch} for this run."
    )


def _leave_process_group() -> None:
    """Leave the process group at the end of the run, as the host does for its own stages."""
    from grpo_stage.distributed import leave_process_group
    from grpo_stage.host.log import get_logger

    try:
        leave_process_group()
    except RuntimeError as error:  # the model is saved by now, so the exit code stays 0
        get_logger(__name__).warning(f"Failed to destroy process group: {error}.")


ROWS: tuple[Row, ...] = (
    Row(
        "llamafactory.hparams.parser",
        "_TRAIN_ARGS",
        _add_grpo_arguments,
        "YAML, flags and `-h` know the stage and its keys.",
    ),
    Row(
        "llamafactory.hparams.parser",
        "_INFER_ARGS",
        _add_grpo_arguments,
        "`chat` and `export` take the YAML that a model was trained with.",
    ),
    Row(
        "llamafactory.hparams.parser",
        "json",
        _read_json_from_paths,
        "The host hands `json.load` a path, so that every JSON configuration fails.",
    ),
    Row(
        "llamafactory.train.tuner",
        "run_exp",
        _refuse_unsupported_host,
        "`stage: grpo` is refused on a host it was not made for before that host makes anything of its arguments.",
        is_guard=True,
    ),
    Row(
        "llamafactory.train.tuner",
        "_training_function",
        _dispatch_stage,
        "Runs the stage. `run_exp` and Ray's workers look it up when they call it.",
    ),
    Row(
        "llamafactory.train.tuner",
        "_ray_training_function",
        ray_workers.launching,
        "Called with the number of Ray's workers; its end is that of the run.",
    ),
    Row(
        "llamafactory.train.tuner",
        "get_placement_group",
        ray_workers.placing,
        "Called once Ray runs. It asks for CPUs that no machine may have; and from here on a stop of the process that "
        "has started Ray reaches the workers.",
    ),
    Row(
        "llamafactory.launcher",
        "launch",
        _refuse_megatron_launch,
        "With a Megatron switch the host may fail at its own arguments, before any other row could say why.",
        is_guard=True,
    ),
    Row(
        "llamafactory.launcher",
        "subprocess",
        _run_torchrun,
        "On several devices a value with a space in it would reach the run in pieces, and a stop would not reach it.",
    ),
    Row(
        "llamafactory.v1.launcher",
        "launch",
        _refuse_v1_launch,
        "USE_V1=1 leads to trainers that know neither the stage nor its keys.",
        is_guard=True,
    ),
    Row(
        "llamafactory.webui.control",
        "TRAINING_STAGES",
        _add_grpo_to_stages,
        "LLaMA Board's stage list.",
    ),
    Row(
        "llamafactory.webui.locales",
        "LOCALES",
        _by("locales", "add_texts"),
        "The texts of our elements; the Board looks them up by an element's name.",
    ),
    Row(
        "llamafactory.webui.interface",
        "create_train_tab",
        _by("tab", "with_grpo"),
        "The panel and the run view.",
    ),
    Row(
        "llamafactory.webui.engine",
        "Runner",
        _by("runner", "grpo_runner"),
        "From the form to a run's arguments, and to and from a saved configuration.",
    ),
    Row(
        "llamafactory.webui.common",
        "_clean_cmd",
        _by("command", "keep_false"),
        "The host drops False and empty text from what it runs, which may be a choice.",
    ),
    Row(
        "llamafactory.webui.runner",
        "gen_cmd",
        _by("command", "quote"),
        "The host's preview does not quote, so that a shell would read other values.",
    ),
    Row(
        "llamafactory.webui.components.top",
        "get_model_info",
        _by("page_state", "keep_model"),
        "The model that a configuration names brings its own path and template along.",
    ),
    Row(
        "llamafactory.webui.components.top",
        "list_checkpoints",
        _by("page_state", "keep_checkpoints"),
        "So do its adapters.",
    ),
    Row(
        "llamafactory.webui.components.top",
        "check_template",
        _by("page_state", "keep_quiet"),
        "A recipe without a template takes the tokenizer's own, and the host warns that the model is not instructed.",
    ),
    Row(
        "llamafactory.webui.components.train",
        "change_stage",
        _by("page_state", "keep_dataset"),
        "And the stage its datasets.",
    ),
    Row(
        "llamafactory.webui.control",
        "load_dataset_info",
        _by("datasets", "only_mappings"),
        "A dataset_info.json that is no mapping of mappings fails the lists of datasets.",
    ),
    Row(
        "llamafactory.webui.components.data",
        "can_preview",
        _by("datasets", "none_if_not_described"),
        "A recipe's dataset that dataset_info.json does not have fails the event that follows its choice.",
    ),
    Row(
        "llamafactory.webui.components.data",
        "get_preview",
        _by("datasets", "say_why_not"),
        "A file that is not JSON or text fails the preview.",
    ),
)
