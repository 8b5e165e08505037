"""Two processes under torchrun (gloo, DDP) train as one does."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from llamafactory import launcher
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from grpo_stage.survival import checkpoints

from .conftest import INTERRUPTED_RUN, completions, recipe_file, trainer_log


SETTINGS: dict[str, Any] = {
    "num_train_epochs": 1,
    "max_steps": -1,
    "max_samples": 9,
    "loss_type": "grpo",
    "advantage_estimator": "reinforce_plus_plus_baseline",
    "rollout_correction": "token",
    "kl_target": 0.01,
    "sync_ref_model": True,
    "ref_model_sync_steps": 2,
    "log_completions": True,
    "max_grad_norm": 0.0,
    "beta": 0.05,
    "eval_dataset": "tens,thousand",
    "eval_strategy": "epoch",
    "eval_num_generations": 3,
}


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What `accelerate launch` tells its processes."""


def launch(*command: str, succeeds: bool = True) -> str:
    """Run a command of this environment under torchrun, with a thread a process; its output."""
    scripts = Path(sys.executable).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if command[0] != "torchrun":
        environment |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    # torchrun is looked up on the PATH by the host's launcher.
    environment["PATH"] = f"{scripts}{os.pathsep}{environment['PATH']}"
    result = subprocess.run(
        [str(scripts / command[0]), *command[1:]],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert (result.returncode == 0) == succeeds, result.stdout[-8000:]
    return result.stdout


@pytest.fixture(scope="module")
def runs_of_two() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def two(recipe, runs_of_two, tmp_path_factory) -> dict[str, Any]:
    """A run of two processes that nothing happened to."""
    if not runs_of_two:
        folder = tmp_path_factory.mktemp("two")
        runs_of_two.append(recipe(output_dir=str(folder / "out"), per_device_train_batch_size=2, **SETTINGS))
        launch("llamafactory-cli", "train", recipe_file(runs_of_two[0]))
    return runs_of_two[0]


def test_two_processes_stop_together_and_go_on_exactly(recipe, two, train_in_ranks, tmp_path):
    """Only the second is asked, in its rollout; the first leaves with it, having finished its own."""
    stopped = recipe(output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, **SETTINGS)
    file = recipe_file(stopped)
    ranks = ("--standalone", "--nproc_per_node", "2", str(INTERRUPTED_RUN), "SIGTERM", "rollout", "1")
    output = launch("torchrun", *ranks, file, succeeds=False)
    assert "The run was stopped by SIGTERM" in output
    assert f"resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-1'}" in output
    checkpoint = tmp_path / "out" / "checkpoint-1"
    checkpoints.verify(checkpoint)
    of_ranks = {
        f"{name}_{rank}.{end}" for name, end in (("rng_state", "pth"), ("grpo_rollout", "json")) for rank in (0, 1)
    }
    assert of_ranks <= checkpoints.read_state(checkpoint)["files"].keys()

    train_in_ranks(stopped)
    assert completions(stopped["output_dir"]) == completions(two["output_dir"])
    assert untimed(stopped) == untimed(two)
    weights = [load_file(Path(run["output_dir"]) / "adapter_model.safetensors") for run in (stopped, two)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[1])


@pytest.mark.parametrize(("weapon", "point"), [("ERROR", "reward"), ("SIGKILL", "rollout")])
def test_a_rank_that_fails_is_named_last_and_the_other_ends(recipe, host_processes, tmp_path, weapon, point):
    """Without torchrun, which would end the other at once: it ends by itself, and torchrun's summary has the cause."""
    file = recipe_file(recipe(output_dir=str(tmp_path / "out")))
    ranks = host_processes.run_ranks(2, str(INTERRUPTED_RUN), weapon, point, "1", file)
    assert ranks[0].returncode == 1
    assert ranks[1].returncode == (1 if weapon == "ERROR" else -signal.SIGKILL)
    assert "Rank 0 ends, since it has lost another rank" in ranks[0].stderr
    failures = {
        rank: ProcessFailure(rank, 0, result.returncode, str(host_processes.error_file(rank)))
        for rank, result in enumerate(ranks)
    }
    if weapon == "ERROR":
        assert time.time() - failures[1].timestamp < 60
        summary = ChildFailedError("run", failures).format_msg()
        assert re.search(
            r"Root Cause.*\n.*\n.*\n.*\n +rank +: 1 .*\n.*\n.*\n.*: LookupError: struck by the test\n=+$", summary
        )


def test_more_processes_than_prompts_are_refused_in_words_that_torchrun_repeats(recipe, host_processes, tmp_path):
    """On both, before a model is loaded."""
    arguments = recipe(output_dir=str(tmp_path / "out"), max_samples=1)
    for rank, result in enumerate(host_processes.run_ranks(2, launcher.__file__, recipe_file(arguments))):
        assert result.returncode == 1
        failure = ProcessFailure(rank, 0, 1, str(host_processes.error_file(rank)))
        assert "2 processes train on 1 prompt" in failure.message["message"]
        assert "Loading weights" not in result.stderr


def untimed(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    clock = re.compile(r"time|per_second|runtime|percentage|train_loss|memory/|tflops|mfu")
    lines = trainer_log(arguments["output_dir"])
    return [{key: value for key, value in line.items() if not clock.search(key)} for line in lines]


def test_two_processes_train_as_one_does(recipe, two, train_in_ranks, tmp_path):
    """Same prompts, same completions, same rewards, same weights; the last step of the epoch reaches one rank only."""
    one = recipe(output_dir=str(tmp_path / "one"), per_device_train_batch_size=4, **SETTINGS)
    train_in_ranks(one, num_ranks=1)

    def sampled(arguments):
        rows = [
            (c["step"], c["prompt_index"], c["completion"], c["advantage"])
            for c in completions(arguments["output_dir"])
        ]
        return sorted(rows)

    expected, actual = sampled(one), sampled(two)
    assert [row[:3] for row in actual] == [row[:3] for row in expected]
    assert [row[3] for row in actual] == pytest.approx([row[3] for row in expected], abs=1e-6)
    assert len({row[1] for row in actual}) == 9, "every prompt once"
    logs = [[line for line in trainer_log(run["output_dir"]) if "loss" in line] for run in (one, two)]
    assert len(logs[0]) == 3
    for theirs, ours in zip(*logs, strict=True):
        for name in ("loss", "reward", "reward_std", "entropy", "kl", "beta", "completions/mean_length", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-6), name
    evaluations = [[line for line in trainer_log(run["output_dir"]) if "eval_reward" in line] for run in (one, two)]
    assert len(evaluations[0]) == 1
    assert "eval_thousand_rewards/liked/pass@2" in evaluations[0][0], "a dataset that reaches one rank only"
    for theirs, ours in zip(*evaluations, strict=True):
        measured = {key: value for key, value in theirs.items() if key.startswith("eval_") and "time" not in key}
        assert measured == pytest.approx({key: ours[key] for key in measured}, rel=2e-3, abs=1e-6)
    reference = load_file(Path(one["output_dir"]) / "adapter_model.safetensors")
    for name, tensor in load_file(Path(two["output_dir"]) / "adapter_model.safetensors").items():
        assert (tensor - reference[name]).norm() <= 1e-4 * reference[name].norm() + 1e-6, name


def test_mixed_precision_under_fsdp2_is_followed_by_the_slope_test(recipe, train_in_ranks, monkeypatch, tmp_path):
    """Full tuning in bf16: the policy is asked for log-probabilities after it has sampled, without a new gathering."""
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    run = recipe(output_dir=str(tmp_path / "out"), finetuning_type="full", bf16=True, max_steps=3, beta=0.05)
    for key in ("lora_rank", "lora_target"):
        del run[key]
    train_in_ranks(run)
    log = [line for line in trainer_log(run["output_dir"]) if "loss" in line]
    assert all(0 < line["sampling/sampling_logp_difference/mean"] < 0.05 for line in log), "bf16, and the same policy"
    last = log[-1]
    assert abs(last["sampling/slope/start"] - 1) < max(0.1, 4 * last["sampling/slope_error/start"])
    weights = load_file(Path(run["output_dir"]) / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


@pytest.fixture(scope="module")
def of_two_ranks(host_processes, tmp_path_factory) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    script = Path(__file__).parents[1] / "unit" / "gradients_of_ranks.py"
    file = tmp_path_factory.mktemp("gradients") / "gradients.pt"
    for result in host_processes.run_ranks(2, str(script), str(file)):
        assert result.returncode == 0, result.stderr[-8000:]
    return torch.load(file)


def test_no_objective_depends_on_the_number_of_ranks(of_two_ranks):
    from tests.unit.gradients_of_ranks import OBJECTIVES, gradients

    for options, ours, theirs in zip(OBJECTIVES, of_two_ranks[0], gradients(num_ranks=1), strict=True):
        assert theirs.norm() > 1e-3, options
        assert (ours - theirs).norm() / theirs.norm() < 1e-5, options


def test_a_gradient_that_a_rank_lacks_is_zero(of_two_ranks):
    """Each rank reaches two of four experts; the fifth is reached by none, and the optimizer must pass it by."""
    from tests.unit.gradients_of_ranks import gradients_of_experts

    *reached, unreached = zip(of_two_ranks[1], gradients_of_experts(num_ranks=1), strict=True)
    for ours, theirs in reached:
        assert theirs.norm() > 1e-3
        assert (ours - theirs).norm() / theirs.norm() < 1e-5
    assert unreached == (None, None)
