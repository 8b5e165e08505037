"""Support for any number of pages (browser tabs, users) of one Board."""

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
    """Let any number of pages start a run, open the Board during a run, and watch it."""
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
            # A confirmation on another page counts there alone.
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
    """Run a start at once: the host lets a second page's start wait for the first run, and then trains silently."""
    context = get_blocks_context()
    assert context is not None
    for event in context.fns.values():
        if event.fn == runner.run_train:
            event.concurrency_limit = None


def _hold_no_connection() -> None:
    """Stop Gradio's pages from holding a connection to the server: a browser has six, and the sixth tab froze all.

    Without these connections, the `gr.State` of a closed page is dropped only when there are very many pages.
    """
    blocks = Context.root_block
    assert blocks is not None
    host_config = blocks.get_config_file

    def config_file() -> Any:
        return {**host_config(), "connect_heartbeat": False}

    blocks.get_config_file = config_file
