"""GRPO recipes of TRL and of Open-R1 (YAML, one level): their keys and the defaults of TRL by its version.

Defaults were read out of the wheels of TRL 0.14 to 0.24. They changed under the names of the keys: a file that does
not write `beta` has 0.04 under TRL 0.18, and 0 under 0.19.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from grpo_stage.tools.porting import batch, rewards
from grpo_stage.tools.porting.port import (
    OTHER_REWARD_MODEL,
    Entry,
    Fate,
    Port,
    leave_evaluation,
    put_cispo_bound,
    put_servers,
)


NEWEST = "0.24"
"""The version that is taken if none is named: the newest one that LLaMA-Factory goes with."""
_FIRST = {
    "learning_rate": 1.0e-6,
    "num_generations": 8,
    "max_completion_length": 256,
    "max_prompt_length": 512,
    "temperature": 0.9,
    "beta": 0.04,
    "loss_type": "grpo",
    "bf16": False,
    "corrects": False,
}
_CHANGES = (
    ("0.16", {"loss_type": "bnpo"}),
    ("0.18", {"temperature": 1.0}),
    ("0.19", {"beta": 0.0}),
    ("0.20", {"bf16": True}),
    ("0.22", {"loss_type": "dapo"}),
    ("0.23", {"corrects": True}),
)

_CUT = {"overlong_prompts": "truncate"}
_HUB = "a recipe that was imported uploads nothing: write it yourself if it is meant"
_OF_A_DEVICE = "it says how the other system shares work between devices"
TABLE: Mapping[str, Entry] = MappingProxyType(
    {
        "system_prompt": Entry("default_system"),
        "chat_template": Entry(
            note="a template of LLaMA-Factory has a name: write `template`, or save the text as the tokenizer's own",
            changes_learning=True,
        ),
        "attn_implementation": Entry(
            "flash_attn",
            lambda value: {"flash_attention_2": "fa2", "flash_attention_3": "fa3", "sdpa": "sdpa"}.get(
                str(value).rpartition("/")[2], "disabled"
            ),
        ),
        "torch_dtype": Entry(
            note="`bf16` sets the precision: weights that are trained are kept in float32 here, and in this type "
            "there (`pure_bf16: true` is that)"
        ),
        "dtype": Entry(note="see `torch_dtype`: `bf16` sets the precision here"),
        "hub_model_id": Entry(note=_HUB),
        "hub_strategy": Entry(note=_HUB),
        "push_to_hub": Entry(note=_HUB),
        "wandb_log_unique_prompts": Entry(note="`log_completions: true` writes all completions to a file"),
        "overwrite_output_dir": Entry(
            note="it deletes an earlier run's checkpoints: write it yourself if it is meant"
        ),
        "gradient_checkpointing_kwargs": Entry(
            "use_reentrant_gc",
            lambda value: bool(value.get("use_reentrant", True)) if isinstance(value, dict) else True,
        ),
        "num_processes": Entry(note=_OF_A_DEVICE),
        "vllm_device": Entry(note="the engine shares the device that trains"),
        "vllm_dtype": Entry(note="the engine has the precision of the run"),
        "vllm_max_model_len": Entry("vllm_maxlen"),
        "callbacks": Entry(note="callbacks of Open-R1 push to a hub and run benchmarks"),
        "benchmarks": Entry(note="`val_size` or `eval_dataset` evaluate a run"),
        "optim_args": Entry("optim_args"),
        "code_language": Entry(note="a setting of rewards that run code"),
        "code_provider": Entry(note="a setting of rewards that run code"),
        "code_eval_test_batch_size": Entry(note="a setting of rewards that run code"),
        "code_eval_scoring_mode": Entry(note="a setting of rewards that run code"),
        "parallel_code_exec_per_proc": Entry(note="a setting of rewards that run code"),
        "cosine_max_len": Entry(
            note="it counts characters, and `max_length` of the reward `length` counts tokens", changes_learning=True
        ),
        "lora_dropout": Entry(note="dropout is off in this stage: the ratio compares two passes of one network"),
        "lora_task_type": Entry(note="every model is a causal one here"),
        "use_rslora": Entry("use_rslora"),
        "bnb_4bit_quant_type": Entry("quantization_type"),
        "use_bnb_nested_quant": Entry("double_quantization"),
        "num_completions_to_print": Entry("num_completions_to_print"),
    }
)


def defaults_of(version: str) -> Mapping[str, Any]:
    """TRL's defaults that matter here.

    Raises:
        ValueError: for a version whose defaults are not known.
    """
    numbers = _numbers(version)
    if not _numbers("0.14") <= numbers < _numbers("0.25"):
        raise ValueError(
            f"`--trl {version}`: the defaults of TRL 0.14 to 0.24 are known here, and those of {version} are not. "
            "Name one of these, and write keys that have another default into the file first."
        )
    values = dict(_FIRST)
    for since, changes in _CHANGES:
        if numbers >= _numbers(since):
            values |= changes
    return values


def port_trl(
    source: Mapping[str, Any], known: Collection[str], version: str, source_devices: int | None, devices: int
) -> Port:
    """A recipe of TRL's or of Open-R1's as one of ours.

    Args:
        source: the file's keys.
        known: keys of LLaMA-Factory and of this stage.
        version: of TRL, whose defaults the file goes with.
        source_devices: how many devices train there; None for what the file says, or one.
        devices: how many train here.
    """
    port = Port(source, known)
    defaults = defaults_of(version)
    said = f"the default of TRL {version}"
    _model(port)
    _dataset(port)
    _batch(port, defaults, source_devices or port.get("num_processes"), devices, said)
    _rollout(port, defaults, said)
    _rewards(port)
    _objective(port, defaults, said)
    _training(port, defaults, said)
    port.finish(TABLE)
    return port


def _model(port: Port) -> None:
    if not port.get("use_peft", False):
        key = "use_peft" if port.has("use_peft") else "finetuning_type"
        fate = Fate.COMPUTED if port.has("use_peft") else Fate.DEFAULT
        port.put(key, {"finetuning_type": "full"}, fate, "TRL trains all weights unless `use_peft` is set")
        port.leave(
            "lora_r lora_alpha lora_target_modules lora_dropout use_rslora lora_modules_to_save use_dora",
            "it has no effect without `use_peft`",
            False,
        )
    else:
        port.put("use_peft", {"finetuning_type": "lora"})
        port.default("lora_r", {"lora_rank": 16}, "TRL's default")
        port.default("lora_alpha", {"lora_alpha": 32}, "TRL's default")
        renamed = {
            "lora_r": "lora_rank",
            "lora_target_modules": "lora_target",
            "lora_modules_to_save": "additional_target",
        }
        for theirs, ours in renamed.items():
            if port.has(theirs):
                value = port.get(theirs)
                text = ",".join(value) if isinstance(value, list) else value
                port.put(theirs, {ours: "all" if text == "all-linear" else text}, Fate.RENAMED)
    for bits, key in ((4, "load_in_4bit"), (8, "load_in_8bit")):
        if port.is_open(key) and port.get(key):
            port.put(key, {"quantization_bit": bits, "quantization_method": "bnb"})
        else:
            port.leave(key, "it is off", False)


def _dataset(port: Port) -> None:
    name = port.get("dataset_name")
    if name is None:
        mixture = "dataset_mixture" if port.has("dataset_mixture") else "dataset"
        port.leave(mixture, "write the `dataset`s into a dataset_info.json (docs/configuration.md)", True)
        return
    key = str(name).rpartition("/")[2]
    configs = port.get("dataset_config", port.get("dataset_configs"))
    subset = configs[0] if isinstance(configs, list) and configs else configs

    def described(split: str) -> dict[str, Any]:
        columns = {"prompt": port.get("dataset_prompt_column", "prompt"), "response": "solution"}
        return {"hf_hub_url": name, **({"subset": subset} if subset else {}), "split": split, "columns": columns}

    info = {key: described(port.get("dataset_train_split", "train"))}
    ours: dict[str, Any] = {"dataset": key}
    if str(port.get("eval_strategy", "no")) not in ("no", "False"):
        info[f"{key}-test"] = described(port.get("dataset_test_split", "test"))
        ours["eval_dataset"] = f"{key}-test"
    else:
        leave_evaluation(port)
    port.put(
        "dataset_name",
        {**ours, "dataset_dir": info},
        note="`dataset_dir` holds what a dataset_info.json would; see that the columns are those of the dataset: the "
        "reference answer is `solution`, as TRL's and Open-R1's rewards want it",
    )
    port.put(
        "dataset_config dataset_configs dataset_prompt_column dataset_train_split dataset_test_split",
        {},
        Fate.RENAMED,
        "part of `dataset_dir`",
    )


def _batch(port: Port, defaults: Mapping[str, Any], source_devices: int | None, devices: int, said: str) -> None:
    port.default("num_generations", {"num_generations": defaults["num_generations"]}, said)
    made = batch.of_completions(
        int(port.get("per_device_train_batch_size", 8)),
        int(port.get("gradient_accumulation_steps", 1)),
        int(port.get("num_generations", defaults["num_generations"])),
        int(source_devices or 1),
        devices,
        port.get("steps_per_generation"),
        port.get("generation_batch_size"),
    )
    keys = "per_device_train_batch_size gradient_accumulation_steps steps_per_generation generation_batch_size"
    there = " ".join(key for key in keys.split() if port.has(key))
    if there:
        port.put(there, made.keys, Fate.COMPUTED, made.note, not made.is_exact)
    else:
        port.default("per_device_train_batch_size", made.keys, f"{said}: {made.note}")


def _rollout(port: Port, defaults: Mapping[str, Any], said: str) -> None:
    port.default("max_completion_length", {"max_new_tokens": defaults["max_completion_length"]}, said)
    port.default("max_prompt_length", {"cutoff_len": defaults["max_prompt_length"], **_CUT}, said)
    if defaults["temperature"] != 1.0:
        port.default("temperature", {"temperature": defaults["temperature"]}, said)
    if port.has("max_prompt_length"):
        port.put(
            "max_prompt_length",
            {"cutoff_len": port.get("max_prompt_length"), **_CUT},
            Fate.RENAMED,
            "TRL keeps the end of a longer prompt",
        )
    if not port.has("use_vllm"):
        port.default("use_vllm", {"rollout_backend": "hf"}, f"{said}; `rollout_backend: vllm` is much faster")
    uses_vllm = bool(port.get("use_vllm", False))
    put_servers(port, uses_vllm)
    if uses_vllm and defaults["corrects"]:
        port.default("vllm_importance_sampling_correction", {"rollout_correction": "token"}, said)


def _rewards(port: Port) -> None:
    names = port.get("reward_funcs")
    model = port.get("reward_model_name_or_path")
    if model is not None:
        port.leave("reward_model_name_or_path", OTHER_REWARD_MODEL, True)
    if names is None and model is None:
        names = ["accuracy", "format", "tag_count"]
    names = [names] if isinstance(names, str) else list(names or [])
    table: dict[str, rewards.Same | str] = {**rewards.OPEN_R1, **rewards.TRL}
    if model is not None:  # which is the first of the functions there
        names, table = [model, *names], table | {model: "it is the reward model"}
    rewards.port_rewards(port, names, port.get("reward_weights"), table, _path_of)


def _path_of(name: str) -> str | None:
    module, _, function = name.rpartition(".")
    return f"{module}:{function}" if module else None


def _objective(port: Port, defaults: Mapping[str, Any], said: str) -> None:
    if defaults["beta"]:
        port.default("beta", {"beta": defaults["beta"]}, said)
    if defaults["loss_type"] != "dapo":
        port.default("loss_type", {"loss_type": defaults["loss_type"]}, said)
    put_cispo_bound(port)
    scale = port.get("scale_rewards")
    if isinstance(scale, bool):
        port.put("scale_rewards", {"scale_rewards": "group" if scale else "none"})


def _training(port: Port, defaults: Mapping[str, Any], said: str) -> None:
    port.default("learning_rate", {"learning_rate": defaults["learning_rate"]}, said)
    if port.get("gradient_checkpointing", True):
        port.leave("gradient_checkpointing", "this stage checkpoints where memory asks for it", False)
    else:
        port.put("gradient_checkpointing", {"disable_gradient_checkpointing": True}, Fate.RENAMED)
    if defaults["bf16"] and not port.get("fp16", False):
        port.default("bf16", {"bf16": True}, said)
    if not port.has("output_dir"):
        port.default("output_dir", {"output_dir": "saves/imported"}, "a run needs a folder")


def _numbers(version: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version.split("."))[:2]
    except ValueError as error:
        raise ValueError(f"`--trl {version}` is no version. Write for example `--trl 0.18`.") from error
