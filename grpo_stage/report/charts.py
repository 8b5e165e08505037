"""Which metrics are drawn together, and their curves, thinned to what a page can hold."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np

from grpo_stage.monitors.alarm import History, Series
from grpo_stage.records.definitions import definition_of


Unit = Literal["", "share", "tokens", "seconds", "GiB"]
MAX_NUMBERS = 400_000
"""In all curves of a page: about 3 MB of it."""
MIN_POINTS, MAX_POINTS = 40, 500
"""Of a curve."""
MAX_OTHERS = 150
"""Charts of metrics that belong to no other chart."""
# The host's bookkeeping, and what its last line adds.
_NOT_DRAWN = ("current_steps", "total_steps", "percentage", "lr", "total_flos", "train_*", "eval_runtime")


@dataclass(frozen=True, slots=True)
class Chart:
    """Metrics that are drawn in one plot. A group in parentheses of a pattern makes a plot for each of its values."""

    title: str
    patterns: tuple[str, ...]
    """Regular expressions of metric names, with `{}` where the title's `{}` is."""
    unit: Unit = ""
    is_stacked: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """Charts below one heading."""

    title: str
    charts: tuple[Chart, ...]
    about: str = ""
    is_folded: bool = False


SECTIONS = (
    Section(
        "Reward",
        (
            Chart("Total reward", (r"reward", r"eval_reward")),
            Chart("Reward of {}", (r"rewards/{}/mean", r"eval_rewards/{}/mean@\d+")),
            Chart("{} at the evaluation: pass@k and maj@n", (r"eval_rewards/{}/(?:pass|maj)@\d+",), "share"),
            Chart("Total reward of {}", (r"eval_{}_reward",)),
            Chart("Spread of the reward within a group", (r"reward_std",)),
            Chart("Reward of the most probable completions", (r"greedy_reward",)),
        ),
        "What the run is for. The evaluation's curves are of prompts that are not trained on.",
    ),
    Section(
        "Learning signal",
        (
            Chart(
                "Groups that teach nothing",
                (r"frac_reward_zero_std", r"frac_reward_none", r"completions/frac_groups_all_(?:right|wrong)"),
                "share",
            ),
            Chart("Groups left out by dynamic sampling", (r"dynamic_sampling/frac_dropped",), "share"),
            Chart("Rollouts of a batch", (r"dynamic_sampling/num_rollouts",)),
            Chart("Level of the curriculum", (r"curriculum/level",)),
        ),
        "A group whose completions all earn the same teaches nothing.",
    ),
    Section(
        "Policy",
        (
            Chart("Entropy", (r"entropy",)),
            Chart("Distance from the reference (KL)", (r"kl",)),
            Chart("Clipped tokens", (r"clip_ratio/(?:low|high|delta|region)_mean",), "share"),
            Chart("Gradient norm", (r"grad_norm",)),
            Chart("Learning rate", (r"learning_rate",)),
            Chart("Loss", (r"loss",)),
        ),
        "How much the policy explores, how far it has moved, and how large its updates are.",
    ),
    Section(
        "Lengths",
        (
            Chart("Length", (r"completions/(?:mean|min|max)_length", r"eval_completions/mean_length"), "tokens"),
            Chart("Length of those that ended", (r"completions/(?:mean|min|max)_terminated_length",), "tokens"),
            Chart("Truncated completions", (r"(?:eval_)?completions/clipped_ratio",), "share"),
        ),
    ),
    Section(
        "Turns and tools",
        (
            Chart("Turns of the model", (r"completions/mean_turns",)),
            Chart("Calls of tools", (r"tools/call_frequency",)),
            Chart("Calls that went wrong", (r"tools/(?:failure|cut)_frequency", r"tools/unanswered_frac"), "share"),
        ),
    ),
    Section(
        "Engine against trainer",
        (
            Chart("Difference of log-probabilities", (r"sampling/sampling_logp_difference/(?:mean|max)",)),
            Chart("How far the engine follows", (r"sampling/slope/(?:start|previous)",)),
            Chart("Weight of old samples", (r"sampling/importance_sampling_ratio/(?:mean|min|max)",)),
        ),
        "Whether the engine samples from the policy that is trained.",
    ),
    Section(
        "Time and memory",
        (
            Chart("Seconds of a step by phase", (r"time/\w+",), "seconds", is_stacked=True),
            Chart("Seconds of a step", (r"step_time",), "seconds"),
            Chart("Tokens a second", (r"rollout_tokens_per_second", r"update_tokens_per_second")),
            Chart("Tokens for each token computed (packing)", (r"packing_ratio",)),
            Chart("Most memory by phase", (r"memory/.+",), "GiB"),
        ),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One metric of one run. Where it is thinned, a point stands for several log lines."""

    run: int
    """Its place among the runs."""
    metric: str
    x: Sequence[int]
    """The last step of each point."""
    y: Sequence[float]
    """The mean."""
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    """The extremes; empty where each point is one log line."""
    num: int
    """Log lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A plot with its curves."""

    title: str
    name: str
    """The title's, with `{}` where the owner stands."""
    owner: str
    """The function, dataset or metric that the plot is of, where each has its own."""
    unit: Unit
    is_stacked: bool
    metrics: Sequence[str]
    definitions: Mapping[str, str] = field(default_factory=dict)
    """In Markdown, by metric; those that have one."""
    curves: Sequence[Curve]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnSection:
    title: str
    about: str
    is_folded: bool
    charts: Sequence[Drawn]
    num_left_out: int = 0
    """Metrics that are not drawn, since there are too many."""


OTHER_METRICS = "All other metrics"
"""The section of what no chart names."""


def sections_of(
    histories: Sequence[History], is_wanted: Callable[[str, bool], bool] = lambda title, is_folded: True
) -> list[DrawnSection]:
    """Every chart that has curves, in sections; what no chart names comes last.

    Args:
        histories: of each run.
        is_wanted: a chart that is not wanted, by its title and whether its section is folded, comes without curves.
    """
    names = list(dict.fromkeys(name for history in histories for name in history.names() if _is_drawn(name)))
    used: set[str] = set()
    layout: list[tuple[Section, list[tuple[Chart, str, list[str]]], int]] = []
    for section in SECTIONS:
        filled = [pair for chart in section.charts for pair in _filled(chart, names)]
        used.update(name for _, _, chosen in filled for name in chosen)
        layout.append((section, filled, 0))
    others = sorted(name for name in names if name not in used)
    folded = [(Chart("{}", ()), name, [name]) for name in others[:MAX_OTHERS]]
    layout.append((Section(OTHER_METRICS, (), is_folded=True), folded, max(0, len(others) - MAX_OTHERS)))
    num_curves = sum(
        len(history.series(name)) > 0
        for section, filled, _ in layout
        for chart, owner, chosen in filled
        if is_wanted(chart.title.replace("{}", owner), section.is_folded)
        for name in chosen
        for history in histories
    )
    max_points = max(MIN_POINTS, min(MAX_POINTS, MAX_NUMBERS // (4 * max(1, num_curves))))
    return [
        DrawnSection(
            title=section.title,
            about=section.about,
            is_folded=section.is_folded,
            charts=[
                plot
                for chart, owner, chosen in filled
                for plot in _drawn(
                    chart,
                    owner,
                    chosen,
                    histories,
                    max_points if is_wanted(chart.title.replace("{}", owner), section.is_folded) else 0,
                )
            ],
            num_left_out=num_left_out,
        )
        for section, filled, num_left_out in layout
        if filled
    ]


def thinned(series: Series, max_points: int) -> dict[str, Any]:
    """The finite values of a series in at most `max_points` equal parts: last step, mean, and extremes of each."""
    steps, values = np.asarray(series.steps, dtype=np.int64), np.asarray(series.values, dtype=np.float64)
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(values) <= max_points:
        return {"x": steps.tolist(), "y": _rounded(values), "num": len(values)}
    starts = np.arange(max_points) * len(values) // max_points
    ends = np.append(starts[1:], len(values))
    scale = max(1.0, float(np.abs(values).max()))  # a sum of the largest floats would overflow
    mean = np.add.reduceat(values / scale, starts) / (ends - starts) * scale
    return {
        "x": steps[ends - 1].tolist(),
        "y": _rounded(mean),
        "low": _rounded(np.minimum.reduceat(values, starts)),
        "high": _rounded(np.maximum.reduceat(values, starts)),
        "num": len(values),
    }


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _drawn(
    chart: Chart, owner: str, names: Sequence[str], histories: Sequence[History], max_points: int
) -> list[Drawn]:
    """The plot; of stacked areas one for each run. Without points it is the plot's frame alone."""
    together = [[i] for i in range(len(histories))] if chart.is_stacked else [list(range(len(histories)))]
    plots = []
    for runs in together:
        curves = [
            Curve(run=i, metric=name, **thinned(series, max_points))
            for i in (runs if max_points else ())
            for name, series in _series(chart, names, histories[i]).items()
        ]
        plots.append(
            Drawn(
                title=chart.title.replace("{}", owner),
                name=chart.title,
                owner=owner,
                unit=chart.unit,
                is_stacked=chart.is_stacked,
                metrics=list(names),
                definitions={name: text for name in names if (text := definition_of(name))},
                curves=[curve for curve in curves if curve.num],
            )
        )
    return [plot for plot in plots if plot.curves or not max_points]


def _series(chart: Chart, names: Sequence[str], history: History) -> dict[str, Series]:
    """By name; those of stacked areas have the same steps, with 0 where a line does not have the metric."""
    found = {name: history.series(name) for name in names}
    if not chart.is_stacked:
        return found
    by_step = {name: dict(zip(series.steps, series.values, strict=True)) for name, series in found.items()}
    steps = sorted({step for values in by_step.values() for step in values})
    return {name: Series(steps, [values.get(step, 0.0) for step in steps]) for name, values in by_step.items()}


def _filled(chart: Chart, names: Sequence[str]) -> Iterator[tuple[Chart, str, list[str]]]:
    """(the chart, its owner, the metrics that it shows); one with `{}` once for each name that fills it."""
    patterns = [re.compile(pattern.replace("{}", "(?P<owner>[^/]+)")) for pattern in chart.patterns]
    owners: dict[str, list[str]] = {}
    for pattern in patterns:
        for name in names:
            if found := pattern.fullmatch(name):
                owners.setdefault(found.groupdict().get("owner", ""), []).append(name)
    for owner, chosen in owners.items():
        yield chart, owner, chosen


def _is_drawn(name: str) -> bool:
    return not any(fnmatchcase(name, pattern) for pattern in _NOT_DRAWN)
