"""The quick start's task learned with three objectives: their reward curves in one picture.

    python benchmarks/compare_objectives.py yaml_examples/quickstart.yaml docs/objectives.png [key=value ...]

Each is a whole process of `llamafactory-cli train`, one after the other. A run that is there already is only drawn.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


# Two steps to a rollout: with one, all clips are idle and the three are the same gradient up to their averages.
OBJECTIVES = {
    "grpo": ["loss_type=grpo"],
    "dapo, dynamic sampling": ["loss_type=dapo", "epsilon_high=0.28", "dynamic_sampling=true"],
    "gspo": ["loss_type=gspo", "epsilon=0.0003", "epsilon_high=0.0004"],
}
WINDOW = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("plot", type=Path)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--folder", type=Path, default=Path("saves/compare_objectives"))
    args, overrides = parser.parse_known_args()
    curves = {}
    for name, keys in OBJECTIVES.items():
        folder = args.folder / name.replace(", ", "-").replace(" ", "-")
        if not (folder / "all_results.json").is_file():
            command = [str(Path(sys.executable).parent / "llamafactory-cli"), "train", str(args.recipe)]
            command += [f"output_dir={folder}", f"max_steps={args.steps}", "steps_per_generation=2", *keys, *overrides]
            subprocess.run(command, check=True)
        curves[name] = rollouts(folder)
        rewards = [line["reward"] for line in curves[name]]
        print(json.dumps({"objective": name, "rewards": rewards, "last_four": sum(rewards[-4:]) / 4}), flush=True)
    draw(curves, args.plot)


def rollouts(folder: Path) -> list[dict[str, Any]]:
    """A line a rollout: the steps that use one again log no reward."""
    lines = map(json.loads, (folder / "trainer_log.jsonl").read_text().splitlines())
    return [line for line in lines if "reward" in line]


def draw(curves: dict[str, list[dict[str, Any]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.4), dpi=110)
    for name, lines in curves.items():
        steps = [line["current_steps"] for line in lines]
        rewards = [line["reward"] for line in lines]
        means = [sum(rewards[max(0, i - WINDOW + 1) : i + 1]) / min(i + 1, WINDOW) for i in range(len(rewards))]
        (line,) = axes.plot(steps, means, label=name)
        axes.plot(steps, rewards, ".", color=line.get_color(), alpha=0.4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"reward of a rollout, and mean of {WINDOW}")
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    main()
