"""`rollout_ahead`: the rollout of the next step is sampled while the update of this one runs.

step k      collect k | sync weights k | submit k + 1 | rewards, log-probabilities and update of k -> weights k + 1
engine                                 [ samples k + 1 from weights k ........................... ]
step k + 1  collect k + 1 | sync weights k + 1 | submit k + 2 | ...

So each step but the first trains on completions of the policy one update before. A rollout that is under way when a
checkpoint is saved, or the policy is evaluated, is waited for: its weights exist nowhere any more.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_stage.rollout.sampler import Sampler
from grpo_stage.rollout.serialization import group_state, load_group
from grpo_stage.survival.watchdog import HangError
from grpo_stage.types import Prompt, RolloutGroup, SamplingSettings


logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are


@dataclass(slots=True)
class DueRollout:
    """The rollout of the next step: on this rank, of these prompts."""

    indices: list[int]
    groups: list[RolloutGroup] | None = None
    """None while the engine samples them; and where it failed to, so that they are to be sampled anew."""
    seconds: float = 0.0
    """What the engine took."""


class RolloutAhead:
    """What was begun for the next step. At most one rollout is under way.

    Args:
        sampler: its engine can sample ahead. What an earlier trainer has left under way there is given up.
        sampling: how completions are drawn.
        prompts: the dataset.
    """

    def __init__(self, sampler: Sampler, sampling: SamplingSettings, prompts: Sequence[Prompt]) -> None:
        self._sampler = sampler
        self._sampling = sampling
        self._prompts = prompts
        self._due: DueRollout | None = None
        self._under_way: DueRollout | None = None
        sampler.discard()

    @property
    def is_under_way(self) -> bool:
        """Whether the engine is busy with it."""
        return self._under_way is not None

    def submit(self, indices: list[int], step: int) -> None:
        """Begin with the rollout of `step`, from the weights that the engine has."""
        self._due = self._under_way = DueRollout(indices)
        self._sampler.submit([self._prompts[i] for i in indices], self._sampling, step)

    def settle(self) -> None:
        """Wait for the rollout that is under way, if there is one."""
        if self._under_way is None:
            return
        rollout, self._under_way = self._under_way, None  # where this fails its groups stay None
        groups, rollout.seconds = self._sampler.collect()
        rollout.groups = groups

    def take(self) -> DueRollout | None:
        """The rollout that is due, settled; None if none was begun."""
        assert self._under_way is None, "it is not settled"
        rollout, self._due = self._due, None
        return rollout

    def state_dict(self) -> dict[str, Any] | None:
        """The rollout that is due, with its completions, ready for JSON. Waits for them.

        If the engine fails to sample them, the run that goes on from this state samples the prompts anew.
        """
        try:
            self.settle()
        except (RuntimeError, HangError) as error:
            logger.warning(
                f"The rollout of the next step is lost: {error}\n"
                "A run that goes on from here samples its prompts anew."
            )
        if self._due is None:
            return None
        groups = self._due.groups
        return {
            "indices": self._due.indices,
            "groups": None if groups is None else [group_state(group) for group in groups],
            "seconds": self._due.seconds,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._due = None
        if state is not None:
            groups = state["groups"]
            self._due = DueRollout(
                state["indices"],
                None if groups is None else [load_group(group, self._prompts) for group in groups],
                state["seconds"],
            )

    def undo(self) -> Callable[[], None]:
        """A function that makes the rollout that is due now the due one again, settled or not.

        One that was begun since is given up with the engine: its prompts are sampled anew, from the same weights.
        """
        due = self._due

        def put_back() -> None:
            self._due = due
            if self._under_way is not due:
                self._under_way = None

        return put_back
