"""`accuracy` on pairs of a completion and a reference as people write them, and on such as a policy would try."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_stage.rewards.answers.verdict import is_correct, unjudged_reason, voted_answer
from tests.unit.answer_cases import CASES


SHARE_RIGHT = 0.97


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "math_verify")  # it warns that its own time limit is off


def wrong_verdicts(pairs: Iterator[tuple[str, str, bool]]) -> list[str]:
    return [
        f"{'missed' if expected else 'FALSE POSITIVE'}: {completion!r} for {reference!r}"
        for completion, reference, expected in pairs
        if is_correct(completion, reference) is not expected
    ]


def test_the_recorded_pairs_are_judged_right() -> None:
    lines = (Path(__file__).parent / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    wrong = wrong_verdicts((pair["completion"], pair["reference"], pair["correct"]) for pair in pairs)
    assert not any(line.startswith("FALSE POSITIVE") for line in wrong), "\n".join(wrong)
    assert len(wrong) <= (1 - SHARE_RIGHT) * len(pairs), "\n".join(wrong)


@pytest.mark.parametrize("kind", dict.fromkeys(kind for kind, *_ in CASES))
def test_each_kind_of_answer(kind: str) -> None:
    pairs = (
        (completion, reference, expected)
        for this_kind, reference, right, wrong in CASES
        if this_kind == kind
        for expected, completions in ((True, right), (False, wrong))
        for completion in completions
    )
    assert wrong_verdicts(pairs) == []


MARKS = [
    "The answer is {}.",
    "The answer is:\n{}",
    "**Answer:** {}",
    "答案是{}。",
    r"Thus $\boxed{{{}}}$. I hope it is correct.",
    "<think>3 or 4</think><answer>{}</answer>",
    "3 + 4\n#### {}",
    "First 3.\n\n{}",
]
STATED = {
    "-7": (["-7", "-$7", "−7", "(-7)", "-7 cm"], ["7", "7-14", "-7 or -8", "-77"]),  # noqa: RUF001
    "0.5": (["1/2", r"\frac12", "50%", "½", "5e-1"], ["5", "1/20", "0.5 or 0.6", "0.50001"]),
    "B": (["B", "(B)", "B. Paris", "Option B"], ["A", "A or B", "ABC", "Because"]),
    "Paris": (["Paris", "paris", r"\text{Paris}"], ["Rome", "Paris or Rome", "not Paris"]),
    r"2\sqrt{3}": ([r"2\sqrt3", "2√3", r"\sqrt{12}"], [r"3\sqrt{2}", r"\sqrt{3}", "2"]),
    "10:30": (["10:30"], ["10:45", "10", "30"]),
    r"x \le 2": (["x ≤ 2", r"(-\infty, 2]"], ["x < 2", "x ≤ 3", "2"]),
    "x = 1 or x = 2": (["1, 2", "x = 2 or x = 1", r"\{1, 2\}"], ["1", "2", "1, 3", "12"]),
}


@pytest.mark.parametrize("mark", MARKS)
def test_each_kind_is_judged_alike_wherever_it_is_stated(mark: str) -> None:
    pairs = (
        (mark.format(answer), reference, expected)
        for reference, (right, wrong) in STATED.items()
        for expected, answers in ((True, right), (False, wrong))
        for answer in answers
    )
    assert wrong_verdicts(pairs) == []


@pytest.mark.parametrize(
    ("one", "other"), [("yes", "no"), (r"\sqrt{2}", r"\sqrt{3}"), ("7", "8"), ("A", "B"), ("1:2", "2:1")]
)
@pytest.mark.parametrize(
    "hedge",
    [
        "{0} or {1}",
        "{0}, {1}",
        "{0}\n{1}",
        "{0}. {1}.",
        "It is {0}. It is {1}.",
        "{0} because {1}",
        "{0} = {1}",
        "{0}; {1}",
        "The answer is {0}. The answer is {1}.",
        r"\boxed{{{0}}} \boxed{{{1}}}",
        "The answer is {0} since ${1}$",
        "{0}: {1}",
    ],
)
def test_no_completion_is_right_with_either_of_two_answers(hedge: str, one: str, other: str) -> None:
    completion = hedge.format(one, other)
    assert not (is_correct(completion, one) and is_correct(completion, other))


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("72", ""),
        ("He sold 24 and 48, which is 72.\n#### 72", ""),
        (r"\boxed{\frac{1}{2}}", ""),
        ("B. Paris", ""),
        ("the treaty of Westphalia", ""),
        ("10:30", ""),
        ("He sold 24 and then 48, so that the total is 72.", ""),
        ("<think>so it is 7", "states no final answer"),
        ("<think>7</think>", "states no final answer"),
        ("Because the moon turns around the earth, which turns around the sun.", "is prose or code"),
        ("def f(x):\n    return x", "is prose or code"),
        ('{"name": "x"}', "is JSON"),
    ],
)
def test_a_reference_that_is_not_judged_has_a_reason(reference: str, reason: str) -> None:
    assert unjudged_reason(reference) == reason


@pytest.mark.parametrize("answer", ["9" * 1900, "9" * 400 + ".5", "1." + "3" * 1900 + "e999", "10^{1000}", "1e-1000"])
@pytest.mark.parametrize("reference", [r"\sqrt{2}", "7", "(1, 2)", "x = 7"])
def test_a_number_of_any_size_is_judged(answer: str, reference: str) -> None:
    assert is_correct(answer, reference) is False
    assert voted_answer(answer)


@pytest.mark.parametrize(
    "completion",
    [
        *("The answer is less than 5", "more than 5", "at most 5", "The answer is at least 5.", "5 or less", "not 5"),
        *("The answer is not exactly 5", "anything but 5", r"\boxed{\text{less than } 5}", "<answer>up to 5</answer>"),
        *("#### at least 5", "答案是不是5", "答案是至少5", "答案是5以上", "It isn't 5"),
    ],
)
def test_a_limit_or_a_negation_in_words_is_no_number(completion: str) -> None:
    assert not is_correct(completion, "5")
    assert voted_answer(completion) != voted_answer("5")


@pytest.mark.parametrize(
    "completion", ["It is not 4 but 5", "More than 4 is wrong: the answer is 5", "at least I think it is 5"]
)
def test_words_of_a_limit_elsewhere_do_not_matter(completion: str) -> None:
    assert is_correct(completion, "5")
