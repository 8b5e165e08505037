"""What an answer is: a number, a choice, several values, an interval, a formula, or words; and which are the same."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from grpo_stage.rewards.final_answer import FinalAnswer, Place
from grpo_stage.rewards.notation import plain
from grpo_stage.rewards.numbers import (
    MAX_CHARACTERS,
    Number,
    number_in,
    numbers_in,
    whole_number,
    without_unit_powers,
)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several options: `B`, `(B)`, `B. Paris`."""

    letter: str
    text: str
    """What the option says, or nothing."""


@dataclass(frozen=True, slots=True)
class Values:
    r"""Several values in brackets or without: `(1, 2)`, `\{1, 2\}`, `1 or 2`, an interval; `x \le 2` is `(-\infty, 2]`."""

    brackets: str
    r"""The two that stand around, without backslash; nothing where there are none; `\cup` and `\cap` of relations joined by or, and."""
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
    """Words; and times, ratios, dates, versions, code: all that is compared as a whole."""

    text: str
    is_token: bool = False
    """One run of digits and signs, such as `10:30`, that can be told from the words around it."""


Kind = Number | Choice | Values | Named | Formula | Text
AreEqual = Callable[[str, str], bool]
"""Decides about two formulas."""


# Reading

_OPTION = re.compile(r"\(?([A-Z])\)?[.:)]?|\(([a-z])\)")
_OPTION_WITH_TEXT = re.compile(r"(?:\(([A-H])\)|([A-H])[.:)])\s*(\S.*)")
_TOKEN = re.compile(
    r"(?<![\w.:/-])(?:v\d+(?:\.\d+)*|v?\d+(?:(?:\s?:\s?|[-/._])\d+)+)(?:\s?[ap]\.?m\b\.?)?(?![\w:/])(?!\.\d)", re.IGNORECASE
)
_NO_TOKEN = re.compile(r"\d+[./]\d+")
_NAME = r"(?:[a-zA-Z]|\\[a-z]+)(?:_\w|_\{\w+\})?(?:\([a-z]\))?|\([a-zA-Z](?:\s*,\s*[a-zA-Z])+\)"
_ASSIGNMENT = re.compile(rf"({_NAME})\s*(?:=|\\in(?![a-z]))\s*([^=]+)")
_RELATION = re.compile(r"\\le |\\ge |<|>")
_SEPARATOR = re.compile(r"[,;]\s*(?:or\b|and\b)?|\bor\b|\band\b|或者?|和|、", re.IGNORECASE)
_BRACKET = re.compile(r"\\?[(\[{]|\\?[)\]}]")
_LABEL = re.compile(
    r"\W*(?:about|approximately|approx|around|exactly|约|大约|共|一共|总共|=|\\approx)?[^\w\"'{[]*|[a-zA-Z\s]*:\W*", re.IGNORECASE
)
_PROPER_NAME = re.compile(r"(?:[A-Z][a-z]+\s+){1,}[A-Z][a-z]+")
_RUN_OF_LETTERS = re.compile(r"(?<![\\A-Za-z])[a-zA-Z]{2,}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[^{}]*\}(?:\{[clr|]*\})?|\\[a-zA-Z]+")
_NO_PRODUCTS = frozenset({"cm", "km", "kg", "mm", "or", "is", "if", "and", "the", "are", "for", "not", "no", "to", "by", "pm", "am"})
_TRAILING_UNIT = re.compile(r"(?<=[\w})])\s*(?<![\\A-Za-z])[a-zA-Z]{2,}(?:\s+[a-zA-Z]+)*$")
_EDGE = " .,:;!?\"'`*。，：；！？\n"  # noqa: RUF001


def read(text: str) -> Kind:
    """What `text` (as `plain` writes it) is as a whole; no `Choice`."""
    text = text.strip(_EDGE) if not re.search(r"\d!$", text) else text.strip()
    if len(text) > MAX_CHARACTERS // 4:
        return Text(normalized(text))
    if _TOKEN.fullmatch(text) and not _NO_TOKEN.fullmatch(text):
        return Text(_token(text), is_token=True)
    if assignment := _ASSIGNMENT.fullmatch(text):
        value = read(assignment[2])
        return value if isinstance(value, Text) and not value.is_token else Named(_squeezed(assignment[1]), value)
    return _relation(text) or _values(text) or _number(text) or _formula(text) or Text(normalized(text))


@lru_cache(maxsize=256)
def read_reference(text: str) -> Kind:
    """What a reference's final answer is: here a single letter is an option to choose, and a sentence has a number."""
    if len(text) > MAX_CHARACTERS:
        return Text(normalized(text))
    text = plain(text)
    if option := _OPTION.fullmatch(text.strip()):
        return Choice((option[1] or option[2]).upper(), "")
    if option := _OPTION_WITH_TEXT.fullmatch(text.strip()):
        return Choice(option[1] or option[2], option[3])
    return read(text)


def read_final(answer: FinalAnswer) -> Kind:
    """What a reference states, given where it says so."""
    kind = read_reference(answer.text)
    if not isinstance(kind, Text) or kind.is_token or answer.place is Place.MARK:
        return kind
    if answer.place is Place.PHRASE:
        if (number := number_in(answer)) is not None:
            return number
        clause = _REASON.split(_SENTENCE.split(plain(answer.text[:MAX_CHARACTERS]))[0])[0]
        return read_reference(clause)
    if is_prose(answer.text) and (number := number_in(answer)) is not None:
        return number
    return kind


def is_prose(text: str) -> bool:
    """True of sentences, which say more than an answer does."""
    return len(text.split()) > 5 or "\n" in text


def _relation(text: str) -> Kind | None:
    parts = [part.strip() for part in _RELATION.split(text)]
    signs = [sign.strip() for sign in _RELATION.findall(text)]
    if not signs or not all(parts) or "=" in text:
        return None
    if len(parts) == 2 and re.fullmatch(_NAME, parts[1]) and not re.fullmatch(_NAME, parts[0]):
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
        name, _, right = text.rpartition("=")
        return _collection("", [right.replace(r"\pm", "+" if right.partition(r"\pm")[0].strip() else ""), right.replace(r"\pm", "-")])
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
    if isinstance(values, Values) and all(isinstance(item, Named) and isinstance(item.value, Values) for item in values.items):
        return replace(values, brackets=r"\cup" if re.search(r"\bor\b|或", text) else r"\cap")
    return values


def _collection(brackets: str, items: list[str]) -> Kind | None:
    kinds = tuple(read(item) for item in items)
    # `July 4, 1776` and `{"n": 1}` are texts.
    return None if any(isinstance(kind, Text) for kind in kinds) else Values(brackets, kinds)


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
    left, _, text = without_unit_powers(text).rpartition("=")
    number = None if re.search("[a-zA-Z]", left) else whole_number(text)
    if number is None:
        return None
    found = numbers_in(text)
    before, after = text[: found[0].start], text[found[-1].end :]
    return None if not _LABEL.fullmatch(before) or len(found) > 1 or _PROPER_NAME.search(after) else number


def _formula(text: str) -> Formula | None:
    text = without_unit_powers(text)
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
            return reference.name == answer.name and is_same(reference.value, answer.value, are_equal)
        case Named(), _:
            return is_same(reference.value, answer, are_equal)
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


def needs_formulas(kind: Kind) -> bool:
    """True where math-verify may have to be asked."""
    match kind:
        case Named():
            return needs_formulas(kind.value)
        case Values():
            return any(needs_formulas(item) for item in kind.items)
    return isinstance(kind, Formula)


def _latex(number: Number) -> str:
    if number.num_decimals is not None and number.value.denominator > 1:
        return f"{float(number.value):.{number.num_decimals}f}"
    return rf"\frac{{{number.value.numerator}}}{{{number.value.denominator}}}"


def normalized(text: str) -> str:
    """`text` without regard to case, white space and surrounding punctuation; `H_2O` is H2O."""
    text = re.sub(r"(?<=[A-Za-z])_\{?(\d+)\}?", r"\1", text)
    words = " ".join(text.casefold().split()).strip(" .,:;!?\"'`*$()。，：；！？（）")  # noqa: RUF001
    return f"{words}!" if re.search(r"\d!\W*$", text) else words  # a factorial


def _squeezed(text: str) -> str:
    return re.sub(r"\s|^\+|(?<=[A-Za-z])_(?=\d)|(?<=\^|_)\{(?=\w\})|(?<=[\^_]\{\w)\}", "", text)


def _token(text: str) -> str:
    return re.sub(r"[\s{}]|(?<=[ap])\.|\.$", "", text.casefold())


# Answers in a completion

_SENTENCE = re.compile(r"(?<!\b[A-Z])[.!?](?=\s|$)|[。！？；;]")  # noqa: RUF001
_REASON = re.compile(
    r",?\s+\(?(?:because|since|as|so that)\b|,\s*(?:it|the|which|that|this|they|he|she|we|there|so|an?|for|where|not)\b"
    r"|[,，]\s*(?:因为|由于|所以|谢谢|因此|不)|\s\((?=[a-z]{2,})",  # noqa: RUF001
    re.IGNORECASE,
)
_IS = re.compile(r"\b(?:is|are|equals?|be|was|were|gives?|get|becomes?)\b(?!\s+not\b):?|[:：=](?!\d)|(?<!不)[是为有]")  # noqa: RUF001
_DOUBT = re.compile(r"\bnot\b|n't\b|\bwhether\b|\bif\b|不", re.IGNORECASE)
_PREPOSITION = re.compile(r"^(?:on|in|at|the|about)\s+", re.IGNORECASE)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_YES_OR_NO = re.compile(r"\b(?:yes|no|true|false)\b", re.IGNORECASE)
_OR = re.compile(r"\s*(?:,|or|and|,\s*or|,\s*and|或者?|和)\s*", re.IGNORECASE)


def is_stated(reference: Kind, answer: FinalAnswer, are_equal: AreEqual) -> bool:
    """True where `answer`, of a completion, states the reference."""
    match reference:
        case Number():
            number = number_in(answer)
            return number is not None and number.equals(reference)
        case Choice():
            return _is_chosen(reference, answer, are_equal)
        case Named(value=Number() as value) if (number := number_in(answer)) is not None:
            kinds = [read(text) for text in _readings(answer)]
            has_other_name = any(isinstance(kind, Named) and kind.name != reference.name for kind in kinds)
            return number.equals(value) and not has_other_name
    if isinstance(reference, Text):
        if reference.is_token and (token := _stated_token(answer)) is not None:
            return token == reference.text
        return any(normalized(text) == reference.text for text in _readings(answer))
    return any(is_same(reference, read(text), are_equal) for text in _readings(answer))


def _readings(answer: FinalAnswer) -> Iterator[str]:
    """What may be the answer in what was found, from all of it to its core, as `plain` writes it.

    Each is a part of the one before, so that no text can state two answers and be right with either.
    """
    seen = set()
    for part in _parts(answer):
        for text in (part, part.rpartition("=")[2].strip()):
            if text and text not in seen and len(text) <= MAX_CHARACTERS:
                seen.add(text)
                yield text


def _parts(answer: FinalAnswer) -> Iterator[str]:
    text = answer.text
    if len(text) <= MAX_CHARACTERS:
        yield plain(text)
    if answer.place is Place.TEXT:
        if yes_or_no := _yes_or_no(text):
            yield yes_or_no
            return
        text = text.rstrip().rpartition("\n")[2][-MAX_CHARACTERS:]
        sentence = plain(text).rstrip(" .。")
        formulas = _formulas(text, at_the_end=True)
    else:
        sentence = _SENTENCE.split(plain(text[:MAX_CHARACTERS]).partition("\n")[0])[0]
        formulas = _formulas(text[:MAX_CHARACTERS], at_the_end=False)
    yield sentence
    clause = _REASON.split(sentence)[0]
    yield clause
    if formulas:
        yield plain(formulas)
    elif (verbs := list(_IS.finditer(clause))) and not _DOUBT.search(clause):
        yield _PREPOSITION.sub("", clause[verbs[-1].end() :].strip())


def _yes_or_no(text: str) -> str:
    """Of `Yes. It is 5.` the word, if no other such word follows."""
    said = {word.lower() for word in _YES_OR_NO.findall(text[:MAX_CHARACTERS])}
    first = _YES_OR_NO.match(text)
    return said.pop() if first and len(said) == 1 else ""


def _formulas(text: str, *, at_the_end: bool) -> str:
    """The last or first formula of the text with those that are joined to it by commas or "or"."""
    found = list(_FORMULA.finditer(text))
    if not found:
        return ""
    if at_the_end:
        found.reverse()
    start, end = found[0].span()
    for one in found[1:]:
        between = text[one.end() : start] if at_the_end else text[end : one.start()]
        if not _OR.fullmatch(between):
            break
        start, end = min(start, one.start()), max(end, one.end())
    return text[start:end]


def _stated_token(answer: FinalAnswer) -> str | None:
    text = plain(answer.text[-MAX_CHARACTERS:] if answer.place is Place.TEXT else answer.text[:MAX_CHARACTERS])
    found = [token for token in _TOKEN.finditer(text) if not _NO_TOKEN.fullmatch(token[0])]
    if not found:
        return None
    tokens = [_token(token[0]) for token in found]
    if answer.place is Place.TEXT:
        is_listed = len(found) > 1 and _OR.fullmatch(text[found[-2].end() : found[-1].start()]) and tokens[-1] != tokens[-2]
        return None if is_listed else tokens[-1]
    return tokens[0] if len(set(tokens)) == 1 else None


_LETTER = re.compile(
    r"\W*(?:(?i:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer|选项|选择|选)\s*(?:is\b|是|为)?\s*:?\s*))?\W*"
    r"(?:(?P<capital>[A-Z])|(?P<small>[a-z])(?=[.):]|\W*$))(?![A-Za-z0-9'_^=])(?P<rest>.*)",
    re.DOTALL,
)
_REST = re.compile(r"\W*$|\s*[)\].:、]|\s*,\s*(?![A-Z]\b)|\s+(?:is|because|since|as|for)\b|\s*\(|[^\x00-\x7f]|\s*-\s|\s*\n|\s*=")
_ANOTHER_LETTER = re.compile(r"[\s)\]]*(?:,|/|&|\bor\b|\band\b|或者?|和|、|\s)+[\s(\[]*(?:or\b|and\b)?[\s(\[]*([A-Z])(?![A-Za-z'])")
_REFUTED = re.compile(r"[\s)\]]*(?:is|was)\s+(?:not|wrong|incorrect|false)\b|[\s)\]]*(?:isn't|不|错)")
_LETTER_IN_SENTENCE = re.compile(r"(?:\b(?:option|choice)\s+|选项?\s*)\(?([A-Z])(?![A-Za-z'])|\(([A-Z])\)", re.IGNORECASE)


def letter_in(answer: FinalAnswer) -> str | None:
    """The one option that `answer` chooses, or None."""
    text = plain(answer.text[:MAX_CHARACTERS] if answer.place is not Place.TEXT else answer.text[-MAX_CHARACTERS:])
    if answer.place is not Place.TEXT:
        return _letter_at_the_beginning(text)
    lines = [line for line in text.split("\n") if line.strip()]
    for line in lines[-1:] + lines[:1]:
        verbs = list(_IS.finditer(line))
        if letter := _letter_at_the_beginning(line) or (verbs and _letter_at_the_beginning(line[verbs[-1].end() :])):
            return letter
    last_sentence = [part for part in _SENTENCE.split(lines[-1]) if part.strip()][-1:] if lines else []
    letters = {one or other for part in last_sentence for one, other in _LETTER_IN_SENTENCE.findall(part)}
    return letters.pop().upper() if len(letters) == 1 and not re.search(r"\bnot\b|n't|不", last_sentence[0]) else None


def _letter_at_the_beginning(text: str) -> str | None:
    found = _LETTER.match(text)
    if found is None:
        return None
    letter, rest = (found["capital"] or found["small"]).upper(), found["rest"]
    another = _ANOTHER_LETTER.match(rest)
    if (another and another[1] != letter) or _REFUTED.match(rest) or not _REST.match(rest):
        return None
    return letter


def _is_chosen(reference: Choice, answer: FinalAnswer, are_equal: AreEqual) -> bool:
    if letter := letter_in(answer):
        return letter == reference.letter
    return bool(reference.text) and is_stated(read(reference.text), answer, are_equal)
