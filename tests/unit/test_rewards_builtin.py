"""The built-in rewards, each on its own: values worked by hand from the docstring's formula."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_stage.rewards.answers.final_answer import final_answer
from grpo_stage.rewards.answers.verdict import is_correct, verdict_without_formulas, voted_answer
from grpo_stage.rewards.builtin.context import RewardContext
from grpo_stage.rewards.registry import BUILTIN_REWARDS


class InProcessChecker:
    """The verdicts of the workers, without workers; a completion that says `hang` times out."""

    def check(self, pairs: list[tuple[str, str]], pair_timeout_s: float) -> list[bool | None]:
        assert pair_timeout_s == 5.0
        return [None if pair[0] == "hang" else is_correct(*pair) for pair in pairs]


@pytest.fixture
def context() -> RewardContext:
    return RewardContext(max_new_tokens=100, checker=InProcessChecker(), counters=Counter())  # type: ignore[arg-type]


@pytest.fixture
def make(context: RewardContext) -> Callable[..., Callable[..., Any]]:
    return lambda name, **settings: BUILTIN_REWARDS[name].factory(context, **settings)


def tokens(*lengths: int) -> list[list[int]]:
    return [list(range(length)) for length in lengths]


# accuracy


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("The answer is 7.", "7"),
        ("3 + 4 = 7", "7"),
        ("3 + 4 equals 7.", "7"),
        ("The answer is **7**.", "7"),
        ("answer:7", "7"),
        ("The answer is 7, since 3 + 4", "7"),
        ("7.0", "7"),
        ("007", "7"),
        ("\N{MINUS SIGN}7", "-7"),
        ("答案是7元。", "7"),
        ("so 72 clips\n#### 72", "48/2 = <<48/2=24>>24\n48+24 = 72\n#### 72"),
        ("It costs $1,234.", "blah\n#### 1,234"),
        ("1234", "#### $1,234"),
        ("72 dollars", "#### 72\n"),
        ("#### Step 1: double it\nThe answer is 72", "#### 72"),
        ("The total is 5 apples", "5"),
        ("10cm", "10"),
        ("3/4", "0.75"),
        ("0.75", r"\frac{3}{4}"),
        ("75%", "0.75"),
        (r"\boxed{\dfrac{1}{2}}", "0.5"),
        (r"$1\frac{1}{2}$", "1.5"),
        ("0.333333", "1/3"),
        (r"Then \[ 3+4 = 7 \]", "7"),
        (r"\boxed{x^2+1}", "$1+x^2$"),
        ("x^2+1", "1 + x^2"),
        (r"2\pi", r"$2\pi$"),
        (r"\boxed{\sqrt{2}\text{ cm}}", r"\sqrt{2}"),
        (r"\boxed{5\text{ apples}}", "5"),
        (r"first \boxed{1}, no: \boxed{7}", r"so \boxed{7}"),
        (r"$3 \times 10^8$", "300000000"),
        ("{1,2}", r"\{2,1\}"),
        (r"\boxed{(1,2)}", "(1, 2)"),
        ("$x=7$", "7"),
        ("7", "$x=7$"),
        ("<answer>1</answer><answer>7</answer>", "7"),
        ("<think>8</think>The answer is 7.", "7"),
        ("<think>a</think><answer> 72 </answer>", "<think>b</think><answer>72</answer>"),
        # No mathematics in the reference: text.
        ("<answer>Paris</answer>", "paris."),
        ("The answer is Paris.", "Paris"),
        ("Answer: **Paris**", "Paris"),
        (r"\boxed{\text{Friday}}", "friday"),
        ("The answer is (B)", "B"),
        ("  Yes. ", "yes"),
        ("答案是巴黎", "答案是巴黎。"),
    ],
)
def test_accuracy_accepts(completion: str, reference: str) -> None:
    assert is_correct(completion, reference) is True


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("14", "7"),
        ("17", "7"),
        ("", "7"),
        ("   \n", "7"),
        ("7 or 8", "7"),
        ("7 or 8", "8"),
        ("$7$ or $8$", "7"),
        ("-5", "5"),
        ("seven", "7"),
        ("1/0", "7"),
        (r"\boxed{", "7"),
        (r"\boxed{\frac{1}{", "0.5"),
        ("The answer is 8. <answer>8</answer> 7", "7"),
        ("(2,1)", "(1, 2)"),
        ("It is London", "Paris"),
        ("", "Paris"),
        ("no", "yes"),
        ("The capital is not Paris", "Paris"),
        # Only what follows the reasoning counts; reasoning that never ends has no answer.
        ("<think>7</think>8", "7"),
        ("<think>7</think>", "7"),
        ("<think>So it is 7. </think> Done.", "7"),
        ("<think>so it must be 7", "7"),
        # The question repeated is no answer.
        ("3 + 4", "7"),
        ("3 + 4 = 3 + 4", "7"),
        ("$3+4$", "7"),
        (r"\boxed{3+4}", "7"),
        ("3 * 4", "12"),
        (r"$3 \times 4$", "12"),
        ("12 / 3", "4"),
        ("2^10", "1024"),
        ("10 - 3", "7"),
    ],
)
def test_accuracy_rejects(completion: str, reference: str) -> None:
    assert is_correct(completion, reference) is False


def test_a_truncated_completion_is_judged_by_the_last_number_it_reached() -> None:
    assert not is_correct("Natalia sold 48/2 = 24 clips in May, and altogether 48+", "#### 72")
    assert is_correct("Natalia sold 24 clips in May, altogether 72 and", "#### 72")


def test_accuracy_is_none_where_it_took_too_long_and_counts_it(make: Any, context: RewardContext) -> None:
    score = make("accuracy")
    assert score(completions=["7", "hang", "8", "hang"], references=["7"] * 4) == [1.0, None, 0.0, None]
    assert context.counters == {"accuracy/timeouts": 2}


@pytest.mark.parametrize(
    "text",
    [
        "#### " + " " * 50_000 + "x\nso",
        "#### 7\n" * 5_000,
        "<answer>" * 10_000,
        "<answer>7</answer>" + "<answer>" * 10_000,
        "\\boxed{" * 5_000,
        "\\boxed{}" * 5_000,
        "answer (" * 5_000,
        "the answer to " * 3_000,
        "answer" + " " * 10_000,
        "7 or " * 10_000,
        "7" * 10_000,
        "1 2/3 " * 5_000,
        "\\frac{" * 5_000,
        "$" * 10_000,
        "\\text{" * 5_000,
        "(" * 10_000,
        "1e999999999",
    ],
    ids=lambda text: f"{text[:16]!r}",
)
def test_what_runs_in_the_process_of_the_trainer_takes_no_longer_than_the_text(text: str) -> None:
    """Nothing could end it there."""
    started = time.process_time()
    for completion in (text, f"<answer>{text[:1900]}</answer>", f"The answer is {text[:1900]}"):
        for reference in ("7", "B", "10:30", "x+1"):
            verdict_without_formulas(completion, reference)
    voted_answer(text)
    assert time.process_time() - started < 2.0


@settings(deadline=None)
@given(st.text(max_size=80))
def test_final_answer_takes_any_text(text: str) -> None:
    assert final_answer(text).text in text
    assert final_answer(f"{text}</think><answer>42</answer>").text == "42"


# exact_match


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("Paris", "Paris", 1.0),
        (" Paris\n", "Paris ", 1.0),
        ("<think>hm</think> <answer> Paris </answer>", "Paris", 1.0),
        ("paris", "Paris", 0.0),
        ("Paris.", "Paris", 0.0),
        ("It is Paris", "Paris", 0.0),
        ("<answer>Paris", "Paris", 0.0),
        ("7.0", "7", 0.0),
        ("", "Paris", 0.0),
    ],
)
def test_exact_match(make: Any, completion: str, reference: str, expected: float) -> None:
    assert make("exact_match")(completions=[completion], references=[reference]) == [expected]


# format


WELL_FORMED = "<think>a\nb</think>\n<answer>7</answer>"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (WELL_FORMED, 1.0),
        (f"\n {WELL_FORMED} \n", 1.0),
        ("<think></think><answer></answer>", 1.0),
        (f"Sure. {WELL_FORMED}", 0.0),
        (f"{WELL_FORMED} Done.", 0.0),
        ("<think>a</think> so <answer>7</answer>", 0.0),
        ("<answer>7</answer><think>a</think>", 0.0),
        ("<think>a<answer>7</answer></think>", 0.0),
        ("<think>a</think><think>b</think><answer>7</answer>", 0.0),
        (WELL_FORMED + "<answer>8</answer>", 0.0),
        ("<think>a</think><answer>7", 0.0),
        ("a</think><answer>7</answer>", 0.0),
        ("<THINK>a</THINK><answer>7</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format(make: Any, completion: str, expected: float) -> None:
    assert make("format")(completions=[completion]) == [expected]


def test_format_where_the_prompt_opens_the_reasoning(make: Any) -> None:
    score = make("format", think_prefilled=True)
    assert score(completions=["a</think><answer>7</answer>", WELL_FORMED]) == [1.0, 0.0]


# tag_count


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (WELL_FORMED, 1.0),
        ("<think>a", 0.25),
        ("<think>a</think>7", 0.5),
        ("a</think><answer>7</answer>", 0.75),
        ("<answer></think></answer><think>", 1.0),
        (WELL_FORMED + "<answer>", 0.75),
        ("<think><think></think></think>", 0.0),
        ("", 0.0),
    ],
)
def test_tag_count(make: Any, completion: str, expected: float) -> None:
    assert make("tag_count")(completions=[completion]) == [expected]


# length


@pytest.mark.parametrize(
    ("num_tokens", "correct", "wrong"),
    [(0, 1.0, -1.0), (50, 0.75, -0.75), (100, 0.5, -0.5), (250, 0.5, -0.5), (25, 0.75 + 0.25 * math.sqrt(0.5), None)],
)
def test_length_is_a_cosine_between_its_ends(make: Any, num_tokens: int, correct: float, wrong: float | None) -> None:
    ids = tokens(num_tokens, num_tokens)
    scores = make("length")(completions=["7", "8"], references=["7", "7"], completion_ids=ids)
    assert scores[0] == pytest.approx(correct)
    assert wrong is None or scores[1] == pytest.approx(wrong)


def test_length_takes_its_settings_and_passes_time_outs_on(make: Any, context: RewardContext) -> None:
    score = make(
        "length", max_length=10, min_value_wrong=-4, max_value_wrong=-2, min_value_correct=2, max_value_correct=4
    )
    scores = score(completions=["7", "8", "hang"], references=["7"] * 3, completion_ids=tokens(10, 5, 5))
    assert scores == [pytest.approx(2), pytest.approx(-3), None]
    assert context.counters == {"length/timeouts": 1}


# overlong


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (10_000, -1.0)],
)
def test_overlong_grows_over_the_last_fifth(make: Any, num_tokens: int, expected: float) -> None:
    assert make("overlong")(completion_ids=tokens(num_tokens)) == [pytest.approx(expected)]


def test_overlong_takes_its_settings(make: Any) -> None:
    assert make("overlong", max_length=10, cache_length=10)(completion_ids=tokens(1, 5)) == [-0.1, -0.5]
    assert make("overlong", max_length=4)(completion_ids=tokens(3, 4)) == [0.0, -1.0]


# repetition


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3, 4, 5], 0.0),
        ([1, 1, 1, 1, 1, 1], -0.75),
        ([1, 2, 3, 1, 2, 3], -0.25),
        ([1, 2, 3], 0.0),
        ([1, 1], 0.0),
        ([1], 0.0),
    ],
)
def test_repetition(make: Any, ids: list[int], expected: float) -> None:
    assert make("repetition")(completion_ids=[ids]) == [expected]


def test_repetition_takes_its_settings(make: Any) -> None:
    assert make("repetition", ngram_size=1, max_penalty=-2.0)(completion_ids=[[5, 5, 5, 6]]) == [-1.0]
    assert make("repetition", max_penalty=0)(completion_ids=[[5] * 9]) == [0.0]


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_repetition_stays_in_its_range_and_worsens_when_the_text_is_repeated(ids: list[int], ngram_size: int) -> None:
    score = BUILTIN_REWARDS["repetition"].factory(SimpleNamespace(), ngram_size=ngram_size)
    once, twice = score(completion_ids=[ids, ids + ids])
    assert -1.0 < once <= 0.0
    # Between the copies at most n - 1 new n-grams arise, against all those of the second copy.
    if len(ids) >= 2 * ngram_size:
        assert twice <= once


# regex


@pytest.mark.parametrize(
    ("settings", "completion", "expected"),
    [
        ({"pattern": r"\d+"}, "it is 7.", 1.0),
        ({"pattern": r"\d+"}, "seven", 0.0),
        ({"pattern": r"\d+", "full_match": True}, "it is 7.", 0.0),
        ({"pattern": r"\d+", "full_match": True}, "72", 1.0),
        ({"pattern": "a.b"}, "a\nb", 0.0),
        ({"pattern": "(?s)a.b"}, "a\nb", 1.0),
        ({"pattern": "[一-龥]"}, "答案", 1.0),
    ],
)
def test_regex(make: Any, settings: dict[str, Any], completion: str, expected: float) -> None:
    assert make("regex", **settings)(completions=[completion]) == [expected]


# all


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("regex", {"pattern": "("}, "not a regular expression"),
        ("regex", {"pattern": 7}, "put it in quotes"),
        ("regex", {"pattern": "a", "full_match": "yes"}, "true or false"),
        ("format", {"think_prefilled": 1}, "true or false"),
        ("length", {"max_length": 0}, "max_length is 0"),
        ("length", {"max_length": "512"}, "whole number"),
        ("length", {"min_value_wrong": 0.0}, "must not be above max_value_wrong"),
        ("length", {"min_value_correct": 2.0}, "must not be above|above max_value_correct"),
        ("length", {"max_value_correct": math.inf}, "finite number"),
        ("overlong", {"cache_length": 101}, "cache_length 101 must not be above max_length 100"),
        ("overlong", {"cache_length": 0}, "cache_length is 0"),
        ("overlong", {"max_length": True}, "whole number"),
        ("repetition", {"ngram_size": 0}, "ngram_size is 0"),
        ("repetition", {"max_penalty": 0.5}, "repetition would be rewarded"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(make: Any, name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, **settings)


def _arguments(count: int) -> Iterator[tuple[str, list[Any]]]:
    yield "completions", [WELL_FORMED] * count
    yield "references", ["7"] * count
    yield "completion_ids", tokens(*range(1, count + 1))
    yield "environment_rewards", [0.5] * count
    entry = {"task": "leg_counting", "settings": {"seed": 1, "size": 1}, "index": 0}
    yield "reasoning_gym_entry", [json.dumps(entry)] * count


@pytest.mark.parametrize("name", sorted({*BUILTIN_REWARDS} - {"code"}))  # tests/unit/test_code_reward.py
def test_every_built_in_documents_itself_and_scores_each_completion(make: Any, name: str) -> None:
    documentation = BUILTIN_REWARDS[name].factory.__doc__ or ""
    assert "Range" in documentation
    score = make(name, **({"pattern": "a"} if name == "regex" else {}))
    wanted = score.__annotations__.keys() - {"return"}
    scores = score(**{key: value for key, value in _arguments(5) if key in wanted})
    assert len(scores) == 5
    assert all(isinstance(value, float) for value in scores)
