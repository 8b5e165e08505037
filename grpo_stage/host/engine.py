"""The rollout engine of a run."""

import os
from functools import partial
from typing import Any

from grpo_stage.host import facade
from grpo_stage.host.inputs import RunInputs
from grpo_stage.host.precision import autocast_dtype, compute_dtype
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.rollout.engines.request import EngineRequest
from grpo_stage.rollout.engines.table import ENGINES
from grpo_stage.rollout.engines.vllm_rules import refuse_ranks
from grpo_stage.types import RolloutEngine, SamplingSettings


logger = facade.get_logger(__name__)


def check_ranks(arguments: RunArguments) -> None:
    """Refuse a number of processes that the engine cannot be shared out to; before a model is loaded."""
    size, num_local_ranks = arguments.finetuning.vllm_tensor_parallel, os.environ.get("LOCAL_WORLD_SIZE")
    if size > 1 and num_local_ranks is None and arguments.training.world_size > 1:
        raise ValueError(
            f"`vllm_tensor_parallel: {size}` is not possible without LOCAL_WORLD_SIZE in the environment, the number "
            "of processes on this machine: those share an engine. torchrun, `accelerate launch` and "
            "`llamafactory-cli train` set it: start the run with one of them, or leave `vllm_tensor_parallel` out."
        )
    refuse_ranks(size, int(num_local_ranks or 1))


def start_engine(arguments: RunArguments, model: Any, sampling: SamplingSettings, inputs: RunInputs) -> RolloutEngine:
    """Start the engine that `rollout_backend` names; with tools its completions call them."""
    request = EngineRequest(
        policy=model,
        tokenizer=inputs.tokenizer,
        sampling=sampling,
        keys=arguments.values(),
        given=arguments.given,
        local_process_index=arguments.training.local_process_index,
        device_type=arguments.training.device.type,
        autocast_dtype=autocast_dtype(arguments),
        compute_dtype=compute_dtype(arguments, model),
        changes_to_files=changes_to_files(arguments, model),
        load_config=partial(facade.load_config, arguments.model),
        announce=logger.info_rank0,
        warn=logger.warning_rank0,
        images=inputs.images,
        processor=inputs.processor,
    )
    engine = ENGINES[arguments.finetuning.rollout_backend].build(request)
    return engine if inputs.tool_use is None else inputs.tool_use.around(engine)


def changes_to_files(arguments: RunArguments, model: Any) -> tuple[str, ...]:
    """How the loaded model differs from the files of `model_name_or_path`."""
    model_args = arguments.model
    adapters = model_args.adapter_name_or_path or []
    changes = {
        "quantized": getattr(model, "quantization_method", None) is not None,
        "with merged adapters": len(adapters) > 1 or (adapters and arguments.finetuning.create_new_adapter),
        # PiSSA and similar methods subtract the adapter's initial value from the base.
        "less the adapter's initial value": any(
            isinstance(getattr(config, "init_lora_weights", None), str)
            for config in getattr(model, "peft_config", {}).values()
        ),
        "with a resized vocabulary": model_args.resize_vocab,
        "with new weights": model_args.train_from_scratch,
    }
    return tuple(change for change, is_made in changes.items() if is_made)
