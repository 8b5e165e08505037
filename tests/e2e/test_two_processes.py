"""Two processes under torchrun (gloo, DDP) train as one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from .conftest import completions, trainer_log


def launch(arguments: dict, folder: Path, processes: int, succeeds: bool = True) -> "subprocess.CompletedProcess[str]":
    file = folder / f"recipe-{processes}.yaml"
    file.write_text(yaml.safe_dump(arguments))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(processes)}
    command = [str(Path(sys.executable).parent / "llamafactory-cli"), "train", str(file)]
    # torchrun is looked up on the PATH by the host's launcher.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert (result.returncode == 0) == succeeds, result.stdout[-3000:] + result.stderr[-6000:]
    return result


def test_two_processes_train_as_one_does(recipe, tmp_path):
    """Same prompts, same completions, same rewards, same weights; the last step of the epoch reaches one rank only."""
    settings = {
        "num_train_epochs": 1,
        "max_steps": -1,
        "max_samples": 9,
        "loss_type": "grpo",
        "scale_rewards": "batch",
        "log_completions": True,
        "max_grad_norm": 0.0,
        "beta": 0.05,
        "eval_dataset": "tens,thousand",
        "eval_strategy": "epoch",
        "eval_num_generations": 3,
    }
    one = recipe(output_dir=str(tmp_path / "one"), per_device_train_batch_size=4, **settings)
    two = recipe(output_dir=str(tmp_path / "two"), per_device_train_batch_size=2, **settings)
    launch(one, tmp_path, processes=1)
    launch(two, tmp_path, processes=2)

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
        for name in ("loss", "reward", "reward_std", "entropy", "kl", "completions/mean_length", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-6), name
    evaluations = [[line for line in trainer_log(run["output_dir"]) if "eval_reward" in line] for run in (one, two)]
    assert len(evaluations[0]) == 1
    assert "eval_thousand_rewards/liked/pass@2" in evaluations[0][0], "a dataset that reaches one rank only"
    for theirs, ours in zip(*evaluations, strict=True):
        measured = {key: value for key, value in theirs.items() if key.startswith("eval_") and "time" not in key}
        assert measured == pytest.approx({key: ours[key] for key in measured}, rel=2e-3, abs=1e-6)
    reference = load_file(tmp_path / "one" / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "two" / "adapter_model.safetensors").items():
        assert (tensor - reference[name]).norm() <= 1e-4 * reference[name].norm() + 1e-6, name
