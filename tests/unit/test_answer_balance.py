"""`answer_balance`: what the prompts of frequent answers weigh."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_stage.algorithm.answer_balance import answer_weights
from grpo_stage.collector import _prompt_weights
from grpo_stage.host.inputs import _refuse_unanswered
from grpo_stage.types import Prompt


def test_by_hand() -> None:
    """Four prompts of one answer and one of another: at 1/2 they weigh 1/2 and 1, divided by the mean 3/5."""
    assert answer_weights(list("aaaab"), 0.5) == pytest.approx([5 / 6] * 4 + [5 / 3])


@given(answers=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=40), exponent=st.floats(0, 1))
def test_a_constant_answer_earns_less_and_the_mean_stays(answers: list[str], exponent: float) -> None:
    weights = answer_weights(answers, exponent)
    counts = Counter(answers)
    earned = Counter()
    for answer, weight in zip(answers, weights, strict=True):
        earned[answer] += weight
    assert sum(weights) == pytest.approx(len(answers))
    powers = {answer: count ** (1 - exponent) for answer, count in counts.items()}
    for answer, weight in earned.items():
        assert weight / len(answers) == pytest.approx(powers[answer] / sum(powers.values()))


def test_answers_are_compared_as_accuracy_reads_them() -> None:
    references = ["1,000", "It is #### 1000", "two", " two", "\\boxed{7}"]
    prompts = [
        Prompt(index=i, token_ids=(1,), messages=(), reference=reference) for i, reference in enumerate(references)
    ]
    assert _prompt_weights(prompts, 1.0) == pytest.approx([5 / 6] * 4 + [5 / 3])


def test_prompts_without_an_answer_are_refused() -> None:
    prompts = [
        Prompt(index=i, token_ids=(1,), messages=(), reference=reference)
        for i, reference in enumerate(["1", " ", None])
    ]
    with pytest.raises(
        ValueError, match=r"`answer_balance: 0.5` weighs .* 2 of 3 prompts lack \(the first at index 1\).*leave"
    ):
        _refuse_unanswered(prompts, 0.5)
    _refuse_unanswered(prompts[:1], 0.5)
