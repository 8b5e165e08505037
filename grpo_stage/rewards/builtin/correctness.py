"""Rewards that compare a completion with the reference: `accuracy` and `exact_match`."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from grpo_stage.rewards.answers.final_answer import answer_tag, final_answer
from grpo_stage.rewards.answers.formulas import are_equal
from grpo_stage.rewards.answers.kinds import AreEqual, Text, normalized
from grpo_stage.rewards.answers.notation import plain
from grpo_stage.rewards.answers.numbers import MAX_CHARACTERS, Number, number_in
from grpo_stage.rewards.answers.statements import is_stated, letter_in, read_final


if TYPE_CHECKING:
    from grpo_stage.rewards.workers.answer_checker import RewardContext


_MAX_WORDS = 8
"""Of an answer in words: a longer one can be put in too many ways."""


def accuracy(context: "RewardContext", timeout: float = 5.0) -> Callable[..., list[float | None]]:
    r"""1 where the completion's final answer equals the reference's, else 0; None where deciding took too long.

    Range {0, 1}. Needs references. `final_answer` says where either side states its answer, `kinds` what it may be: a
    number, a choice, several values, an interval, a formula, or words. A number has to be stated, not left to be
    worked out (`3 + 4` for 7), and alone: `6 or 7` is no answer. Numbers are compared up to a relative 1e-9, whole
    ones exactly, without regard to unit, currency and notation; formulas as math-verify does; all else as text,
    regardless of case, white space and surrounding punctuation.

    A completion that is empty or never leaves `<think>` scores 0. So does one truncated before its answer, unless the
    last number it had reached happens to be right. One on which math-verify takes longer than `timeout` is None,
    logged, and counted in `accuracy/timeouts`.

    Args:
        timeout: seconds for one completion.
    """
    timeout = seconds("timeout", timeout)

    def score(completions: Sequence[str], references: Sequence[str]) -> list[float | None]:
        return context.judge("accuracy", completions, references, timeout)

    return score


def exact_match(context: "RewardContext") -> Callable[..., list[float]]:
    """1 where the text equals the reference, else 0.

    Range {0, 1}. Needs references. The text is what stands in the last `<answer>...</answer>`, or the whole completion
    where there are no such tags. White space around text and reference is ignored, everything else counts.
    """

    def score(completions: Sequence[str], references: Sequence[str]) -> list[float]:
        return [
            float(_tagged(completion).strip() == reference.strip())
            for completion, reference in zip(completions, references, strict=True)
        ]

    return score


def _tagged(completion: str) -> str:
    tagged = answer_tag(completion)
    return completion if tagged is None else tagged


def seconds(name: str, value: Any) -> float:
    """`value` as a time limit, or ValueError."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}: it must be a number of seconds above 0")
    return float(value)


def verdict_without_formulas(completion: str, reference: str) -> bool | None:
    """What `is_correct` says, or None where math-verify has to be asked. Takes no longer than reading the texts."""
    try:
        return _is_correct(completion, reference, _undecided)
    except _UndecidedError:
        return None


def is_correct(completion: str, reference: str) -> bool:
    """What `accuracy` says. Runs in a worker, since math-verify may take arbitrarily long."""
    return _is_correct(completion, reference, are_equal)


def _is_correct(completion: str, reference: str, are_equal: AreEqual) -> bool:
    answer, gold = final_answer(completion), final_answer(reference, is_reference=True)
    if not answer.text:
        return False
    kind = read_final(gold)
    is_word_for_word = _as_text(answer.text) == _as_text(gold.text) != ""
    return (is_word_for_word and not isinstance(kind, Number)) or is_stated(kind, answer, are_equal)


class _UndecidedError(Exception):
    """Only math-verify can tell."""


def _undecided(reference: str, answer: str) -> bool:
    raise _UndecidedError


def unjudged_reason(reference: str) -> str:
    """Why no completion but a copy of `reference` would be judged correct; empty where others can be."""
    gold = final_answer(reference, is_reference=True)
    if not _as_text(gold.text):
        return "states no final answer"
    kind = read_final(gold)
    if not isinstance(kind, Text) or kind.is_token:
        return ""
    if "\n" in gold.text or len(gold.text.split()) > _MAX_WORDS:
        return "is prose or code"
    return "is JSON" if gold.text.startswith(("{", "[")) else ""


def voted_answer(completion: str) -> str | None:
    r"""What `completion` votes for in maj@k: the same text for the same answer; None where it is empty or unfinished.

    The final answer as `accuracy` finds it: the value of a number however it is written (`1,000.0`, `3/6`), the letter
    of an option, else the text regardless of case, white space and surrounding punctuation. Formulas are compared as
    text: deciding which are equal may take arbitrarily long.
    """
    answer = final_answer(completion)
    if (number := number_in(answer)) is not None:
        return str(number.value)
    return letter_in(answer) or _as_text(answer.text) or None


def _as_text(text: str) -> str:
    return normalized(plain(text) if len(text) <= MAX_CHARACTERS else text)
