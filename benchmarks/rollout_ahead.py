"""A step with `rollout_ahead: 1`, where vLLM and the trainer have a core each, beside a step without.

    python benchmarks/rollout_ahead.py MODEL [--steps 7] [--rounds 2] [key=value ...]

MODEL is that of `grpo-stage quickstart-model`; the recipe is the quick start's with rollouts as long as its updates. A
round runs three arms one after the other, so that what else the machine does falls on all of them:

    off, 1 thread    the same division of the machine, one half idle at any time
    off, 2 threads   both cores for the rollout, then both for the update: what a user without the key has
    ahead            a thread for vLLM and one for the trainer, at the same time

Printed are medians over the steps after the second, of all rounds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    "off, 1 thread": (1, {}),
    "ahead": (1, {"rollout_ahead": 1}),
    "off, 2 threads": (2, {}),
}
"""Threads of a process, and keys."""
SHAPE = {"per_device_train_batch_size": 4, "num_generations": 4, "max_new_tokens": 32, "plot_loss": False}
FIGURES = (
    *("step_time", "time/rollout", "rollout_ahead/engine_time", "time/sync", "time/canary", "time/update", "reward"),
)
SETTLING = 2
"""Steps that are left out: the first has no rollout that was begun before it, and both warm up."""


def run(threads: int, keys: dict[str, Any]) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        words = [f"{key}={str(value).lower()}" for key, value in {**keys, "output_dir": folder}.items()]
        subprocess.run(
            [sys.executable, "-m", "grpo_stage", "train", "yaml_examples/quickstart.yaml", *words],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        lines = Path(folder, "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "step_time" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("keys", nargs="*")
    args = parser.parse_args()
    own = dict(word.split("=", 1) for word in args.keys)
    logs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for number in range(args.rounds):
        for arm, (threads, keys) in ARMS.items():
            log = run(threads, {"model_name_or_path": args.model, "max_steps": args.steps, **SHAPE, **keys, **own})
            logs[arm] += log[SETTLING:]
            print(f"round {number}, {arm}: {[round(line['step_time'], 2) for line in log]}", flush=True)
    result = {
        arm: {name: median(values) for name in FIGURES if (values := [line[name] for line in log if name in line])}
        for arm, log in logs.items()
    }
    for arm, figures in result.items():
        print(f"{arm:15}" + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    if args.json:
        args.json.write_text(json.dumps({"shape": SHAPE | own, "arms": result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
