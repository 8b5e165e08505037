"""The model that a recipe trains, as shapes alone: read from its config, with adapters and precisions as in a run."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from grpo_stage.host import facade
from grpo_stage.host.run_arguments import RunArguments


def empty_policy(arguments: RunArguments) -> Any:
    """The policy on PyTorch's `meta` device: it has every weight's shape and precision, and takes no memory.

    Gradient checkpointing is on. A quantized base is here in the precision of the run's passes, which is what its
    layers compute in.

    Raises:
        ValueError: if the tuning method does not fit the model.
    """
    model_args, finetuning_args = arguments.model, arguments.finetuning
    config = facade.load_config(model_args)
    model = empty_model(model_args)
    facade.prepare_model_for_training(
        model, type(model_args).copyfrom(model_args, disable_gradient_checkpointing=False)
    )
    if finetuning_args.finetuning_type in ("lora", "oft"):
        adapters = model_args.adapter_name_or_path or []
        if adapters and not finetuning_args.create_new_adapter:
            return _with_adapter_of(model, adapters[-1], model_args.adapter_folder, finetuning_args.pure_bf16)
        model_args = type(model_args).copyfrom(model_args, adapter_name_or_path=None)  # merged: they take nothing
        # PiSSA's start is a decomposition of weights that are not there; the adapter's shapes are the same.
        finetuning_args = copy.copy(finetuning_args)
        finetuning_args.pissa_init = False
    with torch.device("meta"):
        return facade.init_adapter(config, model, model_args, finetuning_args, True)


def empty_model(model_args: Any) -> Any:
    """The model of `model_name_or_path` on the `meta` device, in the precision of its files."""
    config = facade.load_config(model_args)
    is_visual = type(config) in AutoModelForImageTextToText._model_mapping
    kind: Any = AutoModelForImageTextToText if is_visual else AutoModelForCausalLM
    dtype = model_args.compute_dtype if model_args.quantization_bit is not None else dtype_of_files(model_args)
    with torch.device("meta"):
        return kind.from_config(config, dtype=dtype, trust_remote_code=model_args.trust_remote_code)


def dtype_of_files(model_args: Any) -> torch.dtype:
    """The precision in which the host loads the model: that of its config, or of the first weight in its files."""
    config = facade.load_config(model_args)
    dtype = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    if dtype is None:
        dtype = _dtype_of_first_weight(Path(model_args.model_name_or_path))
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32


def _dtype_of_first_weight(folder: Path) -> torch.dtype | None:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (no mapping)
                return weights.get_slice(name)[:0].dtype
    return None


def _with_adapter_of(model: Any, adapter: str, subfolder: str | None, in_half_precision: bool) -> Any:
    """With an adapter of the shapes that a saved one has."""
    config = PeftConfig.from_pretrained(adapter, subfolder=subfolder)
    config.inference_mode = False
    with torch.device("meta"):
        model = get_peft_model(model, config)
    if not in_half_precision:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model
