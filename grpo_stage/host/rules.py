"""What `stage: grpo` refuses of keys together, and on this machine: each with the reason and a way out."""

import re
from importlib.util import find_spec
from types import MappingProxyType, SimpleNamespace

from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_torch_bf16_gpu_available,
    is_torch_npu_available,
)

from grpo_stage.algorithm.catalog import LOSS_TYPES
from grpo_stage.algorithm.conditions import Rule
from grpo_stage.host.adapters import adapter_config, items
from grpo_stage.host.coercion import as_plain
from grpo_stage.rollout.engines.lora import asks_for_new_tokens, continues_adapter


_PACKAGES = MappingProxyType(
    {
        "use_galore": "galore_torch",
        "use_apollo": "apollo_torch",
        "use_adam_mini": "adam_mini",
        "use_swanlab": "swanlab",
        "enable_liger_kernel": "liger_kernel",
        "plot_loss": "matplotlib",
    }
)
"""What the host asks for in the words of Python's package metadata."""
MOST_COMPLETIONS = 1_000_000
_PRECISIONS = MappingProxyType({"bnb": (4, 8), "eetq": (8,), "hqq": (1, 2, 3, 4, 5, 6, 8)})


# Optimizers that update weights inside the backward pass.
_LAYERWISE_OPTIMIZERS = re.compile(r"lomo|layerwise", re.IGNORECASE)


def _completions_of_a_rollout(v: SimpleNamespace) -> int:
    prompts = v.per_device_train_batch_size * v.gradient_accumulation_steps * v.steps_per_generation
    return prompts * v.num_generations


def _has_flash_attention(v: SimpleNamespace) -> bool:
    if v.use_cpu:
        return False
    if v.flash_attn == "fa3":
        return is_flash_attn_3_available()
    return is_flash_attn_2_available() or is_torch_npu_available()


def _of_precision(key: str) -> Rule:
    def is_unknown(v: SimpleNamespace) -> bool:
        bits = getattr(v, key)
        return bits is not None and bits not in _PRECISIONS.get(as_plain(v.quantization_method), (bits,))

    return Rule(
        is_unknown,
        f"`{key}: {{{key}}}` is not possible with `quantization_method: {{quantization_method}}`: bitsandbytes (bnb) "
        f"has 4 and 8 bits, eetq 8, hqq 1 to 6 and 8. Write `{key}: 4`, or leave it out.",
    )


def _needs_package(key: str, package: str) -> Rule:
    return Rule(
        lambda v: bool(getattr(v, key)) and find_spec(package) is None,
        f"`{key}: {{{key}}}` needs the package {package}, which is not installed. Install it (`pip install "
        f"{package.replace('_', '-')}`), or leave `{key}` out.",
    )


def _compares_with_engine(v: SimpleNamespace) -> bool:
    """Whether the objective takes the engine's log-probabilities for those of the policy that sampled."""
    loss = LOSS_TYPES.get(v.loss_type)
    corrects = v.rollout_correction != "none" or v.rollout_rejection != "none"
    compares = loss is not None and loss.compares_with_engine
    return corrects or compares or v.off_policy_mask_threshold is not None or v.rollout_ahead > 0


def is_neutral(v: SimpleNamespace) -> bool:
    is_cut = v.top_p < 1 or v.top_k > 0 or v.min_p > 0 or bool(v.structured_outputs)
    return not is_cut and v.repetition_penalty == 1


def _loses_new_embeddings(v: SimpleNamespace) -> bool:
    """Whether new embeddings would be lost: the host trains and saves them beside a new adapter alone."""
    if not (continues_adapter(v) and asks_for_new_tokens(v)):
        return False
    config = adapter_config(items(v.adapter_name_or_path)[-1], v.adapter_folder)
    return config is not None and not config.get("modules_to_save")


RULES = (
    Rule(
        lambda v: not v.do_train,
        "`do_train: true` is missing: the run would end at once and have trained nothing. Write `do_train: true`; "
        "evaluation alone is not supported.",
    ),
    Rule(
        lambda v: not v.dataset,
        "`dataset` is missing: prompts come from it. Name one or more datasets of `dataset_info.json`, "
        "and the folder of that file as `dataset_dir`; a game (`environment: textarena:...`) brings its own prompts.",
    ),
    Rule(
        lambda v: _completions_of_a_rollout(v) > MOST_COMPLETIONS,
        "`per_device_train_batch_size: {per_device_train_batch_size}`, `gradient_accumulation_steps: "
        "{gradient_accumulation_steps}`, `steps_per_generation: {steps_per_generation}` and `num_generations: "
        "{num_generations}` together make a rollout of more than a million completions on a device: a step would take "
        "days. A batch is counted in prompts, each sampled `num_generations` times. Lower one of them.",
    ),
    Rule(
        lambda v: v.bf16 and v.fp16,
        "`bf16: true` cannot go with `fp16: true`: a run computes in one precision. Leave `fp16` out, or `bf16` where "
        "the GPU has none (older than Ampere).",
    ),
    *(_needs_package(key, package) for key, package in _PACKAGES.items()),
    Rule(
        lambda v: v.pure_bf16 and not (is_torch_bf16_gpu_available() or is_torch_npu_available()),
        "`pure_bf16: true` is not possible on this machine: it has no device that computes in bf16. Leave it out.",
    ),
    Rule(
        lambda v: v.flash_attn in ("fa2", "fa3") and not _has_flash_attention(v),
        "`flash_attn: {flash_attn}` is not possible here: FlashAttention runs on a GPU alone, and needs its package "
        "(`flash-attn`); LLaMA-Factory would go on without it and hardly say so. Install it where there is a GPU, "
        "write `flash_attn: sdpa`, or leave it out for the best there is.",
    ),
    *(_of_precision(f"{model}quantization_bit") for model in ("", "ref_model_", "reward_model_")),
    Rule(
        lambda v: as_plain(v.logging_strategy) == "no" and v.on_alarm != "warn",
        "`on_alarm: {on_alarm}` would have no effect with `logging_strategy: no`: the monitors judge the log, and it "
        "has no lines. Leave `logging_strategy` out, or `on_alarm`.",
    ),
    Rule(
        lambda v: bool(_LAYERWISE_OPTIMIZERS.search(str(v.optim))),
        "`optim: {optim}` updates weights during the backward pass, while the later micro-batches of the step still "
        "need the old ones. Write for example `optim: adamw_torch`.",
    ),
    Rule(
        lambda v: str(v.optim).startswith("schedule_free"),
        "`optim: {optim}` samples and saves from other weights than it trains, which was not verified in this stage. "
        "Write for example `optim: adamw_torch`.",
    ),
    Rule(
        lambda v: str(v.lr_scheduler_type) in ("reduce_lr_on_plateau", "greedy"),
        "`lr_scheduler_type: {lr_scheduler_type}` watches a loss that falls, and in this stage the reward rises and "
        "the loss means nothing: it would lower the rate because the run learns. Write for example "
        "`lr_scheduler_type: cosine`.",
    ),
    Rule(
        lambda v: bool(v.moe_aux_loss_coef) and v.disable_zero_advantage_skipping,
        "`disable_zero_advantage_skipping: true` would have no effect with `moe_aux_loss_coef: {moe_aux_loss_coef}`, "
        "which acts on completions without an advantage as well: none of them is skipped. Leave it out.",
    ),
    Rule(
        lambda v: bool(v.moe_aux_loss_coef) and v.use_reentrant_gc and not v.disable_gradient_checkpointing,
        "`moe_aux_loss_coef: {moe_aux_loss_coef}` is not possible with reentrant gradient checkpointing, which is on "
        "by default: what the routers give in it has no gradient, so that the loss would teach nothing. Write "
        "`use_reentrant_gc: false` or `disable_gradient_checkpointing: true`, or leave it out.",
    ),
    Rule(
        lambda v: v.quantization_bit is not None and v.finetuning_type not in ("lora", "oft"),
        "`quantization_bit: {quantization_bit}` cannot go with `finetuning_type: {finetuning_type}`: quantized "
        "weights cannot be trained. Write `finetuning_type: lora`, or leave `quantization_bit` out.",
    ),
    Rule(
        _loses_new_embeddings,
        "`resize_vocab`, `add_tokens`, `add_special_tokens` and `new_special_tokens_config` cannot go with "
        "`adapter_name_or_path: {adapter_name_or_path}`, which has no embeddings of its own: those of the new tokens "
        "would be random, not trained, and in no checkpoint. Write `create_new_adapter: true`, or leave the tokens "
        "out.",
    ),
    Rule(
        lambda v: v.adapter_name_or_path is not None and v.finetuning_type != "lora",
        "`adapter_name_or_path: {adapter_name_or_path}` cannot go with `finetuning_type: {finetuning_type}`: only "
        "LoRA continues an adapter. Write `finetuning_type: lora`, or export the adapter into the model first "
        "(`llamafactory-cli export`).",
    ),
    Rule(
        lambda v: _compares_with_engine(v) and not is_neutral(v),
        "`rollout_correction: {rollout_correction}`, `rollout_rejection: {rollout_rejection}`, "
        "`off_policy_mask_threshold: {off_policy_mask_threshold}`, `rollout_ahead: {rollout_ahead}` and `loss_type: "
        "dppo_tv` and `dppo_kl` need neutral sampling, and this run has `top_p: {top_p}`, `top_k: {top_k}`, `min_p: "
        "{min_p}`, `repetition_penalty: {repetition_penalty}` and `structured_outputs: {structured_outputs}`: tokens "
        "are then drawn from another distribution than the policy's, whose probabilities the engine does not give, so "
        "that every weight would be wrong. Leave these out, or what needs it.",
    ),
)
