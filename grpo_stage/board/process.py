"""The Board's training process on every page: starting it, showing it, and its end."""

import os
import threading
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from llamafactory.extras.constants import RUNNING_LOG, SWANLAB_CONFIG, TRAINER_LOG
from llamafactory.extras.misc import torch_gc
from llamafactory.webui.common import get_save_dir
from llamafactory.webui.control import get_trainer_info
from llamafactory.webui.locales import ALERTS
from llamafactory.webui.runner import Runner

from grpo_stage.board import page_state
from grpo_stage.board.locales import message
from grpo_stage.board.tables import fenced
from grpo_stage.board.training_process import TrainingProcess
from grpo_stage.records.run_files import MetricCurves


_HIDDEN = gr.update(visible=False)
_SHOWN_BYTES = 20_000


class WatchedRunner(Runner):
    """The Board's runner for any number of pages that start and watch a process; other stages use the host's code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.started: dict[str, TrainingProcess] = {}
        """The last process that this Board has started in each output folder."""
        self._process: TrainingProcess | None = None
        self._lock = threading.RLock()
        """Held while a process begins or ends, and while the host draws its plot in global state."""

    def _is_grpo(self, data: Mapping[Component, Any]) -> bool:
        """Whether a form has chosen this stage."""
        raise NotImplementedError

    def remember_running(self) -> None:
        """Note the running process for a page that is opened during a run; the host gives it the run's form."""
        data: Any = self.running_data
        if self.running and data is not None and self._is_grpo(data):
            page_state.remember({self.manager.get_id_by_elem(element): value for element, value in data.items()})

    def _initialize(self, data: dict[Component, Any], do_train: bool, from_preview: bool) -> str:
        process = self._process
        if process is not None and do_train and self._is_grpo(data):
            return message("busy", self._value(data, "top.lang"), folder=self._output_dir(process.data))
        return str(super()._initialize(data, do_train, from_preview))

    def _launch(self, data: dict[Component, Any], do_train: bool) -> Generator[dict[Component, Any], None, None]:
        launch = super()._launch(data, do_train)
        with self._lock:  # two pages may start at once: the second one finds the process of the first
            first = next(launch)
        yield first
        yield from launch

    def set_abort(self) -> None:
        if self._process is not None:
            self._process.was_aborted = True
        super().set_abort()

    def monitor(self) -> Generator[dict[Component, Any], None, None]:
        """Begin to show a process on this page; `watched` continues.

        The host's `monitor` holds a connection as long as the process runs; a browser has six for one server.
        """
        with self._lock:
            data: Any = self.running_data
            is_ours = data is not None and self.do_train and self._is_grpo(data)
            if is_ours:
                page = page_state.this_page()
                page.process, page.seen = self._process or self._followed(), None
        if data is None:  # the process has ended before the page came here
            return
        if not is_ours:
            yield from super().monitor()
            return
        yield self.watched()

    def watched(self) -> Any:
        """The updates, by element, for the process that this page has started or was opened with.

        The elements are the host's output box, progress bar, loss viewer and SwanLab link.
        """
        page = page_state.this_page()
        process = page.process
        if process is None:
            return gr.skip()
        lang, folder = self._value(process.data, "top.lang"), self._output_dir(process.data)
        get = self.manager.get_elem_by_id
        if process.has_ended:
            page.process, page.seen = None, None
            return {get("train.output_box"): self._end(process, lang, folder), get("train.progress_bar"): _HIDDEN}
        if process.was_aborted:
            return {get("train.output_box"): ALERTS["info_aborting"][lang], get("train.progress_bar"): _HIDDEN}
        version = version_of_logs(folder)
        if version == page.seen:
            return gr.skip()
        page.seen = version
        try:
            with self._lock:
                log, progress, info = get_trainer_info(lang, folder, do_train=True)
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            # The host reads all lines, even a half-written one. The run view reports damaged lines.
            return {get("train.output_box"): running_log(folder)}
        shown = {get(f"train.{name}"): value for name, value in info.items()}
        return {get("train.output_box"): log, get("train.progress_bar"): progress, **shown}

    def _followed(self) -> TrainingProcess:
        assert self.trainer is not None
        assert self.running_data is not None
        self.running, self.aborted = True, False
        self._process = TrainingProcess(self.trainer, self.running_data, self._release)
        self.started[self._output_dir(self.running_data)] = self._process
        return self._process

    def _release(self) -> None:
        """Note that the process has ended, so that another can be started."""
        with self._lock:
            self.trainer, self.running_data, self._process = None, None, None
            self.running, self.aborted = False, False
        torch_gc()

    def _end(self, process: TrainingProcess, lang: str, folder: str) -> str:
        """How the process ended, and its last messages, as Markdown."""
        code = process.returncode
        curves = MetricCurves(Path(folder))
        curves.update()
        step, steps = curves.progress.get("current_steps", 0), curves.progress.get("total_steps", "?")
        if process.was_aborted and step != steps:
            said = message("stopped", lang, step=step, steps=steps) if step else message("stopped_early", lang)
        elif code == 0:
            said = ALERTS["info_finished"][lang]
        else:
            return f"{ALERTS['err_failed'][lang]} Exit code: {code}\n\n{fenced(process.errors)}"
        return f"{said}\n\n{running_log(folder)}"

    def _value(self, data: Mapping[Component, Any], element_id: str) -> Any:
        return data[self.manager.get_elem_by_id(element_id)]

    def _output_dir(self, data: Mapping[Component, Any]) -> str:
        names = ("top.model_name", "top.finetuning_type", "train.output_dir")
        return str(get_save_dir(*(self._value(data, name) for name in names)))


def version_of_logs(output_dir: str) -> tuple[tuple[int, int], ...]:
    """A value that changes whenever the host would show something else of a run."""
    files = [os.path.join(output_dir, name) for name in (RUNNING_LOG, TRAINER_LOG, SWANLAB_CONFIG)]
    statuses = [os.stat(file) for file in files if os.path.isfile(file)]
    return tuple((status.st_size, status.st_mtime_ns) for status in statuses)


def running_log(output_dir: str) -> str:
    """The end of the host's log of a run, as Markdown; empty if there is none yet."""
    path = Path(output_dir) / RUNNING_LOG
    return fenced(path.read_bytes()[-_SHOWN_BYTES:].decode(errors="replace")) if path.is_file() else ""
