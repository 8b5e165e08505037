"""How the Board shows texts that it did not write: all of a text, as it is, never as HTML or Markdown."""

import re
from collections.abc import Sequence
from html import escape


# A long text scrolls in its cell; `dir` keeps one that runs from right to left from reordering its neighbors.
_CELL = '<td style="vertical-align: top; padding: 4px 6px"><div dir="auto" style="{style}">{text}</div></td>'
_TEXT_STYLE = "white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20em; overflow: auto"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], shares: Sequence[float]) -> str:
    """An HTML table whose columns share its width in these proportions."""
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
    """Text as a block of Markdown's."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def literal(text: str) -> str:
    """Text as Markdown that shows it as it is, without a block."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def harmless(text: str) -> str:
    """Text for a message of the host, which is HTML in one place and Markdown in another: it brings no element."""
    return text.replace("<", "&lt;").replace("![", "!&#91;")
