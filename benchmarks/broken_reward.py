"""A reward that can be hacked: it pays for digits, as many as there are (recovery.py)."""


def digits(completions: list[str]) -> list[float]:
    """The number of digits, of which ten are worth as much as the right answer."""
    return [min(1.0, sum(letter.isdigit() for letter in text) / 10) for text in completions]
