"""Which one number an answer states, of all the numbers that are in it."""

import re
from collections.abc import Sequence
from itertools import pairwise

from grpo_stage.rewards.answers.final_answer import FinalAnswer, Place
from grpo_stage.rewards.answers.notation import plain
from grpo_stage.rewards.answers.numbers import MAX_CHARACTERS, Found, Number, numbers_in


# The ends of `7 cm^2` and `7 km/h`, which are no power and no division of the number.
_UNIT_ENDINGS = [
    re.compile(r"((?<![A-Za-z\\])(?:[a-zA-Z]{2,}|[msgL])\s?)\^\s?(?:\{\s*-?[1-4]\s*\}|-?[1-4])"),
    re.compile(
        r"((?:(?<=\d)|(?<=\d\s))[a-zA-Z]+|(?<![\\A-Za-z])[a-zA-Z]{2,}|\d(?=/[a-zA-Z]{2}))\s?(?:/|\bper\b)\s?[a-zA-Z]+"
    ),
]
_JOINT = re.compile(
    r"[\s$]*(?:,\s*(?:or|and)?|;|/|\bor\b|\band\b|\bto\b|或者?|和|、|&|-|~|\|)?(?:\s*[a-zA-Z]\s*=)?[\s$]*",
    re.IGNORECASE,
)
_JOINT_WITH_UNIT = re.compile(
    r"\s*(?:[A-Za-z]+\s+|[^\W\d_A-Za-z]{0,3})?(?:,?\s*\bor\b|,?\s*\band\b|\bto\b|或者?|和|、)(?:\s*[a-zA-Z]\s*=)?\s*",
    re.IGNORECASE,
)
_EITHER = re.compile(r"[^.!?。\n]*(?:\bor\b|或)", re.IGNORECASE)
_COMPOUND = re.compile(
    r"\s*(?:hours?|hrs?|h|minutes?|mins?|days?|weeks?|months?|years?|km|m|kg|feet|ft|dollars?|pounds?|lbs?)\s*,?\s*(?:and\s*)?"
)
"""Between the parts of one quantity: `3 hours and 20 minutes`."""
_EQUALS = re.compile(r"=|\\approx|\\equiv")
_SENTENCE_END = re.compile(r"(?<!\.)[.!?](?=\s|$)|[。！？；;\n]")  # noqa: RUF001
_REASON = re.compile(
    r"\b(?:because|since|as|where|which|so|given)\b|\s\(|,\s*(?=[^\W\d_]{2,}|[^\x00-\x7f])|\s-\s+(?=[a-zA-Z])",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]{2,}")
_CALCULATION = re.compile(r"[=<>+*^]|\\[a-z]")


def number_in(answer: FinalAnswer) -> Number | None:
    """The one number that `answer` states; None where it states none, several, or one left to be worked out."""
    if answer.place is Place.TEXT or len(answer.text) > MAX_CHARACTERS:
        return _last_number(without_unit_powers(plain(_around_the_last_digit(answer.text))))
    text = without_unit_powers(plain(answer.text))
    return _first_number(text) if answer.place is Place.PHRASE else whole_number(text)


def whole_number(text: str) -> Number | None:
    """The number that all of `text` states, beside a label and a unit. `text` is as `plain` writes it."""
    right = _EQUALS.split(text)[-1]
    found = numbers_in(right)
    if not found:
        return None
    if _distinct(found) > 1:
        return _last_number(right) if len(_WORD.findall(right)) > 5 else None
    outside = right[: found[0].start] + right[found[-1].end :].replace("!", "^")  # a factorial, no exclamation
    return None if _CALCULATION.search(outside) else found[-1].number


def without_unit_powers(text: str) -> str:
    """`7 cm^2` and `7 km/h` as `7 cm` and `7 km`."""
    for ending in _UNIT_ENDINGS:
        text = ending.sub(r"\1", text)
    return text


def _first_number(text: str) -> Number | None:
    """7 of `7, since 3 + 4`, and 37 of `12 + 25 = 37`."""
    end = _SENTENCE_END.search(text)
    sentence = text[: end.start()] if end and numbers_in(text[: end.start()]) else text
    found = numbers_in(sentence)
    if not found:
        return None
    if reason := _REASON.search(sentence, found[0].end):
        sentence = sentence[: reason.start()]
    parts = [part for part in _EQUALS.split(sentence) if numbers_in(part)]
    sentence = parts[-1]
    found = numbers_in(sentence)
    joined = found[:1]
    for one, other in pairwise(found):
        joint = sentence[one.end : other.start]
        if not _JOINT.fullmatch(joint) and not _JOINT_WITH_UNIT.fullmatch(joint):
            break
        joined.append(other)
    return found[0].number if _distinct(joined) == 1 else None


def _last_number(text: str) -> Number | None:
    """The last number, unless it is one of several that are listed, or a part of one quantity."""
    found = numbers_in(text)
    if not found:
        return None
    joined = found[-1:]
    joints: list[str] = []
    for one in reversed(found[:-1]):
        joint = text[one.end : joined[0].start]
        if "\n" in joint or not _JOINT.fullmatch(joint):
            break
        joined.insert(0, one)
        joints.append(joint)
    if _distinct(joined) == 1:
        before = found[-2].end if len(joined) == 1 < len(found) else found[-1].start
        is_one_of_several = _EITHER.match(text, before, found[-1].start) or _COMPOUND.fullmatch(
            text, before, found[-1].start
        )
        is_factorial = not _WORD.search(text) and text.endswith("!")
        return None if is_one_of_several or is_factorial else found[-1].number
    # `In 2020, 7 came` is no list; `6, 7`, `6 or 7` and `5, 6, 7` are.
    is_at_the_end = not _WORD.search(text[found[-1].end :].partition("\n")[0])
    is_list = len(joined) > 2 or is_at_the_end or any("," not in joint for joint in joints)
    return None if is_list or text[: joined[0].start].rstrip().endswith(("(", "[", "{")) else found[-1].number


def _distinct(found: Sequence[Found]) -> int:
    """How many different values there are."""
    return len({one.number.value if one.number else None for one in found})


def _around_the_last_digit(text: str) -> str:
    if len(text) <= MAX_CHARACTERS // 2:
        return text
    last = next((i for i in range(len(text) - 1, -1, -1) if text[i].isnumeric()), len(text))
    start, end = max(0, last - MAX_CHARACTERS // 2), last + MAX_CHARACTERS // 4
    part = text[start:end]
    # Drop the words at both cuts: a number that is cut in two is another number.
    if start > 0:
        part = part.lstrip().partition(" ")[2]
    return part if end >= len(text) else part.rpartition(" ")[0]
