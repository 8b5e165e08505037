"""The length of completions, and how many are cut at `max_new_tokens`."""

from statistics import fmean

from grpo_stage.monitors.alarm import Alarm, History, Watch
from grpo_stage.monitors.remedies import legal, lower_rate
from grpo_stage.monitors.statistics import (
    MOVES,
    current,
    falls,
    last_step,
    level,
    level_at_start,
    level_since_harder,
    may_rise,
    movement,
    share,
    since_harder,
)


class LengthExplosion(Watch):
    """Completions become much longer, and what they earn does not.

    The mean length is `FACTOR` times that at the start (of a curriculum: when the prompts became harder), and since it
    was the present one divided by `FACTOR` `reward` has not risen, or `reward` has and held-out `eval_reward` (at
    least `EVALUATIONS` values) has not. Longer completions that earn more are what training to reason looks like.
    """

    FACTOR = 2.0
    """Below it the length of short answers varies by itself."""
    EVALUATIONS = 6
    """Over which `eval_reward` gains less than `GAIN` of its level."""
    GAIN = 0.1
    SEARCHED = 300
    """Lines in which growth is looked for: lengths of reasoning grow over hundreds of steps."""
    LEAST_TOKENS = 32
    """Growth below it costs nothing and means nothing."""

    def judge(self, history: History) -> Alarm | None:
        lengths = since_harder(history, current(history, "completions/mean_length", self.SEARCHED))
        start = level_since_harder(history, "completions/mean_length")
        if start is None or len(lengths) < 20:
            return None
        now = level(lengths.values)
        if now < max(self.FACTOR * start, self.LEAST_TOKENS):
            return None
        since = last_step(lengths, lambda value: value <= now / self.FACTOR)
        num_lines = max(20, sum(step > since for step in lengths.steps))
        if movement(lengths.values[-num_lines:]) < MOVES:
            return None
        if may_rise(history, "reward", num_lines):
            evaluations = history.series("eval_reward").last(self.EVALUATIONS).values
            if len(evaluations) < self.EVALUATIONS:
                return None
            half = self.EVALUATIONS // 2
            before, after = fmean(evaluations[:half]), fmean(evaluations[half:])
            if after - before > self.GAIN * abs(before) or movement(evaluations) > 1:
                return None
            cause = f"held-out `eval_reward` went from {before:.3g} to {after:.3g}"
        else:
            cause = "the reward does not rise"
        return Alarm(
            monitor="length_explosion",
            step=history.step,
            onset=last_step(lengths, lambda value: value < (1 + self.FACTOR) / 2 * start),
            seen=f"Completions grew from {start:.0f} to {now:.0f} tokens on average, while {cause}.",
            meaning=(
                "The model writes more without solving more. Steps take longer and completions will be cut. Usual "
                "causes are a reward that pays for length, or a loss that weighs long wrong completions less."
            ),
            remedy=(
                "Go back to before it with a lower learning rate; add `overlong` to `reward_funcs`, or `length` "
                "in the place of `accuracy`, which pays correct answers more the shorter they are."
            ),
            settings=lower_rate(self.settings),
        )


class Truncation(Watch):
    """Many completions are cut, more than at the start; or nearly all of them are, and it does not get better.

    The present level of `clipped_ratio` is above `CUT_FRAC` and by at least `RISE` above that at the start; or above
    `NEARLY_ALL` over `LINES` lines without falling, while `DEAD_FRAC` of the groups earn the same and the reward does
    not rise.
    """

    CUT_FRAC = 0.25
    """A cut completion usually has no answer: a quarter of the samples then teach about length alone."""
    RISE = 0.15
    NEARLY_ALL = 0.9
    """A limit of 256 tokens for reasoning cuts 97-99 %: hours without a reward, seen again and again."""
    DEAD_FRAC = 0.9
    """Of the groups: a reward that tells cut completions apart teaches in spite of it."""
    LINES = 20

    def judge(self, history: History) -> Alarm | None:
        name = "completions/clipped_ratio"
        cut, start = current(history, name, self.LINES), level_at_start(history, name)
        if start is None or len(cut) < 10:
            return None
        now = share(cut.values)
        has_risen = now > self.CUT_FRAC and now > start + self.RISE
        is_stuck = (
            len(cut) == self.LINES
            and min(cut.values) > self.NEARLY_ALL
            and fmean(history.series("frac_reward_zero_std").last(self.LINES).values or [0.0]) > self.DEAD_FRAC
            and not falls(history, name, self.LINES)
            and not may_rise(history, "reward", self.LINES)
        )
        if not has_risen and not is_stuck:
            return None
        limit = self.settings.get("max_new_tokens")
        return Alarm(
            monitor="truncation",
            step=history.step,
            onset=max(0, cut.steps[0] - 1)
            if is_stuck
            else last_step(history.series(name).last(200), lambda value: value <= start + self.RISE / 2),
            seen=(
                f"{now:.0%} of the completions are cut at `max_new_tokens`{f' ({limit})' if limit else ''}; at the "
                f"start it was {start:.0%}."
            ),
            meaning=(
                "A completion that is cut usually has no answer and earns nothing, so the model learns to be short "
                "rather than to be right; with all of them cut it learns nothing."
            ),
            remedy=(
                "Raise `max_new_tokens` (`grpo-stage probe` says what would end 95 %), or leave cut completions out "
                "of the loss (`mask_truncated_completions: true`), unless the completions loop or ramble: then the "
                "length is the fault, not the limit."
            ),
            settings={}
            if is_stuck or self.settings.get("mask_truncated_completions")
            else legal(self.settings, {"mask_truncated_completions": True}),
        )
