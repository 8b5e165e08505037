"""What `stage: grpo` refuses, as tables: keys that have no place in it, and keys that contradict one another.

A user's question "why may I not write this" is answered here, so every entry has a reason and a way out.
"""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType, SimpleNamespace
from typing import Any

from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_torch_bf16_gpu_available,
    is_torch_npu_available,
)

from grpo_stage.algorithm.conditions import Rule
from grpo_stage.host.adapters import adapter_config, items
from grpo_stage.host.coercion import as_plain
from grpo_stage.rewards.options import REWARD_MODEL
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


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Keys that have no place in this stage, whatever the others are."""

    keys: str
    reason: str
    remedy: str = "Leave it out."
    harmless: tuple[Any, ...] = (False,)
    """Values that ask for nothing; `null` is always one."""


# What none of the keys below may be; the first group are objectives and loops of other stages. Some keys exist on
# the host's main alone.
UNSUPPORTED = (
    Unsupported(
        "pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight "
        "simpo_gamma ld_alpha ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards",
        "it belongs to PPO, DPO or KTO and would have no effect",
        "Leave it out; this stage's objective is set by `beta`, `epsilon`, `loss_type`, `scale_rewards` and "
        "`num_iterations`.",
        harmless=(),
    ),
    Unsupported(
        "use_dft_loss use_asft_loss use_eaft_loss", "it is a loss of supervised fine-tuning", "Write `loss_type`."
    ),
    Unsupported("asft_alpha eaft_alpha", "it is a loss of supervised fine-tuning", "Write `loss_type`.", harmless=()),
    Unsupported(
        "label_smoothing_factor",
        "the loss is no cross entropy, so that there are no labels to smooth",
        harmless=(0,),
    ),
    Unsupported("moe_aux_loss_coef", "the router's auxiliary loss is not added to this stage's loss", harmless=(0,)),
    Unsupported(
        "train_on_prompt mask_history",
        "the loss is over the sampled completion and never over the prompt",
    ),
    Unsupported(
        "predict_with_generate do_predict",
        "this stage trains and evaluates with its own rollouts",
        "Leave it out; `val_size` or `eval_dataset` with `eval_strategy: steps` sample and score held-out prompts.",
    ),
    Unsupported(
        "compute_accuracy",
        "token accuracy against a reference answer says nothing about sampled answers",
        "Leave it out; `reward_funcs: accuracy` scores the answers.",
    ),
    # Data
    Unsupported(
        "packing neat_packing",
        "every completion is sampled in its own context, so there are no rows to pack",
        "Leave it out; `max_tokens_per_micro_batch` says how much goes through the model at once.",
    ),
    Unsupported(
        "streaming",
        "a checkpoint holds the position in the dataset, and a stream has none",
        "Leave it out, and bound the dataset with `max_samples` if it is large.",
    ),
    Unsupported(
        "tokenized_path",
        "a tokenized dataset has lost the reference answers and columns that rewards need",
        "Leave it out and name the `dataset`.",
        harmless=(),
    ),
    Unsupported(
        "train_sampling_strategy",
        "the stage draws the prompts of a step itself",
        "Leave it out; `disable_shuffling: true` keeps the dataset's order.",
        harmless=("random",),
    ),
    Unsupported("sortish_sampler", "the stage draws the prompts of a step itself"),
    Unsupported("data_seed", "the order of the prompts follows `seed`", "Write `seed` instead.", harmless=()),
    # Sampling
    Unsupported(
        "infer_backend",
        "the host refuses other inference engines in training",
        "Leave it out and write `rollout_backend: vllm` or `rollout_backend: hf`.",
        harmless=("huggingface",),
    ),
    Unsupported(
        "do_sample",
        "greedy decoding makes all completions of a group equal, and equal completions teach nothing",
        "Write `do_sample: true` or leave it out; `temperature` sets how much is explored.",
        harmless=(True,),
    ),
    Unsupported(
        "num_beams generation_num_beams eval_num_beams",
        "beam search does not sample from the policy",
        "Leave it out; `num_generations` says how many completions each prompt gets.",
        harmless=(1,),
    ),
    Unsupported("length_penalty", "it only acts in beam search", harmless=(1,)),
    Unsupported(
        "max_length generation_max_length",
        "it would have no effect",
        "Write `max_new_tokens`, the length of a completion, and `cutoff_len`, the length of a prompt.",
        harmless=(),
    ),
    Unsupported(
        "generation_config",
        "it would have no effect",
        "Write `temperature`, `top_p`, `top_k`, `repetition_penalty` and `max_new_tokens`.",
        harmless=(),
    ),
    Unsupported(
        "skip_special_tokens",
        "rewards see the special tokens of a completion: tags can be special tokens. Only the end token is left out",
    ),
    # The model and how it is changed
    Unsupported(
        "lora_dropout module_dropout",
        "dropout is off in this stage: the ratio compares two passes through the same network, which dropout would "
        "make two different ones",
        "Leave it out or write 0.",
        harmless=(0,),
    ),
    Unsupported(
        "neftune_noise_alpha",
        "noise in the embeddings makes the trained policy another one than the sampled policy",
        harmless=(0,),
    ),
    Unsupported("shift_attn", "sampling has no shifted attention, so that another model would answer than is trained"),
    Unsupported(
        "mixture_of_depths",
        "the rollout engines have no mixture of depths, so that another model would answer",
        harmless=(),
    ),
    Unsupported(
        "use_unsloth use_unsloth_gc",
        "unsloth replaces the forward pass, and its log-probabilities were not verified in this stage",
        "Leave it out; gradient checkpointing is on by default.",
    ),
    Unsupported("use_kt", "KTransformers' experts were not verified in this stage"),
    Unsupported(
        "use_mca use_megatron_bridge use_hyper_parallel",
        "that backend has no GRPO",
        "Leave it out; several devices run under torchrun (DDP).",
    ),
    Unsupported("hyper_parallel_args hyper_parallel_cp_size", "that backend has no GRPO", harmless=()),
    # Optimisation
    Unsupported(
        "deepspeed fsdp fsdp_config parallelism_config",
        "sharded weights were not verified in this stage",
        "Leave it out; several devices run under torchrun (DDP), and LoRA, `quantization_bit` or a lower "
        "`max_tokens_per_micro_batch` save memory.",
        harmless=(),
    ),
    Unsupported("fp8 fp8_enable_fsdp_float8_all_gather", "fp8 was not verified in this stage", "Write `bf16: true`."),
    Unsupported(
        "galore_layerwise apollo_layerwise use_badam",
        "it updates weights during the backward pass, while later micro-batches of the step still need the old ones",
        "Leave it out; `use_galore` and `use_apollo` without their layer-wise form work.",
    ),
    Unsupported(
        "auto_find_batch_size",
        "the batch size decides what is trained, not only how much memory it takes",
        "Leave it out and lower `max_tokens_per_micro_batch`, which changes memory alone.",
    ),
    Unsupported(
        "rope_scaling",
        "LLaMA-Factory 0.9.5 writes the longer `max_position_embeddings` as a fraction, which transformers refuses "
        "while it loads the model",
        "Leave it out, and write `rope_parameters` and `max_position_embeddings` into the config.json of the model.",
        harmless=(),
    ),
    Unsupported(
        "torch_compile",
        "micro-batches differ in shape, so that the model would be compiled again and again",
    ),
    Unsupported(
        "torch_compile_backend torch_compile_mode",
        "it switches on `torch_compile`, which is not possible",
        harmless=(),
    ),
    Unsupported(
        "ddp_broadcast_buffers",
        "a device that does a step again, since its memory ran out, would broadcast when the others do not",
    ),
    Unsupported(
        "enable_jit_checkpoint",
        "it saves in the middle of a step",
        "Leave it out: SIGTERM and Ctrl-C save a checkpoint in this stage anyway.",
    ),
    Unsupported("torch_empty_cache_steps", "this stage does not empty the device's cache", harmless=()),
    Unsupported(
        "dataloader_drop_last",
        "every prompt is rolled out once an epoch, so the last step of an epoch may hold fewer prompts",
    ),
    Unsupported(
        "accelerator_config",
        "gradients are accumulated by the stage itself, over micro-batches of `max_tokens_per_micro_batch`",
        "Leave it out; `gradient_accumulation_steps` multiplies the prompts of a step.",
        harmless=(),
    ),
    # Evaluation
    Unsupported(
        "per_device_eval_batch_size",
        "an evaluation samples all of its prompts at once, and the engine itself sees to its memory",
        harmless=(),
    ),
    Unsupported("eval_accumulation_steps", "evaluation scores completions, and keeps no predictions", harmless=()),
    Unsupported(
        "bf16_full_eval fp16_full_eval", "evaluation samples from the policy as it is trained, in the same precision"
    ),
    Unsupported(
        "prediction_loss_only batch_eval_metrics",
        "evaluation samples and scores completions, and computes no loss or predictions",
    ),
    Unsupported(
        "include_for_metrics",
        "evaluation scores completions, and has no predictions to compute metrics from",
        harmless=([],),
    ),
)

# Optimizers that update weights inside the backward pass.
_LAYERWISE_OPTIMIZERS = re.compile(r"lomo|layerwise", re.IGNORECASE)


def wants_best(v: SimpleNamespace) -> bool:
    """True where the run compares its evaluations."""
    keys = ("load_best_model_at_end", "early_stopping_steps", "metric_for_best_model")
    return any(getattr(v, key) for key in keys) or v.save_strategy == "best"


def _evaluates(v: SimpleNamespace) -> bool:
    return v.eval_strategy != "no" or v.eval_on_start or v.do_eval


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


def _is_neutral(v: SimpleNamespace) -> bool:
    return v.top_p == 1 and v.top_k <= 0 and v.repetition_penalty == 1


def _loses_new_embeddings(v: SimpleNamespace) -> bool:
    """The host trains and saves new embeddings beside a new adapter, and not beside one that goes on."""
    if not (continues_adapter(v) and asks_for_new_tokens(v)):
        return False
    config = adapter_config(items(v.adapter_name_or_path)[-1], v.adapter_folder)
    return config is not None and not config.get("modules_to_save")


def _stands_on_another_base(v: SimpleNamespace) -> bool:
    """The policy without its adapter is not what `model_name_or_path` holds."""
    adapters = items(v.adapter_name_or_path)
    is_merged = len(adapters) > 1 or (bool(adapters) and v.create_new_adapter)
    return is_merged or v.pissa_init or v.use_llama_pro or v.train_from_scratch or asks_for_new_tokens(v)


RULES = (
    Rule(
        lambda v: not v.do_train,
        "`do_train: true` is missing: the run would end at once and have trained nothing. Write `do_train: true`; "
        "evaluation alone is not supported.",
    ),
    Rule(
        lambda v: not v.dataset,
        "`dataset` is missing: prompts come from it. Name one or more datasets of `dataset_info.json`, "
        "and the folder of that file as `dataset_dir`.",
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
        lambda v: v.ref_model is not None and v.beta == 0,
        "`ref_model: {ref_model}` has no effect with `beta: 0`: the KL to the reference has no weight in the loss. "
        "Write for example `beta: 0.04`, or leave `ref_model` out.",
    ),
    Rule(
        lambda v: v.sync_ref_model and v.ref_model is not None and v.finetuning_type not in ("full", "freeze"),
        "`sync_ref_model: true` cannot go with `ref_model: {ref_model}` and `finetuning_type: {finetuning_type}`: an "
        "adapter's weights have no counterpart in another model to be mixed with. Leave `ref_model` out: the "
        "reference is then the policy as it starts, and moves.",
    ),
    Rule(
        lambda v: v.sync_ref_model and v.ref_model is not None and v.ref_model_quantization_bit is not None,
        "`sync_ref_model: true` cannot go with `ref_model_quantization_bit: {ref_model_quantization_bit}`: quantized "
        "weights cannot be mixed. Leave one of them out.",
    ),
    Rule(
        lambda v: (v.rollout_correction != "none" or v.off_policy_mask_threshold is not None) and not _is_neutral(v),
        "`rollout_correction: {rollout_correction}` and `off_policy_mask_threshold: {off_policy_mask_threshold}` need "
        "neutral sampling, and this run has `top_p: {top_p}`, `top_k: {top_k}`, `repetition_penalty: "
        "{repetition_penalty}`: tokens are then drawn from another distribution than the policy's, whose "
        "probabilities the engine does not give, so that every weight would be wrong. Leave these three out, or the "
        "correction.",
    ),
    Rule(
        lambda v: (
            v.ref_model is None and (v.ref_model_adapters is not None or v.ref_model_quantization_bit is not None)
        ),
        "`ref_model_adapters` and `ref_model_quantization_bit` have no effect without `ref_model`: the reference is "
        "then the policy as it was at the start. Write `ref_model`, or leave them out.",
    ),
    # A reward model
    Rule(
        lambda v: (
            v.reward_model is None
            and (v.reward_model_type != "lora" or v.reward_model_adapters or v.reward_model_quantization_bit)
        ),
        "`reward_model_type: {reward_model_type}`, `reward_model_adapters: {reward_model_adapters}` and "
        "`reward_model_quantization_bit: {reward_model_quantization_bit}` have no effect without `reward_model`. "
        "Write `reward_model`, or leave them out.",
    ),
    Rule(
        lambda v: v.reward_model is None and REWARD_MODEL in items(v.reward_funcs),
        "`reward_funcs: {reward_funcs}` asks for a reward model, and none is given. Write `reward_model`: the folder "
        "that LLaMA-Factory's `stage: rm` wrote, or the address of a reward server.",
    ),
    Rule(
        lambda v: v.reward_model is not None and REWARD_MODEL not in items(v.reward_funcs),
        "`reward_model: {reward_model}` would have no effect with `reward_funcs: {reward_funcs}`, which does not name "
        "it. Write `reward_funcs: {reward_funcs},reward_model` (and a weight for it where there is `reward_weights`), "
        "or leave `reward_funcs` out to score with the model alone.",
    ),
    Rule(
        lambda v: v.reward_model is not None and v.reward_model_type == "lora" and v.finetuning_type != "lora",
        "`reward_model_type: lora` (the default) cannot go with `finetuning_type: {finetuning_type}`: the reward "
        "model's adapter stands on the policy's base, which that changes. Write `reward_model_type: full` with the "
        "reward model's base as `reward_model` and its adapter as `reward_model_adapters`.",
    ),
    Rule(
        lambda v: v.reward_model is not None and v.reward_model_type == "lora" and _stands_on_another_base(v),
        "`reward_model_type: lora` (the default) cannot go with `pissa_init`, `use_llama_pro`, `train_from_scratch`, "
        "new tokens, several adapters or `create_new_adapter`: the reward model's adapter stands on the policy's "
        "base, which that makes another one than it was trained on. Write `reward_model_type: full` with the reward "
        "model's base as `reward_model` and its adapter as `reward_model_adapters`.",
    ),
    Rule(
        lambda v: (
            v.reward_model_type != "full"
            and v.reward_model is not None
            and (v.reward_model_adapters is not None or v.reward_model_quantization_bit is not None)
        ),
        "`reward_model_adapters: {reward_model_adapters}` and `reward_model_quantization_bit: "
        "{reward_model_quantization_bit}` have no effect with `reward_model_type: {reward_model_type}`: they are of a "
        "model of its own. Write `reward_model_type: full`, or leave them out.",
    ),
    Rule(
        lambda v: (
            v.reward_model is not None
            and v.reward_model_type == "api"
            and not str(v.reward_model).startswith(("http://", "https://"))
        ),
        "`reward_model: {reward_model}` with `reward_model_type: api` is no address: requests go there over HTTP. "
        "Write the whole address, for example `http://localhost:8000/v1/score/evaluation`.",
    ),
    Rule(
        lambda v: (
            v.reward_model is not None
            and v.reward_model_type != "api"
            and str(v.reward_model).startswith(("http://", "https://"))
        ),
        "`reward_model: {reward_model}` is an address, and `reward_model_type: {reward_model_type}` (lora by default) "
        "reads a folder. Write `reward_model_type: api`.",
    ),
    Rule(
        lambda v: _evaluates(v) and not v.val_size and not v.eval_dataset,
        "`eval_strategy: {eval_strategy}` (`eval_on_start: {eval_on_start}`, `do_eval: {do_eval}`) has no prompts to "
        "evaluate on. Name one or more datasets in `eval_dataset`, or hold out some of `dataset` with `val_size`.",
    ),
    Rule(
        lambda v: not _evaluates(v) and not (v.eval_num_generations is None and v.eval_temperature is None),
        "`eval_num_generations: {eval_num_generations}` and `eval_temperature: {eval_temperature}` have no effect in "
        "a run that never evaluates. Write `eval_strategy: steps` and `eval_steps`, or leave them out.",
    ),
    Rule(
        lambda v: bool(v.val_size and v.eval_dataset),
        "`val_size: {val_size}` cannot go with `eval_dataset: {eval_dataset}`: the one holds out rows of `dataset`, "
        "the other names rows of its own. Leave one of them out.",
    ),
    Rule(
        lambda v: isinstance(v.val_size, float) and v.val_size == 1,
        "`val_size: {val_size}` would hold out all rows, and leave none to train on. Write `val_size: 1` for one row, "
        "or a share below 1 such as `val_size: 0.1`.",
    ),
    Rule(
        lambda v: v.eval_temperature == 0 and v.eval_num_generations != 1,
        "`eval_temperature: 0` cannot go with `eval_num_generations: {eval_num_generations}` (null is "
        "`num_generations: {num_generations}`): at temperature 0 all completions of a prompt are equal. Write "
        "`eval_num_generations: 1`, or an `eval_temperature` above 0.",
    ),
    Rule(
        lambda v: v.eval_strategy == "no" and wants_best(v),
        "`load_best_model_at_end`, `early_stopping_steps`, `save_strategy: best` and `metric_for_best_model` compare "
        "evaluations, and with `eval_strategy: no` there are none to compare. Write `eval_strategy: steps` and "
        "`eval_steps`, or leave them out.",
    ),
    Rule(
        lambda v: not _evaluates(v) and bool(v.val_size),
        "`val_size: {val_size}` holds rows out in a run that never evaluates: they are neither trained on nor looked "
        "at. Write `eval_strategy: steps` and `eval_steps`, or leave it out.",
    ),
    Rule(
        lambda v: not _evaluates(v) and bool(v.eval_dataset),
        "`eval_dataset: {eval_dataset}` has no effect in a run that never evaluates. Write `eval_strategy: steps` and "
        "`eval_steps`, or leave it out.",
    ),
    Rule(
        lambda v: (
            v.load_best_model_at_end
            and (v.eval_strategy, v.save_strategy) == ("steps", "steps")
            and (v.eval_steps or v.logging_steps) != v.save_steps
        ),
        "`load_best_model_at_end: true` needs a checkpoint of every step that is evaluated, or the best one may have "
        "none and another is loaded: `eval_steps: {eval_steps}` (null is `logging_steps: {logging_steps}`) and "
        "`save_steps: {save_steps}` must be equal. Make them so, or write `save_strategy: best`, which saves whenever "
        "an evaluation is the best so far.",
    ),
    Rule(
        lambda v: wants_best(v) and v.greater_is_better is False,
        "`greater_is_better: false` would choose the worst model: `metric_for_best_model` names a reward here, and "
        "more of it is better. Leave it out.",
    ),
)
