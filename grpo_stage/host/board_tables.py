"""What the Board's tables show in a cell: text as it is, never as HTML or Markdown."""

SHOWN_CHARACTERS = 2000


def short(text: str | None) -> str:
    """Text of a bounded length: its beginning and its end."""
    text = text or ""
    half = SHOWN_CHARACTERS // 2
    return (
        text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]}\n[... {len(text) - 2 * half} ...]\n{text[-half:]}"
    )


def number(value: float | None) -> str:
    """A reward or an advantage; a dash where a function did not apply."""
    return "–" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")  # noqa: RUF001
