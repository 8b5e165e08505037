"""What a run is refused for before a model is loaded: the tables of `rules.py`, and what takes a look at files.

`refuse_impossible` works on the keys alone, before the host parses them, so that nothing of the host's has run yet;
`refuse_unfit` on the parsed arguments, with the model's config and a checkpoint's state file read from disk.
"""

import difflib
import json
import math
import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from llamafactory.data.template import TEMPLATES
from llamafactory.data.tool_utils import TOOLS
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType, get_last_checkpoint
from transformers.training_args import trainer_log_levels

from grpo_stage.algorithm.catalog import OFF_POLICY_KEYS
from grpo_stage.host.adapters import adapter_config, adapter_folder, is_adapter_on_hub, items
from grpo_stage.host.bounds import refuse_out_of_bounds
from grpo_stage.host.coercion import as_plain, did_you_mean
from grpo_stage.host.dataset_files import check_descriptions
from grpo_stage.host.log import get_logger
from grpo_stage.host.model_files import config_of
from grpo_stage.host.other_models import arguments_for
from grpo_stage.host.recipe import check_checkpoint, recipe_of
from grpo_stage.host.rules import RULES, UNSUPPORTED, USE_HF, VLLM_RULES, wants_best
from grpo_stage.records.evaluation import rewarding_metrics
from grpo_stage.rewards.models.reward_model import LORA_EXTRAS, PLAIN_LORA, refuse_extras
from grpo_stage.rollout.engines.vllm_options import refuse_options
from grpo_stage.survival.run_lock import refuse_used


if TYPE_CHECKING:
    from grpo_stage.host.parser import RunArguments


logger = get_logger(__name__)

_MAY_NAME_CODE = (
    *("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"),
    *("generation_config.json", "video_preprocessor_config.json"),
)
"""Files of a model in which `auto_map` names the code that its repository brings."""
_KNOWN_NAMES = MappingProxyType(
    {
        "template": TEMPLATES,
        "tool_format": TOOLS,
        "log_level": trainer_log_levels,
        "log_level_replica": trainer_log_levels,
        "ddp_backend": ("nccl", "gloo", "mpi", "ccl", "xccl", "hccl", "cncl", "mccl"),
    }
)


def refuse_impossible(values: SimpleNamespace, given: Collection[str]) -> None:
    """Refuse what can be told from the keys and from small local files.

    Args:
        values: every key of the host and of this stage, defaults included; as written, lists still comma-separated.
            A `vllm_*` key that the user did not write is None.
        given: the keys that the user wrote.

    Raises:
        ValueError: naming the value, the rule, the reason and the remedy.
    """
    for entry in UNSUPPORTED:
        for key in entry.keys.split():
            if key in given and (value := getattr(values, key)) not in entry.harmless:
                raise ValueError(
                    f"`{key}: {_yaml(value)}` is not possible with `stage: grpo`: {entry.reason}. {entry.remedy}"
                )

    refuse_out_of_bounds(vars(values))
    for rule in (*RULES, *VLLM_RULES):
        if (refusal := rule.refusal(values, _yaml)) is not None:
            raise ValueError(refusal)

    for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise ValueError(
                f"{variable} is set, as `accelerate launch` does for DeepSpeed and FSDP: sharded weights were not "
                "verified in `stage: grpo`. Launch with `llamafactory-cli train`, which uses DDP on several devices."
            )

    adapters = items(values.adapter_name_or_path)
    for i, adapter in enumerate(adapters):
        # The host trains the last one, and merges the others into the model.
        is_trained = i == len(adapters) - 1 and not values.create_new_adapter
        _check_adapter(adapter, values, is_served=is_trained and values.rollout_backend == "vllm")
    if values.reward_model is not None and values.reward_model_type == "lora":
        _check_reward_adapter(values.reward_model)
    _check_names(values)
    _check_mixing(values)
    keys = [(key, name) for key in ("dataset", "eval_dataset") for name in items(getattr(values, key))]
    check_descriptions(keys, values.dataset_dir)
    _check_best_metric(values)


def refuse_unfit(arguments: "RunArguments") -> None:
    """Refuse what takes the parsed arguments to tell, and say what is allowed but slow or biased.

    Raises:
        ValueError: naming the value, the rule, the reason and the remedy.
    """
    if arguments.finetuning.rollout_backend == "vllm" and arguments.model.vllm_config:
        refuse_options(arguments.model.vllm_config, on_cpu=arguments.training.device.type == "cpu")
    _check_model_config(arguments)
    _check_reward_model_config(arguments)
    if arguments.finetuning.ref_model is not None:
        config_of("ref_model", arguments_for(arguments.model, arguments.finetuning.ref_model))
    if arguments.training.should_save:  # other nodes need not see its disk
        _check_output_folder(arguments.training.output_dir)
    _check_resume(arguments)
    _warn(arguments)


def _check_adapter(adapter: str, values: SimpleNamespace, is_served: bool) -> None:
    config = adapter_config(adapter, values.adapter_folder)
    if config is None:
        if is_adapter_on_hub(adapter):
            return
        raise ValueError(
            f"`adapter_name_or_path: {adapter}` is no adapter: there is no adapter_config.json in "
            f"{adapter_folder(adapter, values.adapter_folder)}. Give the folder that LoRA training wrote (its "
            "`output_dir`); a whole model goes into `model_name_or_path`."
        )
    if not is_served:
        return
    unserved = [
        f"`{key}: {_yaml(config[key])}`"
        for key in LORA_EXTRAS  # as `rollout.weights` refuses them too
        if config.get(key) and config[key] != PLAIN_LORA.get(key)
    ]
    if unserved:
        raise ValueError(
            f"`adapter_name_or_path: {adapter}` is not possible with `rollout_backend: vllm`: its adapter_config.json "
            f"has {', '.join(unserved)}, which vLLM does not serve. {USE_HF}."
        )


def _check_reward_adapter(path: str) -> None:
    config = adapter_config(path, None, "reward_model")
    if config is not None:
        refuse_extras(config, path)
    elif not is_adapter_on_hub(path):
        raise ValueError(
            f"`reward_model: {path}` with `reward_model_type: lora` (the default) is no adapter: there is no "
            f"adapter_config.json in {adapter_folder(path, None)}. Give the folder that LLaMA-Factory's `stage: rm` "
            "wrote with LoRA, or write `reward_model_type: full` for a whole model."
        )


def _check_names(values: SimpleNamespace) -> None:
    """Names that the host, or transformers, looks up after the model is loaded, or answers without a remedy."""
    for key, known in _KNOWN_NAMES.items():
        name = getattr(values, key)
        if name is not None and name not in known:
            raise ValueError(
                f"`{key}: {name}` is not known. {did_you_mean(name, known)}Name one of {', '.join(sorted(known))}."
            )
    names = [values.report_to] if isinstance(values.report_to, str) else list(values.report_to or ())
    if names in (["none"], ["all"]):
        return
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"`report_to: {name}` is not known. {did_you_mean(name, [*INTEGRATION_TO_CALLBACK, 'none'])}Write "
                f"`none` or `all`, or one or a YAML list of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
            )


def _check_mixing(values: SimpleNamespace) -> None:
    probabilities = items(values.interleave_probs)
    if not probabilities:
        return
    shown = f"`interleave_probs: {','.join(map(str, probabilities))}`"
    if values.mix_strategy == "concat":
        raise ValueError(
            f"{shown} has no effect with `mix_strategy: concat` (the default). Write `mix_strategy: "
            "interleave_under`, or leave `interleave_probs` out."
        )
    try:
        numbers = [float(probability) for probability in probabilities]
    except ValueError as error:
        raise ValueError(f"{shown} must be numbers, one for each dataset. Write for example `0.5,0.5`.") from error
    if not all(number >= 0 for number in numbers) or not math.isclose(sum(numbers), 1, abs_tol=1e-6):
        raise ValueError(f"{shown} must be probabilities that sum to 1. Write for example `0.5,0.5` for two datasets.")
    for key in ("dataset", "eval_dataset"):
        names = items(getattr(values, key))
        if names and len(names) != len(numbers):
            raise ValueError(
                f"{shown} has {len(numbers)} values for the {len(names)} datasets of `{key}: {','.join(names)}`. Give "
                "one for each, in the same order."
            )


def _check_best_metric(values: SimpleNamespace) -> None:
    if not wants_best(values):
        return
    metric = values.metric_for_best_model
    functions = [name.rpartition(":")[2].strip() for name in items(values.reward_funcs)]
    logged = rewarding_metrics(
        functions,
        values.eval_num_generations or values.num_generations,
        items(values.eval_dataset),
    )
    if metric is None:
        raise ValueError(
            "`metric_for_best_model` is missing: `load_best_model_at_end`, `early_stopping_steps` and `save_strategy: "
            "best` go by it. Write `metric_for_best_model: eval_reward`."
        )
    if f"eval_{metric.removeprefix('eval_')}" not in logged:
        near = difflib.get_close_matches(metric, logged, n=1)
        raise ValueError(
            f"`metric_for_best_model: {metric}` is no reward that this run's evaluations log. "
            f"{f'Did you mean `{near[0]}`? ' if near else ''}There are: {', '.join(logged)}."
        )
    for function, weight in zip(functions, items(values.reward_weights), strict=False):
        if f"rewards/{function}/" in metric and _is_negative(weight):
            raise ValueError(
                f"`metric_for_best_model: {metric}` would keep the model with the most of `{function}`, which is "
                f"punished: its weight in `reward_weights` is {weight}. Write `metric_for_best_model: eval_reward`."
            )


def _is_negative(weight: Any) -> bool:
    try:
        return float(weight) < 0
    except (TypeError, ValueError):
        return False  # no number: refused with the other weights


def _check_model_config(arguments: "RunArguments") -> None:
    model, data, generating = arguments.model, arguments.data, arguments.generating
    config = config_of("model_name_or_path", model)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    tuning = arguments.finetuning.finetuning_type
    if method is not None and tuning not in ("lora", "oft"):
        raise ValueError(
            f"`finetuning_type: {tuning}` is not possible: `model_name_or_path: {model.model_name_or_path}` is "
            f"quantized with {method}, and quantized weights cannot be trained. Write `finetuning_type: lora`, or "
            "train the unquantized model."
        )
    if arguments.finetuning.rollout_backend == "vllm" and method not in (None, "bitsandbytes"):
        raise ValueError(
            f"`model_name_or_path: {model.model_name_or_path}` is quantized with {method}, which is not possible with "
            "`rollout_backend: vllm`: the engine starts from dequantized weights, and only bitsandbytes' are known "
            f"how to dequantize. {USE_HF}, or train the unquantized model with `quantization_bit: 4`."
        )
    limit = _positions(config)
    needed = data.cutoff_len + generating.max_new_tokens
    if limit is None:
        return
    if needed > limit:
        raise ValueError(
            f"`max_new_tokens: {generating.max_new_tokens}` leaves no room: with `cutoff_len: {data.cutoff_len}` that "
            f"is up to {needed} tokens, and {model.model_name_or_path} knows {limit} positions. Lower `cutoff_len` "
            "(the room for a prompt) or `max_new_tokens` (the room for a completion), or extend the model with "
            "`rope_parameters` in its config.json."
        )
    if arguments.finetuning.rollout_backend == "vllm" and model.vllm_maxlen > limit:
        raise ValueError(
            f"`vllm_maxlen: {model.vllm_maxlen}` is not possible: {model.model_name_or_path} knows {limit} positions. "
            f"Leave it out for the {needed} that `cutoff_len` and `max_new_tokens` make."
        )


def _check_reward_model_config(arguments: "RunArguments") -> None:
    path = arguments.finetuning.reward_model
    if path is None or arguments.finetuning.reward_model_type != "full":  # `lora` has the policy's positions
        return
    prompt, completion = arguments.data.cutoff_len, arguments.generating.max_new_tokens
    limit = _positions(config_of("reward_model", arguments_for(arguments.model, path)))
    if limit is not None and prompt + completion > limit:
        raise ValueError(
            f"`reward_model: {path}` knows {limit} positions, and `cutoff_len: {prompt}` and `max_new_tokens: "
            f"{completion}` make texts of up to {prompt + completion} tokens: what comes after the last position that "
            "it was trained on would be scored at random. Lower one of them, or name a reward model for longer texts."
        )


def _positions(config: Any) -> int | None:
    """How many tokens a model was made for, as far as its config says."""
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    if limit is not None and rope.get("factor") and rope.get("original_max_position_embeddings"):
        limit = max(limit, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return limit


def _check_output_folder(output_dir: str) -> None:
    """A folder that files can be written to, or that can be made; nothing of it is left."""
    path = Path(output_dir).absolute()
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir():
        where = "is a file" if nearest == path else f"is below {nearest}, which is a file"
        raise ValueError(f"`output_dir: {output_dir}` {where}. Name a folder, for example `output_dir: saves/my-run`.")
    try:
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".grpo-stage-"):
            pass
    except OSError as error:
        raise ValueError(
            f"`output_dir: {output_dir}` cannot be written to: {error.strerror} ({nearest}). Name a folder that you "
            "may write to, on a disk with room."
        ) from error


def _check_resume(arguments: "RunArguments") -> None:
    training = arguments.training
    if training.should_save:  # the rank that will own it
        refuse_used(training.output_dir)  # whose checkpoints may come and go while they are looked at
    if training.resume_from_checkpoint is True:
        training.resume_from_checkpoint = (
            get_last_checkpoint(training.output_dir) if os.path.isdir(training.output_dir) else None
        )
        if training.resume_from_checkpoint is None:
            raise ValueError(
                f"`resume_from_checkpoint: true`, but there is no checkpoint in `output_dir: {training.output_dir}`. "
                "Leave `resume_from_checkpoint` out to start afresh, or name the checkpoint's folder."
            )
    if not training.resume_from_checkpoint:
        _check_fresh_start(arguments)
        return
    folder = Path(training.resume_from_checkpoint)
    if not folder.is_dir():
        raise ValueError(
            f"`resume_from_checkpoint: {folder}` is no folder. Name a checkpoint's folder "
            "(`<output_dir>/checkpoint-<step>`), or leave it out to start afresh."
        )
    check_checkpoint(folder, recipe_of(arguments))


def _check_fresh_start(arguments: "RunArguments") -> None:
    """A run that starts afresh deletes an earlier run's checkpoints in its folder: only where that is wanted."""
    model, finetuning, output_dir = arguments.model, arguments.finetuning, arguments.training.output_dir
    last = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if last is None:
        return
    if not arguments.training.overwrite_output_dir:
        raise ValueError(
            f"`resume_from_checkpoint: false` with an earlier run's {os.path.basename(last)} in `output_dir: "
            f"{output_dir}`: the two runs' checkpoints could not be told apart. Choose another `output_dir`, or write "
            "`overwrite_output_dir: true` to have the earlier ones deleted."
        )
    for key, path in (
        ("model_name_or_path", model.model_name_or_path),
        ("ref_model", finetuning.ref_model),
        ("reward_model", finetuning.reward_model),
        *(("adapter_name_or_path", adapter) for adapter in items(model.adapter_name_or_path)),
        *(("ref_model_adapters", adapter) for adapter in items(finetuning.ref_model_adapters)),
        *(("reward_model_adapters", adapter) for adapter in items(finetuning.reward_model_adapters)),
    ):
        if path and str(Path(path).resolve()).startswith(os.path.join(Path(output_dir).resolve(), "checkpoint-")):
            raise ValueError(
                f"`{key}: {path}` is in the `output_dir` that `overwrite_output_dir: true` empties of checkpoints. "
                "Choose another `output_dir`."
            )


def _warn(arguments: "RunArguments") -> None:
    generating, training = arguments.generating, arguments.training
    neutral = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    skewed = [
        f"`{key}: {getattr(generating, key)}`" for key, value in neutral.items() if getattr(generating, key) != value
    ]
    if skewed:
        logger.warning_rank0(
            f"{', '.join(skewed)}: completions are sampled from another distribution than the policy that is trained "
            "on them, which biases every gradient. Leave these keys out unless you mean it."
        )
    finetuning = arguments.finetuning
    if arguments.model.trust_remote_code:
        others = (finetuning.ref_model, finetuning.reward_model if finetuning.reward_model_type == "full" else None)
        for model in dict.fromkeys(filter(None, (arguments.model.model_name_or_path, *others))):
            _say_remote_code(model)
    uses = finetuning.num_iterations * finetuning.steps_per_generation
    is_off_policy = uses > 1 or finetuning.dynamic_sampling  # whose groups may wait for a later step
    if not is_off_policy and (idle := sorted(arguments.given & OFF_POLICY_KEYS)):
        logger.warning_rank0(
            f"{', '.join(f'`{key}: {getattr(finetuning, key)}`' for key in idle)}: without effect, since this run "
            "trains on each rollout once. The policy is then the one that sampled: every ratio is 1, and nothing is "
            "clipped. Write for example `steps_per_generation: 4` or `num_iterations: 2` if you mean to clip."
        )
    schedule = SchedulerType(training.lr_scheduler_type).value
    if finetuning.dynamic_sampling and training.max_steps <= 0 and not schedule.startswith("constant"):
        logger.warning_rank0(
            f"`lr_scheduler_type: {schedule}` with `dynamic_sampling: true`: the schedule is laid out for the most "
            "steps that there can be, and an epoch has fewer if groups are left out, so that the run may end far up "
            "on it. Write `max_steps`, or `lr_scheduler_type: constant_with_warmup`."
        )
    loss_type = finetuning.as_written.get("loss_type", finetuning.loss_type)
    if finetuning.importance_sampling_level != "token" and is_off_policy and "epsilon" not in arguments.given:
        logger.warning_rank0(
            f"`epsilon: {finetuning.epsilon}` by default, with the ratio of the whole completion (`loss_type: "
            f"{loss_type}`), which moves far less than a token's: hardly anything will be clipped. GSPO's "
            "paper has `epsilon: 3.0e-4` and `epsilon_high: 4.0e-4`."
        )
    if training.device.type == "cpu" and (training.bf16 or training.fp16 or arguments.finetuning.pure_bf16):
        logger.warning_rank0(
            "`bf16: true` or `fp16: true` on a CPU: most processors compute these 8 to 25 times slower than float32. "
            "Leave the key out."
        )


def _say_remote_code(model: str) -> None:
    said = "`trust_remote_code: true`: Python code from the repository of the model"
    leave = "Leave the key out unless you have read that code."
    if not os.path.isdir(model):
        logger.warning_rank0(f"{said} {model} runs in this process with all your rights, if there is any. {leave}")
        return
    configs = [Path(model, name) for name in _MAY_NAME_CODE]
    if any("auto_map" in file.read_text(encoding="utf-8", errors="replace") for file in configs if file.is_file()):
        files = ", ".join(sorted(file.name for file in Path(model).glob("*.py"))) or "another repository's files"
        logger.warning_rank0(f"{said} runs in this process with all your rights: {files} of {model}. {leave}")
    else:
        logger.info_rank0(f"{said} may run. The folder {model} names none, so that none of it does.")


def _yaml(value: Any) -> str:
    value = as_plain(value)
    return json.dumps(value) if value is None or isinstance(value, bool | dict | list) else str(value)
