"""Write multiplication.jsonl: products of numbers that are too large to be worked out in the head of a small model.

python yaml_examples/data/make_multiplication.py
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path


NUM_ROWS = 300


def rows() -> Iterator[dict[str, str]]:
    rng = random.Random(0)
    for _ in range(NUM_ROWS):
        a, b = rng.randrange(1000, 10_000), rng.randrange(1000, 10_000)
        yield {"question": f"What is {a} * {b}?", "answer": str(a * b)}


if __name__ == "__main__":
    text = "".join(json.dumps(row) + "\n" for row in rows())
    Path(__file__).with_name("multiplication.jsonl").write_text(text, encoding="utf-8")
