"""Runs that go wrong, with `on_alarm: warn` and with `on_alarm: recover`, side by side.

    grpo-stage quickstart-model quickstart/model
    python benchmarks/recovery.py saves/recovery [key=value ...] --scenario gcd --seeds 1 2 3

Each scenario is a sound recipe with one fault. A run that is there already is not made again.

    gcd       the quick start's recipe on 400 rows of which one answer earns 61 % (constant_answer_data.py); evaluated
              on balanced answers; minutes a run
    collapse  the quick start's recipe with ten times its learning rate; minutes a run
    hacking   the random two-layer model of tiny_runs.py, which is to write many different characters and is paid eight
              times as much for digits; evaluated by what is wanted; seconds a run

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

import tiny_runs
import yaml


HERE = Path(__file__).parent
TINY_RUNS = HERE / "tiny_runs.py"
ARMS = ("warn", "recover")
LAST = 5
STOPPED_BY_ALARM = 3
COLORS = {"warn": "#e45756", "recover": "#4c78a8"}


@dataclass(frozen=True)
class Scenario:
    """A fault: what it changes in the quick start's recipe, and the metric that counts at the end."""

    keys: dict[str, Any]
    counts: str
    shown: tuple[str, ...] = field(default=("reward", "entropy"))
    is_tiny: bool = False
    """Whether the model is that of tiny_runs.py."""


SCENARIOS = {
    "gcd": Scenario(
        {"dataset": "gcd", "dataset_dir": "{data}", "eval_dataset": "gcd_balanced", "max_steps": 30},
        counts="eval_reward",
        shown=("reward", "completions/same_answer_frac", "entropy"),
    ),
    "collapse": Scenario({"learning_rate": 3e-3, "val_size": 0.1, "max_steps": 40}, counts="eval_reward"),
    "hacking": Scenario(
        {
            **{"val_size": 32, "eval_strategy": "steps", "eval_steps": 5},
            "reward_funcs": f"{TINY_RUNS}:letters,{TINY_RUNS}:digits",
            "reward_weights": "1,8",
            "learning_rate": 3e-3,
            "max_steps": 100,
        },
        counts="eval_rewards/letters/mean@4",
        shown=("rewards/letters/mean", "rewards/digits/mean", "kl"),
        is_tiny=True,
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
    print(f"| `on_alarm` | seed | steps | reward, last {LAST} | {scenario.counts} | alarms (step) | back to |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        alarms = ", ".join(f"{name} ({step})" for name, step in row["alarms"]) or "none"
        back = ", ".join(map(str, row["resumed_steps"])) or "-"
        final = "-" if row["final"] is None else f"{row['final']:.2f}"
        print(f"| {row['arm']} | {row['seed']} | {row['steps']} | {row['reward']:.2f} | {final} | {alarms} | {back} |")
    _draw(runs, scenario, args.output / f"{args.scenario}.png")


def _run(folder: Path, scenario: Scenario, arm: str, seed: int, data: Path, overrides: list[str]) -> Path:
    ended = folder.with_suffix(".exit_code")
    if ended.exists():
        return folder
    recipe = yaml.safe_load((HERE.parent / "yaml_examples" / "quickstart.yaml").read_text())
    if scenario.is_tiny:
        model = folder.parents[1] / "tiny-model"
        if not model.exists():
            tiny_runs.make_model(Path(recipe["model_name_or_path"]), model)
        recipe = tiny_runs.recipe(model)
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
        code = subprocess.run(command, stdout=log, stderr=log).returncode
    if code not in (0, STOPPED_BY_ALARM):
        raise RuntimeError(f"{' '.join(command)} ended with exit code {code}: see {log.name}")
    ended.write_text(str(code))
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
        "steps": max(line["current_steps"] for line in log if "reward" in line),
        "final": next((line[scenario.counts] for line in reversed(log) if scenario.counts in line), None),
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
