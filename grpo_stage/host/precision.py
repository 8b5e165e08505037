"""The precision of a run, and how closely its engine can agree with its trainer."""

import os
from types import SimpleNamespace
from typing import Any

import torch

from grpo_stage.algorithm.conditions import as_yaml
from grpo_stage.host.facade import get_logger
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.monitors.canary import DEFAULT_BOUNDS
from grpo_stage.rollout.engines.table import ENGINES


logger = get_logger(__name__)


def check_launchers_precision(values: SimpleNamespace) -> None:
    """Refuse a precision that `accelerate launch` asks for and the recipe does not have: Trainer would take it.

    Raises:
        ValueError: naming the value, the rule, the reason and the remedy.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked in ("no", "fp16" if values.fp16 else "bf16" if values.bf16 else "no"):
        return
    remedy = f"Write `{asked}: true` into the recipe, or" if asked in ("bf16", "fp16") else "Write"
    raise ValueError(
        f"`mixed_precision: {asked}` in the config file of `accelerate launch` is not what the recipe says (`bf16: "
        f"{as_yaml(values.bf16)}`, `fp16: {as_yaml(values.fp16)}`): the run would compute in one precision and be "
        f"checked and judged by another. {remedy} `mixed_precision: 'no'` into that file: the recipe's is then used."
    )


def autocast_dtype(arguments: RunArguments) -> torch.dtype | None:
    """The precision of mixed-precision passes; None if the model computes in its own precision."""
    if arguments.training.bf16:
        return torch.bfloat16
    return torch.float16 if arguments.training.fp16 else None


def compute_dtype(arguments: RunArguments, model: Any) -> torch.dtype:
    return autocast_dtype(arguments) or model.get_input_embeddings().weight.dtype


def canary_bound(arguments: RunArguments, model: Any) -> float:
    """The canary's bound: that of half precision if float32 is rounded (8-bit activations, tf32, vLLM on a GPU)."""
    on_gpu = model.device.type == "cuda"
    in_tf32 = on_gpu and (arguments.training.tf32 or ENGINES[arguments.finetuning.rollout_backend].rounds_on_gpu)
    rounds = in_tf32 or getattr(model, "is_loaded_in_8bit", False)
    return DEFAULT_BOUNDS[torch.bfloat16 if rounds else compute_dtype(arguments, model)]


def warn_of_slow_precision(model: Any) -> None:
    dtype = model.get_input_embeddings().weight.dtype
    if model.device.type == "cpu" and dtype != torch.float32:
        logger.warning_rank0(
            f"The model is in {dtype} and trains on a CPU, where most processors compute that 8 to 25 times slower "
            "than float32. Save it in float32 first: "
            "`AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).save_pretrained(new_path)`."
        )


def compute_as_asked(model: Any) -> None:
    """Keep layers of 4 bits from bitsandbytes' kernel for processors with AVX512-BF16.

    It computes in bf16 whatever the model's precision is, and only where nothing is trained: log-probabilities of the
    same tokens would differ between a pass that is trained through and one that is not.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
