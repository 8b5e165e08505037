"""Tables and blocks for foreign texts in the Board: a text is shown whole, and never as HTML or Markdown."""

import re
from collections.abc import Sequence
from html import escape


# A long text scrolls in its cell; `dir` keeps right-to-left text from reordering its neighbors.
_CELL = '<td style="vertical-align: top; padding: 4px 6px"><div dir="auto" style="{style}">{text}</div></td>'
_TEXT_STYLE = "white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20em; overflow: auto"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], shares: Sequence[float]) -> str:
    """An HTML table; `shares` are the proportions of its columns."""
    head = "".join(
        f'<th style="width: {100 * share / sum(shares):.1f}%; padding: 4px 6px; overflow-wrap: anywhere">'
        f"{escape(header)}</th>"
        for header, share in zip(headers, shares, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(_CELL.format(style=_TEXT_STYLE, text=escape(text)) for text in row)}</tr>" for row in rows
    )
    return (
        f'<table style="table-layout: fixed; width: 100%"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    )


def number(value: float | None) -> str:
    """A reward or an advantage; a dash where a function did not apply."""
    return "–" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")  # noqa: RUF001


def fenced(text: str, language: str = "") -> str:
    """Text as a code block of Markdown."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def literal(text: str) -> str:
    """Text escaped for Markdown, which then shows it as it is, without a block."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def harmless(text: str) -> str:
    """Text escaped for a message of the host, which may be HTML or Markdown: it adds no element."""
    return text.replace("<", "&lt;").replace("![", "!&#91;")
