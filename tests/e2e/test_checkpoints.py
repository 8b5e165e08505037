"""Runs that are killed in a save, that keep the best, that find their checkpoint damaged."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grpo_stage.survival import checkpoints
from grpo_stage.trainer import GRPOTrainer

from .conftest import completions, trainer_log


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "num_iterations": 2, "log_completions": True}
# Runs a recipe, and dies in the save of step 4, when half of the file named by argv[2] is on the disk.
DIES_IN_A_SAVE = """
import json, os, pathlib, signal, sys
from grpo_stage.survival import checkpoints

def dies_after(part):
    def write(folder):
        part(folder)
        file = pathlib.Path(folder, sys.argv[2])
        if file.exists() and "checkpoint-4" in folder:
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    return write

save = checkpoints.save
checkpoints.save = lambda folder, parts, *rest, **named: save(
    folder, {name: dies_after(part) for name, part in parts.items()}, *rest, **named
)
from llamafactory.train.tuner import run_exp
run_exp(json.loads(sys.argv[1]))
"""


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def assert_same_weights(folder: str | Path, other: str | Path) -> None:
    theirs = weights(other)
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, theirs[name]), name


def training_lines(output_dir: str) -> list[dict[str, Any]]:
    """The log less what depends on the clock."""
    clock = ("time", "memory", "step_time", "rollout_tokens", "update_t", "train_")
    return [
        {key: value for key, value in line.items() if not key.startswith(clock)}
        for line in trainer_log(output_dir)
        if "loss" in line
    ]


def logged(output_dir: str) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in ("elapsed_time", "remaining_time")}
        for line in training_lines(output_dir)
    ]


def checkpoint_names(output_dir: str | Path) -> list[str]:
    return sorted(path.name for path in Path(output_dir).iterdir() if "checkpoint-" in path.name)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_run_killed_in_a_save_goes_on_as_if_nothing_had_been(recipe, run_exp, host_processes, tmp_path):
    whole, killed = (recipe(output_dir=str(tmp_path / name), **SAVING) for name in ("whole", "killed"))
    run_exp(whole)
    script = tmp_path / "dies_in_a_save.py"
    script.write_text(DIES_IN_A_SAVE)
    result = host_processes.run(str(script), json.dumps(killed), "optimizer.pt")
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    assert checkpoint_names(killed["output_dir"]) == [".tmp-checkpoint-4", "checkpoint-2"]
    assert [line["current_steps"] for line in trainer_log(killed["output_dir"])] == [1, 2, 3, 4]
    with open(Path(killed["output_dir"], "trainer_log.jsonl"), "a") as log:
        log.write('{"current_steps": 4, "los')  # what a kill in a write leaves
    with open(Path(killed["output_dir"], "completions.jsonl"), "ab") as log:
        log.write(b'{"step": 3, "completion": "\xc3')
    run_exp(killed)

    assert checkpoint_names(killed["output_dir"]) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert logged(killed["output_dir"]) == logged(whole["output_dir"])
    assert completions(killed["output_dir"]) == completions(whole["output_dir"])
    for name in ("", "checkpoint-4", "checkpoint-6"):
        assert_same_weights(tmp_path / "killed" / name, tmp_path / "whole" / name)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_goes_on(recipe, run_exp, tmp_path, monkeypatch):
    arguments = recipe(**SAVING)
    run_exp(arguments)
    output_dir = Path(arguments["output_dir"])
    finished = weights(output_dir)
    shutil.rmtree(output_dir / "checkpoint-6")
    adapter = output_dir / "checkpoint-4" / "adapter_model.safetensors"
    good = adapter.read_bytes()

    from grpo_stage.host import facade

    with monkeypatch.context() as patch:
        patch.setattr(facade, "load_model", lambda *_: pytest.fail("the model was loaded"))
        offered = rf"resume_from_checkpoint: {output_dir / 'checkpoint-2'}`"
        adapter.write_bytes(good[:-100])
        with pytest.raises(checkpoints.DamagedCheckpointError, match=rf"adapter_model.safetensors has \d+.*{offered}"):
            run_exp(arguments)
        adapter.write_bytes(good)
        flip_a_bit(adapter)
        with pytest.raises(checkpoints.DamagedCheckpointError, match=rf"adapter_model.*has changed.*{offered}"):
            run_exp(arguments)

    run_exp({**arguments, "resume_from_checkpoint": str(output_dir / "checkpoint-2")})
    assert adapter.read_bytes() == good, "the replayed save replaced the damaged one"
    for name, tensor in weights(output_dir).items():
        assert torch.equal(tensor, finished[name]), name
    assert [line["current_steps"] for line in training_lines(str(output_dir))] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("strategy", "limit", "left"),
    [("steps", 2, ["checkpoint-2", "checkpoint-5"]), ("steps", 1, ["checkpoint-2"]), ("best", 1, ["checkpoint-2"])],
)
def test_the_best_checkpoint_is_kept_recorded_and_loaded_at_the_end(
    recipe, run_exp, monkeypatch, strategy, limit, left
):
    scores = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: 0.4}
    monkeypatch.setattr(GRPOTrainer, "evaluate", lambda self, **_: {"eval_reward": scores[self.state.global_step]})
    recorded = {}
    save = checkpoints.save

    def watched(folder: Path, *args: Any, **kwargs: Any) -> None:
        save(folder, *args, **kwargs)
        recorded[folder.name] = json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"]

    monkeypatch.setattr(checkpoints, "save", watched)
    arguments = recipe(
        max_steps=5,
        val_size=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy=strategy,
        save_steps=1,
        save_total_limit=limit,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
    )
    run_exp(arguments)
    output_dir = Path(arguments["output_dir"])
    assert checkpoint_names(output_dir) == left
    best = str(output_dir / "checkpoint-2")
    expected = {"checkpoint-1": str(output_dir / "checkpoint-1"), "checkpoint-2": best}
    if strategy == "steps":
        expected |= {f"checkpoint-{step}": best for step in (3, 4, 5)}
    assert recorded == expected
    assert_same_weights(output_dir, best)
    for name in left:
        checkpoints.verify(output_dir / name)


def test_an_overwritten_folder_holds_the_new_run_alone(recipe, run_exp):
    earlier = recipe(save_strategy="steps", save_steps=1, max_steps=4)
    run_exp(earlier)
    fresh = {**earlier, "learning_rate": 2e-3, "max_steps": 2, "overwrite_output_dir": True}
    run_exp(fresh)
    assert checkpoint_names(fresh["output_dir"]) == ["checkpoint-1", "checkpoint-2"]
    assert [line["current_steps"] for line in training_lines(fresh["output_dir"])] == [1, 2]
    run_exp({**fresh, "overwrite_output_dir": False, "max_steps": 3})
    assert [line["current_steps"] for line in training_lines(fresh["output_dir"])] == [1, 2, 3]


def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(recipe, run_exp, monkeypatch):
    arguments = recipe(**SAVING)
    save_rng_state = GRPOTrainer._save_rng_state

    def full(self: GRPOTrainer, folder: str) -> None:
        save_rng_state(self, folder)
        if self.state.global_step == 4:
            os.truncate(Path(folder, "rng_state.pth"), 100)
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "_save_rng_state", full)
        with pytest.raises(
            checkpoints.CheckpointSaveError, match=r"No space left.*Left to save were the random states"
        ):
            run_exp(arguments)
    assert checkpoint_names(arguments["output_dir"]) == ["checkpoint-2"]
    run_exp(arguments)
    assert checkpoint_names(arguments["output_dir"]) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert [line["current_steps"] for line in training_lines(arguments["output_dir"])] == [1, 2, 3, 4, 5, 6]


def test_what_is_pushed_is_the_finished_folder_also_without_state(recipe, run_exp, monkeypatch):
    pushed = []
    save_checkpoint = GRPOTrainer._save_checkpoint

    def pushing(self: GRPOTrainer, *args: Any, **kwargs: Any) -> None:
        self.args.push_to_hub = True
        save_checkpoint(self, *args, **kwargs)
        self.args.push_to_hub = False

    monkeypatch.setattr(GRPOTrainer, "_save_checkpoint", pushing)
    monkeypatch.setattr(
        GRPOTrainer, "_push_from_checkpoint", lambda _, folder: pushed.append((folder, sorted(os.listdir(folder))))
    )
    arguments = recipe(save_strategy="steps", save_steps=1, max_steps=1, save_only_model=True)
    run_exp(arguments)
    ((folder, files),) = pushed
    assert folder == str(Path(arguments["output_dir"], "checkpoint-1"))
    assert {"adapter_model.safetensors", "adapter_config.json", "trainer_state.json"} <= set(files)
    assert {checkpoints.STATE_FILE, "optimizer.pt", "grpo_rollout_0.json"}.isdisjoint(files)
    with pytest.raises(ValueError, match="saved without the trainer's state"):
        run_exp({**arguments, "max_steps": 2})
