"""A reward model's passes: batches, too little memory, failures, and where its weights are."""

import contextlib
import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_stage.host.policy import to_device
from grpo_stage.rewards.errors import RewardError
from grpo_stage.rewards.models.adapter_on_policy import AdapterOnPolicy
from grpo_stage.rewards.models.refusals import HEAD_BIAS, HEAD_WEIGHT
from grpo_stage.rewards.models.reward_model import ModelReward
from grpo_stage.rewards.models.value_head import ValueHeadScorer
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup


MEMORY_ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB."


def groups(*lengths: int) -> list[RolloutGroup]:
    """A prompt of two tokens for each length, with one truncated completion of that many."""
    return [
        RolloutGroup(
            prompt=Prompt(index=i, token_ids=(1, 2), messages=({"role": "user", "content": f"{i}?"},), reference=None),
            completions=(
                Completion(
                    token_ids=(i,) * length,
                    sampling_logprobs=(0.0,) * length,
                    finish_reason=FinishReason.LENGTH,
                    text=f"completion {i}",
                ),
            ),
            policy_version=0,
        )
        for i, length in enumerate(lengths)
    ]


class Device:
    """Scores a sequence by its last token; more than `capacity` tokens, padding included, do not fit."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.passes: list[int] = []

    def __call__(self, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        size = len(sequences) * max(map(len, sequences))
        self.passes.append(size)
        if size > self.capacity:
            raise torch.OutOfMemoryError(MEMORY_ERROR)
        return [float(sequence[-1]) for sequence in sequences]


LENGTHS = (3, 8, 5, 1, 8, 2)


def test_a_pass_that_does_not_fit_is_done_again_with_less(caplog: pytest.LogCaptureFixture) -> None:
    expected = [[float(i)] for i in range(len(LENGTHS))]
    assert ModelReward(Device(1000), 1000, ())(groups(*LENGTHS)) == expected
    small = Device(20)
    reward = ModelReward(small, 1000, ())
    with caplog.at_level(logging.WARNING):
        assert reward(groups(*LENGTHS)) == expected
    assert small.passes[:3] == [60, 30, 10]
    assert "batches of 30 tokens instead of 1000" in caplog.text
    failed = sum(size > 20 for size in small.passes)
    reward(groups(*LENGTHS))
    assert sum(size > 20 for size in small.passes) == failed, "what was learned is kept"


def test_a_single_completion_that_does_not_fit_names_the_way_out() -> None:
    with pytest.raises(RewardError, match=r"single completion of 10 tokens.*reward_model_quantization_bit") as error:
        ModelReward(Device(5), 1000, ())(groups(8, 1))
    assert "prompt: 0?\ncompletion: completion 0" in str(error.value)


def test_any_failure_of_a_pass_is_the_rewards() -> None:
    """The run then ends with a checkpoint."""

    def score(sequences: Any) -> list[float]:
        raise IndexError("index out of range in self")

    with pytest.raises(RewardError, match="raised IndexError in a batch of 2 completions") as error:
        ModelReward(score, 1000, ())(groups(8, 1))
    assert "index out of range in self" in str(error.value)


def test_an_adapter_follows_the_policy_to_its_device() -> None:
    """The reward is made before Trainer places the policy. A device without memory stands in for a GPU."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    policy = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"]))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    adapter = AdapterOnPolicy(policy, LoraConfig(r=2), weights, "rm")
    policy.to("meta")
    with adapter.activate() as model:
        (hook,) = model.get_submodule(name)._forward_hooks.values()
        assert {tensor.device.type for tensor in hook.args[:2]} == {"meta"}


def test_a_model_of_its_own_is_put_on_the_device_unless_it_is_quantized() -> None:
    arguments: Any = SimpleNamespace(training=SimpleNamespace(device=torch.device("meta"), deepspeed=None))
    model = torch.nn.Linear(2, 2)
    assert to_device(model, arguments).weight.device.type == "meta"
    quantized = torch.nn.Linear(2, 2)
    quantized.quantization_method = "bitsandbytes"  # type: ignore[assignment]
    assert to_device(quantized, arguments).weight.device.type == "cpu"


def test_a_head_scores_the_last_token_of_each_sequence() -> None:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    head = {HEAD_WEIGHT: torch.randn(1, 8), HEAD_BIAS: torch.randn(1)}
    scorer = ValueHeadScorer(lambda: contextlib.nullcontext(model), head, contextlib.nullcontext)
    alone = [scorer([sequence])[0] for sequence in ((1, 2, 3), (4, 5))]
    assert scorer([(1, 2, 3), (4, 5)]) == pytest.approx(alone, abs=1e-6)
