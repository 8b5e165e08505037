"""Rollouts with vLLM in the trainer's own process: one engine a rank, the adapter served natively.

No child process exists, so none can outlive the run, and a start costs seconds. The price is that vLLM changes the
process it starts in; `_process_unchanged` puts back what the trainer depends on.
"""

import contextlib
import functools
import math
import os
import random
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from grpo_stage.rollout.seeds import sample_seed
from grpo_stage.rollout.weights import servable_config, write_adapter
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup, SamplingSettings


_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for `max_lora_rank`."""

_CPU_KV_CACHE_BYTES = 1 << 30
"""`gpu_memory_utilization` would reserve its share of the machine's whole memory there."""

_CPU_TOKENS_PER_STEP = 256
"""At least vLLM's own number of concurrent sequences; more only makes the warm-up slower."""

_OWNED_OPTIONS = {
    "model": "`model_name_or_path` names the model that is trained",
    "revision": "`model_revision` names the one that is trained",
    "dtype": "it follows the trained model and the device",
    "max_model_len": "`vllm_maxlen` sets it",
    "seed": "each completion has its own seed",
    "skip_tokenizer_init": "token ids go in and out",
    "logprobs_mode": "the log-probabilities are compared with the trainer's",
    "logits_processors": "they would change the distribution that completions are drawn from",
    "enable_lora": "the adapter is how the policy reaches vLLM",
    "max_loras": "exactly one adapter may be loaded",
    "max_cpu_loras": "exactly one adapter may be loaded",
    "max_lora_rank": "`vllm_max_lora_rank` sets it",
    "tensor_parallel_size": "each rank is an engine of its own",
    "pipeline_parallel_size": "each rank is an engine of its own",
    "data_parallel_size": "each rank is an engine of its own",
    "distributed_executor_backend": "the engine lives in the trainer's process",
}
"""`vllm_config` keys that would make rollouts wrong, and why."""


class VLLMEngine:
    """vLLM behind the `RolloutEngine` protocol, started by the constructor."""

    def __init__(
        self,
        *,
        model_name_or_path: str,
        tokenizer: PreTrainedTokenizerBase,
        adapter: bool,
        max_model_len: int,
        max_lora_rank: int,
        gpu_memory_utilization: float,
        enforce_eager: bool,
        dtype: str,
        logprob_temperature: float | None,
        model_revision: str | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            model_name_or_path: the base model's checkpoint.
            model_revision: its branch, tag or commit on a hub.
            tokenizer: decodes completions.
            adapter: whether the policy is that base with a LoRA adapter. Anything else is refused for now.
            max_model_len: the longest prompt and completion together.
            max_lora_rank: the highest rank the adapter can have; rounded up to one that vLLM knows.
            gpu_memory_utilization: the share of the GPU's memory for vLLM. On a CPU the KV cache takes 1 GiB, or
                `VLLM_CPU_KVCACHE_SPACE`.
            enforce_eager: no CUDA graphs. On a CPU always so.
            dtype: `auto` is the checkpoint's own, and float32 on a CPU.
            logprob_temperature: None where sampling is neutral: log-probabilities are then those of the sampled
                distribution, and `generate` sets the attribute to its temperature. 1.0 where top-k, top-p or a penalty
                cuts the distribution: they are then the policy's own, at temperature 1.
            trust_remote_code: as in transformers.
            seed: vLLM's own; no completion depends on it.
            options: further arguments of `vllm.LLM` (`vllm_config`).

        Raises:
            ValueError: for an option or a policy that would make rollouts wrong.
        """
        if not adapter:
            raise ValueError(
                "vLLM takes the policy as a LoRA adapter for now: use `finetuning_type: lora`, or "
                "`rollout_backend: hf`."
            )
        if logprob_temperature not in (None, 1.0):
            raise ValueError(f"logprob_temperature is {logprob_temperature}: vLLM gives None (as sampled) or 1.0.")
        options = options or {}
        for key in options:
            if key in _OWNED_OPTIONS:
                raise ValueError(f"`{key}` cannot be set in vllm_config: {_OWNED_OPTIONS[key]}.")
        if max_lora_rank > _LORA_RANKS[-1]:
            raise ValueError(f"The LoRA rank is {max_lora_rank}, and vLLM serves at most {_LORA_RANKS[-1]}.")

        self.logprob_temperature = math.nan if logprob_temperature is None else logprob_temperature
        self._as_sampled = logprob_temperature is None
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._adapters = 0
        self._versions: dict[int, int] = {}
        self._lora: Any = None

        arguments: dict[str, Any] = {
            "model": model_name_or_path,
            "revision": model_revision,
            "skip_tokenizer_init": True,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "enable_lora": True,
            "max_loras": 1,
            "max_cpu_loras": 1,
            "max_lora_rank": next(rank for rank in _LORA_RANKS if rank >= max_lora_rank),
            "logprobs_mode": "processed_logprobs" if self._as_sampled else "raw_logprobs",
            "enable_prefix_caching": True,  # the completions of a group share their prompt
            "gpu_memory_utilization": gpu_memory_utilization,
            "enforce_eager": enforce_eager,
            "trust_remote_code": trust_remote_code,
            "seed": seed,
            "generation_config": "vllm",
            "use_tqdm_on_load": False,
            # On a GPU only this executor puts each rank's engine on the rank's own device.
            "distributed_executor_backend": "external_launcher" if _num_ranks() > 1 else "uni",
        }
        owns_process_group = not torch.distributed.is_initialized()
        with _process_unchanged():
            self._llm: Any = _start(arguments, options)
        self._release = weakref.finalize(self, _release, self._llm, owns_process_group)

    def sync(self, policy: torch.nn.Module, version: int) -> None:
        """Load the policy's adapter, and nothing else, into the engine.

        Raises:
            ValueError: if vLLM cannot serve the adapter.
            RuntimeError: if the engine holds anything but the new adapter afterwards.
        """
        from vllm.lora.request import LoRARequest

        servable_config(policy)
        engine = self._llm.llm_engine
        self._lora = None
        for adapter_id in engine.list_loras():
            engine.remove_lora(adapter_id)
        self._adapters += 1
        adapter_id = self._adapters
        # The files are read once, by add_lora, so nothing of them is left behind however the run ends.
        with tempfile.TemporaryDirectory(prefix="grpo-stage-adapter-") as folder, _random_states_unchanged():
            write_adapter(policy, Path(folder))
            lora = LoRARequest(self._adapter_name(adapter_id), adapter_id, folder)
            added = engine.add_lora(lora)
        self._versions[adapter_id] = version
        if not added or self._loaded_adapter() != adapter_id:
            raise RuntimeError(
                f"vLLM was given the adapter of version {version} (id {adapter_id}) and holds {engine.list_loras()}."
            )
        self._lora = lora

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> list[RolloutGroup]:
        if self._lora is None:
            raise RuntimeError("generate() was called before sync(): there is no policy to sample from.")
        if self._as_sampled:
            if not sampling.is_neutral:
                raise ValueError(
                    "The engine was started for neutral sampling, and top_k, top_p or repetition_penalty is set: its "
                    "log-probabilities would not be the policy's. Start it with logprob_temperature=1.0."
                )
            self.logprob_temperature = sampling.temperature
        for prompt in prompts:
            if len(prompt.token_ids) + sampling.max_new_tokens > self._max_model_len:
                raise ValueError(
                    f"Prompt {prompt.index} has {len(prompt.token_ids)} tokens: with max_new_tokens "
                    f"{sampling.max_new_tokens} it passes the engine's {self._max_model_len}. Raise `vllm_maxlen`, or "
                    "lower `cutoff_len` or `max_new_tokens`."
                )
        group_size = sampling.num_generations
        with _random_states_unchanged(), _eager_on_cpu():
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts for _ in range(group_size)],
                [
                    _sampling_params(sampling, sample_seed(sampling.seed, step, prompt.index, sample))
                    for prompt in prompts
                    for sample in range(group_size)
                ],
                lora_request=self._lora,
                use_tqdm=False,
            )
        return [
            self._group(prompt, outputs[i * group_size : (i + 1) * group_size], sampling)
            for i, prompt in enumerate(prompts)
        ]

    def close(self) -> None:
        self._lora = None
        self._llm = None
        self._release()

    def _adapter_name(self, adapter_id: int) -> str:
        """Never one that was used before: vLLM's prefix cache is keyed by the name, and would answer from old keys."""
        return f"policy-{adapter_id}"

    def _loaded_adapter(self) -> int | None:
        """The one adapter that the engine holds, from the engine itself; None where it is not exactly one."""
        loaded = self._llm.llm_engine.list_loras()
        return next(iter(loaded)) if len(loaded) == 1 else None

    def _group(self, prompt: Prompt, outputs: Sequence[Any], sampling: SamplingSettings) -> RolloutGroup:
        loaded = self._loaded_adapter()
        answered = {output.lora_request.lora_int_id if output.lora_request else None for output in outputs}
        if loaded is None or answered != {loaded}:
            raise RuntimeError(
                f"Prompt {prompt.index} was answered by the adapter ids {answered} and vLLM holds {loaded}: the "
                "completions cannot be said to come from one policy."
            )
        if len(outputs) != sampling.num_generations or any(
            tuple(output.prompt_token_ids) != prompt.token_ids for output in outputs
        ):
            raise RuntimeError(f"vLLM's answers to prompt {prompt.index} are not answers to that prompt.")
        return RolloutGroup(
            prompt=prompt,
            completions=tuple(self._completion(output.outputs[0]) for output in outputs),
            policy_version=self._versions[loaded],
        )

    def _completion(self, output: Any) -> Completion:
        token_ids = tuple(output.token_ids)
        return Completion(
            token_ids=token_ids,
            sampling_logprobs=tuple(
                position[token].logprob for token, position in zip(token_ids, output.logprobs, strict=True)
            ),
            finish_reason=FinishReason(output.finish_reason),
            text=self._tokenizer.decode(token_ids, skip_special_tokens=True),
        )


def _sampling_params(sampling: SamplingSettings, seed: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        seed=seed,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,  # the end tokens are those above, and no other that vLLM finds in a checkpoint
        logprobs=0,
        detokenize=False,
    )


def _num_ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _start(arguments: dict[str, Any], options: dict[str, Any]) -> Any:
    """Start vLLM in this process. To be called inside `_process_unchanged`, which undoes the environment variables."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        from vllm import LLM

        return LLM(**arguments | options)

    if "enable_chunked_prefill" in options:
        raise ValueError(
            "`enable_chunked_prefill` cannot be set in vllm_config on a CPU: vLLM's seeds fail with it there."
        )
    _patch_vllm_for_cpu()
    from vllm import LLM

    arguments |= {
        # Half precision is emulated on most processors: 8 times slower.
        "dtype": "float32" if arguments["dtype"] == "auto" else arguments["dtype"],
        "kv_cache_memory_bytes": _CPU_KV_CACHE_BYTES,
        "block_size": 32,  # only whole blocks are shared, and vLLM's 128 is longer than many prompts
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(arguments["max_model_len"], _CPU_TOKENS_PER_STEP),
        "enforce_eager": True,
    }
    with _eager_on_cpu():
        return LLM(**arguments | options)


def _eager_on_cpu() -> contextlib.AbstractContextManager[None]:
    """No torch.compile there: 20 s each, and a C++ compiler, for a sampler that is not used and for tokens' ranks."""
    from vllm.platforms import current_platform

    return torch.compiler.set_stance("force_eager") if current_platform.is_cpu() else contextlib.nullcontext()


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
    _add_one_adapter_at_once()


def _add_one_adapter_at_once() -> None:
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
        product = x.to(y.dtype) @ weights[0, 0].T
        part.add_(product) if add_inputs else part.copy_(product)

    PunicaWrapperCPU._apply_shrink, PunicaWrapperCPU._apply_expand = apply_shrink, apply_expand


@contextlib.contextmanager
def _random_states_unchanged() -> Iterator[None]:
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
def _process_unchanged() -> Iterator[None]:
    """Put back what starting vLLM changes: random states, environment variables, `torch.set_num_threads`."""
    environment = dict(os.environ)
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    matmul_precision = torch.get_float32_matmul_precision()
    try:
        with _random_states_unchanged():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        torch.set_float32_matmul_precision(matmul_precision)
        os.environ.clear()
        os.environ.update(environment)


def _release(llm: Any, owns_process_group: bool) -> None:
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
