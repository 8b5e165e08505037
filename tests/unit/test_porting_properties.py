"""Whatever valid key of another system a recipe has, alone or beside another one: this stage refuses no key of ours
that comes of it."""

import functools
import itertools
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from llamafactory.hparams import parser as host
from transformers import HfArgumentParser

from grpo_stage.host.parser import check, known_key_names
from grpo_stage.tools.porting import swift, trl, verl
from grpo_stage.tools.porting.own_check import refusal_of
from grpo_stage.tools.porting.port import Fate, Port
from grpo_stage.tools.recipe_file import WITHOUT_DEVICE
from tests.unit import foreign_keys


NUM_PAIRS = 50
"""Of a system in each run of the tests. All of them, more than 13,000 a system, were tried once."""
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


_parser_of = functools.cache(lambda *classes: HfArgumentParser(classes))


@pytest.fixture(autouse=True)
def _one_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host makes argparse's options of all keys anew for each recipe, and reads none of them from a mapping."""
    monkeypatch.setattr(host, "HfArgumentParser", lambda classes: _parser_of(*classes))


def _rows(table: Mapping[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(key, value) for key, values in table.items() for value in values]


def _ported(system: str, more: Source) -> Port:
    _, base, port = SYSTEMS[system]
    return port({**base, **more})


def _refusal(recipe: Mapping[str, Any]) -> str | None:
    """What the keys alone show: quick, and `refusal_of` tells more."""
    try:
        check({**recipe, **WITHOUT_DEVICE})
    except ValueError as error:
        return str(error)
    return None


def test_no_key_that_comes_of_a_valid_one_is_refused() -> None:
    refusals: dict[str, str] = {}
    parsed: set[str] = set()
    for system, (table, _, _) in SYSTEMS.items():
        for key, value in _rows(table):
            recipe = _ported(system, {key: value}).recipe
            ours = {json.dumps(item) for item in recipe.items()}
            # A run's parser, which is slower, reads each value of a key of ours once.
            refusal = _refusal(recipe) if ours <= parsed else refusal_of(recipe)
            parsed |= ours
            if refusal is not None:
                refusals[f"{system}, {key}: {value}"] = refusal
    assert refusals == {}


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_key_that_comes_of_two_valid_ones_is_refused(system: str) -> None:
    all_pairs = [
        pair
        for pair in itertools.combinations(_rows(SYSTEMS[system][0]), 2)
        if {key for key, _ in pair} != {"reward_model", "reward_weights"}  # of another number of functions
    ]
    refusals = {
        str(pair): refusal
        for pair in random.Random(0).sample(all_pairs, NUM_PAIRS)
        if (refusal := _refusal(_ported(system, dict(pair)).recipe)) is not None
    }
    assert refusals == {}


_GSPO = {"importance_sampling_level": "sequence"}
_BEST = {"eval_strategy": "steps", "load_best_model_at_end": True}
_SERVERS = {"use_vllm": True, "vllm_mode": "server"}
_LORA = {"use_peft": True, "use_vllm": True}
_ESTIMATOR, _DIVIDES = "algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo"


@pytest.mark.parametrize(
    ("system", "source", "key", "ours", "marked"),
    [
        ("TRL", {"use_vllm": True, **_GSPO}, "vllm_importance_sampling_correction", "sequence", True),
        (
            "ms-swift",
            {"use_vllm": True, "rollout_importance_sampling_mode": "token_mask", **_GSPO},
            "rollout_importance_sampling_mode",
            "sequence",
            True,
        ),
        ("TRL", {"top_entropy_quantile": 0.2, **_GSPO}, "top_entropy_quantile", None, True),
        ("TRL", {"loss_type": "cispo", **_GSPO}, "importance_sampling_level", None, True),
        ("TRL", _BEST, "load_best_model_at_end", None, True),
        (
            "TRL",
            {**_BEST, "metric_for_best_model": "eval_reward"},
            "load_best_model_at_end",
            None,
            True,
        ),  # no checkpoint
        (
            "TRL",
            {**_BEST, "metric_for_best_model": "eval_reward", "eval_steps": 50, "save_steps": 50},
            "load_best_model_at_end",
            True,
            False,
        ),
        ("ms-swift", {"split_dataset_ratio": 0.1, **_BEST}, "load_best_model_at_end", None, True),
        ("TRL", {**_LORA, "use_dora": True}, "use_dora", True, False),
        ("ms-swift", {"use_vllm": True, "use_dora": True}, "use_dora", True, False),
        ("ms-swift", {"use_vllm": True, "use_dora": True, "tuner_type": "full"}, "use_dora", None, False),
        ("TRL", {**_LORA, "lora_modules_to_save": ["embed_tokens"]}, "use_vllm", "hf", False),
        ("ms-swift", {**_SERVERS, "quant_bits": 4}, "use_vllm", "vllm", False),
        ("ms-swift", {"use_vllm": True, "sleep_level": 2}, "sleep_level", 1, False),
        ("ms-swift", {"use_vllm": True, "sleep_level": 2, "tuner_type": "full"}, "sleep_level", 2, False),
        ("ms-swift", {"tuner_type": "full", "quant_bits": 4}, "quant_bits", None, True),
        ("TRL", {"load_in_4bit": True}, "load_in_4bit", None, True),
        (
            "ms-swift",
            {"advantage_estimator": "reinforce_plus_plus", "scale_rewards": "group"},
            "scale_rewards",
            None,
            True,
        ),
        ("ms-swift", {"advantage_estimator": "grpo", "scale_rewards": "gdpo"}, "advantage_estimator", "gdpo", False),
        ("ms-swift", {"advantage_estimator": "rloo", "scale_rewards": "gdpo"}, "advantage_estimator", "gdpo", True),
        ("ms-swift", {"ref_model": "a/b", "sync_ref_model": True}, "sync_ref_model", None, True),
        *(
            (system, {_ESTIMATOR: estimator, _DIVIDES: divides}, _DIVIDES, ours, False)
            for system in ("verl", "EasyR1")
            for estimator, divides, ours in (
                ("gdpo", False, None),
                ("reinforce_plus_plus_baseline", False, None),
                ("grpo", False, "none"),
                ("grpo_passk", False, "none"),
                ("grpo_passk", True, "group"),
                ("grpo_passk", None, "group"),
            )
        ),
    ],
)
def test_keys_that_this_stage_refuses_together(system: str, source: Source, key: str, ours: Any, marked: bool) -> None:
    """`ours` is the first value of ours that comes of the key; None if it is left."""
    port = _ported(system, source)
    assert _refusal(port.recipe) is None
    line = {line.key: line for line in port.lines}[key]
    values = list(line.ours.values())
    assert (values[0] if values else None, line.changes_learning) == (ours, marked)
    assert line.ours.items() <= port.recipe.items()
    assert (line.fate is Fate.LEFT) == (ours is None)


@pytest.mark.parametrize(
    ("system", "model", "ours"),
    [
        ("TRL", {"reward_model_name_or_path": "m"}, "0.5,0.25"),  # the first of the functions there
        ("ms-swift", {"reward_model": "m"}, "1,0.5"),  # the last
    ],
)
def test_a_reward_model_that_is_left_takes_its_weight_with_it(system: str, model: Source, ours: str) -> None:
    functions = {"reward_funcs": ["accuracy", "format"], "reward_weights": [1.0, 0.5, 0.25]}
    port = _ported(system, {**functions, **model})
    assert port.recipe["reward_weights"] == ours
    assert _refusal(port.recipe) is None
    lines = {line.key: line for line in port.lines}
    assert lines["reward_funcs"].changes_learning
    assert {lines[key].fate for key in model} == {Fate.LEFT}
    with pytest.raises(ValueError, match=r"`reward_weights` has 2 values for 3 .*\bm\b"):
        _ported(system, {**functions, **model, "reward_weights": [1.0, 0.5]})


@pytest.mark.parametrize(
    ("more", "marked"),
    [({"val_dataset": "a/v"}, True), ({"val_dataset": "a/v", "split_dataset_ratio": 0.1}, True), ({}, False)],
)
def test_an_evaluation_of_swift_on_a_dataset_of_its_own_is_not_called_none(more: Source, marked: bool) -> None:
    port = _ported("ms-swift", {"load_best_model_at_end": True, "eval_steps": 10, **more})
    assert not {"load_best_model_at_end", "eval_steps", "val_size"} & port.recipe.keys()
    left = {line.key: line for line in port.lines if line.fate is Fate.LEFT}
    assert left["load_best_model_at_end"].changes_learning == marked
    assert ("val_dataset" in left["load_best_model_at_end"].note) == marked
    assert "val_dataset" not in more or left["val_dataset"].changes_learning


@pytest.mark.parametrize(("filters", "marked"), [(True, True), (False, False), (None, False)])
@pytest.mark.parametrize("most", [0, 1])
def test_rollouts_for_a_batch_do_not_count_where_none_is_filtered(filters: Any, most: int, marked: bool) -> None:
    key = "algorithm.filter_groups.max_num_gen_batches"
    port = _ported("verl", {key: most, "algorithm.filter_groups.enable": filters})
    assert [line.changes_learning for line in port.lines if line.key == key] == [marked]


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
