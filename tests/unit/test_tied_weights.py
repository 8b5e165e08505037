"""An adapter on a weight that two layers share: merged, it is another policy, and so it is refused; by numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from grpo_stage.host.tied_weights import layers_parted, refuse_built, refuse_planned


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.arange(1, 20).unsqueeze(0)
SOURCE = "`lora_target: those`"
BOTH = ["embed_tokens", "lm_head"]
MERGES_WRONG = [
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["model.embed_tokens", "lm_head"]},
    {"target_modules": r".*\.q_proj|lm_head"},
    {"target_modules": ["lm_head"], "use_dora": True},
]
MERGES_RIGHT = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj"], "modules_to_save": BOTH},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]},
]


def llama(is_tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=is_tied, **SIZES))


def trained(model: torch.nn.Module, **adapter: Any) -> Any:
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **adapter))
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def exported(model: Any, folder: Path) -> Any:
    """As the host's export writes a model, and with the config that the stage's warning asks for."""
    parted = layers_parted(model)
    model.merge_and_unload().save_pretrained(folder)
    if parted:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings")
@pytest.mark.parametrize("adapter", MERGES_WRONG, ids=str)
def test_an_adapter_on_a_shared_weight_merges_into_another_policy_and_is_refused(adapter, tmp_path):
    model = trained(llama(is_tied=True), **adapter)
    before = logits(model)
    for refuse in (
        lambda: refuse_planned(LoraConfig(**adapter), llama(is_tied=True).config, SOURCE),
        lambda: refuse_built(model, SOURCE),
    ):
        with pytest.raises(ValueError, match=r"lora_target: those.*`embed_tokens` and `lm_head`.*share one") as error:
            refuse()
        assert "`additional_target: embed_tokens,lm_head` with `rollout_backend: hf`" in str(error.value)
    assert (logits(exported(model, tmp_path)) - before).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings")
@pytest.mark.parametrize(
    ("is_tied", "adapter"), [(True, each) for each in MERGES_RIGHT] + [(False, each) for each in MERGES_WRONG], ids=str
)
def test_what_merges_as_it_was_trained_is_not_refused(is_tied, adapter, tmp_path):
    """Layers with weights of their own among it."""
    model = trained(llama(is_tied), **adapter)
    before = logits(model)
    refuse_planned(LoraConfig(**adapter), llama(is_tied).config, SOURCE)
    refuse_built(model, SOURCE)
    assert bool(layers_parted(model)) == (is_tied and "modules_to_save" in adapter)
    assert torch.allclose(logits(exported(model, tmp_path)), before, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings")
def test_an_output_layer_of_another_name_is_found_in_the_model_itself():
    """The host's `lora_target: all` leaves out `lm_head` alone."""
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, tie_word_embeddings=True, **SIZES))
    refuse_planned(LoraConfig(target_modules=["all"]), model.config, SOURCE)
    with pytest.raises(ValueError, match=r"adapts `embed_out`.*additional_target: embed_in,embed_out"):
        refuse_built(get_peft_model(model, LoraConfig(target_modules=["dense", "embed_out"])), SOURCE)
