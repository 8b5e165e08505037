"""Whole weights of a resume, where a checkpoint has other names than the model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from grpo_stage.survival.resumable import ResumableTrainer


SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "is_renamed"),
    [
        (LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32)), False),
        (
            Qwen3MoeForCausalLM(
                Qwen3MoeConfig(**SIZES, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
            ),
            True,
        ),
    ],
    ids=["llama", "mixture"],
)
def test_they_are_loaded_under_the_models_names(model: Any, is_renamed: bool, tmp_path: Path) -> None:
    """What Trainer loads by itself is left to it."""
    model.save_pretrained(tmp_path)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    trainer: Any = SimpleNamespace(model=model)
    assert ResumableTrainer._load_renamed_weights(trainer, str(tmp_path)) is is_renamed
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items()) is is_renamed
    assert model.lm_head.weight is model.model.embed_tokens.weight
