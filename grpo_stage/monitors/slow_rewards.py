"""Reward functions that take most of a step."""

from statistics import median

from grpo_stage.monitors.alarm import Alarm, History, Watch
from grpo_stage.monitors.statistics import current, last_step


class SlowRewards(Watch):
    """Scoring takes more than `FRAC` of the step's time and more than `LEAST_S` seconds, in the median of `WINDOW`."""

    is_advice = True
    has_remedy = False

    WINDOW = 10
    FRAC = 0.5
    """The device waits for more than half of the time."""
    LEAST_S = 2.0
    """Below it the steps are so short that nothing is lost."""

    def judge(self, history: History) -> Alarm | None:
        seconds = current(history, "time/reward", self.WINDOW)
        steps = current(history, "step_time", self.WINDOW)
        if len(seconds) < self.WINDOW or len(steps) < self.WINDOW:
            return None
        scoring, whole = median(seconds.values), median(steps.values)
        if scoring < self.LEAST_S or scoring < self.FRAC * whole:
            return None
        return Alarm(
            monitor="slow_rewards",
            step=history.step,
            onset=last_step(history.series("time/reward").last(200), lambda value: value < scoring / 2),
            seen=f"Scoring takes {scoring:.1f} of the {whole:.1f} seconds of a step.",
            meaning="Nothing is wrong with what is learned, but the device waits for the reward functions.",
            remedy=(
                "Find the slow function by leaving out one at a time in `grpo-stage try-rewards`. Score a whole batch "
                "at once, cache what repeats, bound what may run long (`timeout` in `reward_kwargs`), or serve a "
                "reward model on another device (`reward_model_type: api`)."
            ),
            settings={},
        )
