"""What leaves the trainer is what its model's files would hold: names, values, and nothing of an adapter."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from grpo_stage.host.policy import to_device
from grpo_stage.rollout.engines.weights import checkpoint_weights, write_base


IDS = torch.arange(8, 72)[None]


def four_bits() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def logprobs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.log_softmax(-1)


def reread(policy: torch.nn.Module, folder: Path) -> PreTrainedModel:
    write_base(policy, folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def test_names_that_transformers_changes_on_loading_are_the_files_again(tmp_path: Path) -> None:
    """A mixture of experts: the experts' matrices are one tensor in memory, and one each on disk."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected, weights = load_file(tmp_path / "model.safetensors"), dict(checkpoint_weights(model))
    assert set(weights) == set(expected)
    assert set(weights) != set(model.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stored", [False, True], ids=["quantized on loading", "quantized on disk"])
def test_a_quantized_base_is_written_dequantized(bits: int, stored: bool, checkpoint: Path, tmp_path: Path) -> None:
    quantization = four_bits() if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quantization, device_map={"": "cpu"})
    if stored:
        base.save_pretrained(tmp_path / "quantized")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map={"": "cpu"})
    policy = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).train()
    before = logprobs(policy)
    read = reread(policy, tmp_path / "base")
    assert torch.equal(logprobs(policy), before), "the policy was only read"
    with policy.disable_adapter():
        assert (logprobs(read) - logprobs(policy)).abs().mean() < 5e-6
    unquantized = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert (logprobs(read) - logprobs(unquantized)).abs().mean() > 1e-3


@pytest.mark.parametrize(
    "adapter",
    [{}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 40}}],
    ids=["LoRA", "DoRA", "patterns"],
)
@pytest.mark.parametrize("base", ["whole", "4 bits", "bfloat16"])
def test_a_merged_adapter_is_in_the_weights_and_the_policy_is_only_read(
    base: str, adapter: dict[str, Any], checkpoint: Path
) -> None:
    settings: dict[str, Any] = {"dtype": torch.bfloat16 if base == "bfloat16" else torch.float32}
    if base == "4 bits":
        settings |= {"quantization_config": four_bits(), "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **settings)
    if base == "4 bits":
        model = to_device(model, SimpleNamespace(training=None))  # type: ignore[arg-type]
        assert not any(getattr(each, "support_avx512bf16_for_cpu", False) for each in model.modules())
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **adapter)
    policy = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_magnitude" in name:  # DoRA: trained away from the norm that it begins as
                parameter.mul_(torch.linspace(0.8, 1.3, len(parameter)))
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    expected = logprobs(policy)
    weights = dict(checkpoint_weights(policy, is_merged=True))
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    without = logprobs(plain)
    plain.load_state_dict(weights)
    difference = (logprobs(plain) - expected).abs().mean()
    assert difference < (0.05 if base == "bfloat16" else 5e-6)
    assert (without - expected).abs().mean() > 0.1
    assert policy.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())


def test_a_residual_base_is_written_as_it_is(
    make_policy: Callable[..., PeftModel], checkpoint: Path, tmp_path: Path
) -> None:
    policy = make_policy(init_lora_weights="pissa")
    with policy.disable_adapter():
        expected = logprobs(policy)
    assert torch.equal(logprobs(reread(policy, tmp_path)), expected)
    assert not torch.allclose(expected, logprobs(AutoModelForCausalLM.from_pretrained(checkpoint)))


def test_writing_changes_nothing_of_the_policy(make_policy: Callable[..., PeftModel], tmp_path: Path) -> None:
    policy = make_policy()
    config = copy.deepcopy(policy.get_base_model().config.to_dict())
    names = set(policy.state_dict())
    write_base(policy, tmp_path)
    assert policy.get_base_model().config.to_dict() == config
    assert set(policy.state_dict()) == names
    assert not any("lora" in name or "base_layer" in name for name in load_file(tmp_path / "model.safetensors"))


def test_the_code_of_a_model_that_transformers_does_not_have_is_written_too(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    (source / "config_own.py").write_text(
        'from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = "own"\n'
    )
    (source / "own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .config_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((source / "config.json").read_text())
    code = {"AutoConfig": "config_own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (source / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": code}))
    (tmp_path / "base").mkdir()
    write_base(AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True), tmp_path / "base")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    assert type(read).__name__ == "OwnForCausalLM"
    assert torch.equal(logprobs(read), logprobs(AutoModelForCausalLM.from_pretrained(checkpoint)))
