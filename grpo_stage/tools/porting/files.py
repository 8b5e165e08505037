"""A file of another system: which system's it is, and its recipe as one of ours."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from grpo_stage.tools.porting import swift, trl, verl
from grpo_stage.tools.porting.port import Port


def port_file(
    path: Path, known: Collection[str], version: str, source_devices: int | None, devices: int
) -> tuple[str, Port]:
    """Which system's file it is, and the recipe that comes of it.

    Args:
        path: a YAML file, or a text file with a `swift rlhf` command.
        known: keys of LLaMA-Factory and of this stage.
        version: of TRL, whose defaults a file of TRL's goes with.
        source_devices: how many devices train there; None for what the file says.
        devices: how many train here.

    Raises:
        ValueError: if it is no such file, or one of this stage already.
    """
    text = _text_of(path)
    if "swift rlhf" in text.replace("\\\n", " "):
        return "ms-swift", swift.port_swift(swift.read_command(text), known, source_devices, devices)
    source = _mapping_of(path, text)
    if source.get("stage") is not None:
        raise ValueError(f"{path} has `stage: {source['stage']}`: it is a recipe of LLaMA-Factory's already.")
    if any(isinstance(source.get(key), Mapping) for key in ("algorithm", "worker", "actor_rollout_ref", "trainer")):
        return "verl or EasyR1", verl.port_verl(verl.flattened(source), known, devices)
    return f"TRL {version} or Open-R1", trl.port_trl(source, known, version, source_devices, devices)


def _text_of(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is no file. Name a YAML file, or a text file with a `swift rlhf` command.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}. Name a YAML file, or save it as UTF-8.") from error


def _mapping_of(path: Path, text: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} is no mapping of keys to values, and has no `swift rlhf` command either.")
    return content
