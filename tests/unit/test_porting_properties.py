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
from grpo_stage.tools.porting.port import Port
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
