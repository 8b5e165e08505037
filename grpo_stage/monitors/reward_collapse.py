"""What the policy earned is gone."""

import math
from collections.abc import Sequence
from statistics import median

from grpo_stage.monitors.alarm import Alarm, History, Watch
from grpo_stage.monitors.remedies import lower_rate, stronger_anchor
from grpo_stage.monitors.statistics import current, last_step, noise, since_harder


class RewardCollapse(Watch):
    """The reward has fallen to the floor, and stays there.

    Above the lowest line of the last `SEEN`, the median of the last `WINDOW` lines has `LEFT` of the best median of
    earlier ones at most, and no line of them has more than `LEFT_OF_LINE` of it. The best was at least twice the
    present level, and the fall is `ERRORS` standard errors of such medians (from successive differences). Only lines
    are compared since the prompts became harder, if there is a curriculum.
    """

    WINDOW = 10
    SEEN = 200
    LEFT, LEFT_OF_LINE = 0.1, 0.25
    """Harder prompts lower a reward; ten lines in a row near the floor are more than that."""
    ERRORS = 4.0
    """The best of many windows is above the usual level by chance, most in small batches."""

    def judge(self, history: History) -> Alarm | None:
        rewards = since_harder(history, current(history, "reward", self.SEEN))
        values = list(rewards.values)
        if len(values) < 2 * self.WINDOW:
            return None
        before, last = values[: -self.WINDOW], values[-self.WINDOW :]
        floor, now, best = min(values), median(last), self._best(before)
        height = best - floor
        if now - floor > self.LEFT * height or max(last) - floor > self.LEFT_OF_LINE * height:
            return None
        fall = best - now
        if fall <= 0 or fall < abs(best) / 2 or fall < self.ERRORS * noise(before) * math.sqrt(2 / self.WINDOW):
            return None
        return Alarm(
            monitor="reward_collapse",
            step=history.step,
            onset=last_step(rewards, lambda value: value - floor >= height / 2),
            seen=f"`reward` has been at {now:.3g} for {self.WINDOW} lines; before it was at {best:.3g}.",
            meaning=(
                "What the policy could do it no longer does. Most often an update was too large, and nothing that it "
                "samples now shows it the way back. (If the prompts have become much harder here, it is they.)"
            ),
            remedy=(
                "Go back to before the fall with a lower learning rate and a higher `beta`. With `num_iterations` or "
                "`steps_per_generation` above 1, lower them as well."
            ),
            settings=lower_rate(self.settings) | stronger_anchor(self.settings),
        )

    def _best(self, values: Sequence[float]) -> float:
        windows = range(len(values) - self.WINDOW + 1)
        return max(median(values[start : start + self.WINDOW]) for start in windows)
