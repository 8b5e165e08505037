"""Runs that are killed or stopped at every point, and go on: nothing is lost, replayed wrongly, or logged twice."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from .conftest import completions, trainer_log


SCRIPT = Path(__file__).with_name("interrupted_run.py")
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
    "max_tokens_per_micro_batch": 200,
    "beta": 0.05,
    "lr_scheduler_type": "cosine",
    "learning_rate": 5e-3,
}
TIMES = re.compile(r"time|per_second|runtime|percentage|train_loss")
"""What may differ; `train_loss` is Trainer's own mean over the steps since the resume."""


def interrupt(arguments: dict, sign: str, point: str, step: int) -> subprocess.CompletedProcess:
    file = Path(arguments["output_dir"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(arguments))
    result = subprocess.run(
        [sys.executable, str(SCRIPT), sign, point, str(step), str(file)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert f"striking at {point} of step {step}" in result.stdout, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def untimed_log(output_dir: str) -> list[dict]:
    return [{k: v for k, v in line.items() if not TIMES.search(k)} for line in trainer_log(output_dir)]


def assert_same(ours: dict, theirs: dict) -> None:
    """Bit for bit: what was sampled and rewarded, every logged figure, and the weights."""
    assert completions(ours["output_dir"]) == completions(theirs["output_dir"])
    assert untimed_log(ours["output_dir"]) == untimed_log(theirs["output_dir"])
    (file,) = {file.name for file in Path(theirs["output_dir"]).glob("*.safetensors")}
    weights = [load_file(Path(each["output_dir"]) / file) for each in (ours, theirs)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return {}


@pytest.fixture
def whole(recipe, run_exp, whole_runs, tmp_path_factory, request) -> dict[str, Any]:
    """A run that nothing happened to."""
    if not whole_runs:
        arguments = recipe(output_dir=str(tmp_path_factory.mktemp("whole") / "out"), **SETTINGS)
        run_exp(arguments)
        whole_runs["hf"] = arguments
    return whole_runs["hf"]


KILLS = [("rollout", 8), ("between", 6), ("update", 12), ("save", 10)]


@pytest.mark.parametrize(("point", "step"), KILLS)
def test_a_killed_run_goes_on_exactly(recipe, run_exp, whole, tmp_path, point, step):
    arguments = recipe(output_dir=str(tmp_path / "out"), **SETTINGS)
    assert interrupt(arguments, "SIGKILL", point, step).returncode == -signal.SIGKILL
    saved = {folder.name for folder in (tmp_path / "out").glob("checkpoint-*")}
    assert saved == {f"checkpoint-{each}" for each in (5, 10) if each < step or (each == step and point != "save")}
    run_exp(arguments)
    assert_same(arguments, whole)


STOPS = [("SIGINT", "rollout", 8), ("SIGTERM", "update", 8), ("SIGABRT", "evaluation", 6), ("SIGTERM", "save", 5)]


@pytest.mark.parametrize(("sign", "point", "step"), STOPS)
def test_a_stopped_run_prints_how_it_goes_on_exactly(recipe, run_exp, whole, tmp_path, sign, point, step):
    arguments = recipe(output_dir=str(tmp_path / "out"), **SETTINGS)
    result = interrupt(arguments, sign, point, step)
    assert result.returncode == 128 + signal.Signals[sign], result.stderr[-3000:]
    assert f"The run was stopped by {sign}" in result.stdout + result.stderr
    folder = tmp_path / "out" / f"checkpoint-{step}"
    assert folder.is_dir()
    command = re.search(r"^ +llamafactory-cli train (.+)$", result.stdout + result.stderr, re.MULTILINE)
    assert command is not None, result.stderr[-3000:]
    words = shlex.split(command[1])
    assert words == [str(tmp_path / "out.yaml"), f"resume_from_checkpoint={folder}"]
    if sign == "SIGINT":
        program = str(Path(sys.executable).parent / "llamafactory-cli")
        subprocess.run([program, "train", *words], check=True, capture_output=True, timeout=300, env=dict(os.environ))
    else:
        run_exp({**arguments, "resume_from_checkpoint": str(folder)})
    assert_same(arguments, whole)


CHAINS = {
    "lora": [("save", 10), ("between", 6), ("update", 7), ("rollout", 8)],
    "full": [("rollout", 12)],
}


@pytest.mark.parametrize("tuning", CHAINS)
def test_a_run_with_vllm_goes_on_exactly_however_often_it_is_killed(recipe, run_exp, tmp_path, tuning):
    """Each process goes on from checkpoint-5, or 10, where it is killed again."""
    settings = SETTINGS | {"rollout_backend": "vllm", "finetuning_type": tuning}
    whole, killed = (recipe(output_dir=str(tmp_path / name / "out"), **settings) for name in ("whole", "killed"))
    run_exp(whole)
    (tmp_path / "killed").mkdir()
    for point, step in CHAINS[tuning]:
        assert interrupt(killed, "SIGKILL", point, step).returncode == -signal.SIGKILL
    run_exp(killed)
    assert_same(killed, whole)
