"""The watches on the simulated scenarios of the package `rldoctor` (0.2.0, Apache-2.0), beside its own detectors.

    pip install --no-deps --target /tmp/rldoctor rldoctor==0.2.0
    PYTHONPATH=/tmp/rldoctor python benchmarks/rldoctor_scenarios.py --seeds 20

Its detectors read a finished run, ours each line as it comes. Its logs have TRL's names. Two figures that our runs log
are computed from its pass rate p, as it computes the share of equal groups itself: the shares of groups of 8 that are
all right (p^8) and all wrong ((1 - p)^8).
"""

import argparse
from collections import Counter
from typing import Any

from false_alarms import alarms_of
from rl_doctor.detectors import build
from rl_doctor.detectors.base import Severity
from rl_doctor.simulate import SCENARIOS, simulate, simulate_run


def line_of(record: dict[str, Any], scenario: str) -> dict[str, Any]:
    scale = 0.05 if scenario == "format_domination" else 1.0
    rate = min(1.0, max(0.0, record["rewards/correctness/mean"] / scale))
    line = {
        **record,
        "current_steps": record["step"] + 1,
        "completions/frac_groups_all_right": rate**8,
        "completions/frac_groups_all_wrong": (1 - rate) ** 8,
    }
    del line["step"]
    if "eval/accuracy" in line:
        line["eval_reward"] = line.pop("eval/accuracy")
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    num_seeds = parser.parse_args().seeds
    print(f"| scenario | ours, of {num_seeds} runs (median step of 400) | rldoctor, warnings and worse |")
    print("|---|---|---|")
    for scenario in SCENARIOS:
        ours: dict[str, list[int]] = {}
        theirs: Counter[str] = Counter()
        for seed in range(num_seeds):
            records, config = simulate(scenario, seed=seed)
            settings = {"learning_rate": config["learning_rate"], "beta": config["beta"]}
            for alarm in alarms_of([line_of(record, scenario) for record in records], settings):
                ours.setdefault(alarm.monitor, []).append(alarm.step)
            run = simulate_run(scenario, seed=seed)
            theirs.update(d.name for d in build() if d.check(run).severity >= Severity.WARNING)
        own = ", ".join(f"{name} {len(s)} ({sorted(s)[len(s) // 2]})" for name, s in ours.items())
        other = ", ".join(f"{name} {count}" for name, count in theirs.items())
        print(f"| {scenario} | {own or 'quiet'} | {other or 'quiet'} |", flush=True)


if __name__ == "__main__":
    main()
