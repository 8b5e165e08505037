"""Which words of a final answer are the answer, and whether they say what the reference says."""

import re
from collections.abc import Iterator

from grpo_stage.rewards.answers.final_answer import FinalAnswer, Place
from grpo_stage.rewards.answers.kinds import (
    NO_TOKEN,
    TOKEN,
    AreEqual,
    Choice,
    Kind,
    Named,
    Text,
    is_same,
    normalized,
    read,
    read_reference,
    token_of,
)
from grpo_stage.rewards.answers.notation import plain
from grpo_stage.rewards.answers.numbers import MAX_CHARACTERS, Number
from grpo_stage.rewards.answers.stated_number import number_in


_SENTENCE = re.compile(r"(?<!\b[A-Z])[.!?](?=\s|$)|[。！？；;]")  # noqa: RUF001
_REASON = re.compile(
    r",?\s+\(?(?:because|since|as|so that)\b"
    r"|,\s*(?:it|the|which|that|this|they|he|she|we|there|so|an?|for|where|not)\b"
    r"|[,，]\s*(?:因为|由于|所以|谢谢|因此|不)|\s\((?=[a-z]{2,})",  # noqa: RUF001
    re.IGNORECASE,
)
_IS = re.compile(r"\b(?:is|are|equals?|be|was|were|gives?|gets?|becomes?)\b(?!\s+not\b):?|:(?!\d)|(?<!不)[是为有]")
_DOUBT = re.compile(r"\bnot\b|n't\b|\bwhether\b|\bif\b|不", re.IGNORECASE)
_PREPOSITION = re.compile(r"^(?:on|in|at|the|about)\s+", re.IGNORECASE)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_YES_OR_NO = re.compile(r"\b(?:yes|no|true|false)\b", re.IGNORECASE)
_OR = re.compile(r"\s*(?:,|or|and|,\s*or|,\s*and|或者?|和)\s*", re.IGNORECASE)


def read_final(answer: FinalAnswer) -> Kind:
    """What the final answer of a reference states."""
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
    """True for sentences, which say more than the answer alone."""
    return len(text.split()) > 5 or "\n" in text


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
    """The texts that may be the answer, from all of what was found down to its core, as `plain` writes them.

    Each is a part of the one before, so that no completion can state two answers and be right with either.
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
        formulas = _formulas(_REASON.split(text)[0], at_the_end=True)
    else:
        sentence = _SENTENCE.split(plain(text[:MAX_CHARACTERS]).partition("\n")[0])[0]
        formulas = _formulas(_REASON.split(text[:MAX_CHARACTERS])[0], at_the_end=False)
    yield sentence
    clause = _REASON.split(sentence)[0]
    yield clause
    if formulas:
        yield plain(formulas)
    elif (verbs := list(_IS.finditer(clause))) and not _DOUBT.search(clause):
        yield _PREPOSITION.sub("", clause[verbs[-1].end() :].strip())


def _yes_or_no(text: str) -> str:
    """The first word of `Yes. It is 5.`, unless the opposite word follows; else nothing."""
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
    """The one time, ratio, date or version that `answer` states, or None."""
    text = plain(answer.text[-MAX_CHARACTERS:] if answer.place is Place.TEXT else answer.text[:MAX_CHARACTERS])
    found = [token for token in TOKEN.finditer(text) if not NO_TOKEN.fullmatch(token[0])]
    if not found:
        return None
    tokens = [token_of(token[0]) for token in found]
    if answer.place is Place.TEXT:
        is_listed = (
            len(found) > 1 and _OR.fullmatch(text[found[-2].end() : found[-1].start()]) and tokens[-1] != tokens[-2]
        )
        return None if is_listed else tokens[-1]
    return tokens[0] if len(set(tokens)) == 1 else None


_LETTER = re.compile(
    r"\W*(?:(?i:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer|选项|选择|选)\s*(?:is\b|是|为)?\s*:?\s*))?\W*"
    r"(?:(?P<capital>[A-Z])|(?P<small>[a-z])(?=[.):]|\W*$))(?![A-Za-z0-9'_^=])(?P<rest>.*)",
    re.DOTALL,
)
_REST = re.compile(
    r"\W*$|\s*[)\].:、]|\s*,\s*(?![A-Z]\b)|\s+(?:is|because|since|as|for)\b|\s*\(|[^\x00-\x7f]|\s*-\s|\s*\n|\s*="
)
_ANOTHER_LETTER = re.compile(
    r"[\s)\]]*(?:,|/|&|\bor\b|\band\b|或者?|和|、|\s)+[\s(\[]*(?:or\b|and\b)?[\s(\[]*([A-Z])(?![A-Za-z'])"
)
_SO = re.compile(r"\b(?:it's|therefore|hence|thus|so|say)\b", re.IGNORECASE)
_OR_ANOTHER = re.compile(r"(?:\bor\b|或)\W*[A-Z]\b")
_REFUTED = re.compile(r"[\s)\]]*(?:is|was)\s+(?:not|wrong|incorrect|false)\b|[\s)\]]*(?:isn't|不|错)")
_LETTER_IN_SENTENCE = re.compile(
    r"(?:\b(?:option|choice)\s+|选项?\s*)\(?([A-Z])(?![A-Za-z'])|\(([A-Z])\)", re.IGNORECASE
)


def letter_in(answer: FinalAnswer) -> str | None:
    """The one option that `answer` chooses, or None."""
    text = plain(answer.text[:MAX_CHARACTERS] if answer.place is not Place.TEXT else answer.text[-MAX_CHARACTERS:])
    if answer.place is not Place.TEXT:
        return _letter_at_the_beginning(text)
    lines = [line for line in text.split("\n") if line.strip()]
    for line in lines[-1:] + lines[:1]:
        verbs = list(_SO.finditer(line)) or list(_IS.finditer(line))
        if letter := _letter_at_the_beginning(line) or (verbs and _letter_at_the_beginning(line[verbs[-1].end() :])):
            return letter
    last_sentence = [part for part in _SENTENCE.split(lines[-1]) if part.strip()][-1:] if lines else []
    letters = {one or other for part in last_sentence for one, other in _LETTER_IN_SENTENCE.findall(part)}
    return letters.pop().upper() if len(letters) == 1 and not re.search(r"\bnot\b|n't|不", last_sentence[0]) else None


def _letter_at_the_beginning(text: str) -> str | None:
    """The option that `text` begins with, unless it names another one too or refutes it."""
    found = _LETTER.match(text)
    if found is None:
        return None
    letter, rest = (found["capital"] or found["small"]).upper(), found["rest"]
    another = _ANOTHER_LETTER.match(rest)
    if (
        _OR_ANOTHER.search(rest.partition("\n")[0])
        or (another and another[1] != letter)
        or _REFUTED.match(rest)
        or not _REST.match(rest)
    ):
        return None
    return letter


def _is_chosen(reference: Choice, answer: FinalAnswer, are_equal: AreEqual) -> bool:
    if letter := letter_in(answer):
        return letter == reference.letter
    return bool(reference.text) and is_stated(read(reference.text), answer, are_equal)
