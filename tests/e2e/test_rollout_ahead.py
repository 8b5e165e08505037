"""Runs with `rollout_ahead` and the real vLLM in its own process, which the runs of this file share."""

import os
import shutil

import pytest

from grpo_stage import workflow
from grpo_stage.survival.stop import STOP_SIGNALS
from grpo_stage.types import Prompt, SamplingSettings

from .conftest import completions, trainer_log
from .test_interruptions import assert_same


PROMPTS = [Prompt(index=0, token_ids=(5, 6), messages=(), reference=None)]
SAMPLING = SamplingSettings(num_generations=2, max_new_tokens=8, temperature=1.0)


@pytest.fixture
def one_engine(monkeypatch):
    """One start for all runs of a test, as the attempts of a run that recovers have one."""
    start, engines = workflow.start_engine, []

    def started(*args):
        if not engines:
            engines.append(start(*args))
            monkeypatch.setattr(engines[0], "close", lambda: None)
        return engines[0]

    monkeypatch.setattr(workflow, "start_engine", started)
    yield engines
    monkeypatch.undo()
    engines[0].close()


def test_a_run_is_one_update_behind_and_goes_on_exactly(recipe, run_exp, tmp_path, one_engine):
    settings = {
        "rollout_backend": "vllm",
        "rollout_ahead": 1,
        "max_steps": 5,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "log_completions": True,
        "val_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "eval_num_generations": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_type": "cosine",
    }
    whole = recipe(output_dir=str(tmp_path / "whole"), **settings)
    run_exp(whole)
    behind = {(row["step"] - 1, row["policy_version"]) for row in completions(whole["output_dir"])}
    assert behind == {(0, 0), (1, 0), (2, 1), (3, 2), (4, 3)}
    log = [line for line in trainer_log(whole["output_dir"]) if "loss" in line]
    assert [line["rollout_ahead/steps_behind"] for line in log] == [0, 1, 1, 1, 1]
    assert all(0 < line["sampling/sampling_logp_difference/mean"] < 1e-4 for line in log), "the engine is asked"
    # The first step is on-policy; in the others the ratio is to the policy before, which a large update has left.
    assert log[0]["clip_ratio/region_mean"] == 0
    assert max(line["clip_ratio/region_mean"] for line in log[1:]) > 0

    # From the checkpoint of step 3, which holds the completions of step 4.
    resumed = recipe(output_dir=str(tmp_path / "resumed"), **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-5")
    (tmp_path / "resumed" / "grpo_finished.json").unlink()
    run_exp(resumed | {"resume_from_checkpoint": str(tmp_path / "resumed" / "checkpoint-3")})
    assert_same(resumed, whole)

    (engine,) = one_engine
    for (
        each
    ) in STOP_SIGNALS:  # a stop reaches the whole group, and the trainer needs the engine to save what it samples
        os.kill(engine._process.pid, each)
    assert len(engine.generate(PROMPTS, SAMPLING, step=9)) == 1
    engine.submit(PROMPTS, SAMPLING, step=10)
    engine._process.kill()
    with pytest.raises(RuntimeError, match=r"has ended \(exit code -9\)"):
        engine.collect()
