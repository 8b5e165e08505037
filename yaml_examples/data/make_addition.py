"""Write addition.jsonl beside this file: every sum of two numbers from 0 to 20, 441 rows."""

import json
from collections.abc import Iterator
from pathlib import Path


def rows() -> Iterator[dict[str, str]]:
    for a in range(21):
        for b in range(21):
            yield {"question": f"What is {a} + {b}? Answer with the number only.", "answer": str(a + b)}


if __name__ == "__main__":
    text = "".join(json.dumps(row) + "\n" for row in rows())
    Path(__file__).with_name("addition.jsonl").write_text(text, encoding="utf-8")
