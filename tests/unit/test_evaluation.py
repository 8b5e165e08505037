"""mean@n, pass@k and maj@n: against enumeration in exact fractions, and as they are reduced over processes."""

import itertools
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_stage.records.evaluation import maj_at_k, pass_at_k, record_evaluation, rewarding_metrics
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.rewards.answers.verdict import voted_answer
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup, ScoredGroup


@pytest.mark.parametrize("num_samples", range(1, 9))
def test_pass_at_k_is_the_share_of_draws_with_a_correct_sample(num_samples):
    for num_correct, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        draws = list(itertools.combinations([True] * num_correct + [False] * (num_samples - num_correct), k))
        expected = Fraction(sum(any(draw) for draw in draws), len(draws))
        assert pass_at_k(num_samples, num_correct, k) == pytest.approx(float(expected), abs=1e-15)


def test_pass_at_k_of_many_samples_neither_overflows_nor_cancels():
    assert pass_at_k(100_000, 1, 1) == pytest.approx(1e-5, rel=1e-9)
    assert pass_at_k(100_000, 50_000, 1000) == 1.0
    assert pass_at_k(4096, 0, 64) == 0.0


@pytest.mark.parametrize("arguments", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_that_is_not_defined(arguments):
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(*arguments)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_grows_with_k_and_is_the_mean_at_1(drawn):
    n, c, k = drawn
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)
    assert pass_at_k(n, c, n) == (c > 0)
    if k > 1:
        assert pass_at_k(n, c, k) >= pass_at_k(n, c, k - 1) - 1e-12


def elections(answers: Sequence[str | None], passed: Sequence[bool]) -> Fraction:
    """Every way in which a tie may fall, each equally likely; then every completion of the winner."""
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return Fraction(0)
    winners = [answer for answer in counts if all(counts[answer] >= other for other in counts.values())]
    outcomes = []
    for winner in winners:
        own = [ok for answer, ok in zip(answers, passed, strict=True) if answer == winner]
        outcomes.append(Fraction(sum(own), len(own)))
    return sum(outcomes, Fraction(0)) / len(outcomes)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.booleans()), min_size=1, max_size=9))
def test_maj_at_k_is_the_expectation_over_ties(votes):
    answers, passed = [answer for answer, _ in votes], [ok for _, ok in votes]
    assert maj_at_k(answers, passed) == pytest.approx(float(elections(answers, passed)), abs=1e-15)


def test_maj_at_k_by_hand():
    assert maj_at_k(["1", "2", "2", "3"], [True, False, False, True]) == 0.0
    assert maj_at_k(["1", "1", "2", "3"], [True, True, False, False]) == 1.0
    assert maj_at_k(["1", "2", "3", "1", "2"], [True, False, False, True, False]) == 0.5, "a tie of two"
    assert maj_at_k([None, None, None, "7"], [False, False, False, True]) == 1.0, "None is no candidate"
    assert maj_at_k([None, None], [True, True]) == 0.0


@pytest.mark.parametrize(
    "same",
    [
        ["7", " 7.0 ", "$7", "So it is 7.", "7 apples", r"hence \boxed{7}", "<think>8</think>7", "x\n#### 7", "**7**"],
        ["1,000", "1000.00", "The answer is 1,000 apples"],
        ["0.5", ".5", "1/2", "it is 2/4"],
        ["Paris", "paris.", "The answer is **Paris**", r"\boxed{\text{Paris}}"],
        ["(1, 2)", "<answer>(1,  2)</answer>"],
        ["-3", "that gives 4 - 7 = -3"],
    ],
)
def test_equal_answers_are_one_vote(same):
    assert len({voted_answer(text) for text in same}) == 1


def test_different_answers_are_different_votes():
    different = ["7", "-7", "70", "7/2", "3,4", "34", "0.7", "5", r"\frac{1}{2}", r"\frac{3}{2}", "Paris", "1/0"]
    assert len({voted_answer(text) for text in different}) == len(different)


@pytest.mark.parametrize("text", ["", "  \n", "<think>It is 7", "<think>7</think>  ", "..."])
def test_nothing_said_is_no_vote(text):
    assert voted_answer(text) is None


def test_a_number_of_any_length_is_a_vote():
    assert voted_answer("9" * 5000) == "9" * 5000


def group(index: int, *texts: str, dataset: str | None = None) -> RolloutGroup:
    completions = [
        Completion(token_ids=(1,) * (i + 1), sampling_logprobs=(0.0,) * (i + 1), finish_reason=reason, text=text)
        for i, text in enumerate(texts)
        for reason in [FinishReason.LENGTH if i == 3 else FinishReason.STOP]
    ]
    prompt = Prompt(index=index, token_ids=(1,), messages=(), reference=None, dataset=dataset)
    return RolloutGroup(prompt=prompt, completions=tuple(completions), policy_version=0)


def scored(group: RolloutGroup, rewards: list[list[float | None]], totals: list[float | None]) -> ScoredGroup:
    return ScoredGroup(group=group, rewards=tuple(map(tuple, rewards)), total_rewards=tuple(totals))


# Two datasets; `right` scores answers, `bonus` applies to a single completion of the last prompt.
GROUPS = [
    group(0, "1", "2", "1", "3", dataset="easy"),
    group(1, "5", "5", "6", "", dataset="hard"),
    group(2, "8", "9", "8", "9", dataset="hard"),
]
REWARDS = [
    [[1.0, None], [0.0, None], [1.0, None], [0.0, None]],
    [[0.0, None], [0.0, None], [1.0, None], [None, None]],
    [[2.0, 0.5], [0.0, None], [1.0, None], [0.99, None]],
]
TOTALS = [[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, None], [2.5, 0.0, 1.0, 0.99]]


def recorded(selected: Sequence[int], by_dataset: bool = True) -> MetricTracker:
    tracker = MetricTracker()
    chosen = [scored(GROUPS[i], REWARDS[i], TOTALS[i]) for i in selected]
    record_evaluation(tracker, chosen, ["right", "bonus"], by_dataset=by_dataset)
    return tracker


def test_metrics_by_hand():
    metrics = recorded([0, 1, 2]).take()
    assert metrics["reward"] == pytest.approx((2 + 1 + 4.49) / 11)
    assert metrics["easy_reward"] == 0.5
    assert metrics["hard_reward"] == pytest.approx((1 + 4.49) / 7)
    assert metrics["rewards/right/mean@4"] == pytest.approx((2 + 1 + 3.99) / 11), "None is not counted"
    # 2, 1 and 2 of 4 pass: 0.99 and None do not
    assert metrics["rewards/right/pass@1"] == pytest.approx((2 / 4 + 1 / 4 + 2 / 4) / 3)
    assert metrics["rewards/right/pass@2"] == pytest.approx((5 / 6 + 3 / 6 + 5 / 6) / 3)
    assert metrics["rewards/right/pass@4"] == 1.0
    assert metrics["hard_rewards/right/pass@1"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    # `1` passes; `5` does not; `8` and `9` tie, and `8` passes
    assert metrics["rewards/right/maj@4"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert metrics["easy_rewards/right/maj@4"] == 1.0
    assert metrics["rewards/right/frac_not_applicable"] == pytest.approx(1 / 12)
    # prompts that `bonus` never applied to are left out
    assert metrics["rewards/bonus/mean@4"] == metrics["hard_rewards/bonus/mean@4"] == 0.5
    assert metrics["rewards/bonus/pass@4"] == 0.0
    assert "easy_rewards/bonus/pass@4" not in metrics
    assert metrics["easy_rewards/bonus/frac_not_applicable"] == 1.0
    assert metrics["completions/mean_length"] == 2.5
    assert metrics["completions/clipped_ratio"] == 0.25


def test_several_datasets_add_metrics_and_change_none():
    one = recorded([0, 1, 2], by_dataset=False).take()
    several = recorded([0, 1, 2]).take()
    assert one == {name: value for name, value in several.items() if not name.startswith(("easy_", "hard_"))}


@pytest.mark.parametrize("split", [([0, 2], [1]), ([1], [0, 2]), ([0, 1, 2], [])])
def test_processes_together_measure_what_one_does(split):
    """Also where a process has no prompt of a dataset, or none at all."""
    merged = MetricTracker()
    for mine in split:
        merged.merge(recorded(mine).state_dict())
    assert merged.take() == pytest.approx(recorded([0, 1, 2]).take())


@pytest.mark.parametrize(("n", "ks"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (9, [1, 2, 4, 8, 9])])
def test_the_names_that_may_choose_a_model_are_those_that_are_logged(n, ks):
    tracker = MetricTracker()
    groups = [group(i, *["1"] * n, dataset=name) for i, name in enumerate(["easy", "hard"])]
    scores = [scored(each, [[1.0]] * n, [1.0] * n) for each in groups]
    record_evaluation(tracker, scores, ["right"], by_dataset=True)
    names = rewarding_metrics(["right"], n, ["easy", "hard"])
    logged = {f"eval_{name}" for name in tracker.take()}
    assert logged - set(names) == {name for name in logged if "frac_not_applicable" in name or "completions/" in name}
    assert set(names) <= logged
    assert [f"eval_rewards/right/pass@{k}" for k in ks] == [
        name for name in names if name.startswith("eval_rewards/right/pass@")
    ]
    assert rewarding_metrics(["right"], n, ["easy"]) == rewarding_metrics(["right"], n, [])


def test_a_reward_model_passes_nothing():
    """Its scores have a scale of their own, on which 1 means nothing."""
    tracker = MetricTracker()
    scores = [scored(group(0, "1", "2"), [[3.0], [1.0]], [3.0, 1.0])]
    record_evaluation(tracker, scores, ["reward_model"], by_dataset=False)
    metrics = tracker.take()
    assert metrics["rewards/reward_model/mean@2"] == 2.0
    assert metrics["rewards/reward_model/frac_not_applicable"] == 0.0
    names = rewarding_metrics(["accuracy", "reward_model"], 2, [])
    assert "eval_rewards/accuracy/pass@2" in names
    assert not any("reward_model/pass@" in name or "reward_model/maj@" in name for name in (*names, *metrics))
