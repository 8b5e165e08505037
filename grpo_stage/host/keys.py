"""The keys that the user wrote: read from YAML or flags, and refused if they are unknown."""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from grpo_stage.algorithm.conditions import shown
from grpo_stage.algorithm.refusals import apart
from grpo_stage.host.configuration_file import RawArguments, resolved


@dataclass(frozen=True, slots=True)
class TRLKey:
    """The counterpart of a key of TRL's GRPOConfig or GRPOTrainer."""

    ours: str | None
    """The key of this stage; None if there is no counterpart."""
    convert: Callable[[Any], Any] = lambda value: value
    note: str = ""


def _of_bool(when_true: str, when_false: str) -> Callable[[Any], str]:
    return lambda value: when_true if str(value).lower() in ("true", "1") else when_false


def _as_regex(value: Any) -> str:
    return json.dumps({"regex": value})


_SERVER = (
    "servers are plain `vllm serve` here, started as `grpo-stage serve` says, named in `vllm_server_urls`, and have "
    "to be there when the run begins"
)
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
        "ds3_gather_for_generation": TRLKey(
            None,
            note="under ZeRO-3 vLLM gets the weights a layer at a time, and `rollout_backend: hf` gathers them all",
        ),
        "generation_kwargs": TRLKey(None, note="write the keys themselves, such as `temperature` or `top_p`"),
        "use_transformers_paged": TRLKey(None, note="`rollout_backend: vllm` has a paged cache"),
        "cache_implementation": TRLKey(None, note="`rollout_backend: vllm` has a paged cache"),
        "vllm_mode": TRLKey("rollout_backend", lambda value: "vllm_server" if value == "server" else "vllm"),
        "vllm_server_base_url": TRLKey("vllm_server_urls"),
        "vllm_server_host": TRLKey("vllm_server_urls", lambda value: f"http://{value}:8000"),
        "vllm_server_port": TRLKey("vllm_server_urls", lambda value: f"http://localhost:{value}"),
        "vllm_server_timeout": TRLKey(None, note=_SERVER),
        "vllm_group_port": TRLKey(None, note=_SERVER),
        "vllm_model_impl": TRLKey(None, note="vLLM's own options go into `vllm_config`, a mapping"),
        "vllm_tensor_parallel_size": TRLKey("vllm_tensor_parallel"),
        "vllm_enable_sleep_mode": TRLKey("vllm_sleep", _of_bool("1", "0")),
        "vllm_guided_decoding_regex": TRLKey("structured_outputs", _as_regex),
        "vllm_structured_outputs_regex": TRLKey("structured_outputs", _as_regex),
        "vllm_importance_sampling_correction": TRLKey("rollout_correction", _of_bool("token", "none")),
        "vllm_importance_sampling_cap": TRLKey("rollout_correction_max"),
        "vllm_importance_sampling_mode": TRLKey(
            None,
            note="`rollout_correction` says whether tokens or sequences, `rollout_correction_mode` what with them",
        ),
        "vllm_importance_sampling_clip_max": TRLKey("rollout_correction_max"),
        "vllm_importance_sampling_clip_min": TRLKey("rollout_correction_min"),
        "multi_objective_aggregation": TRLKey(
            "advantage_estimator", lambda value: "gdpo" if value == "normalize_then_sum" else "grpo"
        ),
        "normalize_advantages": TRLKey("scale_rewards", _of_bool("batch", "none")),
        "use_adaptive_entropy": TRLKey(None, note="`entropy_target` switches it on"),
        "entropy_coef_min": TRLKey(None, note="with `entropy_target` the lowest coefficient is 0"),
        "use_liger_loss": TRLKey(None, note="`max_tokens_per_micro_batch` bounds the memory of the loss"),
        "router_aux_loss_coef": TRLKey("moe_aux_loss_coef"),
        "reward_processing_classes": TRLKey(
            None, note="a `reward_model` reads the policy's tokens, and is trained with LLaMA-Factory's `stage: rm`"
        ),
        "num_generations_eval": TRLKey("eval_num_generations"),
        "max_tool_calling_iterations": TRLKey("max_turns", lambda value: int(value) + 1),  # and the answer's turn
        "environment_factory": TRLKey("environment", note="name the class as `path/file.py:Class`"),
    }
)


def read(raw: RawArguments) -> dict[str, Any]:
    """The mapping of `as_written`, with references to other keys and to the environment resolved.

    Raises:
        ValueError: see `configuration_file.resolved`.
    """
    return resolved(as_written(raw))


def as_written(raw: RawArguments) -> dict[str, Any]:
    """The arguments as a mapping. Of flags, `--key` alone is True, and several values are a list.

    If a value ends with a comma, the shell has split a text at its spaces: `--reward_funcs accuracy, format`.
    """
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
    return {key: _of_flag(items) for key, items in values.items()}


def _of_flag(items: list[str]) -> Any:
    if not items:
        return True
    return " ".join(items) if len(items) == 1 or any(item.endswith(",") for item in items[:-1]) else items


def known_keys(values: Mapping[str, Any], hints: Mapping[str, Any], allow_others: bool) -> dict[str, Any]:
    """The values whose keys are in `hints`.

    Raises:
        ValueError: for a key of TRL, naming ours; for another unknown key, naming the nearest, unless `allow_others`.
    """
    checked: dict[str, Any] = {}
    for key, value in values.items():
        with apart():
            if (name := _known_key(key, value, hints, allow_others)) is not None:
                checked[name] = False if name != key else value
    return checked


def _known_key(key: Any, value: Any, hints: Mapping[str, Any], allow_others: bool) -> str | None:
    """The key; without its `no_` if it is argparse's negation of a flag; None for another that is allowed."""
    if not isinstance(key, str):
        raise ValueError(f"`{key}: {shown(value)}` has {key!r} for a key, which is no text. Write a key's name.")
    if key in hints:
        return key
    if key.startswith("no_") and hints.get(key[3:]) is bool:
        return key[3:]
    if key in TRL_KEYS:
        raise ValueError(_trl_answer(key, value))
    if not key:
        raise ValueError(
            f"{quoted([value] if isinstance(value, str) else value)} belongs to no key. Write `--key value`."
        )
    if not allow_others:
        near = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"`{key}` is not a key of LLaMA-Factory or of `stage: grpo`. The nearest is `{near}`: write that, or "
            f"leave `{key}` out."
        )
    return None


def _trl_answer(key: str, value: Any) -> str:
    entry = TRL_KEYS[key]
    if entry.ours is None:
        return f"`{key}` is a key of TRL that `stage: grpo` does not have: {entry.note}. Leave it out."
    ours = f"{entry.ours}: {shown(entry.convert(value))}"
    return f"`{key}` is TRL's name: write `{ours}` instead of `{key}: {shown(value)}`."


def quoted(keys: Iterable[Any]) -> str:
    return ", ".join(f"`{key}`" for key in keys)
