"""What a device holds in the phases of a step, by part."""

from collections.abc import Mapping
from dataclasses import dataclass


GIB = float(2**30)


@dataclass(frozen=True, slots=True)
class Phase:
    """What is in memory at the worst moment of one phase."""

    name: str
    parts: Mapping[str, float]
    """Bytes by part; parts of nothing are left out."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Budget:
    """One way to train, on one device."""

    name: str
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        """The phase that decides: phases follow one another, so the device holds the largest and not their sum."""
        return max(self.phases, key=lambda phase: phase.total)


def phase(name: str, parts: Mapping[str, float]) -> Phase:
    """A phase, parts of nothing left out."""
    return Phase(name, {key: float(value) for key, value in parts.items() if value})
