"""The reference policy that a run's KL term is relative to."""

from typing import Any

from grpo_stage.host import facade
from grpo_stage.host.distribution import is_sharded
from grpo_stage.host.policy import to_device
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.update.output_layer import compute_output_layer_in_float32
from grpo_stage.update.reference import (
    AdapterOffReference,
    InitialShardsReference,
    InitialWeightsReference,
    ModelReference,
    ReferencePolicy,
)


def reference_policy(arguments: RunArguments, model: Any) -> ReferencePolicy | None:
    """The reference: the policy before the first step, or `ref_model`; None without a KL term."""
    finetuning_args = arguments.finetuning
    if finetuning_args.beta == 0.0:
        return None
    if finetuning_args.ref_model is not None:
        model_args = facade.arguments_for(arguments.model, finetuning_args.ref_model)
        ref_model = to_device(facade.create_ref_model(model_args, finetuning_args), arguments)
        if finetuning_args.cast_lm_head_to_fp32:
            compute_output_layer_in_float32(ref_model)
        other = ModelReference(ref_model)
        other.match_precision(model)
        if finetuning_args.sync_ref_model:
            other.check_alike(model)
        return other
    if finetuning_args.sync_ref_model:
        return _initial_weights(arguments, model)
    starts_at_base = arguments.model.adapter_name_or_path is None or finetuning_args.create_new_adapter
    if finetuning_args.finetuning_type in ("lora", "oft") and starts_at_base and not finetuning_args.pissa_init:
        return AdapterOffReference()
    return _initial_weights(arguments, model)


def _initial_weights(arguments: RunArguments, model: Any) -> InitialShardsReference | InitialWeightsReference:
    is_whole = not is_sharded(arguments.training.deepspeed)
    return InitialWeightsReference(model) if is_whole else InitialShardsReference()
