"""Runs with the real vLLM: quiet when the adapter arrives, stopped when it does not."""

import pytest

from grpo_stage.canary import StaleRolloutError

from .conftest import completions, trainer_log


def test_the_canary_is_quiet_over_updates_with_a_large_learning_rate(recipe, run_exp):
    arguments = recipe(
        rollout_backend="vllm", learning_rate=2e-2, max_steps=4, log_completions=True, num_iterations=2, beta=0.01
    )
    run_exp(arguments)
    lines = [line for line in trainer_log(arguments["output_dir"]) if "loss" in line]
    assert len(lines) == 4
    assert lines[-1]["kl"] > 1e-2, "the policy has moved far from where it started"
    fresh = [line for line in lines if "sampling/sampling_logp_difference/mean" in line]
    assert [line["current_steps"] for line in fresh] == [1, 3], "each rollout is checked at its first use"
    assert all(line["sampling/sampling_logp_difference/mean"] < 1e-4 for line in fresh)
    assert {row["policy_version"] for row in completions(arguments["output_dir"])} == {0, 2}


def test_an_adapter_that_arrives_damaged_stops_the_run(recipe, run_exp, monkeypatch):
    from grpo_stage.rollout import vllm_engine

    write_adapter = vllm_engine.write_adapter

    def write_halved(policy, folder):
        write_adapter(policy, folder)
        from safetensors.torch import load_file, save_file

        file = folder / "adapter_model.safetensors"
        save_file({name: tensor / 2 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})

    monkeypatch.setattr(vllm_engine, "write_adapter", write_halved)
    with pytest.raises(StaleRolloutError, match="max_sampling_logprob_diff"):
        run_exp(recipe(rollout_backend="vllm", learning_rate=2e-2, max_steps=4))


def test_sampling_that_cuts_the_distribution_is_compared_before_the_cut(recipe, run_exp):
    arguments = recipe(rollout_backend="vllm", temperature=0.8, top_p=0.9, learning_rate=1e-2, max_steps=2)
    run_exp(arguments)
    for line in trainer_log(arguments["output_dir"])[:2]:
        assert line["sampling/sampling_logp_difference/mean"] < 1e-4
