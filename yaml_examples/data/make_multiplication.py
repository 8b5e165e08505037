"""Write multiplication.jsonl: products of numbers that are too large to be worked out in the head of a small model.

python yaml_examples/data/make_multiplication.py
"""

import json
import random
from pathlib import Path


NUM_ROWS = 300


def main() -> None:
    rng = random.Random(0)
    pairs = [(rng.randrange(1000, 10_000), rng.randrange(1000, 10_000)) for _ in range(NUM_ROWS)]
    rows = [{"question": f"What is {a} * {b}?", "answer": str(a * b)} for a, b in pairs]
    lines = [json.dumps(row) + "\n" for row in rows]
    Path(__file__).with_name("multiplication.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
