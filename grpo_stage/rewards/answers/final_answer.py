"""Where a text states its final answer: in tags, in a box, after `####`, after a phrase such as "the answer is"."""

import re
from dataclasses import dataclass
from enum import Enum


class Place(Enum):
    """How a final answer was found. It decides how much of the found text is the answer."""

    MARK = "in tags, in a box or after `####`: all of it"
    PHRASE = 'after "the answer is": its beginning'
    TEXT = "no mark: the end of the text"


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    text: str
    """A part of the text that was searched, unchanged."""
    place: Place


_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])[^\S\n]*")
_BETWEEN_BOXES = re.compile(r"(?:[\s$,;.]|\\[()\[\],; ]|\\text\{|\}|\b[a-z]\s*=|\bor\b|\band\b|或者?|和)*")
_HASHES = re.compile(r"####+([^\n#][^\n]*)")
_HASHES_ANSWER = re.compile(
    r"\s*\W*(?:(?!\d+[.)]\s+[A-Za-z])[\d\\$.]|[A-Z]\)?\W*$|(?:final\s+)?answer\b|答案)", re.IGNORECASE
)
_IS = r"(?:\s|\*|_)*(?:(?:is|are|was|(?:would|should|must|will)\ be)\b(?!\s+not\b)|[=:：])(?:\s|\*|_)*:?"  # noqa: RUF001
_PHRASE = re.compile(
    rf"""
    \b(?:answer|(?:correct|right|best)\s+(?:option|choice|statement))s?(?:\s*\([^()\n]*\)|\s+(?:to|for)\b[^.\n:=]{{1,80}}?)?{_IS}
    | \b(?:I(?:'d|\ would)?\ (?:would\ )?(?:choose|pick|select)|go\ with)\b(?!\s+not\b)\s*:?
    | 答案\s*(?:应该|应当|应|就)?\s*(?:[是为選选]|[:：])\s*[:：]?
    | (?:故|因此|所以|应|應|正确的?|正確)\s*[选選](?:择|項|项)?\s*(?:是|为)?\s*[:：]?
    | 答案】\s*
    | (?:^|[,，。；;])\s*[选選]\s*(?:择|項|项)?\s*[:：]?
    | \b(?:respuesta|réponse|antwort|risposta|resposta)\b(?:\s+(?:final|finale|correcta|richtige))?\s*(?:(?:es|est|ist|lautet|è|é)\b|:)\s*:?
    | \bответ\b\s*(?:[:=—-]|равен|это)\s*
    | (?:정답|답)\s*(?:은|는|:)\s*
    | (?:答え|解答)\s*(?:は|:|：)\s*
    """,  # noqa: RUF001, E501
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
_HAS_CONTENT = re.compile(r"[^\W_]|[\\$∞∅π]")


def after_reasoning(text: str) -> str:
    """What follows `</think>`; nothing where the reasoning never ends."""
    if "</think>" in text:
        return text.rpartition("</think>")[2]
    return "" if "<think>" in text else text


def answer_tag(text: str) -> str | None:
    """The content of the last `<answer>...</answer>`, or None."""
    # Stop at the last closing tag: behind it each opening tag would make the search run to the end of the text.
    tags = _ANSWER_TAG.findall(text, 0, text.rfind("</answer>") + len("</answer>"))
    return tags[-1] if tags else None


def final_answer(text: str, *, is_reference: bool = False) -> FinalAnswer:
    r"""The part of `text` that states the answer.

    In this order: the last `<answer>...</answer>`, the last `\boxed{...}` that holds something, what follows `####`,
    what follows the last "the answer is", each looked for within what the one before gave; else all that follows
    `</think>`. In a reference whatever follows the last `####` counts. A completion may use `####` for a heading:
    there it counts in the last line, or before what looks like an answer. Takes time in proportion to the length.
    """
    text = after_reasoning(text).strip()
    place = Place.TEXT
    if (tagged := answer_tag(text)) is not None:
        text, place = tagged.strip(), Place.MARK
    if (boxed := _boxed(text)) is not None:
        text, place = boxed, Place.MARK
    elif (hashed := _after_hashes(text, is_reference)) is not None:
        text, place = hashed, Place.MARK
    if (phrased := _after_phrase(text)) is not None:
        text, place = phrased, Place.PHRASE
    return FinalAnswer(text, place)


def _boxed(text: str) -> str | None:
    """Of several boxes in a row, as in `x = \boxed{1} or x = \boxed{2}`, all from the first to the last."""
    found: str | None = None
    next_start = len(text)
    for box in reversed(list(_BOX.finditer(text))):
        content, end = _box_content(text, box.end())
        if not _HAS_CONTENT.search(content):
            continue
        if found is None:
            found = content
        elif content and _is_joint(text[end:next_start]):
            found = f"{content}, {found}"
        else:
            break
        next_start = box.start()
    return found


def _is_joint(between: str) -> bool:
    return (
        len(between) < 40
        and re.search(r"\bor\b|\band\b|,|或|和", between) is not None
        and _BETWEEN_BOXES.fullmatch(between) is not None
    )


def _box_content(text: str, start: int) -> tuple[str, int]:
    """The text up to the closing brace, or to the end without one; of `\boxed 7` the next word. And its end."""
    if not text.startswith("{", start):
        word = re.compile(r"[^\s$]*").match(text, start)
        assert word is not None
        return word[0], word.end()
    depth = 0
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + 1 : brace.start()].strip(), brace.end()
    return text[start + 1 :].strip(), len(text)


def _after_hashes(text: str, is_reference: bool) -> str | None:
    last_line = text.rfind("\n") + 1
    for found in reversed(list(_HASHES.finditer(text))):
        if is_reference or found.start() >= last_line or _HASHES_ANSWER.match(found[1]):
            return found[1].strip()
    return None


def _after_phrase(text: str) -> str | None:
    """The rest of the line, or the next line that says something."""
    phrases = list(_PHRASE.finditer(text))
    if not phrases:
        return None
    for line in text[phrases[-1].end() :].split("\n"):
        if _HAS_CONTENT.search(line):
            return line.lstrip("} ").strip()
    return None
