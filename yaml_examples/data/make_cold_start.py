"""Write cold_start_sft.jsonl and cold_start.jsonl beside this file: sums whose answer stands in a frame of its own.

The frame, `@sum{3 + 4 = 7}@`, is one that no model writes by chance. What stands in it, the model can do. No sum is in
both files.
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
    questions = [row["question"].removesuffix(" Answer with the number only.") for row in sums]
    framed = [
        {"question": question, "answer": f"@sum{{{question[len('What is ') : -1]} = {row['answer']}}}@"}
        for question, row in zip(questions, sums, strict=True)
    ]
    return framed[:NUM_SFT], framed[NUM_SFT:]


if __name__ == "__main__":
    for name, part in zip(("cold_start_sft.jsonl", "cold_start.jsonl"), rows(), strict=True):
        text = "".join(json.dumps(row) + "\n" for row in part)
        Path(__file__).with_name(name).write_text(text, encoding="utf-8")
