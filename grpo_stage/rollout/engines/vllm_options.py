"""Which of vLLM's own options a run may set (`vllm_config`), told without importing vLLM."""

import ast
import difflib
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for `max_lora_rank`."""


def rank_with_room(rank: int) -> int:
    """The lowest of them with room for an adapter of this rank, which must not be above the highest."""
    assert rank <= LORA_RANKS[-1], f"the LoRA rank is {rank}, and vLLM serves at most {LORA_RANKS[-1]}"
    return next(served for served in LORA_RANKS if served >= rank)


_BASE = "the engine starts from the model that is trained"
_RANKS = "each rank is an engine of its own"
_FREE = "completions are sampled from the policy as it is"
_TOKENS = "token ids go in and out"
OWNED_OPTIONS = {
    "model": "`model_name_or_path` names the model that is trained",
    "revision": "`model_revision` names the one that is trained",
    "trust_remote_code": "LLaMA-Factory's key of that name says it for the trainer and the engine alike",
    "hf_token": "`hf_hub_token` sets it",
    "dtype": "it follows the trained model and the device",
    "max_model_len": "`vllm_maxlen` sets it",
    "seed": "each completion has its own seed",
    "skip_tokenizer_init": _TOKENS,
    "logprobs_mode": "the log-probabilities are compared with the trainer's",
    "logits_processors": "they would change the distribution that completions are drawn from",
    "quantization": "`vllm_base` says how vLLM holds the model",
    "quantization_config": "`vllm_base` says how vLLM holds the model",
    "load_format": "the weights are those of the model that is trained",
    "enable_sleep_mode": "`vllm_sleep` sets it",
    "enable_lora": "the tuning method decides how the policy reaches vLLM",
    "lora_target_modules": "the tuning method decides how the policy reaches vLLM",
    "weight_transfer_config": "the tuning method decides how the policy reaches vLLM",
    "default_mm_loras": "exactly one adapter may be loaded",
    "max_loras": "exactly one adapter may be loaded",
    "max_cpu_loras": "exactly one adapter may be loaded",
    "max_lora_rank": "`vllm_max_lora_rank` sets it",
    "tensor_parallel_size": "`vllm_tensor_parallel` sets it",
    "distributed_executor_backend": "the engine lives in the trainer's process",
    **dict.fromkeys(("tokenizer", "tokenizer_mode", "tokenizer_revision"), _TOKENS),
    **dict.fromkeys(("model_weights", "hf_config_path", "config_format", "hf_overrides", "code_revision"), _BASE),
    **dict.fromkeys(("runner", "convert", "pooler_config"), "the engine generates"),
    **dict.fromkeys(
        (
            *("generation_config", "override_generation_config", "structured_outputs_config"),
            *("speculative_config", "spec_method", "spec_model", "spec_tokens"),
        ),
        _FREE,
    ),
    **dict.fromkeys(
        (
            *("pipeline_parallel_size", "nnodes", "node_rank", "master_addr", "master_port"),
            *("data_parallel_size", "data_parallel_rank", "data_parallel_start_rank", "data_parallel_size_local"),
            *("data_parallel_address", "data_parallel_rpc_port", "data_parallel_hybrid_lb", "data_parallel_backend"),
            *("data_parallel_external_lb", "data_parallel_multi_port_external_lb"),
            *("_api_process_count", "_api_process_rank"),
        ),
        _RANKS,
    ),
}
"""`vllm_config` keys that would make rollouts wrong, and why."""

SERVER_OPTIONS = frozenset({"tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend"})
"""Those of them that a server of its own may have."""

_IMPORTED = "vLLM imports the code that it names, and a recipe alone must not run code"
CODE_OPTIONS = {
    **dict.fromkeys(
        (
            *("worker_cls", "worker_extension_cls", "scheduler_cls", "io_processor_plugin", "reasoning_parser_plugin"),
            *("kv_transfer_config", "ec_transfer_config", "model_loader_extra_config"),
        ),
        _IMPORTED,
    ),
    "kv_events_config": "it opens a port to the network",
    "otlp_traces_endpoint": "it sends what the engine does to an address",
}
"""`vllm_config` keys that name code to run or an address to talk to, and why a recipe may not set them."""

COMPILATION_OPTIONS = frozenset(
    {
        *("mode", "level", "custom_ops", "splitting_ops", "compile_sizes", "compile_ranges_endpoints"),
        *("cudagraph_mode", "cudagraph_capture_sizes", "max_cudagraph_capture_size", "cudagraph_num_of_warmups"),
        *("cudagraph_copy_inputs", "cudagraph_specialize_lora", "use_inductor_graph_partition", "pass_config"),
    }
)
"""Keys of vLLM's `compilation_config` that name no code. Its `backend` and `inductor_passes` name functions, and
`inductor_compile_config` a compiler."""

_HARMLESS = """
    additional_config aggregate_engine_logging all2all_backend allow_deprecated_quantization
    allowed_local_media_path allowed_media_domains async_scheduling attention_backend attention_config block_size
    calculate_kv_scales collect_detailed_traces cp_kv_cache_interleave_size cpu_distributed_timeout_seconds
    cpu_offload_gb cpu_offload_params cudagraph_capture_sizes cudagraph_metrics dbo_decode_token_threshold
    dbo_prefill_token_threshold dcp_comm_backend dcp_kv_cache_interleave_size decode_context_parallel_size
    disable_cascade_attn disable_chunked_mm_input disable_custom_all_reduce disable_hybrid_kv_cache_manager
    disable_log_stats disable_nccl_for_dp_synchronization disable_sliding_window distributed_timeout_seconds
    download_dir enable_chunked_prefill enable_cumem_allocator enable_dbo enable_elastic_ep enable_ep_weight_filter
    enable_eplb enable_expert_parallel enable_flashinfer_autotune enable_layerwise_nvtx_tracing
    enable_logging_iteration_details enable_mamba_cache_stochastic_rounding enable_mfu_metrics
    enable_mixed_moe_lora_format enable_mm_embeds enable_mm_processor_stats enable_prefix_caching
    enable_prompt_embeds enable_return_routed_experts enable_tower_connector_lora enforce_eager eplb_config
    expert_placement_strategy fail_on_environ_validation fully_sharded_loras gdn_prefill_backend
    gpu_memory_utilization ignore_patterns interleave_mm_strings ir_op_priority kernel_config kv_cache_dtype
    kv_cache_dtype_skip_layers kv_cache_memory_bytes kv_cache_metrics kv_cache_metrics_sample kv_offloading_backend
    kv_offloading_size kv_sharing_fast_prefill language_model_only limit_mm_per_prompt linear_backend
    long_prefill_token_threshold lora_dtype mamba_backend mamba_block_size mamba_cache_dtype mamba_cache_mode
    mamba_cache_philox_rounds mamba_config mamba_ssm_cache_dtype max_cudagraph_capture_size max_logprobs
    max_long_partial_prefills max_num_batched_tokens max_num_partial_prefills max_num_seqs
    max_parallel_loading_workers media_io_kwargs mm_encoder_attn_backend mm_encoder_attn_dtype
    mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path mm_encoder_only
    mm_encoder_tp_mode mm_processor_cache_gb mm_processor_cache_type mm_processor_kwargs
    mm_shm_cache_max_object_size_mb mm_tensor_ipc model_impl moe_backend num_gpu_blocks_override numa_bind
    numa_bind_cpus numa_bind_nodes offload_backend offload_group_size offload_num_in_group offload_params
    offload_prefetch_step optimization_level override_attention_dtype performance_mode
    prefill_context_parallel_size prefix_caching_hash_algo profiler_config pt_load_map_location
    ray_workers_use_nsight reasoning_config reasoning_parser renderer_num_workers safetensors_load_strategy
    safetensors_prefetch_block_size safetensors_prefetch_num_threads scheduler_reserve_full_isl scheduling_policy
    served_model_name show_hidden_metrics_for_version shutdown_timeout skip_mm_profiling specialize_active_lora
    stream_interval tokens_only ubatch_size use_fp64_gumbel use_tqdm_on_load video_pruning_rate
"""
HARMLESS_OPTIONS = frozenset(_HARMLESS.split())
"""`vllm_config` keys that are numbers, switches and names out of vLLM's own lists. A key that is in none of these
tables, such as one of a later vLLM, is refused."""

OWNED_OPTIONS_ON_CPU = {"enable_chunked_prefill": "vLLM's seeds fail with it on a CPU"}


def refuse_options(options: Mapping[str, Any], on_cpu: bool, is_server: bool = False) -> None:
    """Refuse what would make rollouts wrong, what names code, and what vLLM does not know.

    Args:
        options: `vllm_config`.
        on_cpu: whether vLLM computes on a CPU.
        is_server: whether vLLM is a server, which may compute on several devices.

    Raises:
        ValueError: naming the option, the reason and the remedy.
    """
    refused = OWNED_OPTIONS | CODE_OPTIONS | (OWNED_OPTIONS_ON_CPU if on_cpu else {})
    known = known_options()
    for key, value in options.items():
        if is_server and key in SERVER_OPTIONS:
            continue
        if key in refused:
            raise ValueError(f"`{key}` cannot be set in `vllm_config`: {refused[key]}. Leave it out.")
        if key not in known:
            near = difflib.get_close_matches(key, known - refused.keys(), n=1)
            raise ValueError(
                f"`{key}` cannot be set in `vllm_config`: the installed vLLM has no such argument. "
                f"{f'Did you mean `{near[0]}`?' if near else 'Leave it out.'}"
            )
        if key == "compilation_config":
            _refuse_compilation(value)
        elif key not in HARMLESS_OPTIONS:
            raise ValueError(
                f"`{key}` cannot be set in `vllm_config`: this version of grpo-stage does not know whether it names "
                "code, which a recipe alone must not run. Leave it out."
            )


def _refuse_compilation(value: Any) -> None:
    if isinstance(value, int):  # the level alone
        return
    others = sorted(set(value) - COMPILATION_OPTIONS) if isinstance(value, Mapping) else [value]
    if others:
        raise ValueError(
            f"`compilation_config` in `vllm_config` has {', '.join(f'`{key}`' for key in others)}: a recipe alone "
            f"must not run code, and these may name some. Write a level, or of its keys only "
            f"{', '.join(sorted(COMPILATION_OPTIONS))}."
        )


@cache
def known_options() -> frozenset[str]:
    """The arguments of vLLM's engine, out of its source: importing it takes ten seconds and changes the process."""
    spec = find_spec("vllm")
    assert spec is not None, "vLLM is not installed"
    assert spec.submodule_search_locations is not None
    (package,) = spec.submodule_search_locations
    source = Path(package, "engine", "arg_utils.py").read_text(encoding="utf-8")
    arguments = next(
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
    )
    return frozenset(
        node.target.id
        for node in arguments.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )
