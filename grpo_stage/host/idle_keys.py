"""Messages for keys of the host that have no effect in a run; `combinations.ONLY_WITH` says which keys these are."""

from types import MappingProxyType, SimpleNamespace

from grpo_stage.algorithm.combinations import ONLY_WITH
from grpo_stage.algorithm.conditions import Rule
from grpo_stage.arguments import grpo_field_names


_NEUTRAL = MappingProxyType({"reward_model_type": "lora"})
"""Values without any effect, beside those that are empty."""


def _idle(other: str, message: str) -> Rule:
    """A rule that refuses keys of the host under values of `other` with which they have no effect."""
    allowed = {key: conditions[other] for key, conditions in ONLY_WITH.items() if other in conditions}
    keys = sorted(allowed.keys() - grpo_field_names())

    def is_idle(v: SimpleNamespace) -> bool:
        written = [key for key in keys if getattr(v, key) and getattr(v, key) != _NEUTRAL.get(key)]
        return any(getattr(v, other) not in allowed[key] for key in written)

    return Rule(is_idle, message)


IDLE_KEYS = (
    _idle(
        "rollout_backend",
        "`rollout_backend: {rollout_backend}` samples without vLLM, so that the `vllm_*` keys of this run would have "
        "no effect. Leave them out, or write `rollout_backend: vllm`.",
    ),
    _idle(
        "beta",
        "`ref_model: {ref_model}` has no effect with `beta: 0`: the KL to the reference has no weight in the loss. "
        "Write for example `beta: 0.04`, or leave `ref_model` out.",
    ),
    _idle(
        "ref_model",
        "`ref_model_adapters` and `ref_model_quantization_bit` have no effect without `ref_model`: the reference is "
        "then the policy as it was at the start. Write `ref_model`, or leave them out.",
    ),
    _idle(
        "reward_model",
        "`reward_model_type: {reward_model_type}`, `reward_model_adapters: {reward_model_adapters}` and "
        "`reward_model_quantization_bit: {reward_model_quantization_bit}` have no effect without `reward_model`. "
        "Write `reward_model`, or leave them out.",
    ),
    _idle(
        "reward_model_type",
        "`reward_model_adapters: {reward_model_adapters}` and `reward_model_quantization_bit: "
        "{reward_model_quantization_bit}` have no effect with `reward_model_type: {reward_model_type}`: they are of a "
        "model of its own. Write `reward_model_type: full`, or leave them out.",
    ),
)
