"""The engine drifts away from the trainer, before the canary stops the run."""

from grpo_stage.monitors.alarm import Alarm, History, Watch
from grpo_stage.monitors.statistics import current, last_step, level, level_at_start


class EngineDrift(Watch):
    """What the canary measures leaves what sound engines have, line after line.

    - Slopes: over `LINES` lines in a row `sampling/slope/start` or `previous` is outside of 0.5 to 1 by `MARGIN` and
      `ERRORS` of its standard errors. The run stops at 0.1 and about 5.3 errors.
    - Difference: the present level of `sampling/sampling_logp_difference/mean` is `FACTOR` times that at the start,
      and not since the entropy rose.
    """

    has_remedy = False

    LINES = 3
    MARGIN, ERRORS = 0.05, 3.5
    """Noise leaves this by 3.5 errors once in 4,000 lines, and three lines in a row far more seldom."""
    FACTOR = 10.0
    """Rounding grows with the logits: sound runs stayed within 1.5 times (docs/monitors.md)."""
    WINDOW = 10

    def judge(self, history: History) -> Alarm | None:
        for name, since in (("start", "the start"), ("previous", "the sync before")):
            slopes = current(history, f"sampling/slope/{name}", self.LINES)
            errors = current(history, f"sampling/slope_error/{name}", self.LINES)
            if len(slopes) < self.LINES or len(errors) < self.LINES:
                continue
            pairs = list(zip(slopes.values, errors.values, strict=True))
            if all(not self._is_sound(value, error) for value, error in pairs):
                value, error = pairs[-1]
                return self._alarm(
                    history,
                    onset=slopes.steps[0] - 1,
                    seen=(
                        f"Since {since} the engine has followed {value:.2f} +- {error:.2f} of what the policy moved; "
                        "1 is sound."
                    ),
                )
        name = "sampling/sampling_logp_difference/mean"
        difference, start = current(history, name, self.WINDOW), level_at_start(history, name)
        if start is None or len(difference) < self.WINDOW:
            return None
        now, entropy = level(difference.values), level_at_start(history, "entropy")
        present = history.series("entropy").last(5).values
        has_more_entropy = bool(entropy) and bool(present) and level(present) > 2 * (entropy or 0.0)
        if now < self.FACTOR * start or has_more_entropy:
            return None
        return self._alarm(
            history,
            onset=last_step(history.series(name).last(200), lambda value: value <= self.FACTOR / 2 * start),
            seen=(
                f"Engine and trainer differ by {now:.2g} nats a token in the log-probability of what was sampled; at "
                f"the start it was {start:.2g}."
            ),
        )

    def _is_sound(self, slope: float, error: float) -> bool:
        noise = self.MARGIN + self.ERRORS * error
        return 0.5 - noise <= slope <= 1 + noise

    def _alarm(self, history: History, onset: int, seen: str) -> Alarm:
        return Alarm(
            monitor="engine_drift",
            step=history.step,
            onset=onset,
            seen=seen,
            meaning=(
                "The completions begin to come from another policy than the one that is trained; the canary stops the "
                "run once it is certain."
            ),
            remedy=(
                "Resume from the last checkpoint with `rollout_backend: hf`. If the difference is gone, report the "
                "model and the vLLM version; a quantized engine may need `rollout_correction: token`."
            ),
            settings={},
        )
