"""A run that is killed at random and resumed, laid over the same run left alone.

    python benchmarks/kill_and_resume.py yaml_examples/quickstart.yaml [--kills 2] [--seed 0] [key=value ...]

Both are whole processes of `llamafactory-cli train`, on one thread each and side by side, since results depend on the
number of threads. SIGKILL comes at a random moment of a random step. Exits with 1 unless both end with the same bytes.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save-steps", type=int, default=4)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("saves/kill_and_resume"))
    parser.add_argument("--plot", type=Path, help="draw both reward curves into this file")
    args, overrides = parser.parse_known_args()
    overrides += [f"max_steps={args.steps}", "save_strategy=steps", f"save_steps={args.save_steps}", "plot_loss=false"]
    overrides += ["overwrite_output_dir=false", "log_completions=true"]
    whole, killed = args.folder / "whole", args.folder / "killed"
    if args.folder.exists():
        sys.exit(f"{args.folder} is there already: remove it, or name another --folder.")

    chance = random.Random(args.seed)
    due = sorted(chance.sample(range(args.save_steps + 1, args.steps), args.kills))
    reference = start(args.recipe, whole, overrides)
    kills = []
    for step in due:
        process = start(args.recipe, killed, overrides)
        while last_step(killed) < step:
            if process.poll() is not None:
                sys.exit(f"The run ended with exit code {process.returncode} before step {step}: see {killed}.log")
            time.sleep(0.05)
        time.sleep(chance.uniform(0, seconds_per_step(killed)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = max((int(folder.name.split("-")[1]) for folder in killed.glob("checkpoint-*")), default=0)
        kills.append({"killed_after_step": last_step(killed), "resumed_from": kept})
        print(f"killed after step {last_step(killed)}, going on from checkpoint-{kept}", flush=True)
    for process in (start(args.recipe, killed, overrides), reference):
        if process.wait() != 0:
            sys.exit(f"A run failed: see {args.folder}/*.log")

    report = compare(whole, killed) | {"kills": kills}
    print(json.dumps(report))
    if args.plot:
        draw(whole, killed, kills, args.plot)
    sys.exit(0 if report["same_adapter"] and report["same_completions"] and report["same_rewards"] else 1)


def start(recipe: Path, output_dir: Path, overrides: list[str]) -> "subprocess.Popen[bytes]":
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    program = Path(sys.executable).parent / "llamafactory-cli"
    command = [str(program), "train", str(recipe), f"output_dir={output_dir}", *overrides]
    with open(f"{output_dir}.log", "ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def steps(output_dir: Path) -> list[dict[str, Any]]:
    file = output_dir / "trainer_log.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []  # what follows the last newline may be torn
    return [line for line in map(json.loads, lines) if "reward" in line]


def last_step(output_dir: Path) -> int:
    return max((line["current_steps"] for line in steps(output_dir)), default=0)


def seconds_per_step(output_dir: Path) -> float:
    return steps(output_dir)[-1]["step_time"]


def compare(whole: Path, killed: Path) -> dict[str, Any]:
    def digest(folder: Path, name: str) -> str:
        return hashlib.sha256((folder / name).read_bytes()).hexdigest()

    rewards = [[line["reward"] for line in steps(folder)] for folder in (whole, killed)]
    return {
        "same_adapter": len({digest(folder, "adapter_model.safetensors") for folder in (whole, killed)}) == 1,
        "same_completions": len({digest(folder, "completions.jsonl") for folder in (whole, killed)}) == 1,
        "same_rewards": rewards[0] == rewards[1],
        "num_steps": [len(each) for each in rewards],
        "rewards": rewards[0],
    }


def draw(whole: Path, killed: Path, kills: list[dict[str, int]], file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2), dpi=110)
    for folder, style in ((whole, {"linewidth": 5, "alpha": 0.35}), (killed, {"linewidth": 1.5, "color": "black"})):
        lines = steps(folder)
        label = "left alone" if folder == whole else "killed and resumed"
        axes.plot([x["current_steps"] for x in lines], [x["reward"] for x in lines], label=label, **style)
    for each in kills:
        axes.axvline(each["killed_after_step"], color="tab:red", linestyle=":", linewidth=1)
        axes.axvline(each["resumed_from"], color="tab:green", linestyle=":", linewidth=1)
    axes.plot([], [], ":", color="tab:red", label="killed")
    axes.plot([], [], ":", color="tab:green", label="resumed from")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("reward")
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    main()
