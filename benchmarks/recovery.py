"""Runs that go wrong, with `on_alarm: warn` and with `on_alarm: recover`, side by side.

    grpo-stage quickstart-model quickstart/model
    python benchmarks/recovery.py saves/recovery [key=value ...] --scenario gcd --seeds 1 2 3

Each scenario is the quick start's recipe with one fault. A run that is there already is not made again.

    gcd       400 rows of which one answer earns 61 % (constant_answer_data.py); evaluated on balanced answers
    collapse  ten times the quick start's learning rate
    hacking   a reward that pays three times as much for stating nothing wrong as for the right answer; evaluated by the
              right answer alone

Writes a picture and a table: the mean training reward of the last five steps, the final evaluation, and the alarms.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml


HERE = Path(__file__).parent
ARMS = ("warn", "recover")
LAST = 5
COLORS = {"warn": "#e45756", "recover": "#4c78a8"}


@dataclass(frozen=True)
class Scenario:
    """A fault: what it changes in the quick start's recipe, and the metric that counts at the end."""

    keys: dict[str, Any]
    counts: str
    shown: tuple[str, ...] = field(default=("reward", "entropy"))


SCENARIOS = {
    "gcd": Scenario(
        {"dataset": "gcd", "dataset_dir": "{data}", "eval_dataset": "gcd_balanced", "max_steps": 30},
        counts="eval_reward",
        shown=("reward", "completions/same_answer_frac", "entropy"),
    ),
    "collapse": Scenario({"learning_rate": 3e-3, "val_size": 0.1, "max_steps": 40}, counts="eval_reward"),
    "hacking": Scenario(
        {
            "reward_funcs": f"accuracy,{HERE / 'broken_reward.py'}:nothing_wrong",
            "reward_weights": "1,3",
            "val_size": 16,
            "eval_strategy": "steps",
            "eval_steps": 8,
            "max_steps": 40,
        },
        counts="eval_rewards/accuracy/mean",
        shown=("rewards/accuracy/mean", "rewards/nothing_wrong/mean", "entropy"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--scenario", choices=SCENARIOS, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("overrides", nargs="*", help="key=value of the recipe, such as the model's folder")
    args = parser.parse_intermixed_args()
    scenario = SCENARIOS[args.scenario]
    data = args.output / "data"
    subprocess.run([sys.executable, HERE / "constant_answer_data.py", data], check=True)
    runs = {
        (arm, seed): _run(args.output / args.scenario / f"{arm}-{seed}", scenario, arm, seed, data, args.overrides)
        for seed in args.seeds
        for arm in ARMS
    }
    rows = [_row(arm, seed, folder, scenario) for (arm, seed), folder in runs.items()]
    (args.output / f"{args.scenario}.json").write_text(json.dumps(rows, indent=2))
    print(f"| `on_alarm` | seed | reward, last {LAST} steps | {scenario.counts} | alarms (step) | back to |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        alarms = ", ".join(f"{name} ({step})" for name, step in row["alarms"]) or "none"
        back = ", ".join(map(str, row["resumed_steps"])) or "-"
        print(f"| {row['arm']} | {row['seed']} | {row['reward']:.2f} | {row['final']:.2f} | {alarms} | {back} |")
    _draw(runs, scenario, args.output / f"{args.scenario}.png")


def _run(folder: Path, scenario: Scenario, arm: str, seed: int, data: Path, overrides: list[str]) -> Path:
    if (folder / "all_results.json").exists():
        return folder
    recipe = yaml.safe_load((HERE.parent / "yaml_examples" / "quickstart.yaml").read_text())
    recipe |= {
        **{"save_strategy": "steps", "save_steps": 2, "plot_loss": False, "do_eval": True, "eval_num_generations": 4},
        **{"output_dir": str(folder), "seed": seed, "on_alarm": arm, "eval_strategy": "no"},
        **{key: str(data) if value == "{data}" else value for key, value in scenario.keys.items()},
    }
    if recipe["eval_strategy"] == "no":
        recipe |= {"eval_strategy": "steps", "eval_steps": recipe["max_steps"]}
    file = folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe))
    with folder.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "grpo_stage", "train", str(file), *overrides]
        subprocess.run(command, stdout=log, stderr=log, check=True)
    return folder


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _row(arm: str, seed: int, folder: Path, scenario: Scenario) -> dict[str, Any]:
    log = _lines(folder / "trainer_log.jsonl")
    recoveries = folder / "recoveries.json"
    return {
        "arm": arm,
        "seed": seed,
        "reward": fmean([line["reward"] for line in log if "reward" in line][-LAST:]),
        "final": [line[scenario.counts] for line in log if scenario.counts in line][-1],
        "alarms": [(line["monitor"], line["step"]) for line in _lines(folder / "alarms.jsonl")],
        "resumed_steps": [each["resumed_step"] for each in json.loads(recoveries.read_text())]
        if recoveries.exists()
        else [],
    }


def _draw(runs: dict[tuple[str, int], Path], scenario: Scenario, file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(scenario.shown), figsize=(4.4 * len(scenario.shown), 3.2), squeeze=False)
    for name, axis in zip(scenario.shown, axes[0], strict=True):
        for (arm, seed), folder in runs.items():
            points = [
                (line["current_steps"], line[name]) for line in _lines(folder / "trainer_log.jsonl") if name in line
            ]
            label = f"on_alarm: {arm}" if seed == min(seed for _, seed in runs) else None
            axis.plot(*zip(*points, strict=True), color=COLORS[arm], alpha=0.8, label=label)
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
