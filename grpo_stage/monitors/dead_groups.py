"""Groups whose completions all earn the same, split into those that are all right and those that are all wrong."""

from collections.abc import Sequence
from statistics import fmean

from grpo_stage.distributed import all_gather
from grpo_stage.monitors.alarm import Alarm, History, Watch
from grpo_stage.monitors.monitor import Monitor, MonitorRequest
from grpo_stage.monitors.statistics import current, last_step, level, may_rise
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.types import ScoredGroup


ALL_RIGHT = "completions/frac_groups_all_right"
ALL_WRONG = "completions/frac_groups_all_wrong"
SOLVED = 0.5
"""Share of groups that are all right, from which a policy knows its task: low entropy is then what it should have."""


def is_solved(history: History) -> bool:
    """Whether at least half of the groups are all right."""
    right = history.series(ALL_RIGHT).last(5).values
    return bool(right) and level(right) >= SOLVED


class GroupOutcomes(Monitor):
    """Measures the shares of groups that are all right and all wrong.

    Rewards are on any scale, so right and wrong are taken from the range of the totals that the run has seen, 0
    included: a group whose totals are all equal is all right in the upper quarter of the range, all wrong in the lower
    quarter, and neither between them (such as an equal format and a wrong answer). While every total was 0, it is all
    wrong.
    """

    def __init__(self) -> None:
        self._low = self._high = 0.0

    @classmethod
    def of(cls, request: MonitorRequest) -> "GroupOutcomes":
        return cls()

    def after_scoring(self, groups: Sequence[ScoredGroup], version: int, metrics: MetricTracker) -> None:
        totals = [[total for total in each.total_rewards if total is not None] for each in groups]
        flat = [total for of_group in totals for total in of_group]
        ranges = all_gather((min(flat, default=0.0), max(flat, default=0.0)))
        self._low = min(self._low, *(low for low, _ in ranges))
        self._high = max(self._high, *(high for _, high in ranges))
        quarter = (self._high - self._low) / 4
        for of_group in totals:
            is_dead = bool(of_group) and min(of_group) == max(of_group)
            is_wrong = is_dead and of_group[0] <= self._low + quarter
            is_right = is_dead and not is_wrong and of_group[0] >= self._high - quarter
            metrics.add(ALL_RIGHT, float(is_right))
            metrics.add(ALL_WRONG, float(is_wrong))

    def state_dict(self) -> list[float]:
        return [self._low, self._high]

    def load_state_dict(self, state: list[float]) -> None:
        self._low, self._high = state


class DeadGroups(Watch):
    """Nearly all groups teach nothing, and not since they are all right.

    The share of groups of equal totals that are not all right (`frac_reward_zero_std` less the share of all right) is
    above `WRONG_FRAC` over `WINDOW` lines, and the reward does not rise over them; or it is above `ALL_FRAC` in each
    of `ALL_LINES` lines. Groups that are all right are no
    fault: they say that the policy knows these prompts.
    """

    has_remedy = False

    WINDOW = 80
    """Lines without a rise of the reward: a hard task that is learned in the end may show none for 60."""
    WRONG_FRAC = 0.7
    """Ten prompts are then sampled for three that teach. A model that is right once in 25 times has this with 8
    completions a prompt."""

    ALL_LINES, ALL_FRAC = 15, 0.99
    """So many lines in which nothing at all was taught."""

    def judge(self, history: History) -> Alarm | None:
        dead = current(history, "frac_reward_zero_std", self.WINDOW)
        right = history.series(ALL_RIGHT).last(self.WINDOW)
        if len(dead) < self.ALL_LINES or list(right.steps) != list(dead.steps):
            return None
        silent = [all_equal - all_right for all_equal, all_right in zip(dead.values, right.values, strict=True)]
        is_lasting = (
            len(dead) == self.WINDOW
            and min(fmean(silent), level(silent)) > self.WRONG_FRAC
            and not may_rise(history, "reward", self.WINDOW)
        )
        if not is_lasting and min(silent[-self.ALL_LINES :]) < self.ALL_FRAC:
            return None
        num_lines = self.WINDOW if is_lasting else self.ALL_LINES
        share = fmean(silent[-num_lines:])
        wrong = history.series(ALL_WRONG).last(num_lines).values
        return Alarm(
            monitor="dead_groups",
            step=history.step,
            onset=last_step(type(dead)(dead.steps, silent), lambda value: value < self.WRONG_FRAC),
            seen=(
                f"In the last {num_lines} log lines {share:.0%} of the groups had completions that all earn the "
                f"same without being all right ({fmean(wrong):.0%} all wrong), and the reward does not "
                "rise."
            ),
            meaning=(
                "GRPO compares the completions of a prompt. Where all earn the same there is nothing to learn, so "
                "most of the computing time is spent for nothing: the task is too hard for this model, or the reward "
                "does not tell its completions apart."
            ),
            remedy=(
                "Take easier prompts (`grpo-stage probe` keeps those of 20-80 %), more completions a prompt "
                "(`num_generations`), a reward that pays for parts of a solution, or a cold start by supervised "
                "fine-tuning; `grpo-stage try-rewards` shows what the rewards tell apart."
            ),
            settings={},
        )
