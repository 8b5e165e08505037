"""GRPOArguments alone: normalizing, bounds, and keys that contradict one another. No host."""

import dataclasses
import re
import subprocess
import sys

import pytest

from grpo_stage.algorithm.catalog import ESTIMATORS
from grpo_stage.arguments import GRPOArguments, grpo_field_names
from grpo_stage.rewards.registry import BUILTIN_REWARDS


def arguments(**changes):
    return GRPOArguments(**{"reward_funcs": "accuracy", **changes})


def test_defaults_with_a_reward_are_valid():
    arguments().validate()


def test_every_default_but_the_missing_reward_is_valid():
    with pytest.raises(ValueError, match="`reward_funcs` is missing"):
        GRPOArguments().validate()


def test_missing_reward_names_the_built_in_ones():
    with pytest.raises(ValueError, match="`") as refusal:
        GRPOArguments(reward_funcs=" , ").validate()
    assert all(name in str(refusal.value) for name in (*BUILTIN_REWARDS, "path/file.py:function"))


@pytest.mark.parametrize(
    "written", ["accuracy, my.py:score", ["accuracy", "my.py:score"], ("accuracy", "my.py:score")]
)
def test_reward_funcs_is_a_list(written):
    assert arguments(reward_funcs=written).reward_funcs == ["accuracy", "my.py:score"]


@pytest.mark.parametrize("written", ["1, 0.5", [1, 0.5], ["1", "0.5"]])
def test_reward_weights_are_numbers(written):
    assert arguments(reward_funcs="accuracy,format", reward_weights=written).reward_weights == [1.0, 0.5]


def test_one_reward_weight_may_be_a_bare_number():
    assert arguments(reward_weights=2).reward_weights == [2.0]


def test_reward_kwargs_may_be_json():
    assert arguments(reward_kwargs='{"length": {"max_length": 5}}').reward_kwargs == {"length": {"max_length": 5}}
    assert arguments(reward_columns='{"level": "meta.level"}').reward_columns == {"level": "meta.level"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_generations": 1}, ["num_generations: 1", "at least 2", "nothing to be compared"]),
        ({"steps_per_generation": 0}, ["steps_per_generation: 0", "at least 1"]),
        ({"num_iterations": 0}, ["num_iterations: 0", "at least 1"]),
        ({"max_tokens_per_micro_batch": 0}, ["max_tokens_per_micro_batch: 0", "at least 1"]),
        ({"num_completions_to_print": 0}, ["num_completions_to_print: 0", "at least 1"]),
        ({"beta": -0.1}, ["beta: -0.1", "at least 0"]),
        ({"beta": float("nan")}, ["beta: nan", "finite"]),
        ({"beta": float("inf")}, ["beta: inf", "finite"]),
        ({"epsilon": 0}, ["epsilon: 0", "above 0"]),
        ({"epsilon": 1.0}, ["epsilon: 1.0", "below 1", "epsilon: 0.2"]),
        ({"epsilon_high": 0.1}, ["epsilon_high: 0.1", "epsilon: 0.2", "leave it out"]),
        # combinations of the objective
        (
            {"advantage_estimator": "rloo", "scale_rewards": "group"},
            ["scale_rewards: group", "advantage_estimator: rloo", "G / (G - 1)", "scale_rewards: none or batch"],
        ),
        ({"advantage_estimator": "opo", "scale_rewards": "batch"}, ["scale_rewards: batch", "opo", "leave it out"]),
        ({"advantage_estimator": "dr_grpo", "scale_rewards": "group"}, ["scale_rewards: group", "dr_grpo", "none"]),
        ({"advantage_estimator": "gdpo", "scale_rewards": "none"}, ["scale_rewards: none", "gdpo", "batch"]),
        (
            {"advantage_estimator": "reinforce_plus_plus", "scale_rewards": "group"},
            ["scale_rewards: group", "no groups", "batch"],
        ),
        (
            {"advantage_estimator": "reinforce_plus_plus_baseline", "scale_rewards": "none"},
            ["scale_rewards: none", "whitened", "batch"],
        ),
        ({"loss_type": "cispo"}, ["loss_type: cispo", "epsilon_high", "4.0"]),
        (
            {"loss_type": "cispo", "epsilon_high": 4.0, "epsilon": 0.1},
            ["epsilon: 0.1", "no effect", "loss_type: cispo"],
        ),
        ({"loss_type": "sapo", "epsilon_high": 0.3}, ["epsilon_high: 0.3", "no effect", "loss_type: sapo"]),
        ({"loss_type": "gmpo", "delta": 3.0}, ["delta: 3.0", "no effect", "loss_type: gmpo"]),
        ({"sapo_temperature_pos": 2.0}, ["sapo_temperature_pos: 2.0", "no effect", "loss_type: sapo"]),
        (
            {"loss_type": "gspo", "importance_sampling_level": "sequence_token"},
            ["importance_sampling_level: sequence_token", "no effect", "loss_type: gspo"],
        ),
        ({"delta": 1.1}, ["delta: 1.1", "1.2", "delta: 3.0"]),
        ({"delta": 1.28, "epsilon_high": 0.28}, ["delta: 1.28", "above 1 + epsilon_high", "delta: 3.0"]),
        ({"delta": 0.5}, ["delta: 0.5", "above 1"]),
        ({"kl_target": 0.1}, ["kl_target: 0.1", "no effect", "beta: above 0"]),
        ({"kl_estimator": "k2"}, ["kl_estimator: k2", "no effect", "beta: above 0"]),
        ({"sync_ref_model": True}, ["sync_ref_model: true", "no effect", "beta: above 0"]),
        ({"beta": 0.1, "ref_model_sync_steps": 8}, ["ref_model_sync_steps: 8", "sync_ref_model: true"]),
        ({"beta": 0.1, "kl_estimator": "k1"}, ["kl_estimator: k1", "gradient is 0", "use_bias_correction_kl: true"]),
        (
            {"beta": 0.1, "kl_estimator": "k2", "use_bias_correction_kl": True},
            ["use_bias_correction_kl: true", "kl_estimator: k2", "k1 or k3"],
        ),
        ({"beta": 0.1, "kl_in_reward": True}, ["kl_in_reward: true", "kl_estimator: k3", "kl_estimator: k1"]),
        (
            {"beta": 0.1, "kl_in_reward": True, "kl_estimator": "k1", "use_bias_correction_kl": True},
            ["use_bias_correction_kl: true", "kl_in_reward: true", "kl_in_reward: false"],
        ),
        (
            {"beta": 0.1, "kl_in_reward": True, "kl_estimator": "k1", "advantage_estimator": "gdpo"},
            ["kl_in_reward: true", "gdpo", "Leave `kl_in_reward` out"],
        ),
        (
            {"beta": 0.1, "kl_in_reward": True, "kl_estimator": "k1"},
            ["kl_in_reward: true", "scale_rewards: group", "noise", "`scale_rewards: none` or `batch`"],
        ),
        (
            {"beta": 0.1, "kl_in_reward": True, "kl_estimator": "k1", "advantage_estimator": "passk"},
            ["kl_in_reward: true", "advantage_estimator: passk", "best completion", "Leave `kl_in_reward` out"],
        ),
        (
            {"loss_type": "gspo", "top_entropy_quantile": 0.2},
            ["top_entropy_quantile: 0.2", "loss_type: gspo`", "learned with the rest", "loss_type: gspo_token"],
        ),
        (
            {"loss_type": "gmpo", "rollout_correction": "token"},
            ["rollout_correction: token", "loss_type: gmpo", "another `loss_type`", "rollout_correction: sequence"],
        ),
        (
            {"importance_sampling_level": "sequence", "covariance_control": "clip_cov"},
            ["covariance_control: clip_cov", "importance_sampling_level: sequence`", "sequence_token"],
        ),
        ({"advantage_estimator": "passk", "delta": 3.0}, ["delta: 3.0", "no effect", "advantage_estimator: passk"]),
        (
            {"advantage_estimator": "passk", "dynamic_sampling": True},
            ["dynamic_sampling: true", "no effect", "advantage_estimator: passk"],
        ),
        ({"rollout_correction_max": 3.0}, ["rollout_correction_max: 3.0", "rollout_correction: token or sequence"]),
        (
            {"rollout_correction": "token", "rollout_correction_max": 0.9},
            ["rollout_correction_max: 0.9", "at least 1"],
        ),
        ({"rollout_correction": "token", "rollout_correction_min": 1.1}, ["rollout_correction_min: 1.1", "at most 1"]),
        ({"off_policy_mask_threshold": 0.0}, ["off_policy_mask_threshold: 0.0", "above 0"]),
        ({"top_entropy_quantile": 0.0}, ["top_entropy_quantile: 0.0", "above 0"]),
        ({"top_entropy_quantile": 1.1}, ["top_entropy_quantile: 1.1", "at most 1"]),
        ({"entropy_coef_delta": 0.1}, ["entropy_coef_delta: 0.1", "no effect", "entropy_target: above 0"]),
        ({"entropy_target": 0.5, "entropy_coef": 0.1}, ["entropy_coef: 0.1", "entropy_coef_max: 0.05", "Lower"]),
        ({"clip_cov_min": 0.5}, ["clip_cov_min: 0.5", "covariance_control: clip_cov"]),
        (
            {"covariance_control": "clip_cov", "clip_cov_min": 5.0},
            ["clip_cov_min: 5.0", "clip_cov_max: 5.0", "1 and 5"],
        ),
        ({"covariance_control": "kl_cov"}, ["covariance_control: kl_cov", "no effect", "num_iterations: 2"]),
        ({"reward_timeout": 0}, ["reward_timeout: 0", "above 0"]),
        ({"max_sampling_logprob_diff": 0.0}, ["max_sampling_logprob_diff: 0.0", "above 0"]),
        ({"reward_weights": "1,2"}, ["reward_weights: 1.0, 2.0", "2 values", "1 functions", "one weight for each"]),
        ({"reward_weights": []}, ["reward_weights", "0 values", "one weight for each"]),
        ({"reward_weights": "nan"}, ["reward_weights: nan", "finite"]),
        ({"reward_weights": "0"}, ["reward_weights: 0.0", "nothing would be learned", "other than 0"]),
        ({"reward_funcs": "format,format"}, ["reward_funcs: format, format", "twice", "reward_weights"]),
        ({"reward_kwargs": {"length": 512}}, ["reward_kwargs", "'length'", "512", '{"max_length": 512}']),
        ({"reward_kwargs": {"api_key": "sk-abc123def456"}}, ["'api_key' has '***'"]),
        ({"reward_columns": {"level": 3}}, ["reward_columns", "'level' has 3", '"reward_model.ground_truth"']),
        ({"reward_columns": {"level": "meta..level"}}, ["'meta..level'"]),
        ({"reward_columns": {"prompts": "meta.q"}}, ["sets 'prompts'", "another name"]),
        ({"reward_columns": {"references": "meta.a"}}, ["sets 'references'", "write `reference_column: meta.a`"]),
    ],
)
def test_refused(changes, said):
    with pytest.raises(ValueError, match="`") as refusal:
        arguments(**changes).validate()
    assert [part for part in said if part not in str(refusal.value)] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward_funcs": "overlong,a.py:overlong"}, "two functions are called 'overlong'"),
        ({"reward_funcs": "a.py:reward_model"}, "'a.py:reward_model' would be called 'reward_model'"),
        ({"reward_kwargs": {"format": {}}}, "'format', which is not in `reward_funcs`: there are accuracy"),
        ({"reward_funcs": "reward_model", "reward_kwargs": {"reward_model": {}}}, "a model has no settings there"),
        ({"reward_kwargs": {"accuracy": {"key": "***"}}}, "['accuracy'] has `***` where a secret was taken out"),
    ],
)
def test_names_and_settings_of_rewards_that_do_not_fit_together_are_refused(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        arguments(**changes).validate()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward_weights": "1,high"}, ["reward_weights", "'high'", "one number for each"]),
        ({"reward_kwargs": "{length"}, ["reward_kwargs: {length", "JSON"]),
        ({"reward_kwargs": "[1]"}, ["reward_kwargs: [1]", "mapping"]),
        ({"reward_columns": "[1]"}, ["reward_columns: [1]", "mapping", '"reward_model.ground_truth"']),
    ],
)
def test_unreadable(changes, said):
    with pytest.raises(ValueError, match="`") as refusal:
        arguments(**changes)
    assert [part for part in said if part not in str(refusal.value)] == []


@pytest.mark.parametrize("weights", ["-1", "1"])
def test_a_weight_may_be_negative(weights):
    arguments(reward_weights=weights).validate()


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon_high": 0.2},
        {"epsilon_high": 3.0},
        {"num_generations": 2},
        {"beta": 0},
        {"loss_type": "cispo", "epsilon_high": 0.1},
        {"loss_type": "sapo", "sapo_temperature_neg": 2.0},
        {"delta": 1.21},
        {"loss_type": "gmpo", "epsilon": 1.5, "epsilon_high": 1.5},
        {"rollout_correction": "sequence", "rollout_correction_max": 1.0, "rollout_correction_min": 1.0},
        {"top_entropy_quantile": 1.0},
        {"covariance_control": "kl_cov", "num_iterations": 2},
        {"covariance_control": "kl_cov", "steps_per_generation": 2},
    ],
)
def test_bounds_are_inclusive_where_they_say_so(changes):
    arguments(**changes).validate()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"loss_type": "gspo", "importance_sampling_level": "token"}, "importance_sampling_level: token"),
        ({"loss_type": "sapo", "epsilon": 0.2}, "epsilon: 0.2"),
        ({"num_completions_to_print": 4}, "num_completions_to_print: 4"),
    ],
)
def test_a_key_without_effect_is_refused_at_its_default_too_where_it_was_written(options, key):
    arguments(**options).validate()
    with pytest.raises(ValueError, match=f"`{key}` would have no effect"):
        arguments(**options).validate(given=options.keys())


def test_what_asks_for_nothing_may_be_written_anywhere():
    options = {"sync_ref_model": False, "kl_target": None, "kl_in_reward": False, "rollout_correction": "none"}
    arguments(**options).validate(given=options.keys())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_has_the_scale_of_its_paper_and_takes_those_of_its_row(estimator):
    scales = ESTIMATORS[estimator].scales
    assert arguments(advantage_estimator=estimator).scale_rewards == scales[0]
    for scale in scales:
        arguments(advantage_estimator=estimator, scale_rewards=scale).validate()
    for scale in {"group", "batch", "none"} - set(scales):
        with pytest.raises(ValueError, match=f"scale_rewards: {scale}"):
            arguments(advantage_estimator=estimator, scale_rewards=scale).validate()


def test_booleans_default_to_false():
    """LLaMA Board drops every False from what it runs: a default of True could not be switched off there."""
    on = [spec.name for spec in dataclasses.fields(GRPOArguments) if spec.default is True]
    assert on == []


def test_help_survives_argparse():
    """argparse expands `%` in help texts."""
    assert [spec.name for spec in dataclasses.fields(GRPOArguments) if "%" in spec.metadata["help"]] == []


def test_field_names():
    assert {"num_generations", "reward_funcs", "beta", "rollout_backend"} <= grpo_field_names()


def test_imports_nothing_heavy():
    heavy = "{'torch', 'llamafactory', 'transformers'}"
    code = f"import sys, grpo_stage.arguments; print(sorted({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
