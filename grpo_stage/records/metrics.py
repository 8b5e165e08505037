"""The definitions of the metrics, as sums and counts that are added up over ranks before dividing.

A mean of the ranks' means would weigh a rank with two completions as much as one with twenty.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import stdev
from typing import Any

import torch

from grpo_stage.distributed import all_gather
from grpo_stage.types import Completion, FinishReason, ScoredGroup
from grpo_stage.update.credit import has_reward_variance


@dataclass
class MetricTracker:
    """Collects metrics between two log lines."""

    _means: dict[str, tuple[float, float]] = field(default_factory=dict)
    _sums: dict[str, float] = field(default_factory=dict)
    _minima: dict[str, float] = field(default_factory=dict)
    _maxima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: float | torch.Tensor, count: float | torch.Tensor = 1.0) -> None:
        """Add to a metric that is logged as (sum of totals) / (sum of counts)."""
        old_total, old_count = self._means.get(name, (0.0, 0.0))
        self._means[name] = (old_total + float(total), old_count + float(count))

    def count(self, name: str, number: float) -> None:
        """Add to a metric that is logged as a sum."""
        self._sums[name] = self._sums.get(name, 0.0) + number

    def lowest(self, name: str, value: float) -> None:
        self._minima[name] = min(value, self._minima.get(name, value))

    def highest(self, name: str, value: float) -> None:
        self._maxima[name] = max(value, self._maxima.get(name, value))

    def take(self) -> dict[str, float]:
        """The metrics over all ranks since the last call. Every rank must call it."""
        merged = MetricTracker()
        for state in all_gather(self.state_dict()):
            merged.merge(state)
        self.load_state_dict({})
        averages = {name: total / count for name, (total, count) in merged._means.items() if count > 0}
        return {**averages, **merged._sums, **merged._minima, **merged._maxima}

    def own_mean(self, name: str) -> float | None:
        """The value of a mean so far, on this rank alone; None if it has counted nothing."""
        total, count = self._means.get(name, (0.0, 0.0))
        return total / count if count > 0 else None

    def mean_over_ranks(self, name: str) -> float | None:
        """The value of a mean so far, over all ranks, without resetting it; None if no rank has counted anything."""
        measured = all_gather(self._means.get(name, (0.0, 0.0)))
        count = sum(count for _, count in measured)
        return sum(total for total, _ in measured) / count if count > 0 else None

    def merge(self, state: dict[str, Any]) -> None:
        """Add the metrics of another tracker, given as its `state_dict`."""
        for name, (total, count) in state["means"].items():
            self.add(name, total, count)
        for name, number in state["sums"].items():
            self.count(name, number)
        for name, value in state["minima"].items():
            self.lowest(name, value)
        for name, value in state["maxima"].items():
            self.highest(name, value)

    def state_dict(self) -> dict[str, Any]:
        """The metrics since the last `take`, ready for JSON."""
        return {
            "means": dict(self._means),
            "sums": dict(self._sums),
            "minima": dict(self._minima),
            "maxima": dict(self._maxima),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the collected metrics by `state`."""
        self._means, self._sums, self._minima, self._maxima = {}, {}, {}, {}
        if state:
            self.merge(state)


def record_rollout(
    tracker: MetricTracker, groups: Sequence[ScoredGroup], reward_names: Sequence[str], weights: Sequence[float]
) -> None:
    """Metrics of a rollout, under TRL's names. Every rank must call it, even without groups.

    ======================================  ==========================================================================
    reward                                  mean over completions of the weighted total
    reward_std                              mean over groups of the total's sample standard deviation
    frac_reward_zero_std                    share of groups whose totals are all equal
    frac_reward_none                        share of groups in which no function applied
    rewards/{function}/mean                 mean over the completions that the function applied to
    rewards/{function}/std                  mean over rollouts of the sample standard deviation over the same, on all
                                            ranks
    rewards/{function}/frac_not_applicable  share of completions for which the function returned None
    completions/mean_length (min, max)      tokens that were sampled, the end token included
    completions/mean_terminated_length      the same over those that ended by themselves (min, max)
    completions/clipped_ratio               share that reached `max_new_tokens`
    completions/mean_turns                  turns of the policy; this and the next ones only with tools
    tools/call_frequency                    calls that were run, mean over completions
    tools/failure_frequency                 share of these calls that were answered by an error
    tools/cut_frequency                     share of the turns with results in which these were cut
    tools/unanswered_frac                   share of completions that end with calls: no turn or no room was left
    ======================================  ==========================================================================
    """
    for scored in groups:
        totals = [total for total in scored.total_rewards if total is not None]
        tracker.add("reward", sum(totals), len(totals))
        if len(totals) > 1:
            tracker.add("reward_std", stdev(totals))
        tracker.add("frac_reward_zero_std", float(not has_reward_variance(scored, weights)))
        tracker.add("frac_reward_none", float(not scored.has_reward))
        for name, column in zip(reward_names, zip(*scored.rewards, strict=True), strict=True):
            applicable = [value for value in column if value is not None]
            tracker.add(f"rewards/{name}/mean", sum(applicable), len(applicable))
            tracker.add(f"rewards/{name}/frac_not_applicable", len(column) - len(applicable), len(column))
        record_completions(tracker, scored.group.completions)
    rows = [row for rank in all_gather([row for scored in groups for row in scored.rewards]) for row in rank]
    for name, column in zip(reward_names, zip(*rows, strict=True), strict=bool(rows)):
        applicable = [value for value in column if value is not None]
        if len(applicable) > 1:
            tracker.add(f"rewards/{name}/std", stdev(applicable))


def record_completions(tracker: MetricTracker, completions: Sequence[Completion]) -> None:
    """The `completions/...` metrics of a rollout."""
    for completion in completions:
        length = completion.num_sampled
        truncated = completion.finish_reason is FinishReason.LENGTH
        tracker.add("completions/mean_length", length)
        tracker.lowest("completions/min_length", length)
        tracker.highest("completions/max_length", length)
        tracker.add("completions/clipped_ratio", float(truncated))
        if not truncated:
            tracker.add("completions/mean_terminated_length", length)
            tracker.lowest("completions/min_terminated_length", length)
            tracker.highest("completions/max_terminated_length", length)
        if completion.turns:
            results = [turn for turn in completion.turns if not turn.is_sampled]
            num_calls = sum(turn.num_calls for turn in results)
            tracker.add("completions/mean_turns", len(completion.turns) - len(results))
            tracker.add("tools/call_frequency", num_calls)
            tracker.add("tools/failure_frequency", sum(turn.num_errors for turn in results), num_calls)
            tracker.add("tools/cut_frequency", sum(turn.is_cut for turn in results), len(results))
            tracker.add("tools/unanswered_frac", float(completion.turns[-1].num_calls > 0))
