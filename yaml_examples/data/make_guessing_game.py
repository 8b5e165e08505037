"""Write guessing_game.jsonl: three numbers, one of which is the secret one.

Who guesses the middle one first knows the secret one after the answer; who guesses another one first knows it in two
of three cases. Each row begins with two games, since a small model plays no game that is only described to it.

    python yaml_examples/data/make_guessing_game.py
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any


NUM_ROWS = 180
EXAMPLES = ((41, 42, 43, "too low"), (6, 7, 6, "too high"))
"""The lowest number, the guess, the secret number, and what is said of the guess."""


def question(lowest: int) -> dict[str, str]:
    return {
        "from": "human",
        "value": f"My number is {lowest}, {lowest + 1} or {lowest + 2}. Guess once, then name it.",
    }


def example(lowest: int, guess: int, secret: int, said: str) -> list[dict[str, str]]:
    call = {"name": "guess", "arguments": {"number": guess}}
    return [
        question(lowest),
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": said},
        {"from": "gpt", "value": str(secret)},
    ]


def rows() -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    worked = [turn for each in EXAMPLES for turn in example(*each)]
    for row in range(NUM_ROWS):
        lowest = rng.randrange(1, 98)
        secret = str(lowest + row % 3)
        yield {"conversations": [*worked, question(lowest), {"from": "gpt", "value": secret}], "secret": secret}


if __name__ == "__main__":
    text = "".join(json.dumps(row) + "\n" for row in rows())
    Path(__file__).with_name("guessing_game.jsonl").write_text(text, encoding="utf-8")
