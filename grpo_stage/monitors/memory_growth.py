"""Memory that grows from step to step, by phase."""

import itertools
from statistics import fmean

from grpo_stage.monitors.alarm import Alarm, History, Watch
from grpo_stage.monitors.statistics import MOVES, current, mann_kendall, movement, since_harder


class MemoryGrowth(Watch):
    """The memory of a phase grows steadily, and completions do not.

    `memory/{phase}` rises over the last `WINDOW` lines (Mann-Kendall at 1 in 10,000), from each quarter of them
    to the next, by more than `GROWTH` of its level and `LEAST_GIB`, and neither longer completions (`max_length`
    rises) nor harder prompts of a curriculum explain it.
    """

    is_advice = True
    has_remedy = False

    WINDOW = 40
    """Lines. Caches and allocators fill up during the first tens of steps."""
    LEAST_LINES = 60
    """Of the run."""
    GROWTH = 0.1
    LEAST_GIB = 0.25
    SIGNIFICANCE = 1e-4

    def judge(self, history: History) -> Alarm | None:
        for name in history.names():
            if not name.startswith("memory/"):
                continue
            used = since_harder(history, current(history, name, self.WINDOW))
            if len(history.series(name)) < self.LEAST_LINES or len(used) < self.WINDOW:
                continue
            size = self.WINDOW // 4
            quarters = [fmean(used.values[i : i + size]) for i in range(0, self.WINDOW, size)]
            first, last = quarters[0], quarters[-1]
            grows = last - first > max(self.GROWTH * first, self.LEAST_GIB)
            is_steady = min(b - a for a, b in itertools.pairwise(quarters)) > (last - first) / 6
            if not (grows and is_steady and 0 < mann_kendall(used.values) < self.SIGNIFICANCE):
                continue
            if movement(history.series("completions/max_length").last(self.WINDOW).values) > MOVES:
                continue
            phase = name.removeprefix("memory/")
            a_step = (last - first) / (used.steps[-size] - used.steps[0])
            return Alarm(
                monitor="memory_growth",
                step=history.step,
                onset=used.steps[0] - 1,
                seen=(
                    f"The memory of the phase `{phase}` grew from {first:.2f} to {last:.2f} GiB over "
                    f"{used.steps[-1] - used.steps[0]} steps, {1024 * a_step:.0f} MiB a step, with completions of the "
                    "same length."
                ),
                meaning="Something is kept that should be freed. The run ends when memory is full.",
                remedy=(
                    "In `reward`: a reward function that keeps what it is given. In `rollout` or `sync` on a GPU: "
                    "`vllm_sleep: 2` frees the engine after each rollout. Save often (`save_steps`): a run that is "
                    "resumed starts with fresh memory."
                ),
                settings={},
            )
        return None
