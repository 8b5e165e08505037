"""Dynamic sampling in whole runs: resumed ones, and of two processes."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from .conftest import completions, trainer_log
from .test_interruptions import assert_same


SETTINGS: dict[str, Any] = {
    "dynamic_sampling": True,
    "num_train_epochs": 2,
    "max_steps": -1,
    "log_completions": True,
    "beta": 0.05,
    "max_tokens_per_micro_batch": 60,  # several in an update
    "learning_rate": 5e-3,
}


@pytest.fixture
def picky_reward(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Differs within a group for most prompts, and for some it does not."""
    file = tmp_path_factory.mktemp("rewards") / "picky.py"
    file.write_text(
        "def picky(completion_ids, references):\n"
        "    rows = zip(completion_ids, references)\n"
        "    return [float(sum(ids) % 7) if int(answer) % 3 else 1.0 for ids, answer in rows]\n"
    )
    return f"{file}:picky"


def waiting(arguments: dict[str, Any], step: int, rank: int = 0) -> int:
    file = Path(arguments["output_dir"], f"checkpoint-{step}", f"grpo_rollout_{rank}.json")
    return len(json.loads(file.read_text())["filling"]["waiting"])


def test_a_run_that_is_killed_and_stopped_goes_on_exactly(recipe, run_exp, interrupt, picky_reward, tmp_path):
    settings = SETTINGS | {
        "num_iterations": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "reward_funcs": picky_reward,
    }
    whole, broken = (recipe(output_dir=str(tmp_path / name), **settings) for name in ("whole", "broken"))
    run_exp(whole)
    log = [line for line in trainer_log(whole["output_dir"]) if "loss" in line]
    assert len(log) < 20, "the most that two epochs of ten prompts, two a step, used twice, can have"
    assert log[-1]["epoch"] == 2.0
    assert all(line["sampling/sampling_logp_difference/mean"] < 1e-4 for line in log if "reward" in line)
    assert {line["prompt_index"] for line in completions(whole["output_dir"])} == set(range(10))
    with_waiting = [line["current_steps"] for line in log[:-1] if waiting(whole, line["current_steps"])]
    assert with_waiting, "a checkpoint with groups that wait"
    stale = [line for line in completions(whole["output_dir"]) if line["policy_version"] < line["step"] - 1]
    assert stale
    assert all(line["advantage"] != 0 for line in stale) or len({line["reward"] for line in stale}) > 1

    step = next(step for step in with_waiting if step % 2 == 0)
    assert interrupt(broken, "SIGKILL", "rollout", step).returncode == -signal.SIGKILL
    assert interrupt(broken, "SIGTERM", "update", step + 1).returncode == 128 + signal.SIGTERM
    run_exp(broken)
    assert_same(broken, whole)


def test_two_processes_sample_and_train_as_one_does(recipe, train_in_ranks, picky_reward, tmp_path):
    settings = SETTINGS | {"max_grad_norm": 0.0, "scale_rewards": "batch", "reward_funcs": picky_reward}
    settings |= {"save_strategy": "steps", "save_steps": 1, "seed": 5}  # one of those by which two groups wait
    one, two = (
        recipe(output_dir=str(tmp_path / name), per_device_train_batch_size=size, **settings)
        for name, size in (("one", 4), ("two", 2))
    )
    train_in_ranks(one, num_ranks=1)
    train_in_ranks(two)

    def sampled(arguments: dict[str, Any]) -> list[tuple[Any, ...]]:
        names = ("step", "prompt_index", "policy_version", "completion")
        return sorted(tuple(line[name] for name in names) for line in completions(arguments["output_dir"]))

    assert sampled(two) == sampled(one)
    logs = [[line for line in trainer_log(run["output_dir"]) if "loss" in line] for run in (one, two)]
    assert len(logs[0]) == len(logs[1])
    for theirs, ours in zip(*logs, strict=True):
        for name in ("num_rollouts", "frac_dropped", "num_kept", "num_waiting", "num_short_batches"):
            assert ours[f"dynamic_sampling/{name}"] == theirs[f"dynamic_sampling/{name}"], name
        for name in ("loss", "reward", "entropy", "kl", "grad_norm", "epoch"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-6), name
    assert max(line["dynamic_sampling/num_waiting"] for line in logs[0]) > 1
    reference = load_file(Path(one["output_dir"]) / "adapter_model.safetensors")
    for name, tensor in load_file(Path(two["output_dir"]) / "adapter_model.safetensors").items():
        assert (tensor - reference[name]).norm() <= 1e-3 * reference[name].norm() + 1e-6, name

    step = next(line["current_steps"] for line in logs[0] if line["dynamic_sampling/num_waiting"] > 1)
    assert waiting(two, step, 0) + waiting(two, step, 1) == waiting(one, step)
    assert waiting(two, step, 1) > 0
    resumed = dict(two, output_dir=str(tmp_path / "resumed"))
    resumed["resume_from_checkpoint"] = os.path.join(two["output_dir"], f"checkpoint-{step}")
    train_in_ranks(resumed)
    weights = [load_file(Path(run["output_dir"], "adapter_model.safetensors")) for run in (resumed, two)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[1])
