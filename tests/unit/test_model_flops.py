"""Model FLOPs, against those that torch counts as a model runs: in plain attention, one sequence at a time."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from grpo_stage.types import Completion, FinishReason, Prompt
from grpo_stage.update.batch import Row
from grpo_stage.update.model_flops import flops_of_update, peak_flops


SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24,
}  # fmt: skip
LORA = {"r": 4, "target_modules": "all-linear"}


def make_rows(*lengths: tuple[int, int], prompt: int = 0) -> list[Row]:
    """Of prompts and completions of these lengths, all prompts beginning with the token `prompt`."""
    return [
        Row(
            Prompt(index=0, token_ids=(prompt, *range(1, length)), messages=(), reference=None),
            Completion(token_ids=(5,) * own, sampling_logprobs=(0.0,) * own, finish_reason=FinishReason.STOP, text=""),
        )
        for length, own in lengths
    ]


def make_model(kind: str) -> nn.Module:
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**SIZES, tie_word_embeddings=kind == "tied"), attn_implementation="eager"
    )
    if kind == "freeze":
        model.requires_grad_(False)
        model.model.layers[1].requires_grad_(True)
    if kind == "qlora":
        for name, layer in [each for each in model.named_modules() if isinstance(each[1], nn.Linear)]:
            quantized = Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32)
            quantized.load_state_dict(layer.state_dict())
            model.set_submodule(name, quantized.to("cpu"))
        model.requires_grad_(False)
    if kind in ("lora", "qlora"):
        model = get_peft_model(model, LoraConfig(**LORA))
    if kind == "whole_head":
        model = get_peft_model(model, LoraConfig(**LORA, modules_to_save=["lm_head"]))
    if kind in ("lora", "qlora", "whole_head"):
        model.enable_input_require_grads()  # as gradient checkpointing needs it; otherwise the first layer takes less
    return model


def counted(model: nn.Module, prompt: int, completion: int) -> int:
    """By torch, of one sequence, with logits for the completion's tokens alone."""
    ids = torch.ones(1, prompt + completion - 1, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=completion).logits
        logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["full", "tied", "lora", "whole_head", "freeze"])
def test_they_are_those_that_torch_counts_less_the_keys_that_are_masked(kind):
    model, prompt, completion = make_model(kind), 7, 6
    length = prompt + completion - 1
    pairs, of_pair = length * (length + 1) // 2, 3 * 4 * 4 * 24  # forward and backward of a layer
    masked = (length**2 - pairs) * of_pair
    angles = 2 * 12 * length  # of the rotary embedding
    expected = counted(model, prompt, completion) - angles - 3 * masked
    if kind == "freeze":
        # The attention of the layer below has no backward pass, which is counted all the same.
        expected += length**2 * of_pair * 2 // 3
    assert flops_of_update(model, make_rows((prompt, completion))) == expected


def test_a_quantized_weight_counts_as_what_it_stands_for():
    rows = make_rows((7, 6))
    assert flops_of_update(make_model("qlora"), rows) == flops_of_update(make_model("lora"), rows)


def test_a_token_meets_some_of_the_experts():
    config = Qwen3MoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
    model = AutoModelForCausalLM.from_config(config)
    attention = 64 * 24 * (4 + 2 + 2 + 4)
    of_token = 6 * 3 * (attention + 2 * 3 * 64 * 16 + 8 * 64)
    of_keys = 12 * 3 * 4 * 24 * (5 * 6 // 2)
    assert flops_of_update(model, make_rows((5, 1))) == of_token * 5 + 6 * 97 * 64 + of_keys


def test_a_prompt_counts_once_for_its_group_and_a_group_no_less_for_standing_beside_another():
    model = make_model("full")
    one, other = make_rows((9, 4)), make_rows((9, 1))
    both, apart = flops_of_update(model, one + other), flops_of_update(model, one)
    assert both - apart == 6 * 97 * 64, "a completion of one token adds its prediction alone"
    stranger = make_rows((9, 1), prompt=3)
    assert flops_of_update(model, one + stranger) == apart + flops_of_update(model, stranger)
    assert flops_of_update(model, []) == 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 9999", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(torch.device("cpu")) is None
