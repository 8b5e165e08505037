"""What a key depends on: the values of other keys under which it has an effect, and relations that cannot be right.

Imports no torch, as every reader of keys needs this: the arguments, the host's checks, LLaMA Board.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from string import Formatter
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Above:
    """Stands in `metadata["only_with"]` for all numbers above a bound."""

    bound: float

    def __contains__(self, value: Any) -> bool:
        return value is not None and value > self.bound

    def __str__(self) -> str:
        return f"above {self.bound:g}"


@dataclass(frozen=True)
class Given:
    """Stands in `metadata["only_with"]` for any value at all."""

    def __contains__(self, value: Any) -> bool:
        return bool(value)

    def __str__(self) -> str:
        return "..."


@dataclass(frozen=True, slots=True)
class Rule:
    """A relation between keys that cannot be right. The message's fields are keys."""

    broken: Callable[[SimpleNamespace], bool]
    message: str


def refuse_broken(rules: Iterable[Rule], values: SimpleNamespace) -> None:
    """Raise ValueError with the message of the first rule that `values` break."""
    for rule in rules:
        if rule.broken(values):
            fields = {field for _, field, _, _ in Formatter().parse(rule.message) if field}
            raise ValueError(rule.message.format_map({field: as_yaml(getattr(values, field)) for field in fields}))


def as_yaml(value: Any) -> str:
    """A key's value as a recipe has it; that of a choice where it is a member of an enumeration."""
    plain = value.value if isinstance(value, Enum) else value
    return json.dumps(plain) if plain is None or isinstance(plain, bool | dict | list) else str(plain)


def applies(conditions: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether a key with these `only_with` conditions has an effect; a key that `values` lacks stands in no way."""
    return all(values[key] in allowed for key, allowed in conditions.items() if key in values)


def shown_condition(allowed: Above | Given | tuple[Any, ...]) -> str:
    """The values of a condition in `metadata["only_with"]`, for a reader."""
    return str(allowed) if isinstance(allowed, Above | Given) else " or ".join(map(shown, allowed))


def shown(value: Any) -> str:
    """A value as YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
