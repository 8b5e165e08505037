"""The output layer in float32, against the same product in float64."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_stage.update.output_layer import compute_output_layer_in_float32


def make_model(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


LORA = LoraConfig(target_modules=["q_proj"])
WHOLE = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])


@pytest.mark.parametrize("half", ["weights", "autocast"])
@pytest.mark.parametrize(
    ("tied", "adapter"),
    [(False, None), (True, None), (False, LORA), (True, LORA), (False, WHOLE)],
    ids=["plain", "tied", "lora", "lora on a tied one", "lora and a whole output layer"],
)
def test_logits_are_those_of_the_hidden_states_in_full_precision(tied, half, adapter):
    model = make_model(tied)
    if half == "weights":
        model = model.to(torch.bfloat16)
    if adapter is not None:
        model = get_peft_model(model, adapter)
    ids = torch.arange(12).unsqueeze(0)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
            output = model(input_ids=ids, output_hidden_states=True)
        weight = model.get_input_embeddings().weight if tied else model.get_output_embeddings().weight
        exact = output.hidden_states[-1].double() @ weight.double().T
        return output.logits, (output.logits.double() - exact).abs().max().item() / exact.abs().max().item()

    assert run()[1] > 1e-3, "half precision rounds"
    compute_output_layer_in_float32(model)
    logits, error = run()
    assert logits.dtype == torch.float32
    assert error < 1e-6
    logits.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)


def test_another_layer_is_refused():
    model = make_model(tied=False)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"cast_lm_head_to_fp32: true.*Sequential.*Leave it out"):
        compute_output_layer_in_float32(model)
