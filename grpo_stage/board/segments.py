"""The parts of a completion: thinking, tool calls and their answers, and the text between them."""

import re
from collections.abc import Iterator, Mapping


KINDS: Mapping[str, str] = {
    "think": "thinking",
    "thinking": "thinking",
    "reasoning": "thinking",
    "tool_call": "call",
    "function_call": "call",
    "tool_response": "tool",
    "tool_result": "tool",
    "tool": "tool",
    "observation": "tool",
}
"""By the name of their tag."""
_TAG = re.compile(rf"<(/?)({'|'.join(KINDS)})>")


def segments(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each part: `text`, `thinking`, `call` or `tool`, in order; nothing is left out but the tags.

    A part that is not closed goes to the end. One that is closed and was not opened begins at the start: many
    templates write `<think>` into the prompt.
    """
    return [(kind, part) for kind, part in _parts(text) if part.strip()] or [("text", text)]


def _parts(text: str) -> Iterator[tuple[str, str]]:
    begin, kind, tag = 0, "text", ""
    for found in _TAG.finditer(text):
        is_end, name = found[1] == "/", found[2]
        if kind == "text" and is_end and begin == 0 and KINDS[name] == "thinking":
            yield "thinking", text[: found.start()]
        elif kind == "text" and not is_end:
            yield "text", text[begin : found.start()]
            kind, tag = KINDS[name], name
        elif is_end and name == tag:
            yield kind, text[begin : found.start()]
            kind, tag = "text", ""
        else:
            continue
        begin = found.end()
    yield kind, text[begin:]
