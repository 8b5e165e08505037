"""What watches ask of a metric's last values: where it stands, where it stood, whether it moves beyond its noise.

Metrics of small batches are noisy, and their noise is not normal (a few prompts, all right or all wrong). So levels
are medians, trends are Theil-Sen slopes, and a trend counts where the Mann-Kendall test finds it: one bad step moves
none of them.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from statistics import fmean, median

from grpo_stage.monitors.alarm import History, Series


RECENT = 5
"""Lines whose median is the present level: one or two odd steps do not move it."""
AT_START = 5
"""Lines whose median is the level at the start."""
LINES_OF_SHARE = 10
EASIER = 0.5
"""Levels of a curriculum, in the mean over a line's prompts: where the level changes, a rollout may have two."""
LEAST_LINES = 20
"""Since the prompts became harder: in fewer a metric that learning raises may not show it."""
MOVES = 2.5
"""Standard errors beyond which a level has moved: noise alone does that in 1 of 160 looks (one-sided)."""
MAY_MOVE = 1.0
"""Standard errors beyond which it may have. An alarm that a rise would refute is given up for less than proof."""


def current(history: History, name: str, count: int) -> Series:
    """The last `count` values of a metric; empty unless the last line has it, so that no line is judged twice."""
    series = history.series(name)
    if len(series) == 0 or series.steps[-1] != history.step:
        return Series([], [])
    return series.last(count)


def level(values: Sequence[float]) -> float:
    """The median of the last `RECENT` values."""
    return median(values[-RECENT:])


def share(values: Sequence[float]) -> float:
    """The present level of a share of completions: the mean of the last `LINES_OF_SHARE` values.

    A small batch has few completions, and a rare one is in none of them or makes up an eighth: no median would do.
    """
    return fmean(values[-LINES_OF_SHARE:])


def level_at_start(history: History, name: str) -> float | None:
    """The median of a metric's first values; None while there are fewer than `AT_START`."""
    return _at_start(history.series(name))


def level_since_harder(history: History, name: str) -> float | None:
    """The same of its values since the prompts became harder."""
    return _at_start(since_harder(history, history.series(name)))


def _at_start(series: Series) -> float | None:
    first = series.values[:AT_START]
    return median(first) if len(first) == AT_START else None


def since_harder(history: History, series: Series) -> Series:
    """The part of a series after the last line whose prompts were easier by `EASIER` levels of a curriculum.

    Harder prompts lower a reward, lengthen completions and raise the entropy; easier ones explain none of it, so that
    lines of harder prompts than the present ones stay.
    """
    levels = history.series("curriculum/level")
    points = zip(reversed(levels.steps), reversed(levels.values), strict=True)
    last = next((step for step, value in points if value <= levels.values[-1] - EASIER), None)
    return series if last is None else series.last(len(series) - bisect_right(series.steps, last))


def movement(values: Sequence[float]) -> float:
    """By how many standard errors the mean of the last third is above that of the first third.

    The noise is taken from successive differences, which a trend does not inflate. 0 with fewer than 6 values, and
    infinite where values without noise move.
    """
    size = len(values) // 3
    if size < 2:
        return 0.0
    difference = fmean(values[-size:]) - fmean(values[:size])
    error = noise(values) * math.sqrt(2 / size)
    return difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0


def noise(values: Sequence[float]) -> float:
    """The standard deviation of a value about the present level, from successive differences: a trend adds little."""
    return math.sqrt(fmean((b - a) ** 2 for a, b in itertools.pairwise(values)) / 2)


def may_rise(history: History, name: str, count: int) -> bool:
    """Whether a metric may have risen over its last `count` values since the prompts became harder, of which there may
    be too few to tell: for alarms that a rise would refute."""
    values, is_early = _since_harder(history, name, count)
    return is_early or movement(values) > MAY_MOVE


def may_rise_lately(history: History, name: str) -> bool:
    """The same of the last 20 values, or certainly of the last 40: in small batches 20 lines hide a slow rise."""
    values, is_early = _since_harder(history, name, 40)
    return is_early or movement(values) > MOVES or movement(values[-20:]) > MAY_MOVE


def _since_harder(history: History, name: str, count: int) -> tuple[Sequence[float], bool]:
    """The last `count` values since the prompts became harder, and whether these are too few and came after others."""
    series = history.series(name)
    values = since_harder(history, series).last(count).values
    return values, len(values) < min(LEAST_LINES, len(series))


def falls(history: History, name: str, count: int) -> bool:
    return movement(history.series(name).last(count).values) < -MOVES


def mann_kendall(values: Sequence[float]) -> float:
    """The probability of a trend as strong as this one, in this direction, in values without any (one-sided).

    Positive where it rises and negative where it falls, so that `-0.01 < p < 0` is a fall at the 1 % level. Exact for
    few values without ties. Mann 1945, Kendall 1975.
    """
    from scipy.stats import kendalltau

    if len(values) < 3 or min(values) == max(values):
        return 1.0
    tau, two_sided = kendalltau(range(len(values)), values)
    return math.copysign(float(two_sided) / 2, float(tau))


def slope(series: Series) -> float:
    """The Theil-Sen slope: the median of the slopes between all pairs of points, a step."""
    from scipy.stats import theilslopes

    return float(theilslopes(series.values, series.steps)[0])


def last_step(series: Series, is_sound: Callable[[float], bool]) -> int:
    """The last step with a sound value; the step before the first one where none is."""
    for step, value in zip(reversed(series.steps), reversed(series.values), strict=True):
        if is_sound(value):
            return step
    return max(0, series.steps[0] - 1)
