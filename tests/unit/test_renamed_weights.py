"""Whole weights of a resume, where a checkpoint has other names than the model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from grpo_stage.survival.renamed_weights import load_renamed_weights
from grpo_stage.survival.resumable import ResumableTrainer


SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}  # fmt: skip


def test_trainer_finds_what_is_named_as_in_the_model(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32))
    model.save_pretrained(tmp_path)
    assert not load_renamed_weights(model, str(tmp_path))


@pytest.mark.parametrize("way", ["resume", "best"])
def test_others_are_loaded_under_the_models_names(way: str, tmp_path: Path) -> None:
    sizes = {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes))
    model.save_pretrained(tmp_path)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    trainer: Any = ResumableTrainer.__new__(ResumableTrainer)
    trainer.model, trainer.sharded = model, None
    trainer.state = SimpleNamespace(best_model_checkpoint=str(tmp_path))
    if way == "resume":
        trainer._load_from_checkpoint(str(tmp_path))
    else:
        trainer._load_best_model()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
