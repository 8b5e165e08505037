r"""The numbers in a text: `-$1,234.50`, `2\frac{3}{4}`, `1.5 × 10³`, `18 cm`."""  # noqa: RUF002

import re
from dataclasses import dataclass
from fractions import Fraction


RELATIVE_TOLERANCE = Fraction(1, 10**9)
MAX_CHARACTERS = 2000
"""A longer answer is not read as a number: reading happens in the trainer's process, and must take no time."""
_MAX_EXPONENT = 1000
"""With `MAX_CHARACTERS` digits more it stays below the 4300 digits that Python writes out."""


@dataclass(frozen=True, slots=True)
class Number:
    value: Fraction
    is_percent: bool = False
    num_decimals: int | None = None
    """Digits after the point; None for a fraction, which is exact."""

    def equals(self, reference: "Number") -> bool:
        """True where both are the same number, up to a relative 1e-9; whole numbers exactly.

        `50%` is 50, and 0.5 too. A repeating fraction may be rounded to 6 decimals or more.
        """
        if _are_close(self, reference):
            return True
        if self.is_percent == reference.is_percent:
            return False
        return _are_close(self._share(), reference._share())

    def _share(self) -> "Number":
        if not self.is_percent:
            return self
        return Number(self.value / 100, num_decimals=None if self.num_decimals is None else self.num_decimals + 2)


def _are_close(one: Number, other: Number) -> bool:
    if one.value.denominator == other.value.denominator == 1:
        return one.value == other.value
    difference = abs(one.value - other.value)
    return (
        difference <= RELATIVE_TOLERANCE * max(abs(one.value), abs(other.value))
        or _rounds_to(one, other)
        or _rounds_to(other, one)
    )


def _rounds_to(exact: Number, rounded: Number) -> bool:
    """True for 2/3 and 0.666667: a repeating fraction, and the same rounded to 6 decimals or more."""
    if exact.num_decimals is not None or rounded.num_decimals is None or rounded.num_decimals < 6:
        return False
    is_repeating = 10**rounded.num_decimals % exact.value.denominator != 0
    return is_repeating and abs(exact.value - rounded.value) * 10**rounded.num_decimals <= Fraction(1, 2)


# Texts as `plain` writes them, cut into tokens

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d{1,3}(?:\ \d{3})+(?!\ ?\d)|\d+(?:_\d{3})*)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.(?=\d|\\overline)\d*(?:\\overline\s*\{{\d+\}})?)?|\.\d+)"
_TEN = r"10\s*\^\s*(?:\{\s*[-+]?\s*\d+\s*\}|\(\s*[-+]?\s*\d+\s*\)|[-+]?\d+)"
_NUMBER = rf"""
    (?P<whole_part>\d+)(?:\s*\\frac\{{\s*(?P<num_1>\d+)\s*\}}\{{\s*(?P<den_1>\d+)\s*\}}
                         |\ +(?P<num_2>\d+)\ ?/\ ?(?P<den_2>\d+))
    | \\frac\{{\s*(?P<num_3>[-+]?\s*{_DECIMAL})\s*\}}\{{\s*(?P<den_3>[-+]?\s*{_DECIMAL})\s*\}}
    | (?P<num_4>{_DECIMAL})\ ?/\ ?(?P<den_4>{_DECIMAL})
    | (?P<factor>{_DECIMAL})\s*(?:\\times|\\cdot|\*|[xX])\s*(?P<power_1>{_TEN})
    | (?P<mantissa>{_DECIMAL})[eE](?P<exponent>[-+]?\d+)
    | (?P<power_2>{_TEN})
    | (?P<decimal>{_DECIMAL})
"""
_TOKEN = re.compile(
    rf"""
    (?P<number>{_NUMBER})
    | (?P<command>\\[a-zA-Z]+)
    | (?P<word>[a-zA-Z']{{2,}}|[万亿负]|不是|并非|(?:(?!负|不是|并非)[^\W\d_a-zA-Z])+)
    | (?P<letter>[a-zA-Z])
    | (?P<open>\\?[(\[{{])
    | (?P<close>\\?[)\]}}])
    | (?P<other>\S|\n)
    """,
    re.VERBOSE,
)
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12} | {"万": 4, "亿": 8}
_UNIT_LETTERS = frozenset("mgshdlLNJWVAKCFHΩ")
_VARIABLES = frozenset("xyznki")
_NEGATIVE_WORDS = frozenset({"negative", "minus", "负"})
# What makes a limit of a number, or denies it: `at least 5`, `5 or more`, `not 5`.
_LIMIT_BEFORE = re.compile(
    r"(?:\b(?:less|more|fewer|greater|larger|smaller|lower|higher|other) than|\bat (?:least|most)|\bup to"
    r"|\b(?:not|never|except)|n't|\b(?:any|every|no)thing but|\bis (?:over|under|above|below)"
    r"|小于|大于|少于|多于|不到|不足|超过|至少|至多|最多|最少|不是|并非|不等于)"
    r"(?:\s+(?:exactly|equal to|necessarily))?[\s$({\[]*$",
    re.IGNORECASE,
)
_LIMIT_AFTER = re.compile(
    r"[\s$)}\]]*(?:or (?:less|more|fewer|greater|above|below|higher|lower)\b|以上|以下|以内)", re.IGNORECASE
)
_LIMIT_CHARACTERS = 40
"""The length of the longest text that `_LIMIT_BEFORE` matches."""
_VERBS = frozenset({"is", "are", "equals", "be", "was", "get"})
_TRANSPARENT_COMMANDS = frozenset({r"\approx", r"\equiv", r"\cup", r"\in"})


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    is_spaced: bool
    """White space or a line break stands before it."""
    start: int
    end: int
    match: re.Match[str]


_NOTHING = _Token("nothing", "", True, 0, 0, re.compile("").match(""))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Found:
    """A number in a text."""

    number: Number | None
    """None if it is a part of something else: a calculation, a time, a version, a word, a limit."""
    start: int
    end: int


class _Reader:
    """Finds numbers among the tokens of a text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[_Token] = []
        end = 0
        for match in _TOKEN.finditer(text):
            kind = match.lastgroup or ""
            if match["number"] is not None:
                kind = "number"
            is_spaced = match.start() > end or not self.tokens or self.tokens[-1].text == "\n"
            self.tokens.append(_Token(kind, match[0], is_spaced, match.start(), match.end(), match))
            end = match.end()
        self.has_lines = "\n" in text

    def at(self, index: int) -> _Token:
        return self.tokens[index] if 0 <= index < len(self.tokens) else _NOTHING

    def found(self) -> list[Found]:
        return [self._judge(index) for index, token in enumerate(self.tokens) if token.kind == "number"]

    def _judge(self, index: int) -> Found:
        """The number at `index` with its sign, brackets, magnitude and percent sign."""
        value = _value(self.tokens[index].match)
        first, last = index, index
        magnitude = _MAGNITUDES.get(self.at(last + 1).text.lower())
        if magnitude is not None:
            last += 1
        is_percent = self.at(last + 1).text.lower() in ("%", "percent")
        last += is_percent
        sign, first = self._sign(first)
        while self._is_bracketed(first, last):
            first, last = first - 1, last + 1
            outer, first = self._sign(first)
            sign = None if sign is None or outer is None else sign * outer
        token = self.tokens[index]
        start, end = self.tokens[first].start, self.tokens[last].end
        is_limit = (
            _LIMIT_BEFORE.search(self.text, max(0, start - _LIMIT_CHARACTERS), start) is not None
            or _LIMIT_AFTER.match(self.text, end) is not None
        )
        if value is None or sign is None or is_limit or self._is_part(first, last):
            return Found(None, start, end)
        if self.at(first - 1).text.lower() in _NEGATIVE_WORDS:
            sign, start = -sign, self.at(first - 1).start
        value = sign * value * 10 ** (magnitude or 0)
        return Found(Number(value, is_percent, _num_decimals(token.match)), start, end)

    def _sign(self, first: int) -> tuple[int | None, int]:
        """The sign before `first`, None where there are two, and where the number then begins."""
        dash, before = self.at(first - 1), self.at(first - 2)
        if dash.text not in ("-", "+"):
            return 1, first
        sign = -1 if dash.text == "-" else 1
        is_apart = self.at(first).is_spaced
        if before.text in ("-", "+"):
            return None, first
        if before.kind in ("number", "letter", "close") or before.text in ("!", "%") or before.kind == "command":
            return 1, first  # a calculation, which `_is_part` sees
        if before.kind == "word" and before.text.isascii() and before.text not in _VERBS:
            # `is -5`; but a dash between words in `COVID-19`, and one between clauses in `so - 5 apples`.
            return (sign, first - 1) if dash.is_spaced and not is_apart else (1, first)
        if is_apart and self.has_lines and (before is _NOTHING or before.text == "\n"):
            return 1, first  # a bullet
        return sign, first - 1

    def _is_bracketed(self, first: int, last: int) -> bool:
        opening, closing = self.at(first - 1), self.at(last + 1)
        if opening.kind != "open" or closing.kind != "close" or opening.text.startswith("\\"):
            return False
        # `f(5)` and `4(5)` are something else.
        return opening.is_spaced or self.at(first - 2).kind not in ("number", "letter", "word", "command", "close")

    def _is_part(self, first: int, last: int) -> bool:
        """Whether the tokens `first` to `last` are a part of something else, by what stands around them."""
        before, after = self.at(first - 1), self.at(last + 1)
        is_glued = not self.at(first).is_spaced
        if before.text in ("+", "*", "/", "^", "_", "<", ">", "!", "±"):
            return True
        if before.text == "-":
            is_bullet = self.has_lines and self.at(first - 2).text in ("", "\n")
            is_dash = self.at(first - 2).kind == "word" and before.is_spaced and not is_glued
            if not is_bullet and not is_dash:
                return True
        if before.kind == "command" and before.text not in _TRANSPARENT_COMMANDS:
            return True
        if is_glued and (before.kind in ("letter", "close") or (before.kind == "word" and before.text.isascii())):
            return True
        if is_glued and before.text in (":", ".") and self.at(first - 2).kind == "number":
            return True
        if (
            is_glued
            and before.text in ("{", "(", "[")
            and self.at(first - 2).kind in ("command", "letter", "close", "number")
        ):
            return True
        if (before.kind == "open" and after.text == ",") or (before.text == "," and after.kind == "close"):
            return True  # of an interval or a tuple
        return self._is_continued(after, self.at(last + 2))

    def _is_continued(self, after: _Token, second: _Token) -> bool:
        """Whether the two tokens after a number make something else of it."""
        if after.text in ("+", "*", "/", "^", "_", "<", ">", "="):
            return after.text != "=" or second is not _NOTHING
        if after.text == "-" and second is _NOTHING:
            return not after.is_spaced
        if after.text == "-":
            return second.kind in ("number", "command", "open", "letter") and after.is_spaced == second.is_spaced
        if after.kind == "command":
            return after.text not in _TRANSPARENT_COMMANDS
        if after.text in (":", ".") and not after.is_spaced:
            return second.kind == "number" and not second.is_spaced
        if after.text == "!":
            return not (second is _NOTHING or second.is_spaced)
        if after.is_spaced:
            return after.text in _VARIABLES
        if after.kind == "letter":
            return after.text not in _UNIT_LETTERS
        return after.kind == "open" or (
            after.kind == "word"
            and bool(_VARIABLES & set(after.text))
            and len(after.text) < 4
            and after.text.isascii()
            and after.text not in _GLUED_UNITS
        )


_GLUED_UNITS = frozenset({"in", "km", "min", "mi", "kg", "kW", "kJ", "kmh", "kph", "Pi"})


def numbers_in(text: str) -> list[Found]:
    """The numbers of `text`, which is as `plain` writes it."""
    return _Reader(text).found()


def _num_decimals(match: re.Match[str]) -> int | None:
    if match["decimal"] is None or "overline" in match["decimal"]:
        return None
    return len(match["decimal"].partition(".")[2])


def _value(match: re.Match[str]) -> Fraction | None:
    """None for what takes long to compute, for a division by 0, and for one that is not worked out: `12 / 3`."""
    groups = match.groupdict()
    for n in "1234":
        if groups[f"num_{n}"] is None:
            continue
        numerator, denominator = _decimal(groups[f"num_{n}"]), _decimal(groups[f"den_{n}"])
        if not denominator:
            return None
        fraction = numerator / denominator
        if groups["whole_part"] is not None:
            return int(groups["whole_part"]) + fraction if fraction < 1 else None
        return None if fraction.denominator == 1 else fraction
    if power := groups["power_1"] or groups["power_2"]:
        exponent = re.sub(r"[\s(){}]", "", power.partition("^")[2])
        return _scaled(groups["factor"] or "1", exponent)
    if groups["mantissa"] is not None:
        return _scaled(groups["mantissa"], groups["exponent"])
    return _decimal(groups["decimal"])


def _scaled(factor: str, exponent: str) -> Fraction | None:
    if len(exponent) > 6 or abs(int(exponent)) > _MAX_EXPONENT:
        return None
    return _decimal(factor) * Fraction(10) ** int(exponent)


def _decimal(text: str) -> Fraction:
    number, _, repeated = re.sub(r"[,_\s}]", "", text).partition(r"\overline{")
    value = Fraction(number.rstrip("."))
    if not repeated:
        return value
    scale: int = 10 ** len(number.partition(".")[2])
    return value + Fraction(int(repeated), (10 ** len(repeated) - 1) * scale)
