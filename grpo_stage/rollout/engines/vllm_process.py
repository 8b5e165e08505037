"""vLLM in the trainer's own process: its start, what it must not change there, and its end.

No child process exists, so none can outlive the run, and a start costs seconds. The price is that vLLM changes the
process it starts in; `process_unchanged` puts back what the trainer depends on.
"""

import contextlib
import functools
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from grpo_stage.rollout.engines.vllm_options import refuse_options


_CPU_KV_CACHE_BYTES = 1 << 30
"""`gpu_memory_utilization` would reserve its share of the machine's whole memory there."""

_CPU_TOKENS_PER_STEP = 256
"""At least vLLM's own number of concurrent sequences; more only makes the warm-up slower."""

_LONGEST_FOLDER_OF_SOCKETS = 70
"""Ranks that share an engine meet at a socket there, with a name of 36 characters, and its path has 107 at most."""


def num_ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def start(arguments: dict[str, Any], options: dict[str, Any]) -> Any:
    """Start vLLM in this process. To be called inside `process_unchanged`, which undoes the environment variables."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # vLLM has two model runners, and the second is its choice for some models on CUDA; only the first was run here.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    if len(tempfile.gettempdir()) > _LONGEST_FOLDER_OF_SOCKETS:
        os.environ.setdefault("VLLM_RPC_BASE_PATH", "/tmp")
    if options:
        refuse_options(options, is_on_cpu())
    if not is_on_cpu():
        from vllm import LLM
        from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

        _add_one_adapter_to_all_logits(PunicaWrapperGPU)
        return LLM(**arguments | options)

    _patch_vllm_for_cpu()
    from vllm import LLM
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    _add_one_adapter_to_all_logits(PunicaWrapperCPU)

    arguments |= {
        # Half precision is emulated on most processors: 8 times slower.
        "dtype": "float32" if arguments["dtype"] == "auto" else arguments["dtype"],
        "kv_cache_memory_bytes": _CPU_KV_CACHE_BYTES,
        "block_size": 32,  # only whole blocks are shared, and vLLM's 128 is longer than many prompts
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(arguments["max_model_len"], _CPU_TOKENS_PER_STEP),
        "enforce_eager": True,
    }
    with eager_on_cpu():
        return LLM(**arguments | options)


def is_on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def pack_tied_weights_on_cpu(llm: Any) -> None:
    """Give an output layer that shares the embeddings its packed copy anew, after a reload.

    On the CPU vLLM multiplies with a packed copy of each layer's weights. Its reload packs the layers that the
    checkpoint names, and it does not name a tied output layer: the old copy would go on answering.
    """
    if is_on_cpu():
        llm.apply_model(_pack_output_layers)


def _pack_output_layers(model: torch.nn.Module) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def eager_on_cpu() -> contextlib.AbstractContextManager[None]:
    """No torch.compile there: 20 s each, and a C++ compiler, for a sampler that is not used and for tokens' ranks."""
    return torch.compiler.set_stance("force_eager") if is_on_cpu() else contextlib.nullcontext()


def _patch_vllm_for_cpu() -> None:
    """vLLM's own replacements for CUDA calls, before anything binds the originals.

    vLLM makes them when the worker is imported, which is too late for a module that some other import (a first start
    on a machine inspects the model's class) brought in before: LoRA then asks for pinned memory and fails for want of
    a GPU driver.
    """
    import vllm.v1.worker.cpu.shm  # noqa: F401
    from vllm.utils import torch_utils

    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and hasattr(module, "async_tensor_h2d"):
            module.async_tensor_h2d = torch_utils.async_tensor_h2d  # type: ignore[attr-defined]
    add_one_adapter_at_once()
    _communicate_over_gloo()


def _communicate_over_gloo() -> None:
    """Between ranks that share an engine.

    vLLM would have them wait for each other at full load, in shared memory that has the same name in every run of a
    machine and that a killed run leaves there, so that no later one starts.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False


def add_one_adapter_at_once() -> None:
    """With one adapter, its share of a linear layer is two matrix products.

    vLLM's CPU path copies the adapter's weights out for every token, since tokens may use different adapters, which
    takes longer than the model itself. Its own methods are kept for an engine of several adapters.
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    shrink, expand = PunicaWrapperCPU._apply_shrink, PunicaWrapperCPU._apply_expand
    if hasattr(shrink, "__wrapped__"):
        return

    @functools.wraps(shrink)
    def apply_shrink(self: Any, y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, scale: float) -> None:
        if weights.shape[0] > 1:  # [adapters, 1, rank, in]
            return shrink(self, y, x, weights, scale)
        y.view(-1, y.shape[-1]).copy_(x.view(-1, x.shape[-1]).to(weights.dtype) @ weights[0, 0].T).mul_(scale)

    @functools.wraps(expand)
    def apply_expand(
        self: Any, y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, start: int, width: int, add_inputs: bool
    ) -> None:
        if weights.shape[0] > 1:  # [adapters, 1, out, rank]
            return expand(self, y, x, weights, start, width, add_inputs)
        part = y[:, start : start + width]
        # Of ranks that share an engine each may have computed all of x: vLLM gathers it, and reads the first rank's.
        product = x[:, : weights.shape[-1]].to(y.dtype) @ weights[0, 0].T
        part.add_(product) if add_inputs else part.copy_(product)

    PunicaWrapperCPU._apply_shrink, PunicaWrapperCPU._apply_expand = apply_shrink, apply_expand


def _add_one_adapter_to_all_logits(wrapper: Any) -> None:
    """With one adapter, its share of every row of logits, those of a prompt as well.

    vLLM knows the adapter of the row that it samples from, one a request. Of the rows of `prompt_logprobs` it leaves
    the output layer's adapter out on CUDA, and it fails on the CPU.
    """
    add = wrapper.add_lora_logits
    if hasattr(add, "__wrapped__"):
        return

    @functools.wraps(add)
    def add_lora_logits(
        self: Any, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, **kwargs: Any
    ) -> None:
        if a.shape[0] > 1:  # [adapters, 1, rank, in]
            return add(self, y, x, a, b, scale, **kwargs)
        product = (x @ a[0, 0].to(x.dtype).T * scale) @ b[0, 0].to(x.dtype).T
        y[:, : product.shape[1]].add_(product[:, : y.shape[1]])

    wrapper.add_lora_logits = add_lora_logits


@contextlib.contextmanager
def random_states_unchanged() -> Iterator[None]:
    """vLLM reseeds the global generators at its start, and draws from torch's at every step."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def process_unchanged() -> Iterator[None]:
    """Put back what starting vLLM changes: random states, environment variables, `torch.set_num_threads`."""
    environment = dict(os.environ)
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    put_back_precision = _float32_precision()
    try:
        with random_states_unchanged():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        put_back_precision()
        os.environ.clear()
        os.environ.update(environment)


def _float32_precision() -> Callable[[], None]:
    """What puts back today's precision of float32 products, by the interface of torch that set it.

    transformers' `tf32` sets it by the newer one, and torch then refuses to read the older one, which vLLM sets.
    """
    torch_backends: Any = torch.backends
    backends = (torch_backends, torch_backends.cuda.matmul, torch_backends.mkldnn.matmul)
    newer = [backend.fp32_precision for backend in backends]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:

        def put_back() -> None:
            for backend, precision in zip(backends, newer, strict=True):
                backend.fp32_precision = precision

        return put_back
    return functools.partial(torch.set_float32_matmul_precision, older)


def release(llm: Any, owns_process_group: bool) -> None:
    """Shut the engine down and give back its memory and its process groups.

    vLLM's shutdown also destroys torch's default group, which under torchrun is the trainer's and not vLLM's.
    """
    from vllm.distributed import parallel_state

    destroy_environment = parallel_state.destroy_distributed_environment
    if not torch.distributed.is_initialized():  # the host has destroyed every group before, and vLLM's with them
        _forget_process_groups()
    elif not owns_process_group:
        parallel_state.destroy_distributed_environment = _destroy_world_group
    try:
        llm.llm_engine.engine_core.shutdown()
        parallel_state.cleanup_dist_env_and_memory()
    finally:
        parallel_state.destroy_distributed_environment = destroy_environment


def _destroy_world_group() -> None:
    from vllm.distributed import parallel_state

    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = None
    parallel_state._NODE_COUNT = None


def _forget_process_groups() -> None:
    from vllm.distributed import parallel_state

    for name in ("_WORLD", "_TP", "_DCP", "_PCP", "_PP", "_DP", "_EP", "_EPLB"):
        setattr(parallel_state, name, None)
