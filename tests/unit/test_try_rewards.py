"""What `grpo-stage try-rewards` makes of a reference answer, and what it says about the scores."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import ByT5Tokenizer

from grpo_stage.rewards.errors import RewardError
from grpo_stage.rewards.loading import load_rewards
from grpo_stage.rewards.trial import REPETITIONS, TrialRow, completions_from, texts_from, try_rewards, warnings_about
from grpo_stage.types import FinishReason, Prompt


# What is made of a reference


def test_a_reference_gives_a_perfect_completion_and_broken_ones() -> None:
    assert texts_from("6 + 6 = 12.") == {
        "reference": "6 + 6 = 12.",
        "empty": "",
        "truncated": "6 + 6",
        "wrong_number": "6 + 6 = 13.",
        "repeated": "\n".join(["6 + 6 = 12."] * REPETITIONS),
    }


@pytest.mark.parametrize(
    ("reference", "wrong"),
    [
        ("7", "8"),
        ("#### 1,239", "#### 1,238"),
        ("it costs $5.00\n", "it costs $5.01\n"),
        ("\\boxed{\\frac{1}{9}}", "\\boxed{\\frac{1}{8}}"),
        ("2 apples,\n3 pears", "2 apples,\n4 pears"),
    ],
)
def test_the_last_number_is_the_wrong_one(reference: str, wrong: str) -> None:
    assert texts_from(reference)["wrong_number"] == wrong


@pytest.mark.parametrize(
    ("reference", "kinds"),
    [
        (None, ["empty"]),
        (" \n", ["empty"]),
        ("Paris", ["reference", "empty", "truncated", "repeated"]),
        ("7", ["reference", "empty", "wrong_number", "repeated"]),
        (" 7", ["reference", "empty", "wrong_number", "repeated"]),
    ],
)
def test_what_a_reference_cannot_be_made_into_is_left_out(reference: str | None, kinds: list[str]) -> None:
    assert list(texts_from(reference)) == kinds


def test_a_completion_that_was_cut_has_no_end_token() -> None:
    tokenizer = ByT5Tokenizer()
    completions = completions_from("ab12", tokenizer)
    unfinished = {kind for kind, one in completions.items() if one.finish_reason is FinishReason.LENGTH}
    assert unfinished == {"truncated", "repeated"}
    for kind, completion in completions.items():
        assert len(completion.token_ids) == len(completion.text) + (kind not in unfinished)
        assert (completion.token_ids[-1] == tokenizer.eos_token_id) == (kind not in unfinished)
        assert tokenizer.decode(completion.token_ids, skip_special_tokens=True) == completion.text


# What a failure shows


def test_a_failure_names_the_completion_that_it_is_on(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def last_word(completions):\n    return [float(text.split()[-1] == '12') for text in completions]\n"
    )
    rewards = load_rewards([f"{tmp_path}/own.py:last_word"], None, None, max_new_tokens=8, timeout_s=60.0)
    prompt = Prompt(index=0, token_ids=(1,), messages=({"role": "user", "content": "6 + 6?"},), reference="12")
    completions = completions_from(prompt.reference, ByT5Tokenizer())
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


GOOD: dict[str, float | list[float] | None] = {"reference": 1.0, "empty": 0.0, "wrong_number": 0.0, "repeated": 1.0}


@pytest.mark.parametrize(
    ("tried", "parts"),
    [
        (rows(GOOD, GOOD), []),
        (rows({**GOOD, "empty": None}), []),  # excluded from the update, and so not reinforced
        (rows({**GOOD, "sampled": [0.0, 1.0]}), []),
        (rows({**GOOD, "empty": 1.0}), ["In 1 of 1 rows", "`empty`", "1 against 1"]),
        (rows(GOOD, {**GOOD, "wrong_number": 2.0}), ["In 1 of 2 rows", "`wrong_number`", "index 1: 1 against 2"]),
        (rows(GOOD, {"reference": None, "empty": None}), ["In 1 of 2 rows", "none against none"]),
        (rows(dict.fromkeys(GOOD, 0.5)), ["All completions have the same total reward (0.5)"]),
        (rows({**GOOD, "sampled": [0.0, 0.0]}), ["In 1 of 1 rows all sampled completions earn the same"]),
        (rows({"empty": 0.0}, {"empty": 0.0}, reference=None), ["No row has a reference answer"]),
    ],
)
def test_a_note_says_what_the_rewards_cannot_tell(tried: Sequence[TrialRow], parts: list[str]) -> None:
    notes = warnings_about(tried, ["f"])
    assert len(notes) == bool(parts)
    for part in parts:
        assert part in notes[0]


def test_a_function_that_never_applied_is_named() -> None:
    never, alike = warnings_about(rows({"reference": None, "empty": None}), ["f"])
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
    [note] = warnings_about(tried, [name])
    assert f"`{name}` does not judge 1 of 2 reference answers: each is prose or code" in note
    assert f"index 1: '{prose}'" in note
    assert "`reference_column`" in note


def test_references_are_no_concern_where_nothing_compares_with_them() -> None:
    assert (
        warnings_about(rows(GOOD, reference="Because the moon turns around the earth as it always does."), ["f"]) == []
    )
