"""What the subcommands that take a recipe share: their arguments, reading it, explained errors, a result's file."""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from grpo_stage.host.run_arguments import RunArguments


ATTENTION = 3
"""The exit code of a command that did its work and found something that needs a person."""

WITHOUT_DEVICE = {
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
    "pure_bf16": False,
    "tf32": None,
    "flash_attn": "auto",
}
"""Keys with which a recipe for a GPU is read without one: references and shapes need none."""


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe as `llamafactory-cli train` takes it, and `--json`."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the recipe, a YAML or JSON file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that replace those of the file")
    add_json_argument(parser)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file, too; `-` is stdout")


@contextlib.contextmanager
def quiet_host() -> Iterator[None]:
    """A block that may import the host: what it prints and logs goes to stderr, and it uses one device."""
    # Before the host is imported, since its import reads the variable.
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARNING")
    # Before torch looks for devices: the host refuses several devices in one process.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    with contextlib.redirect_stdout(sys.stderr):
        yield


def read_recipe(config: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The recipe as the host reads it.

    Raises:
        ValueError: if it is no mapping, or a recipe of another stage.
    """
    from grpo_stage.host.configuration_file import STAGE, read_command_line, stage_of

    configuration = read_command_line([str(config), *overrides])
    if not isinstance(configuration, dict) or stage_of(configuration) != STAGE:
        raise ValueError(f"{config} is no recipe of `stage: {STAGE}`.")
    return configuration


@contextlib.contextmanager
def errors_explained(configuration: Mapping[str, Any]) -> Iterator[None]:
    """A block with the stage installed; errors of its user become `ValueError`, with secrets masked.

    Raises:
        ValueError: for errors of the recipe, its rewards, the host's version, and files that cannot be read.
    """
    from grpo_stage.plugin.contract import check_contract
    from grpo_stage.plugin.registration import install
    from grpo_stage.records.redaction import errors_masked

    install()
    try:
        check_contract()
        with errors_masked(configuration):
            yield
    except Exception as error:
        text = None if isinstance(error, ValueError) else mistake_in(error, configuration)
        if text is None:
            raise
        raise ValueError(text) from error


def mistake_in(error: Exception, configuration: Mapping[str, Any]) -> str | None:
    """What an exception says of a mistake of the recipe's user; None for any other exception."""
    from datasets.exceptions import DatasetsError

    from grpo_stage.plugin.contract import UnsupportedHostError
    from grpo_stage.rewards.errors import RewardError

    if isinstance(error, ValueError | RewardError | UnsupportedHostError):
        return str(error)
    if isinstance(error, OSError | DatasetsError):  # files of the model or of a dataset are missing or damaged
        named = ", ".join(f"`{key}: {configuration.get(key)}`" for key in ("model_name_or_path", "dataset"))
        return f"One of {named} cannot be loaded: {error} {error.__cause__ or ''}".rstrip()
    return None


def parse_without_run(configuration: Mapping[str, Any], *, on_device: bool) -> "RunArguments":
    """The arguments, parsed as for a run, with harmless values for keys that only a run needs.

    Args:
        configuration: the recipe.
        on_device: whether the recipe's device and precision are kept; without, one for a GPU is read anywhere.
    """
    from grpo_stage.host.parser import parse

    with tempfile.TemporaryDirectory(prefix="grpo-stage-") as folder:
        values = {
            **configuration,
            "do_train": True,
            "output_dir": os.path.join(folder, "output"),  # never made; the user's own folder may hold a run
            "resume_from_checkpoint": None,
            **({} if on_device else WITHOUT_DEVICE),
        }
        return parse(values)


def write_json(path: Path | None, result: Any) -> None:
    """Write a result at once, so that a program that waits for the file reads it whole; nothing without a path."""
    if path is None:
        return
    text = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False)
    if str(path) == "-":
        print(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
