"""The facts of losses, estimators and terms, and what follows: all names are keys, and aliases are resolved."""

import dataclasses

import pytest

from grpo_stage.algorithm.catalog import ESTIMATORS, LOSS_TYPES, TERMS
from grpo_stage.algorithm.combinations import ONLY_WITH
from grpo_stage.algorithm.conditions import applies
from grpo_stage.arguments import GRPOArguments, grpo_field_names


DEFAULTS = {spec.name: spec.default for spec in dataclasses.fields(GRPOArguments)}


def test_the_catalog_names_keys_of_the_stage() -> None:
    read = {key for each in (*LOSS_TYPES.values(), *ESTIMATORS.values(), *TERMS) for key in each.reads}
    assert read - grpo_field_names() == {"ref_model"}
    assert {term.key for term in TERMS} <= grpo_field_names()


def test_every_condition_of_a_key_of_the_stage_is_one_on_keys_of_the_stage() -> None:
    named = {other for key in ONLY_WITH.keys() & grpo_field_names() for other in ONLY_WITH[key]}
    assert named - grpo_field_names() == {"eval_strategy"}


@pytest.mark.parametrize("key", ["importance_sampling_level", "epsilon", "epsilon_high", "delta"])
def test_an_alias_reads_what_its_loss_reads_but_what_it_sets(key: str) -> None:
    for name, loss in LOSS_TYPES.items():
        if loss.alias_of is not None:
            reads = key in LOSS_TYPES[loss.alias_of].reads and key not in loss.sets
            assert applies({"loss_type": ONLY_WITH[key]["loss_type"]}, {"loss_type": name}) == reads


@pytest.mark.parametrize(
    ("written", "resolved"),
    [
        ({"loss_type": "bnpo"}, {"loss_type": "dapo"}),
        (
            {"loss_type": "bnpo", "importance_sampling_level": "sequence"},
            {"loss_type": "dapo", "importance_sampling_level": "sequence"},
        ),
        ({"loss_type": "gspo"}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
        ({"loss_type": "gspo_token"}, {"loss_type": "grpo", "importance_sampling_level": "sequence_token"}),
        ({"advantage_estimator": "dr_grpo"}, {"advantage_estimator": "grpo", "scale_rewards": "none"}),
        ({"loss_type": "gmpo"}, {"loss_type": "gmpo", "importance_sampling_level": "token"}),
    ],
)
def test_an_alias_is_what_it_stands_for_and_is_shown_as_it_was_written(written, resolved) -> None:
    arguments = GRPOArguments(reward_funcs="accuracy", **written)
    arguments.validate()
    now = vars(arguments)
    assert {key: now[key] for key in resolved} == resolved
    assert {**{key: now[key] for key in written}, **arguments.as_written}.items() >= written.items()


def test_the_defaults_are_in_force() -> None:
    """A key without an effect at the defaults is one that only a part of another choice reads."""
    idle = {key for key in ONLY_WITH.keys() & DEFAULTS.keys() if not applies(ONLY_WITH[key], DEFAULTS)}
    assert {"epsilon", "epsilon_high", "delta", "dynamic_sampling", "vllm_sleep"} & idle == set()
    assert {"kl_estimator", "sapo_temperature_pos", "covariance_frac", "max_resample_times"} <= idle
