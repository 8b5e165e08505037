"""What a run is made of beside its weights: one table, from which saving, restoring and undoing follow."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class Stateful(Protocol):
    """Has a state that is ready for JSON, exact, and shares nothing with it that changes."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> None: ...


class Scope(StrEnum):
    """Whose state it is."""

    RUN = "run"
    """The same on all ranks: kept once."""
    RANK = "rank"
    TENSORS = "tensors"
    """Tensors by name, the same on all ranks: kept once, in a file of the part's own."""


@dataclass(frozen=True, slots=True)
class Part:
    """A row of the table."""

    owner: Stateful
    scope: Scope
    is_undone: bool = False
    """Whether a rollout that is left by an error puts it back: its prompts are then due again."""


class RunState:
    """The parts by name. A part that a checkpoint holds nothing of is left as it is."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        self._begun: dict[str, Any] | None = None

    def names(self, scope: Scope) -> list[str]:
        return [name for name, part in self._parts.items() if part.scope is scope]

    def state_dict(self, scope: Scope) -> dict[str, Any]:
        return {name: part.owner.state_dict() for name, part in self._parts.items() if part.scope is scope}

    def load_state_dict(self, scope: Scope, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave; `state` may hold more."""
        for name, part in self._parts.items():
            if part.scope is scope and state.get(name) is not None:
                part.owner.load_state_dict(state[name])

    @contextmanager
    def undone_unless_finished(self) -> Iterator[None]:
        """A block that is left by an error was never begun."""
        self._begun = {name: part.owner.state_dict() for name, part in self._parts.items() if part.is_undone}
        try:
            yield
        except BaseException:
            self.undo()
            raise
        finally:
            self._begun = None

    def undo(self) -> None:
        """What such a block has changed so far; nothing outside of one."""
        for name, state in (self._begun or {}).items():
            self._parts[name].owner.load_state_dict(state)
