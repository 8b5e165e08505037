"""What one answer to every prompt would earn."""

import contextlib
import math
from collections.abc import Sequence

import pytest
from transformers import ByT5Tokenizer

from grpo_stage.rewards.constant_answer import ConstantAnswer, best_constant_answer
from grpo_stage.rewards.loading import load_rewards
from grpo_stage.types import Prompt


GCD = [str(math.gcd(a, b)) for a in range(2, 51, 3) for b in range(2, 51)]


def best(references: Sequence[str | None], *functions: str, weights: Sequence[float] | None = None) -> ConstantAnswer:
    prompts = [
        Prompt(index=i, token_ids=(1,), messages=({"role": "user", "content": "?"},), reference=reference)
        for i, reference in enumerate(references)
    ]
    names = list(functions) or ["accuracy"]
    rewards = load_rewards(names, list(weights) if weights else None, None, max_new_tokens=64, timeout_s=60.0)
    with contextlib.closing(rewards):
        found = best_constant_answer(rewards, prompts, ByT5Tokenizer())
    assert found is not None
    return found


def test_the_most_frequent_answer_earns_its_frequency() -> None:
    found = best(GCD)
    assert found.answer == "1"
    assert found.frequency == pytest.approx(GCD.count("1") / len(GCD))
    assert found.share == pytest.approx(found.frequency, abs=0.09)
    assert found.is_tempting
    assert f"'1' to every prompt would earn {found.share:.0%}" in found.warning


def test_answers_are_found_in_references_that_reason() -> None:
    found = best([f"{i} and more.\n#### {answer}" for i, answer in enumerate(["7", "7.0", "7", "5"] * 10)])
    assert (found.answer, found.frequency, found.num_answers) == ("7", 0.75, 2)
    assert found.share == pytest.approx(0.75)


def test_the_share_counts_from_what_an_empty_completion_earns() -> None:
    # Another reward pays everything, the empty completion as well: it does not make the constant answer better.
    found = best(["1"] * 30 + ["2"] * 20 + ["3"] * 10, "accuracy", "repetition", weights=[1.0, -5.0])
    assert found.share == pytest.approx(0.5)


def test_the_form_of_the_references_is_tried_as_well() -> None:
    references = [f"<think>a</think><answer>{answer}</answer>" for answer in [4, 4, 4, 9, 8] * 6]
    found = best(references, "accuracy", "format")
    assert found.completion == "<think>a</think><answer>4</answer>"
    assert found.share == pytest.approx((0.6 + 1) / 2)


@pytest.mark.parametrize(
    "references",
    [
        ["yes", "no"] * 30,  # an even split draws the policy nowhere
        ["yes"] * 33 + ["no"] * 27,
        ["A", "B", "C", "D"] * 20,
        [str(i) for i in range(60)],
        ["1", "1", "1", "2", "3"],  # too few to say
    ],
)
def test_no_warning(references: Sequence[str]) -> None:
    assert best(references).warning == ""


def test_uneven_answers_of_two_give_a_warning() -> None:
    assert best(["yes"] * 45 + ["no"] * 15).is_tempting


def test_none_without_references() -> None:
    rewards = load_rewards(["format"], None, None, max_new_tokens=64, timeout_s=60.0)
    with contextlib.closing(rewards):
        prompt = Prompt(index=0, token_ids=(1,), messages=({"role": "user", "content": "?"},), reference=None)
        assert best_constant_answer(rewards, [prompt, prompt], ByT5Tokenizer()) is None


def test_no_share_where_the_references_earn_nothing() -> None:
    found = best(["1"] * 30 + ["2"] * 10, "format")
    assert found.share is None
    assert not found.is_tempting
