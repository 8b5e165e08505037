"""A step with `rollout_ahead: 1`, where vLLM and the trainer have a core each, beside a step without.

    python benchmarks/rollout_ahead.py MODEL [--steps 6] [--rounds 2] [--arms off ahead both] [key=value ...]

MODEL is that of `grpo-stage quickstart-model`, or any folder; the recipe is the quick start's with rollouts about as
long as its updates. A round runs the arms one after the other, so that what else the machine does falls on all:

    off      one thread: the same division of the machine, one half idle at any time
    ahead    a thread for vLLM and one for the trainer, at the same time
    both     two threads for the rollout and then for the update: what a user without the key has

Printed are medians over the steps after the second, of all rounds: of the log's figures, and of the processor seconds
of the trainer and of vLLM's process (`cpu/...`). What other processes do adds little to these. With a thread each on
cores of their own, a step by turns takes about their sum, and a step ahead the larger of the two.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil


ROOT = Path(__file__).resolve().parents[1]
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    "off": (1, {}),
    "ahead": (1, {"rollout_ahead": 1}),
    "both": (2, {}),
}
"""Threads of a process, and keys."""
SHAPE = {"per_device_train_batch_size": 4, "num_generations": 4, "max_new_tokens": 32, "plot_loss": False}
FIGURES = (
    *("step_time", "time/rollout", "rollout_ahead/engine_time", "time/sync", "time/canary", "time/update"),
    *("cpu/trainer", "cpu/engine"),
)
SETTLING = 2
"""Steps that are left out: the first has no rollout that was begun before it, and both warm up."""
POLL_S = 0.02


def run(threads: int, keys: dict[str, Any], servers: Sequence[int] = ()) -> list[dict[str, float]]:
    """The lines of a run's log, each with the processor seconds of its step.

    Args:
        threads: the trainer's.
        keys: of the run.
        servers: the processes of vLLM servers; what they and their children do counts as the engine's.
    """
    engines = [psutil.Process(pid) for pid in servers]
    engines += [child for each in engines for child in each.children(recursive=True)]
    with tempfile.TemporaryDirectory() as folder:
        words = [f"{key}={value}" for key, value in {**keys, "output_dir": folder}.items()]
        process = subprocess.Popen(
            [sys.executable, "-m", "grpo_stage", "train", "yaml_examples/quickstart.yaml", *words],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        trainer, log = psutil.Process(process.pid), Path(folder, "trainer_log.jsonl")
        lines: list[dict[str, float]] = []
        before = _processor_seconds(trainer, engines)
        while process.poll() is None:
            time.sleep(POLL_S)
            written = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
            if len(written) > len(lines):
                now = _processor_seconds(trainer, engines)
                lines.append(json.loads(written[len(lines)]))
                lines[-1] |= {"cpu/trainer": now[0] - before[0], "cpu/engine": now[1] - before[1]}
                before = now
    return [line for line in lines if "step_time" in line]


def _processor_seconds(trainer: psutil.Process, engines: Sequence[psutil.Process]) -> tuple[float, float]:
    """Those of the trainer, and of vLLM's processes."""
    seconds = [0.0, sum(sum(each.cpu_times()[:2]) for each in engines)]
    with suppress(psutil.NoSuchProcess):
        for each in (trainer, *trainer.children()):
            is_engine = any("vllm_worker" in word for word in each.cmdline())
            if each == trainer or is_engine:
                times = each.cpu_times()
                seconds[is_engine] += times.user + times.system
    return seconds[0], seconds[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--json", type=Path)
    args, words = parser.parse_known_args()
    own = dict(word.split("=", 1) for word in words)
    logs: dict[str, list[dict[str, float]]] = {arm: [] for arm in args.arms}
    for number in range(args.rounds):
        for arm in args.arms:
            threads, keys = ARMS[arm]
            log = run(threads, {"model_name_or_path": args.model, "max_steps": args.steps, **SHAPE, **keys, **own})
            assert len(log) > SETTLING, f"{arm}: {len(log)} steps, and more than {SETTLING} are needed"
            logs[arm] += log[SETTLING:]
            print(f"round {number}, {arm}: {[round(line['step_time'], 2) for line in log]}", flush=True)
    result = {
        arm: {name: median(values) for name in FIGURES if (values := [line[name] for line in log if name in line])}
        for arm, log in logs.items()
    }
    for arm, figures in result.items():
        print(f"{arm:6}" + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    if args.json:
        args.json.write_text(json.dumps({"shape": SHAPE | own, "arms": result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
