"""What a run trains, as one record: a checkpoint is resumed only by the recipe that wrote it."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory.hparams.finetuning_args import (
    ApolloArguments,
    FreezeArguments,
    GaloreArguments,
    LoraArguments,
    OFTArguments,
)

from ..arguments import EVALUATION, LIMITS, MEMORY, MONITORING, GRPOArguments
from ..checkpoints import STATE_FILE, read_state, verify


if TYPE_CHECKING:
    from .parser import RunArguments


_MODEL = """
    model_name_or_path model_revision adapter_name_or_path adapter_folder train_from_scratch rope_scaling resize_vocab
    add_tokens add_special_tokens new_special_tokens_config quantization_bit quantization_method quantization_type
    double_quantization upcast_layernorm
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
# Under these the learning rate of a step does not depend on how many steps follow, so a finished run may be extended.
_OPEN_ENDED_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")


def recipe_of(arguments: "RunArguments") -> dict[str, Any]:
    """Everything that decides what is trained, as plain JSON values.

    Taken from the arguments as `parse` returns them, before the workflow changes any. Left out is what only decides
    where the run writes, how often, what it logs, and how much memory it takes. The run's length belongs to the
    recipe only where the learning rate schedule depends on it.
    """
    training = arguments.training
    schedule = training.lr_scheduler_type
    open_ended = schedule in _OPEN_ENDED_SCHEDULES and (training.warmup_steps >= 1 or not training.warmup_steps)
    methods = [spec.name for cls in _TUNING_METHODS for spec in dataclasses.fields(cls)]
    stage = [
        f.name
        for f in dataclasses.fields(GRPOArguments)
        # Another engine samples from the same policy: the canary's own advice is to try one.
        if f.metadata["group"] not in (EVALUATION, LIMITS, MEMORY, MONITORING) and f.name != "rollout_backend"
    ]
    parts = (
        (arguments.model, _MODEL.split()),
        (arguments.data, _DATA.split()),
        (training, _TRAINING.split() + ([] if open_ended else _LENGTH.split())),
        (arguments.finetuning, _FINETUNING.split() + methods + stage),
        (arguments.generating, _GENERATING.split()),
    )
    recipe = {name: getattr(owner, name) for owner, names in parts for name in names}
    return json.loads(json.dumps(recipe, default=str), parse_float=_number)


def recipe_hash(recipe: dict[str, Any]) -> str:
    """A short name for a recipe, the same in every process and on every machine."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def recipe_record(arguments: "RunArguments") -> dict[str, Any]:
    """What a checkpoint's state file holds about its recipe: `recipe_hash`, and `recipe` to name what differs."""
    recipe = recipe_of(arguments)
    return {"recipe_hash": recipe_hash(recipe), "recipe": recipe}


def check_checkpoint(folder: Path, recipe: dict[str, Any]) -> None:
    """Refuse to resume from `folder` unless `recipe` wrote it and it is whole.

    Raises:
        DamagedCheckpointError: if a file of it is missing or has changed.
        ValueError: if the checkpoint is another stage's or another recipe's.
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
    if state["recipe_hash"] == recipe_hash(recipe):
        verify(folder)
        return

    stored = state["recipe"]
    missing = object()
    differing = [
        f"`{name}` ({_shown(stored, name)} there, {_shown(recipe, name)} here)"
        for name in sorted(stored.keys() | recipe.keys())
        if stored.get(name, missing) != recipe.get(name, missing)
    ]
    raise ValueError(
        f"Cannot resume from {folder}: it was trained by another recipe. "
        f"Differing: {', '.join(differing) or 'not recorded'}. Give those keys their old values to resume. {remedy}"
    )


def _number(text: str) -> float:
    """1.0 and 1 are the same setting."""
    number = float(text)
    return int(number) if number.is_integer() else number


def _shown(recipe: dict[str, Any], name: str) -> str:
    return json.dumps(recipe[name]) if name in recipe else "absent"
