"""The state of a run beside its weights, as one table: saving, restoring and undoing follow from it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class Stateful(Protocol):
    """An object whose state can be taken and restored. The state is exact, ready for JSON, and a copy."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> None: ...


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
    """Whether an error in a rollout restores the part, so that the rollout can be repeated."""


class RunState:
    """The parts by name. A part that is missing in a checkpoint keeps its state."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        self._begun: dict[str, Any] | None = None

    def names(self, scope: Scope) -> list[str]:
        return [name for name, part in self._parts.items() if part.scope is scope]

    def state_dict(self, scope: Scope) -> dict[str, Any]:
        return {name: part.owner.state_dict() for name, part in self._parts.items() if part.scope is scope}

    def load_state_dict(self, scope: Scope, state: Mapping[str, Any]) -> None:
        """Restore the parts of `scope` from `state`, which may hold others as well."""
        for name, part in self._parts.items():
            if part.scope is scope and state.get(name) is not None:
                part.owner.load_state_dict(state[name])

    @contextmanager
    def undone_unless_finished(self) -> Iterator[None]:
        """If an error leaves the block, restore the state from before it."""
        self._begun = {name: part.owner.state_dict() for name, part in self._parts.items() if part.is_undone}
        try:
            yield
        except BaseException:
            self.undo()
            raise
        finally:
            self._begun = None

    def undo(self) -> None:
        """Restore the state from before the present `undone_unless_finished` block; outside of one, do nothing."""
        for name, state in (self._begun or {}).items():
            self._parts[name].owner.load_state_dict(state)
