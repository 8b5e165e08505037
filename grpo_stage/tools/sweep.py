"""Train a recipe with several settings and seeds, each with the same budget, and compare what they reach.

Every combination is checked before the first run starts. Each run has a folder of its own, and is started as
`llamafactory-cli train` would. The same command again goes on: finished runs are kept, an interrupted one continues
from its checkpoint. A run that fails is named, and the others go on.

A budget of `tokens` or `seconds` is reached within a step, and the run ends with that step: it spends at most one step
more. Keys joined by `+` change together, such as the group size and the prompts of a step:

    grpo-stage sweep x.yaml --set num_generations=4,8,16 --seeds 3 --budget tokens=2e6
    grpo-stage sweep x.yaml --set num_generations+per_device_train_batch_size=4+16,8+8,16+4 --budget steps=100
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_stage.survival.stop import STOP_SIGNALS, run_and_pass_on
from grpo_stage.tools.recipe_file import (
    ATTENTION,
    add_recipe_arguments,
    errors_explained,
    parse_without_run,
    quiet_host,
    read_recipe,
    write_json,
)


if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from grpo_stage.survival.budget import Budget
    from grpo_stage.tools.sweep_result import RunResult, SettingResult


NAME = "sweep"
HELP = "train with several settings and seeds on equal budgets, and compare them"

DEFAULT_SEED = 42
"""transformers' own."""
POLL_INTERVAL_S = 1.0
UNBOUNDED_STEPS = 10**6
"""`max_steps` of a run that its budget ends."""
_OWN_KEYS = (
    "seed",
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "logging_steps",
    "resume_from_checkpoint",
    "overwrite_output_dir",
)
_STOPPED = tuple(128 + signum for signum in STOP_SIGNALS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """A run that is to be made."""

    setting: str
    seed: int
    name: str
    """Of its folder, and of its files beside it: NAME.yaml, NAME.log, and NAME.json once it is finished."""
    recipe: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """The content of the `--json` file."""

    budget: str
    settings: "Sequence[SettingResult]"
    runs: "Sequence[RunResult]"
    failures: Mapping[str, str]
    """The error of each run that failed, by the run's name."""
    picture: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument(
        "--set",
        action="append",
        required=True,
        metavar="KEY=VALUE,VALUE",
        help="a key and its values; several `--set` are combined; values that hold a comma as a YAML list",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds a setting (default: 3)")
    parser.add_argument("--budget", required=True, metavar="UNIT=N", help="of each run: tokens, steps or seconds")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where the runs go (default: `sweep` in the recipe's output_dir)"
    )


def run(args: argparse.Namespace) -> int:
    environment = dict(os.environ)  # the runs' own: what follows is meant for this process
    with quiet_host():
        from grpo_stage.survival.budget import Budget

        configuration = read_recipe(args.config, args.overrides)
        budget = Budget.parse(args.budget)
        if args.seeds < 1:
            raise ValueError(f"`--seeds {args.seeds}` must be at least 1.")
        settings = combinations(args.set)
        folder = args.output or Path(str(configuration.get("output_dir") or "saves"), "sweep")
        planned = plan(configuration, settings, args.seeds, budget, folder)
        with errors_explained(configuration):
            check(planned, args.seeds, budget)
        for one in planned:
            write_recipe(folder, one, budget)
        results, failures = run_all(planned, folder, budget, environment)
    return _report(args, folder, budget, results, failures)


def combinations(texts: Sequence[str]) -> list[dict[str, Any]]:
    """The settings that `--set` asks for: every value of one with every value of the others.

    Raises:
        ValueError: if a text is no `key=value,value`, or its key may not be set.
    """
    axes = [list(_axis(text)) for text in texts]
    keys = [key for axis in axes for key in axis[0]]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"`--set` names {', '.join(f'`{key}`' for key in sorted(twice))} twice. Name each key once.")
    settings = [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes)]
    if any(settings.count(setting) > 1 for setting in settings):
        raise ValueError(f"`--set {' '.join(texts)}` gives one setting twice. Name each value once.")
    return settings


def _axis(text: str) -> Iterator[dict[str, Any]]:
    import yaml

    names, has_value, values = text.partition("=")
    keys = names.split("+")
    if not has_value or not values or not all(keys):
        raise ValueError(f"`--set {text}` is no `key=value,value`. Write for example `--set num_generations=4,8,16`.")
    if own := [key for key in keys if key in _OWN_KEYS]:
        raise ValueError(
            f"`--set {text}`: the sweep itself sets `{own[0]}`. `--seeds` says how many seeds each setting gets, "
            "`--budget` how long a run is, `--output` where the runs go."
        )
    listed = yaml.safe_load(values) if values.startswith("[") else values.split(",")
    for value in listed:
        parts = value.split("+") if isinstance(value, str) and len(keys) > 1 else [value]
        if len(parts) != len(keys):
            raise ValueError(f"`--set {text}`: `{value}` gives {len(parts)} values for {len(keys)} keys.")
        yield {k: yaml.safe_load(v) if isinstance(v, str) else v for k, v in zip(keys, parts, strict=True)}


def plan(
    configuration: Mapping[str, Any],
    settings: Sequence[Mapping[str, Any]],
    num_seeds: int,
    budget: "Budget",
    folder: Path,
) -> list[PlannedRun]:
    """The runs, seed by seed, so that a sweep that is not finished compares all settings on the seeds it has."""
    first = int(configuration.get("seed") or DEFAULT_SEED)
    names = [", ".join(f"{key}={_shown(value)}" for key, value in setting.items()) for setting in settings]
    slugs = [re.sub(r"[^\w.=+-]+", "-", name)[:80] for name in names]
    slugs = [f"{slug}-{i}" if slugs.count(slug) > 1 else slug for i, slug in enumerate(slugs)]
    planned = []
    for seed, i in itertools.product(range(first, first + num_seeds), range(len(settings))):
        name = f"{slugs[i]}-seed={seed}"
        own = {
            "do_train": True,
            "seed": seed,
            "output_dir": str(folder / name),
            "max_steps": budget.limit if budget.unit == "steps" else UNBOUNDED_STEPS,
            "logging_steps": 1,  # the budget is looked at when a step is logged
            "overwrite_output_dir": False,
            "resume_from_checkpoint": None,
        }
        recipe = {**configuration, **settings[i], **own}
        planned.append(PlannedRun(setting=names[i], seed=seed, name=name, recipe=recipe))
    return planned


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def check(planned: Sequence[PlannedRun], num_seeds: int, budget: "Budget") -> None:
    """Refuse settings that a run would refuse.

    Raises:
        ValueError: naming the setting.
    """
    from grpo_stage.host.recipe import is_open_ended

    for one in planned[: len(planned) // num_seeds]:  # of the first seed
        try:
            arguments = parse_without_run(one.recipe, on_device=False)
        except ValueError as error:
            raise ValueError(f"With `{one.setting}` the recipe is refused, and no run was started: {error}") from error
        if budget.unit != "steps" and not is_open_ended(arguments.training):
            training = arguments.training
            raise ValueError(
                f"`--budget {budget}` with `lr_scheduler_type: {training.lr_scheduler_type.value}` and "
                f"`warmup_steps: {training.warmup_steps}`: the rate of a step depends on how many there will be, "
                "which such a budget does not say. Write `lr_scheduler_type: constant` (or `constant_with_warmup` "
                "with whole `warmup_steps`), or a budget of `steps`."
            )


def write_recipe(folder: Path, planned: PlannedRun, budget: "Budget") -> None:
    """Write a run's recipe beside its folder.

    Raises:
        ValueError: if another recipe or budget is there.
    """
    import yaml

    path = folder / f"{planned.name}.yaml"
    text = f"# A run of grpo-stage sweep, with a budget of {budget}.\n"
    text += yaml.safe_dump(dict(planned.recipe), allow_unicode=True, sort_keys=False)
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{path} holds another recipe or budget: an earlier sweep's run is in its folder, and the two could "
                "not be compared. Choose another `--output`, or delete the earlier one."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)  # a recipe may hold a secret
    path.write_text(text, encoding="utf-8")


def run_all(
    planned: Sequence[PlannedRun], folder: Path, budget: "Budget", environment: Mapping[str, str]
) -> "tuple[list[RunResult], dict[str, str]]":
    """Make the runs that are not finished, one after another. Returns results, and errors by the run's name.

    Raises:
        SystemExit: if a signal stopped a run; the same sweep can be started again.
    """
    from grpo_stage.tools.sweep_result import RunResult, run_result

    results, failures = [], {}
    with _progress() as progress:
        overall = progress.add_task("runs", total=len(planned))
        for one in planned:
            finished = folder / f"{one.name}.json"
            if not finished.exists():
                error = _train(one, folder, budget, environment, progress)
                if error is None:
                    result = run_result(one.setting, one.seed, budget, _log_lines(folder / one.name))
                    write_json(finished, dataclasses.asdict(result))
                else:
                    failures[one.name] = error
                    progress.console.print(f"{one.name} failed: {error}", markup=False)
            if finished.exists():
                results.append(RunResult(**json.loads(finished.read_text(encoding="utf-8"))))
            progress.advance(overall)
    return results, failures


def _train(
    planned: PlannedRun, folder: Path, budget: "Budget", environment: Mapping[str, str], progress: "Progress"
) -> str | None:
    """Train in a process of its own, from the last checkpoint if there is one. Returns its error, if it failed."""
    from grpo_stage.survival.budget import VARIABLE

    command = [sys.executable, "-m", "grpo_stage", "train", str(folder / f"{planned.name}.yaml")]
    has_checkpoint = any((folder / planned.name).glob("checkpoint-*"))
    if not has_checkpoint:
        command.append("overwrite_output_dir=true")  # what a run without a checkpoint left there
    own = {} if budget.unit == "steps" else {VARIABLE: str(budget)}
    task = progress.add_task(planned.name, total=budget.limit)
    log = folder / f"{planned.name}.log"
    with log.open("ab" if has_checkpoint else "wb") as file, _followed(folder / planned.name, budget, progress, task):
        code = run_and_pass_on(command, stdout=file, stderr=subprocess.STDOUT, env={**environment, **own}).returncode
    progress.remove_task(task)
    if code in _STOPPED:
        print(f"{planned.name} was stopped. The same command goes on from there.", file=sys.stderr)
        raise SystemExit(code)
    return None if code == 0 else f"exit code {code}: {_last_words(log)}"


@contextmanager
def _followed(folder: Path, budget: "Budget", progress: "Progress", task: "TaskID") -> Iterator[None]:
    """A block in which the progress shows what the run in `folder` has spent."""
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(POLL_INTERVAL_S):
            steps = _log_lines(folder)
            if steps:
                progress.update(task, completed=budget.spent(steps)[-1])

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _log_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that are whole; none before its first step."""
    from grpo_stage.records.run_files import LOG_FILE

    path = folder / LOG_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _last_words(log: Path) -> str:
    """The last line of a failed run's output, which is the message of its error."""
    from grpo_stage.records.redaction import mask_text

    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{mask_text(lines[-1].strip()) if lines else 'no output'} (all of it in {log})"


def _progress() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def _report(
    args: argparse.Namespace, folder: Path, budget: "Budget", runs: "list[RunResult]", failures: dict[str, str]
) -> int:
    from grpo_stage.tools.sweep_result import draw, setting_results

    picture = folder / "sweep.png" if runs else None
    if picture:
        draw(picture, runs, budget)
    result = SweepResult(
        budget=str(budget),
        settings=setting_results(runs),
        runs=runs,
        failures=failures,
        picture=str(picture) if picture else None,
    )
    write_json(folder / "sweep.json", dataclasses.asdict(result))
    write_json(args.json, dataclasses.asdict(result))
    if str(args.json) != "-":
        _print(result)
    return ATTENTION if failures else 0


def _print(result: SweepResult) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if result.runs:
        metrics = dict.fromkeys(run.metric for run in result.runs)
        table = Table(title=f"{' / '.join(metrics)}; budget {result.budget}; intervals of 95 % over seeds")
        for name in ("", "runs", "reward", "behind the best", "dead groups", "steps", "tokens", "s in steps"):
            table.add_column(name, justify="right")
        for i, one in enumerate(result.settings, start=1):  # the names of several keys have no room in a column
            console.print(f"{i}: {one.setting}", markup=False)
            table.add_row(
                str(i),
                str(one.num_runs),
                _with_interval(one.reward, one.half_width),
                _with_interval(one.behind_best, one.behind_best_half_width) if one.behind_best else "the best",
                f"{one.frac_reward_zero_std:.0%}",
                f"{one.num_steps:.0f}",
                f"{one.num_tokens:.0f}",
                f"{one.step_seconds:.0f}",
            )
        console.print(table)
        console.print(f"Curves: {result.picture}", markup=False)
    for name, error in result.failures.items():
        console.print(f"Failed: {name}: {error}", markup=False)


def _with_interval(value: float, half: float | None) -> str:
    return f"{value:.3f}" if half is None else f"{value:.3f} ± {half:.3f}"
