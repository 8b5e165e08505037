"""The texts of our elements in LLaMA Board, in its five languages: one file a language under `translations/`.

A file maps an element's name to what its widget shows (`label`, `info`, `value`, ...), under `elements`, and names to
the sentences that we write ourselves, under `messages`. What an English field says is its key's own help text.
"""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from grpo_stage.arguments import GRPOArguments


LANGUAGES = ("en", "ru", "zh", "ko", "ja")
PREFIX = "grpo_"
"""Of the names of our elements, which share one table with the host's."""
_FOLDER = Path(__file__).with_name("translations")


def add_texts(host_texts: dict[str, Any]) -> dict[str, Any]:
    """The host's table with ours: element -> language -> what its widget shows."""
    names = texts("en")["elements"]
    ours = {name: {language: texts(language)["elements"][name] for language in LANGUAGES} for name in names}
    return {**host_texts, **ours}


def message(name: str, language: str, **values: Any) -> str:
    """A sentence of ours; `values` fill its braces."""
    return texts(language)["messages"][name].format(**values)


@cache
def texts(language: str) -> dict[str, Any]:
    """A language's file."""
    content = yaml.safe_load((_FOLDER / f"{language}.yaml").read_text(encoding="utf-8"))
    if language == "en":
        for spec in dataclasses.fields(GRPOArguments):
            element = content["elements"].setdefault(f"{PREFIX}{spec.name}", {"label": spec.name})
            element["info"] = spec.metadata["help"]
    return content
