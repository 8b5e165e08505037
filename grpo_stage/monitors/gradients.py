"""Spikes of the gradient."""

from collections.abc import Sequence
from statistics import quantiles

from grpo_stage.monitors.alarm import Alarm, History, Watch
from grpo_stage.monitors.statistics import current


class GradientSpikes(Watch):
    """The gradient's norm is many times what it was: once by `HUGE`, or by `LARGE` twice within `WINDOW` lines.

    It is compared with the 90th percentile of the `WINDOW` lines before, those without a gradient left out. A median
    would not do: where most groups are all right, most gradients are tiny, and one ordinary group is a hundred times
    that.
    """

    WINDOW = 50
    LEAST_LINES = 20
    """With a gradient: a percentile of fewer is no measure."""
    LARGE, HUGE = 10.0, 30.0
    """In 1,341 steps of real runs the largest was 1.5 (docs/monitors.md)."""

    def judge(self, history: History) -> Alarm | None:
        norms = current(history, "grad_norm", 2 * self.WINDOW + 1)
        if len(norms) == 0 or (now := self._excess(norms.values)) < self.LARGE:
            return None
        earlier = [
            step
            for i, step in enumerate(norms.steps[-self.WINDOW - 1 : -1], start=max(0, len(norms) - self.WINDOW - 1))
            if self._excess(norms.values[: i + 1]) >= self.LARGE
        ]
        if now < self.HUGE and not earlier:
            return None
        clip = self.settings.get("max_grad_norm")
        return Alarm(
            monitor="gradient_spikes",
            step=history.step,
            onset=(earlier or [history.step])[0] - 1,
            seen=(
                f"The gradient's norm is {norms.values[-1]:.3g}, {now:.0f} times what nine in ten steps before had"
                + (f"; the last spike was at step {earlier[-1]}." if earlier else ".")
            ),
            meaning=(
                "A single update can undo what many have learned. Usual causes are one completion of an extreme "
                "reward or ratio, data of another kind, or half precision."
            ),
            remedy=(
                "Lower `max_grad_norm`, so that a spike is cut to an ordinary gradient, and look at the step's "
                "completions (`log_completions`): bound rewards that have no bounds. `on_alarm: recover` also leaves "
                "out the prompts since the last sound checkpoint."
            ),
            skips_prompts=True,
            settings={"max_grad_norm": float(f"{self._usual(norms.values):.2g}")} if clip is not None else {},
        )

    def _usual(self, values: Sequence[float]) -> float:
        before = [value for value in values[-self.WINDOW - 1 : -1] if value > 0]
        return quantiles(before, n=10)[-1] if len(before) >= self.LEAST_LINES else float("inf")

    def _excess(self, values: Sequence[float]) -> float:
        return values[-1] / self._usual(values)
