"""What a run with `rollout_backend: hf` is refused for. The other engines' refusals name this one as the remedy."""

from types import SimpleNamespace

from grpo_stage.algorithm.conditions import Rule


USE_HF = "Write `rollout_backend: hf`, which samples with the trained model itself"


def _has_vllm_keys(v: SimpleNamespace) -> bool:
    """Those that the user wrote: the ones with a default of this stage's own are None otherwise."""
    keys = ("vllm_maxlen", "vllm_gpu_util", "vllm_max_lora_rank", "vllm_enforce_eager", "vllm_config")
    return any(getattr(v, key) for key in keys)


HF_RULES = (
    Rule(
        _has_vllm_keys,
        "`rollout_backend: hf` samples without vLLM, so that the `vllm_*` keys of this run would have no effect. "
        "Leave them out, or write `rollout_backend: vllm`.",
    ),
)
