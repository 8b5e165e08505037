"""A curriculum by level: which prompts of the epoch come next depends on how well the policy does.

An epoch still has every prompt once. The level only decides their order: those of the present level come first, then
those of the nearest one.
"""

import logging
from collections import deque
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from grpo_stage.records.metrics import MetricTracker
from grpo_stage.rollout.epochs import PromptStream
from grpo_stage.rollout.filling import gather_in_deal_order
from grpo_stage.types import Prompt, ScoredGroup


LEVEL = "reasoning_gym_level"
"""The column of a generated row's level, from 0."""
SCORE = "reasoning_gym"
"""The reward function that decides, in [0, 1]."""
WINDOW = 32
"""Prompts of the present level whose mean reward decides. They are counted anew after a change."""
logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are


def levels_of(prompts: Sequence[Prompt]) -> list[int]:
    return [prompt.columns[LEVEL] for prompt in prompts]


class Curriculum:
    """Moves the stream's level. All ranks have the same state, and call it together.

    Args:
        stream: has the levels of the prompts.
        threshold: the mean reward at which the next level begins; below half of it the one before comes back.
        function: the position of `SCORE` among the reward functions.
    """

    def __init__(self, stream: PromptStream, threshold: float, function: int) -> None:
        self._stream = stream
        self._threshold = threshold
        self._function = function
        self._scores: deque[float] = deque(maxlen=WINDOW)

    def heed(self, share: Sequence[ScoredGroup], tracker: MetricTracker) -> None:
        """Take note of this rank's share of a rollout."""
        level = self._stream.level
        tracker.add("curriculum/level", level)
        means = [self._mean(each) if each.group.prompt.columns[LEVEL] == level else None for each in share]
        self._scores.extend(mean for mean in gather_in_deal_order(means) if mean is not None)
        if len(self._scores) < WINDOW:
            return
        mean = fmean(self._scores)
        change = int(mean >= self._threshold) - int(mean < self._threshold / 2)
        if 0 <= level + change <= self._stream.top_level and change != 0:
            logger.info(
                f"Curriculum: {mean:.2f} on {WINDOW} prompts of level {level}; level {level + change} is next."
            )
            self._stream.go_to(level + change)
            self._scores.clear()

    def state_dict(self) -> list[float]:
        return list(self._scores)

    def load_state_dict(self, state: Any) -> None:
        self._scores = deque(state, maxlen=WINDOW)

    def _mean(self, group: ScoredGroup) -> float | None:
        scores = [own for row in group.rewards if (own := row[self._function]) is not None]
        return fmean(scores) if scores else None
