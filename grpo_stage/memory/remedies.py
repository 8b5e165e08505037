"""What to change in a recipe that does not fit, in the order of what it costs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True, slots=True)
class Remedy:
    """One change."""

    keys: Mapping[str, Any]
    """As lines of YAML."""
    cost: str
    """What is given up."""


_Rule = Callable[[SimpleNamespace, str], Remedy | None]


def _sleep(v: SimpleNamespace, device_type: str) -> Remedy | None:
    if v.rollout_backend != "vllm" or device_type != "cuda" or v.vllm_sleep:
        return None
    level = 1 if v.finetuning_type in ("lora", "oft") else 2
    return Remedy({"vllm_sleep": level}, "about a second a step, to wake the engine")


def _share(v: SimpleNamespace, device_type: str) -> Remedy | None:
    if v.rollout_backend != "vllm" or device_type != "cuda" or v.vllm_gpu_util <= 0.15:
        return None
    return Remedy({"vllm_gpu_util": round(v.vllm_gpu_util / 2, 2)}, "a smaller KV cache: fewer completions at a time")


def _checkpointing(v: SimpleNamespace, device_type: str) -> Remedy | None:
    if not v.checkpointing_is_off:
        return None
    return Remedy({"disable_gradient_checkpointing": False}, "about a third more computation in the update")


def _micro_batch(tokens: int) -> _Rule:
    def rule(v: SimpleNamespace, device_type: str) -> Remedy | None:
        if v.max_tokens_per_micro_batch <= tokens:
            return None
        return Remedy({"max_tokens_per_micro_batch": tokens}, "speed, if the device is no longer busy; no accuracy")

    return rule


def _optimizer(v: SimpleNamespace, device_type: str) -> Remedy | None:
    if v.finetuning_type not in ("full", "freeze") or device_type != "cuda" or "8bit" in str(v.optim):
        return None
    return Remedy({"optim": "adamw_8bit"}, "states of the optimizer are rounded (bitsandbytes)")


def _half_precision(v: SimpleNamespace, device_type: str) -> Remedy | None:
    if v.finetuning_type not in ("full", "freeze") or device_type != "cuda" or v.pure_bf16:
        return None
    keys = {"pure_bf16": True, "bf16": False, "fp16": False}
    return Remedy(keys, "trained weights are rounded to bf16: updates below 1/256 of a weight are lost")


def _lora(v: SimpleNamespace, device_type: str) -> Remedy | None:
    if v.finetuning_type not in ("full", "freeze"):
        return None
    keys: dict[str, Any] = {"finetuning_type": "lora"}
    if v.vllm_sleep == 2:  # gives up weights that only full and freeze tuning deliver again
        keys["vllm_sleep"] = 1
    return Remedy(keys, "adapters are trained, not weights")


def _qlora(v: SimpleNamespace, device_type: str) -> Remedy | None:
    if v.finetuning_type not in ("lora", "oft") or device_type != "cuda" or v.quantization_bit is not None:
        return None
    return Remedy({"quantization_bit": 4}, "the base is rounded to 4 bits, and each pass unpacks it")


def _shorter(v: SimpleNamespace, device_type: str) -> Remedy | None:
    if v.max_new_tokens < 256:
        return None
    return Remedy({"max_new_tokens": v.max_new_tokens // 2}, "longer completions are cut off")


_RULES: tuple[_Rule, ...] = (
    _sleep,
    _checkpointing,
    _micro_batch(4096),
    _micro_batch(2048),
    _micro_batch(1024),
    _share,
    _optimizer,
    _half_precision,
    _lora,
    _qlora,
    _shorter,
)


def next_remedies(values: Mapping[str, Any], device_type: str) -> Iterator[Remedy]:
    """Changes that apply to a recipe, the cheapest first.

    Args:
        values: every key of the recipe, and `checkpointing_is_off`, whether activations are kept in the run.
        device_type: `cuda` or `cpu`.
    """
    for rule in _RULES:
        if (remedy := rule(SimpleNamespace(**values), device_type)) is not None:
            yield remedy
