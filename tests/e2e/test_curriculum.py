"""A whole run with a curriculum, whose level rises."""

import json
import shutil
from pathlib import Path

from .conftest import completions, trainer_log
from .test_interruptions import assert_same


def test_the_level_rises_and_a_resumed_run_goes_on_exactly(recipe, run_exp, toy_reward, tmp_path):
    """The task gives a little for any answer: more than the threshold, so that each 32 prompts raise the level.

    The other reward is what is learned.
    """
    settings = {
        "dataset": "reasoning_gym:fraction_simplification",
        "max_samples": 160,
        "cutoff_len": 400,
        "reward_funcs": f"{toy_reward},reasoning_gym",
        "curriculum_threshold": 0.005,
        "per_device_train_batch_size": 16,
        "num_generations": 2,
        "max_new_tokens": 3,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "log_completions": True,
    }
    whole, broken = (recipe(output_dir=str(tmp_path / name), **settings) for name in ("whole", "broken"))
    run_exp(whole)
    levels = [line["curriculum/level"] for line in trainer_log(whole["output_dir"]) if "loss" in line]
    assert levels == [0, 0, 1, 1, 2, 2]
    indices = [row["prompt_index"] for row in completions(whole["output_dir"])]
    assert [sorted({index // 40 for index in indices[start : start + 32]}) for start in range(0, 192, 32)] == [
        [level] for level in (0, 0, 1, 1, 2, 2)
    ]
    state = json.loads(Path(whole["output_dir"], "checkpoint-3", "grpo_state.json").read_text())
    assert (len(state["curriculum"]), state["stream"]["visits"]) == (16, [[0, 0], [32, 1]])

    shutil.copytree(Path(whole["output_dir"], "checkpoint-3"), Path(broken["output_dir"], "checkpoint-3"))
    for log_file in ("trainer_log.jsonl", "completions.jsonl"):
        shutil.copy(Path(whole["output_dir"], log_file), broken["output_dir"])
    run_exp(broken)
    assert_same(broken, whole)
