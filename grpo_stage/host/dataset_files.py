"""The datasets of a run as files: their descriptions in `dataset_info.json`, and the places where a file is broken.

The host and `datasets` name neither the key, nor the file, nor the line of an error.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llamafactory.data.converter import DATASET_CONVERTERS
from llamafactory.data.parser import get_dataset_list
from llamafactory.extras.constants import DATA_CONFIG, FILEEXT2TYPE

from grpo_stage.host.coercion import did_you_mean


_SOURCES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_JSON_TYPES = MappingProxyType({dict: "a mapping", list: "a list", str: "text", bool: "true or false"})
_SMALL = 1024
_LARGE = 1 << 30
_SPACE = re.compile(r"\s*")
_MEDIA = ("videos", "audios")


def check_descriptions(named: Iterable[tuple[str, str]], dataset_dir: Any) -> None:
    """Refuse datasets that have no description, or that this stage cannot train on.

    Args:
        named: pairs of a key and the dataset that it names.
        dataset_dir: the host's key: a folder with a dataset_info.json, or the content of such a file.

    Raises:
        ValueError: naming the key, the dataset, the file, the reason and the remedy.
    """
    if dataset_dir == "ONLINE" or str(dataset_dir).startswith("REMOTE:"):
        return  # described on a hub, or not at all: the loader checks it
    named = list(named)
    file = "`dataset_dir`" if isinstance(dataset_dir, dict) else str(Path(dataset_dir) / DATA_CONFIG)
    descriptions = dataset_dir if isinstance(dataset_dir, dict) else _read_descriptions(dataset_dir)
    for key, name in named:
        if name not in descriptions:
            near = difflib.get_close_matches(name, descriptions, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else f"It knows: {', '.join(descriptions)}."
            raise ValueError(f"`{key}: {name}` is not in {file}. {hint} Name one of those, or add yours to it.")
        _check_description(f"`{key}: {name}`", descriptions[name], file)
    for (key, name), attributes in zip(named, get_dataset_list([name for _, name in named], dataset_dir), strict=True):
        if attributes.ranking:
            raise ValueError(
                f"`{key}: {name}` holds pairs of preferred answers (`ranking: true`), and this stage samples and "
                "scores its own answers. Choose a dataset with prompts and reference answers."
            )
        for media in _MEDIA:
            if getattr(attributes, media):
                raise ValueError(
                    f"`{key}: {name}` has a column of {media}, and this stage knows text and images. "
                    "Choose a dataset of text or images."
                )


def check_files(named: Iterable[tuple[str, str]], dataset_dir: Any) -> None:
    """Refuse local datasets with files that are missing, empty, or of a type that the host does not read.

    Raises:
        ValueError: naming the key, the dataset, the file and the remedy.
    """
    for key, name in named:
        if (path := _local_path(name, dataset_dir)) is not None:
            _check_path(f"`{key}: {name}`", path)


def local_files(name: str, dataset_dir: Any) -> list[Path]:
    """The files of a dataset on this machine; none for one of a hub."""
    path = _local_path(name, dataset_dir)
    return [] if path is None else [file for file in _files(path) if file.is_file()]


def defect_of(key: str, name: str, dataset_dir: Any) -> str | None:
    """The first defect in a dataset's local files, with its place; None if there is none."""
    path = _local_path(name, dataset_dir)
    for file in () if path is None else _files(path):
        if file.suffix in (".json", ".jsonl") and (defect := _json_defect(file)) is not None:
            return f"`{key}: {name}` cannot be read: {file}, {defect}. Mend that place, or take the row out."
    return None


def _local_path(name: str, dataset_dir: Any) -> Path | None:
    if isinstance(dataset_dir, dict) or dataset_dir == "ONLINE" or str(dataset_dir).startswith("REMOTE:"):
        return None
    attributes = get_dataset_list([name], dataset_dir)[0]
    return Path(dataset_dir, attributes.dataset_name) if attributes.load_from == "file" else None


def _read_descriptions(dataset_dir: str) -> Mapping[str, Any]:
    file = Path(dataset_dir) / DATA_CONFIG
    if not file.is_file():
        raise ValueError(
            f"`dataset_dir: {dataset_dir}` has no {DATA_CONFIG}, the file that describes the datasets "
            f"({file.absolute()}). Give the folder that holds it."
        )
    try:
        descriptions = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`dataset_dir: {dataset_dir}`: {file}, line {error.lineno}, column {error.colno} is no valid JSON: "
            f"{error.msg}. Mend the file there."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"`dataset_dir: {dataset_dir}`: {file} is not in UTF-8. Save it as UTF-8.") from error
    if not isinstance(descriptions, dict):
        raise ValueError(
            f"`dataset_dir: {dataset_dir}`: {file} holds {_kind(descriptions)}, and maps the names of datasets to "
            'their descriptions. Write for example {"sums": {"file_name": "sums.jsonl"}}.'
        )
    return descriptions


def _check_description(source: str, description: Any, file: str) -> None:
    example = '{"file_name": "sums.jsonl"}'
    if not isinstance(description, dict):
        raise ValueError(
            f"{source} has {_kind(description)} for a description in {file}, which is a mapping. Write for example "
            f"{example}."
        )
    if not any(key in description for key in _SOURCES):
        raise ValueError(
            f"{source} has no source in {file}: its description has {', '.join(description) or 'no key'}, and one of "
            f"{', '.join(_SOURCES)} says where it is. Write for example {example}."
        )
    formatting = description.get("formatting", "alpaca")
    if formatting not in DATASET_CONVERTERS:
        raise ValueError(
            f"{source} has `formatting: {formatting}` in {file}, which is one of {', '.join(DATASET_CONVERTERS)}. "
            f"{did_you_mean(formatting, DATASET_CONVERTERS)}Write one of these, or leave it out for alpaca."
        )


def _check_path(source: str, path: Path) -> None:
    if not path.exists():
        raise ValueError(
            f"{source} is {path} by its description, which is not there. Mend its `file_name` in {DATA_CONFIG}."
        )
    files = _files(path)
    endings = {file.suffix for file in files}
    kinds = {FILEEXT2TYPE.get(ending[1:]) for ending in endings}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(
            f"{source} is {path}, with files that end with {', '.join(sorted(endings)) or 'nothing: there are none'}: "
            f"LLaMA-Factory reads files of one kind, that end with {', '.join(FILEEXT2TYPE)}. Convert the data, or "
            f"mend its `file_name` in {DATA_CONFIG}."
        )
    if all(file.stat().st_size < _SMALL and not file.read_bytes().strip(b" \n\r\t[]") for file in files):
        raise ValueError(f"{source} has no rows: {path} is empty. Fill it, or name another dataset.")


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _json_defect(file: Path) -> str | None:
    """The first defect of a JSON or JSON lines file: `datasets` takes either under both endings."""
    if file.stat().st_size > _LARGE:
        return None
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return f"line {line} is not in UTF-8"
    types: dict[str, tuple[str, str]] = {}
    mixed = None
    try:
        for place, row in _rows(text):
            if not isinstance(row, dict):
                return f"{place} is {_kind(row)}, and a row is a mapping of columns to values"
            mixed = mixed or _mixed_types(place, row, types)
    except json.JSONDecodeError as error:
        return f"line {error.lineno}, column {error.colno} is no valid JSON: {error.msg}"
    return mixed


def _mixed_types(place: str, row: Mapping[str, Any], types: dict[str, tuple[str, str]]) -> str | None:
    """How the types of a row's columns differ from earlier rows; `types` has the types so far and their places."""
    for column, value in row.items():
        if value is None:
            continue
        kind = _JSON_TYPES.get(type(value), "a number")
        before, where = types.setdefault(column, (kind, place))
        if kind != before:
            return f"{place} has {kind} in the column `{column}`, and {where} has {before}"
    return None


def _rows(text: str) -> Iterator[tuple[str, Any]]:
    """Each row with its place. As in `datasets`, a line may have several rows, and a row several lines."""
    if text.lstrip().startswith("["):
        for number, row in enumerate(json.loads(text), start=1):
            yield f"row {number}", row
        return
    decoder = json.JSONDecoder()
    line, counted, end = 1, 0, 0
    while (start := _end_of_space(text, end)) < len(text):
        line, counted = line + text.count("\n", counted, start), start
        try:
            row, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            begins, ends = text.rfind("\n", 0, start) + 1, text.find("\n", start)
            try:  # most rows are one line; a line that ends too soon is broken itself, not the next one
                decoder.raw_decode(text[begins : ends if ends >= 0 else None], start - begins)
            except json.JSONDecodeError as error:
                error.lineno = line
                raise
            raise
        yield f"line {line}", row


def _end_of_space(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    assert space is not None
    return space.end()


def _kind(value: Any) -> str:
    return _JSON_TYPES.get(type(value), "no value" if value is None else "a number")
