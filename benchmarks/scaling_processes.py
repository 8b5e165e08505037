"""An update on one and on two processes beside the simulation: `scaling_processes.py MODEL [--processes 1 2]`.

MODEL is that of `grpo-stage quickstart-model`. The quick start's recipe with transformers' engine, four prompts a step
in all, one thread a process, DDP over gloo. The check is how the seconds of two processes are to those of one, as
measured and by simulation. With other work on the machine the figures are those of a share of a core.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

from scaling_check import CPU, CPU_RATES, cost

from grpo_stage.layout.costs import Work, update_cost
from grpo_stage.layout.syntax import parse_layout


ROOT = Path(__file__).resolve().parents[1]
PROMPT = 45
KEYS = {
    "rollout_backend": "hf", "num_generations": 4, "plot_loss": "false", "disable_zero_advantage_skipping": "true",
    "max_tokens_per_micro_batch": 512,
}  # fmt: skip


def run(model: str, processes: int, steps: int) -> tuple[list[dict[str, float]], list[list[list[int]]]]:
    """The log's lines, and the lengths of the completions of each step, by group."""
    with tempfile.TemporaryDirectory() as folder:
        keys = KEYS | {
            "model_name_or_path": model, "output_dir": folder, "max_steps": steps,
            "per_device_train_batch_size": 4 // processes,
        }  # fmt: skip
        subprocess.run(
            [sys.executable, "-m", "grpo_stage", "train", "yaml_examples/quickstart.yaml"]
            + [f"{key}={value}" for key, value in keys.items()],
            cwd=ROOT,
            env=os.environ
            | {"OMP_NUM_THREADS": "1"}
            | ({"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"} if processes == 2 else {}),
            stdout=subprocess.DEVNULL,
            check=True,
        )
        lines = [json.loads(line) for line in Path(folder, "trainer_log.jsonl").read_text().splitlines()]
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for line in Path(folder, "completions.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            groups[record["step"], record["prompt_index"]].append(record["num_tokens"])
    of_steps = [[lengths for (step, _), lengths in groups.items() if step == number + 1] for number in range(steps)]
    return [line for line in lines if "time/update" in line], of_steps


def simulated(processes: int, groups: list[list[int]]) -> float:
    """Seconds of the slowest rank's update; ranks log their groups one after the other."""
    layout = dataclasses.replace(parse_layout(f"train {processes}xH100"), card=CPU)
    each = len(groups) // processes
    work = Work(num_prompts=each, group_size=4, prompt_length=PROMPT, max_tokens=512, checkpointing=False)
    model = cost("SmolLM2-135M", lora=True, itemsize=4)
    ranks = [groups[rank * each : (rank + 1) * each] for rank in range(processes)]
    return max(update_cost(layout, model, work, CPU_RATES, rank).total for rank in ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    args = parser.parse_args()
    for processes in args.processes:
        lines, groups = run(args.model, processes, args.steps)
        update, rollout = (median(line[f"time/{name}"] for line in lines[1:]) for name in ("update", "rollout"))
        one, two = (median(simulated(count, each) for each in groups[1:]) for count in (1, 2))
        print(
            f"{processes} process(es): update {update:.2f} s, rollout {rollout:.2f} s; by simulation "
            f"{one:.3g} s on one process, {two:.3g} s on two; load of the machine {os.getloadavg()[0]:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
