"""Runs that are killed or stopped at every point, and go on: nothing is lost, replayed wrongly, or logged twice."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from .conftest import completions, trainer_log


# Ten prompts, two held out, two a step, two steps a rollout, used twice: an epoch has 8 steps, and a rollout before
# steps 0, 4, 8 and 12. Checkpoints hold rollouts that are used up, half used and not yet used.
SETTINGS: dict[str, Any] = {
    "num_iterations": 2,
    "steps_per_generation": 2,
    "num_train_epochs": 1.75,
    "max_steps": -1,
    "val_size": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_num_generations": 2,
    "eval_on_start": True,
    "save_strategy": "steps",
    "save_steps": 5,
    "logging_steps": 2,
    "log_completions": True,
    "max_tokens_per_micro_batch": 60,
    "beta": 0.05,
    "lr_scheduler_type": "cosine",
    "learning_rate": 5e-3,
}
TIMES = re.compile(r"time|per_second|runtime|percentage|train_loss|memory/|tflops|mfu")
"""What may differ; `train_loss` is Trainer's own mean over the steps since the resume."""


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if not TIMES.search(k)}


def untimed_log(output_dir: str) -> list[dict[str, Any]]:
    return [untimed(line) for line in trainer_log(output_dir)]


def assert_same(ours: dict, theirs: dict) -> None:
    """Bit for bit: what was sampled and rewarded, every logged figure, and the weights."""
    assert completions(ours["output_dir"]) == completions(theirs["output_dir"])
    assert untimed_log(ours["output_dir"]) == untimed_log(theirs["output_dir"])
    results = [Path(each["output_dir"], "eval_results.json") for each in (ours, theirs)]
    assert results[0].exists() == results[1].exists()
    if results[1].exists():
        one, other = (untimed(json.loads(file.read_text())) for file in results)
        assert one == other
    (file,) = {file.name for file in Path(theirs["output_dir"]).glob("*.safetensors")}
    weights = [load_file(Path(each["output_dir"]) / file) for each in (ours, theirs)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def settings_of(engine: str) -> dict[str, Any]:
    tuning = {"finetuning_type": "full"} if "full" in engine else {}
    return SETTINGS | {"rollout_backend": "vllm" if "vllm" in engine else "hf"} | tuning


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, dict]:
    return {}


@pytest.fixture
def whole(recipe, run_exp, whole_runs, tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """A run that nothing happened to."""

    def run(engine: str) -> dict[str, Any]:
        if engine not in whole_runs:
            folder = tmp_path_factory.mktemp("whole")
            whole_runs[engine] = recipe(output_dir=str(folder / "out"), **settings_of(engine))
            run_exp(whole_runs[engine])
        return whole_runs[engine]

    return run


def resume_command(result: subprocess.CompletedProcess) -> list[str]:
    command = re.search(r"^ +llamafactory-cli train (.+)$", result.stdout + result.stderr, re.MULTILINE)
    assert command is not None, result.stderr[-3000:]
    return shlex.split(command[1])


# Each process goes on from the last checkpoint, 5 or 10, and is interrupted in its turn.
KILLS = {
    "hf": [("save", 10), ("between", 6), ("rollout", 8), ("update", 12), ("final evaluation", 14)],
    "vllm": [("update", 7), ("rollout", 8)],
    "vllm, full": [("rollout", 12)],
}


@pytest.mark.parametrize("engine", KILLS)
def test_a_run_goes_on_exactly_however_often_it_is_killed(recipe, run_exp, whole, interrupt, tmp_path, engine):
    settings = settings_of(engine)
    arguments = recipe(output_dir=str(tmp_path / "out"), **settings)
    for point, step in KILLS[engine]:
        assert interrupt(arguments, "SIGKILL", point, step).returncode == -signal.SIGKILL
        saved = {folder.name for folder in (tmp_path / "out").glob("checkpoint-*")}
        after = {f"checkpoint-{each}" for each in (5, 10, 14) if each < step or (each == step and point != "save")}
        assert saved == after
    model = next((tmp_path / "out").glob("*.safetensors"), None)
    saved_at = model and model.stat().st_mtime_ns
    run_exp(arguments)
    assert model is None or model.stat().st_mtime_ns == saved_at, "what of the end was done is not done again"
    assert_same(arguments, whole(engine))


STOPS = [
    *(("SIGTERM", "save", 5), ("SIGABRT", "evaluation", 6), ("SIGINT", "rollout", 8), ("SIGHUP", "update", 8)),
    ("SIGTERM", "final evaluation", 14),
]


def test_a_stopped_run_prints_how_it_goes_on_exactly(recipe, whole, interrupt, tmp_path):
    arguments = recipe(output_dir=str(tmp_path / "out"), **SETTINGS)
    words: list[str] = []
    for sign, point, step in STOPS:
        result = interrupt(arguments, sign, point, step, *words[1:])
        assert result.returncode == 128 + signal.Signals[sign], result.stderr[-3000:]
        assert f"The run was stopped by {sign}" in result.stdout + result.stderr
        folder = tmp_path / "out" / f"checkpoint-{step}"
        assert folder.is_dir()
        words = resume_command(result)
        assert words == [str(tmp_path / "out.yaml"), f"resume_from_checkpoint={folder}"]
    program = str(Path(sys.executable).parent / "llamafactory-cli")
    subprocess.run([program, "train", *words], check=True, capture_output=True, timeout=300, env=dict(os.environ))
    assert_same(arguments, whole("hf"))
