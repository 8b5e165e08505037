"""The record of what a run trains: only the recipe, rows and code that wrote a checkpoint may resume it."""

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamafactory.hparams.finetuning_args import (
    ApolloArguments,
    FreezeArguments,
    GaloreArguments,
    LoraArguments,
    OFTArguments,
)

from grpo_stage.arguments import EVALUATION, LIMITS, MEMORY, MONITORING, GRPOArguments
from grpo_stage.host import facade
from grpo_stage.host.distribution import REPLICATED, ZERO
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.records.redaction import mask
from grpo_stage.rollout.epochs import prompts_of_step, steps_of_epoch, steps_of_run
from grpo_stage.survival.checkpoints import STATE_FILE, is_over, read_state, verify
from grpo_stage.types import Prompt


logger = facade.get_logger(__name__)

BUILT_IN = "grpo-stage "
"""The code of a built-in reward function in `RewardSuite.code` begins with this; the version follows."""
NUM_BLOCKS = 64
"""Prompts are hashed in this many blocks, so that a message can say roughly where they differ."""

_MODEL = """
    model_name_or_path model_revision adapter_name_or_path adapter_folder train_from_scratch rope_scaling resize_vocab
    add_tokens add_special_tokens new_special_tokens_config quantization_bit quantization_method quantization_type
    double_quantization upcast_layernorm moe_aux_loss_coef
"""
_DATA = """
    template tool_format default_system enable_thinking preserve_thinking dataset dataset_dir mix_strategy
    interleave_probs max_samples val_size cutoff_len
"""
_TRAINING = """
    seed per_device_train_batch_size gradient_accumulation_steps world_size learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    bf16 fp16
"""
_LENGTH = "num_train_epochs max_steps"
_FINETUNING = """
    finetuning_type pure_bf16 use_llama_pro use_adam_mini use_muon disable_shuffling ref_model ref_model_adapters
    ref_model_quantization_bit reward_model reward_model_type reward_model_adapters reward_model_quantization_bit
"""
_GENERATING = "max_new_tokens temperature top_p top_k repetition_penalty"
_TUNING_METHODS = (FreezeArguments, LoraArguments, OFTArguments, GaloreArguments, ApolloArguments)
# Under these the learning rate of a step does not depend on the number of steps, so a finished run may be extended.
_OPEN_ENDED_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")


def recipe_of(arguments: RunArguments) -> dict[str, Any]:
    """Everything that decides what is trained, as plain JSON values.

    Taken from the arguments as `parse` returns them, before the workflow changes any. It leaves out keys that only
    decide where the run writes, how often, what it logs, and how much memory it takes. The run's length is part of
    the recipe only if the learning rate schedule depends on it. Secrets are masked: no file contains one, and a
    renewed secret does not change the recipe.
    """
    training = arguments.training
    methods = [spec.name for cls in _TUNING_METHODS for spec in dataclasses.fields(cls)]
    stage = [
        f.name
        for f in dataclasses.fields(GRPOArguments)
        # Another engine samples from the same policy; the canary's message even advises to try one.
        if f.metadata["group"] not in (EVALUATION, LIMITS, MEMORY, MONITORING)
        and f.name not in ("rollout_backend", "vllm_server_urls")
    ]
    parts = (
        (arguments.model, _MODEL.split()),
        (arguments.data, _DATA.split()),
        (training, _TRAINING.split() + ([] if is_open_ended(training) else _LENGTH.split())),
        (arguments.finetuning, _FINETUNING.split() + methods + stage),
        (arguments.generating, _GENERATING.split()),
    )
    recipe = {name: getattr(owner, name) for owner, names in parts for name in names}
    recipe |= arguments.finetuning.as_written
    return mask(json.loads(json.dumps(recipe, default=str), parse_float=_number))


def is_open_ended(training: Any) -> bool:
    """Whether the learning rate of a step depends on the step alone, and not on the number of steps of the run."""
    is_warmup_counted = training.warmup_steps >= 1 or not training.warmup_steps
    return training.lr_scheduler_type in _OPEN_ENDED_SCHEDULES and is_warmup_counted


def training_record(
    prompts: Sequence[Prompt], evaluation: Sequence[Prompt], eval_dataset: Any, reward_code: Mapping[str, str]
) -> dict[str, Any]:
    """The record of rows and reward code in a checkpoint's state file.

    Args:
        prompts: the training prompts, in their order.
        evaluation: the evaluation prompts.
        eval_dataset: as the recipe names it. If it changes between runs, its rows are not compared.
        reward_code: `RewardSuite.code`.
    """
    return {
        "rows": _rows(prompts),
        "eval_rows": {**_rows(evaluation), "eval_dataset": eval_dataset},
        "reward_code": dict(reward_code),
    }


def check_resume(arguments: RunArguments, record: Mapping[str, Any], num_prompts: int) -> None:
    """Refuse to resume from a checkpoint of other rows or code, or of a run that is finished."""
    training_args, finetuning_args = arguments.training, arguments.finetuning
    checkpoint = Path(training_args.resume_from_checkpoint)
    check_same_training(checkpoint, record, finetuning_args.resume_with_changes)
    steps_per_epoch = steps_of_epoch(num_prompts, prompts_of_step(training_args), finetuning_args.num_iterations)
    num_steps = steps_of_run(training_args, steps_per_epoch)
    is_over(checkpoint, training_args.output_dir, num_steps, training_args.do_eval)


def check_same_training(folder: Path, record: Mapping[str, Any], allows_changes: bool) -> None:
    """Refuse to resume from `folder` with other rows or other reward code than it was trained with.

    Args:
        folder: a checkpoint that `check_checkpoint` accepts.
        record: `training_record` of this run.
        allows_changes: `resume_with_changes`: only warn of changes.

    Raises:
        ValueError: naming what differs.
    """
    stored = read_state(folder)
    for name, code in record["reward_code"].items():
        before = stored.get("reward_code", {}).get(name, code)
        if before != code and code.startswith(BUILT_IN):
            logger.info_rank0(f"The reward `{name}` is that of {code}; {folder} was trained with that of {before}.")
    changes = _changes(stored, record)
    if not changes:
        return
    message = f"{folder} was not trained with what this run has: {'; '.join(changes)}."
    if stored.get("rows", record["rows"])["num"] != record["rows"]["num"]:
        remedy = (
            "Bring the rows back to go on. With another number of them no run can go on where it was: to train its "
            "weights further, choose another `output_dir` and start from what it trained (`adapter_name_or_path` or "
            "`model_name_or_path`)."
        )
        raise ValueError(f"Cannot resume: {message} {remedy}")
    if not allows_changes:
        raise ValueError(
            f"Cannot resume: {message} Bring it back to go on with what the run began with, or write "
            "`resume_with_changes: true` to go on with what is there now."
        )
    logger.warning_rank0(f"`resume_with_changes: true`: {message}")


def _changes(stored: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """The differences between a checkpoint's record and a run's, in words."""
    if "reward_code" not in stored:
        return ["an earlier version saved it, which did not record rows and code"]
    changes = [_changed_rows("dataset", stored["rows"], record["rows"])]
    if stored["eval_rows"]["eval_dataset"] == record["eval_rows"]["eval_dataset"]:
        changes.append(_changed_rows("evaluation's dataset", stored["eval_rows"], record["eval_rows"]))
    changes += [
        f"the file of the reward function `{name}` has changed (sha256 {before[:12]} there, {code[:12]} here)"
        for name, code in record["reward_code"].items()
        if (before := stored["reward_code"].get(name, code)) != code and not code.startswith(BUILT_IN)
    ]
    return [change for change in changes if change]


def _changed_rows(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if before["num"] != now["num"]:
        return f"the {name} had {before['num']} rows there and has {now['num']} here"
    size = _block_size(now["num"])
    differing = next(
        (i for i, pair in enumerate(zip(before["blocks"], now["blocks"], strict=True)) if len({*pair}) > 1), None
    )
    if differing is None:
        return ""
    first, last = differing * size + 1, min((differing + 1) * size, now["num"])
    place = f"row {first}" if first == last else f"one of the rows {first} to {last}"
    return (
        f"the {name} has other rows, in another order, or encoded in another way (the first that differs is {place})"
    )


def _rows(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The number of prompts, and a hash of each block of them: tokens, reference, columns and images."""
    size = _block_size(len(prompts))
    blocks = []
    for start in range(0, len(prompts), size):
        digest = hashlib.sha256()
        for prompt in prompts[start : start + size]:
            text = json.dumps([prompt.reference, prompt.columns], sort_keys=True, default=str)
            text += "".join(image.sha256 for image in prompt.images)
            digest.update(array("q", [len(prompt.token_ids), *prompt.token_ids]).tobytes() + text.encode())
        blocks.append(digest.hexdigest()[:16])
    return {"num": len(prompts), "blocks": blocks}


def _block_size(num_prompts: int) -> int:
    return max(1, -(-num_prompts // NUM_BLOCKS))


def check_checkpoint(folder: Path, recipe: dict[str, Any], distribution: str) -> None:
    """Refuse to resume from `folder` unless `recipe` wrote it, in the same distribution, and it is whole.

    Raises:
        DamagedCheckpointError: if one of its files is missing or has changed.
        ValueError: if the checkpoint is that of another stage or another recipe.
    """
    remedy = (
        "Choose another `output_dir`, or write `overwrite_output_dir: true` to start afresh"
        " (and leave `resume_from_checkpoint` out)."
    )
    if not (folder / STATE_FILE).is_file():
        raise ValueError(
            f"Cannot resume from {folder}: it has no {STATE_FILE}, so it is not a checkpoint of `stage: grpo` "
            f"but of another stage, or was saved without the trainer's state. {remedy}"
        )
    state = read_state(folder)
    stored = mask(state["recipe"])
    _refuse_other_layout(folder, state, stored, recipe, distribution)
    if stored == recipe:
        verify(folder)
        return

    missing = object()
    differing = [
        f"`{name}` ({_shown(stored, name)} there, {_shown(recipe, name)} here)"
        for name in sorted(stored.keys() | recipe.keys())
        if stored.get(name, missing) != recipe.get(name, missing)
    ]
    raise ValueError(
        f"Cannot resume from {folder}: it was trained by another recipe. "
        f"Differing: {', '.join(differing)}. Give those keys their old values to resume. {remedy}"
    )


def _refuse_other_layout(
    folder: Path, state: Mapping[str, Any], stored: Mapping[str, Any], recipe: Mapping[str, Any], distribution: str
) -> None:
    """Refuse a checkpoint whose parts are those of other processes."""
    before = state.get("distribution", REPLICATED), stored.get("world_size")
    now = distribution, recipe["world_size"]
    if before != now:
        raise ValueError(
            f"Cannot resume from {folder}: it was saved by {_layout(*before)}, and this run has {_layout(*now)}. A "
            "checkpoint has a part for each process, which fits no other. Launch as it was launched then; or, to "
            "train its weights further in another way, choose another `output_dir` and start from them "
            "(`adapter_name_or_path` or `model_name_or_path` with the folder)."
        )


def _layout(kind: str, num_processes: int | None) -> str:
    if num_processes == 1 and kind == REPLICATED:
        return "one process"
    weights = "the whole weights in each" if kind == REPLICATED else f"the weights sharded by {kind}"
    if kind in (ZERO.format(stage=stage) for stage in (0, 1, 2)):
        weights = f"the training divided by {kind}"
    return f"{num_processes} process{'' if num_processes == 1 else 'es'} with {weights}"


def _number(text: str) -> float:
    """Read 1.0 and 1 as the same setting."""
    number = float(text)
    return int(number) if number.is_integer() else number


def _shown(recipe: dict[str, Any], name: str) -> str:
    return json.dumps(recipe[name]) if name in recipe else "absent"
