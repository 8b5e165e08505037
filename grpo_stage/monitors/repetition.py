"""Completions that repeat themselves, and those that end in a loop."""

from collections.abc import Sequence
from functools import partial
from operator import ge

from grpo_stage.monitors.alarm import Alarm, History, Watch
from grpo_stage.monitors.monitor import Monitor, MonitorRequest
from grpo_stage.monitors.remedies import lower_rate, stronger_anchor
from grpo_stage.monitors.statistics import current, falls, last_step, level_at_start, share
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.types import FinishReason, ScoredGroup


REPEATED = "completions/repeated_frac"
LOOPED = "completions/looped_frac"
NGRAM = 12
"""Tokens. Long enough for scripts of several tokens a character (12 tokens are 4 to 12 Chinese characters), so that
common phrases are no repetition; a formula that is restated is one, and few."""
LOOP_TOKENS, LOOP_TIMES = 16, 4
"""A loop fills at least so many tokens at the end, and repeats at least so many times."""


def repeated_frac(token_ids: Sequence[int]) -> float | None:
    """The share of n-grams of tokens that occurred before; None for a completion too short to repeat one."""
    total = len(token_ids) - NGRAM + 1
    if total < NGRAM:
        return None
    return 1.0 - len({tuple(token_ids[i : i + NGRAM]) for i in range(total)}) / total


def ends_in_loop(token_ids: Sequence[int]) -> bool:
    """Whether the end repeats one sequence of tokens: a period p that fills max(`LOOP_TOKENS`, `LOOP_TIMES` p) tokens.

    Looks at the last `LOOP_TIMES` x 64 tokens: periods up to 64. Tokens, so that no script is treated otherwise.
    """
    for period in range(1, len(token_ids) // LOOP_TIMES + 1):
        if period > 64:
            return False
        count = max(LOOP_TOKENS, LOOP_TIMES * period)
        if count > len(token_ids):
            return False
        end = token_ids[-count:]
        if all(end[i] == end[i - period] for i in range(period, count)):
            return True
    return False


class Repetition(Monitor):
    """Measures the share of repeated n-grams, and of completions that were cut while they looped."""

    @classmethod
    def of(cls, request: MonitorRequest) -> "Repetition":
        return cls()

    def after_scoring(self, groups: Sequence[ScoredGroup], version: int, metrics: MetricTracker) -> None:
        for scored in groups:
            for completion in scored.group.completions:
                if (repeated := repeated_frac(completion.sampled_ids)) is not None:
                    metrics.add(REPEATED, repeated)
                is_cut = completion.finish_reason is FinishReason.LENGTH
                metrics.add(LOOPED, float(is_cut and ends_in_loop(completion.sampled_ids)))


class Repetitions(Watch):
    """Completions repeat themselves more than at the start, or loop until they are cut.

    An alarm is given where the present level of `looped_frac` is above `LOOPED_FRAC`, or that of `repeated_frac` above
    `REPEATED_FRAC`, and it is above that at the start by at least `RISE` (a base model that loops at first and learns
    to stop is left alone); and where `looped_frac` is above `MOSTLY` from the start and does not fall.
    """

    LOOPED_FRAC = 0.1
    """One in ten is no accident: none of 1,082 solutions and functions ends so (docs/monitors.md)."""
    REPEATED_FRAC = 0.3
    """Worked solutions and functions repeat 0.1 % of such n-grams, files of code 1.5 % and at most 15 %."""
    RISE = 0.1
    MOSTLY = 0.5
    WINDOW = 20

    def judge(self, history: History) -> Alarm | None:
        for name, bound, words in (
            (LOOPED, self.LOOPED_FRAC, "of the completions end in a loop and are cut at `max_new_tokens`"),
            (REPEATED, self.REPEATED_FRAC, f"of the sequences of {NGRAM} tokens in a completion occurred before"),
        ):
            series, start = current(history, name, self.WINDOW), level_at_start(history, name)
            if start is None or len(series) < 5:
                continue
            now = share(series.values)
            is_stuck = (
                name == LOOPED
                and now > self.MOSTLY
                and len(series) == self.WINDOW
                and not falls(history, name, self.WINDOW)
            )
            if not is_stuck and (now <= bound or now < start + self.RISE):
                continue
            return Alarm(
                monitor="repetition",
                step=history.step,
                onset=last_step(history.series(name).last(100), partial(ge, start + self.RISE / 2)),
                seen=f"{now:.0%} {words}; at the start it was {start:.0%}.",
                meaning=(
                    "The model repeats itself instead of going on. Such completions seldom earn anything, take the "
                    "longest to sample, and where a reward pays for length or for words it is a way to earn without "
                    "solving the task."
                ),
                remedy=(
                    "Go back to before the rise with a lower learning rate and a KL to the reference (`beta`). Add "
                    "`repetition` to `reward_funcs`, and look at what the repeating completions earn "
                    "(`log_completions`)."
                ),
                settings=lower_rate(self.settings) | stronger_anchor(self.settings),
            )
        return None
