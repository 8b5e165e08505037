"""What a sweep says: each setting's reward over its seeds with a confidence interval, and the curves of it."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from grpo_stage.survival.budget import Budget, is_step


LAST_SHARE = 0.2
"""The training reward of a run is the mean over the steps that ended in this last share of the budget."""
CONFIDENCE = 0.95
NUM_BINS = 20
"""Parts of the budget that curves are averaged over."""
_DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run."""

    setting: str
    seed: int
    reward: float
    """See `measure`."""
    metric: str
    num_steps: int
    num_tokens: int
    step_seconds: float
    """Time in steps."""
    frac_reward_zero_std: float
    """Mean over the steps: dead groups."""
    curve: Sequence[tuple[float, float]]
    """(spent, training reward) of each step."""


def run_result(setting: str, seed: int, budget: Budget, lines: Sequence[Mapping[str, Any]]) -> RunResult:
    """The result of a run from its log.

    The reward is that of the last evaluation where the run had one; otherwise the mean training reward over the steps
    of the last `LAST_SHARE` of the budget, or the last step alone where that is longer than this share.

    Args:
        setting: its name.
        seed: the run's.
        budget: the run's.
        lines: those of trainer_log.jsonl.

    Raises:
        ValueError: if no step has a reward.
    """
    steps = [line for line in lines if is_step(line)]
    spent = budget.spent(steps)
    curve = [(at, line["reward"]) for at, line in zip(spent, steps, strict=True) if "reward" in line]
    if not curve:
        raise ValueError(f"The log of {setting}, seed {seed}, has no step with a reward.")
    evaluations = [line["eval_reward"] for line in lines if "eval_reward" in line]
    last = [reward for at, reward in curve if at > (1 - LAST_SHARE) * budget.limit] or [curve[-1][1]]
    return RunResult(
        setting=setting,
        seed=seed,
        reward=evaluations[-1] if evaluations else fmean(last),
        metric="eval_reward" if evaluations else f"reward, last {LAST_SHARE:.0%} of the budget",
        num_steps=len(steps),
        num_tokens=round(steps[-1]["num_tokens"]),
        step_seconds=math.fsum(line["step_time"] for line in steps),
        frac_reward_zero_std=fmean(line.get("frac_reward_zero_std", 0.0) for line in steps),
        curve=curve,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingResult:
    """A setting over its seeds."""

    setting: str
    num_runs: int
    reward: float
    """Mean over runs."""
    half_width: float | None
    """Of the confidence interval of that mean; None with one run."""
    behind_best: float
    """The best setting's mean reward minus this one's, over the seeds that both have."""
    behind_best_half_width: float | None
    """Of the interval of that difference, run by run of the same seed; None with fewer than two seeds, and for the
    best."""
    num_steps: float
    num_tokens: float
    step_seconds: float
    frac_reward_zero_std: float


def half_width(values: Sequence[float]) -> float | None:
    """Half of Student's interval of `CONFIDENCE` for the mean of independent values; None for fewer than two."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    return float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def setting_results(runs: Sequence[RunResult]) -> list[SettingResult]:
    """The settings in the order of their first run."""
    by_setting: dict[str, dict[int, RunResult]] = {}
    for run in runs:
        by_setting.setdefault(run.setting, {})[run.seed] = run
    means = {setting: fmean(run.reward for run in of.values()) for setting, of in by_setting.items()}
    best = max(means, key=means.__getitem__, default="")
    results = []
    for setting, of in by_setting.items():
        shared = [by_setting[best][seed].reward - run.reward for seed, run in of.items() if seed in by_setting[best]]
        results.append(
            SettingResult(
                setting=setting,
                num_runs=len(of),
                reward=means[setting],
                half_width=half_width([run.reward for run in of.values()]),
                behind_best=fmean(shared) if shared else means[best] - means[setting],
                behind_best_half_width=None if setting == best else half_width(shared),
                num_steps=fmean(run.num_steps for run in of.values()),
                num_tokens=fmean(run.num_tokens for run in of.values()),
                step_seconds=fmean(run.step_seconds for run in of.values()),
                frac_reward_zero_std=fmean(run.frac_reward_zero_std for run in of.values()),
            )
        )
    return results


def binned(curve: Sequence[tuple[float, float]], limit: float) -> list[float | None]:
    """The mean reward in each of `NUM_BINS` equal parts of the budget; None for a part in which no step ended."""
    bins: list[list[float]] = [[] for _ in range(NUM_BINS)]
    for at, reward in curve:
        bins[min(NUM_BINS - 1, int(at / limit * NUM_BINS))].append(reward)
    return [fmean(one) if one else None for one in bins]


def draw(path: Path, runs: Sequence[RunResult], budget: Budget) -> None:
    """The reward over what was spent: each setting's mean over seeds, in a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    centers = [(i + 0.5) * budget.limit / NUM_BINS for i in range(NUM_BINS)]
    for i, setting in enumerate(dict.fromkeys(run.setting for run in runs)):
        curves = [binned(run.curve, budget.limit) for run in runs if run.setting == setting]
        columns = [
            (x, known)
            for x, column in zip(centers, zip(*curves, strict=True), strict=True)
            if (known := [value for value in column if value is not None])
        ]
        xs = [x for x, _ in columns]
        color = f"C{i % 10}"
        axes.plot(
            xs,
            [fmean(c) for _, c in columns],
            color=color,
            linestyle=_DASHES[i % len(_DASHES)],
            lw=2,
            marker=".",
            label=textwrap.fill(setting, 90),
        )
        if len(curves) > 1:
            lows, highs = [min(c) for _, c in columns], [max(c) for _, c in columns]
            axes.fill_between(xs, lows, highs, color=color, alpha=0.15, linewidth=0)
    num_seeds = len({run.seed for run in runs})
    axes.set_xlabel({"tokens": "sampled tokens (prompts included)", "steps": "steps", "seconds": "s"}[budget.unit])
    axes.set_ylabel("training reward")
    axes.set_title(
        f"Equal budgets of {budget.limit:,} {budget.unit}" + (f"; band: {num_seeds} seeds" if num_seeds > 1 else "")
    )
    axes.set_xlim(0, budget.limit)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
