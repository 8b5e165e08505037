"""Whether what a program has answered is what was expected. Everything of the program's is untrusted here."""

import json
import math
import re
from typing import Any


TOLERANCE = 1e-6
"""Of numbers with a point, absolute and relative. APPS's harness has 1e-8 and 1e-5, for whole numbers too."""
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?", re.ASCII)


def same_output(output: str, expected: str) -> bool:
    """Compare line by line, without white space at the ends of lines and empty lines at the end.

    Where lines differ as texts, they are the same if they have the same words, numbers compared as numbers: whole ones
    exactly (`3` and `3.0` are one), others up to `TOLERANCE`.
    """
    lines, wanted = _lines(output), _lines(expected)
    return len(lines) == len(wanted) and all(map(_same_line, lines, wanted))


def same_value(value: Any, expected: Any) -> bool:
    """Compare what a function has returned with a value of JSON.

    A tuple is a list, a key of a mapping is its text, `True` is 1; other numbers than whole ones may differ by
    `TOLERANCE`. As APPS writes it, `expected` may be a list that holds the value alone.

    Args:
        value: as `harness.encode` writes it.
        expected: out of the dataset.
    """
    if _same(value, expected):
        return True
    return isinstance(expected, list) and len(expected) == 1 and _same(value, expected[0])


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _same_line(line: str, expected: str) -> bool:
    if line == expected:
        return True
    words, wanted = line.split(), expected.split()
    return len(words) == len(wanted) and all(map(_same_word, words, wanted))


def _same_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    if not (_NUMBER.fullmatch(word) and _NUMBER.fullmatch(expected)):
        return False
    if expected.lstrip("+-").isdigit():
        return _whole(word) == _whole(expected)
    return _close(float(word), float(expected))


def _whole(number: str) -> str | None:
    """A whole number in one way of writing it; None for another number. In linear time, however long it is."""
    digits, _, fraction = number.lstrip("+-").partition(".")
    if not digits.isdigit() or fraction.strip("0"):
        return None
    digits = digits.lstrip("0")
    return f"-{digits}" if digits and number.startswith("-") else digits


def _close(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _same(value: Any, expected: Any) -> bool:
    if isinstance(value, dict) and len(value) == 1:
        [(kind, parts)] = value.items()
        if kind == "tuple":
            value = parts
        elif kind == "dict" and isinstance(parts, list) and isinstance(expected, dict):
            return _same_mapping(parts, expected)
        else:
            return False
    if isinstance(expected, list):
        return isinstance(value, list) and len(value) == len(expected) and all(map(_same, value, expected))
    if isinstance(expected, float) and not expected.is_integer():
        return isinstance(value, int | float) and abs(value) < 1e300 and _close(float(value), expected)
    if isinstance(expected, bool | int | float):
        return isinstance(value, bool | int | float) and value == expected
    return type(value) is type(expected) and value == expected


def _same_mapping(pairs: list[Any], expected: dict[str, Any]) -> bool:
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return False
    found = {key if isinstance(key, str) else json.dumps(key): value for key, value in pairs}
    return found.keys() == expected.keys() and all(_same(found[key], expected[key]) for key in expected)
