"""The Board's view of a run, during training and later: its state, curves, completions, and the other runs.

The view is one element, which a script of ours (`view/run_view.js`) fills. It asks `RunView.ask`, an ordinary endpoint
of Gradio, every two seconds, and draws the curves with the plotly.js that the package `plotly` brings along and the
Board serves: nothing is loaded from a network. This is why Gradio's own plots are not used:

- `gr.Plot` brings a plotly.js of 2024 in its pages, which draws nothing of the typed arrays of plotly 6 and later; and
  it builds a plot anew with each value, so that zoom, hidden curves and the cursor are lost every two seconds.
- `gr.LinePlot` drops series that come later, hides a first point, and names no value of a constant.

Plots that are drawn by `Plotly.react` are updated in place. The script adds text as text, never as HTML: completions
are foreign. What is shown belongs to the page (`page_state`); files that were read are shared by all pages.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr
from gradio.context import Context, LocalContext
from llamafactory.extras.constants import RUNNING_LOG
from llamafactory.webui.common import DEFAULT_SAVE_DIR, get_save_dir

from grpo_stage.algorithm.catalog import ESTIMATORS
from grpo_stage.algorithm.conditions import as_lines
from grpo_stage.board.asked import whole_numbers
from grpo_stage.board.devices import Devices
from grpo_stage.board.downloads import curves_as_csv, piece_of, report_of
from grpo_stage.board.groups import groups_found, over_steps, text_of
from grpo_stage.board.locales import definition, message, texts
from grpo_stage.board.page_state import Page, this_page
from grpo_stage.board.remedy import with_settings
from grpo_stage.board.rise import rise_of
from grpo_stage.board.run_list import runs_below
from grpo_stage.board.run_state import LIVE, log_of, state_of
from grpo_stage.board.runner import GRPORunner
from grpo_stage.host.recovery import RECOVERIES_FILE
from grpo_stage.monitors.dead_groups import ALL_RIGHT, SOLVED
from grpo_stage.records.completion_groups import CompletionGroups
from grpo_stage.records.completions import COMPLETIONS_FILE
from grpo_stage.records.run_files import ALARMS_FILE, LOG_FILE, AlarmLines, MetricCurves
from grpo_stage.report.charts import DrawnSection, sections_of
from grpo_stage.report.facts import differences, memory, phases
from grpo_stage.report.run_folder import newest_checkpoint
from grpo_stage.report.settings import Settings, settings_of


TICK_S = 2
API_NAME = "grpo_run_view"
MAX_COMPARED = 6
_KEPT_RUNS = 32
"""How many runs keep their files in memory; older ones are read again."""
_READING_S = 0.2
"""A large file is read in several answers, so that each comes soon."""
_SILENT_LINES = 3
_NOT_AT_FIRST = (
    "Length of those that ended",
    "Weight of old samples",
    "Rollouts of a batch",
    "Groups left out by dynamic sampling",
    "Seconds of a step",
)
"""Charts that are shown once they are chosen."""


@dataclass
class _Run:
    """The files of a run, as far as they were read."""

    folder: Path
    curves: MetricCurves
    completions: CompletionGroups
    alarms: AlarmLines
    lock: Lock = field(default_factory=Lock)
    is_read: bool = False
    """Whether all completions were found."""
    kept: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """What was derived from the files, by name, with the version it is of."""

    def update(self) -> None:
        self.curves.update()
        self.alarms.update()
        self.is_read = self.completions.update(_READING_S)

    @property
    def version(self) -> Any:
        """A version that depends on the files alone, so that reading a run again gives the same one.

        It stays the same while the completions are read, so that those answers are short.
        """
        return self.curves.version, self.completions.version if self.is_read else None, self.alarms.version

    def derived(self, name: str, version: Any, make: Callable[[], Any]) -> Any:
        """A value that several pages want, made once for each version."""
        if name not in self.kept or self.kept[name][0] != version:
            self.kept[name] = version, make()
        return self.kept[name][1]

    def settings(self) -> Settings:
        checkpoint = newest_checkpoint(self.folder)
        return self.derived("settings", checkpoint, lambda: settings_of(self.folder, checkpoint))


class RunView:
    """The elements of the view, and the answers to its script. One object for a Board."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._lock = Lock()
        self._devices = Devices()
        self._runner: GRPORunner | None = None
        plotly = Path(str(files("plotly") / "package_data" / "plotly.min.js"))
        gr.set_static_paths([plotly])
        with gr.Accordion(open=True, visible=False, elem_id="grpo_run") as self.panel:
            gr.HTML(
                f"<style>{_source('run_view.css')}</style>"
                f'<div id="grpo_view" data-plotly="{plotly.resolve().as_posix()}" data-tick="{TICK_S}"></div>',
                padding=False,
            )
            self._page = gr.HTML(elem_id="grpo_view_page", elem_classes="grpo-hidden", padding=False)
            self._apply = gr.Button(elem_id="grpo_view_apply", elem_classes="grpo-hidden")
        self.elements: dict[str, gr.blocks.Block] = {"grpo_run": self.panel}

    def connect(self, engine: Any, train: Mapping[str, Any], inputs: set[Any]) -> None:
        """Connect the events, once the host's elements exist."""
        assert isinstance(engine.runner, GRPORunner)
        self._runner = engine.runner
        top = engine.manager.get_elem_by_id
        place = [top("top.lang"), top("top.model_name"), top("top.finetuning_type"), train["output_dir"]]
        quietly = {"show_progress": "hidden", "queue": False}
        gr.on([element.change for element in (*place, train["training_stage"])], locate, place, self._page, **quietly)
        train["output_dir"].input(note_typed, [train["output_dir"]], None, **quietly)
        # Typing the value that is already there fires no input event; its Enter fires a key event.
        train["output_dir"].key_up(_note_if_entered, [train["output_dir"]], None, **quietly)
        self._apply.click(
            lambda data: with_settings(engine.runner, this_page().remedy, data, data[top("top.lang")]),
            inputs | {top("top.lang")},
            [*inputs, train["output_box"]],
            **quietly,
        )
        gr.api(self.ask, api_name=API_NAME, queue=False, show_api=False)
        assert Context.root_block is not None
        Context.root_block.load(None, None, None, js=_script())

    # The questions of the script

    def ask(self, asked: dict) -> dict:
        """The answer to a question of the script: `asked["what"]` names it, its other items are its arguments."""
        page = this_page()
        what = asked.get("what")
        if what == "runs":
            return {"runs": [asdict(run) for run in runs_below(Path(DEFAULT_SAVE_DIR), self._processes())]}
        if what == "open":
            page.chosen = _name_of_run(asked.get("run"))
            return {}
        run = self._shown(page)
        try:
            with run.lock:
                answers: dict[Any, Callable[[], dict[str, Any]]] = {
                    "run": lambda: self._answer(page, run, asked),
                    "groups": lambda: groups_found(run.completions, asked),
                    "text": lambda: text_of(run.completions, *whole_numbers(asked, "step", "prompt", "place")),
                    "prompt": lambda: over_steps(run.completions, *whole_numbers(asked, "prompt")),
                    "log": lambda: {"text": log_of(run.folder, RUNNING_LOG)},
                    "remedy": lambda: _note_remedy(page, run, asked),
                    "curves": lambda: {"text": curves_as_csv(run.curves.history), "next": None},
                    "completions": lambda: piece_of(run.folder / COMPLETIONS_FILE, asked),
                    "report": lambda: {"text": report_of([run.folder, *self._compared(run, asked)]), "next": None},
                }
                return answers[what]() if what in answers else {"error": f"unknown: {what}"}
        except OSError as error:  # the file was replaced since
            return {"error": error.strerror or str(error)}
        except ValueError as error:
            return {"error": str(error)}

    def _answer(self, page: Page, run: _Run, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The state of the run, and what else has changed since the answer that the page has seen."""
        lang = page.lang
        run.update()
        answer: dict[str, Any] = {
            "name": run.folder.name,
            "is_chosen": bool(page.chosen),
            "is_own": self._is_own(page),
            "state": self._state(run, page),
            "faults": [*_faults(run, lang), *_silence(run, lang)],
            "recoveries": _recoveries(run.folder),
            "is_reading": not run.is_read,
        }
        if asked.get("lang") != lang:
            answer["texts"] = texts(lang)["view"]
            answer["lang"] = lang
        charts = {str(name): bool(is_shown) for name, is_shown in dict(asked.get("charts") or {}).items()}
        others = [self._run(str(folder)) for folder in self._compared(run, asked)]
        for other in others:
            other.curves.update()
        versions = [(str(each.folder), each.curves.version) for each in (run, *others)]
        seen = _short((lang, str(run.folder), run.version, versions, sorted(charts.items())))
        answer["seen"] = seen
        if asked.get("seen") == seen:
            return answer
        steps = run.completions.steps
        sections = run.derived(
            "sections",
            (versions, sorted(charts.items())),
            lambda: sections_of(
                [each.curves.history for each in (run, *others)], lambda *chart: _is_shown(charts, *chart)
            ),
        )
        answer |= {
            "sections": [_section(section, charts, lang) for section in sections],
            "runs": [each.folder.name for each in (run, *others)],
            "alarms": [_alarm(record) for record in reversed(run.alarms.records)],
            "completions": {"version": _short(run.completions.version), "steps": [*steps[:1], *steps[-1:]]},
            "differences": [asdict(row) for row in differences([each.settings() for each in (run, *others)])],
        }
        return answer

    def _state(self, run: _Run, page: Page) -> dict[str, Any]:
        progress, history = run.curves.progress, run.curves.history
        state = state_of(run.folder, progress, self._processes().get(str(run.folder)))

        def last(name: str) -> float | None:
            values = history.series(name).values
            return values[-1] if values else None

        measured = run.derived(
            "measured",
            run.curves.version,
            lambda: {
                "phases": [asdict(phase) for phase in phases(history, run.settings().values)],
                "memory": memory(history),
                "rise": rise_of(history.series("reward").values),
            },
        )
        return {
            **asdict(state),
            **measured,
            "folder": str(run.folder),
            "is_live": state.kind in LIVE,
            "is_empty": state.kind == "none" and not run.curves.error,
            "step": progress.get("current_steps"),
            "steps": progress.get("total_steps"),
            "elapsed": str(progress.get("elapsed_time") or ""),
            "left": str(progress.get("remaining_time") or ""),
            "reward": last("reward"),
            "step_time": last("step_time"),
            "rollout_rate": last("rollout_tokens_per_second"),
            "update_rate": last("update_tokens_per_second"),
            "devices": [asdict(device) for device in self._devices.now()] if state.kind in LIVE else [],
        }

    # Which run

    def _processes(self) -> Mapping[str, Any]:
        return {} if self._runner is None else self._runner.started

    def _is_own(self, page: Page) -> bool:
        """Whether what is in the form's folder is shown: a recipe that is imported does not choose what is read."""
        is_typed = bool(page.typed) and page.output_dir == page.typed
        return bool(page.chosen) or _is_saved(page.folder) or is_typed or page.folder in self._processes()

    def _shown(self, page: Page) -> _Run:
        if page.chosen:
            return self._run(os.path.join(DEFAULT_SAVE_DIR, page.chosen))
        return self._run(page.folder if self._is_own(page) else "")

    def _compared(self, run: _Run, asked: Mapping[str, Any]) -> list[Path]:
        """The folders of the other runs that are drawn beside the run."""
        names = list(asked.get("compare") or [])[:MAX_COMPARED]
        folders = [Path(DEFAULT_SAVE_DIR, name) for name in map(_name_of_run, names) if name]
        return [folder for folder in folders if folder != run.folder]

    def _run(self, folder: str) -> _Run:
        with self._lock:
            if folder not in self._runs:
                path = Path(folder or os.path.join(DEFAULT_SAVE_DIR, ".no-run"))
                self._runs[folder] = _Run(path, MetricCurves(path), CompletionGroups(path), AlarmLines(path))
            self._runs.move_to_end(folder)
            while len(self._runs) > _KEPT_RUNS:
                self._runs.popitem(last=False)
            return self._runs[folder]


def locate(lang: str, model_name: str | None, finetuning_type: str, output_dir: str | None) -> str:
    """Note the output folder of the page's form. Returns the page's name, by which the script asks."""
    page = this_page()
    folder = _folder(model_name, finetuning_type, output_dir)
    if folder != page.folder:
        page.chosen = ""
    page.lang, page.folder, page.output_dir = lang, folder, output_dir or ""
    request = LocalContext.request.get(None)
    name = (request.session_hash if request else None) or ""
    return f'<span data-page="{name if name.isalnum() else ""}" data-place="{_short((lang, folder))}"></span>'


def note_typed(output_dir: str) -> None:
    """Note a folder that the user has typed or chosen: it is shown wherever it is."""
    this_page().typed = output_dir


def _note_if_entered(output_dir: str, pressed: gr.KeyUpData) -> None:
    if pressed.key == "Enter":
        note_typed(output_dir)


def _folder(model_name: str | None, finetuning_type: str, output_dir: str | None) -> str:
    """The folder of the run of this form; empty if there is none."""
    if not output_dir or os.path.sep in output_dir:  # the host uses such a path as it is, and warns each time
        return output_dir or ""
    return str(get_save_dir(model_name, finetuning_type, output_dir)) if model_name else ""


def _is_saved(folder: str) -> bool:
    """Whether the folder is below the host's own, by its name; links in it are the owner's and are followed."""
    below = Path(os.path.relpath(os.path.abspath(folder), os.path.abspath(DEFAULT_SAVE_DIR))).parts
    return not folder or (bool(below) and ".." not in (*below, *Path(folder).parts))


def _name_of_run(name: Any) -> str:
    """A run's name below the folder of outputs; empty for anything else."""
    is_name = isinstance(name, str) and bool(name) and _is_saved(os.path.join(DEFAULT_SAVE_DIR, name))
    return name if is_name and not os.path.isabs(name) else ""


# What is shown


def _faults(run: _Run, lang: str) -> list[str]:
    """The parts of the run's files that are not shown, and why."""
    named: dict[str, MetricCurves | CompletionGroups | AlarmLines] = {
        LOG_FILE: run.curves,
        COMPLETIONS_FILE: run.completions,
        ALARMS_FILE: run.alarms,
    }
    unreadable = [
        message("unreadable", lang, file=name, error=each.error) for name, each in named.items() if each.error
    ]
    damaged = [
        message("damaged", lang, file=name, count=each.num_damaged_lines)
        for name, each in named.items()
        if each.num_damaged_lines
    ]
    return [*unreadable, *damaged]


def _silence(run: _Run, lang: str) -> list[str]:
    """A word on a run in whose last log lines nothing could be learned, long before an alarm may be sure."""
    silent, right = (run.curves.history.series(name).values for name in ("frac_reward_zero_std", ALL_RIGHT))
    pairs = zip(reversed(silent), reversed(right), strict=False)
    count = sum(1 for _ in takewhile(lambda pair: pair[0] == 1 and pair[1] < SOLVED, pairs))
    return [message("silence", lang, count=count)] if count >= _SILENT_LINES and _needs_differences(run) else []


def _needs_differences(run: _Run) -> bool:
    """Whether a group of equal rewards is known to teach this run nothing."""
    settings = run.settings()
    estimator = ESTIMATORS.get(settings.values.get("advantage_estimator", "grpo"))
    is_zero = estimator is not None and estimator.ties_are_zero and not settings.values.get("kl_in_reward")
    return bool(settings.sources) and is_zero


def _alarm(record: Mapping[str, Any]) -> dict[str, Any]:
    said = {name: record[name] for name in ("monitor", "step", "action", "seen", "meaning", "remedy")}
    return {**said, "settings": as_lines(record["settings"])}


def _recoveries(folder: Path) -> list[dict[str, Any]]:
    """The times that the run went back (`on_alarm: recover`); none where their file is damaged."""
    path = folder / RECOVERIES_FILE
    try:
        noted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return [
            {"step": each["step"], "resumed_step": each["resumed_step"], "settings": as_lines(each["settings"])}
            for each in noted
        ]
    except (ValueError, TypeError, LookupError):
        return []


def _note_remedy(page: Page, run: _Run, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Note which alarm's settings are to go into the form."""
    (number,) = whole_numbers(asked, "alarm")
    newest_first = run.alarms.records[::-1]
    page.remedy = newest_first[number]["settings"] if 0 <= number < len(newest_first) else {}
    return {}


def _is_shown(chosen: Mapping[str, bool], title: str, is_folded: bool) -> bool:
    return chosen.get(title, not is_folded and title not in _NOT_AT_FIRST)


def _section(section: DrawnSection, chosen: Mapping[str, bool], lang: str) -> dict[str, Any]:
    words = texts(lang)["view"]
    return {
        "key": section.title,
        "title": words["charts"].get(section.title, section.title),
        "about": words["charts"].get(section.about, section.about),
        "num_left_out": section.num_left_out,
        "charts": [
            {
                "key": chart.title,
                "title": words["charts"].get(chart.name, chart.name).replace("{}", chart.owner),
                "hint": words["hints"].get(chart.name, ""),
                "unit": chart.unit,
                "is_stacked": chart.is_stacked,
                "is_shown": _is_shown(chosen, chart.title, section.is_folded),
                "definitions": {name: definition(name, lang) for name in chart.definitions},
                "curves": [asdict(curve) for curve in chart.curves],
            }
            for chart in section.charts
        ],
    }


def _short(value: Any) -> str:
    """A short text that is another one for another value."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def _script() -> str:
    """The view's script, as a function that the page calls once."""
    numbers = files("grpo_stage.report").joinpath("numbers.js").read_text(encoding="utf-8")
    return f"() => {{\n{numbers}\n{_source('run_view.js')}\n}}"


def _source(name: str) -> str:
    return files("grpo_stage.board").joinpath("view", name).read_text(encoding="utf-8")
