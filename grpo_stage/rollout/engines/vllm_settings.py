"""What a `VLLMEngine` is started with."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMSettings:
    """One engine of vLLM's. What a user could get wrong here is refused by `vllm_rules`."""

    model_name_or_path: str
    """The checkpoint that the engine starts from: the model under the adapter as it is trained, or a model of the
    policy's architecture."""
    adapter: bool
    """True where the policy is that base with a LoRA adapter, and the adapter is delivered; False where all weights
    are delivered: those of a whole model, or with an adapter merged in."""
    max_model_len: int
    """The longest prompt and completion together."""
    max_lora_rank: int
    """The highest rank the adapter can have; rounded up to one that vLLM knows."""
    gpu_memory_utilization: float
    """The share of the GPU's memory for vLLM. On a CPU the KV cache takes 1 GiB, or `VLLM_CPU_KVCACHE_SPACE`."""
    enforce_eager: bool
    """No CUDA graphs. On a CPU always so."""
    dtype: str
    """`auto` is the checkpoint's own, and float32 on a CPU."""
    logprob_temperature: float | None
    """None where sampling is neutral: log-probabilities are then those of the sampled distribution, and `generate`
    sets the attribute to its temperature. 1.0 where something cuts or bends the distribution: they are then the
    policy's own, at temperature 1."""
    sleep_level: int = 0
    """What `sleep` gives up: 0 nothing, 1 the KV cache and, into main memory, the weights, 2 both for good, which only
    whole weights bring back. Above 0 on a GPU alone."""
    reads_text: bool = False
    """Whether requests say what the text of a completion has to match, for which vLLM needs the tokenizer."""
    max_images: int = 0
    """The most images of a prompt. Above 0 vLLM makes pixels itself, for which it needs the tokenizer, and the
    checkpoint's processor beside the weights."""
    quantization: str | None = None
    """vLLM's name of what it quantizes the checkpoint with while it reads it."""
    tensor_parallel_size: int = 1
    """How many ranks are one engine together, each with a part of every weight. Above 1 each of them starts it, and
    all make the same calls of it, each with its own prompts."""
    timeout_s: float | None = None
    """How long one of them waits for the others; None is vLLM's own."""
    model_revision: str | None = None
    """The checkpoint's branch, tag or commit on a hub."""
    trust_remote_code: bool = False
    """As in transformers."""
    hf_token: str | None = field(default=None, repr=False)
    """Of the hub that the checkpoint comes from."""
    download_dir: str | None = None
    """Where downloaded checkpoints are kept; None is the hub's own cache."""
    seed: int = 0
    """vLLM's own; no completion depends on it."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM` (`vllm_config`)."""

    def __post_init__(self) -> None:
        assert not (self.adapter and self.sleep_level > 1), "sleep level 2 gives up the base, which `sync` lacks"
        assert self.logprob_temperature in (None, 1.0), "vLLM gives log-probabilities as sampled (None), or at 1.0"
