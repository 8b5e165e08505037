"""The options of the objective through the host, on the tiny model: each once, two steps, with what it needs."""

import pytest

from .conftest import trainer_log


# Every option of the objective stands in one of these; tests/unit/test_objective.py has them in pairs.
RUNS = {
    "gspo": {"loss_type": "gspo", "epsilon": 3e-4, "epsilon_high": 4e-4, "steps_per_generation": 2},
    "cispo, rloo": {"loss_type": "cispo", "epsilon_high": 4.0, "advantage_estimator": "rloo"},
    "sapo, opo": {"loss_type": "sapo", "sapo_temperature_neg": 1.1, "advantage_estimator": "opo"},
    # The seed: each step has a group with one best completion, and so something to learn.
    "gmpo, passk": {
        "loss_type": "gmpo",
        "epsilon": 0.4,
        "advantage_estimator": "passk",
        "scale_rewards": "group",
        "seed": 1,
    },
    "dual clip": {"delta": 3.0, "importance_sampling_level": "sequence_token", "advantage_estimator": "dr_grpo"},
    "kl in the reward": {
        "advantage_estimator": "reinforce_plus_plus",
        "beta": 0.05,
        "kl_in_reward": True,
        "kl_estimator": "k1",
        "kl_target": 0.1,
    },
    "kl in the loss": {
        "advantage_estimator": "reinforce_plus_plus_baseline",
        "beta": 0.05,
        "use_bias_correction_kl": True,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
    },
    "correction": {
        "rollout_correction": "sequence",
        "rollout_correction_mode": "mask",
        "rollout_correction_max": 3.0,
        "off_policy_mask_threshold": 0.5,
    },
    "exploration": {"entropy_coef": 0.01, "entropy_target": 0.2, "top_entropy_quantile": 0.2},
    "kl_cov": {"covariance_control": "kl_cov", "covariance_frac": 0.1, "num_iterations": 2},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_two_steps(recipe, run_exp, options):
    arguments = recipe(**options)
    run_exp(arguments)
    lines = [line for line in trainer_log(arguments["output_dir"]) if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        assert line["grad_norm"] > 0
        assert line["skipped_steps"] == 0
    assert lines[0]["sampling/sampling_logp_difference/mean"] < 1e-4


def test_gdpo_takes_each_reward_on_its_own(recipe, run_exp, toy_reward):
    arguments = recipe(advantage_estimator="gdpo", reward_funcs=[toy_reward, "length"], log_completions=True)
    arguments["reward_kwargs"] = {"length": {"max_length": 8}}
    run_exp(arguments)
    assert len([line for line in trainer_log(arguments["output_dir"]) if "loss" in line]) == 2


@pytest.mark.parametrize("tuning", [{}, {"finetuning_type": "full"}], ids=["lora", "full"])
def test_the_reference_moves_in_every_kind_of_tuning(recipe, run_exp, tiny_model_dir, tuning):
    """With the policy's whole share, the reference is the policy before the step, and the divergence starts at 0."""
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    for ref_model in [{}, {"ref_model": str(tiny_model_dir)}] if tuning else [{}]:
        arguments = recipe(beta=0.05, max_steps=3, **moving, **tuning, **ref_model, overwrite_output_dir=True)
        run_exp(arguments)
        moved = [line["kl"] for line in trainer_log(arguments["output_dir"]) if "loss" in line][-3:]
        run_exp(recipe(beta=0.05, max_steps=3, **tuning, **ref_model, overwrite_output_dir=True))
        stayed = [line["kl"] for line in trainer_log(arguments["output_dir"]) if "loss" in line][-3:]
        assert moved == pytest.approx([0.0] * 3, abs=1e-7)
        assert stayed[-1] > 1e-6
