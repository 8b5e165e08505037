"""Whether a completion's final answer is the reference's, and which answer a completion votes for."""

from grpo_stage.rewards.answers.final_answer import final_answer
from grpo_stage.rewards.answers.formulas import are_equal
from grpo_stage.rewards.answers.kinds import AreEqual, Text, normalized
from grpo_stage.rewards.answers.notation import plain
from grpo_stage.rewards.answers.numbers import MAX_CHARACTERS, Number
from grpo_stage.rewards.answers.stated_number import number_in
from grpo_stage.rewards.answers.statements import is_stated, letter_in, read_final


_MAX_WORDS = 8
"""An answer of more words can be put in too many ways to be compared as text."""


def verdict_without_formulas(completion: str, reference: str) -> bool | None:
    """What `is_correct` says, or None where only math-verify can tell. Takes no longer than reading the texts."""
    try:
        return _is_correct(completion, reference, _undecided)
    except _UndecidedError:
        return None


def is_correct(completion: str, reference: str) -> bool:
    """The verdict of `accuracy`. Runs in a worker, since math-verify may take for ever."""
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
    """Why only a copy of `reference` would be judged correct; empty where other completions can be, too."""
    gold = final_answer(reference, is_reference=True)
    if not _as_text(gold.text):
        return "states no final answer"
    kind = read_final(gold)
    if not isinstance(kind, Text) or kind.is_token:
        return ""
    if "\n" in gold.text or len(gold.text.split()) > _MAX_WORDS:
        return "is prose or code"
    return "is JSON" if gold.text.startswith(("{", "[")) else ""


def voted_answer(text: str, *, is_reference: bool = False) -> str | None:
    r"""What a completion votes for in maj@k: equal texts for equal answers; None if it is empty or unfinished.

    The final answer as `accuracy` finds it: the value of a number however it is written (`1,000.0`, `3/6`), the letter
    of an option, else the text regardless of case, white space and surrounding punctuation. Formulas are compared as
    text: deciding which are equal may take arbitrarily long.

    Args:
        text: a completion, or a reference answer.
        is_reference: it is a reference.
    """
    answer = final_answer(text, is_reference=is_reference)
    if (number := number_in(answer)) is not None:
        return str(number.value)
    return letter_in(answer) or _as_text(answer.text) or None


def _as_text(text: str) -> str:
    return normalized(plain(text) if len(text) <= MAX_CHARACTERS else text)
