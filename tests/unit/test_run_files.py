"""A run's curves and completions, read as they grow."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_stage.records.completions import CompletionsLog
from grpo_stage.records.line_log import LineLog
from grpo_stage.records.run_files import CompletionPages, MetricCurves, thinned


def log_line(step: int, **metrics: Any) -> str:
    return json.dumps({**metrics, "current_steps": step, "total_steps": 9, "elapsed_time": "0:00:01"}) + "\n"


def completion_line(step: int, reward: float | None, text: str = "") -> str:
    return json.dumps({"step": step, "prompt_index": 0, "completion": text, "reward": reward}) + "\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "trainer_log.jsonl"


@pytest.fixture
def completions(tmp_path: Path) -> Path:
    return tmp_path / "completions.jsonl"


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    curves, pages = MetricCurves(tmp_path), CompletionPages(tmp_path / "nothing")
    assert (curves.update(), pages.update()) == (False, False)
    assert (curves.matching(["*"], 9), curves.progress, pages.steps) == ({}, {}, [])


def test_curves_grow(tmp_path: Path, log: Path) -> None:
    curves = MetricCurves(tmp_path)
    append(log, log_line(1, reward=0.5, loss=1.0))
    assert curves.update()
    assert not curves.update()
    append(log, log_line(2, reward=0.75) + '{"reward": 9')  # the last line is being written
    assert curves.update()
    assert curves.matching(["reward"], 9) == {"reward": [(1, 0.5), (2, 0.75)]}
    assert curves.progress["current_steps"] == 2
    append(log, ', "current_steps": 3}\n')
    curves.update()
    assert curves.matching(["reward"], 9)["reward"][-1] == (3, 9)


def test_curves_come_in_the_order_of_their_patterns(tmp_path: Path, log: Path) -> None:
    append(log, log_line(1, **{"rewards/b/mean": 1, "reward": 2, "rewards/a/mean": 3, "kl": 4, "remaining": "text"}))
    curves = MetricCurves(tmp_path)
    curves.update()
    assert list(curves.matching(["reward", "rewards/*/mean"], 9)) == ["reward", "rewards/b/mean", "rewards/a/mean"]


def test_a_log_that_a_resume_cut_short_is_read_anew(tmp_path: Path, log: Path) -> None:
    curves = MetricCurves(tmp_path)
    append(log, "".join(log_line(step, reward=step) for step in range(1, 6)))
    curves.update()
    LineLog(log).keep(lambda line: line["current_steps"] <= 2)
    append(log, "".join(log_line(step, reward=10 * step) for step in range(3, 9)))  # longer than it was
    assert curves.update()
    assert curves.matching(["reward"], 9)["reward"] == [(1, 1), (2, 2), *((s, 10 * s) for s in range(3, 9))]
    log.unlink()
    assert curves.update()
    assert not curves.update()
    assert curves.matching(["reward"], 9) == {}


def test_a_long_curve_keeps_its_shape() -> None:
    line = [(step, float(step)) for step in range(1, 11)]
    assert thinned(line, 10) == line
    assert thinned(line, 6) == [(1, 1), (2, 2), (5, 5), (6, 6), (9, 9), (10, 10)]
    sawtooth = [(step, float(step % 2)) for step in range(10_000)]
    values = [value for _, value in thinned(sawtooth, 400)]
    assert len(values) == 400
    assert all(len(set(values[i : i + 3])) == 2 for i in range(398))
    spike = [(step, 100.0 if step == 4321 else 0.5) for step in range(10_000)]
    assert (4321, 100.0) in thinned(spike, 400)
    assert [step for step, _ in thinned(spike, 400)] == sorted({step for step, _ in thinned(spike, 400)})


DAMAGED = {
    "torn": b'{"current_steps": 2, "rew',
    "no JSON": b"Traceback (most recent call last):",
    "binary": bytes(set(range(256)) - {10}),
    "a list": b"[1, 2]",
    "no step": b'{"reward": 1.0}',
    "a step that is text": b'{"current_steps": "2", "total_steps": 9}',
    "a step that is no whole number": b'{"current_steps": 1.5, "total_steps": 9}',
    "a step below zero": b'{"current_steps": -1, "total_steps": 9}',
    "nested": b"[" * 100_000,
    "empty": b"",
    "a number of many digits": b'{"current_steps": 1' + b"0" * 5000 + b', "total_steps": 9}',
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_costs_that_line_alone(tmp_path: Path, log: Path, line: bytes) -> None:
    log.write_bytes(log_line(1, reward=0.5).encode() + line + b"\n" + log_line(3, reward=0.25).encode())
    curves = MetricCurves(tmp_path)
    curves.update()
    assert curves.matching(["reward"], 9) == {"reward": [(1, 0.5), (3, 0.25)]}
    assert curves.num_damaged_lines == 1


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_completion_costs_that_one_alone(tmp_path: Path, completions: Path, line: bytes) -> None:
    first, last = (completion_line(1, reward, text).encode() for reward, text in ((0.0, "a"), (1.0, "b")))
    completions.write_bytes(line + b"\n" + first + line + b"\n" + last + completion_line(2, 0.0).encode())
    pages = CompletionPages(tmp_path)
    pages.update()
    assert [record["completion"] for record in pages.at_step(1, "sampled")] == ["a", "b"]
    assert pages.num_damaged_lines == 2
    assert list(pages.steps) == [1, 2]


@pytest.mark.parametrize("reader", [MetricCurves, CompletionPages])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_cannot_be_read_says_so(reader: Any, kind: str, tmp_path: Path, log: Path, completions: Path) -> None:
    path = log if reader is MetricCurves else completions
    append(path, log_line(1) if reader is MetricCurves else completion_line(1, 0.0))
    files = reader(tmp_path)
    files.update()
    readable = files.version
    path.unlink()
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    assert files.update()
    assert not files.update()
    assert "not an ordinary file" in files.error
    assert files.version != readable
    assert (files.matching(["*"], 9), files.progress) == ({}, {}) if reader is MetricCurves else not files.steps
    path.rmdir() if kind == "folder" else path.unlink()
    files.update()
    assert files.error == ""


def test_numbers_that_cannot_be_drawn_are_left_out(tmp_path: Path, log: Path) -> None:
    append(log, log_line(1, reward=float("nan"), kl=float("inf"), entropy=10**400, loss=1.0))
    curves = MetricCurves(tmp_path)
    curves.update()
    assert curves.matching(["reward", "kl", "entropy", "loss"], 9) == {"loss": [(1, 1.0)]}


def test_interleaved_steps_are_put_together(tmp_path: Path, completions: Path) -> None:
    append(completions, "".join(completion_line(step, 0.0, text) for step, text in ((2, "a"), (1, "b"), (2, "c"))))
    pages = CompletionPages(tmp_path)
    pages.update()
    assert list(pages.steps) == [1, 2]
    assert [record["completion"] for record in pages.at_step(2, "sampled")] == ["a", "c"]


def test_completions_by_step_and_reward(tmp_path: Path, completions: Path) -> None:
    pages = CompletionPages(tmp_path)
    append(completions, completion_line(1, 0.0, "a") + completion_line(1, 1.0, "b") + completion_line(2, 0.5, "c"))
    assert pages.update()
    append(completions, completion_line(2, None, "d") + completion_line(2, -1.0, "e") + completion_line(5, 0.0, "f"))
    assert pages.update()
    assert not pages.update()
    assert list(pages.steps) == [1, 2, 5]
    texts = {
        order: "".join(r["completion"] for r in pages.at_step(2, order)) for order in ("best", "worst", "sampled")
    }  # type: ignore[arg-type]
    assert texts == {"best": "ced", "worst": "ecd", "sampled": "cde"}
    assert [record["completion"] for record in pages.at_step(1, "best")] == ["b", "a"]
    with pytest.raises(KeyError):
        pages.at_step(3, "best")


def test_a_completion_that_looks_like_a_record_is_none(tmp_path: Path, completions: Path) -> None:
    append(completions, completion_line(1, 0.0, '\n{"step": 7, "x": 1}\n') + completion_line(2, 0.0))
    pages = CompletionPages(tmp_path)
    pages.update()
    assert list(pages.steps) == [1, 2]


def test_completions_that_a_resume_cut_short(tmp_path: Path, completions: Path) -> None:
    append(completions, "".join(completion_line(step, 0.0, f"old {step}") for step in (1, 2, 3)))
    pages = CompletionPages(tmp_path)
    pages.update()
    CompletionsLog(str(tmp_path), [], 4, is_writer=True).drop_after(1)
    append(completions, "".join(completion_line(step, 0.0, f"new {step}") for step in (2, 3, 4)))
    pages.update()
    assert list(pages.steps) == [1, 2, 3, 4]
    assert pages.at_step(3, "best")[0]["completion"] == "new 3"


def test_a_large_run_opens_at_once(tmp_path: Path, log: Path, completions: Path) -> None:
    """10,000 log lines of 40 metrics and 100,000 completions, 70 MB, in less than 2 seconds of a processor."""
    metrics = [{f"rewards/f{i}/mean": (i + step % 3) / 7 for i in range(40)} for step in range(3)]
    append(log, "".join(log_line(step, **metrics[step % 3]) for step in range(1, 10_001)))
    record = {"prompt": "What is 1 + 1? " * 10, "completion": "The answer is 2. " * 20, "reference": "2"}
    lines = (
        json.dumps({"step": step, **record, "rewards": {"accuracy": 1.0}, "reward": i / 64}) + "\n"
        for step in range(1, 1564)
        for i in range(64)
    )
    append(completions, "".join(lines))
    assert completions.stat().st_size > 50e6
    started = time.process_time()
    curves, pages = MetricCurves(tmp_path), CompletionPages(tmp_path)
    curves.update()
    pages.update()
    drawn = curves.matching(["rewards/*/mean"], 400)
    best = pages.at_step(pages.steps[-1], "best")[0]
    seconds = time.process_time() - started
    assert (len(drawn), len(drawn["rewards/f3/mean"]), len(pages.steps), best["reward"]) == (40, 400, 1563, 63 / 64)
    assert seconds < 2
    started = time.process_time()
    assert (curves.update(), pages.update()) == (False, False)
    assert time.process_time() - started < 0.05
