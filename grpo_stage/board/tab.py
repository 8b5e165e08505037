"""GRPO in LLaMA Board's train tab: the panel after the host's RLHF panel, and the view of a run at the end.

The host builds its tab from one set of input elements and passes their values to the runner. Our elements join that
set before the host fills it, so that preview, start, save, load and languages work for them as well.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import wrapt
from gradio.components import Component
from llamafactory.extras.constants import STAGES_USE_PAIR_DATA, SUPPORTED_MODELS, TRAINING_STAGES
from llamafactory.extras.misc import is_accelerator_available
from llamafactory.webui.common import get_save_dir, get_time, load_config
from llamafactory.webui.control import list_datasets, load_dataset_info

from grpo_stage.arguments import REWARDS
from grpo_stage.board.check_panel import CheckPanel
from grpo_stage.board.fields import BASICS, FORM_FIELDS, FormField, effective
from grpo_stage.board.imported_code import ImportedCode
from grpo_stage.board.locales import PREFIX, message
from grpo_stage.board.page_state import this_page
from grpo_stage.board.pages import serve_many_pages
from grpo_stage.board.porting import SUFFIXES, TRL_VERSIONS, account_view, is_of_another_system, port
from grpo_stage.board.recipes import export_recipe, import_recipe
from grpo_stage.board.run_view import RunView
from grpo_stage.board.runner import GRPORunner
from grpo_stage.board.style import add_style
from grpo_stage.board.tables import harmless, literal, table
from grpo_stage.board.tool_process import WARM
from grpo_stage.board.trial import try_rewards
from grpo_stage.board.wizard import Wizard, datasets_to_choose
from grpo_stage.host.configuration_file import STAGE
from grpo_stage.host.learning_rates import LORA_ALPHA, start_rate
from grpo_stage.host.recipe_text import read_recipe


if TYPE_CHECKING:
    from llamafactory.webui.engine import Engine


FIELDS_IN_A_ROW = 4
SANE_VALUES: Mapping[str, Any] = {
    "lora_alpha": LORA_ALPHA,
    "lr_scheduler_type": "constant_with_warmup",
    "cutoff_len": 1024,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": "1.0",
    "logging_steps": 1,
    "save_steps": 50,
}
_LOG_HEIGHT = 300
# The answers stand at the top of a long page, and the check far below.
_CHECK_AND_SHOW = """() => {
  document.getElementById("grpo_check_btn").click();
  document.getElementById("grpo_check_panel").scrollIntoView({ block: "center" });
}"""
# What the host says of a start, and the state of the run, stand below the buttons.
# Without a value: gradio takes one for the outputs' values, and newer browsers return one from `scrollIntoView`.
_SHOW_RUN = """() => { document.getElementById("grpo_run_status")?.scrollIntoView({ block: "center" }); }"""


@wrapt.decorator
def with_grpo(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The host's train tab with the panel and the run view."""
    engine: Engine = args[0] if args else kwargs["engine"]
    inputs = engine.manager.get_base_elems()
    panel = Panel()
    inputs.update(panel.inputs)
    engine.manager.get_base_elems = lambda: inputs
    try:
        train: dict[str, Any] = wrapped(*args, **kwargs)
    finally:
        del engine.manager.get_base_elems
    _move_behind(panel.accordion, train["rlhf_tab"])
    # What a first run needs stands where the stage is chosen: the panel is a page below.
    _move_behind(panel.wizard.block, _at_level_of(panel.wizard.block, train["training_stage"]))
    checks = CheckPanel()
    _move_before(checks.block, train["start_btn"].parent)
    view = RunView()
    add_style()
    serve_many_pages(engine, train)
    panel.connect(engine, train, inputs, checks)
    view.connect(engine, train, inputs)
    train["start_btn"].click(None, js=_SHOW_RUN)
    train["training_stage"].change(
        _parts_shown,
        [train["training_stage"]],
        [panel.wizard.block, panel.accordion, checks.block, view.panel, train["loss_viewer"], train["output_box"]],
        queue=False,
        show_progress="hidden",
    )
    return {**train, **panel.elements, **checks.elements, **view.elements}


def _parts_shown(stage_name: str) -> list[Any]:
    """Our four parts; the host's plot of the loss, which says nothing here; its log, which would push ours away."""
    is_ours = is_grpo(stage_name)
    if is_ours:
        WARM.start()  # so that no button has to wait for imports
    return [
        *[gr.update(visible=is_ours)] * 4,
        gr.update(visible=not is_ours),
        gr.update(max_height=_LOG_HEIGHT if is_ours else None),
    ]


def is_grpo(stage_name: str) -> bool:
    """Whether this entry of the Board's stage list is GRPO."""
    return TRAINING_STAGES.get(stage_name) == STAGE


def _at_level_of(block: gr.blocks.Block, inner: gr.blocks.Block) -> gr.blocks.Block:
    """The block around an inner one that stands beside another block."""
    while inner.parent is not block.parent:
        assert inner.parent is not None
        inner = inner.parent
    return inner


def _move_behind(block: gr.blocks.Block, neighbor: gr.blocks.Block) -> None:
    assert block.parent is not None
    assert block.parent is neighbor.parent
    siblings = block.parent.children
    siblings.remove(block)
    siblings.insert(siblings.index(neighbor) + 1, block)


def _move_before(block: gr.blocks.Block, neighbor: gr.blocks.Block) -> None:
    assert block.parent is not None
    assert block.parent is neighbor.parent
    siblings = block.parent.children
    siblings.remove(block)
    siblings.insert(siblings.index(neighbor), block)


def _unused(model_name: str | None, output_dir: str) -> str:
    """An output folder for another run: the one that is chosen, or a new one if that holds a run already."""
    folder = Path(get_save_dir(model_name or "Custom", "lora", output_dir)) if output_dir else None
    return f"train_{get_time()}" if folder is not None and folder.is_dir() and any(folder.iterdir()) else output_dir


def _fit_for(stage_name: str, folder: str, datasets: list[str]) -> list[str]:
    """The datasets that the stage can train on, and those that the folder does not describe."""
    info, wants_pairs = load_dataset_info(folder), TRAINING_STAGES[stage_name] in STAGES_USE_PAIR_DATA
    return [name for name in datasets if name not in info or info[name].get("ranking", False) == wants_pairs]


class Panel:
    """The form of the stage's keys, with import and export of recipes and a trial of the rewards."""

    def __init__(self) -> None:
        self.fields: dict[str, Component] = {}
        self.elements: dict[str, gr.blocks.Block] = {}
        self.wizard = Wizard()
        with gr.Accordion(open=True, visible=False, elem_id="grpo_tab", elem_classes="grpo") as self.accordion:
            with gr.Row():
                self._import = gr.UploadButton(file_types=[".yaml", ".yml", *SUFFIXES], elem_id="grpo_import")
                self._export = gr.Button()
                self._exported = gr.File(visible=False, interactive=False, elem_id="grpo_exported")
            with gr.Accordion(open=False, elem_id="grpo_port") as self._port, gr.Row():
                self._trl = gr.Dropdown(list(TRL_VERSIONS), value=TRL_VERSIONS[-1], elem_id="grpo_port_trl")
                self._devices_there = gr.Number(None, step=1, placeholder="–", elem_id="grpo_port_devices")  # noqa: RUF001
            self._account = gr.HTML(visible=False, elem_id="grpo_port_account", max_height=600, padding=False)
            self.code = ImportedCode()
            for name, fields in groupby(FORM_FIELDS, key=lambda field: field.section):
                with gr.Accordion(open=name == BASICS, elem_id=f"{PREFIX}group_{name.lower()}") as section:
                    self._add_rows(list(fields))
                    if name == REWARDS:
                        self._add_trial()
                self.elements[f"{PREFIX}group_{name.lower()}"] = section
        self.elements |= {
            **self.code.elements,
            **self.wizard.elements,
            "grpo_tab": self.accordion,
            "grpo_import_btn": self._import,
            "grpo_port": self._port,
            "grpo_port_trl": self._trl,
            "grpo_port_devices": self._devices_there,
            "grpo_export_btn": self._export,
            "grpo_exported": self._exported,
            **{field.element: self.fields[field.key] for field in FORM_FIELDS},
        }

    @property
    def inputs(self) -> set[Component]:
        """The elements whose values the runner gets."""
        return {*self.fields.values(), *self.code.elements.values()}

    def _add_rows(self, fields: list[FormField]) -> None:
        for start in range(0, len(fields), FIELDS_IN_A_ROW):
            with gr.Row():
                for field in fields[start : start + FIELDS_IN_A_ROW]:
                    self.fields[field.key] = field.widget()

    def _add_trial(self) -> None:
        with gr.Row():
            self._num_rows = gr.Slider(minimum=1, maximum=16, value=4, step=1)
            self._source = gr.Dropdown(choices=["reference", "model"], value="reference")
            self._try = gr.Button(elem_id="grpo_try_btn")
        self._report = gr.Textbox(
            visible=False, interactive=False, max_lines=20, show_label=False, elem_id="grpo_try_report"
        )
        self._scores = gr.HTML(visible=False, elem_id="grpo_try_table", max_height=500, padding=False)
        self._is_trying = gr.State(False)
        self.elements |= {
            "grpo_try_rows": self._num_rows,
            "grpo_try_source": self._source,
            "grpo_try_btn": self._try,
            "grpo_try_table": self._scores,
        }

    def connect(self, engine: "Engine", train: Mapping[str, Any], inputs: set[Component], checks: CheckPanel) -> None:
        """Connect the events, once the host's elements exist."""
        assert isinstance(engine.runner, GRPORunner)
        self._show_what_applies(train)
        self._set_sane_values(engine, train)
        lang, output_box = engine.manager.get_elem_by_id("top.lang"), train["output_box"]
        top = engine.manager.get_elem_by_id
        model_name, model_path = top("top.model_name"), top("top.model_path")

        def load(data: dict[Component, Any]) -> Iterator[dict[Component, Any]]:
            path, account = data[self._import], ""
            try:
                if is_of_another_system(path):
                    devices_here = int(data[train["device_count"]] or 1)
                    for state in port(path, data[self._trl], data[self._devices_there], devices_here):
                        seconds = f"{state.elapsed_s:.0f}"
                        yield {output_box: message("porting", data[lang], seconds=seconds)}
                    if state.answer is None:
                        raise ValueError(state.error)
                    recipe, account = dict(state.answer["recipe"]), account_view(state.answer, data[lang])
                else:
                    recipe = read_recipe(path)
                form = import_recipe(engine.runner, recipe)
            except ValueError as refusal:
                gr.Warning(harmless(str(refusal)), duration=None)  # until the user closes it
                yield {output_box: literal(str(refusal))}
                return
            values = {element: value for element, value in form.items() if element in inputs}
            said = {output_box: message("imported", data[lang]), self.code.confirmed: self.code.choices(recipe)}
            others = dict(zip(results, hidden(), strict=True))
            yield values | said | others | {self._account: gr.update(value=account, visible=bool(account))}

        def make(data: dict[Component, Any]) -> dict[Component, Any]:
            chosen = data[train["dataset_dir"]], data[train["dataset"]] or [], data[model_path] or ""
            template = data[top("top.template")]
            recipe = self.wizard.recipe(data, *chosen, None if template == "default" else template)
            form = import_recipe(engine.runner, recipe)
            if data[model_name] and recipe.get("model_name_or_path") == data[model_path]:
                form[model_name] = this_page().loaded["top.model_name"] = data[model_name]
            # The person has chosen the folder and the functions, and no file that came from elsewhere.
            form |= {train["output_dir"]: _unused(form[model_name], data[train["output_dir"]])}
            form |= {self.code.imported: "[]"}
            form |= {train["learning_rate"]: set_rate("lora", recipe.get("model_name_or_path", ""))}
            values = {element: value for element, value in form.items() if element in inputs}
            others = dict(zip(results, hidden(), strict=True))
            return values | others | {self.code.confirmed: self.code.choices({})}

        def save(data: dict[Component, Any]) -> dict[Component, Any]:
            error = engine.runner._initialize(data, do_train=True, from_preview=True)
            if error:
                gr.Warning(error)
                return {output_box: error, self._exported: gr.File(visible=False)}
            path = Path(tempfile.mkdtemp(prefix="grpo-stage-recipe-")) / "grpo.yaml"
            path.write_text(export_recipe(engine.runner._parse_train_args(data)), encoding="utf-8")
            return {output_box: message("exported", data[lang]), self._exported: gr.File(str(path), visible=True)}

        def attempt(data: dict[Component, Any]) -> Iterator[list[Any]]:
            yield from self._attempt(engine.runner, data, data[lang])

        def hidden() -> list[Any]:
            return [gr.update(visible=False)] * len(results)

        def stop(is_trying: bool, language: str) -> list[Any]:
            return [message("trial_stopped", language) if is_trying else gr.skip(), False]

        checking = checks.connect(engine, train, inputs)
        results = [self._report, self._scores, self._exported, self._account, checks.result]
        trial = self._try.click(
            attempt,
            inputs | {lang, self._num_rows, self._source},
            [self._report, self._scores, self._is_trying],
            concurrency_limit=1,
        )
        self._import.upload(
            load,
            {lang, self._import, self._trl, self._devices_there, train["device_count"]},
            [*inputs, output_box, *results],
            concurrency_limit=None,
            cancels=[trial, *checking],
        )
        self.wizard.dataset.focus(
            datasets_to_choose, [train["dataset_dir"], train["training_stage"]], [self.wizard.dataset], queue=False
        )
        made = self.wizard.button.click(
            make,
            {
                *(train["dataset_dir"], train["dataset"], train["output_dir"], *self.wizard.questions),
                *(model_name, model_path, top("top.template")),
            },
            [*inputs, *results],
            concurrency_limit=None,
            cancels=[trial, *checking],
        )
        made.success(None, js=_CHECK_AND_SHOW)
        self._export.click(save, inputs | {lang}, [output_box, self._exported], concurrency_limit=None)
        train["stop_btn"].click(
            stop, [self._is_trying, lang], [self._report, self._is_trying], cancels=[trial], queue=False
        )
        # After another form is loaded, the results of a trial and an export no longer belong to it.
        gr.on([train["arg_load_btn"].click, train["output_dir"].input], hidden, None, results, cancels=[trial])
        self.code.connect(engine.runner, [self._try, checks.check, checks.probe, train["start_btn"]], inputs)
        dataset_lists = [train["dataset_dir"], train["training_stage"]]
        eval_dataset = self.fields["eval_dataset"]
        eval_dataset.focus(list_datasets, dataset_lists, [eval_dataset], queue=False)

    def _attempt(self, runner: GRPORunner, data: dict[Component, Any], lang: str) -> Iterator[list[Any]]:
        try:
            arguments = runner.trial_arguments(data)
        except ValueError as refusal:
            yield [gr.Textbox(str(refusal), visible=True), gr.update(visible=False), False]
            return
        for trial in try_rewards(arguments, data[self._num_rows], data[self._source]):
            if not trial.is_done:
                said = message("trying", lang, seconds=f"{trial.elapsed_s:.0f}")
                yield [gr.Textbox(said, visible=True), gr.update(visible=False), True]
            elif trial.error is not None:
                yield [gr.Textbox(trial.error, visible=True), gr.update(visible=False), False]
            else:
                prompt, kind, completion, total = message("trial_headers", lang).split("|")
                headers = [prompt, kind, completion, *trial.headers, total]
                scores = table(headers, trial.rows, [5, 2, 5] + [1.5] * (len(headers) - 3))
                notes = gr.Textbox("\n".join(trial.notes), visible=bool(trial.notes))
                yield [notes, gr.update(value=scores, visible=True), False]

    def _show_what_applies(self, train: Mapping[str, Any]) -> None:
        """Hide the fields that have no effect beside the values of the others."""
        conditional = [field for field in FORM_FIELDS if field.depends_on]
        conditions = frozenset().union(*(field.depends_on for field in conditional)) - {"eval_strategy"}
        watched = {key: self.fields[key] for key in sorted(conditions | {"eval_dataset"})}

        def visible(val_size: float, *values: Any) -> list[bool]:
            given = {key: value for key, value in zip(watched, values, strict=True) if value is not None}
            run = effective(given, eval_strategy="steps" if val_size or given.get("eval_dataset") else "no")
            return [field.applies(run) for field in conditional]

        elements = [train["val_size"], *watched.values()]
        gr.on(
            [element.change for element in elements],
            lambda *values: [gr.update(visible=is_visible) for is_visible in visible(*values)],
            elements,
            [self.fields[field.key] for field in conditional],
            queue=False,
            show_progress="hidden",
        )
        for field, is_visible in zip(conditional, visible(*(element.value for element in elements)), strict=True):
            self.fields[field.key].visible = is_visible

    def _set_sane_values(self, engine: "Engine", train: Mapping[str, Any]) -> None:
        """Choosing the stage sets suitable values; leaving it restores the earlier ones."""
        top = engine.manager.get_elem_by_id
        model = [top("top.finetuning_type"), top("top.model_path")]
        names = ["learning_rate", "compute_type", *SANE_VALUES]
        shared = [train[name] for name in names]
        earlier = gr.State(None)

        def choose(
            stage: str,
            method: str,
            path: str | None,
            folder: str,
            datasets: list[str] | None,
            before: list[Any] | None,
            *values: Any,
        ) -> list[Any]:
            if not is_grpo(stage) and before is None:
                return [gr.skip(), None, *[gr.skip()] * len(names)]
            kept_datasets = _fit_for(stage, folder, datasets or [])
            rest = ["bf16" if is_accelerator_available() else "fp32", *SANE_VALUES.values()]
            if is_grpo(stage):
                return [kept_datasets, before or list(values), set_rate(method, path), *rest]
            assert before is not None
            ours = [this_page().rate, *rest]
            kept = [old if value == ours else value for old, value, ours in zip(before, values, ours, strict=True)]
            return [kept_datasets, None, *kept]

        def follow(stage: str, method: str, path: str | None, rate: str) -> Any:
            return set_rate(method, path) if is_grpo(stage) and rate == this_page().rate else gr.skip()

        quietly = {"queue": False, "show_progress": "hidden"}
        stage = train["training_stage"]
        stage.input(
            choose,
            [stage, *model, train["dataset_dir"], train["dataset"], earlier, *shared],
            [train["dataset"], earlier, *shared],
            **quietly,
        )
        for chosen in model:
            chosen.input(follow, [stage, *model, train["learning_rate"]], [train["learning_rate"]], **quietly)
        top("top.model_name").input(
            lambda stage, method, name, rate: follow(stage, method, _path_of(name), rate),
            [stage, model[0], top("top.model_name"), train["learning_rate"]],
            [train["learning_rate"]],
            **quietly,
        )


def _path_of(name: str) -> str:
    """The host's `get_model_path`, which fails while another handler writes the file of the user's own paths."""
    own_paths = (load_config() or {}).get("path_dict") or {}
    return own_paths.get(name) or next(iter(SUPPORTED_MODELS.get(name, {}).values()), "")


def set_rate(method: str, model: str | None) -> str:
    """The learning rate that the form gets; another model or method changes it as long as the user has not."""
    this_page().rate = start_rate(method, model or "")
    return this_page().rate
