"""The Board's training process, for every page that looks on.

LLaMA Board trains in one process at a time. The host lets each page read the process's errors and wait for its end by
itself, so that two pages take them from each other, and a page that is closed leaves them unread: the process then
waits until somebody reads. Here one thread does both, and the pages ask it.
"""

import os
import threading
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from subprocess import Popen
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
from grpo_stage.records.run_files import MetricCurves


_HIDDEN = gr.update(visible=False)
_KEPT_BYTES = 20_000
_BLOCK = 4096
_LAST_WORDS_S = 2.0


class TrainingProcess:
    """A process that was started, and the form that it was started from."""

    def __init__(self, process: "Popen[str]", data: Mapping[Any, Any], at_end: Callable[[], None]) -> None:
        """Follow a process.

        Args:
            process: one whose standard error is a pipe.
            data: the form's values, by element.
            at_end: called once the process has ended, before the pages are told.
        """
        self._process = process
        self.data = data
        self.was_aborted = False
        self._at_end = at_end
        self._ended = threading.Event()
        self._errors = b""
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        threading.Thread(target=self._follow, daemon=True).start()

    @property
    def has_ended(self) -> bool:
        """Whether it has, and its last words are read."""
        return self._ended.is_set()

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.returncode

    @property
    def errors(self) -> str:
        """The last of what the process wrote to its standard error."""
        return self._errors.decode(errors="replace")

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as pipe:
            while block := pipe.buffer.read1(_BLOCK):  # type: ignore[attr-defined]
                self._errors = (self._errors + block)[-_KEPT_BYTES:]

    def _follow(self) -> None:
        self._process.wait()
        self._reader.join(_LAST_WORDS_S)  # a child of its own may hold the pipe open for longer
        if self._process.returncode != 0 and not self.was_aborted:
            print(self.errors)
        self._at_end()
        self._ended.set()


class WatchedRunner(Runner):
    """The Board's runner, whose process any number of pages may start and watch; other stages' as the host has it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.started: set[str] = set()
        """The output folders of the runs that were started here."""
        self._process: TrainingProcess | None = None
        self._lock = threading.RLock()
        """Held while a process begins or ends, and while the host draws its plot, which it does in one place."""

    def _is_grpo(self, data: Mapping[Component, Any]) -> bool:
        """Whether a form is this stage's."""
        raise NotImplementedError

    def remember_running(self) -> None:
        """A page that is opened while a run lasts gets the run's form from the host."""
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
        with self._lock:  # two pages may start at once: the second finds the first's process
            first = next(launch)
        yield first
        yield from launch

    def set_abort(self) -> None:
        if self._process is not None:
            self._process.was_aborted = True
        super().set_abort()

    def monitor(self) -> Generator[dict[Component, Any], None, None]:
        """Begin to show a process on this page; `watched` goes on with it.

        The host's would hold a connection as long as the process runs, and a browser has six to one server.
        """
        with self._lock:
            data: Any = self.running_data
            is_ours = data is not None and self.do_train and self._is_grpo(data)
            if is_ours:
                page = page_state.this_page()
                page.process, page.seen = self._process or self._followed(), None
        if data is None:  # it has ended while the page was on its way here
            return
        if not is_ours:
            yield from super().monitor()
            return
        yield self.watched()

    def watched(self) -> Any:
        """What this page shows of the process that it has started or was opened with, by element; each page by itself.

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
            # The host reads every line again, the one that is being written too. The run view says what is damaged.
            return {get("train.output_box"): running_log(folder)}
        shown = {get(f"train.{name}"): value for name, value in info.items()}
        return {get("train.output_box"): log, get("train.progress_bar"): progress, **shown}

    def _followed(self) -> TrainingProcess:
        assert self.trainer is not None
        assert self.running_data is not None
        self.running, self.aborted = True, False
        self.started.add(self._output_dir(self.running_data))
        self._process = TrainingProcess(self.trainer, self.running_data, self._release)
        return self._process

    def _release(self) -> None:
        """The process has ended: another may be started."""
        with self._lock:
            self.trainer, self.running_data, self._process = None, None, None
            self.running, self.aborted = False, False
        torch_gc()

    def _end(self, process: TrainingProcess, lang: str, folder: str) -> str:
        """How the process ended, and what it left to read, as Markdown."""
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
    """Another one whenever the host would show something else of a run."""
    files = [os.path.join(output_dir, name) for name in (RUNNING_LOG, TRAINER_LOG, SWANLAB_CONFIG)]
    statuses = [os.stat(file) for file in files if os.path.isfile(file)]
    return tuple((status.st_size, status.st_mtime_ns) for status in statuses)


def running_log(output_dir: str) -> str:
    """The end of the host's log of a run, as Markdown; empty where there is none yet."""
    path = Path(output_dir) / RUNNING_LOG
    return fenced(path.read_bytes()[-_KEPT_BYTES:].decode(errors="replace")) if path.is_file() else ""
