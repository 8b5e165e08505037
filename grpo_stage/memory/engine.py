"""Bytes that a rollout engine holds beside the model that is trained."""

from dataclasses import dataclass
from typing import Any

from grpo_stage.memory.parts import GIB


CUDA_GRAPHS = 1.0 * GIB
"""What vLLM says that its graphs take for models of a few billion parameters; they come on top of `vllm_gpu_util`."""
ASLEEP = 0.2 * GIB
"""What stays of an engine with `vllm_sleep` 1 or 2 (docs/gpu.md: 222 MiB)."""
_FLOATS_A_LOGIT = 6
"""The `hf` engine's sampler: logits, log-probabilities, noise, and what is computed from them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Bytes by part, in the rollout and in the update."""

    weights: float = 0.0
    kv_cache: float = 0.0
    graphs: float = 0.0
    sampling: float = 0.0
    """Temporary copies at each token."""
    left_in_update: float = 0.0
    """Of all of them."""
    problem: str = ""
    """Why it cannot start; empty if it can."""

    @property
    def awake(self) -> float:
        return self.weights + self.kv_cache + self.graphs + self.sampling


def kv_bytes_per_token(config: Any, itemsize: int, *, is_vllm: bool) -> float:
    """Keys and values of one token in all layers of a text model's config."""
    heads = config.num_attention_heads
    layers = config.num_hidden_layers
    if (latent := getattr(config, "kv_lora_rank", None)) is not None:  # multi-head latent attention
        rotary = config.qk_rope_head_dim
        if is_vllm:  # keeps what keys and values are computed from
            return float(itemsize * layers * (latent + rotary))
        return float(itemsize * layers * heads * (config.qk_nope_head_dim + rotary + config.v_head_dim))
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return float(itemsize * layers * 2 * (getattr(config, "num_key_value_heads", None) or heads) * size)


def kv_parts(config: Any) -> int:
    """Among how many devices of an engine vLLM divides keys and values at most: further ones hold copies."""
    if getattr(config, "kv_lora_rank", None) is not None:  # the heads share what they are computed from
        return 1
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def hf_engine(
    config: Any, itemsize: int, *, num_prompts: int, num_rows: int, prompt_length: int, completion_length: int
) -> Engine:
    """transformers' generate with the policy itself: keys and values of a batch, and a step's temporary copies.

    Args:
        config: the text model's.
        itemsize: of what the model computes in.
        num_prompts: of a batch, without repetition.
        num_rows: completions that are sampled at once.
        prompt_length: in tokens.
        completion_length: in tokens.
    """
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    length = prompt_length + completion_length
    cache = num_rows * length * kv_bytes_per_token(config, itemsize, is_vllm=False)
    repeated = num_rows * length * itemsize * 2 * heads * size  # one layer's, for all heads of queries
    prefill = num_prompts * prompt_length * itemsize * (3 * config.intermediate_size + 4 * config.hidden_size)
    logits = 4.0 * _FLOATS_A_LOGIT * num_rows * config.vocab_size
    return Engine(kv_cache=cache, sampling=max(repeated + logits, prefill))


def vllm_on_gpu(
    weights: float, kv_of_a_completion: float, capacity: float, share: float, has_graphs: bool, sleep_level: int
) -> Engine:
    """vLLM takes `share` of the card for weights and cache; graphs come on top.

    Args:
        weights: of the engine's own copy of the model.
        kv_of_a_completion: of the longest one, which has to fit.
        capacity: of the card.
        share: `vllm_gpu_util`.
        has_graphs: whether CUDA graphs are captured.
        sleep_level: `vllm_sleep`.
    """
    taken, graphs = share * capacity, CUDA_GRAPHS if has_graphs else 0.0
    problem = ""
    if weights + kv_of_a_completion > taken:
        needed = (weights + kv_of_a_completion) / capacity
        problem = (
            f"vLLM cannot start: `vllm_gpu_util: {share:g}` gives it {taken / GIB:.1f} GiB, and its weights and one "
            f"completion take {(weights + kv_of_a_completion) / GIB:.1f} GiB, which is {needed:.2f} of the device."
        )
    cache = max(taken - weights, kv_of_a_completion)
    left = ASLEEP if sleep_level else weights + cache + graphs
    return Engine(weights=weights, kv_cache=cache, graphs=graphs, left_in_update=left, problem=problem)


def vllm_on_cpu(weights: float, cache: float) -> Engine:
    """vLLM in float32 in the trainer's process, with a cache of a fixed size, all of it there in the update, too."""
    return Engine(weights=weights, kv_cache=cache, left_in_update=weights + cache)
