"""Command lines of ms-swift (`swift rlhf --rlhf_type grpo ...`), as they stand in a shell script."""

import json
import re
import shlex
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from grpo_stage.host.keys import as_written
from grpo_stage.tools.porting import batch, rewards
from grpo_stage.tools.porting.port import (
    IN_REWARD,
    OTHER_REWARD_MODEL,
    Entry,
    Fate,
    Port,
    leave_evaluation,
    put_cispo_bound,
    put_servers,
)


NUM_DEVICES = "NPROC_PER_NODE"
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_SAID = "ms-swift's default"
_SPEED = "it decides how fast the run is and how much memory it takes"

TABLE: Mapping[str, Entry] = MappingProxyType(
    {
        NUM_DEVICES: Entry(note="it says how many devices train there"),
        "CUDA_VISIBLE_DEVICES": Entry(note="set it for the command here as well"),
        "rlhf_type": Entry(note="`stage: grpo`"),
        "model": Entry("model_name_or_path"),
        "model_type": Entry(note="transformers finds the type in the model's config"),
        "adapters": Entry("adapter_name_or_path", lambda value: value if isinstance(value, str) else ",".join(value)),
        "ref_adapters": Entry("ref_model_adapters"),
        "system": Entry("default_system"),
        "max_length": Entry("cutoff_len", note="ms-swift counts the prompt, and leaves longer ones out as we do"),
        "truncation_strategy": Entry(
            "overlong_prompts", lambda value: "drop" if value == "delete" else "truncate", "`truncate` keeps the end"
        ),
        "lora_rank": Entry("lora_rank"),
        "target_modules": Entry(
            "lora_target",
            lambda value: "all" if value == "all-linear" else value if isinstance(value, str) else ",".join(value),
        ),
        "quant_bits": Entry("quantization_bit"),
        "quant_method": Entry("quantization_method"),
        "bnb_4bit_quant_type": Entry("quantization_type"),
        "attn_impl": Entry(
            "flash_attn", lambda value: {"flash_attn": "fa2", "flash_attention_2": "fa2"}.get(value, value)
        ),
        "dataset_num_proc": Entry("preprocessing_num_workers"),
        "dataset_shuffle": Entry("disable_shuffling", lambda value: not _as_bool(value)),
        "dynamic_sample": Entry("dynamic_sampling", lambda value: _as_bool(value)),
        "overlong_filter": Entry("mask_truncated_completions", lambda value: _as_bool(value)),
        "tau_pos": Entry("sapo_temperature_pos", float),
        "tau_neg": Entry("sapo_temperature_neg", float),
        "sleep_level": Entry("vllm_sleep", int),
        "vllm_max_model_len": Entry("vllm_maxlen", int),
        "rollout_importance_sampling_threshold": Entry("rollout_correction_max", float),
        "off_policy_sequence_mask_delta": Entry("off_policy_mask_threshold", float),
        "torch_dtype": Entry(note="`bf16` sets the precision here"),
        "offload_optimizer": Entry(note=_SPEED),
        "offload_model": Entry(note=_SPEED),
        "move_model_batches": Entry(note=_SPEED),
        "vllm_enable_lora": Entry(note="the engine always serves the adapter as it is"),
        "vllm_mode": Entry(note="the engine shares the device that trains"),
        "async_generate": Entry(
            note="rollouts are one step late there; here every rollout comes from the present policy",
            changes_learning=True,
        ),
        "load_from_cache_file": Entry("overwrite_cache", lambda value: not _as_bool(value)),
        "use_hf": Entry(
            note="set USE_MODELSCOPE_HUB=1 for ModelScope's hub; the Hugging Face hub is the default here"
        ),
        "check_model": Entry(note="no such check here"),
        "external_plugins": Entry(
            note="reward classes of ms-swift: write them as functions of your own (docs/rewards.md)",
            changes_learning=True,
        ),
        "columns": Entry(note="write it into the dataset's description (`dataset_dir`)", changes_learning=True),
        "reward_model": Entry(note=OTHER_REWARD_MODEL, changes_learning=True),
        "reward_model_type": Entry(note="it is the type of the `reward_model`, which is left"),
        "reward_adapters": Entry(note="they are of the `reward_model`, which is left"),
        "max_turns": Entry(note="turns of a `multi_turn_scheduler`; here they are those of `tools` (docs/tools.md)"),
        "freeze_parameters_ratio": Entry(note="use `finetuning_type: freeze`", changes_learning=True),
    }
)


def read_command(text: str) -> dict[str, Any]:
    """The options of the `swift rlhf` command in a shell script, with the variables that are set for it.

    Raises:
        ValueError: if there is no such command.
    """
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise ValueError(f"The command line cannot be read: {error}. Close its quotes.") from error
    position = next((i for i in range(len(words) - 1) if words[i : i + 2] == ["swift", "rlhf"]), None)
    if position is None:
        raise ValueError("There is no `swift rlhf --rlhf_type grpo ...` in it.")
    variables = dict(word.split("=", 1) for word in words[:position] if _ASSIGNMENT.match(word))
    options: list[str] = []
    for word in words[position + 2 :]:
        for name, value in variables.items():
            word = word.replace(f"${{{name}}}", value).replace(f"${name}", value)
        options.append(word)
    found = as_written(options)
    kept = {name: variables[name] for name in (NUM_DEVICES, "CUDA_VISIBLE_DEVICES") if name in variables}
    return {**kept, **{key: _typed(value) for key, value in found.items()}}


def port_swift(source: Mapping[str, Any], known: Collection[str], source_devices: int | None, devices: int) -> Port:
    """The options of `read_command` as a recipe of ours."""
    port = Port(source, known)
    is_lora = str(port.get("tuner_type", port.get("train_type", "lora"))) != "full"
    port.put("tuner_type train_type", {"finetuning_type": "lora" if is_lora else "full"}, Fate.RENAMED)
    if not port.has("tuner_type") and not port.has("train_type"):
        port.default("tuner_type", {"finetuning_type": "lora"}, _SAID)
    if is_lora:
        port.default("target_modules", {"lora_target": "all"}, _SAID)
        port.default("lora_alpha", {"lora_alpha": 32}, _SAID)
        port.leave("lora_dropout", "dropout is off in this stage", False)
    else:
        port.leave("adapters", "all weights are trained: export the adapter into the model first", True)
    _dataset(port)
    _batch(port, source_devices, devices)
    defaults: dict[str, dict[str, Any]] = {
        "learning_rate": {"learning_rate": 1.0e-4 if is_lora else 1.0e-5},
        "weight_decay": {"weight_decay": 0.1},
        "adam_beta2": {"adam_beta2": 0.95},
        "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
        "beta": {"beta": 0.04},
        "temperature": {"temperature": 0.9},
        "loss_type": {"loss_type": "grpo"},
        "max_completion_length": {"max_new_tokens": 512},
        "output_dir": {"output_dir": "saves/imported"},
    }
    for key, default in defaults.items():
        port.default(key, default, _SAID)
    if not port.has("use_vllm"):
        port.default("use_vllm", {"rollout_backend": "hf"}, f"{_SAID}; `rollout_backend: vllm` is much faster")
    put_servers(port, _as_bool(port.get("use_vllm", False)))
    if str(port.get("torch_dtype", "bfloat16")) == "bfloat16" and not port.has("bf16"):
        port.put("torch_dtype", {"bf16": True}, Fate.COMPUTED)
    if (mode := port.get("rollout_importance_sampling_mode")) is not None:
        level, _, how = str(mode).partition("_")
        port.put("rollout_importance_sampling_mode", {"rollout_correction": level, "rollout_correction_mode": how})
    if port.get("scale_rewards") == "gdpo":
        is_both = port.get("advantage_estimator", "grpo") != "grpo"
        note = "the one of the two that this stage takes is `gdpo`" if is_both else ""
        port.put(
            "scale_rewards advantage_estimator", {"advantage_estimator": "gdpo"}, note=note, changes_learning=is_both
        )
    _objective(port)
    _evaluation(port)
    models = _several(port.get("reward_model"))  # the last of the functions there
    rewards.port_rewards(
        port,
        [*_several(port.get("reward_funcs")), *models],
        _several(port.get("reward_weights")) or None,
        {**rewards.SWIFT, **dict.fromkeys(models, "it is a reward model")},
        lambda name: None,
    )
    if isinstance(report := port.get("report_to"), list):
        port.put("report_to", {"report_to": report}, Fate.TAKEN)
    port.finish(TABLE)
    return port


def _batch(port: Port, source_devices: int | None, devices: int) -> None:
    group = int(port.get("num_generations", 8))
    made = batch.of_completions(
        int(port.get("per_device_train_batch_size", 1)),
        int(port.get("gradient_accumulation_steps", 1)),
        group,
        source_devices or int(port.get(NUM_DEVICES, 1)),
        devices,
        port.get("steps_per_generation"),
        port.get("generation_batch_size"),
    )
    port.put(
        "per_device_train_batch_size gradient_accumulation_steps steps_per_generation generation_batch_size",
        made.keys,
        Fate.COMPUTED,
        made.note,
        not made.is_exact,
    )


def _objective(port: Port) -> None:
    takes_off = port.get("advantage_estimator", "grpo") != "grpo"
    if _as_bool(port.get("kl_in_reward", takes_off)):
        port.put("kl_in_reward", {}, Fate.LEFT if port.has("kl_in_reward") else Fate.DEFAULT, IN_REWARD, True)
    put_cispo_bound(port)


def _evaluation(port: Port) -> None:
    """There is one if rows are held out; if nothing else is said, at each checkpoint."""
    share = float(port.get("split_dataset_ratio", 0.0))
    how = str(port.get("eval_strategy", port.get("save_strategy", "steps")))
    if port.has("val_dataset") and how != "no":
        note = "describe it in `dataset_dir`, and name it as `eval_dataset`"
        port.leave("val_dataset", note, True)
        port.leave("split_dataset_ratio", "it has no effect beside `val_dataset`", False)
        leave_evaluation(port, "there is no evaluation until `val_dataset` is an `eval_dataset`: write it then", True)
        return
    port.leave("val_dataset", "there is no evaluation", False)
    if share == 0 or how == "no":
        port.leave("split_dataset_ratio", "no rows are held out in a run without an evaluation", share > 0)
        leave_evaluation(port)
        return
    port.put("split_dataset_ratio", {"val_size": share}, Fate.RENAMED)
    port.default("eval_strategy", {"eval_strategy": how}, "ms-swift evaluates where it saves")
    if how == "steps":
        port.default("eval_steps", {"eval_steps": port.get("save_steps", 500)}, "ms-swift evaluates where it saves")


def _dataset(port: Port) -> None:
    written = port.get("dataset", [])
    names = [written] if isinstance(written, str) else list(written)
    if not names:
        return
    info: dict[str, Any] = {}
    for name in names:
        place, _, count = str(name).partition("#")
        entry: dict[str, Any] = {"hf_hub_url": place, "columns": {"prompt": "problem", "response": "solution"}}
        if count.isdigit():
            entry["num_samples"] = int(count)
        info[place.rpartition("/")[2]] = entry
    port.put(
        "dataset",
        {"dataset": ",".join(info), "dataset_dir": info},
        note="ms-swift knows the columns of its datasets by itself: write those of yours into `dataset_dir`, which "
        "holds what a dataset_info.json would",
        changes_learning=True,
    )


def _several(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _typed(value: Any) -> Any:
    if isinstance(value, list):
        return [_typed(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return _as_bool(value)
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _as_bool(value: Any) -> bool:
    return str(value).lower() in ("true", "1")
