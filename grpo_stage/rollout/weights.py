"""How the trainer's weights leave the trainer: a LoRA adapter as the files that an engine loads."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file


ADAPTER = "default"
"""The one adapter that the host trains."""


def write_adapter(policy: torch.nn.Module, folder: Path) -> None:
    """Write the policy's adapter as `adapter_model.safetensors` and `adapter_config.json`; the policy is only read.

    Raises:
        ValueError: if the policy has no adapter, or one that vLLM would serve as something else.
    """
    config = servable_config(policy)
    assert isinstance(policy, PeftModel)
    # Named parameters rather than a state dict: that of a quantised base would bring its quantisation states along.
    tensors = get_peft_model_state_dict(
        policy, state_dict=dict(policy.named_parameters()), adapter_name=ADAPTER, save_embedding_layers=False
    )
    save_file(
        {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    config.save_pretrained(str(folder))


def servable_config(policy: torch.nn.Module) -> LoraConfig:
    """The configuration of the policy's adapter, checked against what vLLM serves.

    vLLM refuses some of these by itself, but rank and alpha patterns it ignores: every module would then be scaled
    with the adapter's own alpha / rank, and completions would come from another policy.

    Raises:
        ValueError: naming each thing that vLLM cannot serve.
    """
    if not isinstance(policy, PeftModel):
        raise ValueError(
            f"The policy is a {type(policy).__name__} without an adapter, and vLLM takes its weights as a LoRA "
            "adapter here: use `finetuning_type: lora`, or `rollout_backend: hf`."
        )
    config = policy.peft_config.get(ADAPTER)
    if config is None or not isinstance(config, LoraConfig):
        kinds = ", ".join(f"{name} ({each.peft_type})" for name, each in policy.peft_config.items())
        raise ValueError(
            f"vLLM serves one LoRA adapter named `{ADAPTER}`, and the policy has: {kinds}. "
            "Use `finetuning_type: lora`, or `rollout_backend: hf`."
        )
    reasons = {
        "DoRA": config.use_dora,
        f"bias: {config.bias}": config.bias != "none" or config.lora_bias,
        f"modules saved whole (`additional_target`): {config.modules_to_save}": config.modules_to_save,
        f"trainable tokens: {config.trainable_token_indices}": config.trainable_token_indices,
        f"adapted parameters: {config.target_parameters}": config.target_parameters,
        f"a rank of its own for {config.rank_pattern}": config.rank_pattern,
        f"an alpha of its own for {config.alpha_pattern}": config.alpha_pattern,
        "replicated layers": config.layer_replication,
        "activated LoRA": config.alora_invocation_tokens,
    }
    if refused := [reason for reason, present in reasons.items() if present]:
        raise ValueError(
            f"vLLM cannot serve this adapter: {'; '.join(refused)}. Train a plain LoRA, or use `rollout_backend: hf`."
        )
    return config
