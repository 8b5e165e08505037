"""The policy's distance from the reference (KL), and from the policy that sampled (clipped ratios)."""

from statistics import median

from grpo_stage.monitors.alarm import Alarm, History, Watch
from grpo_stage.monitors.remedies import legal, lower_rate, stronger_anchor
from grpo_stage.monitors.statistics import current, last_step, level, level_at_start, may_rise_lately


class KLExplosion(Watch):
    """The policy is far from the reference, and the reward does not rise.

    The present level of `kl` is above `LEAST` nats a token and `FACTOR` times that at the start, and `reward` does not
    rise.
    """

    WINDOW = 20
    LEAST = 1.0
    """The reference finds a token e times less probable than the policy does."""
    FACTOR = 5.0

    def judge(self, history: History) -> Alarm | None:
        kl, start = current(history, "kl", self.WINDOW), level_at_start(history, "kl")
        if start is None or len(kl) < 10:
            return None
        now = level(kl.values)
        if now < max(self.LEAST, self.FACTOR * start) or may_rise_lately(history, "reward"):
            return None
        return Alarm(
            monitor="kl_explosion",
            step=history.step,
            onset=last_step(
                history.series("kl").last(200), lambda value: value <= max(self.LEAST, self.FACTOR * start) / 2
            ),
            seen=f"`kl` rose from {start:.3g} to {now:.3g} nats a token, while the reward does not rise.",
            meaning=(
                "The model has moved far from the one that it started from without gaining by it: it forgets what it "
                "could, and is usually about to fall apart."
            ),
            remedy="Go back to before the rise with a lower learning rate and a higher `beta`.",
            settings=lower_rate(self.settings) | stronger_anchor(self.settings),
        )


class RatioExplosion(Watch):
    """Most of the update is clipped: the policy moves further in the uses of a rollout than the clip allows.

    The median of `clip_ratio/region_mean` over `WINDOW` lines is above `CLIPPED`.
    """

    WINDOW = 10
    CLIPPED = 0.4
    """GSPO, whose bounds are narrow by design, clips 15 % (arXiv:2507.18071)."""

    def judge(self, history: History) -> Alarm | None:
        clipped = current(history, "clip_ratio/region_mean", self.WINDOW)
        if len(clipped) < self.WINDOW or (now := median(clipped.values)) < self.CLIPPED:
            return None
        uses = {
            key: max(1, value // 2)
            for key in ("num_iterations", "steps_per_generation")
            if (value := self.settings.get(key) or 1) > 1
        }
        return Alarm(
            monitor="ratio_explosion",
            step=history.step,
            onset=last_step(history.series("clip_ratio/region_mean").last(200), lambda v: v <= self.CLIPPED / 2),
            seen=f"{now:.0%} of the tokens have their gradient cut by the clip.",
            meaning=(
                "The policy that learns has left the one that sampled: most of what was sampled no longer teaches, "
                "and the rest pushes to one side."
            ),
            remedy=(
                "Use each rollout for fewer updates (`num_iterations`, `steps_per_generation`), or lower the learning "
                "rate."
            ),
            settings=lower_rate(self.settings) | legal(self.settings, uses),
        )
