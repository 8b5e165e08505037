"""A tiny random Llama with a LoRA adapter that matters, and one prompt longer than a cache block of vLLM's."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo_stage.rollout.engines import vllm_process
from grpo_stage.rollout.engines.vllm import VLLMEngine
from grpo_stage.rollout.engines.vllm_settings import VLLMSettings
from grpo_stage.types import Prompt, RolloutGroup, SamplingSettings


os.environ.setdefault("HF_HUB_OFFLINE", "1")
vllm_process._CPU_KV_CACHE_BYTES = 1 << 26  # as in tests/e2e/conftest.py

VOCAB_SIZE = 256
MAX_MODEL_LEN = 512
LORA_RANK = 4
STOPS = (2, 7)
SOUND, FAULTY = 1e-4, 1e-2
"""Mean differences of log-probabilities: a sound delivery stays below the one, every fault is above the other."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model on disk whose own generation config must be ignored: it would sample greedily and stop at 5."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=5,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.update(eos_token_id=5, do_sample=True, top_k=1, repetition_penalty=1.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    special = {0: "<pad>", 1: "<bos>", 2: "<eos>"}
    vocab = {special.get(i, f"w{i}"): i for i in range(VOCAB_SIZE)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    )


def randomize_adapter(policy: PeftModel, seed: int, scale: float = 0.2) -> None:
    """Weights as a long training could leave them: every version is far from the base and from every other."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture(scope="session")
def make_policy(checkpoint: Path) -> Callable[..., PeftModel]:
    def make(seed: int = 1, **lora: object) -> PeftModel:
        torch.manual_seed(seed)
        settings = {"r": LORA_RANK, "lora_alpha": 8, "target_modules": "all-linear", **lora}
        policy = get_peft_model(LlamaForCausalLM.from_pretrained(checkpoint), LoraConfig(**settings))
        randomize_adapter(policy, seed)
        return policy.train()

    return make


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Of 3 to 300 tokens: the longest fills nine of the engine's blocks of 32."""
    generator = torch.Generator().manual_seed(3)
    return [
        Prompt(
            index=10 + i,
            token_ids=tuple(torch.randint(8, VOCAB_SIZE, (length,), generator=generator).tolist()),
            messages=(),
            reference=None,
        )
        for i, length in enumerate((5, 300, 3, 40))
    ]


@pytest.fixture
def sampling() -> SamplingSettings:
    return SamplingSettings(num_generations=3, max_new_tokens=12, temperature=0.7, stop_token_ids=STOPS, seed=42)


def policy_logprobs(policy: torch.nn.Module, group: RolloutGroup, temperature: float) -> list[torch.Tensor]:
    """What transformers says of the sampled tokens: one plain forward a completion, no cache and no padding."""
    logprobs = []
    for completion in group.completions:
        ids = torch.tensor([group.prompt.token_ids + completion.token_ids])
        with torch.no_grad():
            logits = policy(input_ids=ids, use_cache=False).logits[0, -len(completion.token_ids) - 1 : -1]
        sampled = torch.tensor(completion.token_ids)[:, None]
        logprobs.append(torch.log_softmax(logits.float() / temperature, dim=-1).gather(-1, sampled).squeeze(-1))
    return logprobs


def logprob_difference(policy: torch.nn.Module, groups: Sequence[RolloutGroup], temperature: float) -> float:
    """Mean over tokens of |engine - trainer|: what the canary measures."""
    differences = [
        (torch.tensor(completion.sampling_logprobs) - expected).abs()
        for group in groups
        for completion, expected in zip(group.completions, policy_logprobs(policy, group, temperature), strict=True)
    ]
    return torch.cat(differences).mean().item()


def vllm_settings(checkpoint: Path, **changed: Any) -> VLLMSettings:
    settings: dict[str, Any] = {
        "model_name_or_path": str(checkpoint),
        "adapter": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_lora_rank": LORA_RANK,
        "gpu_memory_utilization": 0.5,
        "enforce_eager": False,
        "dtype": "auto",
        "logprob_temperature": None,
    }
    return VLLMSettings(**settings | changed)


def vllm_engine(checkpoint: Path, tokenizer: PreTrainedTokenizerFast, **changed: Any) -> VLLMEngine:
    return VLLMEngine(vllm_settings(checkpoint, **changed), tokenizer)
