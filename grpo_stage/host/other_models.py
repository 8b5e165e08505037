"""The arguments for loading `ref_model` and `reward_model`, derived from the policy's."""

from typing import Any

from llamafactory.hparams.model_args import ModelArguments


# These keys concern the policy alone. Also, the host cannot add its new tokens twice.
_OF_THE_POLICY = {
    "train_from_scratch": False,
    "resize_vocab": False,
    "add_tokens": None,
    "add_special_tokens": None,
    "new_special_tokens_config": None,
    "adapter_name_or_path": None,
    "adapter_folder": None,
    "quantization_bit": None,
}


def arguments_for(model_args: ModelArguments, path: str) -> ModelArguments:
    """The policy's arguments for the model at `path`, without an adapter and not quantized.

    A revision belongs to the repository of `model_name_or_path` alone.
    """
    changes: dict[str, Any] = dict(_OF_THE_POLICY)
    if path != model_args.model_name_or_path:
        changes["model_revision"] = "main"
    return ModelArguments.copyfrom(model_args, model_name_or_path=path, **changes)
