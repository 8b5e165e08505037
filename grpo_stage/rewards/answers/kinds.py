"""The kinds of answers (a number, a choice, several values, an interval, a formula, words), and which are equal."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from grpo_stage.rewards.answers.notation import plain
from grpo_stage.rewards.answers.numbers import MAX_CHARACTERS, Number, numbers_in
from grpo_stage.rewards.answers.stated_number import whole_number, without_unit_powers


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several options: `B`, `(B)`, `B. Paris`."""

    letter: str
    text: str
    """What the option says, or nothing."""


@dataclass(frozen=True, slots=True)
class Values:
    r"""Several values, in brackets or not: `(1, 2)`, `\{1, 2\}`, `1 or 2`; or an interval, such as `x \le 2`."""

    brackets: str
    r"""The opening and the closing one, or nothing; of relations `\cup` if "or" joins them, `\cap` if "and" does."""
    items: tuple["Kind", ...]


@dataclass(frozen=True, slots=True)
class Named:
    """A value with the name that it was given: `x = 7`, `f(x) = 2x`, `n > 3`."""

    name: str
    value: "Kind"


@dataclass(frozen=True, slots=True)
class Formula:
    """Mathematics that is no single number, in LaTeX."""

    latex: str


@dataclass(frozen=True, slots=True)
class Text:
    """What is compared as a whole: words, and times, ratios, dates, versions, code."""

    text: str
    is_token: bool = False
    """One run of digits and signs, such as `10:30`, that can be told from the words around it."""


Kind = Number | Choice | Values | Named | Formula | Text
AreEqual = Callable[[str, str], bool]
"""Decides whether two formulas, reference and answer, are equal."""


# Reading

_OPTION = re.compile(r"\(?([A-Z])\)?[.:)]?|\(([a-z])\)")
_OPTION_WITH_TEXT = re.compile(r"(?:\(([A-H])\)|([A-H])[.:)])\s*(\S.*)")
TOKEN = re.compile(
    r"(?<![\w.:/-])(?:v\d+(?:\.\d+)*|v?\d+(?:(?:\s?:\s?|[-/._])\d+)+)(?:\s?[ap]\.?m\b\.?)?(?![\w:/])(?!\.\d)",
    re.IGNORECASE,
)
NO_TOKEN = re.compile(r"\d+[./]\d+")
_NAME = r"(?:[a-zA-Z]|\\[a-z]+)(?:_\w|_\{\w+\})?(?:\([a-z]\))?|\([a-zA-Z](?:\s*,\s*[a-zA-Z])+\)"
_ASSIGNMENT = re.compile(rf"({_NAME})\s*(?:=|\\in(?![a-z]))\s*([^=]+)")
_RELATION = re.compile(r"\\le |\\ge |<|>")
_SEPARATOR = re.compile(r"[,;]\s*(?:or\b|and\b)?|\bor\b|\band\b|或者?|和|、", re.IGNORECASE)
_BRACKET = re.compile(r"\\?[(\[{]|\\?[)\]}]")
_LABEL = re.compile(
    r"\W*(?:about|approximately|approx|around|exactly|约|大约|共|一共|总共|=|\\approx)?[^\w\"'{[]*|[a-zA-Z\s]*:\W*",
    re.IGNORECASE,
)
_PROPER_NAME = re.compile(r"(?:[A-Z][a-z]+\s+){1,}[A-Z][a-z]+")
_RUN_OF_LETTERS = re.compile(r"(?<![\\A-Za-z])[a-zA-Z]{2,}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[^{}]*\}(?:\{[clr|]*\})?|\\[a-zA-Z]+")
_NO_PRODUCTS = frozenset(
    {"cm", "km", "kg", "mm", "or", "is", "if", "and", "the", "are", "for", "not", "no", "to", "by", "pm", "am"}
)
_TRAILING_UNIT = re.compile(r"(?<=[\w})])\s*(?<![\\A-Za-z])[a-zA-Z]{2,}(?:(?:\s+|/)[a-zA-Z]+)*(?:\^\{?[23]\}?)?$")
_WORDS = re.compile(r"(?<!\\)\b[^\W\d_]{3,}")
_EDGE = " .,:;!?\"'`*。，：；！？\n"  # noqa: RUF001


def read(text: str) -> Kind:
    """What `text` (as `plain` writes it) is as a whole; no `Choice`."""
    text = text.strip(_EDGE) if not re.search(r"\d!$", text) else text.strip()
    if len(text) > MAX_CHARACTERS // 4:
        return Text(normalized(text))
    if TOKEN.fullmatch(text) and not NO_TOKEN.fullmatch(text):
        return Text(token_of(text), is_token=True)
    if assignment := _ASSIGNMENT.fullmatch(text):
        value = read(assignment[2])
        return value if isinstance(value, Text) and not value.is_token else Named(_squeezed(assignment[1]), value)
    return _relation(text) or _values(text) or _number(text) or _formula(text) or Text(normalized(text))


@lru_cache(maxsize=256)
def read_reference(text: str) -> Kind:
    """What the final answer of a reference is. Unlike in `read`, a single letter is an option to choose."""
    if len(text) > MAX_CHARACTERS:
        return Text(normalized(text))
    text = plain(text)
    if option := _OPTION.fullmatch(text.strip()):
        return Choice((option[1] or option[2]).upper(), "")
    if option := _OPTION_WITH_TEXT.fullmatch(text.strip()):
        return Choice(option[1] or option[2], option[3])
    return read(text)


def _relation(text: str) -> Kind | None:
    """`x < 2` and `1 < x < 2` as the interval that they say."""
    parts = [part.strip() for part in _RELATION.split(text)]
    signs = [sign.strip() for sign in _RELATION.findall(text)]
    if not signs or not all(parts) or "=" in text:
        return None
    is_named = [re.fullmatch(_NAME, part) is not None for part in parts]
    if is_named == [False, True] or (is_named == [True, True] and signs[0] in (">", r"\ge")):
        parts, signs = parts[::-1], [_FLIPPED[signs[0]]]
    if len(parts) == 3 and {signs[0], signs[1]} <= {">", r"\ge"}:
        parts, signs = parts[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
    if len(parts) == 2 and re.fullmatch(_NAME, parts[0]):
        name, bound = parts[0], read(parts[1])
        if signs[0] in ("<", r"\le"):
            return Named(name, Values("(" + (")" if signs[0] == "<" else "]"), (Formula(r"-\infty"), bound)))
        return Named(name, Values(("(" if signs[0] == ">" else "[") + ")", (bound, Formula(r"\infty"))))
    if len(parts) == 3 and re.fullmatch(_NAME, parts[1]) and {signs[0], signs[1]} <= {"<", r"\le"}:
        brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
        return Named(parts[1], Values(brackets, (read(parts[0]), read(parts[2]))))
    return None


_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def _values(text: str) -> Kind | None:
    if r"\cup" in text:
        return _collection(r"\cup", text.split(r"\cup"))
    if r"\pm" in text and text.count(r"\pm") == 1 and not _SEPARATOR.search(text):
        right = text.rpartition("=")[2]
        return _collection(
            "", [right.replace(r"\pm", "+" if right.partition(r"\pm")[0].strip() else ""), right.replace(r"\pm", "-")]
        )
    if inner := _inside_brackets(text):
        brackets = (text[0] if text[0] != "\\" else text[1]) + text[-1]
        items = _split(inner)
        if len(items) > 1:
            return _collection(brackets, items)
        kind = read(inner)
        return None if isinstance(kind, Text) else kind
    if _number(text) is not None:  # `1,234`
        return None
    items = _split(text)
    values = _collection("", items) if len(items) > 1 else None
    if isinstance(values, Values) and all(
        isinstance(item, Named) and isinstance(item.value, Values) for item in values.items
    ):
        return replace(values, brackets=r"\cup" if re.search(r"\bor\b|或", text) else r"\cap")
    return values


def _collection(brackets: str, items: list[str]) -> Kind | None:
    kinds = tuple(read(item) for item in items)
    # `July 4, 1776` and `{"n": 1}` are texts.
    units = {tuple(words) for item in items if (words := _WORDS.findall(item))}
    is_text = any(isinstance(kind, Text) for kind in kinds) or len(units) > 1  # `2 apples and 3 pears`
    return None if is_text else Values(brackets, kinds)


def _inside_brackets(text: str) -> str:
    """What stands between the first character and its closing bracket, if that is the last."""
    opening = _BRACKET.match(text)
    if opening is None or opening[0][-1] in ")]}":
        return ""
    depth = 0
    for bracket in _BRACKET.finditer(text):
        depth += 1 if bracket[0][-1] in "([{" else -1
        if depth == 0:
            return text[opening.end() : bracket.start()].strip() if bracket.end() == len(text) else ""
    return ""


def _split(text: str) -> list[str]:
    """At commas and "or" that are in no brackets."""
    items, depth, start = [], 0, 0
    for found in re.compile(rf"{_BRACKET.pattern}|{_SEPARATOR.pattern}", re.IGNORECASE).finditer(text):
        if _BRACKET.fullmatch(found[0]):
            depth += 1 if found[0][-1] in "([{" else -1
        elif depth == 0:
            items.append(text[start : found.start()].strip())
            start = found.end()
    items.append(text[start:].strip())
    return [item for item in items if item]


def _number(text: str) -> Number | None:
    """The number that `text` is, beside a label and a unit."""
    left, _, text = without_unit_powers(text).rpartition("=")
    number = None if re.search("[a-zA-Z]", left) else whole_number(text)
    if number is None:
        return None
    found = numbers_in(text)
    before, after = text[: found[0].start], text[found[-1].end :]
    return None if not _LABEL.fullmatch(before) or len(found) > 1 or _PROPER_NAME.search(after) else number


def _formula(text: str) -> Formula | None:
    if re.search(r"\d", text) or "\\" in text:
        text = _TRAILING_UNIT.sub("", text)
    runs = _RUN_OF_LETTERS.findall(_ENVIRONMENT.sub(" ", text))
    is_mathematical = bool(re.search(r"[\d\\^+*/=]|^-?[a-zA-Z]$|^[a-zA-Z]{1,2}$|[a-z]\s*-\s*[a-z]|_", text))
    if not re.search(r"[a-zA-Z\\^+*/=!-]", text.lstrip("-")):
        return None  # digits, which `_number` did not take for a number
    if any(len(run) > 3 or run.lower() in _NO_PRODUCTS for run in runs) or not is_mathematical:
        return None
    if re.search(r"[^\x00-\x7f]|[\"'@?]|(?<![\\A-Za-z])[A-Za-z]{2,} [A-Za-z]{2,}|(?<![_^\d])\d+\ +\d|://", text):
        return None
    return Formula(text)


# Comparing


def is_same(reference: Kind, answer: Kind, are_equal: AreEqual) -> bool:
    """True where `answer` states what `reference` does. `are_equal` is asked about formulas alone."""
    match reference, answer:
        case Named(), Named():
            return _is_same_name(reference.name, answer.name) and is_same(reference.value, answer.value, are_equal)
        case Named(), _:
            return is_same(reference.value, answer, are_equal)
        case Formula(), Named(value=Formula() as value) if "=" in reference.latex:  # an equation, solved for a name
            return are_equal(reference.latex, f"{answer.name}={value.latex}")
        case _, Named():
            return is_same(reference, answer.value, are_equal)
        case Number(), Number():
            return answer.equals(reference)
        case Values(), Values():
            return _are_same_values(reference, answer, are_equal)
        case Text(), Text():
            return reference.text == answer.text != ""
        case Formula(), Formula():
            return _squeezed(reference.latex) == _squeezed(answer.latex) or are_equal(reference.latex, answer.latex)
        case Formula(), Number():
            return are_equal(reference.latex, _latex(answer))
    return False


def _is_same_name(one: str, other: str) -> bool:
    """`x_1` is a value of x."""
    bare = [name.rstrip("0123456789") for name in (one, other)]
    return one == other or (bare[0] == bare[1] and bare[0] in (one, other))


def _are_same_values(reference: Values, answer: Values, are_equal: AreEqual) -> bool:
    def same(one: Kind, other: Kind) -> bool:
        return is_same(one, other, are_equal)

    brackets = {reference.brackets, answer.brackets}
    # Without brackets it may be a tuple or a set, but no interval.
    if len(brackets) > 1 and ("" not in brackets or not brackets <= {"", "()", "{}"}):
        return False
    if any(one.startswith(("(", "[")) for one in brackets):
        return len(reference.items) == len(answer.items) and all(map(same, reference.items, answer.items))
    return all(any(same(one, other) for other in answer.items) for one in reference.items) and all(
        any(same(one, other) for one in reference.items) for other in answer.items
    )


def _latex(number: Number) -> str:
    return rf"\frac{{{number.value.numerator}}}{{{number.value.denominator}}}"


def normalized(text: str) -> str:
    """`text` without regard to case, white space and surrounding punctuation; `H_2O` is H2O."""
    text = re.sub(r"(?<=[A-Za-z])_\{?(\d+)\}?", r"\1", text)
    words = " ".join(text.casefold().split()).strip(" .,:;!?\"'`*$()。，：；！？（）")  # noqa: RUF001
    return f"{words}!" if re.search(r"\d!\W*$", text) else words  # a factorial


def _squeezed(text: str) -> str:
    """A formula without white space, a leading plus and needless braces."""
    return re.sub(r"\s|^\+|(?<=[A-Za-z])_(?=\d)|(?<=\^|_)\{(?=\w\})|(?<=[\^_]\{\w)\}", "", text)


def token_of(text: str) -> str:
    """A time, ratio, date or version without white space, braces and the points of `p.m.`."""
    return re.sub(r"[\s{}]|(?<=[ap])\.|\.$", "", text.casefold())
