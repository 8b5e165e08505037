"""Conditions on the values of keys: bounds, what another key has to be, and relations that cannot be right.

Imports no torch, as every reader of keys needs this: the arguments, the host's checks, LLaMA Board.
"""

import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from string import Formatter
from types import SimpleNamespace
from typing import Any

from grpo_stage.algorithm.refusals import apart


@dataclass(frozen=True)
class Above:
    """Stands for all numbers above a bound."""

    bound: float

    def __contains__(self, value: Any) -> bool:
        return value is not None and value > self.bound

    def __str__(self) -> str:
        return f"above {self.bound:g}"


@dataclass(frozen=True)
class Below:
    """Stands for all numbers below a bound."""

    bound: float

    def __contains__(self, value: Any) -> bool:
        return value is not None and value < self.bound

    def __str__(self) -> str:
        return f"below {self.bound:g}"


@dataclass(frozen=True)
class Given:
    """Stands for any value at all."""

    def __contains__(self, value: Any) -> bool:
        return bool(value)

    def __str__(self) -> str:
        return "..."


@dataclass(frozen=True)
class Naming:
    """Stands for a word, a list that has it as an item, a mapping in which it is a value, and the text of these."""

    word: str

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, str):
            return self.word in re.split(r"[\s,\"{}\[\]]+", value)
        return self.word in (value.values() if isinstance(value, Mapping) else value or ())

    def __str__(self) -> str:
        return self.word


Allowed = Above | Below | Given | Naming | tuple[Any, ...]
"""Values of a key, one by one or by what they have in common."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A relation between keys that cannot be right."""

    broken: Callable[[SimpleNamespace], bool]
    message: str | Callable[[SimpleNamespace], str]
    """A text whose fields are keys, or a function for a text with a number that is computed from them."""

    def refusal(self, values: SimpleNamespace) -> str | None:
        """What to say about `values`; None where the relation holds."""
        if not self.broken(values):
            return None
        if not isinstance(self.message, str):
            return self.message(values)
        fields = {field for _, field, _, _ in Formatter().parse(self.message) if field}
        return self.message.format_map({field: as_yaml(getattr(values, field)) for field in fields})


def refuse_broken(rules: Iterable[Rule], values: SimpleNamespace) -> None:
    """Raise ValueError with the message of the first rule that `values` break."""
    for rule in rules:
        with apart():
            if (refusal := rule.refusal(values)) is not None:
                raise ValueError(refusal)


def as_yaml(value: Any) -> str:
    """A key's value as a recipe has it; that of a choice where it is a member of an enumeration."""
    plain = value.value if isinstance(value, Enum) else value
    return json.dumps(plain) if plain is None or isinstance(plain, bool | dict | list) else str(plain)


def as_lines(settings: Mapping[str, Any]) -> str:
    """Keys with their values as the lines of a recipe."""
    return "\n".join(f"{key}: {as_yaml(value)}" for key, value in settings.items())


def applies(conditions: Mapping[str, Allowed], values: Mapping[str, Any]) -> bool:
    """Whether a key with these conditions on others has an effect; a key that `values` lacks stands in no way."""
    return all(values[key] in allowed for key, allowed in conditions.items() if key in values)


def shown_condition(allowed: Allowed) -> str:
    """The values that a condition allows, for a reader."""
    return " or ".join(map(shown, allowed)) if isinstance(allowed, tuple) else str(allowed)


def shown(value: Any) -> str:
    """A value as YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def broken_bound(value: Any, bounds: Mapping[str, Any]) -> str | None:
    """What a number would have to be, in words: the first bound that it breaks, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        return "a finite number"
    for bound, words, is_broken in (
        ("above", "above", operator.le),
        ("min", "at least", operator.lt),
        ("max", "at most", operator.gt),
        ("most", "at most", operator.gt),
        ("below", "below", operator.ge),
    ):
        if (limit := bounds.get(bound)) is not None and is_broken(value, limit):
            return f"{words} {limit if isinstance(limit, int) else format(limit, 'g')}"
    return None
