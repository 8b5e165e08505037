"""What the monitors of completions measure, by hand."""

# ruff: noqa: RUF001
import re
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import psutil
import pytest

from grpo_stage.monitors import dead_groups, one_answer, reward_hacking
from grpo_stage.monitors.dead_groups import GroupOutcomes
from grpo_stage.monitors.language import LanguageMixing, is_mixed, words_by_script
from grpo_stage.monitors.monitor import Monitor
from grpo_stage.monitors.one_answer import AnswerDiversity, agreement
from grpo_stage.monitors.repetition import Repetition, ends_in_loop, repeated_frac
from grpo_stage.monitors.reward_hacking import PaidCompletions
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.survival.phase import Phases
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup, ScoredGroup


def group(
    totals: Sequence[float | None],
    texts: Sequence[str] = (),
    reference: str | None = None,
    lengths: Sequence[int] = (),
    question: str = "?",
) -> ScoredGroup:
    completions = tuple(
        Completion(
            token_ids=tuple(range(length)),
            sampling_logprobs=(0.0,) * length,
            finish_reason=FinishReason.STOP,
            text=text,
        )
        for text, length in zip(texts or ["x"] * len(totals), lengths or [3] * len(totals), strict=True)
    )
    prompt = Prompt(
        index=0, token_ids=(1,), messages=({"role": "user", "content": question},), reference=reference
    )  # fmt: skip
    return ScoredGroup(
        group=RolloutGroup(prompt=prompt, completions=completions, policy_version=0),
        rewards=tuple((total,) for total in totals),
        total_rewards=tuple(totals),
    )


def measured(monitor: Monitor, *groups: ScoredGroup) -> dict[str, float]:
    metrics = MetricTracker()
    monitor.after_scoring(groups, 0, metrics)
    return {name.removeprefix("completions/"): value for name, value in metrics.take().items()}


# Groups that are all right or all wrong


@pytest.mark.parametrize(
    ("groups", "right", "wrong"),
    [
        ([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]], 0.25, 0.5),
        ([[-1.0, -1.0], [1.0, 1.0]], 0.5, 0.5),
        ([[0.0, 0.0]], 0.0, 1.0),  # nothing was ever earned
        ([[1.0, 1.0]], 1.0, 0.0),  # solved from the first step
        ([[-1.0, -1.0]], 0.0, 1.0),
        ([[2.0, 2.0], [1.0, 1.0], [0.0, 2.0]], 1 / 3, 0.0),  # the form alone is neither
        ([[None, None], [1.0, 1.0]], 0.5, 0.0),
        ([[0.5, 0.5], [0.0, 2.0], [0.51, 0.51]], 0.0, 1 / 3),  # the quarter itself is wrong
        ([[1.5, 1.5], [0.0, 2.0], [1.49, 1.49]], 1 / 3, 0.0),
    ],
)
def test_equal_groups_are_split_on_any_scale(groups: list[list[float | None]], right: float, wrong: float) -> None:
    found = measured(GroupOutcomes(), *map(group, groups))
    assert found == {"frac_groups_all_right": pytest.approx(right), "frac_groups_all_wrong": pytest.approx(wrong)}


def test_the_range_is_that_of_the_run_on_all_ranks_and_survives_a_resume() -> None:
    monitor = GroupOutcomes()
    measured(monitor, group([0.0, 4.0]))
    resumed = GroupOutcomes()
    resumed.load_state_dict(monitor.state_dict())
    assert measured(resumed, group([1.0, 1.0]))["frac_groups_all_wrong"] == 1
    with patch.object(dead_groups, "all_gather", lambda own: [own, (-10.0, 0.0)]):
        assert measured(GroupOutcomes(), group([-1.0, -1.0]))["frac_groups_all_right"] == 1


# One answer


def test_agreement_is_over_pairs_of_different_prompts() -> None:
    same, pairs = agreement([{"1": 1.0}, {"1": 0.5, "2": 0.5}, {"2": 1.0}])
    # (1, 2): 0.5, (2, 3): 0.5, (1, 3): 0, each in both orders
    assert (same, pairs) == (pytest.approx(2.0), 6)
    assert agreement([{"1": 1.0}]) == (0.0, 0)


def test_answers_are_compared_as_accuracy_finds_them() -> None:
    found = measured(
        AnswerDiversity(),
        group([1, 0], ["The answer is 1.0", "1"], "1"),
        group([1, 0], ["so \\boxed{1}", "I think that it is two"], "#### 3"),
        group([0, 0], ["1", ""], "1"),
        group([0, 0], ["1", "1"], None),  # nothing to compare with
    )
    # Answers "1": 1, 1/2, 1/2: pairs 1/2, 1/2, 1/4. References 1, 3, 1: one of three pairs.
    assert found == {
        "same_answer_frac": pytest.approx((0.5 + 0.5 + 0.25) / 3),
        "same_reference_frac": pytest.approx(1 / 3),
    }
    assert measured(AnswerDiversity(), group([1, 0], ["1", "1"], "1")) == {}  # no pair


def test_pairs_are_over_all_ranks() -> None:
    with patch.object(one_answer, "all_gather", lambda own: [own, [({"7": 1.0}, {"9": 1.0})]]):
        found = measured(AnswerDiversity(), group([1], ["7"], "7"))
    assert found == {"same_answer_frac": 1.0, "same_reference_frac": 0.0}


def test_long_answers_are_still_told_apart() -> None:
    long = "words and " * 40
    found = measured(AnswerDiversity(), *[group([1], [long + word], "1") for word in ("ham", "eggs", "ham")])
    assert found["same_answer_frac"] == pytest.approx(1 / 3)


# Texts that many prompts share, and paid length


def test_reward_of_shared_texts_is_counted_from_the_lowest() -> None:
    found = measured(
        PaidCompletions(),
        group([3.0, 1.0], ["great!", "own"], "a"),
        group([3.0, 1.0], [" great!", "mine"], "b"),
        group([1.0, 2.0], ["other", "this"], "b"),
        group([1.0, 1.0], ["that", "more"], "c"),
    )
    assert found["shared_text_reward_frac"] == pytest.approx(4 / 5)
    assert found["shared_reference_frac"] == pytest.approx(0.5)


def test_few_prompts_or_no_reward_tell_nothing() -> None:
    assert measured(PaidCompletions(), *[group([1.0, 1.0])] * 3) == {}
    assert "shared_text_reward_frac" not in measured(PaidCompletions(), *[group([1.0, 1.0])] * 4)
    with patch.object(reward_hacking, "all_gather", lambda own: [own, own]):
        assert measured(PaidCompletions(), *[group([1.0, 0.0])] * 2)["shared_text_reward_frac"] == 1


def test_the_correlation_with_length_is_within_groups() -> None:
    rising, falling = group([0.0, 1.0, 2.0], lengths=[1, 2, 3]), group([1.0, 0.0, None], lengths=[1, 2, 9])
    assert measured(PaidCompletions(), rising)["length_reward_correlation"] == pytest.approx(1)
    assert measured(PaidCompletions(), rising, falling)["length_reward_correlation"] == pytest.approx(0)
    assert measured(PaidCompletions(), group([1.0, 1.0], lengths=[1, 2]), group([1.0, 0.0])) == {}


# Repetition

ENGLISH = (
    "First we count the apples that Tom has left after he gives three to Ann. He had twelve, so nine are left. Then "
    "he buys two bags of five apples each, which makes ten more. Nine and ten are nineteen, so the answer is 19."
)
CHINESE = (
    "首先计算汤姆给了安三个苹果之后还剩多少个苹果。他原来有十二个苹果，所以还剩九个苹果。然后他又买了两袋苹果，"
    "每袋有五个苹果，也就是十个苹果。九个苹果加十个苹果等于十九个苹果，所以答案是十九。"
)
CODE = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\ndef mul(a, b):\n    return a * b\n"


@pytest.mark.parametrize(
    "tokens",
    [
        re.findall(r"\w+|\W", ENGLISH),
        re.findall(r"\s*\w+|\W", CODE),
        list(CHINESE),
        list(CHINESE.encode("utf-8")),  # the hardest case for Chinese: three tokens a character
    ],
)
def test_ordinary_text_is_no_repetition_in_any_script(tokens: list[Any]) -> None:
    share = repeated_frac(tokens)
    assert share is not None
    assert share < 0.15
    assert not ends_in_loop(tokens)


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([1] * 16, True),
        ([1] * 15, False),
        ([*range(50), *[1, 2, 3] * 6], True),
        ([*range(50), *[1, 2, 3] * 5], False),  # 15 tokens
        ([*range(50), *list(range(40)) * 4], True),
        ([*range(50), *list(range(40)) * 3], False),
        ([*[1, 2] * 20, 3], False),  # it got out
        ([*list(range(65)) * 5], False),  # a period above 64
        (list("所以答案是十九。" * 4), True),
        ([], False),
    ],
)
def test_a_loop_is_a_period_at_the_end(tokens: list[int], loops: bool) -> None:
    assert ends_in_loop(tokens) is loops


def test_repeated_ngrams() -> None:
    assert repeated_frac(list(range(22))) is None
    assert repeated_frac(list(range(23))) == 0
    assert repeated_frac([7] * 23) == pytest.approx(1 - 1 / 12)


def test_only_a_loop_that_was_cut_counts() -> None:
    tokens = (1,) * 30
    cut, ended = (
        Completion(token_ids=tokens, sampling_logprobs=(0.0,) * 30, finish_reason=reason, text="")
        for reason in (FinishReason.LENGTH, FinishReason.STOP)
    )
    scored = group([1.0, 1.0])
    both = ScoredGroup(
        group=RolloutGroup(prompt=scored.group.prompt, completions=(cut, ended), policy_version=0),
        rewards=((1.0,), (1.0,)),
        total_rewards=(1.0, 1.0),
    )
    found = measured(Repetition(), both)
    assert found == {"looped_frac": 0.5, "repeated_frac": pytest.approx(1 - 1 / 19)}


# Languages


@pytest.mark.parametrize(
    ("completion", "contexts", "mixed"),
    [
        ("Nine apples are left, so the answer is 19.", ["How many?"], False),
        ("Nine apples 还剩九个苹果 are left.", ["How many?"], True),
        ("所以答案是十九", ["How many apples are left?"], True),
        ("The answer is девять яблок.", ["How many?"], True),
        (CHINESE, ["汤姆还剩多少个苹果？"], False),
        ("设 x = 3，则 f(x) = 9，所以答案是 9。", ["求 f(3)。"], False),
        ("可以用 Python 的 list 来做这件事情，然后用 for 循环遍历所有的元素。", ["怎么做？"], False),
        ("首先 we count the apples and then everything else is simple", ["还剩多少？"], True),
        ("The angle α is \\(\\frac{π}{2}\\), and β = 2α, γ = 3α, so σ and μ are known.", ["Find it."], False),
        ("```python\n# 计算所有苹果的数量\nprint(19)\n```\nThat prints it.", ["How many?"], False),
        ("The word `苹果汁很好喝` means juice.", ["Translate."], False),
        ("The name is 王 and no more can be said about this.", ["Who?"], False),  # one character
        ("りんごは十九個です。", ["りんごはいくつですか。"], False),
        ("사과는 열아홉 개입니다. 漢字", ["사과는 몇 개입니까?"], False),  # Korean may have Han
        ("苹果 means apple.", ["Translate: apple", "苹果汁"], False),  # the reference has it
        ("ここは 东京", ["Where is it?"], True),
        ("anything at all", ["2 + 2 = ?"], False),  # a prompt of no language
        ("一二三四", ["2 + 2 = ?"], False),
    ],
)
def test_languages_are_told_by_script(completion: str, contexts: list[str], mixed: bool) -> None:
    assert is_mixed(completion, *contexts) is mixed


def test_words_are_counted_by_script() -> None:
    assert words_by_script("Tom ate three apples; 汤姆吃了 три яблока $x = привет$") == {
        "LATIN": 2, "HAN": 2, "CYRILLIC": 2
    }  # fmt: skip


def test_the_share_of_mixed_completions() -> None:
    found = measured(LanguageMixing(), group([0, 0], ["nine", "还剩九个苹果"], "19", question="How many are left?"))
    assert found == {"mixed_language_frac": 0.5}


def test_answers_are_read_of_as_many_completions_of_each_prompt() -> None:
    groups = [group([0, 0], ["1", "2"], "1"), group([0, 0], ["1", "3"], "1")]
    with patch.object(one_answer, "MOST_COMPLETIONS", 3):
        assert measured(AnswerDiversity(), *groups)["same_answer_frac"] == 1
    assert measured(AnswerDiversity(), *groups)["same_answer_frac"] == pytest.approx(0.25)


# Memory


def test_a_phase_logs_its_memory() -> None:
    metrics = MetricTracker()
    with Phases(None, None, metrics).timed("reward"):  # type: ignore[arg-type]
        pass
    logged = metrics.take()
    held = psutil.Process().memory_info().rss / 2**30
    assert logged.keys() == {"time/reward", "memory/reward"}
    assert logged["memory/reward"] == pytest.approx(held, rel=0.2)
