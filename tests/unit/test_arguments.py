"""GRPOArguments alone: normalising, bounds, and keys that contradict one another. No host."""

import dataclasses
import subprocess
import sys

import pytest

from grpo_stage.arguments import BUILTIN_REWARDS, GRPOArguments, grpo_field_names


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
        ({"reward_timeout": 0}, ["reward_timeout: 0", "above 0"]),
        ({"max_sampling_logprob_diff": 0.0}, ["max_sampling_logprob_diff: 0.0", "above 0"]),
        ({"reward_weights": "1,2"}, ["reward_weights: 1.0, 2.0", "2 values", "1 functions", "one weight for each"]),
        ({"reward_weights": []}, ["reward_weights", "0 values", "one weight for each"]),
        ({"reward_weights": "nan"}, ["reward_weights: nan", "finite"]),
        ({"reward_weights": "0"}, ["reward_weights: 0.0", "nothing would be learned", "other than 0"]),
        ({"reward_funcs": "format,format"}, ["reward_funcs: format, format", "twice", "reward_weights"]),
        ({"reward_kwargs": {"length": 512}}, ["reward_kwargs", "'length'", "512", '{"max_length": 512}']),
    ],
)
def test_refused(changes, said):
    with pytest.raises(ValueError, match="`") as refusal:
        arguments(**changes).validate()
    assert [part for part in said if part not in str(refusal.value)] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward_weights": "1,high"}, ["reward_weights", "'high'", "one number for each"]),
        ({"reward_kwargs": "{length"}, ["reward_kwargs: {length", "JSON"]),
        ({"reward_kwargs": "[1]"}, ["reward_kwargs: [1]", "mapping"]),
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
    "changes", [{"epsilon_high": 0.2}, {"epsilon_high": 3.0}, {"num_generations": 2}, {"beta": 0}]
)
def test_bounds_are_inclusive_where_they_say_so(changes):
    arguments(**changes).validate()


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
