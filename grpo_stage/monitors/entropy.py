"""The entropy of the policy: a collapse ends exploration, an explosion means that the policy forgets how to write."""

import math

from grpo_stage.monitors.alarm import Alarm, History, Watch
from grpo_stage.monitors.dead_groups import is_solved
from grpo_stage.monitors.remedies import kept_entropy, legal, lower_rate, stronger_anchor
from grpo_stage.monitors.statistics import (
    current,
    last_step,
    level,
    level_at_start,
    level_since_harder,
    mann_kendall,
    may_rise_lately,
    slope,
)


WINDOW = 20
"""Lines over which a trend is judged."""
LEAST_LINES = 10


class EntropyCollapse(Watch):
    """Entropy is at, or will soon be at, a tenth of what it was, and the reward does not rise although the task is not
    solved.

    A policy that learns loses entropy, and one that knows the answers has little: neither is a fault. So nothing is
    said while the reward rises, or where half of the groups are all right. Otherwise there is an alarm

    - where the present level is at the floor, `FLOOR_FRAC` of the level at the start;
    - where it is below `NEAR_FRAC` of that, falls (Mann-Kendall, 1 %), and a straight line through its logarithm
      (Theil-Sen) reaches the floor within as many steps as the window has. The logarithm, since entropy decays
      by a share a step: a straight line through the entropy itself would forecast a collapse of each decay that
      levels off.
    """

    FLOOR_FRAC = 0.1
    """Reward is about b - a e^H (arXiv:2505.22617): with a tenth left, what exploration can still bring is spent."""
    NEAR_FRAC = 0.3
    """Fast healthy learning passes a half of the start in its first steps."""
    LEAST_START = 0.05
    """Nats. A policy that starts lower has nothing to collapse from."""
    KEPT_FRAC = 0.3
    """Of the entropy at the start, as the target that the remedy sets."""
    SEARCHED = 200
    """Lines in which the onset is looked for."""

    def judge(self, history: History) -> Alarm | None:
        entropy, start = current(history, "entropy", WINDOW), level_at_start(history, "entropy")
        if len(entropy) < LEAST_LINES or start is None or start < self.LEAST_START:
            return None
        now, floor = level(entropy.values), self.FLOOR_FRAC * start
        if now > self.NEAR_FRAC * start or may_rise_lately(history, "reward") or is_solved(history):
            return None
        seen = f"Entropy fell from {start:.3g} to {now:.3g} nats a token"
        if now <= floor:
            seen += f", below a tenth of what it was ({floor:.2g})"
        else:
            if not -0.01 < mann_kendall(entropy.values) < 0:
                return None
            logs = type(entropy)(entropy.steps, [math.log(max(value, 1e-6)) for value in entropy.values])
            decay = -slope(logs)
            num_steps = math.log(now / floor) / decay if decay > 0 else math.inf
            if num_steps > entropy.steps[-1] - entropy.steps[0]:
                return None
            reached = history.step + math.ceil(num_steps)
            seen += f", and at this pace it is at a tenth of that ({floor:.2g}) at step {reached}"
        searched = history.series("entropy").last(self.SEARCHED)
        return Alarm(
            monitor="entropy_collapse",
            step=history.step,
            onset=last_step(searched, lambda value: value >= 0.5 * start),
            seen=f"{seen}, while the reward does not rise.",
            meaning=(
                "The model gives nearly the same completion each time. GRPO learns from differences between the "
                "completions of a prompt, so it has little left to learn from: what it has not found by now, it will "
                "not find."
            ),
            remedy=(
                "Go back to before the fall, with a lower learning rate and a means that keeps the entropy up "
                "(`entropy_target`, or `covariance_control: clip_cov`). Look at the reward as well: a collapse often "
                "begins where one answer pays for every prompt."
            ),
            settings=lower_rate(self.settings) | kept_entropy(self.settings, self.KEPT_FRAC * start),
        )


class EntropyExplosion(Watch):
    """Entropy is far above what it was, and the reward does not rise.

    The present level is above `FACTOR` times that at the start (of a curriculum: when the prompts became harder),
    `LEAST` nats more than it, and above `FACTOR` times an `entropy_target`.
    """

    FACTOR = 2.5
    """A policy that explores more may double it; one that falls apart multiplies it."""
    LEAST = 0.7
    """Nats: twice as many continuations a token. So a low entropy may multiply."""

    def judge(self, history: History) -> Alarm | None:
        entropy, start = current(history, "entropy", WINDOW), level_since_harder(history, "entropy")
        if len(entropy) < LEAST_LINES or start is None:
            return None
        target = self.settings.get("entropy_target") or 0.0
        bound = max(self.FACTOR * start, start + self.LEAST, self.FACTOR * target)
        now = level(entropy.values)
        if now <= bound or may_rise_lately(history, "reward"):
            return None
        bonus = self.settings.get("entropy_coef") or 0.0
        return Alarm(
            monitor="entropy_explosion",
            step=history.step,
            onset=last_step(history.series("entropy").last(200), lambda value: value <= (start + bound) / 2),
            seen=f"Entropy rose from {start:.3g} to {now:.3g} nats a token, while the reward does not rise.",
            meaning=(
                "The model's next words become arbitrary: it forgets how to write, usually since updates are too "
                "large or an entropy bonus outweighs the reward. Such a run does not come back by itself."
            ),
            remedy=(
                "Go back to before the rise, with a lower learning rate"
                + (", a smaller entropy bonus" if bonus else "")
                + " and a KL to the reference (`beta`)."
            ),
            settings=lower_rate(self.settings)
            | stronger_anchor(self.settings)
            | (legal(self.settings, {"entropy_coef": float(f"{bonus / 3:.2g}")}) if bonus else {}),
        )
