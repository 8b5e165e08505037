"""Write cold_start_sft.jsonl and cold_start.jsonl beside this file: sums whose answer stands in a frame of its own.

The frame, `@sum{7}@`, is one that no model writes by chance. No sum is in both files.
"""

import json
import random
import runpy
from pathlib import Path


NUM_SFT = 200


def rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows for supervised fine-tuning, and those for GRPO."""
    sums = list(runpy.run_path(str(Path(__file__).with_name("make_addition.py")))["rows"]())
    random.Random(0).shuffle(sums)
    framed = [
        {
            "question": row["question"].removesuffix(" Answer with the number only."),
            "answer": f"@sum{{{row['answer']}}}@",
        }
        for row in sums
    ]
    return framed[:NUM_SFT], framed[NUM_SFT:]


if __name__ == "__main__":
    for name, part in zip(("cold_start_sft.jsonl", "cold_start.jsonl"), rows(), strict=True):
        text = "".join(json.dumps(row) + "\n" for row in part)
        Path(__file__).with_name(name).write_text(text, encoding="utf-8")
