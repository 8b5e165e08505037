"""A recipe as a YAML text to share: without secrets, in the sections of the host's examples."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import yaml
from llamafactory.hparams.data_args import DataArguments
from llamafactory.hparams.generating_args import GeneratingArguments
from llamafactory.hparams.model_args import ModelArguments
from llamafactory.hparams.training_args import TrainingArguments

from grpo_stage.arguments import ROLLOUT, GRPOArguments
from grpo_stage.records.redaction import mask


_OWNERS = (
    ("model", ModelArguments),
    ("dataset", DataArguments),
    (ROLLOUT.lower(), GeneratingArguments),
    ("train", TrainingArguments),
)
_GROUPS = tuple(dict.fromkeys(spec.metadata["group"].lower() for spec in dataclasses.fields(GRPOArguments)))


def recipe_text(recipe: Mapping[str, Any], head: str, sections: Mapping[str, str] = MappingProxyType({})) -> str:
    """The keys that have a value, secrets masked.

    Args:
        recipe: the keys of a recipe.
        head: the comment that it opens with, `#` included.
        sections: of keys of the host that are not to stand in their argument class's own.
    """
    values = mask(recipe)
    section_of = {spec.name: spec.metadata["group"].lower() for spec in dataclasses.fields(GRPOArguments)}
    section_of |= sections
    for name, owner in _OWNERS:
        section_of |= {spec.name: name for spec in dataclasses.fields(owner) if spec.name not in section_of}
    section_of |= dict.fromkeys(("stage", "do_train"), "method")
    parts = [head]
    for name in ("model", "method", "dataset", *_GROUPS, "train"):
        section = {
            key: value for key, value in values.items() if section_of.get(key, "method") == name and value is not None
        }
        if section:
            body = yaml.safe_dump(section, allow_unicode=True, sort_keys=False, width=119)
            parts.append(f"### {name}\n{body.rstrip()}")
    return "\n\n".join(parts) + "\n"
