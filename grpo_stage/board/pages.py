"""Any number of pages: browser tabs, and people, that look at one Board."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.context import Context, get_blocks_context

from grpo_stage.board import imported_code
from grpo_stage.board.run_view import TICK_S
from grpo_stage.board.runner import GRPORunner


if TYPE_CHECKING:
    from llamafactory.webui.engine import Engine


def serve_many_pages(engine: "Engine", train: Mapping[str, Any]) -> None:
    """Let any number of pages start a run, open the Board while one lasts, and watch it."""
    runner = engine.runner
    assert isinstance(runner, GRPORunner)
    _remember_what_is_resumed(engine, runner)
    _watch_by_a_timer(runner, train)
    _start_at_once(runner)
    _hold_no_connection()


def _remember_what_is_resumed(engine: "Engine", runner: GRPORunner) -> None:
    host_resume = engine.resume

    def resume() -> Iterator[Any]:
        runner.remember_running()
        confirmed = engine.manager.get_elem_by_id(imported_code.CONFIRMED)
        for update in host_resume():
            # What another page has confirmed is confirmed there alone.
            yield {element: value for element, value in update.items() if element is not confirmed}

    engine.resume = resume


def _watch_by_a_timer(runner: GRPORunner, train: Mapping[str, Any]) -> None:
    watch = gr.Timer(TICK_S, active=False)
    watched = [train[name] for name in ("output_box", "progress_bar", "loss_viewer", "swanlab_link")]
    watch.tick(runner.watched, None, watched, queue=False, show_progress="hidden")
    gr.on(
        [train["start_btn"].click, train["resume_btn"].change], lambda: gr.Timer(active=True), None, watch, queue=False
    )


def _start_at_once(runner: GRPORunner) -> None:
    """The host lets a second page's start wait for the end of the first's, and would then train without a word."""
    context = get_blocks_context()
    assert context is not None
    for event in context.fns.values():
        if event.fn == runner.run_train:
            event.concurrency_limit = None


def _hold_no_connection() -> None:
    """Gradio's pages hold a connection to say that they are there, and a browser has six: the sixth tab freezes all.

    Without it, what a closed page had in `gr.State` is dropped when there are very many pages.
    """
    blocks = Context.root_block
    assert blocks is not None
    host_config = blocks.get_config_file

    def config_file() -> Any:
        return {**host_config(), "connect_heartbeat": False}

    blocks.get_config_file = config_file
