"""A run's curves and completions, read as they grow."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_stage.records import completion_groups
from grpo_stage.records.completion_groups import CompletionGroups, Filter
from grpo_stage.records.completions import CompletionsLog
from grpo_stage.records.line_log import LineLog
from grpo_stage.records.run_files import MetricCurves


def log_line(step: int, **metrics: Any) -> str:
    return json.dumps({**metrics, "current_steps": step, "total_steps": 9, "elapsed_time": "0:00:01"}) + "\n"


def completion_line(step: int, reward: float | None, text: str = "", prompt: int = 0, **more: Any) -> str:
    line = {"step": step, "prompt_index": prompt, "completion": text, "rewards": {"reward": 9.0}, "reward": reward}
    return json.dumps({**line, **more}, ensure_ascii=False) + "\n"


def texts(groups: CompletionGroups, step: int, prompt: int = 0) -> list[str]:
    group = groups.at(step, prompt)
    return [record["completion"] for record in groups.records(group)] if group else []


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
    curves, groups = MetricCurves(tmp_path), CompletionGroups(tmp_path / "nothing")
    assert (curves.update(), groups.update()) == (False, True)
    assert (curves.matching(["*"]), curves.progress, groups.steps) == ({}, {}, [])


def test_curves_grow(tmp_path: Path, log: Path) -> None:
    curves = MetricCurves(tmp_path)
    append(log, log_line(1, reward=0.5, loss=1.0))
    assert curves.update()
    assert not curves.update()
    append(log, log_line(2, reward=0.75) + '{"reward": 9')  # the last line is being written
    assert curves.update()
    assert curves.matching(["reward"]) == {"reward": [(1, 0.5), (2, 0.75)]}
    assert curves.progress["current_steps"] == 2
    append(log, ', "current_steps": 3}\n')
    curves.update()
    assert curves.matching(["reward"])["reward"][-1] == (3, 9)


def test_curves_come_in_the_order_of_their_patterns(tmp_path: Path, log: Path) -> None:
    append(log, log_line(1, **{"rewards/b/mean": 1, "reward": 2, "rewards/a/mean": 3, "kl": 4, "remaining": "text"}))
    curves = MetricCurves(tmp_path)
    curves.update()
    assert list(curves.matching(["reward", "rewards/*/mean"])) == ["reward", "rewards/b/mean", "rewards/a/mean"]


def test_a_log_that_a_resume_cut_short_is_read_anew(tmp_path: Path, log: Path) -> None:
    curves = MetricCurves(tmp_path)
    append(log, "".join(log_line(step, reward=step) for step in range(1, 6)))
    curves.update()
    LineLog(log).keep(lambda line: line["current_steps"] <= 2)
    append(log, "".join(log_line(step, reward=10 * step) for step in range(3, 9)))  # longer than it was
    assert curves.update()
    assert curves.matching(["reward"])["reward"] == [(1, 1), (2, 2), *((s, 10 * s) for s in range(3, 9))]
    log.unlink()
    assert curves.update()
    assert not curves.update()
    assert curves.matching(["reward"]) == {}


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
    assert curves.matching(["reward"]) == {"reward": [(1, 0.5), (3, 0.25)]}
    assert curves.num_damaged_lines == 1


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_completion_costs_that_one_alone(tmp_path: Path, completions: Path, line: bytes) -> None:
    first, last = (completion_line(1, reward, text).encode() for reward, text in ((0.0, "a"), (1.0, "b")))
    completions.write_bytes(line + b"\n" + first + line + b"\n" + last + completion_line(2, 0.0).encode())
    groups = CompletionGroups(tmp_path)
    groups.update()
    assert texts(groups, 1) == ["a", "b"]
    assert groups.num_damaged_lines == 2
    assert list(groups.steps) == [1, 2]


def test_damage_inside_a_line_is_counted_once_it_is_read(tmp_path: Path, completions: Path) -> None:
    torn = '{"step": 1, "prompt_index": 0, "completion": "a", "rew\n'
    append(completions, completion_line(1, 0.0, "b") + torn + completion_line(1, 1.0, "c"))
    groups = CompletionGroups(tmp_path)
    groups.update()
    for _ in range(2):
        assert texts(groups, 1) == ["b", "c"]
        assert groups.num_damaged_lines == 1


@pytest.mark.parametrize("reader", [MetricCurves, CompletionGroups])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_cannot_be_read_says_so(reader: Any, kind: str, tmp_path: Path, log: Path, completions: Path) -> None:
    path = log if reader is MetricCurves else completions
    append(path, log_line(1) if reader is MetricCurves else completion_line(1, 0.0))
    files = reader(tmp_path)
    files.update()
    readable = files.version
    path.unlink()
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    files.update()
    files.update()
    assert "not an ordinary file" in files.error
    assert files.version != readable
    assert (files.matching(["*"]), files.progress) == ({}, {}) if reader is MetricCurves else not files.steps
    path.rmdir() if kind == "folder" else path.unlink()
    files.update()
    assert files.error == ""


def test_numbers_that_cannot_be_drawn_are_left_out(tmp_path: Path, log: Path) -> None:
    append(log, log_line(1, reward=float("nan"), kl=float("inf"), entropy=10**400, loss=1.0))
    curves = MetricCurves(tmp_path)
    curves.update()
    assert curves.matching(["reward", "kl", "entropy", "loss"]) == {"loss": [(1, 1.0)]}


def test_a_group_is_what_one_prompt_got_at_one_step(tmp_path: Path, completions: Path) -> None:
    lines = ((2, 0, "a"), (1, 0, "b"), (2, 1, "c"), (2, 0, "d"))
    append(completions, "".join(completion_line(step, len(text), text, prompt) for step, prompt, text in lines))
    groups = CompletionGroups(tmp_path)
    groups.update()
    append(completions, completion_line(2, None, "e", 0, finish_reason="length") + completion_line(3, 0.5, "f", 1))
    groups.update()
    assert list(groups.steps) == [1, 2, 3]
    assert texts(groups, 2, 0) == ["a", "d", "e"]
    assert [(group.step, group.mean) for group in groups.of_prompt(1)] == [(2, 1.0), (3, 0.5)]
    group = groups.at(2, 0)
    assert group is not None
    assert (group.num, group.num_truncated, group.rewards, group.mean) == (3, 1, [1.0, 1.0], 1.0)


@pytest.mark.parametrize("num_bytes", [1, 90, 150, 400, 10**6])
@pytest.mark.parametrize("end", ["", '{"step": 9, "prompt_index": 0, "completion": "half'])
def test_the_end_is_read_first_and_no_line_is_lost(
    num_bytes: int, end: str, tmp_path: Path, completions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion_groups, "_BLOCK_BYTES", num_bytes)
    lines = [completion_line(step, i / 8, f"{step}.{i} ", i % 2) for step in range(1, 9) for i in range(4)]
    lines.insert(9, "no record\n")
    lines[20] = completion_line(5, 0.5, "a long one " * 30, 1)  # longer than a part
    append(completions, "".join(lines) + end)
    groups = CompletionGroups(tmp_path)
    if not groups.update(seconds=0):
        # Of one part: a part may begin in the middle of a step, or hold no whole line.
        assert groups.steps[-1] == (8 if num_bytes > len(lines[-1]) else groups.steps[0])
    append(completions, '"}\n' if end else completion_line(9, 0.0))
    while not groups.update(seconds=0):
        pass
    assert list(groups.steps) == list(range(1, 10))
    assert groups.num_damaged_lines == 1
    for step in range(1, 9):
        assert [group.prompt for group in groups.at_step(step)] == [0, 1]
        assert [group.num for group in groups.at_step(step)] == [2, 2]
        assert texts(groups, step) == [f"{step}.0 ", f"{step}.2 "]
    found = [
        record["completion"] for _, records in groups.search(Filter(), "sampled", 0, 99, 9.0)[0] for record in records
    ]
    assert len(found) == 33


def test_a_file_that_is_replaced_while_it_is_read_is_read_anew(
    tmp_path: Path, completions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion_groups, "_BLOCK_BYTES", 200)
    append(completions, "".join(completion_line(step, 0.0, f"old {step}") for step in range(1, 9)))
    groups = CompletionGroups(tmp_path)
    assert not groups.update(seconds=0)
    completions.unlink()
    append(completions, completion_line(1, 0.0, "new"))
    groups.update()
    assert list(groups.steps) == [1]
    assert texts(groups, 1) == ["new"]


def test_lines_of_earlier_versions_are_grouped_by_their_prompt(tmp_path: Path, completions: Path) -> None:
    record = {"completion": "x", "rewards": {}, "reward": 1.0}
    append(
        completions, "".join(json.dumps({"step": 1, "prompt": prompt, **record}) + "\n" for prompt in ("p", "q", "p"))
    )
    groups = CompletionGroups(tmp_path)
    groups.update()
    assert [group.num for group in groups.at_step(1)] == [2, 1]


def found(groups: CompletionGroups, order: Any = "sampled", **wanted: Any) -> list[str]:
    """The completions that match, of all groups."""
    result, following = groups.search(Filter(**wanted), order, 0, 100, 60.0)
    assert following is None
    return [record["completion"] for _, records in result for record in records if record["is_match"]]


@pytest.fixture
def mixed(tmp_path: Path, completions: Path) -> CompletionGroups:
    lines = [
        *((1, 0, 0.0, "low"), (1, 0, 1.0, 'HIGH "quoted"'), (1, 1, None, "none")),
        *((2, 0, 0.5, "middle"), (2, 0, 0.5, "größe"), (2, 1, -1.0, "negative")),
    ]
    append(completions, "".join(completion_line(step, reward, text, prompt) for step, prompt, reward, text in lines))
    append(completions, completion_line(3, 0.25, "cut", 2, finish_reason="length"))
    groups = CompletionGroups(tmp_path)
    groups.update()
    return groups


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"step": 1}, ["low", 'HIGH "quoted"', "none"]),
        ({"text": 'high "q'}, ['HIGH "quoted"']),
        ({"text": "größe"}, ["größe"]),
        ({"lowest": 0.5}, ["middle", "größe", 'HIGH "quoted"']),
        ({"highest": 0.0}, ["negative", "low"]),
        ({"lowest": 0.1, "highest": 0.3}, ["cut"]),
        ({"is_truncated": True}, ["cut"]),
        ({"is_truncated": True, "step": 1}, []),
        ({"text": "nowhere"}, []),
        ({"step": 99}, []),
    ],
)
def test_completions_are_found(mixed: CompletionGroups, wanted: dict[str, Any], expected: list[str]) -> None:
    assert found(mixed, **wanted) == expected


def test_groups_are_ordered(mixed: CompletionGroups) -> None:
    orders = {
        order: [(group.step, group.prompt) for group in mixed.ordered(Filter(), order)]  # type: ignore[arg-type]
        for order in ("sampled", "best", "worst", "spread")
    }
    assert orders["sampled"] == [(3, 2), (2, 0), (2, 1), (1, 0), (1, 1)]
    assert orders["best"] == [(2, 0), (1, 0), (3, 2), (2, 1), (1, 1)]  # without a reward comes last
    assert orders["worst"] == [(2, 1), (3, 2), (2, 0), (1, 0), (1, 1)]
    assert orders["spread"][0] == (1, 0)


def test_a_search_goes_on_where_it_ended(mixed: CompletionGroups) -> None:
    seen, start, num_searches = [], 0, 0
    while start is not None:
        result, start = mixed.search(Filter(), "sampled", start, 2, 60.0)
        seen += [(group.step, group.prompt) for group, _ in result]
        num_searches += 1
    assert seen == [(3, 2), (2, 0), (2, 1), (1, 0), (1, 1)]
    assert num_searches == 3
    assert mixed.search(Filter(text="low"), "sampled", 0, 9, 0.0) == ([], 1)  # its time is over after one group


def test_a_completion_that_looks_like_a_record_is_none(tmp_path: Path, completions: Path) -> None:
    evil = '\n{"step": 7, "prompt_index": 0, "x": 1}\n"reward": 5, "finish_reason": "length"'
    append(completions, completion_line(1, 0.0, evil) + completion_line(2, 0.0))
    groups = CompletionGroups(tmp_path)
    groups.update()
    assert list(groups.steps) == [1, 2]
    group = groups.at(1, 0)
    assert group is not None
    assert (group.rewards, group.num_truncated) == ([0.0], 0)


def test_completions_that_a_resume_cut_short(tmp_path: Path, completions: Path) -> None:
    append(completions, "".join(completion_line(step, 0.0, f"old {step}") for step in (1, 2, 3)))
    groups = CompletionGroups(tmp_path)
    groups.update()
    CompletionsLog(str(tmp_path), [], 4, is_writer=True).drop_after(1)
    append(completions, "".join(completion_line(step, 0.0, f"new {step}") for step in (2, 3, 4)))
    groups.update()
    assert list(groups.steps) == [1, 2, 3, 4]
    assert texts(groups, 3) == ["new 3"]


def test_a_large_run_opens_at_once(tmp_path: Path, log: Path, completions: Path) -> None:
    """20,000 log lines of 30 metrics and 100,000 completions, 200 MB, in less than 4 seconds of a processor.

    The newest completions come first. No part takes longer than the page waits for an answer.
    """
    metrics = [{f"rewards/f{i}/mean": (i + step % 3) / 7 for i in range(30)} for step in range(3)]
    append(log, "".join(log_line(step, **metrics[step % 3]) for step in range(1, 20_001)))
    record = {"prompt": "What is 1 + 1? " * 20, "completion": "The answer is 2. " * 90, "reference": "2"}
    text = json.dumps({**record, "rewards": {"accuracy": 1.0}})[1:-1]
    with completions.open("w") as file:
        for i in range(100_000):
            file.write(f'{{"step": {1 + i // 8}, "prompt_index": {i // 4 % 999}, {text}, "reward": {i / 64}}}\n')
    assert completions.stat().st_size > 190e6
    started = time.process_time()
    curves, groups = MetricCurves(tmp_path), CompletionGroups(tmp_path)
    curves.update()
    curves_read = time.process_time()
    groups.update(seconds=0)
    newest, _ = groups.search(Filter(step=groups.steps[-1]), "sampled", 0, 9, 1.0)
    seconds_until_newest = time.process_time() - curves_read
    num_parts = 1
    while not groups.update(seconds=0.2):
        num_parts += 1
    best, _ = groups.search(Filter(step=groups.steps[-1]), "best", 0, 1, 1.0)
    seconds = time.process_time() - started
    print(f"{seconds:.2f} s in {num_parts} parts, the newest completions in {seconds_until_newest:.2f} s")
    assert (len(curves.history.series("rewards/f3/mean")), len(groups.steps)) == (20_000, 12_500)
    assert best[0][1][-1]["reward"] == newest[-1][1][-1]["reward"] == 99_999 / 64
    assert seconds_until_newest < 0.5
    assert num_parts > 1
    assert seconds < 4
    started = time.process_time()
    assert (curves.update(), groups.update()) == (False, True)
    assert time.process_time() - started < 0.05
