"""How a run starts vLLM: from which model, in which precision, with room for which adapter."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

from grpo_stage.algorithm.conditions import refuse_broken
from grpo_stage.distributed import all_gather, process_index
from grpo_stage.rollout.engines.request import EngineRequest
from grpo_stage.rollout.engines.vllm import VLLMEngine
from grpo_stage.rollout.engines.vllm_apart import VLLMApart, device_environment
from grpo_stage.rollout.engines.vllm_rules import RANK_RULES
from grpo_stage.rollout.engines.vllm_settings import VLLMSettings
from grpo_stage.rollout.engines.weights import servable_config, write_base
from grpo_stage.types import RolloutEngine


_NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def start_vllm(request: EngineRequest) -> RolloutEngine:
    """Start an engine: in this process, or with `rollout_ahead` in one of its own.

    Raises:
        ValueError: for a precision or an adapter that vLLM cannot serve, as far as the rules could not tell.
    """
    keys = request.keys
    serves_adapter = _serves_adapter(keys)
    sleep_level, dtype = _sleep_level(request), _dtype(request)
    max_lora_rank = _max_lora_rank(request) if serves_adapter else 0
    if keys.finetuning_type == "lora" and not serves_adapter:
        servable_config(request.policy, is_merged=True)  # before anything is written
    with _model_to_start_from(request) as (path, quantization):
        request.announce(f"Starting vLLM with {path}.")
        started = time.perf_counter()
        settings = VLLMSettings(
            model_name_or_path=path,
            adapter=serves_adapter,
            # To be scored, a whole completion needs room for one more token.
            max_model_len=keys.vllm_maxlen + (request.sampling.structured_outputs is not None),
            max_lora_rank=max_lora_rank,
            gpu_memory_utilization=keys.vllm_gpu_util,
            enforce_eager=keys.vllm_enforce_eager,
            dtype=str(dtype).removeprefix("torch."),
            logprob_temperature=None if request.sampling.is_neutral else 1.0,
            sleep_level=sleep_level,
            reads_text=request.sampling.structured_outputs is not None,
            max_images=0 if request.images is None else request.images.num_images,
            quantization=quantization,
            tensor_parallel_size=keys.vllm_tensor_parallel,
            timeout_s=keys.ddp_timeout,
            model_revision=keys.model_revision,
            trust_remote_code=keys.trust_remote_code,
            hf_token=keys.hf_hub_token,
            download_dir=keys.cache_dir,
            seed=keys.seed,
            options=keys.vllm_config or {},
        )
        engine: RolloutEngine
        if keys.rollout_ahead:
            engine = VLLMApart(settings, request.tokenizer, _environment_apart(request))
        else:
            engine = VLLMEngine(settings, request.tokenizer, request.images)
        request.announce(f"vLLM started in {time.perf_counter() - started:.1f} s.")
    return engine


def _environment_apart(request: EngineRequest) -> dict[str, str]:
    if request.device_type != "cuda":
        return {}
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    environment = device_environment(
        request.local_process_index,
        num_ranks,
        torch.cuda.device_count(),
        os.environ.get("CUDA_VISIBLE_DEVICES"),
    )
    if torch.cuda.device_count() < 2 * num_ranks:
        request.warn(
            f"`rollout_ahead: {request.keys.rollout_ahead}` on {torch.cuda.device_count()} GPUs for {num_ranks} "
            "processes: vLLM and the update share each GPU, and each slows the other down. It pays where vLLM has a "
            "GPU of its own: start half as many processes as there are GPUs (`NPROC_PER_NODE`)."
        )
    return environment


def _serves_adapter(keys: SimpleNamespace) -> bool:
    return keys.finetuning_type == "lora" and keys.vllm_lora == "native"


def _sleep_level(request: EngineRequest) -> int:
    level = request.keys.vllm_sleep
    if request.device_type == "cpu" and level:
        request.warn(f"`vllm_sleep: {level}` has no effect on a CPU: vLLM frees memory of GPUs alone.")
        return 0
    return level


def _dtype(request: EngineRequest) -> torch.dtype:
    if request.device_type == "cpu":
        return torch.float32
    if _serves_adapter(request.keys) and request.compute_dtype == torch.float32:
        raise ValueError(
            "The run computes in float32, and vLLM's kernels for a LoRA adapter on a GPU know half precision alone. "
            "Write `bf16: true` or `vllm_lora: merged`, or use `rollout_backend: hf` or `finetuning_type: full`."
        )
    return request.compute_dtype


def _max_lora_rank(request: EngineRequest) -> int:
    """The highest rank that vLLM makes room for; that of an adapter from a hub is known since it was loaded."""
    rank = servable_config(request.policy).r
    own = request.keys.vllm_max_lora_rank if "vllm_max_lora_rank" in request.given else None
    backend = request.keys.rollout_backend
    refuse_broken(RANK_RULES, SimpleNamespace(adapter_rank=rank, vllm_max_lora_rank=own, rollout_backend=backend))
    return own or rank


@contextlib.contextmanager
def _model_to_start_from(request: EngineRequest) -> Iterator[tuple[str, str | None]]:
    """What vLLM starts from, and what it quantizes that with: the user's files where they hold the trainer's model.

    Otherwise the trainer's is written out, once a node, and deleted as soon as every engine has started.
    """
    changes = request.changes_to_files
    if request.keys.vllm_base == "auto":
        path = request.keys.model_name_or_path
        if not changes:
            yield path, None
            return
        # 4 bits hold no merged weight, and a part of a weight would be quantized in other blocks.
        is_kept = request.device_type == "cuda" and request.keys.vllm_lora == "native"
        is_kept = is_kept and request.keys.vllm_tensor_parallel == 1
        if changes == ("quantized",) and is_kept and _quantizes_alike(request):
            yield path, "bitsandbytes"
            return
    is_writer = request.local_process_index == 0
    with tempfile.TemporaryDirectory(prefix="grpo-stage-base-") if is_writer else contextlib.nullcontext() as own:
        if own is not None:
            request.announce(
                f"Writing the trainer's model ({', '.join(changes) or '`vllm_base: trainer`'}) to {own} for vLLM to "
                "start from; it is deleted afterwards."
            )
            write_base(request.policy, Path(own))
            if request.images is not None:
                request.processor.save_pretrained(own)
        folders = all_gather(own)  # which waits for the writers
        folder = folders[process_index() - request.local_process_index]
        assert folder is not None
        yield folder, None
        all_gather(None)  # nobody reads it any more


def _quantizes_alike(request: EngineRequest) -> bool:
    """vLLM's bitsandbytes knows 4 bits of one kind: `nf4` with double quantization, in blocks of the usual size.

    It quantizes what the files hold, and the host what that is in the precision of training; and it quantizes a
    mixture's experts, which transformers leaves as they are.
    """
    quantization, files = request.policy.config.quantization_config, request.load_config()
    text_config = files.get_text_config()
    if any(getattr(text_config, key, None) for key in _NUMBERS_OF_EXPERTS):
        return False
    if not (
        quantization.load_in_4bit
        and quantization.bnb_4bit_quant_type == "nf4"
        and quantization.bnb_4bit_use_double_quant
    ):
        return False
    if getattr(files, "quantization_config", None) is not None:  # vLLM reads no other storage
        return quantization.bnb_4bit_quant_storage == torch.uint8
    return text_config.dtype == request.keys.compute_dtype
