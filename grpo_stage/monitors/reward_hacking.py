"""Reward hacking: what is paid rises, and what is wanted does not."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import correlation, fmean, median

from grpo_stage.distributed import all_gather
from grpo_stage.monitors.alarm import Alarm, History, Watch
from grpo_stage.monitors.monitor import Monitor, MonitorRequest
from grpo_stage.monitors.remedies import lower_rate, stronger_anchor
from grpo_stage.monitors.statistics import MOVES, current, last_step, level, level_at_start, mann_kendall, movement
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.types import ScoredGroup


SHARED_REWARD = "completions/shared_text_reward_frac"
SHARED_REFERENCE = "completions/shared_reference_frac"
LENGTH_CORRELATION = "completions/length_reward_correlation"
LEAST_PROMPTS = 4
"""Of a rollout: among fewer, nothing is shared by many."""
SHARED_BY = 0.25
"""Share of a rollout's prompts (at least two) that a shared text was given to."""


class PaidCompletions(Monitor):
    """Measures how much of the reward goes to texts that many prompts share, and whether length is paid.

    - `shared_text_reward_frac`: of all that the completions of a rollout earned (above the lowest total in it), the
      share of completions whose text was given to at least a quarter of the prompts. `shared_reference_frac` is the
      share of prompts whose reference is that of at least a quarter of them.
    - `length_reward_correlation`: Pearson's, of total reward and tokens within a group; mean over the groups in which
      both differ.
    """

    @classmethod
    def of(cls, request: MonitorRequest) -> "PaidCompletions":
        return cls()

    def after_scoring(self, groups: Sequence[ScoredGroup], version: int, metrics: MetricTracker) -> None:
        own = []
        for scored in groups:
            pairs = [
                (completion, total)
                for completion, total in zip(scored.group.completions, scored.total_rewards, strict=True)
                if total is not None
            ]
            lengths, totals_of_group = [completion.num_sampled for completion, _ in pairs], [t for _, t in pairs]
            if len(set(lengths)) > 1 and len(set(totals_of_group)) > 1:
                metrics.add(LENGTH_CORRELATION, correlation(lengths, totals_of_group))
            reference = scored.group.prompt.reference
            own.append(
                (
                    [(_hash(completion.text), total) for completion, total in pairs],
                    _hash(reference) if reference else None,
                )
            )
        rows = [row for rank in all_gather(own) for row in rank]  # every rank adds the same once
        if len(rows) < LEAST_PROMPTS:
            return
        least = max(2, SHARED_BY * len(rows))
        given_to: defaultdict[str, set[int]] = defaultdict(set)
        for prompt, (completions, _) in enumerate(rows):
            for text, _ in completions:
                given_to[text].add(prompt)
        totals = [total for completions, _ in rows for _, total in completions]
        lowest = min(totals, default=0.0)
        earned = sum(total - lowest for total in totals)
        if earned > 0:
            by_shared = sum(
                total - lowest
                for completions, _ in rows
                for text, total in completions
                if len(given_to[text]) >= least
            )
            metrics.add(SHARED_REWARD, by_shared, earned)
        references = Counter(reference for _, reference in rows if reference)
        if references:
            shared = sum(count for count in references.values() if count >= least)
            metrics.add(SHARED_REFERENCE, shared, references.total())


def _hash(text: str) -> str:
    return hashlib.sha256(text.strip().encode("utf-8", "replace")).hexdigest()[:16]


class RewardHacking(Watch):
    """The training reward rises while a held-out evaluation, or one of the rewards that it is made of, falls.

    - Evaluation: `eval_reward` falls over the last 6, 8 or 10 evaluations (Mann-Kendall at 1 %) by more than `LOSS` of
      what it was, while `reward` rises over the same steps.
    - Another reward: `rewards/{function}/mean` loses more than `PART_LOSS` of what it was over the last `WINDOW`
      lines, by more than `PART_ERRORS` standard errors, while `reward` rises over them.
    """

    EVALUATIONS = (6, 8, 10)
    LOSS = 0.1
    """An evaluation of 100 prompts varies by about 5 points by itself."""
    WINDOW = 60
    PART_LOSS = 0.3
    """A part that is traded for another loses some; one that is given up loses most."""
    PART_ERRORS = 5.0
    LEAST_PART = 0.1
    """A part that was lower in magnitude at the start had nothing to lose."""

    def judge(self, history: History) -> Alarm | None:
        return self._against_evaluation(history) or self._against_part(history)

    def _against_evaluation(self, history: History) -> Alarm | None:
        evaluations = current(history, "eval_reward", max(self.EVALUATIONS))
        for count in self.EVALUATIONS:
            some = evaluations.last(count)
            if len(some) < count:
                return None
            before, now = fmean(some.values[:2]), fmean(some.values[-2:])
            if before - now <= self.LOSS * abs(before) or not -0.01 < mann_kendall(some.values) < 0:
                continue
            reward = history.series("reward").last(1000)
            during = [v for step, v in zip(reward.steps, reward.values, strict=True) if step >= some.steps[0]]
            if movement(during) < MOVES:
                continue
            first, last = fmean(during[: len(during) // 3]), fmean(during[-(len(during) // 3) :])
            return self._alarm(
                history,
                onset=some.steps[some.values.index(max(some.values))],
                seen=(
                    f"The held-out `eval_reward` fell from {before:.3g} to {now:.3g} since step {some.steps[0]}, "
                    f"while the training reward rose from {first:.3g} to {last:.3g}."
                ),
            )
        return None

    def _against_part(self, history: History) -> Alarm | None:
        reward = current(history, "reward", self.WINDOW)
        if len(reward) < self.WINDOW // 2 or movement(reward.values) < MOVES:
            return None
        for name in history.names():
            if not (name.startswith("rewards/") and name.endswith("/mean")):
                continue
            part = current(history, name, self.WINDOW)
            if len(part) < len(reward):
                continue
            third = len(part) // 3
            before, now = fmean(part.values[:third]), fmean(part.values[-third:])
            is_lost = before - now > self.PART_LOSS * abs(before) and abs(before) > self.LEAST_PART
            if not is_lost or movement(part.values) > -self.PART_ERRORS:
                continue
            function = name.removeprefix("rewards/").removesuffix("/mean")
            return self._alarm(
                history,
                onset=part.steps[third - 1],
                seen=(
                    f"The total reward rose from {fmean(reward.values[:third]):.3g} to "
                    f"{fmean(reward.values[-third:]):.3g} while `{function}` fell from {before:.3g} to {now:.3g}."
                ),
            )
        return None

    def _alarm(self, history: History, onset: int, seen: str) -> Alarm:
        return Alarm(
            monitor="reward_hacking",
            step=history.step,
            onset=onset,
            seen=seen,
            meaning=(
                "The model has found something that the reward pays for and that you do not want, or it learns the "
                "training prompts by heart. From here on the reward's curve says nothing about the task."
            ),
            remedy=(
                "Read the best-paid completions (`log_completions`), mend the reward (`grpo-stage try-rewards` "
                "attacks it) or its weights, and go back to the best evaluation. A KL to the reference (`beta`) slows "
                "it down."
            ),
            settings=stronger_anchor(self.settings),
        )


class SharedTexts(Watch):
    """A few texts, given to many prompts word for word, earn most of the reward, and the references are not like that.

    `shared_text_reward_frac` is above `EARNED` in the mean of the last `WINDOW` lines, and by `EXCESS` above
    `shared_reference_frac` where there are references: of yes/no tasks every text is shared.
    """

    WINDOW = 5
    EARNED = 0.5
    EXCESS = 0.4

    def judge(self, history: History) -> Alarm | None:
        shared = current(history, SHARED_REWARD, self.WINDOW)
        references = history.series(SHARED_REFERENCE).last(self.WINDOW).values
        if len(shared) < self.WINDOW:
            return None
        earned, expected = fmean(shared.values), fmean(references) if references else 0.0
        if earned < max(self.EARNED, expected + self.EXCESS):
            return None
        return Alarm(
            monitor="shared_texts",
            step=history.step,
            onset=last_step(history.series(SHARED_REWARD).last(100), lambda value: value <= self.EARNED / 2),
            seen=(
                f"{earned:.0%} of the reward went to texts that many prompts share word for word"
                + (f"; {expected:.0%} of the references are shared like that." if references else ".")
            ),
            meaning=(
                "The model earns its reward with stock phrases that do not depend on the prompt: the reward can be "
                "had without solving the task."
            ),
            remedy=(
                "Read these completions (`log_completions`) and mend the reward so that it does not pay them "
                "(`grpo-stage try-rewards`). Going on teaches the phrases better."
            ),
            settings=lower_rate(self.settings),
        )


class PaidLength(Watch):
    """The reward pays for length: longer completions of a group earn more, and completions grow.

    `length_reward_correlation` is above `CORRELATION` in the median of the last `WINDOW` lines, and the mean length is
    `FACTOR` times that at the start.
    """

    WINDOW = 10
    CORRELATION = 0.6
    """More than a third of the differences in reward within a group are then differences in length."""
    FACTOR = 1.5

    def judge(self, history: History) -> Alarm | None:
        paid = current(history, LENGTH_CORRELATION, self.WINDOW)
        lengths = current(history, "completions/mean_length", 5)
        start = level_at_start(history, "completions/mean_length")
        if len(paid) < self.WINDOW or start is None or not len(lengths):
            return None
        strength, now = median(paid.values), level(lengths.values)
        if strength < self.CORRELATION or now < self.FACTOR * start:
            return None
        return Alarm(
            monitor="paid_length",
            step=history.step,
            onset=last_step(
                history.series("completions/mean_length").last(300), lambda v: v < (1 + self.FACTOR) / 2 * start
            ),
            seen=(
                f"Within a group the correlation of reward and length is {strength:.2f}, and completions grew from "
                f"{start:.0f} to {now:.0f} tokens."
            ),
            meaning="The reward pays for length itself, so the model writes more, whether or not it says more.",
            remedy=(
                "Mend the reward: divide what grows with length by it, or add `overlong`. A reward model that prefers "
                "long answers needs a penalty on length beside it."
            ),
            settings=stronger_anchor(self.settings),
        )
