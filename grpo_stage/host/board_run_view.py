"""The Board's view of a run, while it trains and when it is opened again: curves, and completions by step."""

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr
import pandas as pd
from llamafactory.webui.common import get_save_dir

from ..run_files import CompletionPages, MetricCurves
from .board_tables import number, short
from .locales import message


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot: the metrics that it draws together, since they have one unit."""

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
_KEPT_RUNS = 4
_COLUMNS = ("step", "value", "metric")


@dataclass
class _Run:
    """A run's files, read as far as somebody has looked."""

    curves: MetricCurves
    completions: CompletionPages
    version: int = 0
    """Counts the changes."""
    lock: Lock = field(default_factory=Lock)

    def update(self) -> None:
        changes = [self.curves.update(), self.completions.update()]
        self.version += any(changes)


class RunView:
    """The elements, and what they show. One for a Board: several pages may look at the same run."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._lock = Lock()
        self.elements: dict[str, gr.blocks.Block] = {}
        with gr.Accordion(open=True, visible=False, elem_id="grpo_run") as self.panel:
            self._status = gr.Markdown(elem_id="grpo_run_status")
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
                self._step = gr.Number(value=None, precision=0, minimum=0, placeholder="–", elem_id="grpo_run_step")  # noqa: RUF001
                self._order = gr.Dropdown(choices=list(ORDERS), value=ORDERS[0])
                self._page = gr.Number(value=1, precision=0, minimum=1)
                with gr.Column():
                    self._previous = gr.Button()
                    self._next = gr.Button()
            self._table = gr.Dataframe(
                visible=False,
                elem_id="grpo_run_table",
                datatype="str",
                interactive=False,
                wrap=True,
                max_height=700,
                show_fullscreen_button=True,
                show_copy_button=True,
            )
        self._seen = gr.State(None)
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
        """Wire the events, once the host's elements are there."""
        top = engine.manager.get_elem_by_id
        place = [top("top.lang"), top("top.model_name"), top("top.finetuning_type"), train["output_dir"]]
        inputs = [*place, self._step, self._order, self._page, self._seen]
        plots = [self.elements[plot.element] for plot in PLOTS]
        outputs = [self._status, *plots, self._table, self._seen]
        quietly = {"show_progress": "hidden", "queue": False}
        self.timer.tick(self._refresh, inputs, outputs, **quietly)
        gr.on(
            [element.change for element in (*place, self._step, self._order, self._page)],
            self._refresh,
            inputs,
            outputs,
            **quietly,
        )
        gr.on([self._step.input, self._order.input], lambda: 1, None, [self._page], **quietly)
        self._previous.click(lambda page: max(1, (page or 1) - 1), [self._page], [self._page], **quietly)
        self._next.click(lambda page: (page or 1) + 1, [self._page], [self._page], **quietly)

    def _refresh(
        self,
        lang: str,
        model_name: str | None,
        finetuning_type: str,
        output_dir: str | None,
        step: int | None,
        order: Any,
        page: int | None,
        seen: Any,
    ) -> Any:
        folder = output_dir or ""
        if folder and os.path.sep not in folder:  # the host takes a path as it is, and warns of it each time
            folder = str(get_save_dir(model_name, finetuning_type, folder)) if model_name else ""
        run = self._run(folder)
        with run.lock:
            run.update()
            now = (lang, folder, step, order, page, run.version)
            if now == seen:
                return gr.skip()
            is_new_data = seen is None or (seen[:2], seen[5]) != (now[:2], now[5])
            plots = [_drawn(run, plot) for plot in PLOTS] if is_new_data else [gr.skip()] * len(PLOTS)
            status, table = _table(run, lang, step, order, page or 1)
        return [f"{_progress(run, lang)} {status}".strip(), *plots, table, now]

    def _run(self, folder: str) -> _Run:
        with self._lock:
            if folder not in self._runs:
                path = Path(folder or "saves/.no-run")
                self._runs[folder] = _Run(MetricCurves(path), CompletionPages(path))
            self._runs.move_to_end(folder)
            while len(self._runs) > _KEPT_RUNS:
                self._runs.popitem(last=False)
            return self._runs[folder]


def _progress(run: _Run, lang: str) -> str:
    line = run.curves.progress
    if not line:
        return message("no_log", lang)
    return message("progress", lang, step=line["current_steps"], steps=line["total_steps"])


def _drawn(run: _Run, plot: Plot) -> gr.LinePlot:
    curves = run.curves.matching(plot.patterns, MAX_POINTS)
    points = [(step, value, _legend(name)) for name, curve in curves.items() for step, value in curve]
    return gr.LinePlot(pd.DataFrame(points, columns=list(_COLUMNS)), visible=bool(points))


def _legend(metric: str) -> str:
    """What tells a metric from the others of its plot, short enough for the legend."""
    first, _, rest = metric.partition("/")
    if first == "rewards":
        return rest.rpartition("/")[0]
    return rest.rpartition("/")[2].removesuffix("_length") if first in ("completions", "sampling", "time") else metric


def _table(run: _Run, lang: str, step: int | None, order: Any, page: int) -> tuple[str, gr.Dataframe]:
    steps = run.completions.steps
    if not steps:
        return message("no_completions", lang), gr.Dataframe(visible=False)
    step = steps[-1] if step is None else max((s for s in steps if s <= step), default=steps[0])
    records = run.completions.at_step(step, order)
    num_pages = -(-len(records) // PAGE_SIZE)
    page = min(page, num_pages)
    shown = records[(page - 1) * PAGE_SIZE : page * PAGE_SIZE]
    names = list(records[0]["rewards"])
    headers = message("completion_headers", lang).split("|")
    data = [
        [
            short(record["prompt"]),
            short(record["completion"]),
            short(record["reference"]),
            *(number(record["rewards"][name]) for name in names),
            number(record["reward"]),
            number(record["advantage"]),
            f"{record['num_tokens']} ({record['finish_reason']})",
        ]
        for record in shown
    ]
    narrow = min(9, 50 // (len(names) + 3))
    rest = 100 - narrow * (len(names) + 3)
    widths = [f"{share}%" for share in (rest // 4, rest // 2, rest - rest // 4 - rest // 2)]
    widths += [f"{narrow}%"] * (len(names) + 3)
    table = gr.Dataframe(
        value=data, headers=[*headers[:3], *names, *headers[3:]], column_widths=widths, datatype="str", visible=True
    )
    place = message(
        "completions",
        lang,
        step=step,
        first=(page - 1) * PAGE_SIZE + 1,
        last=(page - 1) * PAGE_SIZE + len(shown),
        total=len(records),
        page=page,
        pages=num_pages,
    )
    return place, table
