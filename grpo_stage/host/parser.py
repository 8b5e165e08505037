"""Our arguments joined to the host's, and the one parse of a GRPO run.

Flags are read into the same mapping that a YAML file gives, so there is one route: keys, types, refusals, the stage's
defaults, and then the host's own parser.
"""

import copy
import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from inspect import isclass
from types import MappingProxyType, NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from llamafactory.extras.misc import is_env_enabled
from llamafactory.hparams import parser as host
from llamafactory.hparams.data_args import DataArguments
from llamafactory.hparams.finetuning_args import FinetuningArguments
from llamafactory.hparams.generating_args import GeneratingArguments
from llamafactory.hparams.model_args import ModelArguments
from llamafactory.hparams.training_args import TrainingArguments

from ..arguments import GRPOArguments, grpo_field_names
from .checks import VLLM_LORA_RANKS, lora_rank, refuse_impossible, refuse_unfit
from .registration import STAGE, RawArguments, stage_of


@dataclass
class GRPOFinetuningArguments(GRPOArguments, FinetuningArguments):
    r"""The host's fine-tuning arguments with this stage's among them."""

    stage: Literal["pt", "sft", "rm", "ppo", "dpo", "kto", "grpo"] = field(
        default="sft", metadata=FinetuningArguments.__dataclass_fields__["stage"].metadata
    )

    def __post_init__(self) -> None:
        FinetuningArguments.__post_init__(self)
        GRPOArguments.__post_init__(self)

    def to_dict(self) -> dict[str, Any]:
        r"""As the host's; other stages do not see this stage's keys."""
        values = super().to_dict()
        return values if self.stage == STAGE else {k: v for k, v in values.items() if k not in grpo_field_names()}


def _leave_help_alone(fields: dict[str, "dataclasses.Field[Any]"]) -> None:
    """HfArgumentParser hands all metadata of a field to argparse, which knows nothing of ours, and rewrites its type."""
    for name in grpo_field_names():
        fields[name] = copy.copy(fields[name])
        fields[name].metadata = MappingProxyType({"help": fields[name].metadata["help"]})


_leave_help_alone(GRPOFinetuningArguments.__dataclass_fields__)


@dataclass(frozen=True)
class RunArguments:
    """What a run is made from."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    finetuning: GRPOFinetuningArguments
    generating: GeneratingArguments
    given: frozenset[str]
    """The keys that the user wrote, since afterwards a default cannot be told from a choice."""


ARGUMENT_CLASSES = (ModelArguments, DataArguments, TrainingArguments, GRPOFinetuningArguments, GeneratingArguments)

# Where the user wrote nothing. The host's sampling defaults draw from another distribution than the policy, and its
# logging interval of 500 steps would hide the run.
STAGE_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "logging_steps": 1}
)
DEFAULT_VLLM_GPU_UTIL = 0.3
_DERIVED_KEYS = ("vllm_maxlen", "vllm_gpu_util", "vllm_max_lora_rank")

# Text fields that the host splits at commas; a YAML list means the same.
_COMMA_LISTS = frozenset(
    (
        "dataset eval_dataset interleave_probs adapter_name_or_path add_tokens add_special_tokens lora_target oft_target "
        "additional_target freeze_trainable_modules freeze_extra_modules galore_target apollo_target ref_model_adapters "
        "reward_model_adapters profile_modules reward_funcs reward_weights"
    ).split()
)
# What the host and transformers accept beyond their own type hints.
_ALSO_ACCEPTED: Mapping[str, type] = MappingProxyType({"resume_from_checkpoint": bool, "dataset_dir": dict})
_CONVERTED_VALUES = MappingProxyType(
    {("scale_rewards", "true"): "group", ("scale_rewards", "false"): "none", ("stage", "GRPO"): "grpo"}
)


def refuse_grpo_keys(raw: RawArguments) -> None:
    """Refuse a key of this stage in another stage's run, where it would have no effect.

    Raises:
        ValueError: naming the keys.
    """
    keys = sorted(grpo_field_names() & _read(raw).keys())
    if keys:
        stage = stage_of(raw) or FinetuningArguments.__dataclass_fields__["stage"].default
        raise ValueError(
            f"{_quoted(keys)}: only `stage: grpo` knows {'this key' if len(keys) == 1 else 'these keys'}, and the run "
            f"has `stage: {stage}`. Write `stage: grpo`, or leave them out."
        )


def parse(raw: RawArguments) -> RunArguments:
    """Parse the arguments of a GRPO run, from a YAML mapping or from command-line flags.

    Raises:
        ValueError: for whatever can be told to be wrong before a model is loaded.
    """
    if isinstance(raw, list) and {"-h", "--help"} & set(raw):
        host.get_train_args(raw)  # prints the help and exits
    values = _read(raw)
    values = _check_types(_check_keys(values))
    given = frozenset(key for key, value in values.items() if value is not None)
    values = {**STAGE_DEFAULTS, **{key: value for key, value in values.items() if key in given}}

    GRPOArguments(**{key: value for key, value in values.items() if key in grpo_field_names()}).validate()
    refuse_impossible(SimpleNamespace(**{**_defaults(), **dict.fromkeys(_DERIVED_KEYS), **values}), given)

    arguments = RunArguments(*host.get_train_args(values), given=given)
    assert isinstance(arguments.finetuning, GRPOFinetuningArguments), "grpo_stage.host.registration is not installed"
    _derive(arguments)
    refuse_unfit(arguments)
    return arguments


def _derive(arguments: RunArguments) -> None:
    """Set what follows from other keys, unless the user wrote it."""
    model, training, generating = arguments.model, arguments.training, arguments.generating
    total_length = arguments.data.cutoff_len + generating.max_new_tokens
    model.model_max_length = total_length  # the host's is `cutoff_len`, and drives rope scaling
    generating.top_k = max(generating.top_k, 0)  # -1 keeps all tokens as well
    training.include_num_input_tokens_seen = "no"  # Trainer would count slots; the stage counts tokens itself
    if "vllm_maxlen" not in arguments.given:
        model.vllm_maxlen = total_length
    if "vllm_gpu_util" not in arguments.given:
        model.vllm_gpu_util = DEFAULT_VLLM_GPU_UTIL
    if "vllm_max_lora_rank" not in arguments.given and arguments.finetuning.rollout_backend == "vllm":
        adapter = SimpleNamespace(**{**vars(model), **vars(arguments.finetuning)})
        model.vllm_max_lora_rank = next(rank for rank in VLLM_LORA_RANKS if rank >= lora_rank(adapter))


# Keys


@dataclass(frozen=True, slots=True)
class TRLKey:
    """What a key of TRL's GRPOConfig, or of its trainer, is here."""

    ours: str | None
    """None where the stage has no counterpart."""
    convert: Callable[[Any], Any] = lambda value: value
    note: str = ""


def _of_bool(when_true: str, when_false: str) -> Callable[[Any], str]:
    return lambda value: when_true if str(value).lower() in ("true", "1") else when_false


_SERVER = "this version runs the engine in the training process and talks to no server; `rollout_backend: vllm` starts it"
_CORRECTION = "`max_sampling_logprob_diff` stops the run instead, when engine and trainer drift apart"
TRL_KEYS: Mapping[str, TRLKey] = MappingProxyType(
    {
        "max_completion_length": TRLKey("max_new_tokens"),
        "max_prompt_length": TRLKey("cutoff_len"),
        "use_vllm": TRLKey("rollout_backend", _of_bool("vllm", "hf")),
        "vllm_gpu_memory_utilization": TRLKey("vllm_gpu_util"),
        "vllm_max_model_length": TRLKey("vllm_maxlen"),
        "shuffle_dataset": TRLKey("disable_shuffling", _of_bool("false", "true")),
        "wandb_log_unique_prompts": TRLKey("log_completions"),
        "log_unique_prompts": TRLKey("log_completions"),
        "generation_batch_size": TRLKey(
            None,
            note="a batch is counted in prompts here: per_device_train_batch_size x gradient_accumulation_steps x "
            "devices prompts a step, and `steps_per_generation` steps to a rollout",
        ),
        "model_init_kwargs": TRLKey(None, note="write the host's keys, such as `flash_attn` or `rope_scaling`"),
        "disable_dropout": TRLKey(None, note="dropout is always off"),
        "ds3_gather_for_generation": TRLKey(None, note="DeepSpeed is not supported by this version"),
        "min_p": TRLKey(None, note="`temperature`, `top_p`, `top_k` and `repetition_penalty` set the sampling"),
        "generation_kwargs": TRLKey(None, note="write the keys themselves, such as `temperature` or `top_p`"),
        "use_transformers_paged": TRLKey(None, note="`rollout_backend: vllm` has a paged cache"),
        "cache_implementation": TRLKey(None, note="`rollout_backend: vllm` has a paged cache"),
        "vllm_mode": TRLKey(None, note=_SERVER),
        "vllm_server_base_url": TRLKey(None, note=_SERVER),
        "vllm_server_host": TRLKey(None, note=_SERVER),
        "vllm_server_port": TRLKey(None, note=_SERVER),
        "vllm_server_timeout": TRLKey(None, note=_SERVER),
        "vllm_model_impl": TRLKey(None, note="vLLM's own options go into `vllm_config`, a mapping"),
        "vllm_tensor_parallel_size": TRLKey(None, note="the engine runs on the device that trains"),
        "vllm_enable_sleep_mode": TRLKey(None, note="`vllm_gpu_util` bounds the engine's memory"),
        "vllm_guided_decoding_regex": TRLKey(None, note="the reward `regex` scores a form instead of forcing it"),
        "vllm_importance_sampling_correction": TRLKey(None, note=_CORRECTION),
        "vllm_importance_sampling_cap": TRLKey(None, note=_CORRECTION),
        "delta": TRLKey(None, note="`epsilon` and `epsilon_high` clip the ratio"),
        "importance_sampling_level": TRLKey(None, note="ratios are taken for each token, which TRL calls `token`"),
        "sync_ref_model": TRLKey(None, note="the reference is the policy at the start, or `ref_model`"),
        "ref_model_mixup_alpha": TRLKey(None, note="the reference is the policy at the start, or `ref_model`"),
        "ref_model_sync_steps": TRLKey(None, note="the reference is the policy at the start, or `ref_model`"),
        "top_entropy_quantile": TRLKey(None, note="every token of a completion is in the loss, which TRL calls 1.0"),
        "use_liger_loss": TRLKey(None, note="`max_tokens_per_micro_batch` bounds the memory of the loss"),
        "reward_processing_classes": TRLKey(None, note="reward models are not supported by this version"),
        "num_generations_eval": TRLKey(None, note="evaluation samples `num_generations` completions as well"),
    }
)


def _read(raw: RawArguments) -> dict[str, Any]:
    """The mapping that YAML gives; flags become one. `--key` alone is True, and several values are a list."""
    if isinstance(raw, Mapping):
        return dict(raw)
    values: dict[str, list[str]] = {}
    key = ""
    for token in raw:
        if token.startswith("--"):
            key, has_value, value = token[2:].partition("=")
            key = key.replace("-", "_")
            values[key] = [value] if has_value else []
        else:
            values.setdefault(key, []).append(token)
    return {key: True if not items else items[0] if len(items) == 1 else items for key, items in values.items()}


def _check_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Refuse keys that nobody knows, and answer TRL's with ours."""
    hints = _hints()
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key in hints:
            checked[key] = value
        elif key.startswith("no_") and hints.get(key[3:]) is bool:  # argparse's complement of a flag
            checked[key[3:]] = False
        elif key in TRL_KEYS:
            raise ValueError(_trl_answer(key, value))
        elif not key:
            raise ValueError(f"{_quoted([value] if isinstance(value, str) else value)} belongs to no key. Write `--key value`.")
        elif not is_env_enabled("ALLOW_EXTRA_ARGS"):
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"`{key}` is not a key of LLaMA-Factory or of `stage: grpo`. The nearest is `{near}`: write that, or "
                f"leave `{key}` out."
            )
    return checked


def _trl_answer(key: str, value: Any) -> str:
    entry = TRL_KEYS[key]
    if entry.ours is None:
        return f"`{key}` is a key of TRL that `stage: grpo` does not have: {entry.note}. Leave it out."
    return f"`{key}` is TRL's name: write `{entry.ours}: {_shown(entry.convert(value))}` instead of `{key}: {_shown(value)}`."


def _hints() -> dict[str, Any]:
    """The type of every key that may be written."""
    hints: dict[str, Any] = {}
    for cls in ARGUMENT_CLASSES:
        resolved = get_type_hints(cls)
        hints.update({spec.name: resolved[spec.name] for spec in dataclasses.fields(cls) if spec.init})
    return hints


def _defaults() -> dict[str, Any]:
    return {
        spec.name: spec.default_factory() if spec.default is dataclasses.MISSING else spec.default  # type: ignore[misc]
        for cls in ARGUMENT_CLASSES
        for spec in dataclasses.fields(cls)
        if spec.init
    }


# Types


def _check_types(values: dict[str, Any]) -> dict[str, Any]:
    hints = _hints()
    return {key: _as_hinted(key, value, hints[key]) for key, value in values.items()}


def _as_hinted(key: str, value: Any, hint: Any) -> Any:
    """The value in its key's type, as argparse would read it from the same text."""
    is_union = get_origin(hint) in (Union, UnionType)
    members = list(get_args(hint) if is_union else (hint,))
    if value is None:
        if hint is Any or NoneType in members:
            return None
        raise ValueError(f"`{key}` has no value, and takes {_expected(members)}. Give it one, or leave the line out.")
    members = [member for member in members if member is not NoneType]

    enums = [member for member in members if isclass(member) and issubclass(member, Enum)]
    if enums:
        return _choice(key, value, [item.value for enum in enums for item in enum])
    if len(members) == 1 and get_origin(members[0]) is Literal:
        return _choice(key, value, get_args(members[0]))
    if key in _COMMA_LISTS and isinstance(value, list | tuple):
        return ",".join(_convert(key, item, str, members) for item in value)
    if key in _ALSO_ACCEPTED:
        members = [_ALSO_ACCEPTED[key], *members]
    if bool in members and str(value).lower() in ("true", "false"):
        return _to_bool(value)
    return _first_that_fits(key, value, members)


def _choice(key: str, value: Any, choices: Iterable[Any]) -> Any:
    choices = list(choices)
    value = value.value if isinstance(value, Enum) else value
    if value is False and "no" in choices:  # YAML reads `no` as a boolean
        return "no"
    if not isinstance(value, bool) and value in choices:
        return value
    hint = _CONVERTED_VALUES.get((key, _shown(value)))
    if hint is None and (near := difflib.get_close_matches(str(value), map(str, choices), n=1)):
        hint = near[0]
    raise ValueError(
        f"`{key}: {_shown(value)}` is not possible: it is one of {', '.join(map(str, choices))}."
        + (f" Write `{key}: {hint}`." if hint else "")
    )


def _first_that_fits(key: str, value: Any, members: list[Any]) -> Any:
    for member in members:
        plain = get_origin(member) or member
        if member is Any or (isclass(plain) and type(value) is plain and plain is not float):
            return value
    for member in members:
        try:
            return _convert(key, value, member, members)
        except ValueError:
            continue
    raise _wrong_type(key, value, members)


def _convert(key: str, value: Any, member: Any, members: list[Any]) -> Any:
    plain = get_origin(member) or member
    converter = _CONVERTERS.get(plain)
    if converter is None:  # a class of its own, such as a path: the host's to check
        return value
    try:
        return converter(value)
    except (TypeError, ValueError) as error:
        raise _wrong_type(key, value, members) from error


def _wrong_type(key: str, value: Any, members: list[Any]) -> ValueError:
    expected = _expected([str] if key in _COMMA_LISTS else members)
    return ValueError(f"`{key}: {_shown(value)}` is not possible: it takes {expected}. Mend the value, or leave the line out.")


def _to_bool(value: Any) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    text = str(value).lower()
    if not isinstance(value, bool | int | str) or text not in known:
        raise ValueError(value)
    return known[text]


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(value)
    try:
        return int(value) if not isinstance(value, float) else _whole(value)
    except ValueError:
        return _whole(float(value))  # "1e3"


def _whole(value: float) -> int:
    if not value.is_integer():
        raise ValueError(value)
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(value)
    number = value if isinstance(value, int) else float(value)  # an int may mean a count, as in `val_size: 100`
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _to_str(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(value)
    return str(value)


def _to_dict(value: Any) -> dict[str, Any]:
    value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise TypeError(value)
    return dict(value)


def _to_list(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [item.strip() for item in value.split(",")]
    if not isinstance(value, list | tuple):
        raise TypeError(value)
    return list(value)


_CONVERTERS: Mapping[Any, Callable[[Any], Any]] = MappingProxyType(
    {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str, dict: _to_dict, list: _to_list}
)
_TYPE_NAMES = MappingProxyType(
    {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", dict: "a mapping", list: "a list"}
)


def _expected(members: list[Any]) -> str:
    names = [_TYPE_NAMES.get(get_origin(member) or member, str(member)) for member in members if member is not NoneType]
    return " or ".join(dict.fromkeys(names))


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(keys: Iterable[Any]) -> str:
    return ", ".join(f"`{key}`" for key in keys)
