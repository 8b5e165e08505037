"""The view of a run, without a browser: what its script is answered, and which files are read for it."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest

from grpo_stage.board import run_view
from grpo_stage.board.devices import Device, gpus_of
from grpo_stage.board.page_state import this_page
from grpo_stage.board.remedy import with_settings
from grpo_stage.board.rise import rise_of
from grpo_stage.board.run_state import state_of
from grpo_stage.board.run_view import RunView, _is_saved, locate, note_typed
from grpo_stage.board.segments import segments
from grpo_stage.board.tables import literal, table
from grpo_stage.records.activity import ACTIVITY_FILE
from grpo_stage.records.run_record import RUN_FILE
from grpo_stage.survival.run_lock import LOCK_FILE
from tests.report_runs import completion, write_lines

from .browser import append_line, write_run
from .conftest import Board


FOLDER = Path("saves/Custom/lora/run")


@pytest.fixture(scope="module")
def view() -> RunView:
    with gr.Blocks():
        return RunView()


@pytest.fixture
def look(view: RunView, turn_to: Callable[[str], None]) -> Callable[..., dict[str, Any]]:
    """Ask as the script of one page would, which shows a folder."""
    turn_to("page")

    def ask(what: str = "run", folder: Path | str = FOLDER, **asked: Any) -> dict[str, Any]:
        locate("en", "Custom", "lora", os.path.join(".", folder))
        return view.ask({"what": what, **asked})

    return ask


Look = Callable[..., dict[str, Any]]


def curves(answer: dict[str, Any]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By chart and metric."""
    return {
        chart["key"]: {curve["metric"]: list(zip(curve["x"], curve["y"], strict=True)) for curve in chart["curves"]}
        for section in answer["sections"]
        for chart in section["charts"]
    }


def test_a_run_that_learns_nothing_says_so_at_once(look: Look) -> None:
    taught, silent, solved = (
        {"frac_reward_zero_std": equal, "completions/frac_groups_all_right": right}
        for equal, right in ((0, 0), (1, 0), (1, 15 / 16))
    )

    def said(*lines: Any, **recipe: Any) -> list[str]:
        folder = FOLDER.with_name(f"silent{next(numbers)}")
        write_run(folder, lines)
        if recipe:
            (folder / RUN_FILE).write_text(json.dumps({"recipe": recipe}))
        found: list[str] = look(folder=folder)["faults"]
        return found

    numbers = itertools.count()
    for recipe in ({"stage": "grpo"}, {"advantage_estimator": "rloo"}, {"kl_in_reward": False}):
        (text,) = said(taught, *[silent] * 4, **recipe)
        assert text.startswith("In the last 4 log lines all answers to each prompt earned the same reward")
    assert said(taught, silent, silent, stage="grpo") == []
    # The policy knows its task, but for one prompt.
    assert said(*[silent] * 4, solved, stage="grpo") == said(*[solved] * 4, stage="grpo") == []
    # Such groups have advantages there, or may have: it is not known.
    assert said(*[silent] * 4, advantage_estimator="remax") == said(*[silent] * 4, kl_in_reward=True) == []
    assert said(*[silent] * 4) == []


@pytest.mark.parametrize("num_lines", [4, 8, 11, 12, 16, 24, 50])
def test_noise_is_no_rise(num_lines: int) -> None:
    """Of a run that learns nothing, in less than 5 %."""
    generator = np.random.default_rng(num_lines)
    for runs in (generator.normal(size=(2000, num_lines)), generator.binomial(8, 0.5, size=(2000, num_lines)) / 8):
        found = [rise_of(rewards) for rewards in runs.tolist()]
        assert sum(each is not None and each["way"] != "same" for each in found) < 0.05 * len(found)


def test_a_rise_is_told_from_chance() -> None:
    noise = [0.1, -0.1, 0.05, -0.05] * 10
    ways = {
        "rose": [0.2 + step / 100 + each for step, each in enumerate(noise)],
        "fell": [0.8 - step / 100 + each for step, each in enumerate(noise)],
        "same": [0.5 + step / 10000 + each for step, each in enumerate(noise)],
    }
    for way, rewards in ways.items():
        found = rise_of(rewards)
        assert found is not None
        assert (found["way"], found["count"]) == (way, 10)
        assert found["first"] == pytest.approx(sum(rewards[:10]) / 10)
        assert found["last"] == pytest.approx(sum(rewards[-10:]) / 10)
    assert rise_of([0.1, 0.2, 0.9] * 3 + [0.9, 0.9]) is None
    assert rise_of([0.1, 0.2, 0.9] * 4) is not None


def test_the_answer_holds_only_what_has_changed(look: Look) -> None:
    write_run(FOLDER, [{"reward": 0.5}, {"reward": 0.75}])
    first = look()
    assert first["texts"]["step"] == "Step"
    assert curves(first)["Total reward"] == {"reward": [(1, 0.5), (2, 0.75)]}
    again = look(seen=first["seen"], lang="en")
    assert again.keys() & {"texts", "sections"} == set()
    assert (again["state"]["step"], again["seen"]) == (2, first["seen"])
    append_line(FOLDER, current_steps=3, reward=1.0, **{"rewards/format/mean": 0.25})
    after = look(seen=first["seen"], lang="en")
    assert curves(after)["Total reward"]["reward"][-1] == (3, 1.0)
    assert curves(after)["Reward of format"] == {"rewards/format/mean": [(3, 0.25)]}  # it comes later


def test_a_long_curve_is_thinned_to_a_band(look: Look) -> None:
    write_run(FOLDER, [{"reward": step % 2} for step in range(3000)])
    (curve,) = look()["sections"][0]["charts"][0]["curves"]
    assert (len(curve["x"]), curve["num"], curve["x"][-1]) == (500, 3000, 3000)
    assert set(curve["low"]) == {0}
    assert set(curve["high"]) == {1}


def test_charts_are_chosen_and_what_no_chart_names_waits(look: Look) -> None:
    write_run(FOLDER, [{"reward": 0.5, "my_own": 2.0, "step_time": 3.0}])
    drawn = curves(look())
    assert (drawn["my_own"], drawn["Seconds of a step"]) == ({}, {})
    drawn = curves(look(charts={"my_own": True, "Total reward": False}))
    assert (drawn["my_own"], drawn["Total reward"]) == ({"my_own": [(1, 2.0)]}, {})


def test_more_runs_than_are_kept_stay_live(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_view, "_KEPT_RUNS", 2)
    folders = [FOLDER.with_name(f"run{i}") for i in range(4)]
    for folder in folders:
        write_run(folder, [{"reward": 0.5}])
    seen = {folder: look(folder=folder)["seen"] for folder in folders}
    assert all("sections" not in look(folder=folder, seen=mark, lang="en") for folder, mark in seen.items())
    for folder in folders:
        append_line(folder, current_steps=2, reward=0.5)
    assert [look(folder=folder, seen=mark)["state"]["step"] for folder, mark in seen.items()] == [2] * 4


def test_runs_are_compared_by_curves_and_settings(look: Look) -> None:
    other = FOLDER.with_name("other")
    for folder, rate in ((FOLDER, 1e-6), (other, 1e-5)):
        write_run(folder, [{"reward": rate}])
        (folder / "grpo_run.json").write_text(json.dumps({"recipe": {"learning_rate": rate, "beta": 0.1}}))
    answer = look(compare=["Custom/lora/other", "Custom/lora/run", "../../outside", "/etc"])
    assert answer["runs"] == ["run", "other"]
    assert [curve["run"] for curve in answer["sections"][0]["charts"][0]["curves"]] == [0, 1]
    assert [(row["name"], row["values"]) for row in answer["differences"]] == [("learning_rate", ["1e-06", "1e-05"])]


def test_runs_are_listed_and_opened(look: Look) -> None:
    write_run(FOLDER, [{"reward": 0.5}, {"reward": 0.75}])
    bare = Path("saves/bare")
    bare.mkdir(parents=True)
    (bare / "trainer_log.jsonl").write_text("torn\n")
    os.utime(bare / "trainer_log.jsonl", (1, 1))
    runs = look("runs")["runs"]
    assert [(run["name"], run["step"], run["reward"]) for run in runs] == [
        ("Custom/lora/run", 2, 0.75),
        ("bare", None, None),
    ]
    assert runs[0]["state"]["checkpoint"] == "checkpoint-1"
    view = look("open", run="bare")
    assert view == {}
    assert look()["name"] == "bare"
    look("open", run="../../etc")
    assert look()["name"] == "run"  # that is none: the form's


GROUP = [
    completion(1, 0, "<think>4 or 5?</think>It is 4.", 1.0, rewards={"accuracy": 1.0, "format": None}),
    completion(1, 0, "5" * 9000, 0.0, finish_reason="length"),
    completion(2, 0, "It is 5.", 0.5),
    completion(1, 1, "4", -1.0),
]


def test_completions_come_as_groups(look: Look) -> None:
    write_run(FOLDER, [{"reward": 0.5}])
    (FOLDER / "completions.jsonl").unlink()
    write_lines(FOLDER / "completions.jsonl", GROUP)
    look()
    newest = look("groups")
    assert (newest["step"], newest["total"], newest["next"]) == (2, 1, None)
    answer = look("groups", step=1, order="best")
    assert [group["prompt"] for group in answer["groups"]] == [0, 1]
    assert answer["bars"]["x"] == [-1, 0, 1]
    group = answer["groups"][0]
    assert (group["reference"], group["mean"], group["num_steps"]) == ("4", 0.5, 2)
    right, long = group["completions"]
    assert right["parts"] == [("thinking", "4 or 5?"), ("text", "It is 4.")]
    assert right["rewards"] == {"accuracy": 1.0, "format": None}
    assert (len(long["parts"][0][1]), long["num_characters"], long["is_truncated"]) == (3000, 9000, True)
    whole = look("text", step=1, prompt=0, place=long["place"])
    assert whole["parts"] == [("text", "5" * 9000)]
    assert "no longer there" in look("text", step=1, prompt=0, place=3)["error"]
    (found,) = look("groups", all=True, lowest=0.9)["groups"]
    assert [each["is_match"] for each in found["completions"]] == [True, False]


def test_a_prompt_over_steps_shows_what_changed(look: Look) -> None:
    write_run(FOLDER, [{"reward": 0.5}])
    (FOLDER / "completions.jsonl").unlink()
    write_lines(FOLDER / "completions.jsonl", [completion(1, 0, "It is 4.", 1.0), completion(9, 0, "It is 5.", 0.0)])
    look()
    first, second = look("prompt", prompt=0)["times"]
    assert first["changes"] == [("same", "It is 4.")]
    assert [kind for kind, _ in second["changes"]] == ["same", "gone", "new", "same"]


@pytest.mark.parametrize(("step", "shown"), [(None, 30), (10, 10), (15, 10), (0, 10), (10**15, 30), (-5, 10)])
def test_a_step_without_completions_shows_the_one_before(look: Look, step: Any, shown: int) -> None:
    write_run(FOLDER, [{"reward": 0.5}], [(10, "a"), (30, "b")])
    look()
    assert look("groups", step=step)["step"] == shown


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("plain <b>", [("text", "plain <b>")]),
        ("<think>a</think>b", [("thinking", "a"), ("text", "b")]),
        ("a</think>b", [("thinking", "a"), ("text", "b")]),  # the template wrote the first tag
        ("<think>never closed", [("thinking", "never closed")]),
        ("a<tool_call>b</tool_call><tool_response>c</tool_response>d", None),
        ("<think>a <think> b</think>c", [("thinking", "a <think> b"), ("text", "c")]),
        ("a</tool_call>b", [("text", "a</tool_call>b")]),
        ("", [("text", "")]),
    ],
)
def test_thinking_and_tool_turns_are_parts(text: str, parts: list[tuple[str, str]] | None) -> None:
    assert segments(text) == (parts or [("text", "a"), ("call", "b"), ("tool", "c"), ("text", "d")])


def test_downloads(look: Look) -> None:
    write_run(FOLDER, [{"reward": 0.5}, {"kl": 0.25}], [(1, "text")])
    append_line(FOLDER, current_steps=2, eval_reward=1.0)
    look()
    lines = look("curves")["text"].splitlines()
    assert lines[0].split(",")[0] == "step"
    columns = lines[0].split(",")
    assert [dict(zip(columns, line.split(","), strict=True)).get("eval_reward") for line in lines[1:]] == ["", "1.0"]
    assert dict(zip(columns, lines[1].split(","), strict=True))["reward"] == "0.5"
    piece = look("completions")
    assert piece["text"] == (FOLDER / "completions.jsonl").read_text()
    assert look("completions", start=piece["next"]) == {"text": "", "next": None}
    assert "<!doctype html" in look("report")["text"][:100].lower()
    assert "is no folder" in look("report", compare=["gone"])["error"]


def test_what_cannot_be_shown_is_said(look: Look) -> None:
    write_run(FOLDER, [{"reward": 0.5}], [(1, "text")])
    assert curves(look())["Total reward"]
    (FOLDER / "trainer_log.jsonl").unlink()
    (FOLDER / "trainer_log.jsonl").mkdir()
    answer = look()
    assert answer["faults"] == ["`trainer_log.jsonl` cannot be read: not an ordinary file."]
    assert answer["sections"] == []
    assert not answer["state"]["is_empty"]
    other = FOLDER.with_name("damaged")
    write_run(other, [{"reward": 0.5}], [(1, "text")])
    for name in ("trainer_log.jsonl", "completions.jsonl", "alarms.jsonl"):
        with (other / name).open("a") as file:
            file.write("torn {\n")
    answer = look(folder=other)
    assert [fault.split(":")[0] for fault in answer["faults"]] == [
        f"Damaged lines of `{name}` that are left out"
        for name in ("trainer_log.jsonl", "completions.jsonl", "alarms.jsonl")
    ]
    assert answer["state"]["step"] == 1
    (other / "completions.jsonl").unlink()
    assert look("groups", folder=other)["error"]


WORDS = {"seen": "<b>Fell</b>.", "meaning": "Bad.", "remedy": "Lower it.", "action": "warn", "onset": 1}


def test_alarms_are_told_the_newest_first_and_their_remedy_goes_into_the_form(look: Look, board: Board) -> None:
    write_run(FOLDER, [{"reward": 0.5}])
    settings = {"learning_rate": 1e-6, "beta": 0.04, "max_grad_norm": 0.5, "per_device_train_batch_size": 16}
    lines = [{"monitor": "entropy", "step": step, **WORDS, "settings": settings} for step in (3, 7)]
    write_lines(FOLDER / "alarms.jsonl", [{**lines[0], "settings": {"seed": 5, "unknown": [1]}}, lines[1]])
    newest, oldest = look()["alarms"]
    assert (newest["step"], newest["seen"], oldest["step"]) == (7, "<b>Fell</b>.", 3)
    assert "beta: 0.04" in newest["settings"]
    went_back = {"alarms": ["entropy"], "step": 7, "resumed_step": 4, "settings": {"learning_rate": 1e-5}}
    (FOLDER / "recoveries.json").write_text(json.dumps([went_back]))
    assert look()["recoveries"] == [{"step": 7, "resumed_step": 4, "settings": "learning_rate: 1e-05"}]
    (FOLDER / "recoveries.json").write_text("[3, {")
    assert look()["recoveries"] == []
    assert look("remedy", alarm=0) == {}
    data = board.data(train__extra_args='{"beta": 0.1}')
    changed = board.by_id(with_settings(board.runner, this_page().remedy, data, "en"))
    assert changed["train.learning_rate"] == "1e-06"
    assert (changed["train.grpo_beta"], json.loads(changed["train.extra_args"])) == (0.04, {"beta": 0.04})
    assert (changed["train.max_grad_norm"], changed["train.batch_size"]) == ("0.5", 16)
    assert "max_grad_norm: 0.5" in changed["train.output_box"]
    look("remedy", alarm=1)
    changed = board.by_id(with_settings(board.runner, this_page().remedy, board.data(train__extra_args="{}"), "en"))
    assert json.loads(changed["train.extra_args"]) == {"unknown": [1]}
    assert changed["train.grpo_seed"] == 5


class Process:
    """What the view asks of a training process."""

    def __init__(self, returncode: int | None = None, errors: str = "", was_aborted: bool = False) -> None:
        self.returncode, self.errors, self.was_aborted = returncode, errors, was_aborted
        self.has_ended = returncode is not None
        self.started = time.time() - 100


def note(folder: Path, activity: str, since: float = 0.0, **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ACTIVITY_FILE).write_text(json.dumps({"activity": activity, "since": time.time() + since, **more}))


def test_the_state_of_a_run_of_this_board() -> None:
    def state(process: Process, progress: Any = ()) -> Any:
        return state_of(FOLDER, dict(progress), process)  # type: ignore[arg-type]

    running = Process()
    assert (state(running).kind, state(running).doing) == ("preparing", "starting")
    note(FOLDER, "finished", since=-500)  # an earlier run's
    assert (state(running).kind, state(running).doing) == ("preparing", "starting")
    note(FOLDER, "engine", since=-7, done=[["model", 3.5]])
    found = state(running)
    assert (found.kind, found.doing, found.done) == ("preparing", "engine", [("model", 3.5)])
    assert found.seconds == pytest.approx(7, abs=1)
    for activity, kind in (("training", "running"), ("evaluation", "evaluating"), ("stopping", "stopping")):
        note(FOLDER, activity)
        assert state(running).kind == kind
    assert state(Process(was_aborted=True)).kind == "stopping"
    for activity, kind in (("failed", "stopping"), ("stopped", "stopping"), ("finished", "saving")):
        note(FOLDER, activity)  # it has said so, and ends
        assert state(running).kind == kind
    refused = state(Process(1, "Traceback\n  x\nValueError: `beta` is -1.\n"))
    assert (refused.kind, refused.error) == ("failed", "ValueError: `beta` is -1.")
    note(FOLDER, "failed", error="`beta` is -1.", log="where")
    assert state(Process(1, "noise\n")).error == "`beta` is -1."
    (FOLDER / "checkpoint-3").mkdir()
    note(FOLDER, "stopped", error="stopped by SIGABRT")
    stopped = state(Process(134, was_aborted=True), {"current_steps": 3, "total_steps": 9}.items())
    assert (stopped.kind, stopped.checkpoint, stopped.error) == ("stopped", "checkpoint-3", "")
    note(FOLDER, "failed", error="No space left on device")  # while it saved
    stopped = state(Process(1, was_aborted=True), {"current_steps": 3, "total_steps": 9}.items())
    assert (stopped.kind, stopped.error) == ("stopped", "No space left on device")
    for said, shown in (("stopped by SIGABRT", ""), ("stopped by SIGTERM", "stopped by SIGTERM")):
        note(FOLDER, "stopped", error=said)
        assert state_of(FOLDER, {}, None).error == shown
    note(FOLDER, "finished")
    assert state(Process(0)).kind == "finished"


def test_the_state_of_a_run_of_the_command_line() -> None:
    def kind(**progress: Any) -> str:
        return state_of(FOLDER, progress, None).kind

    assert kind() == "none"
    FOLDER.mkdir(parents=True)
    assert kind(current_steps=3, total_steps=9) == "stopped"  # of an earlier version
    assert kind(current_steps=9, total_steps=9) == "finished"
    note(FOLDER, "training")
    assert kind(current_steps=3, total_steps=9) == "killed"
    (FOLDER / LOCK_FILE).touch()
    assert kind(current_steps=3, total_steps=9) == "killed"
    code = (
        f"import fcntl, sys; file = open({str(FOLDER / LOCK_FILE)!r}, 'r+'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        assert kind(current_steps=3, total_steps=9) == "running"
        note(FOLDER, "model")
        assert kind() == "preparing"
        holder.communicate()


def test_the_memory_of_each_device() -> None:
    answer = "0, NVIDIA H100, 40960, 81920\n1, NVIDIA H100, [N/A], 81920\n"
    assert gpus_of(answer) == [Device("0: NVIDIA H100", 40.0, 80.0)]


def test_nothing_is_read_from_a_folder_that_is_not_the_persons(look: Look, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write_run(outside, [{"reward": 0.5}], [(1, "secret")])
    answer = look(folder=outside)
    assert not answer["is_own"]
    assert answer["sections"] == []
    assert look("groups", folder=outside)["groups"] == []
    note_typed(os.path.join(".", outside))
    assert look(folder=outside)["state"]["step"] == 1
    note_typed("something else")
    assert not look(folder=outside)["is_own"]


@pytest.mark.parametrize(
    ("folder", "is_saved"),
    [
        ("", True),
        ("saves/Custom/lora/run", True),
        ("./saves/x", True),
        ("saves", False),
        ("saves/..", False),
        ("saves/Custom/../../elsewhere", False),
        ("saves/Custom/../Custom", False),
        ("../saves/x", False),
        ("elsewhere/run", False),
        ("/etc", False),
        ("savesx/run", False),
    ],
)
def test_which_folders_are_the_boards(folder: str, is_saved: bool) -> None:
    assert _is_saved(folder) == is_saved
    if folder.startswith("saves/C"):
        assert _is_saved(os.path.abspath(folder)) == (".." not in folder or not folder.endswith("elsewhere"))


def test_tables_show_texts_as_they_are() -> None:
    text = "<b>&amp;\n\n    indented\t" + "x" * 10_000 + "the end"
    html = table(["<i>"], [[text]], [1])
    assert "&lt;b&gt;&amp;amp;\n\n    indented\t" in html
    assert "the end" in html
    assert "<b>" not in html
    assert "&lt;i&gt;" in html
    assert literal("`a_b` *c* <d> 1") == "\\`a\\_b\\` \\*c\\* \\<d\\> 1"
