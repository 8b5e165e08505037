"""What the folder of a LoRA adapter says about it."""

import json
import os
import re
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file


def lora_rank(values: Any) -> int:
    """The highest rank of the adapter that is trained: `lora_rank`, or the continued adapter's own."""
    adapters = items(values.adapter_name_or_path)
    if values.create_new_adapter or not adapters:
        return values.lora_rank
    config = adapter_config(adapters[-1], values.adapter_folder)
    if config is None:
        return values.lora_rank
    return max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])


def adapter_config(adapter: str, subfolder: str | None, key: str = "adapter_name_or_path") -> dict[str, Any] | None:
    """The content of its adapter_config.json; None if there is no such file.

    Raises:
        ValueError: if the file is damaged.
    """
    file = adapter_folder(adapter, subfolder) / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(
            f"`{key}: {adapter}` cannot be read: {file} is damaged ({error}). Copy it anew, or name another one."
        ) from error


def adapter_folder(adapter: str, subfolder: str | None) -> Path:
    return Path(adapter, subfolder or "")


def may_be_hub_id(name: str) -> bool:
    """Whether the name has the form `owner/name` and no such path exists."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not os.path.exists(name)


def is_adapter_on_hub(name: str) -> bool:
    """Whether the adapter may be on a hub. Asks the hub if a folder `owner` exists: it may be a mistyped path."""
    if not may_be_hub_id(name) or not os.path.isdir(name.split("/")[0]):
        return may_be_hub_id(name)
    try:
        return cached_file(name, "adapter_config.json") is not None
    except OSError:
        return False


def items(value: Any) -> list[str]:
    if value is None:
        return []
    return [item.strip() for item in value.split(",")] if isinstance(value, str) else list(value)
