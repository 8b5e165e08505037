"""Judge finished runs as the watches do in a run, line by line, and count their alarms.

    python benchmarks/false_alarms.py saves/quickstart saves/other       # folders, or trainer_log.jsonl files
    python benchmarks/false_alarms.py --measure saves/quickstart         # from completions.jsonl: older runs
    python benchmarks/false_alarms.py --simulated 30                     # healthy and failing simulated runs

`--measure` adds the metrics of the completions (`completions/same_answer_frac` and so on), as the monitors would have
measured them, to the log of a run that was made with `log_completions` and before the monitors were. `--write FOLDER`
keeps each history, metrics alone, as the tests have them.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from grpo_stage.monitors.alarm import Alarm, History
from grpo_stage.monitors.dead_groups import GroupOutcomes
from grpo_stage.monitors.language import LanguageMixing
from grpo_stage.monitors.monitor import Monitor
from grpo_stage.monitors.one_answer import AnswerDiversity
from grpo_stage.monitors.repetition import Repetition
from grpo_stage.monitors.reward_hacking import PaidCompletions
from grpo_stage.monitors.table import WATCHES
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup, ScoredGroup


LEFT_OUT = ("elapsed_time", "remaining_time", "percentage", "total_steps", "throughput", "total_tokens")


def alarms_of(lines: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Alarm]:
    """The first alarm of each watch, in the order of the log."""
    watches = {name: watch(settings) for name, watch in WATCHES.items()}
    history = History()
    alarms: dict[str, Alarm] = {}
    for line in lines:
        history.add(line)
        for name, watch in watches.items():
            if name not in alarms and (alarm := watch.judge(history)) is not None:
                alarms[name] = alarm
    return list(alarms.values())


def lines_of_run(path: Path, measures: bool) -> list[dict[str, Any]]:
    file = path / "trainer_log.jsonl" if path.is_dir() else path
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if measures:
        measured = measured_by_step(file.with_name("completions.jsonl"))
        lines = [line | measured.get(line["current_steps"], {}) for line in lines]
    return lines


def measured_by_step(file: Path) -> dict[int, dict[str, float]]:
    """What the monitors of completions would have measured, by step. Rows without token ids: characters stand in."""
    by_step: defaultdict[int, defaultdict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for text in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        by_step[row["step"]][row["prompt_index"]].append(row)
    monitors: Sequence[Monitor] = (
        GroupOutcomes(), AnswerDiversity(), Repetition(), LanguageMixing(), PaidCompletions()
    )  # fmt: skip
    measured = {}
    for step, groups in sorted(by_step.items()):
        metrics = MetricTracker()
        for monitor in monitors:
            monitor.after_scoring([_group(rows) for rows in groups.values()], step, metrics)
        measured[step] = metrics.take()
    return measured


def _group(rows: Sequence[Mapping[str, Any]]) -> ScoredGroup:
    prompt = Prompt(
        index=rows[0]["prompt_index"],
        token_ids=(0,),
        messages=({"role": "user", "content": rows[0]["prompt"]},),
        reference=rows[0]["reference"],
    )
    completions = tuple(
        Completion(
            token_ids=tuple(map(ord, row["completion"])) or (0,),
            sampling_logprobs=(),
            finish_reason=FinishReason(row["finish_reason"]),
            text=row["completion"],
        )
        for row in rows
    )
    return ScoredGroup(
        group=RolloutGroup(prompt=prompt, completions=completions, policy_version=0),
        rewards=tuple((row["reward"],) for row in rows),
        total_rewards=tuple(row["reward"] for row in rows),
    )


def settings_of(path: Path) -> dict[str, Any]:
    """The keys that the run was given, where its folder has them."""
    file = path / "training_args.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def judge_runs(paths: Sequence[Path], measures: bool, folder: Path | None) -> None:
    total: Counter[str] = Counter()
    for path in paths:
        lines = lines_of_run(path, measures)
        alarms = alarms_of(lines, settings_of(path))
        total.update(alarm.monitor for alarm in alarms)
        print(f"{path.name}: {len(lines)} lines, {len(alarms)} alarms")
        for alarm in alarms:
            print(f"    step {alarm.step} (sound until {alarm.onset}) {alarm.monitor}: {alarm.seen} {alarm.settings}")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            kept = [
                {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in line.items() if _is_metric(k, v)}
                for line in lines
            ]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            (folder / f"{path.name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(paths)} runs: {dict(total) or 'no alarm'}")


def _is_metric(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and name not in LEFT_OUT


def judge_simulated(num_seeds: int) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.unit.simulated_histories import FAILING, HEALTHY, lines_of, one_answer_lines

    false_alarms: Counter[str] = Counter()
    for kind, run in HEALTHY.items():
        own = Counter(alarm.monitor for seed in range(num_seeds) for alarm in alarms_of(lines_of(run, seed), {}))
        false_alarms += own
        print(f"healthy: {kind}: {dict(own) or 'quiet'}", flush=True)
    print(f"{len(HEALTHY) * num_seeds} healthy runs: {dict(false_alarms) or 'no alarm'}")
    for name in WATCHES:
        found = []
        for seed in range(num_seeds):
            lines = one_answer_lines(seed) if name == "one_answer" else lines_of(FAILING[name], seed)
            found += [alarm for alarm in alarms_of(lines, {}) if alarm.monitor == name]
        steps = sorted(alarm.step for alarm in found)
        middle = steps[len(steps) // 2] if steps else "-"
        print(f"failing: {name}: found in {len(found)} of {num_seeds}, at step {middle} in the median", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="output folders or trainer_log.jsonl files")
    parser.add_argument("--measure", action="store_true", help="measure completions.jsonl")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="keep the histories there")
    parser.add_argument(
        "--simulated", type=int, default=0, metavar="SEEDS", help="judge simulated runs of so many seeds"
    )
    args = parser.parse_args()
    if args.runs:
        judge_runs(args.runs, args.measure, args.write)
    if args.simulated:
        judge_simulated(args.simulated)


if __name__ == "__main__":
    main()
