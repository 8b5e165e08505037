"""The example yaml_examples/images_squares.yaml on more images, some of them held out: the curve of docs/images.md.

    python benchmarks/images_learning.py runs/squares --picture docs/images_learning.png

The images that `eval_reward` is measured on are never trained on.
"""

import argparse
import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import yaml


EXAMPLES = Path(__file__).resolve().parents[1] / "yaml_examples"
NUM_ROWS, NUM_HELD_OUT = 480, 80


def write_data(folder: Path) -> None:
    rows = list(runpy.run_path(str(EXAMPLES / "data" / "make_squares.py"))["write"](folder, NUM_ROWS))
    columns = {"prompt": "question", "response": "answer", "images": "images"}
    info = {}
    for name, part in (("squares", rows[NUM_HELD_OUT:]), ("held_out", rows[:NUM_HELD_OUT])):
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
        info[name] = {"file_name": f"{name}.json", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def recipe(folder: Path, num_steps: int, seed: int) -> dict[str, Any]:
    example = yaml.safe_load((EXAMPLES / "images_squares.yaml").read_text(encoding="utf-8"))
    return example | {
        "model_name_or_path": str(folder / "model"), "dataset_dir": str(folder / "data"), "eval_dataset": "held_out",
        "eval_strategy": "steps", "eval_steps": 25, "max_steps": num_steps, "seed": seed,
        "output_dir": str(folder / "out"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--picture", type=Path, help="where the curve of the reward goes")
    arguments = parser.parse_args()
    folder = arguments.folder
    runpy.run_path(str(EXAMPLES / "data" / "make_squares_model.py"))["write_model"](folder / "model")
    (folder / "data").mkdir(exist_ok=True)
    write_data(folder / "data")

    from llamafactory.train.tuner import run_exp

    run_exp(recipe(folder, arguments.steps, arguments.seed))
    if arguments.picture is not None:
        shutil.copy(folder / "out" / "training_reward.png", arguments.picture)


if __name__ == "__main__":
    main()
