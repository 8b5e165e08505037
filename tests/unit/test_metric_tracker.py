"""Sums, counts and extremes between two log lines, over ranks, by hand."""

from unittest.mock import patch

from grpo_stage.records import metrics
from grpo_stage.records.metrics import MetricTracker, record_completions
from grpo_stage.types import Completion, FinishReason


def filled(values: list[float]) -> MetricTracker:
    tracker = MetricTracker()
    for value in values:
        tracker.add("mean", value, 2)
        tracker.count("sum", value)
        tracker.lowest("extreme", value)
        tracker.highest("other extreme", value)
    return tracker


def test_what_is_taken_is_that_of_all_ranks_and_is_gone() -> None:
    tracker, other = filled([3.0, 1.0, 8.0]), filled([9.0, 0.5])
    with patch.object(metrics, "all_gather", lambda value: [value, other.state_dict()]):
        assert tracker.take() == {"mean": 21.5 / 10, "sum": 21.5, "extreme": 0.5, "other extreme": 9.0}
    assert tracker.take() == {}
    with patch.object(metrics, "all_gather", lambda value: [value, (1.0, 8.0)]):
        assert filled([3.0]).mean_over_ranks("mean") == 4.0 / 10
    assert filled([3.0]).mean_over_ranks("of nothing") is None


def test_a_state_is_a_copy_and_takes_the_place_of_what_there_was() -> None:
    tracker = filled([3.0, 1.0])
    state = tracker.state_dict()
    for of_kind in state.values():
        of_kind.clear()
    assert tracker.take() == filled([1.0, 3.0]).take()
    tracker = filled([100.0, -100.0])
    tracker.load_state_dict(filled([3.0, 1.0]).state_dict())
    assert tracker.take() == filled([3.0, 1.0]).take()


def test_lengths_of_completions() -> None:
    def completion(length: int, reason: FinishReason) -> Completion:
        return Completion(token_ids=(1,) * length, sampling_logprobs=(0.0,) * length, finish_reason=reason, text="")

    tracker = MetricTracker()
    lengths = [(4, FinishReason.STOP), (8, FinishReason.LENGTH), (2, FinishReason.LENGTH), (5, FinishReason.STOP)]
    record_completions(tracker, [completion(*each) for each in lengths])
    record_completions(tracker, [completion(6, FinishReason.STOP)])
    assert tracker.take() == {
        "completions/mean_length": 5.0,
        "completions/min_length": 2,
        "completions/max_length": 8,
        "completions/clipped_ratio": 2 / 5,
        "completions/mean_terminated_length": 5.0,
        "completions/min_terminated_length": 4,
        "completions/max_terminated_length": 6,
    }
