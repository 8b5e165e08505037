"""The rollout engines by their name in `rollout_backend`: what each refuses, and how it is built.

Loads no engine, and no torch: the host's checks read the rules of the chosen one before anything else is imported.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

from grpo_stage.algorithm.conditions import Rule
from grpo_stage.rollout.engines import vllm_rules, vllm_server_rules
from grpo_stage.rollout.engines.request import EngineRequest
from grpo_stage.types import RolloutEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEntry:
    """One engine."""

    build: Callable[[EngineRequest], RolloutEngine]
    rules: tuple[Rule, ...] = ()
    """Of the keys alone, before the host parses them. `adapter_rank`, the rank of the adapter that is trained, is
    among the values that they see."""
    refuse_adapter: Callable[[str, Mapping[str, Any], SimpleNamespace], None] = lambda path, config, values: None
    """Asked about the adapter that is trained further: its path, what its adapter_config.json says, and the keys."""
    refuse_unfit: Callable[[SimpleNamespace], None] = lambda values: None
    """Asked about the parsed keys, with `device_type`, `model_quantization` (the method that the model's files are
    quantized with, or None), `model_positions` (how many tokens the model was made for, or None) `is_tied`
    (whether its output layer has the embeddings' weight), and `model_heads` and `model_kv_heads` (of its attention, or
    None) among them."""
    check_service: Callable[[SimpleNamespace, bool], None] = lambda values, is_first_rank: None
    """Asked on every rank about the parsed keys of a run that is about to start, before a model is loaded: whether
    what runs elsewhere is there, and fit."""
    rounds_on_gpu: bool = False
    """Whether it rounds on a GPU where the run computes in float32."""


def _build_hf(request: EngineRequest) -> RolloutEngine:
    from grpo_stage.rollout.engines.hf import HFEngine

    return HFEngine(request.tokenizer, autocast_dtype=request.autocast_dtype, images=request.images)


def _build_vllm(request: EngineRequest) -> RolloutEngine:
    from grpo_stage.rollout.engines.vllm_start import start_vllm

    return start_vllm(request)


def _build_vllm_server(request: EngineRequest) -> RolloutEngine:
    from grpo_stage.rollout.engines.vllm_server import connect

    return connect(request)


def _check_vllm_servers(values: SimpleNamespace, is_first_rank: bool) -> None:
    from grpo_stage.rollout.engines.vllm_server_check import check_servers

    check_servers(values, is_first_rank=is_first_rank)


ENGINES: Mapping[str, EngineEntry] = MappingProxyType(
    {
        "hf": EngineEntry(build=_build_hf),
        "vllm": EngineEntry(
            build=_build_vllm,
            rules=vllm_rules.VLLM_RULES,
            refuse_adapter=vllm_rules.refuse_adapter,
            refuse_unfit=vllm_rules.refuse_unfit,
            rounds_on_gpu=True,  # in its attention
        ),
        "vllm_server": EngineEntry(
            build=_build_vllm_server,
            rules=vllm_server_rules.SERVER_RULES,
            refuse_adapter=vllm_rules.refuse_adapter,
            refuse_unfit=vllm_server_rules.refuse_unfit,
            check_service=_check_vllm_servers,
            rounds_on_gpu=True,
        ),
    }
)
