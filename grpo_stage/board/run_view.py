"""The Board's view of a run, during training and later: curves, and completions by step."""

import math
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr
import pandas as pd
from llamafactory.webui.common import DEFAULT_SAVE_DIR, get_save_dir

from grpo_stage.algorithm.conditions import as_lines
from grpo_stage.board.locales import message
from grpo_stage.board.runner import GRPORunner
from grpo_stage.board.tables import number, table
from grpo_stage.records.completions import COMPLETIONS_FILE
from grpo_stage.records.run_files import ALARMS_FILE, LOG_FILE, AlarmLines, CompletionPages, MetricCurves, Point


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot of metrics that have the same unit."""

    name: str
    patterns: tuple[str, ...]

    @property
    def element(self) -> str:
        return f"grpo_plot_{self.name}"


PLOTS = (
    Plot("reward", ("reward", "rewards/*/mean")),
    Plot("reward_std", ("reward_std", "rewards/*/std")),
    Plot("zero_std", ("frac_reward_zero_std",)),
    Plot("length", ("completions/mean_length", "completions/min_length", "completions/max_length")),
    Plot("clipped", ("completions/clipped_ratio",)),
    Plot("entropy", ("entropy",)),
    Plot("kl", ("kl",)),
    Plot("difference", ("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max")),
    Plot("time", ("time/sync", "time/rollout", "time/reward", "time/logprobs", "time/update")),
    Plot("evaluation", ("eval_reward", "eval_*reward", "eval_*mean@*", "eval_*pass@*", "eval_*maj@*")),
)
MAX_POINTS = 400
PAGE_SIZE = 8
ORDERS = ("best", "worst", "sampled")
TICK_S = 2
_KEPT_RUNS = 32
"""How many runs keep their files in memory; older ones are read again."""
_COLORS = (
    "#4c78a8",
    "#f58518",
    "#54a24b",
    "#e45756",
    "#72b7b2",
    "#b279a2",
    "#eeca3b",
    "#9d755d",
    "#ff9da6",
    "#bab0ac",
)
_UNSEEN = " "
"""The name of an invisible curve that only sets the range of an axis."""
_ANY = 10**9
_LARGEST = 1.7e308
_COLUMNS = ("step", "value", "metric")


@dataclass
class _Run:
    """The files of a run, as far as they were read."""

    curves: MetricCurves
    completions: CompletionPages
    alarms: AlarmLines
    lock: Lock = field(default_factory=Lock)

    def update(self) -> None:
        self.curves.update()
        self.completions.update()
        self.alarms.update()

    @property
    def version(self) -> Any:
        """A version that depends on the files alone, so that reading a run again gives the same one."""
        return self.curves.version, self.completions.version, self.alarms.version


class RunView:
    """The elements of the view, and their content. One object for a Board: several pages may show the same run."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._lock = Lock()
        self.elements: dict[str, gr.blocks.Block] = {}
        with gr.Accordion(open=True, visible=False, elem_id="grpo_run") as self.panel:
            self._status = gr.Markdown(elem_id="grpo_run_status")
            self._alarms = gr.HTML(visible=False, elem_id="grpo_run_alarms", max_height=400, padding=False)
            for row in (PLOTS[:3], PLOTS[3:6], PLOTS[6:9], PLOTS[9:]):
                with gr.Row():
                    for plot in row:
                        self.elements[plot.element] = gr.LinePlot(
                            pd.DataFrame(columns=list(_COLUMNS)),
                            x="step",
                            y="value",
                            color="metric",
                            height=260,
                            min_width=320,
                            visible=False,
                            elem_id=plot.element,
                            show_fullscreen_button=True,
                        )
            with gr.Row():
                # Without the widgets' own bounds, since a value beyond them would give an error.
                self._step = gr.Number(value=None, step=1, placeholder="–", elem_id="grpo_run_step")  # noqa: RUF001
                self._order = gr.Dropdown(choices=list(ORDERS), value=ORDERS[0])
                self._page = gr.Number(value=1, step=1, elem_id="grpo_run_page")
                with gr.Column():
                    self._previous = gr.Button()
                    self._next = gr.Button()
            self._table = gr.HTML(visible=False, elem_id="grpo_run_table", max_height=700, padding=False)
        self._seen = gr.State(None)
        self._typed = gr.State("")
        self.timer = gr.Timer(TICK_S, active=False)
        self.elements |= {
            "grpo_run": self.panel,
            "grpo_run_step": self._step,
            "grpo_run_order": self._order,
            "grpo_run_page": self._page,
            "grpo_run_prev_btn": self._previous,
            "grpo_run_next_btn": self._next,
            "grpo_run_table": self._table,
        }

    def connect(self, engine: Any, train: Mapping[str, Any]) -> None:
        """Connect the events, once the host's elements exist."""
        assert isinstance(engine.runner, GRPORunner)
        top = engine.manager.get_elem_by_id
        place = [top("top.lang"), top("top.model_name"), top("top.finetuning_type"), train["output_dir"]]
        inputs = [*place, self._typed, self._step, self._order, self._page, self._seen]
        plots = [self.elements[plot.element] for plot in PLOTS]
        outputs = [self._status, self._alarms, *plots, self._table, self._page, self._seen]
        quietly = {"show_progress": "hidden", "queue": False}

        def refresh(
            lang: str, model_name: str | None, finetuning_type: str, output_dir: str | None, typed: str, *rest: Any
        ) -> Any:
            folder = _folder(model_name, finetuning_type, output_dir)
            is_own = _is_saved(folder) or output_dir == typed or folder in engine.runner.started
            return self._refresh(lang, folder, is_own, *rest)

        self.timer.tick(refresh, inputs, outputs, **quietly)
        gr.on(
            [element.change for element in (*place, self._typed, self._step, self._order, self._page)],
            refresh,
            inputs,
            outputs,
            **quietly,
        )
        train["output_dir"].input(lambda typed: typed, [train["output_dir"]], [self._typed], **quietly)
        # Typing the value that is already there fires no input event; its Enter fires a key event.
        train["output_dir"].key_up(_if_entered, [train["output_dir"]], [self._typed], **quietly)
        gr.on([self._step.input, self._order.input], lambda: 1, None, [self._page], **quietly)
        self._previous.click(lambda page: max(1, _bounded(page, _ANY) - 1), [self._page], [self._page], **quietly)
        self._next.click(lambda page: _bounded(page, _ANY) + 1, [self._page], [self._page], **quietly)

    def _refresh(self, lang: str, folder: str, is_own: bool, step: Any, order: Any, page: Any, seen: Any) -> Any:
        run = self._run(folder if is_own else "")
        with run.lock:
            run.update()
            now = (lang, folder, is_own, step, order, page, run.version)
            before, frames = seen or (None, [{}] * len(PLOTS))
            if now == before:
                return gr.skip()
            plots: list[Any] = [gr.skip()] * len(PLOTS)
            if before is None or (before[:3], before[6]) != (now[:3], now[6]):
                points, drawn = zip(*(_drawn(run, plot) for plot in PLOTS), strict=True)
                # A plot with a new frame is built anew, which takes a browser 50 times as long as new points.
                changed = [
                    {name: value for name, value in frame.items() if old.get(name) != value}
                    for frame, old in zip(drawn, frames, strict=True)
                ]
                plots = [gr.update(value=value, **frame) for value, frame in zip(points, changed, strict=True)]
                frames = list(drawn)
            place, completions, page_shown = _completions(run, lang, step, order, page)  # also counts damaged lines
            said = [_progress(run, lang), *_faults(run, lang), place] if is_own else [message("foreign_folder", lang)]
        return [" ".join(filter(None, said)), _alarms(run, lang), *plots, completions, page_shown, (now, frames)]

    def _run(self, folder: str) -> _Run:
        with self._lock:
            if folder not in self._runs:
                path = Path(folder or os.path.join(DEFAULT_SAVE_DIR, ".no-run"))
                self._runs[folder] = _Run(MetricCurves(path), CompletionPages(path), AlarmLines(path))
            self._runs.move_to_end(folder)
            while len(self._runs) > _KEPT_RUNS:
                self._runs.popitem(last=False)
            return self._runs[folder]


def _if_entered(folder: str, pressed: gr.KeyUpData) -> Any:
    return folder if pressed.key == "Enter" else gr.skip()


def _folder(model_name: str | None, finetuning_type: str, output_dir: str | None) -> str:
    """The folder of the run of this form; empty if there is none."""
    if not output_dir or os.path.sep in output_dir:  # the host uses such a path as it is, and warns each time
        return output_dir or ""
    return str(get_save_dir(model_name, finetuning_type, output_dir)) if model_name else ""


def _is_saved(folder: str) -> bool:
    """Whether the folder is below the host's own, by its name; links in it are the owner's and are followed."""
    below = Path(os.path.relpath(os.path.abspath(folder), os.path.abspath(DEFAULT_SAVE_DIR))).parts
    return not folder or (bool(below) and ".." not in (*below, *Path(folder).parts))


def _progress(run: _Run, lang: str) -> str:
    line = run.curves.progress
    if line:
        return message("progress", lang, step=line["current_steps"], steps=line.get("total_steps", "?"))
    return "" if run.curves.error else message("no_log", lang)


def _faults(run: _Run, lang: str) -> list[str]:
    """The parts of the run's files that are not shown, and why."""
    files: dict[str, MetricCurves | CompletionPages | AlarmLines] = {
        LOG_FILE: run.curves,
        COMPLETIONS_FILE: run.completions,
        ALARMS_FILE: run.alarms,
    }
    unreadable = [
        message("unreadable", lang, file=name, error=file.error) for name, file in files.items() if file.error
    ]
    damaged = [
        message("damaged", lang, file=name, count=file.num_damaged_lines)
        for name, file in files.items()
        if file.num_damaged_lines
    ]
    return [*unreadable, *damaged]


def _alarms(run: _Run, lang: str) -> dict[str, Any]:
    """A table of the run's alarms, the newest first."""
    rows = [
        [
            str(alarm["step"]),
            f"{alarm['monitor']}\n({alarm['action']})",
            f"{alarm['seen']}\n{alarm['meaning']}",
            f"{alarm['remedy']}\n{as_lines(alarm['settings'])}".strip(),
        ]
        for alarm in reversed(run.alarms.records)
    ]
    headers = message("alarm_headers", lang).split("|")
    return gr.update(value=table(headers, rows, [1, 2.5, 8, 8]), visible=bool(rows))


def _drawn(run: _Run, plot: Plot) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A plot's points, and its frame: the other properties of its element that depend on them."""
    curves = {_legend(name): curve for name, curve in run.curves.matching(plot.patterns, MAX_POINTS).items()}
    values = [value for curve in curves.values() for _, value in curve]
    last = max((step for curve in curves.values() for step, _ in curve), default=1)
    points = [(step, value, name) for name, curve in curves.items() for step, value in _visible(curve, last / 100)]
    # Each name has its own color, so that a metric that comes later gets one as well.
    colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(curves)}
    # Not by `x_lim` and `y_lim`: with either of them, a page of Gradio 5.50 updates itself for ever.
    if values and (ends := _ends_around(min(values), max(values))) is not None:
        points += [(last, end, _UNSEEN) for end in ends]
        colors[_UNSEEN] = "transparent"
    return pd.DataFrame(points, columns=list(_COLUMNS)), {"visible": bool(points), "color_map": colors}


def _visible(curve: list[Point], reach: float) -> list[tuple[float, float]]:
    """The curve, with a single point drawn as a dash: a line of one point is invisible."""
    if len(curve) != 1:
        return list(curve)
    step, value = curve[0]
    return [(step - reach, value), (step, value), (step + reach, value)]


def _ends_around(low: float, high: float) -> tuple[float, float] | None:
    """The ends of an axis around a constant curve, which would have no labels; None around any other curve."""
    if high / 2 - low / 2 > 1e-6 * max(abs(low), abs(high)):  # halved, since the difference may exceed a float's range
        return None
    reach = abs(low) / 2 or 1.0
    return max(low - reach, -_LARGEST), min(high + reach, _LARGEST)


def _legend(metric: str) -> str:
    """A short name of a metric for the legend: the part that differs from the others of its plot."""
    first, _, rest = metric.partition("/")
    if first == "rewards":
        return rest.rpartition("/")[0]
    return rest.rpartition("/")[2].removesuffix("_length") if first in ("completions", "sampling", "time") else metric


def _completions(run: _Run, lang: str, step: Any, order: Any, page: Any) -> tuple[str, dict[str, Any], Any]:
    """The position of the shown completions in the run, their table, and a new page if it was out of range."""
    steps = run.completions.steps
    if not steps:
        said = "" if run.completions.error else message("no_completions", lang)
        return said, gr.update(visible=False), gr.skip()
    asked = step if _is_number(step) else steps[-1]
    is_there = step is None or (_is_number(step) and steps[0] <= asked <= steps[-1])
    shown_step = max((s for s in steps if s <= asked), default=steps[0])
    records = run.completions.at_step(shown_step, order)
    num_pages = max(1, -(-len(records) // PAGE_SIZE))
    shown_page = _bounded(page, num_pages)
    start = (shown_page - 1) * PAGE_SIZE
    shown = records[start : start + PAGE_SIZE]
    names = list(dict.fromkeys(name for record in shown for name in record.get("rewards", {})))
    headers = message("completion_headers", lang).split("|")
    rows = [
        [
            record.get("prompt") or "",
            record["completion"],
            record.get("reference") or "",
            *(number(record["rewards"].get(name)) for name in names),
            number(record["reward"]),
            number(record.get("advantage")),
            f"{record.get('num_tokens')} ({record.get('finish_reason')})",
        ]
        for record in shown
    ]
    shares = [4, 7, 3] + [1.6] * (len(names) + 3)
    place = message(
        "completions",
        lang,
        step=shown_step,
        first=start + 1,
        last=start + len(shown),
        total=len(records),
        page=shown_page,
        pages=num_pages,
    )
    if not is_there:
        place = f"{message('no_such_step', lang, step=step, first=steps[0], last=steps[-1])} {place}"
    completions = gr.update(value=table([*headers[:3], *names, *headers[3:]], rows, shares), visible=True)
    return place, completions, gr.skip() if page == shown_page else shown_page


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def _bounded(value: Any, last: int) -> int:
    """The typed page, brought into the range from 1 to `last`."""
    return int(max(1, min(value, last))) if _is_number(value) else 1
