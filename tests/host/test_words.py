"""Every key of a GRPO recipe, walked: wrong types, the values around its bounds, near misses of its name.

Whatever is refused is refused before a model is loaded, as a ValueError that names the key, the value, and what to do.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from enum import Enum
from inspect import isclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import yaml

from grpo_stage.algorithm.combinations import ONLY_WITH
from grpo_stage.arguments import GRPOArguments, grpo_field_names
from grpo_stage.host.bounds import HOST_BOUNDS
from grpo_stage.host.coercion import _ALSO_ACCEPTED
from grpo_stage.host.keys import TRL_KEYS
from grpo_stage.host.parser import _hints, check, parse


EXAMPLES = Path(__file__).parents[2] / "yaml_examples"
REMEDY = re.compile(r"\b(write|leave|give|choose|name|mend|did you mean|install|lower|raise)\b", re.IGNORECASE)
SPECS = {spec.name: spec for spec in dataclasses.fields(GRPOArguments)}
OFTEN_WRITTEN = """
    model_name_or_path adapter_name_or_path template dataset eval_dataset dataset_dir output_dir report_to
    flash_attn val_size bf16 fp16 pure_bf16 do_train eval_on_start do_eval overwrite_output_dir
    resume_from_checkpoint plot_loss finetuning_type lora_target additional_target lora_dropout quantization_bit
    quantization_method optim optim_args lr_scheduler_type lr_scheduler_kwargs logging_strategy save_strategy
    eval_strategy load_best_model_at_end metric_for_best_model greater_is_better ref_model ref_model_adapters
    reward_model reward_model_type run_name trust_remote_code use_cpu overwrite_cache mix_strategy interleave_probs
    enable_thinking tool_format vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config
    freeze_trainable_layers freeze_trainable_modules create_new_adapter use_dora use_rslora pissa_init resize_vocab
    add_tokens neftune_noise_alpha save_only_model gradient_checkpointing disable_gradient_checkpointing
    disable_shuffling push_to_hub hub_token log_level
"""
IN_EXAMPLES = {key for file in EXAMPLES.rglob("*.yaml") for key in yaml.safe_load(file.read_text())}
KEYS = sorted(grpo_field_names() | HOST_BOUNDS.keys() | set(OFTEN_WRITTEN.split()) | IN_EXAMPLES)

LIST, MAPPING, NAN, INF = ["x", ["y"]], {"a": {"b": 1}}, math.nan, math.inf
WRONG_FOR: dict[Any, tuple[Any, ...]] = {
    int: (LIST, MAPPING, "many", True, 2.5, NAN, INF, "inf", "1e400"),
    float: (LIST, MAPPING, "many", True, NAN, INF, -INF, "nan", "1e400"),
    bool: (LIST, MAPPING, "maybe", 2, 0.5, -1),
    str: (LIST, MAPPING, True),
    dict: (LIST, 3, True, 0.5, "["),
    list: (MAPPING, 3, True),
    Literal: (LIST, MAPPING, "no-such-choice", 7, 0.5),
}


def kinds_of(hint: Any) -> set[Any]:
    """The types of a key's values: `Literal` for choices, whether those are one or an enumeration."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    members = [member for member in members if member is not NoneType]
    if any(isclass(member) and issubclass(member, Enum) for member in members):
        return {Literal}
    return {get_origin(member) or member for member in members}


def wrong_types(key: str) -> list[Any]:
    kinds = kinds_of(_hints()[key])
    if not kinds <= WRONG_FOR.keys():
        return []
    # A value is wrong where it is for each of the types; of a text a number or a path is none.
    wrong = [value for value in WRONG_FOR[next(iter(kinds))] if all(_in(value, WRONG_FOR[kind]) for kind in kinds)]
    return [value for value in wrong if type(value) is not _ALSO_ACCEPTED.get(key)]


def _in(value: Any, values: tuple[Any, ...]) -> bool:
    return any(type(value) is type(other) and repr(value) == repr(other) for other in values)


def refusal(recipe: dict[str, Any], key: str, value: Any) -> str:
    with pytest.raises(ValueError, match="`") as error:
        parse(recipe | {key: value})
    return str(error.value)


def defects(message: str, key: str, value: Any) -> list[str]:
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    return [
        what
        for what, is_there in (
            ("key", f"`{key}" in message),
            ("value", shown in message or value is None),
            ("remedy", REMEDY.search(message) is not None),
            ("one line", "\n" not in message),
        )
        if not is_there
    ]


@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_another_type(recipe, key):
    said = {repr(value): (value, refusal(recipe, key, value)) for value in wrong_types(key)}
    assert {text: found for text, (value, m) in said.items() if (found := defects(m, key, value))} == {}, said


def test_the_walk_reaches_every_key():
    assert [key for key in KEYS if not wrong_types(key)] == []


def outside(limits: Any, is_whole: bool) -> Iterator[float]:
    step = 1 if is_whole else 1e-3
    for bound, value in (
        ("min", limits.get("min", 0) - step),
        ("above", limits.get("above")),
        ("below", limits.get("below")),
        *((bound, limits.get(bound, 0) + max(step, abs(limits.get(bound, 0)) * 0.01)) for bound in ("max", "most")),
    ):
        if limits.get(bound) is not None:
            yield int(value) if is_whole else float(value)
            yield -(10**9) if bound in ("min", "above") else 10**18 if is_whole else 1e18


BOUNDED = sorted(
    {key for key, spec in SPECS.items() if {"min", "max", "most", "above", "below"} & spec.metadata.keys()}
    | HOST_BOUNDS.keys()
)


@pytest.mark.parametrize("key", BOUNDED)
def test_a_value_beyond_a_bound(recipe, key):
    is_whole = kinds_of(_hints()[key]) == {int}
    if key in HOST_BOUNDS:
        bound = HOST_BOUNDS[key]
        limits = bound.limits
        recipe |= {name: allowed[0] for name, allowed in ONLY_WITH.get(key, {}).items()}
        allowed = bound.also
    else:
        limits, allowed = SPECS[key].metadata, ()
    values = [value for value in outside(limits, is_whole) if value not in allowed]
    said = {value: refusal(recipe, key, value) for value in values}
    assert {value: found for value, m in said.items() if (found := defects(m, key, value))} == {}, said
    assert [m for m in said.values() if not re.search("must be (at least|at most|above|below)|no effect", m)] == []


def said_of(recipe: dict[str, Any]) -> str:
    """What a recipe is refused for, such as another key that this one needs."""
    try:
        check(recipe)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("key", BOUNDED)
def test_a_bound_itself_is_allowed_where_it_is_inclusive(recipe, key):
    limits = HOST_BOUNDS[key].limits if key in HOST_BOUNDS else SPECS[key].metadata
    for value in (
        limits.get("min"),
        limits.get("max"),
        limits.get("most"),
        *(HOST_BOUNDS[key].also if key in HOST_BOUNDS else ()),
    ):
        if value is None or (value == limits.get("min") == limits.get("above")):
            continue
        assert f"`{key}: {value}` must be" not in said_of(recipe | {key: value})


@pytest.mark.parametrize("key", KEYS)
def test_a_near_miss_of_a_name(recipe, key):
    middle = len(key) // 2
    misses = {
        key[:middle] + key[middle + 1 :],
        key[: middle - 1] + key[middle] + key[middle - 1] + key[middle + 1 :],
        key + "s",
        key.replace("_", ""),
    }
    for miss in misses - _hints().keys() - TRL_KEYS.keys():
        message = refusal(recipe, miss, 1)
        assert f"`{miss}`" in message
        assert f"`{key}`" in message, message
        assert REMEDY.search(message)


@pytest.mark.parametrize(
    "key", [key for key in KEYS if NoneType not in get_args(_hints()[key]) and _hints()[key] is not Any]
)
def test_a_key_without_a_value(recipe, key):
    assert defects(refusal(recipe, key, None), key, None) == []


# What is unusual and means something


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1.0, "optim": "sgd"},
        {"learning_rate": 1e-9},
        {"learning_rate": "1e-6"},
        {"max_grad_norm": 0},
        {"max_grad_norm": 1e9},
        {"weight_decay": 0},
        {"warmup_steps": 0.5},
        {"warmup_ratio": 0},
        {"adam_beta1": 0},
        {"save_strategy": "no", "save_steps": 0},
        {"logging_strategy": "epoch", "logging_steps": 0},
        {"eval_steps": 0},
        {"save_steps": 0.25},
        {"max_steps": 100, "num_train_epochs": 0},
        {"max_steps": -1, "num_train_epochs": 0.01},
        {"num_generations": 1024},
        {"epsilon_high": 1e6},
        {"temperature": 2.0},
        {"top_k": -1},
        {"seed": 0},
        {"seed": 2**32 - 1},
        {"lora_alpha": 1, "lora_rank": 256},
        {"pissa_init": True, "pissa_iter": -1},
        {"ddp_timeout": 180000000},
        {"preprocessing_num_workers": 64},
        {"save_total_limit": 1},
        {"val_size": 1, "eval_strategy": "steps", "eval_steps": 5},
        {"val_size": "1", "eval_strategy": "steps", "eval_steps": 5},
        {"val_size": 0.0, "eval_dataset": "gsm8k", "eval_on_start": True},
        {"val_size": 2, "do_eval": True},
        {"report_to": "all"},
        {"report_to": ["none"]},
        {"report_to": []},
        {"flash_attn": "sdpa"},
        {"quantization_bit": 8},
        {"quantization_bit": 3, "quantization_method": "hqq"},
        {"template": None},
        {"mix_strategy": "interleave_under", "interleave_probs": "0.3,0.7", "dataset": "sums,gsm8k"},
        {"default_system": "costs 3$ {a}"},
        {"default_system": r"Write \${x}"},
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()),
)
def test_accepted(recipe, changes):
    check(recipe | changes)


# What cannot be meant


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output_dir": None}, ["`output_dir: null`", "output_dir: saves/my-run"]),
        ({"output_dir": ""}, ["`output_dir: null`", "output_dir: saves/my-run"]),
        ({"num_generations": 10**9}, ["num_generations: 1000000000", "at most 16384"]),
        (
            {"per_device_train_batch_size": 10**5, "num_generations": 64},
            ["num_generations: 64", "100000", "Lower one"],
        ),
        ({"bf16": True, "fp16": True}, ["bf16: true", "fp16: true", "one precision", "Leave `fp16` out"]),
        ({"pure_bf16": True}, ["pure_bf16: true", "no device", "Leave it out"]),
        ({"flash_attn": "fa2"}, ["flash_attn: fa2", "GPU", "flash_attn: sdpa"]),
        ({"flash_attn": "fa3"}, ["flash_attn: fa3", "GPU", "flash_attn: sdpa"]),
        ({"quantization_bit": 3}, ["quantization_bit: 3", "quantization_method: bnb", "quantization_bit: 4"]),
        ({"val_size": 2}, ["val_size: 2", "never evaluates", "neither trained on", "eval_strategy: steps"]),
        ({"eval_dataset": "gsm8k"}, ["eval_dataset: gsm8k", "never evaluates", "eval_strategy: steps"]),
        ({"val_size": 1.0, "eval_strategy": "steps"}, ["val_size: 1.0", "all rows", "`val_size: 1`"]),
        ({"val_size": 2, "eval_dataset": "gsm8k"}, ["val_size: 2", "eval_dataset: gsm8k", "Leave one"]),
        ({"eval_dataset": "gsm8", "eval_on_start": True}, ["`eval_dataset: gsm8`", "Did you mean `gsm8k`?"]),
        ({"template": "lama3"}, ["template: lama3", "Did you mean `llama3`?", "qwen"]),
        ({"template": "Qwen"}, ["template: Qwen", "Did you mean `qwen`?"]),
        ({"tool_format": "lama3"}, ["tool_format: lama3", "Did you mean `llama3`?"]),
        ({"report_to": "wand"}, ["report_to: wand", "Did you mean `wandb`?"]),
        ({"report_to": ["tensorboard", "nonsense"]}, ["report_to: nonsense", "`none` or `all`"]),
        ({"log_level": "loud"}, ["log_level: loud", "warning"]),
        ({"interleave_probs": "0.5,0.5"}, ["interleave_probs: 0.5,0.5", "mix_strategy: concat", "leave"]),
        (
            {"mix_strategy": "interleave_under", "interleave_probs": "1.0,1.0"},
            ["interleave_probs: 1.0,1.0", "sum to 1"],
        ),
        (
            {"mix_strategy": "interleave_under", "interleave_probs": "0.5,0.5"},
            ["2 values", "1 datasets", "dataset: sums"],
        ),
        ({"reward_weights": 1e308}, ["reward_weights: 1e+308", "at most 1e+09", "0.5"]),
        ({"use_galore": True, "finetuning_type": "full"}, ["use_galore: true", "galore_torch", "Install"]),
        ({"model_name_or_path": None}, ["`model_name_or_path` is missing", "hub id"]),
        ({3: 4}, ["`3: 4`", "no text", "Write a key's name"]),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_refused(recipe, changes, said):
    with pytest.raises(ValueError, match="`") as error:
        parse(recipe | changes)
    assert [part for part in said if part not in str(error.value)] == []
