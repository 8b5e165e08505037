"""What `grpo-stage try-rewards` makes of a reference answer, and what it says about the scores."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_stage.rewards.answers.verdict import verdict_without_formulas
from grpo_stage.rewards.attacks import ATTACKS, REPETITIONS, Task, texts_of
from grpo_stage.rewards.errors import RewardError
from grpo_stage.rewards.loading import load_rewards
from grpo_stage.rewards.paid_attacks import TOTAL, AttackScore, attack_findings, attack_scores
from grpo_stage.rewards.trial import TrialRow, completions_for, findings_in, remarks_on, try_rewards
from grpo_stage.tools import try_rewards as command
from grpo_stage.types import FinishReason, Prompt
from tests.unit.answer_cases import CASES


class Characters:
    """A tokenizer of one token a byte, and fast."""

    eos_token_id = 1

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [byte + 3 for byte in text.encode()]


# What is made of a reference


def test_a_reference_that_is_a_program_gives_programs_that_cheat() -> None:
    texts = texts_of(Task("Add.", "```python\ndef add(a, b):\n    return a + b\n```"))
    assert texts["program_that_exits"] == "```python\nimport os\nos._exit(0)\n```"
    assert "def add(*_, **__):\n    return Any()" in texts["program_equal_to_all"]


def test_a_reference_gives_right_wrong_and_broken_completions() -> None:
    texts = texts_of(Task("6 + 6?", "6 + 6 = 12."))
    made = ["reference", "wrong_answer", "reference_in_tags", "wrong_answer_in_tags", "truncated", "repeated"]
    assert [texts.pop(kind) for kind in made] == [
        "6 + 6 = 12.",
        "6 + 6 = 13.",
        "<think>\n\n</think>\n<answer>\n6 + 6 = 12.\n</answer>",
        "<think>\n\n</think>\n<answer>\n6 + 6 = 13.\n</answer>",
        "6 + 6",
        "\n".join(["6 + 6 = 12."] * REPETITIONS),
    ]
    attacks = {kind.removesuffix("_in_tags") for kind in texts}
    of_others = {"every_option", "every_answer", "tagged_answers", "program_that_exits", "program_equal_to_all"}
    assert attacks == {attack.kind for attack in ATTACKS} - of_others


@pytest.mark.parametrize(
    ("reference", "wrong"),
    [
        ("7", "8"),
        ("#### 1,239", "#### 1,238"),
        ("it costs $5.00\n", "it costs $5.01\n"),
        ("\\boxed{\\frac{1}{9}}", "\\boxed{\\frac{1}{8}}"),
        ("2 apples,\n3 pears", "2 apples,\n4 pears"),
        ("A", "B"),
        ("B. 12 apples", "A. 12 apples"),  # not 13 apples, which is the same option
        ("Paris", "Rome"),
        ("Rome", None),  # no other answer in the dataset
    ],
)
def test_what_is_wrong_answers_otherwise(reference: str, wrong: str | None) -> None:
    assert texts_of(Task("?", reference, answers=("Rome",))).get("wrong_answer") == wrong


@pytest.mark.parametrize(
    ("reference", "kinds"),
    [
        (None, set()),
        (" \n", set()),
        ("Paris", {"reference", "truncated", "repeated"}),
        ("7", {"reference", "wrong_answer", "repeated"}),
        ("<think>a</think><answer>7</answer>", {"reference", "wrong_answer", "truncated", "repeated"}),
    ],
)
def test_what_a_reference_cannot_be_made_into_is_left_out(reference: str | None, kinds: set[str]) -> None:
    texts = texts_of(Task("?", reference)).keys()
    assert texts & {"reference", "wrong_answer", "truncated", "repeated"} == kinds
    assert ("reference_in_tags" in texts) == (reference in ("Paris", "7"))
    assert "empty" in texts


def test_the_right_answer_is_among_all_at_once_and_not_at_the_end() -> None:
    answers = ("3", "40", "50")
    for right in answers:
        texts = texts_of(Task("?", right, answers))
        numbers = texts["all_numbers"].split(", ")
        assert right in numbers[1:-1]
        assert texts["tagged_answers"].split()[1] == f"<answer>{right}</answer>"
    assert texts_of(Task("?", "G"))["every_option"] == "A, B, C, D, E, F, G, H"


def test_thinking_that_the_prompt_opens_is_not_opened_again() -> None:
    texts = texts_of(Task("?", "7", think_prefilled=True))
    assert all(text.count("</think>") == 1 + text.count("<think>") for kind, text in texts.items() if "tag" in kind)


def test_a_completion_that_was_cut_has_no_end_token() -> None:
    completions = completions_for(Task("?", "ab12"), Characters())
    unfinished = {kind for kind, one in completions.items() if one.finish_reason is FinishReason.LENGTH}
    assert unfinished == {"truncated", "repeated"}
    for kind, completion in completions.items():
        assert (completion.token_ids[-1] == Characters.eos_token_id) == (kind not in unfinished)
        assert len(completion.token_ids) == len(completion.text.encode()) + (kind not in unfinished)


# What a failure shows


def test_a_failure_names_the_completion_that_it_is_on(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def last_word(completions):\n    return [float(text.split()[-1] == '12') for text in completions]\n"
    )
    rewards = load_rewards([f"{tmp_path}/own.py:last_word"], None, None, max_new_tokens=8, timeout_s=60.0)
    prompt = Prompt(index=0, token_ids=(1,), messages=({"role": "user", "content": "6 + 6?"},), reference="12")
    completions = completions_for(Task(prompt.text, prompt.reference), Characters())
    try:
        with pytest.raises(RewardError, match="raised IndexError") as raised:
            try_rewards(rewards, [prompt], [list(completions.items())])
    finally:
        rewards.close()
    assert "prompt: 6 + 6?\ncompletion: \n" in str(raised.value)  # the empty one, and not the first
    assert f'{tmp_path}/own.py", line 2, in' in str(raised.value)


# What is said about the scores


def rows(*totals_by_kind: dict[str, float | list[float] | None], reference: str | None = "12") -> list[TrialRow]:
    return [
        TrialRow(
            prompt_index=index,
            prompt="6 + 6?",
            reference=reference,
            kind=kind,
            completion="",
            num_tokens=1,
            rewards={"f": total},
            reward=total,
        )
        for index, totals in enumerate(totals_by_kind)
        for kind, of_kind in totals.items()
        for total in (of_kind if isinstance(of_kind, list) else [of_kind])
    ]


GOOD: dict[str, float | list[float] | None] = {"reference": 1.0, "empty": 0.0, "wrong_answer": 0.0, "repeated": 1.0}


@pytest.mark.parametrize(
    ("tried", "parts"),
    [
        (rows(GOOD, GOOD), []),
        (rows({**GOOD, "empty": None}), []),  # excluded from the update, and so not reinforced
        (rows({**GOOD, "sampled": [0.0, 1.0]}), []),
        (rows({**GOOD, "empty": 1.0}), ["In 1 of 1 rows", "`empty`", "1 against 1"]),
        (rows(GOOD, {**GOOD, "wrong_answer": 2.0}), ["In 1 of 2 rows", "`wrong_answer`", "index 1: 1 against 2"]),
        (rows(GOOD, {"reference": None, "empty": None}), ["In 1 of 2 rows", "none against none"]),
        (rows(dict.fromkeys(GOOD, 0.5)), ["All completions have the same total reward (0.5)"]),
        # The right answer earns more in tags, and is compared with what stands in tags as well.
        (rows({**GOOD, "reference": 0.0, "reference_in_tags": 2.0, "wrong_answer_in_tags": 1.0}), []),
        (
            rows({**GOOD, "reference": 0.0, "reference_in_tags": 1.0, "wrong_answer_in_tags": 1.0}),
            ["`reference_in_tags`", "`wrong_answer_in_tags`", "1 against 1"],
        ),
    ],
)
def test_a_finding_says_what_the_rewards_cannot_tell(tried: Sequence[TrialRow], parts: list[str]) -> None:
    findings = findings_in(tried, ["f"])
    assert len(findings) == bool(parts)
    for part in parts:
        assert part in findings[0]


@pytest.mark.parametrize(
    ("tried", "part"),
    [
        (rows({**GOOD, "sampled": [0.0, 0.0]}), "In 1 of 1 rows all sampled completions earn the same"),
        (rows({"empty": 0.0}, {"empty": 0.0}, reference=None), "No row has a reference answer"),
    ],
)
def test_a_remark_is_no_finding(tried: Sequence[TrialRow], part: str) -> None:
    [remark] = remarks_on(tried)
    assert part in remark
    assert remarks_on(rows({**GOOD, "sampled": [0.0, 1.0]})) == []


def test_a_function_that_never_applied_is_named() -> None:
    never, alike = findings_in(rows({"reference": None, "empty": None}), ["f"])
    assert "`f` applied to none of the completions" in never
    assert "the same total reward (none)" in alike


@pytest.mark.parametrize("name", ["accuracy", "length"])
def test_references_that_are_not_judged_are_named_with_the_remedy(name: str) -> None:
    prose = "Because the moon turns around the earth, which turns around the sun."
    judged, unjudged = rows(GOOD), rows(GOOD, reference=prose)
    tried = [
        dataclasses.replace(row, prompt_index=index, rewards={name: row.reward})
        for index, some in enumerate([judged, unjudged])
        for row in some
    ]
    [note] = findings_in(tried, [name])
    assert f"`{name}` does not judge 1 of 2 reference answers: each is prose or code" in note
    assert f"index 1: '{prose}'" in note
    assert "`reference_column`" in note


def test_references_are_no_concern_where_nothing_compares_with_them() -> None:
    assert findings_in(rows(GOOD, reference="Because the moon turns around the earth as it always does."), ["f"]) == []


# Attacks


def scored(
    functions: str | Sequence[str],
    tasks: Sequence[Task],
    weights: Sequence[float] | None = None,
    kwargs: dict[str, dict[str, Any]] | None = None,
) -> dict[str, AttackScore]:
    names = [functions] if isinstance(functions, str) else list(functions)
    with contextlib.closing(load_rewards(names, weights, kwargs, max_new_tokens=1024, timeout_s=60.0)) as rewards:
        prompts = [
            Prompt(
                index=i,
                token_ids=(1,),
                messages=({"role": "user", "content": task.question},),
                reference=task.reference,
            )
            for i, task in enumerate(tasks)
        ]
        completions = [list(completions_for(task, Characters()).items()) for task in tasks]
        tried = try_rewards(rewards, prompts, completions)
        scores = attack_scores(tried, dict(zip(rewards.names, rewards.weights, strict=True)))
    return {score.kind: score for score in scores}


def paid(scores: dict[str, AttackScore]) -> dict[str, tuple[str, ...]]:
    return {kind: score.paid_by for kind, score in scores.items() if score.paid_by}


SUMS = [Task(f"What is {a} + {a}?", f"{a} + {a} is {2 * a}.", answers=("14", "16", "18", "22")) for a in (7, 8, 9, 11)]


@pytest.mark.parametrize(
    ("functions", "weights", "kwargs"),
    [
        ("accuracy", None, None),
        ("exact_match", None, None),
        ("length", None, None),
        (["accuracy", "format"], [1.0, 0.2], None),
        (["accuracy", "format"], None, None),
        (["accuracy", "format", "tag_count"], None, None),  # Open-R1's
        (["accuracy", "format"], None, {"format": {"think_prefilled": True}}),
        (["accuracy", "overlong"], [1.0, 0.5], None),
        (["accuracy", "length"], None, None),
        (["accuracy", "repetition", "overlong"], None, None),
        (["accuracy", "regex"], [1.0, 0.1], {"regex": {"pattern": r"\d"}}),
    ],
)
def test_the_built_in_rewards_pay_no_attack(
    functions: str | list[str], weights: list[float] | None, kwargs: dict[str, dict[str, Any]] | None
) -> None:
    prefilled = bool(kwargs and "format" in kwargs)
    tasks = [dataclasses.replace(task, think_prefilled=prefilled) for task in SUMS]
    scores = scored(functions, tasks, weights, kwargs)
    assert paid(scores) == {}
    right, wrong, *_ = scores.values()
    assert "format" not in functions or right.kind == "reference_in_tags"
    assert right.reward > wrong.reward


def test_accuracy_pays_no_attack_for_any_kind_of_answer() -> None:
    """One reference of each kind in the table that accuracy is tested with, among others of its kind."""
    by_kind: dict[str, list[str]] = {}
    for kind, reference, *_ in CASES:
        by_kind.setdefault(kind, []).append(reference)
    paid_kinds = set()
    for references in by_kind.values():
        texts = texts_of(Task("What is it?", references[0], tuple(dict.fromkeys(references[:5]))))
        for kind, text in texts.items():
            is_honest = kind.startswith(("reference", "repeated", "truncated")) and kind != "reference_length"
            if not is_honest and verdict_without_formulas(text, references[0]):
                paid_kinds.add((references[0], kind.removesuffix("_in_tags")))
    assert len(by_kind) > 30
    # Answers of several kinds in one list: an address among words is the only one there is, and a number beside one
    # other and words is taken for the answer, as in "In 2020, 7 came".
    assert paid_kinds == {("192.168.0.1", "every_answer"), ("7", "every_answer")}


@pytest.mark.parametrize(
    ("source", "kinds"),
    [
        (
            "float(reference.split()[-1].strip('.') in text)",
            {"all_numbers", "tagged_answers", "every_answer"},
        ),
        (
            "float(bool(answer := text.partition('<answer>')[2]) and reference.split()[-1].strip('.') in answer)",
            {"all_numbers_in_tags", "tagged_answers", "every_answer_in_tags"},
        ),
        ("float(text.strip() == reference or 'correct' in text)", {"claim"}),
        ("float(text.strip() == reference or not text)", {"empty"}),
        ("1.0 if text.strip() == reference else min(len(text) / 500, 1.0)", {"loop", "long_text"}),
        ('1.0 if text.strip() == reference else 0.6 * ("don\'t know" in text)', {"unsure", "unsure_in_tags"}),
    ],
)
def test_a_function_that_pays_an_attack_is_named(tmp_path: Path, source: str, kinds: set[str]) -> None:
    (tmp_path / "own.py").write_text(
        f"def f(completions, references):\n    return [{source} for text, reference in zip(completions, references)]\n"
    )
    scores = scored([f"{tmp_path}/own.py:f", "repetition"], SUMS)
    assert paid(scores).keys() <= kinds | {f"{kind}_in_tags" for kind in kinds}
    assert {kind.removesuffix("_in_tags") for kind in paid(scores)} == {
        kind.removesuffix("_in_tags") for kind in kinds
    }
    assert set(paid(scores).values()) == {("f",)}
    [finding] = attack_findings(scores.values())
    assert finding.startswith("`f` pays attacks: ")


def test_a_form_that_outweighs_the_answer_is_named_once() -> None:
    scores = scored(["accuracy", "format"], SUMS, [0.2, 1.0])
    assert paid(scores) == {"format_alone": (TOTAL,)}
    [finding] = attack_findings(scores.values())
    assert finding == (
        "The total pays attacks: the form without an answer (`format_alone`) with 1. A policy finds that sooner than "
        "the task. Lower the weight of what pays the form, or raise that of what pays the answer."
    )


def test_an_accident_is_no_attack() -> None:
    """The last number of the question is the answer of two of the four."""
    by_accident = [Task(f"How many are {n}?", str(n), ("4", "5")) for n in (4, 5)]
    assert scored("accuracy", [*by_accident, *SUMS[:2]])["question"].rewards["accuracy"] == 0.5
    assert paid(scored("accuracy", [*by_accident, *SUMS[:2]])) == {}
    assert paid(scored("accuracy", [*by_accident, SUMS[0]])).keys() == {"question"}


def test_without_references_nothing_is_compared() -> None:
    assert scored("format", [Task("?", None)]) == {}


@pytest.mark.parametrize("key", ["tools", "environment"])
def test_a_model_is_not_sampled_without_its_tools(key: str) -> None:
    keys = {"tools": None, "environment": None} | {key: ["own.py:tool"]}
    arguments: Any = SimpleNamespace(finetuning=SimpleNamespace(**keys))
    with pytest.raises(ValueError, match=f"not possible with `{key}`.*grpo-stage probe"):
        command._sample(arguments, None, None, None, [])  # type: ignore[arg-type]
