"""The Board's training process, as several pages see it."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

from grpo_stage.board import page_state

from .conftest import Board


FOLDER = Path("saves/Custom/lora/run")
Start = Callable[[str], None]


@pytest.fixture
def start(board: Board, turn_to: Callable[[str], None]) -> Iterator[Start]:
    """Start a Python program in place of a training, from the page "first"."""
    processes = []

    def run(program: str) -> None:
        processes.append(Popen([sys.executable, "-c", program], stderr=PIPE, text=True))
        board.runner.trainer, board.runner.running_data, board.runner.do_train = processes[-1], board.data(), True
        turn_to("first")
        list(board.runner.monitor())

    yield run
    for process in processes:
        process.kill()
    wait_until(lambda: board.runner.trainer is None)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_end() -> None:
    process = page_state.this_page().process
    assert process is not None
    wait_until(lambda: process.has_ended)


def shown(board: Board) -> str:
    """What the page's output box turns to."""
    values = board.runner.watched()
    return board.by_id(values).get("train.output_box", "") if "__type__" not in values else ""


def write_log(step: int, **values: Any) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    line = {"current_steps": step, "total_steps": 9, "percentage": 50, "elapsed_time": "", "remaining_time": ""}
    with (FOLDER / "trainer_log.jsonl").open("a") as log:
        log.write(json.dumps({**line, **values}) + "\n")


def test_every_page_that_looks_on_sees_the_end(board: Board, start: Start, turn_to: Callable[[str], None]) -> None:
    start("import time; time.sleep(0.5)")
    turn_to("second")
    list(board.runner.monitor())
    wait_for_end()
    assert not board.runner.running
    assert (board.runner.trainer, board.runner.running_data) == (None, None)
    for page in ("first", "second"):
        turn_to(page)
        assert shown(board).startswith("Finished.")
        assert shown(board) == ""
    turn_to("third")
    assert shown(board) == ""
    assert list(board.runner.monitor()) == []  # a page that comes too late


def test_errors_that_nobody_reads_do_not_hold_the_process(board: Board, start: Start) -> None:
    start("import os, sys; os.write(2, b'\\xff``` no text\\n' * 100_000 + b'the last words'); sys.exit(3)")
    wait_for_end()
    said = shown(board)
    assert said.startswith("Failed. Exit code: 3\n\n````\n")
    assert said.endswith("the last words\n````")
    assert len(said) < 25_000


@pytest.mark.parametrize(
    ("steps", "said"),
    [([], "Stopped before the first step."), ([3], "Stopped at step 3 of 9."), ([3, 9], "Finished.")],
)
def test_an_aborted_run_says_how_far_it_came(steps: list[int], said: str, board: Board, start: Start) -> None:
    for step in steps:
        write_log(step)
    handler = "signal.signal(signal.SIGABRT, lambda *_: sys.exit(0))"
    start(f"import pathlib, signal, sys, time; {handler}; pathlib.Path('ready').touch(); time.sleep(60)")
    wait_until(Path("ready").exists)
    board.runner.set_abort()
    process = page_state.this_page().process
    assert process is not None
    assert process.has_ended or "wait for terminating" in shown(board)
    wait_for_end()
    assert shown(board).startswith(said)


def test_a_second_run_is_refused_in_words(board: Board, start: Start) -> None:
    start("import time; time.sleep(60)")
    refusal = list(board.runner.run_train(board.data(train__output_dir="another")))
    said = board.by_id(refusal[0])["train.output_box"]
    assert said.startswith("This Board trains `saves/Custom/lora/run` already")
    assert not Path("saves/Custom/lora/another").exists()


def test_a_damaged_line_does_not_end_the_view(board: Board, start: Start) -> None:
    write_log(1, loss=0.5)
    (FOLDER / "running_log.txt").write_text("step 1\n")
    start("import time; time.sleep(60)")
    assert shown(board) == ""  # the first answer has it, and nothing has changed since
    for damaged in ('{"torn', "[1]", "7", "{}"):
        (FOLDER / "trainer_log.jsonl").write_text(f"{damaged}\n")
        assert "step 1" in shown(board)
