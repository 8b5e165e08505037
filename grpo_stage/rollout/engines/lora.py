"""What is told of LoRA adapters without torch: whether a run trains an existing one, and what is more than a LoRA."""

from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any


_PLAIN_VALUES = MappingProxyType({"peft_type": "LORA", "bias": "none"})
"""What a plain LoRA has under keys that are never empty."""

LORA_EXTRAS: Mapping[str, str] = MappingProxyType(
    {
        "peft_type": "an adapter of the kind {}",
        "bias": "bias: {}",
        "use_dora": "DoRA",
        "lora_bias": "a bias in its own layers",
        "modules_to_save": "modules saved whole (`additional_target`): {}",
        "trainable_token_indices": "trainable tokens: {}",
        "target_parameters": "adapted parameters: {}",
        "rank_pattern": "a rank of its own for {}",
        "alpha_pattern": "an alpha of its own for {}",
        "layer_replication": "replicated layers",
        "alora_invocation_tokens": "activated LoRA",
        "use_qalora": "QALoRA",
    }
)
"""Keys of adapter_config.json that make more of an adapter than a LoRA of one rank, and what each makes of it."""


_MERGED_EXTRAS = frozenset({"use_dora", "rank_pattern", "alpha_pattern"})
"""Those that are gone once the adapter is merged into its weights."""


def lora_extras(config: Mapping[str, Any], *, is_merged: bool = False) -> dict[str, Any]:
    """The entries of an adapter's configuration that make more of it than a plain LoRA.

    Args:
        config: the content of adapter_config.json, or as much.
        is_merged: leave out what is gone once the adapter is merged into the weights that it changes.
    """
    keys = [key for key in LORA_EXTRAS if not (is_merged and key in _MERGED_EXTRAS)]
    return {key: config[key] for key in keys if config.get(key) and config[key] != _PLAIN_VALUES.get(key)}


def asks_for_new_tokens(v: SimpleNamespace) -> bool:
    """Whether these keys give the model new embeddings."""
    return bool(v.resize_vocab or v.add_tokens or v.add_special_tokens or v.new_special_tokens_config)


def continues_adapter(v: SimpleNamespace) -> bool:
    """Whether these keys train an adapter that exists."""
    return v.adapter_name_or_path is not None and not v.create_new_adapter
