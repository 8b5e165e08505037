"""One answer for all prompts: the policy has found an answer that often pays, and no longer reads the prompt."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from grpo_stage.distributed import all_gather
from grpo_stage.monitors.alarm import Alarm, History, Watch
from grpo_stage.monitors.monitor import Monitor, MonitorRequest
from grpo_stage.monitors.remedies import balanced_answers, kept_entropy, lower_rate
from grpo_stage.monitors.statistics import current, last_step, level_at_start
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.rewards.answers.verdict import voted_answer
from grpo_stage.types import ScoredGroup


SAME_ANSWER = "completions/same_answer_frac"
SAME_REFERENCE = "completions/same_reference_frac"
MOST_COMPLETIONS = 256
"""Whose answers are read in a rollout, on each process and evenly over its prompts: reading a long text without a
marked answer takes 10 ms. Agreement is a mean, so that fewer completions change its noise alone."""
_LONGEST = 64  # characters; longer answers are gathered as hashes


def agreement(answers: Sequence[Mapping[str, float]]) -> tuple[float, int]:
    """Over all ordered pairs of two prompts, the sum of the probabilities that their answers are equal; their number.

    Args:
        answers: [P] of each prompt, the share of its completions that give an answer, by answer. An answer that is
            missing is equal to none.
    """
    totals: Counter[str] = Counter()
    own = 0.0
    for shares in answers:
        for answer, share in shares.items():
            totals[answer] += share  # type: ignore[assignment]
            own += share * share
    return sum(share * share for share in totals.values()) - own, len(answers) * (len(answers) - 1)


class AnswerDiversity(Monitor):
    """Measures how often the final answers of two prompts are equal, and how often their references are.

    `same_answer_frac` is the probability that a completion of one prompt and a completion of another one give the same
    final answer (Simpson's index), over all pairs of prompts of a rollout; `same_reference_frac` is the same for the
    references. Final answers are what `accuracy` finds. Prompts whose reference states no answer are left out.
    """

    @classmethod
    def of(cls, request: MonitorRequest) -> "AnswerDiversity":
        return cls()

    def after_scoring(self, groups: Sequence[ScoredGroup], version: int, metrics: MetricTracker) -> None:
        own = []
        for scored in groups:
            reference = scored.group.prompt.reference
            right = voted_answer(reference, is_reference=True) if reference else None
            if right is None:
                continue
            completions = scored.group.completions[: max(1, MOST_COMPLETIONS // len(groups))]
            votes = Counter(voted_answer(completion.final_turn) for completion in completions)
            own.append(
                (
                    {_short(answer): n / len(completions) for answer, n in votes.items() if answer is not None},
                    {_short(right): 1.0},
                )
            )
        rows = [row for rank in all_gather(own) for row in rank]  # every rank adds the same pairs once
        for name, answers in ((SAME_ANSWER, [a for a, _ in rows]), (SAME_REFERENCE, [b for _, b in rows])):
            same, pairs = agreement(answers)
            metrics.add(name, same, pairs)


def _short(answer: str) -> str:
    return answer if len(answer) <= _LONGEST else hashlib.sha256(answer.encode("utf-8", "replace")).hexdigest()


class OneAnswer(Watch):
    """Completions of different prompts give the same answer far more often than the references do.

    With S and R the means of `same_answer_frac` and `same_reference_frac` over the last `WINDOW` lines, the excess is
    (S - R) / (1 - R): 0 where answers are as diverse as the references, 1 where every prompt gets one answer. So it
    needs no knowledge of how many answers there are: yes/no references have an R of 0.5. An alarm is given where the
    excess is above `EXCESS`, in the last line too, and S has not fallen since the start. A policy that
    starts with one answer and learns others is left alone.
    """

    WINDOW = 4
    """Lines. A rollout of 8 prompts has 28 pairs of prompts, so that four lines know S within about 0.1."""
    LEAST_LINES = 5
    EXCESS = 0.5
    """About seven in eight completions give the same answer where references are split evenly in two. Healthy
    runs on tasks of two to four answers stay below 0.35 (docs/monitors.md)."""
    LARGEST_REFERENCE = 0.9
    """Where the references themselves are nearly all one answer, giving it is right."""

    def judge(self, history: History) -> Alarm | None:
        answers, references = (current(history, name, self.WINDOW) for name in (SAME_ANSWER, SAME_REFERENCE))
        if len(history.series(SAME_ANSWER)) < self.LEAST_LINES or not len(answers) == len(references) == self.WINDOW:
            return None
        same, expected = fmean(answers.values), fmean(references.values)
        start = level_at_start(history, SAME_ANSWER)
        if expected > self.LARGEST_REFERENCE or start is None:
            return None
        excess = (same - expected) / (1 - expected)
        is_now = (answers.values[-1] - expected) / (1 - expected) >= self.EXCESS
        if excess < self.EXCESS or not is_now or same < start:
            return None
        bound = expected + self.EXCESS / 2 * (1 - expected)
        return Alarm(
            monitor="one_answer",
            step=history.step,
            onset=last_step(history.series(SAME_ANSWER).last(100), lambda value: value <= bound),
            seen=(
                f"Completions of two different prompts give the same final answer in {same:.0%} of pairs; the "
                f"references do in {expected:.0%}."
            ),
            meaning=(
                "The model gives nearly every prompt the same answer, without reading it. The reward may rise all the "
                "same, up to the share of prompts for which that answer is right; past it nothing is learned."
            ),
            remedy=(
                "Balance the answers in the dataset (`grpo-stage check` names the best constant answer and what it "
                "earns) or by `answer_balance`. Go back to before the fall with a lower learning rate and a means "
                "that keeps the entropy up (`entropy_target`, or `covariance_control: clip_cov`), and evaluate on "
                "balanced prompts."
            ),
            settings=balanced_answers(self.settings)
            | lower_rate(self.settings)
            | kept_entropy(self.settings, self._entropy_to_keep(history)),
        )

    def _entropy_to_keep(self, history: History) -> float:
        """Half of the entropy at the start, in nats."""
        return max((level_at_start(history, "entropy") or 0.4) / 2, 0.01)
