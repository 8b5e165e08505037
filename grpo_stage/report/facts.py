"""All that a page tells, as plain values: what `--json` writes, and what the page's template reads."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from grpo_stage import __version__
from grpo_stage.monitors.alarm import Alarm, History, Series, Watch
from grpo_stage.records.completions import COMPLETIONS_FILE
from grpo_stage.records.redaction import mask, mask_text
from grpo_stage.records.run_files import ALARMS_FILE, LOG_FILE
from grpo_stage.report.charts import DrawnSection, sections_of
from grpo_stage.report.completions import Completions, completions_of
from grpo_stage.report.run_folder import Outcome, Run, read_run
from grpo_stage.report.settings import Settings, shown


MAX_RUNS = 12
MAX_ALARMS = 50
"""Of a run, on the page."""
_END_SHARE = 0.1
"""The start and the end of a curve are means over this part of it."""
_MISSING = "–"  # noqa: RUF001


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A metric at the start and at the end of a run: means over the first and the last tenth of its log lines."""

    metric: str
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of the time that the steps took."""

    name: str
    seconds: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """One run on the page."""

    name: str
    folder: str
    outcome: Outcome
    sentences: Sequence[str]
    """The summary in words."""
    steps: int
    total_steps: int | None
    elapsed_s: float
    changes: Sequence[Change]
    alarms: Sequence[Alarm]
    alarms_are_judged_now: bool
    notes: Sequence[str]
    """What was damaged, is missing, or was not a number."""
    phases: Sequence[Phase]
    memory: Mapping[str, float]
    """GiB by phase: the most of any log line."""
    settings: Mapping[str, str]
    settings_sources: Sequence[str]
    versions: Mapping[str, str]
    completions: Completions


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A setting, version or fact that is not the same in all runs."""

    name: str
    values: Sequence[str]
    """Of each run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A page."""

    version: str
    """Of this package."""
    made: str
    runs: Sequence[RunFacts]
    differences: Sequence[Difference]
    sections: Sequence[DrawnSection]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without NaN."""
        return dataclasses.asdict(self)


def facts_of(folders: Sequence[Path], watches: Mapping[str, type[Watch]] | None = None) -> Facts:
    """Read the folders of runs.

    Args:
        folders: the `output_dir` of each run; the first is what the others are compared with.
        watches: see `read_run`.

    Raises:
        ValueError: if one of them is no run's, or there are too many.
    """
    if len(folders) > MAX_RUNS:
        raise ValueError(f"{len(folders)} runs are more than fit on a page. Name at most {MAX_RUNS}.")
    runs = [read_run(folder, watches) for folder in folders]
    names = _distinct([run.name for run in runs])
    return Facts(
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M"),
        runs=[_run_facts(run, name) for run, name in zip(runs, names, strict=True)],
        differences=differences([run.settings for run in runs]),
        sections=sections_of([run.log.history for run in runs]),
    )


def _run_facts(run: Run, name: str) -> RunFacts:
    secrets = run.settings.secrets
    completions = completions_of(run.folder, secrets)
    changes = _changes(run.log.history)
    return RunFacts(
        name=mask_text(name, secrets),
        folder=mask_text(str(run.folder), secrets),
        outcome=run.outcome,
        sentences=[mask_text(text, secrets) for text in _sentences(run)],
        steps=run.steps,
        total_steps=run.log.total_steps,
        elapsed_s=run.log.elapsed_s,
        changes=changes,
        alarms=[_masked(alarm, secrets) for alarm in run.alarms.found[:MAX_ALARMS]],
        alarms_are_judged_now=run.alarms.are_judged_now,
        notes=_notes(run, completions),
        phases=phases(run.log.history, run.settings.values),
        memory=memory(run.log.history),
        settings={key: mask_text(shown(value), secrets) for key, value in sorted(run.settings.values.items())},
        settings_sources=run.settings.sources,
        versions={key: mask_text(value, secrets) for key, value in run.settings.versions.items()},
        completions=completions,
    )


def _masked(alarm: Alarm, secrets: frozenset[str]) -> Alarm:
    def clean(text: str) -> str:
        return mask_text(text, secrets)[:3000]

    return dataclasses.replace(
        alarm,
        monitor=clean(alarm.monitor),
        seen=clean(alarm.seen),
        meaning=clean(alarm.meaning),
        remedy=clean(alarm.remedy),
        settings={key: shown(value) for key, value in mask(alarm.settings).items()},
    )


def _distinct(names: Sequence[str]) -> list[str]:
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
    ]


# The summary


def _changes(history: History) -> list[Change]:
    """Of the rewards: the total, then each function, in training and evaluation."""
    names = [
        name
        for name in history.names()
        if name in ("reward", "eval_reward") or (name.startswith("rewards/") and name.endswith("/mean"))
    ]
    return [change for name in sorted(names, key=_rank) if (change := change_of(history, name)) is not None]


def _rank(name: str) -> tuple[int, str]:
    return {"reward": 0, "eval_reward": 1}.get(name, 2), name


def change_of(history: History, metric: str) -> Change | None:
    """A metric's start and end; None where fewer than two of its values are finite."""
    values = [value for value in history.series(metric).values if math.isfinite(value)]
    if len(values) < 2:
        return None
    count = max(1, round(len(values) * _END_SHARE))
    start, end = (math.fsum(part) / count for part in (values[:count], values[-count:]))
    return Change(metric=metric, start=float(f"{start:.5g}"), end=float(f"{end:.5g}"))


def _sentences(run: Run) -> list[str]:
    return [text for text in (_what(run), *_how(run.log.history), _speed(run), _ill(run)) if text]


def _what(run: Run) -> str:
    """What was trained, on what."""
    values: Mapping[str, Any] = run.settings.values

    def known(key: str) -> str:
        value = values.get(key) or ""
        return ", ".join(map(shown, value)) if isinstance(value, list) else shown(value)

    model, dataset, tuning = known("model_name_or_path"), known("dataset"), known("finetuning_type")
    rank, rewards = known("lora_rank"), known("reward_funcs")
    tuning = tuning or ("lora" if rank else "")
    how = f" with {tuning}" if tuning else ""
    how += f" of rank {rank}" if rank and tuning == "lora" else ""
    rows = run.settings.rows.get("num")
    on = f" on {dataset}" if dataset else ""
    on += f" ({rows:,} prompts)" if isinstance(rows, int) else ""
    paid = f", rewarded by {rewards}" if rewards else ""
    if not (model or dataset or rewards):
        return "The folder does not tell the model and the data."
    return f"GRPO of {model or 'a model'}{how}{on}{paid}."


def _how(history: History) -> list[str]:
    """How it went: the rewards, and what a reward's curve does not show."""
    total = history.series("reward")
    if not len(total):
        return ["No reward is in its log: it is a run of another stage, or it ended before its first step."]
    if len(total) == 1:
        return [f"The reward was {number(total.values[0])} in its only log line."]
    said = []
    for name, metric, form in (
        ("The reward", "reward", number),
        ("On held-out prompts it", "eval_reward", number),
        ("Tokens of a completion", "completions/mean_length", number),
        ("Entropy", "entropy", number),
        ("Groups that teach nothing", "frac_reward_zero_std", share),
    ):
        change = change_of(history, metric)
        if change is None:
            continue
        start, end = form(change.start), form(change.end)
        went = f"stayed at {end}" if start == end else f"went from {start} to {end}"
        said.append(f"{name} {went}")
    return [f"{each}." for each in said]


def _speed(run: Run) -> str:
    steps, elapsed_s = run.steps, run.log.elapsed_s
    if not steps or not elapsed_s:
        return ""
    tokens = run.log.history.series("num_tokens").values
    sampled = f" for {tokens[-1]:,.0f} tokens" if tokens and math.isfinite(tokens[-1]) else ""
    return f"It took {duration(elapsed_s)}{sampled}: {number(elapsed_s / steps)} s a step."


def _ill(run: Run) -> str:
    found = run.alarms.found
    if not found:
        return ""
    names = list(dict.fromkeys(alarm.monitor for alarm in found))
    return (
        f"{len(found)} {'alarm' if len(found) == 1 else 'alarms'}: {', '.join(names)}, first at step {found[0].step}."
    )


def _notes(run: Run, completions: Completions) -> list[str]:
    log = run.log
    damaged = {
        LOG_FILE: log.num_damaged,
        COMPLETIONS_FILE: completions.num_damaged,
        ALARMS_FILE: run.num_damaged_alarms,
    }
    notes = [
        f"{count:,} damaged {'line' if count == 1 else 'lines'} of {name} {'is' if count == 1 else 'are'} left out."
        for name, count in damaged.items()
        if count
    ]
    notes += [
        f"{name} was NaN or infinite {count:,} {'time' if count == 1 else 'times'}, first at step {step:,}."
        for name, (count, step) in sorted(log.not_finite.items())[:20]
    ]
    if len(run.alarms.found) > MAX_ALARMS:
        notes.append(f"Of {len(run.alarms.found):,} alarms the first {MAX_ALARMS} are shown.")
    if not log.num_lines:
        notes.append(f"There is no {LOG_FILE}, so there are no curves.")
    if not completions.num:
        notes.append("There are no completions: `log_completions: true` writes them.")
    return [*notes, *run.alarms.notes]


def phases(history: History, values: Mapping[str, Any]) -> list[Phase]:
    """Where the time of the logged steps went; what no phase measured is `other`.

    A log line holds means: of `step_time` and `time/update` over its steps, of the others over its rollouts.

    Args:
        history: the log.
        values: the settings, as far as they are known.
    """
    uses = math.prod(
        value if isinstance(value := values.get(key), int) and value > 0 else 1
        for key in ("steps_per_generation", "num_iterations")
    )
    seconds = {
        name.removeprefix("time/"): _sum(history.series(name), 1 if name == "time/update" else uses)
        for name in history.names()
        if name.startswith("time/")
    }
    measured = sum(seconds.values())
    seconds["other"] = max(0.0, _sum(history.series("step_time"), 1) - measured) if measured else 0.0
    total = sum(seconds.values())
    return [
        Phase(name=name, seconds=float(f"{value:.5g}"), share=value / total)
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
        if value > 0
    ]


def memory(history: History) -> dict[str, float]:
    """GiB by phase: the most of any log line."""
    most = {
        name.removeprefix("memory/"): max(filter(math.isfinite, history.series(name).values), default=0.0)
        for name in history.names()
        if name.startswith("memory/")
    }
    return {name: value for name, value in sorted(most.items(), key=lambda item: -item[1]) if value > 0}


def _sum(series: Series, steps_of_one: int) -> float:
    """The sum of what a series holds the means of, each over all in the steps since the line before it."""
    gaps = [step - before for before, step in pairwise((0, *series.steps))]
    return math.fsum(
        value * max(1.0, gap / steps_of_one)
        for value, gap in zip(series.values, gaps, strict=True)
        if math.isfinite(value)
    )


def differences(settings: Sequence[Settings]) -> list[Difference]:
    """What is not the same in all of several runs."""
    if len(settings) < 2:
        return []
    columns = [
        {
            **{key: shown(value) for key, value in run.values.items()},
            **({"training rows": shown(run.rows)} if run.rows else {}),
            **{f"version of {name}": value for name, value in run.versions.items()},
        }
        for run in settings
    ]
    names = sorted({name for column in columns for name in column})
    rows = [Difference(name=name, values=[column.get(name, _MISSING) for column in columns]) for name in names]
    secrets = frozenset().union(*(run.secrets for run in settings))
    return [
        Difference(name=row.name, values=[mask_text(value, secrets) for value in row.values])
        for row in rows
        if len(set(row.values)) > 1
    ]


# Values in words


def number(value: float | None) -> str:
    """A number as a person would write it."""
    if value is None:
        return _MISSING
    if value == 0 or 0.001 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.3g}"
    return f"{value:.3g}"


def share(value: float | None) -> str:
    return _MISSING if value is None else f"{100 * value:.{0 if value in (0, 1) or 0.1 <= value < 0.995 else 1}f} %"


def duration(seconds: float) -> str:
    """`3 h 12 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    largest = next((i for i, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in parts[largest : largest + 2] if count) or "0 s"
