"""The models that the host knows by their hub's id: their names and templates."""

from llamafactory.extras.constants import DEFAULT_TEMPLATE, SUPPORTED_MODELS


def name_of(path: str) -> str | None:
    """The host's name for the model of a hub id; None for one that it does not know."""
    return next((name for name, paths in SUPPORTED_MODELS.items() if path in paths.values()), None)


def template_of(path: str) -> str | None:
    """The template that the host gives the model of a hub id; None if it has none for it."""
    name = name_of(path)
    return None if name is None else DEFAULT_TEMPLATE.get(name)
