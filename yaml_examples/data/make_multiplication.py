"""Write multiplication.jsonl: products of numbers that are too large to be worked out in the head of a small model.

Each row is a conversation that begins with a worked example. A small model calls no tool by itself, and one that
never calls is never rewarded for it: it imitates the example now and then, and learns from there.

    python yaml_examples/data/make_multiplication.py
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any


NUM_ROWS = 120
EXAMPLE = (3141, 2718)


def example(a: int, b: int) -> list[dict[str, str]]:
    call = {"name": "multiply", "arguments": {"a": a, "b": b}}
    return [
        {"from": "human", "value": f"What is {a} * {b}?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": str(a * b)},
        {"from": "gpt", "value": str(a * b)},
    ]


def rows() -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    worked = example(*EXAMPLE)
    for _ in range(NUM_ROWS):
        question, _, _, answer = example(rng.randrange(1000, 10_000), rng.randrange(1000, 10_000))
        yield {"conversations": [*worked, question, answer]}


if __name__ == "__main__":
    text = "".join(json.dumps(row) + "\n" for row in rows())
    Path(__file__).with_name("multiplication.jsonl").write_text(text, encoding="utf-8")
