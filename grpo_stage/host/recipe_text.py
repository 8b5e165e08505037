"""A safe reader of recipes that come from elsewhere; its errors name the line.

A guard before the reader of command lines, which has no limits: YAML's events come one after another, however deep or
large what they describe is; only a file that is small and flat by them is built.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from grpo_stage.host.configuration_file import read_command_line


MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_VALUES = 10_000
"""Counted with each alias replaced by its content."""


def read_recipe(path: str) -> dict[str, Any]:
    """The keys of a recipe.

    Raises:
        ValueError: naming the line and the reason, if the file is not a YAML mapping of ordinary size.
    """
    with _explained(path):
        _check(text_of(Path(path)))
        recipe = read_command_line([path])
    assert isinstance(recipe, dict)
    return recipe


def has_key(path: str, key: str) -> bool:
    """Whether a YAML mapping has this key at its top.

    Raises:
        ValueError: as `read_recipe` does.
    """
    with _explained(path):
        text = text_of(Path(path))
        _check(text)
        return key in yaml.safe_load(text)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"`{Path(path).name}` cannot be read: {_reason(error)} Mend the file, or choose another."
        ) from error


def text_of(path: Path) -> str:
    """The text of a file of ordinary size.

    Raises:
        ValueError: if it is larger, or not UTF-8.
    """
    content = path.read_bytes()
    if len(content) > MAX_BYTES:
        raise ValueError(f"It has {len(content)} bytes, and a recipe has {MAX_BYTES} at most.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"Line {line} is not UTF-8 text, which a recipe is. It may be another kind of file, or saved as UTF-16."
        ) from error


@dataclass(slots=True)
class _Collection:
    """A mapping or a list whose end event has not come yet."""

    is_mapping: bool
    anchor: str | None = None
    num_values: int = 1
    num_nodes: int = 0
    keys: dict[str, int] = field(default_factory=dict)
    """The line of each key."""

    @property
    def expects_key(self) -> bool:
        return self.is_mapping and self.num_nodes % 2 == 0


def _check(text: str) -> None:
    """Refuse a document that is not a mapping of ordinary size."""
    open_collections = [_Collection(is_mapping=False)]
    sizes: dict[str, int] = {}
    for event, line in _events(text):
        parent = open_collections[-1]
        if isinstance(event, yaml.DocumentStartEvent) and parent.num_nodes:
            raise ValueError(f"Line {line}: a second document begins, and a recipe is one. Leave one of them out.")
        if isinstance(event, yaml.CollectionEndEvent):
            ended = open_collections.pop()
            parent, size, anchor = open_collections[-1], ended.num_values, ended.anchor
        elif isinstance(event, yaml.NodeEvent):
            _check_place(event, line, open_collections, sizes)
            if isinstance(event, yaml.CollectionStartEvent):
                open_collections.append(_Collection(isinstance(event, yaml.MappingStartEvent), event.anchor))
                continue
            size, anchor = 1, event.anchor
            if isinstance(event, yaml.AliasEvent):
                size, anchor = sizes[str(anchor)], None
        else:
            continue
        parent.num_nodes += 1
        parent.num_values += size
        if anchor is not None:
            sizes[anchor] = size
        if parent.num_values > MAX_VALUES:
            raise ValueError(f"Line {line}: with its aliases it holds more than {MAX_VALUES} values.")
    if not open_collections[0].num_nodes:
        raise ValueError("It is empty, and a recipe is a mapping: a `key: value` a line.")


def _check_place(
    event: yaml.NodeEvent, line: int, open_collections: list[_Collection], sizes: Mapping[str, int]
) -> None:
    parent, depth = open_collections[-1], len(open_collections)
    if depth == 1 and not isinstance(event, yaml.MappingStartEvent):
        kind = "a list" if isinstance(event, yaml.SequenceStartEvent) else "a single value"
        raise ValueError(f"Line {line}: it is {kind}, and a recipe is a mapping: a `key: value` a line.")
    if depth > MAX_DEPTH:
        raise ValueError(f"Line {line}: values are nested more than {MAX_DEPTH} deep.")
    tag = getattr(event, "tag", None) or ""
    if tag and (not tag.startswith("tag:yaml.org,2002:") or ":python/" in tag):
        raise ValueError(f"Line {line}: the tag `{tag}` is not allowed in a recipe, which holds plain values.")
    if isinstance(event, yaml.AliasEvent) and event.anchor not in sizes:
        raise ValueError(f"Line {line}: `*{event.anchor}` stands for nothing that ends above it.")
    if not parent.expects_key:
        return
    if not isinstance(event, yaml.ScalarEvent):
        raise ValueError(f"Line {line}: a key is a name, and this is a list, a mapping or an alias.")
    if event.value in parent.keys:
        first = parent.keys[event.value]
        raise ValueError(
            f"Line {line}: the key `{event.value}` stands in line {first} already. Leave one of them out."
        )
    parent.keys[event.value] = line


def _events(text: str) -> Iterator[tuple[yaml.Event, int]]:
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        assert event.start_mark is not None
        yield event, event.start_mark.line + 1


def _reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    said = " ".join(filter(None, (error.context, error.problem)))  # type: ignore[attr-defined]
    return f"Line {mark.line + 1}, column {mark.column + 1}: {said}."
