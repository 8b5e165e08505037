"""The refusals of a recipe: the first one, or all at once, from the same checks.

A check refuses by raising, and a run ends at its first refusal. In a block `gathering`, a check that stands in a block
`apart` is ended alone, and the checks after it go on. So every rule is written once, as a function that raises.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


_NAMED = re.compile(r"`(\w+)[:`]|^(\w+)(?=:| )")


@dataclass(frozen=True, slots=True)
class _Refusals:
    explain: Callable[[Exception], str | None]
    texts: list[str] = field(default_factory=list)


class _StoppedError(ValueError):
    """Ends what cannot go on without what was refused; what there is to say is gathered already."""


_gathered: ContextVar[_Refusals | None] = ContextVar("_gathered", default=None)


@contextmanager
def gathering(explain: Callable[[Exception], str | None]) -> Iterator[list[str]]:
    """A block whose refusals are gathered in the list that it gets; none of them leaves it.

    Args:
        explain: the text of a user's mistake, or None for any other exception, which is raised.
    """
    refusals = _Refusals(explain)
    token = _gathered.set(refusals)
    try:
        with apart():
            yield refusals.texts
    finally:
        _gathered.reset(token)


@contextmanager
def apart() -> Iterator[None]:
    """A block that the code after it does not depend on: while refusals are gathered, its own does not end that code.

    Elsewhere it changes nothing.
    """
    try:
        yield
    except Exception as error:
        refusals = _gathered.get()
        if refusals is None:
            raise
        if isinstance(error, _StoppedError):
            return
        text = refusals.explain(error)
        if text is None:
            raise
        if text not in refusals.texts:
            refusals.texts.append(text)


def has_refused() -> bool:
    """Whether something was refused and gathered."""
    refusals = _gathered.get()
    return refusals is not None and bool(refusals.texts)


def stop_if_refused() -> None:
    """End this block if something was gathered: the code after it needs what was refused."""
    if has_refused():
        raise _StoppedError


def named_keys(text: str, known: Collection[str]) -> tuple[str, ...]:
    """The keys that a refusal names, in its order: in backquotes, or as its first word."""
    names = [quoted or first for quoted, first in _NAMED.findall(text)]
    keys = tuple(dict.fromkeys(name for name in names if name in known))
    return keys or (("reward_funcs",) if text.startswith("reward ") else ())  # a function's name stands there
