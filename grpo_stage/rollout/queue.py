"""Rollouts waiting for their uses.

A rollout serves `steps_per_generation` optimizer steps, `num_iterations` times over. A checkpoint holds the steps that
are left: sampling them again would give other completions.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

from grpo_stage.rollout.serialization import load_step, step_state
from grpo_stage.types import Prompt, Step


class RolloutQueue:
    """Steps in the order of use. `prompts` is the dataset that they come from."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts
        self._steps: deque[Step] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    def append(self, step: Step) -> None:
        self._steps.append(step)

    def first(self) -> Step:
        return self._steps[0]

    def drop_first(self) -> None:
        self._steps.popleft()

    def state_dict(self) -> list[dict[str, Any]]:
        return [step_state(step) for step in self._steps]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        self._steps = deque(load_step(step, self._prompts) for step in state)
