"""The texts of our elements in LLaMA Board, in its five languages: a few files for each under `translations/`.

A file maps, under `elements`, an element's name to the texts of its widget (`label`, `info`, `value`, ...), and under
`messages`, names to our own sentences. The English text of a field is the help text of its key. Under `watch` stands
what to watch for in a run, a sentence that follows the text of a field. Under `metrics` stand the definitions of the
metrics, whose English is in `records.definitions`.
"""

import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from grpo_stage.arguments import GRPOArguments
from grpo_stage.records.definitions import row_of


LANGUAGES = ("en", "ru", "zh", "ko", "ja")
_WITHOUT_SPACES = ("zh", "ja")
PREFIX = "grpo_"
"""Begins the names of our elements, which share one table with the host's."""
_FOLDER = Path(__file__).with_name("translations")
_LINK = re.compile(r" ?\(\[[^\]]*\]\([^)]*\)\)|\[([^\]]*)\]\([^)]*\)")
"""Of Markdown: one that stands in parentheses of its own, or else its text."""


def add_texts(host_texts: dict[str, Any]) -> dict[str, Any]:
    """The host's table with our texts: element -> language -> texts of its widget.

    The host's learning rate also says what it is for this stage, which sets it.
    """
    names = texts("en")["elements"]
    ours = {name: {language: texts(language)["elements"][name] for language in LANGUAGES} for name in names}
    rates = {
        language: {**of_host, "info": _joined(of_host["info"], message("learning_rate", language), language)}
        for language, of_host in host_texts["learning_rate"].items()
    }
    return {**host_texts, "learning_rate": rates, **ours}


def _joined(first: str, second: str, language: str) -> str:
    return f"{first}{'' if language in _WITHOUT_SPACES else ' '}{second}"


def message(name: str, language: str, **values: Any) -> str:
    """One of our own sentences; `values` fill its braces."""
    return texts(language)["messages"][name].format(**values)


def definition(metric: str, language: str) -> str:
    """What a metric means, as plain text; in English where the language has no text for it."""
    row = row_of(metric)
    return "" if row is None else texts(language)["metrics"].get(row.names[0]) or _LINK.sub(r"\1", row.text)


@cache
def texts(language: str) -> dict[str, Any]:
    """The content of a language's file."""
    content: dict[str, Any] = {"metrics": {}}
    for file in sorted((*_FOLDER.glob(f"{language}.yaml"), *_FOLDER.glob(f"*.{language}.yaml"))):
        for part, of_file in yaml.safe_load(file.read_text(encoding="utf-8")).items():
            content.setdefault(part, {}).update(of_file)
    if language == "en":
        for spec in dataclasses.fields(GRPOArguments):
            element = content["elements"].setdefault(f"{PREFIX}{spec.name}", {"label": spec.name})
            element["info"] = spec.metadata["help"]
    for key, sentence in content["watch"].items():
        element = content["elements"][f"{PREFIX}{key}"]
        element["info"] = _joined(element["info"], sentence, language)
    return content
