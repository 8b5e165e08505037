"""What is known of a model by its name: the host's name and template for a hub's id, and a config on this machine."""

from pathlib import Path
from typing import Any

from llamafactory.extras.constants import DEFAULT_TEMPLATE, SUPPORTED_MODELS
from transformers import PretrainedConfig


def name_of(path: str) -> str | None:
    """The host's name for the model of a hub id; None for one that it does not know."""
    return next((name for name, paths in SUPPORTED_MODELS.items() if path in paths.values()), None)


def template_of(path: str) -> str | None:
    """The template that the host gives the model of a hub id; None if it has none for it."""
    name = name_of(path)
    return None if name is None else DEFAULT_TEMPLATE.get(name)


def config_here(path: str) -> dict[str, Any]:
    """The config of the model in a folder, or of a hub's id in the cache; an empty one if there is none."""
    if not path or Path(path).is_file():
        return {}
    try:
        config: dict[str, Any] = PretrainedConfig.get_config_dict(path, local_files_only=True)[0]
    except OSError:
        return {}
    return config
