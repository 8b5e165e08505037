"""Values converted to the types of their keys, since the host's `parse_dict` checks no types."""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from inspect import isclass
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from grpo_stage.algorithm.conditions import shown


# Keys whose text is split at commas. A YAML list means the same, and its items are not split.
_LISTS = frozenset(
    (
        *("dataset", "eval_dataset", "interleave_probs"),
        *("lora_target", "oft_target", "additional_target", "freeze_trainable_modules", "freeze_extra_modules"),
        *("galore_target", "apollo_target", "reward_funcs", "reward_weights", "tools"),
    )
)
# The host takes no list for these keys, so an item cannot contain a comma.
_TEXT_ALONE = frozenset(
    (
        *("adapter_name_or_path", "ref_model_adapters", "reward_model_adapters"),
        *("add_tokens", "add_special_tokens", "profile_modules"),
    )
)
_COMMA_LISTS = _LISTS | _TEXT_ALONE
# Types that the host and transformers accept beyond their own type hints.
_ALSO_ACCEPTED: Mapping[str, type] = MappingProxyType({"resume_from_checkpoint": bool, "dataset_dir": dict})
_CONVERTED_VALUES = MappingProxyType({("scale_rewards", "true"): "group", ("scale_rewards", "false"): "none"})


def as_hinted(key: str, value: Any, hint: Any) -> Any:
    """The value in its key's type, as argparse would read it from text."""
    is_union = get_origin(hint) in (Union, UnionType)
    members = list(get_args(hint) if is_union else (hint,))
    if value is None:
        if hint is Any or NoneType in members:
            return None
        raise ValueError(f"`{key}` has no value, and takes {_expected(members)}. Give it one, or leave the line out.")
    members = [member for member in members if member is not NoneType]

    enums = [member for member in members if isclass(member) and issubclass(member, Enum)]
    if enums:
        return _choice(key, value, [item.value for enum in enums for item in enum])
    if len(members) == 1 and get_origin(members[0]) is Literal:
        return _choice(key, value, get_args(members[0]))
    value = _as_list(key, value)
    if key in _COMMA_LISTS and isinstance(value, list | tuple):
        if any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in value):
            raise _wrong_type(key, value, members)
        return _as_written(key, [str(item).strip() for item in value])
    if key in _ALSO_ACCEPTED:
        members = [_ALSO_ACCEPTED[key], *members]
    if bool in members and str(value).lower() in ("true", "false"):
        return _to_bool(value)
    return _first_that_fits(key, value, members)


def _as_list(key: str, value: Any) -> Any:
    """The value, or the list that it is as JSON: a command line and LLaMA Board's preview write lists so."""
    if key not in _LISTS or not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _as_written(key: str, items: list[str]) -> str | list[str]:
    """The items as comma-separated text, which every form of a recipe can hold; as a list if an item has a comma."""
    torn = [item for item in items if "," in item]
    if torn and key in _TEXT_ALONE:
        raise ValueError(
            f"`{key}` has the item `{torn[0]}` with a comma, where LLaMA-Factory would split it: of this key it takes "
            "no list. Give it a name without a comma, or leave it out."
        )
    return items if torn else ",".join(items)


def _choice(key: str, value: Any, choices: Iterable[Any]) -> Any:
    choices = list(choices)
    value = as_plain(value)
    if value is False and "no" in choices:  # YAML reads `no` as a boolean
        return "no"
    if not isinstance(value, bool) and value in choices:
        return value
    hint = _CONVERTED_VALUES.get((key, shown(value).lower()))
    if hint is None and (near := difflib.get_close_matches(str(value), map(str, choices), n=1)):
        hint = near[0]
    raise ValueError(
        f"`{key}: {shown(value)}` is not possible: it is one of {', '.join(map(str, choices))}."
        + (f" Write `{key}: {hint}`." if hint else " Write one of these, or leave the line out.")
    )


def _first_that_fits(key: str, value: Any, members: list[Any]) -> Any:
    for member in members:
        plain = get_origin(member) or member
        if member is Any or (isclass(plain) and type(value) is plain and plain is not float):
            return value
    if dict in [get_origin(member) or member for member in members]:  # then text is a path or JSON, not a number
        members = [member for member in members if member is not str]
    for member in members:
        try:
            return _convert(key, value, member, members)
        except ValueError:
            continue
    raise _wrong_type(key, value, members)


def _convert(key: str, value: Any, member: Any, members: list[Any]) -> Any:
    plain = get_origin(member) or member
    converter = _CONVERTERS.get(plain)
    if converter is None:  # a special class, such as a path: the host checks it
        return value
    try:
        return converter(value)
    except (TypeError, ValueError) as error:
        raise _wrong_type(key, value, members) from error


def _wrong_type(key: str, value: Any, members: list[Any]) -> ValueError:
    expected = _expected([str] if key in _COMMA_LISTS else members)
    return ValueError(
        f"`{key}: {shown(value)}` is not possible: it takes {expected}. Mend the value, or leave the line out."
    )


def _to_bool(value: Any) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    text = str(value).lower()
    if not isinstance(value, bool | int | str) or text not in known:
        raise ValueError(value)
    return known[text]


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(value)
    try:
        return int(value) if not isinstance(value, float) else _whole(value)
    except ValueError:
        return _whole(float(value))  # "1e3"


def _whole(value: float) -> int:
    if not value.is_integer():
        raise ValueError(value)
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(value)
    number = value if isinstance(value, int) else _number(value)  # an int may be a count, as in `val_size: 1`
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _number(value: Any) -> int | float:
    is_whole = isinstance(value, str) and value.strip().lstrip("+-").isdecimal()
    return int(value) if is_whole else float(value)


def _to_str(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(value)
    return str(value)


def _to_dict(value: Any) -> dict[str, Any]:
    value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise TypeError(value)
    return dict(value)


def _to_list(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [item.strip() for item in value.split(",")]
    if not isinstance(value, list | tuple):
        raise TypeError(value)
    return list(value)


_CONVERTERS: Mapping[Any, Callable[[Any], Any]] = MappingProxyType(
    {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str, dict: _to_dict, list: _to_list}
)
_TYPE_NAMES = MappingProxyType(
    {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "text",
        dict: "a mapping",
        list: "a list",
    }
)


def _expected(members: list[Any]) -> str:
    names = [
        _TYPE_NAMES.get(get_origin(member) or member, str(member)) for member in members if member is not NoneType
    ]
    return " or ".join(dict.fromkeys(names))


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """A sentence with the nearest name and a trailing space, or an empty text."""
    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return f"Did you mean `{by_lower[near[0]]}`? " if near else ""


def as_plain(value: Any) -> Any:
    """The text of a choice; in the host's defaults a choice may be a member of an enumeration."""
    return value.value if isinstance(value, Enum) else value
