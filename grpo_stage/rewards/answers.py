"""Rewards that compare a completion with the reference: `accuracy` and `exact_match`."""

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from grpo_stage.rewards.workers import RewardContext


_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ANSWER_PHRASE = re.compile(r"\banswer\s*(?:is\b|:)\s*:?([^\n]*)", re.IGNORECASE)
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
# math-verify sees a number only after white space: not in `answer:7`, nor after a Chinese character.
_GLUED_ANSWER = re.compile(
    r"(?<=answer:)(?=\S)|(?<=[\u3000-\u303f\u3400-\u9fff\uff00-\uffef])(?=[-\d$\\.])", re.IGNORECASE
)
_PLAIN_NUMBER = re.compile(r"[-+]?\$?\s*(?:\d[\d,]*(?:\.\d*)?|\.\d+)")
_GROUPED_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+|\s*/\s*0*[1-9]\d*)?")
_BARE_POINT = re.compile(r"(?<!\d)\.(?=\d)")
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_DELIMITER = re.compile(r"\$|\\\(|\\\[|\\boxed")


def accuracy(context: "RewardContext", timeout: float = 5.0) -> Callable[..., list[float | None]]:
    r"""1 where the completion's final answer equals the reference's, else 0; None where deciding took too long.

    Range {0, 1}. Needs references. The final answer of either side is, in this order: what stands in the last
    `<answer>...</answer>`; in the last `\boxed{...}`; after GSM8K's `####`; failing these, what math-verify extracts
    from the whole text (an "answer is ..." phrase first, then the last formula or number: `7 or 8` answers 8). In a
    reference `####` may stand anywhere, in a completion only in the last line, since it also makes headings. Only what
    follows `</think>` is looked at. A completion that is empty or never leaves `<think>` scores 0. So does one
    truncated before its answer, unless the last number it had reached happens to be right.

    The answers are compared by math-verify: `1/2`, `0.5` and `\frac{1}{2}` are equal. Two rules are ours. Where the
    reference is a plain number, a calculation that was not worked out (`3 + 4` for 7, `12 / 3` for 4) scores 0, or
    repeating the question would be an answer. And where math-verify reads no mathematics in the reference (`Paris`,
    `B`), both answers are compared as text, regardless of case, white space, surrounding punctuation and `\text{}`.
    A reference with a number in it is compared by that number: `7 apples` is 7.

    A completion on which math-verify takes longer than `timeout` is None, logged, and counted in `accuracy/timeouts`.

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
            float(_answer_tag(completion).strip() == reference.strip())
            for completion, reference in zip(completions, references, strict=True)
        ]

    return score


def seconds(name: str, value: Any) -> float:
    """`value` as a time limit, or ValueError."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}: it must be a number of seconds above 0")
    return float(value)


def is_same_text(completion: str, reference: str) -> bool:
    """True where both sides state the answer in the same words: decided without math-verify."""
    answer = _normalize(final_answer(completion))
    return bool(answer) and answer == _normalize(final_answer(reference, is_reference=True))


def is_correct(completion: str, reference: str) -> bool:
    """What `accuracy` says. Runs in a worker, since math-verify may take arbitrarily long."""
    from math_verify import verify

    if is_same_text(completion, reference):
        return True
    answer = final_answer(completion)
    gold_text = final_answer(reference, is_reference=True)
    gold = _parse_reference(gold_text)
    if not gold:
        # Both sides in words. Only here may a phrase stand for a mark: math-verify knows the phrase for mathematics.
        phrases = _ANSWER_PHRASE.findall(answer)
        return bool(phrases) and _normalize(phrases[-1]) == _normalize(gold_text)
    predicted = _parse(answer)
    number = gold_text.strip().rstrip(".")
    if _PLAIN_NUMBER.fullmatch(number) and any(_is_unfinished(expression, number) for expression in predicted):
        return False
    return verify(gold, predicted, timeout_seconds=None)


def final_answer(text: str, *, is_reference: bool = False) -> str:
    """The part of `text` that states the answer: marked by tags, a box or `####`, else everything after `</think>`."""
    if "</think>" in text:
        text = text.rpartition("</think>")[2]
    elif "<think>" in text:
        return ""
    text = _answer_tag(text)
    if (boxed := _last_boxed(text)) is not None:
        return boxed
    if is_reference and "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0]
    text = text.strip()
    _, hashes, answer = text.rpartition("\n")[2].partition("####")
    return answer.strip() if hashes else text


def voted_answer(completion: str) -> str | None:
    r"""What `completion` votes for in maj@k: the same text for the same answer; None where it is empty or unfinished.

    The final answer as `accuracy` finds it, or failing marks and an "answer is ..." phrase the last number of a
    sentence, or all of it. Regardless of case, white space and surrounding punctuation, and of how a number is written
    (`1,000.0`, `3/6`). Formulas are compared as text: deciding which are equal may take arbitrarily long.
    """
    answer = _BARE_POINT.sub("0.", final_answer(completion))
    if phrases := _ANSWER_PHRASE.findall(answer):
        answer = phrases[-1]
    is_sentence = "\\" not in answer and _WORD.search(answer)
    if is_sentence and (numbers := _GROUPED_NUMBER.findall(answer)):
        answer = numbers[-1]
    text = _normalize(answer)
    if len(text) > 100 or not _GROUPED_NUMBER.fullmatch(text):
        return text or None
    return str(Fraction(text.replace(",", "").replace(" ", "")))


def _answer_tag(text: str) -> str:
    # Not beyond the last closing tag: each opening one would be followed to the end of the text.
    tags = _ANSWER_TAG.findall(text, 0, text.rfind("</answer>") + len("</answer>"))
    return tags[-1] if tags else text


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip()
    return None


def _normalize(text: str) -> str:
    text = _TEXT_COMMAND.sub(r"\1", _BOLD.sub(r"\1", text))
    return " ".join(text.casefold().split()).strip(" .,:;!?\"'`*$()。，：；！？（）")  # noqa: RUF001


@lru_cache(maxsize=256)
def _parse_reference(text: str) -> list[Any]:
    return _parse(text)


def _parse(text: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    text = _GLUED_ANSWER.sub(" ", _BOLD.sub(r"\1", text).replace("\N{MINUS SIGN}", "-"))
    if _is_bare_formula(text):
        text = f"\\boxed{{{text}}}"
    return parse(
        text,
        extraction_config=(LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()),
        # Not the matched string where parsing fails: text is compared by our own rule.
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )


def _is_bare_formula(text: str) -> bool:
    r"""True for `x^2+1`, `\sqrt{2}\text{ cm}`, `(1, 2)`: LaTeX that math-verify would not see without a delimiter."""
    rest = _TEXT_COMMAND.sub("", text).strip()
    if not rest or "\n" in rest or _DELIMITER.search(rest) or _WORD.search(_COMMAND.sub("", rest)):
        return False
    return "\\" in rest or any(c in "([{" for c in rest) or (any(c in "^_=+-*/" for c in rest) and _has_letter(rest))


def _has_letter(text: str) -> bool:
    return any(c.isalpha() for c in text)


def _is_unfinished(expression: Any, reference: str) -> bool:
    """True for arithmetic left undone; a percentage, `3 * 10^8` and a fraction for 0.75 are numbers."""
    import sympy  # type: ignore[import-untyped]

    if isinstance(expression, sympy.Eq):
        expression = expression.rhs
    if not isinstance(expression, sympy.Basic):
        return False
    is_whole = "." not in reference
    return any(_is_operation(node, is_whole) for node in sympy.preorder_traversal(expression))


def _is_operation(node: Any, with_division: bool) -> bool:
    if node.is_Mul:
        return len([factor for factor in node.args if factor.is_Number and abs(factor) > 1]) > 1
    if node.is_Pow and node.base.is_Number and node.exp.is_Integer:
        return node.base != 10 if node.exp > 0 else with_division
    return bool(node.is_Add)
