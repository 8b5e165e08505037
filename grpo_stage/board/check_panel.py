"""The buttons before "Start": a check of the whole form, and a probe of the start model, with what they find."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component

from grpo_stage.algorithm.refusals import gathering, named_keys
from grpo_stage.board.check_view import check_view, probe_view, problems_view
from grpo_stage.board.locales import message
from grpo_stage.board.places import place_of
from grpo_stage.board.runner import GRPORunner
from grpo_stage.board.tool_process import CONFIG, ToolState, run_tool
from grpo_stage.host.parser import check, known_key_names
from grpo_stage.records.redaction import mask_text, secrets_in


if TYPE_CHECKING:
    from gradio.events import Dependency
    from llamafactory.webui.engine import Engine


NUM_PROMPTS_PROBED, NUM_SAMPLES = 16, 8
_CHECK = ("check", CONFIG, "--all")
_PROBE = ("probe", CONFIG, "-n", str(NUM_PROMPTS_PROBED), "-k", str(NUM_SAMPLES), "--gradient-prompts", "0")


class CheckPanel:
    """The elements, which stand in the row above the host's buttons."""

    def __init__(self) -> None:
        with gr.Column(visible=False, elem_id="grpo_check_panel", elem_classes="grpo") as self.block:
            with gr.Row():
                self.check = gr.Button(variant="primary", elem_id="grpo_check_btn")
                self.probe = gr.Button(elem_id="grpo_probe_btn")
            self.result = gr.HTML(visible=False, elem_id="grpo_check_result", padding=False)
        self.elements: dict[str, gr.blocks.Block] = {"grpo_check_btn": self.check, "grpo_probe_btn": self.probe}

    def connect(self, engine: "Engine", train: Mapping[str, Any], inputs: set[Component]) -> list["Dependency"]:
        """Connect the buttons. Returns their events, which another event may cancel."""
        lang = engine.manager.get_elem_by_id("top.lang")

        def check_form(data: dict[Component, Any]) -> Iterator[Any]:
            yield from _run(engine.runner, data, data[lang], _CHECK, check_view)

        def probe(data: dict[Component, Any]) -> Iterator[Any]:
            yield from _run(engine.runner, data, data[lang], _PROBE, probe_view)

        events = [
            button.click(run, inputs | {lang}, [self.result], concurrency_limit=1, show_progress="hidden")
            for button, run in ((self.check, check_form), (self.probe, probe))
        ]
        # What was found belongs to the form as it was then.
        gr.on(
            [train["stop_btn"].click, train["arg_load_btn"].click, train["output_dir"].input],
            lambda: gr.update(visible=False),
            None,
            [self.result],
            cancels=events,
            queue=False,
        )
        return events


def _run(
    runner: Any,
    data: Mapping[Component, Any],
    lang: str,
    words: Sequence[str],
    view: Callable[[Mapping[str, Any], str], str],
) -> Iterator[Any]:
    """The updates of the result: what the fields and keys show at once, then what the command has found so far."""
    assert isinstance(runner, GRPORunner)
    own, arguments = runner.checked_form(data)
    keys = known_key_names() | {"extra_args"}

    def problem(text: str) -> dict[str, Any]:
        return {"text": text, "keys": named_keys(text.split(". ")[0], keys)}

    def listed(problems: Sequence[Mapping[str, Any]], running: str = "") -> Any:
        found = problems_view(problems, lambda key: place_of(runner.manager, key, lang), lang)
        return gr.update(value=running + found, visible=True)

    problems = [problem(text) for text in own]
    if arguments is None:
        yield listed(problems)
        return
    early = [*problems, *map(problem, _refusals(arguments))]
    if early and words is _PROBE:
        yield listed(early)
        return
    shown: Any = None
    with closing(run_tool(words, arguments)) as states:
        for state in states:
            answer = state.answer or {}
            running = "" if state.is_done else _running(words, lang, state)
            if state.is_done and state.error is not None:
                problems.append(problem(state.error))
            elif state.is_done and answer.get("problems"):
                problems += answer["problems"]
            elif early or answer.get("problems"):
                if not state.is_done:
                    yield listed(early, running)
            elif not answer or "num_sampled" in answer:
                yield gr.update(value=running, visible=True)
            elif state.is_done or answer != shown:
                shown = answer
                yield gr.update(value=running + view(answer, lang), visible=True)
    if found := problems or early:
        yield listed(found)


def _refusals(arguments: Mapping[str, Any]) -> Collection[str]:
    """What the keys alone show, which needs no process."""
    with gathering(lambda error: str(error) if isinstance(error, ValueError) else None) as texts:
        check(dict(arguments))
    secrets = secrets_in(dict(arguments))
    return [mask_text(text, secrets) for text in texts]


def _running(words: Sequence[str], lang: str, state: ToolState) -> str:
    found = state.answer or {}
    name = "probe_sampled" if "num_sampled" in found else "probe_running" if words is _PROBE else "check_running"
    counts = {key: found[key] for key in ("num_sampled", "num_prompts") if key in found}
    return f'<p role="status">{message(name, lang, seconds=f"{state.elapsed_s:.0f}", **counts)}</p>'
