"""An update on one and on two processes beside the simulation: `scaling_processes.py MODEL [--steps 3]`.

MODEL is that of `grpo-stage quickstart-model`. The quick start's recipe with transformers' engine, four prompts a step
in all, one thread a process, DDP over gloo. The simulation's speed is set by the run of one process; what it says of
two is the check. With other work on the machine the figures are those of a share of a core.
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
    args = parser.parse_args()
    speed = 1.0
    for processes in (1, 2):
        lines, groups = run(args.model, processes, args.steps)
        measured = median(line["time/update"] for line in lines[1:])
        found = median(simulated(processes, each) for each in groups[1:])
        if processes == 1:
            speed = measured / found
        error = 100 * (found * speed / measured - 1)
        said = "sets the speed" if processes == 1 else f"error {error:+.0f} %"
        rollout = median(line["time/rollout"] for line in lines[1:])
        print(
            f"{processes} process(es): update {measured:.2f} s measured, {found * speed:.2f} simulated ({said}); "
            f"rollout {rollout:.2f} s; load of the machine {os.getloadavg()[0]:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
