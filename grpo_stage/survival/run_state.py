"""The state of a run beside its weights, as one table: saving, restoring and undoing follow from it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Protocol, runtime_checkable


class Stateful(Protocol):
    """An object whose state can be taken and restored. The state is exact, ready for JSON, and a copy."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> None: ...


@runtime_checkable
class Undoable(Protocol):
    """Knows a cheaper way back than through its state."""

    def undo(self) -> Callable[[], None]:
        """A function that puts back what it is now."""


class Scope(StrEnum):
    """Whose state it is."""

    RUN = "run"
    """The same on all ranks: saved once."""
    RANK = "rank"
    TENSORS = "tensors"
    """Tensors by name, the same on all ranks: saved once, in a file of their own."""


@dataclass(frozen=True, slots=True)
class Part:
    """A row of the table."""

    owner: Stateful
    scope: Scope
    is_undone: bool = False
    """Whether a rollout that is left by an error puts it back: its prompts are then due again."""
    is_optional: bool = False
    """Whether a checkpoint of a run without this part can be gone on from."""


class RunState:
    """The parts by name."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        self._undo: list[Callable[[], None]] = []

    def names(self, scope: Scope) -> list[str]:
        return [name for name, part in self._parts.items() if part.scope is scope]

    def state_dict(self, scope: Scope) -> dict[str, Any]:
        return {name: part.owner.state_dict() for name, part in self._parts.items() if part.scope is scope}

    def load_state_dict(self, scope: Scope, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave; `state` may hold more.

        Raises:
            KeyError: if a part that is not optional is missing.
        """
        for name, part in self._parts.items():
            if part.scope is scope and (name in state or not part.is_optional):
                part.owner.load_state_dict(state[name])

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """A block whose changes to these parts are taken back if an error ends it."""
        self._undo = [_undo_of(part.owner) for part in self._parts.values() if part.is_undone]
        try:
            yield
        except BaseException:
            self.undo()
            raise
        finally:
            self._undo = []

    def undo(self) -> None:
        """Take back what such a block has changed so far; nothing outside of one."""
        for undo in self._undo:
            undo()


def _undo_of(owner: Stateful) -> Callable[[], None]:
    return owner.undo() if isinstance(owner, Undoable) else partial(owner.load_state_dict, owner.state_dict())
