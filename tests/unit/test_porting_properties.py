"""Whatever valid key of another system a recipe has, alone or beside another one: this stage refuses no key of ours
that comes of it."""

import itertools
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from grpo_stage.host.parser import check, known_key_names
from grpo_stage.tools.porting import swift, trl, verl
from grpo_stage.tools.porting.own_check import refusal_of
from grpo_stage.tools.porting.port import Fate, Port
from grpo_stage.tools.recipe_file import WITHOUT_DEVICE
from tests.unit import foreign_keys


NUM_PAIRS = 800
Source = Mapping[str, Any]
SYSTEMS: Mapping[str, tuple[Mapping[str, list[Any]], Source, Callable[[Source], Port]]] = {
    "TRL": (
        foreign_keys.TRL,
        {"model_name_or_path": "a/b", "dataset_name": "a/c"},
        lambda source: trl.port_trl(source, known_key_names(), "0.24", None, 1),
    ),
    "ms-swift": (
        foreign_keys.SWIFT,
        {"rlhf_type": "grpo", "model": "a/b", "dataset": "a/c", "reward_funcs": ["accuracy", "format"]},
        lambda source: swift.port_swift(source, known_key_names(), None, 1),
    ),
    "EasyR1": (
        foreign_keys.EASYR1,
        {"data.train_files": "a/c@train", "worker.actor.model.model_path": "a/b"},
        lambda source: verl.port_verl(source, known_key_names(), 1),
    ),
    "verl": (
        foreign_keys.VERL,
        {"data.train_files": "a/c@train", "actor_rollout_ref.model.path": "a/b"},
        lambda source: verl.port_verl(source, known_key_names(), 1),
    ),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_key_that_comes_of_a_valid_one_is_refused(system: str) -> None:
    table, base, port = SYSTEMS[system]
    refusals = {
        f"{key}: {value}": refusal
        for key, values in table.items()
        for value in values
        if (refusal := refusal_of(port({**base, key: value}).recipe)) is not None
    }
    assert refusals == {}


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_key_that_comes_of_two_valid_ones_is_refused(system: str) -> None:
    table, base, port = SYSTEMS[system]
    all_pairs = list(itertools.combinations([(key, value) for key in table for value in table[key]], 2))
    refusals = {}
    for (key, value), (other, of_other) in random.Random(0).sample(all_pairs, NUM_PAIRS):
        if key == other:
            continue
        recipe = port({**base, key: value, other: of_other}).recipe
        try:
            check({**recipe, **WITHOUT_DEVICE})
        except ValueError as error:
            refusals[f"{key}: {value}, {other}: {of_other}"] = str(error)
    assert refusals == {}


def _of_correction(system: str, more: Source) -> list[tuple[str, Fate, bool]]:
    _, base, port = SYSTEMS[system]
    lines = port({**base, "use_vllm": True, **more}).lines
    return [(line.key, line.fate, line.changes_learning) for line in lines if "importance" in line.key]


@pytest.mark.parametrize("more", [{"repetition_penalty": 1.1}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_correction_that_has_to_be_left_is_told_of_as_what_changes_learning(more: Source) -> None:
    key = "vllm_importance_sampling_correction"  # which is TRL's default
    assert _of_correction("TRL", {}) == [(key, Fate.DEFAULT, False)]
    assert _of_correction("TRL", more) == [(key, Fate.LEFT, True)]


def test_what_else_comes_of_a_correction_that_is_left_does_not_call_it_harmless() -> None:
    mode = {"rollout_importance_sampling_mode": "token_truncate"}  # `rollout_correction` and its mode
    assert _of_correction("ms-swift", mode) == [(*mode, Fate.COMPUTED, False)]
    assert _of_correction("ms-swift", mode | {"top_k": 50}) == [(*mode, Fate.LEFT, True)]
