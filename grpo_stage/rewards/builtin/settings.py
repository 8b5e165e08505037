"""The values of `reward_kwargs` that several built-in rewards take, checked."""

import math
from typing import Any


def seconds(name: str, value: Any) -> float:
    """`value` as a time limit, or ValueError."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}: it must be a number of seconds above 0")
    return float(value)


def positive_int(name: str, value: Any) -> int:
    """`value` as a count, or ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}: it must be a whole number, 1 at least")
    return value


def finite_number(name: str, value: Any) -> float:
    """`value` as a float, or ValueError."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}: it must be a finite number")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """`value` as true or false, or ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: it must be true or false")
    return value
