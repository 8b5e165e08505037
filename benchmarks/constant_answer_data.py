"""Write a dataset on which one constant answer earns most of the reward, the failure that `one_answer` watches for.

400 rows of "What is the greatest common divisor of a and b?", a and b from 2 to 50: the answer is 1 for about 61 % of
them. `--balanced` writes held-out pairs instead, equally many of each answer from 1 to 6, none of them among the 400.

    python benchmarks/constant_answer_data.py data/gcd
    grpo-stage ... yaml_examples/quickstart.yaml dataset=gcd dataset_dir=data/gcd
"""

import argparse
import json
import math
import random
from pathlib import Path


SEED = 2  # 1 is right for 61 % of its rows, as in the run in which the failure was first seen
ROWS, LOWEST, HIGHEST = 400, 2, 50
BALANCED_ANSWERS, ROWS_AN_ANSWER = range(1, 7), 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="gets gcd.jsonl, gcd_balanced.jsonl and dataset_info.json")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(a, b) for a in range(LOWEST, HIGHEST + 1) for b in range(LOWEST, HIGHEST + 1)]
    random.Random(SEED).shuffle(pairs)
    held_out = [
        pair
        for answer in BALANCED_ANSWERS
        for pair in [pair for pair in pairs[ROWS:] if math.gcd(*pair) == answer][:ROWS_AN_ANSWER]
    ]
    for name, chosen in (("gcd", pairs[:ROWS]), ("gcd_balanced", held_out)):
        rows = [
            {
                "question": f"What is the greatest common divisor of {a} and {b}? Answer with the number only.",
                "answer": str(math.gcd(a, b)),
            }
            for a, b in chosen
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = {"prompt": "question", "response": "answer"}
    info = {name: {"file_name": f"{name}.jsonl", "columns": columns} for name in ("gcd", "gcd_balanced")}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
