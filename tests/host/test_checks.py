"""Everything that a run is refused for before a model is loaded: one table, and the subtle ones after it."""

import dataclasses
import importlib.util
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from llamafactory.hparams.model_args import ModelArguments
from llamafactory.model import loader
from llamafactory.model.model_utils.rope import configure_rope
from transformers import AutoConfig

from grpo_stage.host import advice, zero
from grpo_stage.host.distribution import check_distribution
from grpo_stage.host.engine import check_ranks
from grpo_stage.host.inputs import refuse_idle_processes
from grpo_stage.host.other_models import arguments_for
from grpo_stage.host.parser import ARGUMENT_CLASSES, effective_defaults, parse
from grpo_stage.host.recipe import check_checkpoint, check_same_training, recipe_of, training_record
from grpo_stage.host.recovery import possible
from grpo_stage.host.unsupported import UNSUPPORTED
from grpo_stage.host.zero import check_zero, refuse_mismatches
from grpo_stage.records.redaction import secrets_in
from grpo_stage.rollout.engines import vllm_rules
from grpo_stage.survival import checkpoints
from grpo_stage.survival.checkpoints import STATE_FILE
from grpo_stage.types import Prompt


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        parse(raw)
    return str(error.value)


@pytest.fixture(autouse=True)
def _no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(loader, name), "from_pretrained", load)


VLLM = {"rollout_backend": "vllm"}
SERVERS = {"rollout_backend": "vllm_server", "vllm_server_urls": "http://a:8000,http://b:8000"}
EVAL = {"val_size": 2, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 5}
ALONE = {"reward_funcs": None, "reward_model": "a/rm"}
BEST = EVAL | {"load_best_model_at_end": True}
KNOWN = {name for cls in ARGUMENT_CLASSES for name in cls.__dataclass_fields__}
OF_THE_HOSTS_MAIN = {"use_megatron_bridge", "hyper_parallel_cp_size"}
# What is written over a recipe that is accepted; what the refusal has to say.
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    # what is missing
    ({"dataset": None}, ["`dataset` is missing", "dataset_info.json"]),
    ({"reward_funcs": None}, ["`reward_funcs` is missing", "accuracy", "path/file.py:function"]),
    ({"do_train": False}, ["`do_train: true`"]),
    ({"dataset": "sumz"}, ["dataset: sumz", "Did you mean `sums`"]),
    ({"dataset": "unheard"}, ["dataset: unheard", "sums, gsm8k"]),
    ({"dataset": "sums,sumz"}, ["dataset: sumz"]),
    ({"eval_dataset": "sumz"}, ["dataset: sumz"]),
    ({"dataset_dir": "nowhere"}, ["dataset_dir: nowhere", "dataset_info.json", "Give the folder"]),
    ({"dataset": "clips"}, ["dataset: clips", "videos", "text or images"]),
    ({"dataset": "pairs"}, ["dataset: pairs", "ranking", "reference answers"]),
    # numbers
    ({"num_generations": 1}, ["num_generations: 1", "at least 2"]),
    ({"beta": -0.1}, ["beta: -0.1", "at least 0"]),
    ({"epsilon_high": 0.1}, ["epsilon_high: 0.1", "epsilon: 0.2", "leave it out"]),
    ({"reward_weights": "1,2"}, ["reward_weights: 1.0, 2.0", "one weight for each"]),
    ({"temperature": 0}, ["temperature: 0", "equal", "temperature: 1.0"]),
    ({"temperature": -1.0}, ["temperature: -1.0", "above 0"]),
    ({"do_sample": False}, ["do_sample: false", "equal", "do_sample: true"]),
    ({"top_p": 0.0}, ["top_p: 0.0", "Leave it out"]),
    ({"top_p": 1.1}, ["top_p: 1.1", "Leave it out"]),
    ({"top_k": -2}, ["top_k: -2", "Leave it out"]),
    ({"repetition_penalty": 0}, ["repetition_penalty: 0", "Leave it out"]),
    ({"moe_aux_loss_coef": -0.1}, ["moe_aux_loss_coef: -0.1", "at least 0", "moe_aux_loss_coef: 0.001"]),
    ({"max_new_tokens": 0}, ["max_new_tokens: 0", "at least 1"]),
    ({"cutoff_len": 0}, ["cutoff_len: 0", "at least 1"]),
    ({"max_new_tokens": 449}, ["max_new_tokens: 449", "cutoff_len: 64", "513", "512", "Lower `cutoff_len`"]),
    ({"per_device_train_batch_size": 0}, ["per_device_train_batch_size: 0", "at least 1"]),
    ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps: 0", "at least 1"]),
    ({"learning_rate": 0}, ["learning_rate: 0", "above 0"]),
    ({"num_train_epochs": 0}, ["num_train_epochs: 0", "above 0"]),
    # other stages' keys
    ({"pref_beta": 0.1}, ["pref_beta: 0.1", "no effect", "`beta`"]),
    ({"ppo_epochs": 4}, ["ppo_epochs: 4", "no effect", "Leave it out"]),
    ({"dpo_label_smoothing": 0.1}, ["dpo_label_smoothing: 0.1", "no effect", "Leave it out"]),
    ({"kto_chosen_weight": 1.0}, ["kto_chosen_weight: 1.0", "no effect", "Leave it out"]),
    ({"use_dft_loss": True}, ["use_dft_loss: true", "`loss_type`"]),
    ({"label_smoothing_factor": 0.1}, ["label_smoothing_factor: 0.1", "Leave it out"]),
    ({"train_on_prompt": True}, ["train_on_prompt: true", "Leave it out"]),
    ({"mask_history": True}, ["mask_history: true", "Leave it out"]),
    ({"predict_with_generate": True}, ["predict_with_generate: true", "val_size"]),
    ({"do_predict": True}, ["do_predict: true", "val_size"]),
    ({"compute_accuracy": True}, ["compute_accuracy: true", "reward_funcs: accuracy"]),
    ({"asft_alpha": 0.1}, ["asft_alpha: 0.1", "`loss_type`"]),
    # data
    ({"packing": True}, ["packing: true", "max_tokens_per_micro_batch"]),
    ({"neat_packing": True}, ["neat_packing: true", "max_tokens_per_micro_batch"]),
    ({"streaming": True, "max_steps": 5}, ["streaming: true", "max_samples"]),
    ({"tokenized_path": "cache"}, ["tokenized_path: cache", "`dataset`"]),
    (
        {"train_sampling_strategy": "group_by_length"},
        ["train_sampling_strategy: group_by_length", "disable_shuffling"],
    ),
    ({"sortish_sampler": True}, ["sortish_sampler: true", "Leave it out"]),
    ({"data_seed": 1}, ["data_seed: 1", "`seed`"]),
    # sampling
    ({"infer_backend": "vllm"}, ["infer_backend: vllm", "rollout_backend: vllm"]),
    ({"num_beams": 2}, ["num_beams: 2", "num_generations"]),
    ({"eval_num_beams": 2}, ["eval_num_beams: 2", "num_generations"]),
    ({"length_penalty": 2.0}, ["length_penalty: 2.0", "Leave it out"]),
    ({"max_length": 100}, ["max_length: 100", "max_new_tokens"]),
    ({"generation_max_length": 100}, ["generation_max_length: 100", "max_new_tokens"]),
    ({"generation_config": "folder"}, ["generation_config: folder", "`temperature`"]),
    ({"skip_special_tokens": True}, ["skip_special_tokens: true", "tags", "Leave it out"]),
    # the model
    ({"lora_dropout": 0.1}, ["lora_dropout: 0.1", "ratio", "write 0"]),
    ({"neftune_noise_alpha": 5}, ["neftune_noise_alpha: 5", "Leave it out"]),
    ({"shift_attn": True}, ["shift_attn: true", "Leave it out"]),
    ({"mixture_of_depths": "convert"}, ["mixture_of_depths: convert", "Leave it out"]),
    ({"use_unsloth": True}, ["use_unsloth: true", "Leave it out"]),
    ({"use_unsloth_gc": True}, ["use_unsloth_gc: true", "Leave it out"]),
    ({"use_kt": True}, ["use_kt: true", "Leave it out"]),
    (
        {"moe_aux_loss_coef": 0.01, "use_reentrant_gc": False, "disable_zero_advantage_skipping": True},
        ["disable_zero_advantage_skipping: true", "moe_aux_loss_coef: 0.01", "Leave it out"],
    ),
    (
        {"disable_zero_advantage_skipping": True, "beta": 0.1},
        ["disable_zero_advantage_skipping: true", "beta: 0.1", "Leave it out"],
    ),
    (
        {"moe_aux_loss_coef": 0.01},
        ["moe_aux_loss_coef: 0.01", "gradient checkpointing", "use_reentrant_gc: false", "leave it out"],
    ),
    ({"use_hyper_parallel": True}, ["use_hyper_parallel: true", "torchrun"]),
    ({"hyper_parallel_args": "a.json"}, ["hyper_parallel_args: a.json", "Leave it out"]),
    ({"use_mca": True}, ["use_mca: true", "torchrun"]),
    ({"use_megatron_bridge": True}, ["use_megatron_bridge: true", "torchrun"]),
    ({"hyper_parallel_cp_size": 2}, ["hyper_parallel_cp_size: 2", "Leave it out"]),
    ({"quantization_bit": 4, "finetuning_type": "full"}, ["quantization_bit: 4", "full", "finetuning_type: lora"]),
    ({"quantization_bit": 8, "finetuning_type": "freeze"}, ["quantization_bit: 8", "freeze", "finetuning_type: lora"]),
    (
        {"adapter_name_or_path": "a/b", "finetuning_type": "full"},
        ["adapter_name_or_path: a/b", "finetuning_type: lora"],
    ),
    ({"ref_model": "other"}, ["ref_model: other", "beta: 0", "beta: 0.04"]),
    ({"beta": 0.1, "ref_model_adapters": "other"}, ["ref_model_adapters", "Write `ref_model`"]),
    (
        {"beta": 0.1, "sync_ref_model": True, "ref_model": "other"},
        ["sync_ref_model: true", "ref_model: other", "finetuning_type: lora", "Leave `ref_model` out"],
    ),
    (
        {
            "beta": 0.1,
            "sync_ref_model": True,
            "ref_model": "other",
            "finetuning_type": "full",
            "ref_model_quantization_bit": 4,
        },
        ["sync_ref_model: true", "ref_model_quantization_bit: 4", "quantized"],
    ),
    ({"rollout_correction": "token", "top_p": 0.9}, ["rollout_correction: token", "top_p: 0.9", "neutral", "Leave"]),
    ({"rollout_correction": "token", "min_p": 0.1}, ["rollout_correction: token", "min_p: 0.1", "neutral"]),
    (VLLM | {"structured_outputs": {"regex": "a", "choice": ["b"]}}, ["structured_outputs", "one form", "regex"]),
    (VLLM | {"structured_outputs": {"regexp": "a"}}, ["structured_outputs", "one form", "regex"]),
    (VLLM | {"structured_outputs": {"choice": []}}, ["structured_outputs", "one form"]),
    (VLLM | {"structured_outputs": "[0-9]+"}, ["structured_outputs", "JSON"]),
    ({"rollout_correction": "sequence", "top_k": 50}, ["rollout_correction: sequence", "top_k: 50", "neutral"]),
    (
        {"off_policy_mask_threshold": 0.1, "repetition_penalty": 1.1},
        ["off_policy_mask_threshold: 0.1", "repetition_penalty: 1.1", "neutral"],
    ),
    # a reward model
    ({"reward_model": "rm"}, ["reward_model: rm", "no effect", "reward_funcs: accuracy,reward_model", "leave"]),
    ({"reward_model_type": "api"}, ["reward_model_type: api", "no effect", "Write `reward_model`"]),
    ({"reward_model_adapters": "rm"}, ["reward_model_adapters: rm", "no effect", "Write `reward_model`"]),
    ({"reward_funcs": "accuracy,reward_model"}, ["accuracy,reward_model", "none is given", "Write `reward_model`"]),
    (ALONE | {"finetuning_type": "full"}, ["finetuning_type: full", "reward_model_type: full", "base"]),
    (ALONE | {"pissa_init": True}, ["`pissa_init`", "another one", "reward_model_type: full"]),
    (ALONE | {"add_tokens": "<a>"}, ["new tokens", "another one", "reward_model_type: full"]),
    (ALONE | {"adapter_name_or_path": "a/b,a/c"}, ["several adapters", "reward_model_type: full"]),
    (ALONE | {"reward_model_adapters": "c/d"}, ["reward_model_adapters: c/d", "reward_model_type: lora", "leave"]),
    (ALONE | {"reward_model_quantization_bit": 4}, ["reward_model_quantization_bit: 4", "model of its own"]),
    (ALONE | {"reward_model": "rm"}, ["reward_model: rm", "adapter_config.json", "reward_model_type: full"]),
    (ALONE | {"reward_model_type": "api"}, ["reward_model: a/rm", "HTTP", "http://localhost:8000"]),
    (ALONE | {"reward_model": "http://here/score"}, ["http://here/score", "Write `reward_model_type: api`"]),
    (ALONE | {"reward_weights": "1,2"}, ["reward_weights: 1.0, 2.0", "reward_funcs: reward_model"]),
    # dynamic sampling
    ({"max_resample_times": 5}, ["max_resample_times: 5", "no effect", "dynamic_sampling: true"]),
    ({"dynamic_sampling": True, "max_resample_times": 0}, ["max_resample_times: 0", "at least 1"]),
    (
        {"dynamic_sampling": True, "mask_zero_std_groups": True},
        ["mask_zero_std_groups: true", "no effect", "dynamic_sampling: false"],
    ),
    # optimization
    ({"deepspeed": "ds.json"}, ["deepspeed: ds.json", "names no file", "ds_z2_config.json"]),
    ({"deepspeed": {"zero_optimization": {"stage": 4}}}, ["deepspeed: {", "from 0 to 3"]),
    ({"fsdp": "full_shard"}, ["fsdp: full_shard", "accelerate launch --config_file"]),
    ({"fp8": True}, ["fp8: true", "bf16: true"]),
    ({"use_galore": True, "galore_layerwise": True}, ["galore_layerwise: true", "use_galore"]),
    ({"use_apollo": True, "apollo_layerwise": True}, ["apollo_layerwise: true", "use_apollo"]),
    ({"use_badam": True, "finetuning_type": "full"}, ["use_badam: true", "backward"]),
    ({"max_steps": 0}, ["max_steps: 0", "num_train_epochs"]),
    ({"optim": "schedule_free_adamw"}, ["optim: schedule_free_adamw", "adamw_torch"]),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, ["lr_scheduler_type: reduce_lr_on_plateau", "cosine"]),
    ({"vllm_maxlen": 256}, ["rollout_backend: hf", "vllm_*", "no effect"]),
    ({"vllm_enforce_eager": True}, ["rollout_backend: hf", "vllm_*", "no effect"]),
    ({"vllm_sleep": 1}, ["rollout_backend: hf", "rollout_backend: vllm", "no effect"]),
    ({"vllm_base": "trainer"}, ["rollout_backend: hf", "rollout_backend: vllm", "no effect"]),
    ({"vllm_tensor_parallel": 2}, ["vllm_tensor_parallel: 2", "rollout_backend: hf", "no effect"]),
    ({"vllm_lora": "merged"}, ["rollout_backend: hf", "rollout_backend: vllm", "no effect"]),
    ({"ddp_broadcast_buffers": True}, ["ddp_broadcast_buffers: true", "memory"]),
    (VLLM | {"finetuning_type": "full", "vllm_max_lora_rank": 16}, ["vllm_max_lora_rank: 16", "no adapter"]),
    ({"num_completions_to_print": 2}, ["num_completions_to_print: 2", "log_completions: true"]),
    ({"enable_jit_checkpoint": True}, ["enable_jit_checkpoint: true", "SIGTERM"]),
    ({"torch_empty_cache_steps": 2}, ["torch_empty_cache_steps: 2"]),
    ({"dataloader_drop_last": True}, ["dataloader_drop_last: true", "once an epoch"]),
    ({"accelerator_config": {"split_batches": True}}, ["accelerator_config", "gradient_accumulation_steps"]),
    ({"eval_accumulation_steps": 2}, ["eval_accumulation_steps: 2", "Leave it out"]),
    ({"optim": "lomo"}, ["optim: lomo", "backward", "adamw_torch"]),
    ({"optim": "galore_adamw_layerwise"}, ["optim: galore_adamw_layerwise", "backward", "adamw_torch"]),
    ({"auto_find_batch_size": True}, ["auto_find_batch_size: true", "max_tokens_per_micro_batch"]),
    ({"torch_compile": True}, ["torch_compile: true", "Leave it out"]),
    ({"rope_scaling": "linear"}, ["rope_scaling: linear", "fraction", "`rope_parameters`", "config.json"]),
    (VLLM | {"rope_scaling": "yarn"}, ["rope_scaling: yarn", "config.json"]),
    ({"torch_compile_mode": "default"}, ["torch_compile_mode: default", "Leave it out"]),
    # evaluation
    ({"per_device_eval_batch_size": 1}, ["per_device_eval_batch_size: 1", "all of its prompts at once"]),
    ({"bf16_full_eval": True}, ["bf16_full_eval: true", "Leave it out"]),
    ({"prediction_loss_only": True}, ["prediction_loss_only: true", "Leave it out"]),
    ({"include_for_metrics": ["loss"]}, ['include_for_metrics: ["loss"]', "Leave it out"]),
    ({"eval_strategy": "steps"}, ["eval_strategy: steps", "`eval_dataset`", "`val_size`"]),
    ({"eval_on_start": True}, ["eval_on_start: true", "`eval_dataset`", "`val_size`"]),
    ({"eval_num_generations": 0}, ["eval_num_generations: 0", "at least 1"]),
    ({"eval_num_generations": 16}, ["eval_num_generations: 16", "never evaluates", "eval_strategy: steps"]),
    ({"val_size": 2, "eval_temperature": 0.5}, ["eval_temperature: 0.5", "never evaluates", "eval_strategy: steps"]),
    (EVAL | {"eval_temperature": -1.0}, ["eval_temperature: -1.0", "at least 0"]),
    (EVAL | {"eval_temperature": 0}, ["eval_temperature: 0", "num_generations: 8", "eval_num_generations: 1"]),
    (EVAL | {"eval_temperature": 0, "eval_num_generations": 2}, ["eval_num_generations: 2", "equal"]),
    (BEST, ["`metric_for_best_model` is missing", "metric_for_best_model: eval_reward"]),
    (EVAL | {"early_stopping_steps": 3}, ["early_stopping_steps", "metric_for_best_model: eval_reward"]),
    (EVAL | {"save_strategy": "best"}, ["save_strategy: best", "metric_for_best_model: eval_reward"]),
    (
        BEST
        | {"metric_for_best_model": "eval_rewards/format/mean@8"}
        | {"reward_funcs": "accuracy,format", "reward_weights": "1,-0.5"},
        ["eval_rewards/format/mean@8", "-0.5", "punished"],
    ),
    (EVAL | {"metric_for_best_model": "loss"}, ["metric_for_best_model: loss", "eval_reward, eval_rewards/accuracy/"]),
    (
        BEST | {"metric_for_best_model": "eval_rewards/acuracy/pass@4"},
        ["eval_rewards/acuracy/pass@4", "Did you mean `eval_rewards/accuracy/pass@4`?"],
    ),
    (
        BEST | {"metric_for_best_model": "eval_rewards/accuracy/pass@4", "eval_num_generations": 2},
        ["metric_for_best_model: eval_rewards/accuracy/pass@4", "eval_rewards/accuracy/pass@2"],
    ),
    (
        BEST | {"metric_for_best_model": "eval_completions/mean_length"},
        ["eval_completions/mean_length", "eval_reward"],
    ),
    (BEST | {"metric_for_best_model": "eval_gsm8k_reward"}, ["eval_gsm8k_reward", "Did you mean `eval_reward`?"]),
    (
        BEST | ALONE | {"metric_for_best_model": "eval_rewards/reward_model/pass@8"},
        ["eval_rewards/reward_model/pass@8", "Did you mean `eval_rewards/reward_model/mean@8`?"],
    ),
    ({"metric_for_best_model": "eval_reward"}, ["eval_strategy: no", "none to compare"]),
    ({"val_size": 2, "save_strategy": "best"}, ["save_strategy: best", "eval_strategy: no"]),
    (
        BEST | {"metric_for_best_model": "eval_reward", "save_steps": 10},
        ["eval_steps: 5", "save_steps: 10", "save_strategy: best"],
    ),
    (
        BEST | {"metric_for_best_model": "eval_reward", "greater_is_better": False},
        ["greater_is_better: false", "more of it is better", "Leave it out"],
    ),
    # what vLLM does not serve
    (VLLM | {"use_dora": True}, ["use_dora: true", "vllm_lora: merged", "rollout_backend: hf"]),
    (VLLM | {"vllm_lora": "merged", "finetuning_type": "full"}, ["vllm_lora: merged", "no LoRA adapter", "Leave it"]),
    (VLLM | {"vllm_lora": "merged", "vllm_max_lora_rank": 8}, ["vllm_max_lora_rank: 8", "vllm_lora: merged"]),
    (VLLM | {"vllm_lora": "merged", "additional_target": "lm_head"}, ["additional_target: lm_head"]),
    (VLLM | {"additional_target": "lm_head"}, ["additional_target: lm_head", "rollout_backend: hf"]),
    (VLLM | {"additional_target": ["lm_head"]}, ["additional_target: lm_head", "rollout_backend: hf"]),
    (VLLM | {"finetuning_type": "oft"}, ["finetuning_type: oft", "rollout_backend: hf"]),
    (
        VLLM | {"quantization_bit": 8, "quantization_method": "eetq"},
        ["quantization_method: eetq", "dequantize", "rollout_backend: hf"],
    ),
    (VLLM | {"resize_vocab": True}, ["resize_vocab", "embeddings whole", "rollout_backend: hf"]),
    (VLLM | {"add_special_tokens": "<a>"}, ["add_special_tokens", "finetuning_type: full"]),
    (
        VLLM | {"add_tokens": "<a>", "adapter_name_or_path": "a/b", "create_new_adapter": True},
        ["add_tokens", "finetuning_type: full"],
    ),
    (VLLM | {"rollout_ahead": 1, "top_p": 0.9}, ["rollout_ahead: 1", "top_p: 0.9", "neutral"]),
    (VLLM | {"rollout_ahead": 1, "vllm_sleep": 1}, ["rollout_ahead: 1", "vllm_sleep: 1", "stay awake"]),
    (
        VLLM | {"rollout_ahead": 1, "vllm_tensor_parallel": 2},
        ["vllm_tensor_parallel: 2", "rollout_ahead: 1", "are not one engine", "rollout_backend: vllm_server"],
    ),
    (VLLM | {"vllm_tensor_parallel": 0}, ["vllm_tensor_parallel: 0", "at least 1"]),
    (VLLM | {"vllm_tensor_parallel": 3}, ["vllm_tensor_parallel: 3", "as many heads", "has 2", "divides 2"]),
    (
        VLLM | {"vllm_config": {"tensor_parallel_size": 2}},
        ["`tensor_parallel_size`", "`vllm_tensor_parallel` sets it"],
    ),
    (VLLM | {"vllm_sleep": 2}, ["vllm_sleep: 2", "finetuning_type: lora", "vllm_sleep: 1", "vllm_lora: merged"]),
    (VLLM | {"lora_rank": 513}, ["lora_rank: 513", "512", "vllm_lora: merged", "lower `lora_rank`"]),
    (VLLM | {"lora_rank": 16, "vllm_max_lora_rank": 8}, ["vllm_max_lora_rank: 8", "Leave it out"]),
    (VLLM | {"vllm_max_lora_rank": 48}, ["vllm_max_lora_rank: 48", "64", "Leave it out"]),
    (VLLM | {"vllm_maxlen": 95}, ["vllm_maxlen: 95", "cutoff_len: 64", "max_new_tokens: 32", "Leave it out"]),
    (VLLM | {"vllm_gpu_util": 1.5}, ["vllm_gpu_util: 1.5", "at most 1"]),
    (VLLM | {"vllm_config": "max_num_seqs"}, ["vllm_config: max_num_seqs", '{"max_num_seqs": 64}']),
    (VLLM | {"vllm_config": {"dtype": "float32"}}, ["`dtype` cannot be set in `vllm_config`", "Leave it out"]),
    (VLLM | {"vllm_config": {"enable_lora": False}}, ["`enable_lora` cannot be set", "tuning method"]),
    (VLLM | {"vllm_config": {"max_num_seq": 4}}, ["`max_num_seq` cannot be set", "Did you mean `max_num_seqs`?"]),
    (VLLM | {"vllm_config": '{"unheard_of": 4}'}, ["`unheard_of` cannot be set", "no such argument", "Leave it out"]),
    (VLLM | {"vllm_config": {"enable_chunked_prefill": True}}, ["`enable_chunked_prefill` cannot be set", "CPU"]),
    ({"vllm_server_urls": "http://a:8000"}, ["vllm_server_urls: http://a:8000", "rollout_backend: hf", "no effect"]),
    (VLLM | {"vllm_server_urls": "http://a:8000"}, ["vllm_server_urls", "rollout_backend: vllm", "no effect"]),
    ({"rollout_backend": "vllm_server"}, ["needs `vllm_server_urls`", "http://localhost:8000", "grpo-stage serve"]),
    (SERVERS | {"vllm_server_urls": " , "}, ["needs `vllm_server_urls`"]),
    *(
        (SERVERS | {"vllm_server_urls": f"http://a:8000,{url}"}, [f"has `{url}`", "no server's address"])
        for url in ("b:8000", "ftp://b:8000", "http://:8000", "http://b:port", "http://b/v1")
    ),
    (SERVERS | {"vllm_server_urls": "http://me:hunter2@b"}, ["a name or a password", "VLLM_API_KEY"]),
    (SERVERS | {"vllm_server_urls": "http://A:80,http://a/"}, ["names `http://a` twice", "each server once"]),
    (
        SERVERS | {"vllm_tensor_parallel": 2},
        ["vllm_tensor_parallel: 2", "rollout_backend: vllm_server", "no effect", "tensor_parallel_size: 2"],
    ),
    (SERVERS | {"vllm_sleep": 1}, ["vllm_sleep: 1", "rollout_backend: vllm_server", "no effect"]),
    (SERVERS | {"vllm_base": "trainer"}, ["vllm_base: trainer", "rollout_backend: vllm_server", "no effect"]),
    (SERVERS | {"quantization_bit": 4}, ["quantization_bit: 4", "as its files have it", "rollout_backend: vllm`"]),
    (SERVERS | {"resize_vocab": True}, ["resize_vocab", "vocabulary", "llamafactory-cli export"]),
    (SERVERS | {"pissa_init": True}, ["pissa_init: true", "first value", "Leave it out"]),
    (SERVERS | {"train_from_scratch": True}, ["train_from_scratch: true", "finetuning_type: full"]),
    (SERVERS | {"lora_target": "q_proj,lm_head"}, ["lora_target", "lm_head", "scores tokens"]),
    (SERVERS | {"use_dora": True}, ["use_dora: true", "rollout_backend: vllm_server", "vllm_lora: merged"]),
    (
        SERVERS | {"vllm_server_transfer": "nccl"},
        ["vllm_server_transfer: nccl", "vllm_lora: native", "no effect", "vllm_lora: merged"],
    ),
    (
        SERVERS | {"vllm_server_transfer": "nccl", "vllm_lora": "merged"},
        ["vllm_server_transfer: nccl", "computes on `cpu`", "from one GPU to another", "vllm_server_transfer: files"],
    ),
    (VLLM | {"vllm_server_transfer": "nccl"}, ["vllm_server_transfer: nccl", "rollout_backend: vllm`", "no effect"]),
    (SERVERS | {"vllm_config": {"dtype": "float32"}}, ["`dtype` cannot be set in `vllm_config`"]),
    (VLLM | {"vllm_maxlen": 513}, ["vllm_maxlen: 513", "512 positions", "Leave it out for the 96"]),
]


@pytest.mark.parametrize(
    ("changes", "said"),
    [(changes, said) for changes, said in REFUSED if not (changes.keys() & OF_THE_HOSTS_MAIN) - KNOWN],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refused(recipe, changes, said):
    message = refusal(recipe | changes)
    assert [part for part in said if part not in message] == []
    assert re.search(r"\{\w+\}", message) is None, "a field of the message was not filled in"


def test_the_recipe_itself_is_accepted(recipe):
    parse(recipe)
    parse(recipe | VLLM)


def test_a_reward_model_alone_needs_no_functions_and_is_weighed_by_its_name(recipe):
    assert parse(recipe | ALONE).finetuning.reward_funcs == ["reward_model"]
    beside = {"reward_model": "a/rm", "reward_funcs": "accuracy,reward_model", "reward_weights": "1,0.3"}
    finetuning = parse(recipe | beside).finetuning
    assert (finetuning.reward_funcs, finetuning.reward_weights) == (["accuracy", "reward_model"], [1.0, 0.3])
    best = BEST | ALONE | {"metric_for_best_model": "eval_rewards/reward_model/mean@8"}
    assert parse(recipe | best).training.load_best_model_at_end


@pytest.mark.parametrize(
    ("extra", "said"),
    [({"use_dora": True}, "use_dora: True"), ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa")],
)
def test_a_reward_adapter_that_is_no_plain_lora_is_refused(recipe, adapter, extra, said):
    parse(recipe | ALONE | {"reward_model": str(adapter)})
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | extra))
    message = refusal(recipe | ALONE | {"reward_model": str(adapter)})
    assert said in message
    assert "reward_model_type: full" in message


def test_every_unsupported_key_is_the_hosts_and_refused_once():
    keys = [key for entry in UNSUPPORTED for key in entry.keys.split()]
    assert set(keys) - KNOWN <= OF_THE_HOSTS_MAIN
    assert len(keys) == len(set(keys))


def test_every_entry_has_a_case_above():
    shown = {key for changes, _ in REFUSED for key in changes}
    assert [entry.keys for entry in UNSUPPORTED if not shown & set(entry.keys.split())] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [(k, value) for entry in UNSUPPORTED for k in entry.keys.split() if k in KNOWN for value in entry.harmless],
)
def test_harmless_values_are_accepted(recipe, key, value):
    """LLaMA Board writes some of them out."""
    assert key in parse(recipe | {key: value}).given


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_aux_loss_coef": 0},
        {"moe_aux_loss_coef": 0.01, "use_reentrant_gc": False},
        {"moe_aux_loss_coef": 0.01, "disable_gradient_checkpointing": True},
    ],
    ids=str,
)
def test_a_loss_on_routers_that_their_gradient_reaches(recipe, changes):
    assert recipe_of(parse(recipe | changes))["moe_aux_loss_coef"] == changes["moe_aux_loss_coef"]


def test_a_rule_of_vllm_does_not_bind_the_hf_engine(recipe):
    hf = recipe | {"use_dora": True, "additional_target": "lm_head", "lora_rank": 600}
    assert parse(hf).finetuning.use_dora
    assert parse(recipe | {"finetuning_type": "full"}).finetuning.finetuning_type == "full"


def test_vllm_that_is_not_installed_names_both_ways_out(recipe, monkeypatch):
    monkeypatch.setattr(
        vllm_rules, "find_spec", lambda name: None if name == "vllm" else importlib.util.find_spec(name)
    )
    default = {key: value for key, value in recipe.items() if key != "rollout_backend"}
    message = refusal(default)
    assert 'pip install "grpo-stage[vllm]"' in message
    assert "rollout_backend: hf" in message
    parse(recipe)


def test_accelerate_launch_with_deepspeed_is_refused(recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    message = refusal(recipe)
    assert "ACCELERATE_USE_DEEPSPEED" in message
    assert "fsdp_version: 2" in message
    assert "llamafactory-cli train" in message


LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
"""What `accelerate launch` sets for FSDP2."""


@pytest.mark.parametrize(
    ("launched", "keys", "said"),
    [
        ({"FSDP_VERSION": "1"}, {}, ["fsdp_version: 1", "fsdp_version: 2"]),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, ["SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP"]),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, ["fsdp_offload_params: true", "fsdp_offload_params: false"]),
        (
            {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {},
            ["fsdp_activation_checkpointing: true", "on by default"],
        ),
        ({"FSDP_IGNORED_MODULES": "lm_head"}, {}, ["fsdp_ignored_modules", "Leave it out"]),
        ({}, {"save_only_model": True}, ["save_only_model: true", "FULL_STATE_DICT"]),
        (
            {},
            {"quantization_bit": 4},
            ["quantization_bit: 4", "FSDP2", "DDP", "FORCE_TORCHRUN=1", "ds_z2_config.json"],
        ),
        ({}, {"fp16": True}, ["fp16: true", "FSDP2", "bf16: true"]),
        ({}, {"optim": "adafactor"}, ["optim: adafactor", "FSDP2", "adamw_torch"]),
        ({}, {"use_muon": True}, ["use_muon: true", "whole weights"]),
        ({}, {"finetuning_type": "oft"}, ["finetuning_type: oft", "FSDP2", "lora"]),
        ({}, {"save_on_each_node": True}, ["save_on_each_node: true", "first process"]),
        (
            {},
            {"reward_model": "a/rm", "reward_funcs": "reward_model", "reward_model_type": "full"},
            ["reward_model_type: full", "reward_model_type: api"],
        ),
        (
            {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            {"pissa_init": True, "rollout_backend": "vllm"},
            ["fsdp_cpu_ram_efficient_loading: false"],
        ),
    ],
)
def test_what_sharded_weights_do_not_go_with_is_refused(recipe, monkeypatch, launched, keys, said):
    for name, value in {**LAUNCHED, **launched}.items():
        monkeypatch.setenv(name, value)
    message = refusal(recipe | keys)
    for words in said:
        assert words in message


ZERO: dict[str, Any] = {"gradient_clipping": "auto", "zero_optimization": {"stage": 3}}
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


def under_zero(recipe: dict[str, Any], config: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key != "use_cpu"} | {"deepspeed": {**ZERO, **config}} | keys


@pytest.mark.parametrize(
    ("config", "keys", "said"),
    [
        ({}, {"use_cpu": True}, ["use_cpu: true", "Leave `use_cpu` out", "DS_ACCELERATOR=cpu"]),
        ({"optimizer": {"type": "AdamW"}}, {}, ["section `optimizer`", "`optim`", "Delete it"]),
        ({"scheduler": {}}, {}, ["section `scheduler`", "lr_scheduler_type"]),
        ({"zenflow": {}}, {}, ["`zenflow`", "not verified"]),
        (
            {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}},
            {},
            ["`zero_optimization.zero_hpz_partition_size`", "Delete it"],
        ),
        ({"zero_optimization": OFFLOAD}, {}, ["`offload_optimizer`", "no GPU", "ds_z2_config.json"]),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            {},
            ["`offload_param` to `nvme`", "`cpu`"],
        ),
        ({}, {"save_only_model": True, **BEST}, ["save_only_model: true", "load_best_model_at_end: true"]),
        ({}, {"adapter_name_or_path": "a/b,c/d"}, ["adapter_name_or_path: a/b,c/d", "llamafactory-cli export"]),
        ({}, {"on_alarm": "recover"}, ["`recover`", "another engine", "`stop`"]),
        ({}, {"quantization_bit": 4}, ["quantization_bit: 4", "ZeRO-3", "ds_z2_config.json"]),
        ({}, {"fp16": True}, ["fp16: true", "ZeRO-3", "bf16: true"]),
        ({}, {"optim": "adafactor"}, ["optim: adafactor", "ZeRO-3", "adamw_torch"]),
        ({}, {"finetuning_type": "oft"}, ["finetuning_type: oft", "ZeRO-3", "lora"]),
        (
            {},
            {"reward_model": "a/rm", "reward_funcs": "reward_model", "reward_model_type": "full"},
            ["reward_model_type: full", "ZeRO-3", "reward_model_type: api"],
        ),
    ],
)
def test_what_zero_does_not_go_with_is_refused(recipe, config, keys, said):
    message = refusal(under_zero(recipe, config, keys))
    for words in said:
        assert words in message


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_quantized_weights_go_where_they_stay_whole(stage):
    values = effective_defaults() | {"deepspeed": {**ZERO, "zero_optimization": {"stage": stage}}}
    check_distribution(SimpleNamespace(**values | {"quantization_bit": 4}))
    with pytest.raises(ValueError, match=rf"ref_model_quantization_bit: 4.*ZeRO-{stage}.*DDP"):
        check_distribution(SimpleNamespace(**values | {"ref_model_quantization_bit": 4}))


def test_zero_has_to_clip_as_the_recipe_says(recipe):
    config = {"zero_optimization": {"stage": 2}}
    message = refusal(under_zero(recipe, {}, {"deepspeed": config}))
    assert "no `gradient_clipping`" in message
    assert '"gradient_clipping": "auto"' in message
    with pytest.raises(ValueError, match=r'ds gradient_clipping=2 vs hf max_grad_norm=1.*"auto"'):
        refuse_mismatches("ds.json", ["- ds gradient_clipping=2 vs hf max_grad_norm=1"])


def test_what_a_gpu_could_do_and_zero_does_not_go_with(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    values = effective_defaults() | {"deepspeed": {**ZERO, "zero_optimization": OFFLOAD}}
    check_zero(SimpleNamespace(**values))
    with pytest.raises(ValueError, match=r"optim: sgd.*adamw_torch"):
        check_zero(SimpleNamespace(**values | {"optim": "sgd"}))
    with pytest.raises(ValueError, match=r"pure_bf16: true.*`bf16: true`"):
        check_zero(SimpleNamespace(**values | {"pure_bf16": True}))


def test_deepspeed_that_is_not_installed_names_both_ways_out(recipe, monkeypatch):
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    message = refusal(under_zero(recipe, {}, {}))
    assert "pip install deepspeed" in message
    assert "FSDP2" in message


def test_deepspeed_and_fsdp_at_once_are_refused(recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "FORCE_TORCHRUN=1" in refusal(under_zero(recipe, {}, {}))


def test_zero_without_torchrun_is_the_hosts_to_refuse(recipe):
    assert "FORCE_TORCHRUN=1" in refusal(under_zero(recipe, {}, {}))


def test_fsdp2_as_the_documentation_launches_it_is_accepted(recipe, monkeypatch):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    parse(recipe)


@pytest.mark.parametrize(
    "metric",
    [
        "reward",
        "eval_reward",
        "eval_rewards/format/mean@6",
        "rewards/accuracy/pass@1",
        "eval_rewards/accuracy/pass@4",
        "eval_rewards/accuracy/pass@6",
        "eval_rewards/accuracy/maj@6",
        "eval_gsm8k_reward",
        "eval_sums_rewards/format/pass@2",
    ],
)
def test_best_checkpoint_by_any_reward_that_is_logged(recipe, metric):
    wanted = BEST | {"val_size": 0, "eval_dataset": "sums,gsm8k", "eval_num_generations": 6}
    wanted["reward_funcs"] = "accuracy,format"
    training = parse(recipe | wanted | {"metric_for_best_model": metric}).training
    assert training.load_best_model_at_end
    assert training.greater_is_better


def test_evaluation_datasets_may_be_asked_for_apart_since_they_are(recipe):
    assert parse(recipe | EVAL | {"eval_on_each_dataset": True}).data.eval_on_each_dataset


def test_greedy_evaluation_takes_one_completion(recipe):
    finetuning = parse(recipe | EVAL | {"eval_temperature": 0, "eval_num_generations": 1}).finetuning
    assert (finetuning.eval_temperature, finetuning.eval_num_generations) == (0, 1)


# The model


def test_positions_that_the_config_scales_count(recipe):
    file = Path(recipe["model_name_or_path"], "config.json")
    config = json.loads(file.read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
    file.write_text(json.dumps(config | {"rope_parameters": yarn}))
    parse(recipe | {"max_new_tokens": 4 * 512 - 64})
    assert "2048 positions" in refusal(recipe | {"max_new_tokens": 4 * 512 - 63})


def test_a_reward_model_of_its_own_has_positions_of_its_own(recipe, tmp_path):
    folder = tmp_path / "rm"
    shutil.copytree(recipe["model_name_or_path"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 95}))
    own = recipe | ALONE | {"reward_model": str(folder), "reward_model_type": "full"}
    message = refusal(own)
    for part in (f"`reward_model: {folder}` knows 95 positions", "cutoff_len: 64", "max_new_tokens: 32", "Lower"):
        assert part in message
    parse(own | {"max_new_tokens": 31})


@pytest.mark.parametrize("path", ["a/policy", "another/model"])
def test_other_models_are_loaded_without_what_is_the_policys(recipe, path):
    own = {
        "add_tokens": "<a>,<b>",
        "add_special_tokens": "<c>",
        "resize_vocab": True,
        "train_from_scratch": True,
        "model_revision": "v2",
        "adapter_folder": "best",
        "quantization_bit": 4,
        "trust_remote_code": True,
        "hf_hub_token": "secret",
        "cache_dir": "cache",
    }
    model = ModelArguments(model_name_or_path="a/policy", adapter_name_or_path="x,y", **own)
    model.compute_dtype = "bf16"
    other = arguments_for(model, path)
    assert other.model_name_or_path == path
    assert (other.add_tokens, other.add_special_tokens, other.resize_vocab) == (None, None, False)
    assert (other.train_from_scratch, other.adapter_folder, other.adapter_name_or_path) == (False, None, None)
    assert other.quantization_bit is None
    assert other.model_revision == ("v2" if path == "a/policy" else "main")
    assert (other.trust_remote_code, other.hf_hub_token, other.cache_dir) == (True, "secret", "cache")
    assert other.compute_dtype == "bf16"
    assert model.add_tokens == ["<a>", "<b>"]


@pytest.mark.parametrize(("method", "is_served"), [("bitsandbytes", True), ("gptq", False), ("fp8", False)])
def test_vllm_gets_a_quantized_checkpoint_where_it_can_be_dequantized(recipe, method, is_served):
    file = Path(recipe["model_name_or_path"], "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": method}}))
    parse(recipe)
    if is_served:
        parse(recipe | VLLM)
    else:
        message = refusal(recipe | VLLM)
        assert f"quantized with {method}" in message
        assert "rollout_backend: hf" in message


@pytest.mark.parametrize("tuning", ["full", "freeze"])
def test_a_quantized_checkpoint_is_not_trained_whole(recipe, tuning):
    file = Path(recipe["model_name_or_path"], "config.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    message = refusal(recipe | {"finetuning_type": tuning})
    assert f"finetuning_type: {tuning}" in message
    assert "quantized with bitsandbytes" in message
    assert "finetuning_type: lora" in message


def test_rope_scaling_is_refused_since_the_host_cannot_apply_it(recipe):
    """Should this fail, `rope_scaling` works again and need not be refused."""
    model_args = SimpleNamespace(rope_scaling="linear", model_max_length=1024)
    config = AutoConfig.from_pretrained(recipe["model_name_or_path"])
    with pytest.raises(StrictDataclassFieldValidationError, match=r"max_position_embeddings.*expected int, got float"):
        configure_rope(config, model_args)


@pytest.mark.parametrize(
    "changes",
    [
        {"finetuning_type": "full", "vllm_sleep": 2, "resize_vocab": True},
        {"finetuning_type": "freeze", "use_llama_pro": True, "add_tokens": "<a>"},
        {"quantization_bit": 4, "vllm_sleep": 1},
        {"adapter_name_or_path": "a/b,c/d"},
        {"adapter_name_or_path": "a/b", "create_new_adapter": True},
        {"adapter_name_or_path": "a/b", "resize_vocab": True},
        {"pissa_init": True, "vllm_base": "trainer"},
        {"vllm_lora": "merged", "use_dora": True, "lora_rank": 1024, "vllm_sleep": 2},
        {"vllm_lora": "merged", "quantization_bit": 4},
        {"train_from_scratch": True},
    ],
    ids=", ".join,
)
def test_vllm_serves_every_other_way_of_tuning(recipe, changes):
    parse(recipe | VLLM | changes)


# Adapters


@pytest.mark.parametrize(
    "path", ["nowhere", "./nowhere/at/all", "/nowhere", "model", "data/dataset_info.json", "out/lora"]
)
def test_a_path_that_is_no_adapter(recipe, path):
    Path("out").mkdir()  # so that `out/lora` is a mistyped path and no hub id
    message = refusal(recipe | {"adapter_name_or_path": path})
    assert f"adapter_name_or_path: {path}" in message
    assert "adapter_config.json" in message
    assert "output_dir" in message


def test_a_hub_id_may_be_an_adapter(recipe):
    assert parse(recipe | {"adapter_name_or_path": "owner/lora"}).model.adapter_name_or_path == ["owner/lora"]


def test_an_adapter_in_a_subfolder(recipe, adapter):
    own = {"adapter_name_or_path": str(adapter.parent), "adapter_folder": adapter.name}
    assert parse(recipe | VLLM | own).model.vllm_max_lora_rank == 64
    assert "adapter_config.json" in refusal(recipe | {"adapter_name_or_path": str(adapter.parent)})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1, 2]),
        ("modules_to_save", ["lm_head"]),
        ("peft_type", "OFT"),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
    ],
)
def test_an_adapter_that_vllm_does_not_serve(recipe, adapter, key, value):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    own = recipe | VLLM | {"adapter_name_or_path": str(adapter)}
    message = refusal(own)
    assert f"`{key}: " in message
    assert "rollout_backend: hf" in message
    if key in ("use_dora", "rank_pattern", "alpha_pattern"):
        assert "vllm_lora: merged" in message
        parse(own | {"vllm_lora": "merged"})
    else:
        assert "vllm_lora" not in message
        assert f"`{key}: " in refusal(own | {"vllm_lora": "merged"})
    parse(recipe | {"adapter_name_or_path": str(adapter)})
    if key != "peft_type":
        parse(recipe | VLLM | {"adapter_name_or_path": str(adapter), "create_new_adapter": True})  # merged


def test_new_tokens_beside_an_adapter_that_goes_on_would_be_lost(recipe, adapter):
    own = recipe | {"adapter_name_or_path": str(adapter), "resize_vocab": True}
    message = refusal(own)
    assert "not trained, and in no checkpoint" in message
    assert "create_new_adapter: true" in message
    parse(own | {"create_new_adapter": True})
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": ["embed_tokens"]}))
    parse(own)


def test_the_continued_adapters_rank_bounds_vllms(recipe, adapter):
    own = VLLM | {"adapter_name_or_path": str(adapter), "vllm_max_lora_rank": 32}
    assert "vllm_max_lora_rank: 32" in refusal(recipe | own)


# Resuming


def _checkpoint(recipe: dict[str, Any], step: int = 2) -> Path:
    folder = Path(recipe["output_dir"], f"checkpoint-{step}")
    parts = {
        name: lambda staging, name=name: Path(staging, name).write_bytes(name.encode())
        for name in ("adapter_model.safetensors", "optimizer.pt")
    }
    checkpoints.save(
        folder, parts, {"recipe": recipe_of(parse(recipe | {"overwrite_output_dir": True}))}, is_saver=True
    )
    return folder


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (("replicated", 2), ("replicated", 1), ["2 processes with the whole weights in each", "has one process"]),
        (("replicated", 1), ("replicated", 2), ["saved by one process", "2 processes with the whole weights in each"]),
        (("FSDP2", 2), ("replicated", 1), ["2 processes with the weights sharded by FSDP2", "has one process"]),
        (("FSDP2", 2), ("FSDP2", 4), ["saved by 2 processes", "has 4 processes with the weights sharded by FSDP2"]),
        (("replicated", 2), ("FSDP2", 2), ["the whole weights in each", "the weights sharded by FSDP2"]),
        (("replicated", 1), ("ZeRO-2", 1), ["saved by one process", "1 process with the training divided by ZeRO-2"]),
    ],
)
def test_a_checkpoint_of_another_layout_is_refused(recipe, before, now, said):
    keys = recipe_of(parse(recipe))
    folder = Path(recipe["output_dir"], "checkpoint-2")
    state = {"recipe": keys | {"world_size": before[1]}, "distribution": before[0]}
    checkpoints.save(folder, {}, state, is_saver=True)
    with pytest.raises(ValueError, match="Launch as it was launched then") as refused:
        check_checkpoint(folder, keys | {"world_size": now[1]}, now[0])
    for part in (str(folder), *said):
        assert part in str(refused.value)


def test_a_precision_of_the_launcher_alone_is_refused(recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert parse(recipe | {"bf16": True, "use_cpu": True}).training.bf16
    message = refusal(recipe)
    for part in ("mixed_precision: bf16", "`bf16: false`", "Write `bf16: true` into the recipe", "'no'"):
        assert part in message
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "fp8: true" not in refusal(recipe | {"bf16": True, "use_cpu": True})


def test_more_processes_than_prompts_are_refused():
    refuse_idle_processes(2, 2)
    with pytest.raises(ValueError, match=r"3 processes train on 2 prompts.* 1 of them would never.*at most 2"):
        refuse_idle_processes(2, 3)


def test_the_same_recipe_resumes_by_itself(recipe):
    folder = _checkpoint(recipe)
    assert parse(recipe).training.resume_from_checkpoint == str(folder)


def test_resume_true_finds_the_last_checkpoint(recipe):
    assert "no checkpoint" in refusal(recipe | {"resume_from_checkpoint": True})
    _checkpoint(recipe, 2)
    last = _checkpoint(recipe, 10)
    assert parse(recipe | {"resume_from_checkpoint": True}).training.resume_from_checkpoint == str(last)


def test_another_stages_checkpoint_is_refused(recipe):
    folder = _checkpoint(recipe)
    (folder / STATE_FILE).unlink()
    message = refusal(recipe)
    assert str(folder) in message
    assert "another stage" in message
    assert "`output_dir`" in message
    assert "overwrite_output_dir: true" in message
    assert parse(recipe | {"overwrite_output_dir": True}).training.resume_from_checkpoint is None


def test_a_named_checkpoint_must_exist(recipe):
    assert "resume_from_checkpoint: gone" in refusal(recipe | {"resume_from_checkpoint": "gone"})


@pytest.mark.parametrize("state", ["", "[]", "{}"])
def test_a_damaged_state_is_refused(recipe, state):
    folder = _checkpoint(recipe)
    (folder / STATE_FILE).write_text(state)
    assert "damaged" in refusal(recipe)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut, "adapter_model.safetensors has 24 bytes of 25"),
        (_flip, "adapter_model.safetensors has changed since it was saved"),
        (Path.unlink, "adapter_model.safetensors is missing"),
    ],
)
@pytest.mark.parametrize("asked", [None, True, "by name"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_offered(recipe, damage, said, asked):
    previous, last = _checkpoint(recipe, 2), _checkpoint(recipe, 4)
    damage(last / "adapter_model.safetensors")
    own = recipe | ({} if asked is None else {"resume_from_checkpoint": str(last) if asked == "by name" else asked})
    message = refusal(own)
    assert str(last) in message
    assert said in message
    assert f"`resume_from_checkpoint: {previous}`" in message
    assert parse(recipe | {"resume_from_checkpoint": str(previous)}).training.resume_from_checkpoint == str(previous)

    damage(previous / "optimizer.pt")
    message = refusal(own)
    assert "No whole checkpoint" in message
    assert "`overwrite_output_dir: true`" in message


def test_starting_afresh_beside_an_earlier_runs_checkpoints_takes_the_word_for_it(recipe):
    fresh = recipe | {"resume_from_checkpoint": False}
    assert not parse(fresh).training.resume_from_checkpoint
    _checkpoint(recipe)
    message = refusal(fresh)
    assert "checkpoint-2" in message
    assert "`overwrite_output_dir: true`" in message
    assert not parse(fresh | {"overwrite_output_dir": True}).training.resume_from_checkpoint


@pytest.mark.parametrize("key", ["adapter_name_or_path", "ref_model", "model_name_or_path"])
def test_a_run_does_not_delete_what_it_starts_from(recipe, adapter, key):
    folder = _checkpoint(recipe)
    for file in (adapter / "adapter_config.json", Path(recipe["model_name_or_path"]) / "config.json"):
        shutil.copy(file, folder)
    message = refusal(recipe | {"overwrite_output_dir": True, key: str(folder), "beta": 0.1})
    assert f"`{key}: {folder}`" in message
    assert "another `output_dir`" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta", 0.04),
        ("num_generations", 4),
        ("temperature", 0.9),
        ("learning_rate", 1e-3),
        ("lora_rank", 4),
        ("seed", 1),
        ("dataset", "gsm8k"),
        ("cutoff_len", 65),
        ("per_device_train_batch_size", 3),
        ("finetuning_type", "full"),
        ("reward_weights", 2),
        ("reward_kwargs", {"accuracy": {"a": 1}}),
        ("enable_thinking", False),
        ("max_steps", 50),
    ],
)
def test_another_recipes_checkpoint_is_refused_and_the_difference_named(recipe, key, value):
    folder = _checkpoint(recipe)
    message = refusal(recipe | {key: value})
    assert str(folder) in message
    assert f"`{key}` (" in message
    assert "overwrite_output_dir: true" in message


def test_a_moved_model_is_another_recipe(recipe, tmp_path):
    _checkpoint(recipe)
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    assert "`model_name_or_path` (" in refusal(recipe | {"model_name_or_path": str(tmp_path / "other")})


@pytest.mark.parametrize(
    "changes",
    [
        {"logging_steps": 5, "save_steps": 7, "plot_loss": True, "log_completions": True},
        {"max_tokens_per_micro_batch": 64, "log_completions": True, "num_completions_to_print": 1},
        {"reward_funcs": ["accuracy"], "beta": 0, "warmup_steps": 0.0, "cutoff_len": "64"},
    ],
)
def test_what_does_not_change_the_training_may_change(recipe, changes):
    folder = _checkpoint(recipe)
    assert parse(recipe | changes).training.resume_from_checkpoint == str(folder)


@pytest.mark.parametrize(
    ("schedule", "may_grow"),
    [
        ({"lr_scheduler_type": "constant"}, True),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}, True),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, False),
        ({"lr_scheduler_type": "linear"}, False),
        ({"lr_scheduler_type": "cosine"}, False),
    ],
)
def test_a_run_may_grow_where_the_schedule_does_not_depend_on_its_length(recipe, schedule, may_grow):
    folder = _checkpoint(recipe | schedule)
    longer = recipe | schedule | {"num_train_epochs": 6}
    if may_grow:
        assert parse(longer).training.resume_from_checkpoint == str(folder)
    else:
        assert "`num_train_epochs` (3 there, 6 here)" in refusal(longer)


SECRET = "my-own-5ecret"


def test_a_renewed_secret_is_the_same_recipe_and_in_no_record(recipe):
    def own(key: str, model: str) -> dict[str, Any]:
        settings = {"accuracy": {"api_key": key, "url": f"https://me:{key}@host", "model": model}}
        return recipe | {"reward_kwargs": settings, "hf_hub_token": key}

    folder = _checkpoint(own(SECRET, "a"))
    assert SECRET not in (folder / STATE_FILE).read_text()
    arguments = parse(own("a-new-0ne", "a"))
    assert arguments.training.resume_from_checkpoint == str(folder)
    assert arguments.finetuning.reward_kwargs["accuracy"]["api_key"] == "a-new-0ne"
    message = refusal(own(SECRET, "b"))
    assert "`reward_kwargs` (" in message
    assert '"api_key": "***"' in message
    assert SECRET not in message


@pytest.mark.parametrize(
    "keys",
    [
        {"reward_kwargs": {"api_key": SECRET}},
        {"reward_kwargs": '{"judge": {"api_key": "' + SECRET + '"}'},
        {"reward_kwargs": {"accuracy": {"api_key": SECRET}, "judge": f"https://a:{SECRET}@host"}},
        {"reward_model": f"https://me:{SECRET}@host", "reward_model_type": "full"},
        {"swanlab_api_key": SECRET, "num_generations": SECRET},
    ],
)
def test_no_refusal_says_a_secret(recipe, keys):
    with pytest.raises(ValueError, match=r".") as error:
        parse(recipe | keys)
    assert SECRET not in str(error.value)


def test_of_the_keys_of_a_recipe_these_are_secrets():
    names = [spec.name for cls in ARGUMENT_CLASSES for spec in dataclasses.fields(cls)]
    secret = {name for name in names if secrets_in({name: "a-Value-7"})}
    assert secret == {
        *("hub_token", "hf_hub_token", "ms_hub_token", "om_hub_token"),
        *("swanlab_api_key", "swanlab_lark_secret", "swanlab_lark_webhook_url"),
    }


def test_trackers_get_no_secret(recipe):
    finetuning = parse(recipe | {"reward_kwargs": {"accuracy": {"api_key": SECRET}}}).finetuning
    assert SECRET not in json.dumps(finetuning.to_dict())
    assert finetuning.to_dict()["reward_kwargs"] == {"accuracy": {"api_key": "***"}}


@pytest.mark.parametrize("kind", ["with code", "without code", "hub"])
def test_code_of_the_models_repository_is_announced(recipe, monkeypatch, kind):
    said: dict[str, list[str]] = {"warning_rank0": [], "info_rank0": []}
    for name, texts in said.items():
        monkeypatch.setattr(advice.logger, name, texts.append, raising=False)
    folder = Path(recipe["model_name_or_path"])
    if kind == "with code":
        (folder / "modeling_own.py").write_text("")
        (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["modeling_own.T", null]}}')
    advice._say_remote_code("owner/model" if kind == "hub" else str(folder))
    warned = {"with code": f"modeling_own.py of {folder}", "hub": "owner/model runs in this process"}.get(kind)
    if warned is None:
        assert said["warning_rank0"] == []
        assert "names none" in said["info_rank0"][0]
    else:
        assert warned in said["warning_rank0"][0]
        assert "`trust_remote_code: true`" in said["warning_rank0"][0]
        assert "all your rights" in said["warning_rank0"][0]


@pytest.mark.parametrize(
    ("keys", "is_warned"),
    [
        ({"learning_rate": 1.0}, True),
        ({"learning_rate": 1.0, "finetuning_type": "full"}, True),
        ({"learning_rate": 0.01, "finetuning_type": "full"}, True),  # which LoRA stands
        ({"learning_rate": 0.01}, False),
        ({"learning_rate": 1.0, "optim": "sgd"}, False),
        ({"learning_rate": 1.0, "lora_alpha": 2}, False),  # the product counts
    ],
)
def test_a_rate_that_breaks_any_model_is_warned_of(recipe, monkeypatch, keys, is_warned):
    said: list[str] = []
    monkeypatch.setattr(advice.logger, "warning_rank0", said.append)
    parse(recipe | keys)
    assert any(f"`learning_rate: {keys['learning_rate']:g}` is" in text for text in said) == is_warned


def _prompts(*references: str, length: int = 200) -> list[Prompt]:
    return [
        Prompt(index=i, token_ids=(i, i + 1), messages=(), reference=dict(enumerate(references)).get(i, "7"))
        for i in range(length)
    ]


CODE = {"accuracy": "grpo-stage 0.1.0", "own": "ab" * 32}


@pytest.mark.parametrize(
    ("prompts", "evaluation", "code", "said", "may_go_on"),
    [
        (_prompts("8"), _prompts(length=3), CODE, ["the dataset has other rows", "the rows 1 to 4"], True),
        (_prompts()[::-1], _prompts(length=3), CODE, ["the dataset has other rows, in another order"], True),
        (_prompts(length=201), _prompts(length=3), CODE, ["had 200 rows there and has 201 here"], False),
        (_prompts(), _prompts("7", "8", length=3), CODE, ["evaluation's dataset", "row 2"], True),
        (_prompts(), _prompts(length=4), CODE, ["evaluation's dataset had 3 rows there and has 4 here"], True),
        (_prompts(), _prompts(length=3), CODE | {"own": "cd" * 32}, ["`own` has changed", "abababababab there"], True),
    ],
)
def test_other_rows_or_other_reward_code_is_another_training(tmp_path, prompts, evaluation, code, said, may_go_on):
    folder = tmp_path / "checkpoint-1"
    checkpoints.save(folder, {}, training_record(_prompts(), _prompts(length=3), ["held"], CODE), is_saver=True)
    record = training_record(prompts, evaluation, ["held"], code)
    with pytest.raises(ValueError, match="Cannot resume: ") as refused:
        check_same_training(folder, record, allows_changes=False)
    for part in (str(folder), *said):
        assert part in str(refused.value)
    assert ("resume_with_changes: true" in str(refused.value)) == may_go_on
    if may_go_on:
        check_same_training(folder, record, allows_changes=True)
    else:
        with pytest.raises(ValueError, match="another number of them"):
            check_same_training(folder, record, allows_changes=True)


def test_the_same_rows_and_code_go_on(tmp_path):
    folder = tmp_path / "checkpoint-1"
    rows = _prompts(), _prompts(length=3)
    checkpoints.save(folder, {}, training_record(*rows, ["held"], CODE), is_saver=True)
    check_same_training(folder, training_record(*rows, ["held"], CODE), allows_changes=False)
    other_version = CODE | {"accuracy": "grpo-stage 0.2.0"}
    check_same_training(folder, training_record(*rows, ["held"], other_version), allows_changes=False)
    other_evaluation = training_record(rows[0], _prompts("8", length=9), ["another"], CODE)
    check_same_training(folder, other_evaluation, allows_changes=False)


def test_a_recipe_is_plain_json(recipe):
    stored = recipe_of(parse(recipe))
    assert json.loads(json.dumps(stored)) == stored


@pytest.mark.parametrize(
    ("length", "kept"), [({"max_steps": 9}, {"num_iterations": 2}), ({"num_train_epochs": 2}, {})]
)
def test_a_remedy_that_would_cut_epochs_short_is_no_remedy(recipe, length, kept):
    """With half of the iterations an epoch has half of the steps, of which the run has made some already."""
    arguments = parse(recipe | length | {"num_iterations": 4})
    rate = {"learning_rate": 1e-5}
    assert possible(arguments, {"num_iterations": 2} | rate) == kept | rate


def with_ranks(size, processes):
    keys = {"finetuning": {"vllm_tensor_parallel": size}, "training": {"world_size": processes}}
    return SimpleNamespace(**{name: SimpleNamespace(**each) for name, each in keys.items()})


def test_processes_of_a_machine_are_not_known_without_their_launcher(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    check_ranks(with_ranks(1, 4))
    with pytest.raises(ValueError, match=r"vllm_tensor_parallel: 2.*without LOCAL_WORLD_SIZE.*torchrun.*leave"):
        check_ranks(with_ranks(2, 4))


@pytest.mark.parametrize(
    ("size", "processes", "is_refused"), [(1, 3, False), (2, 4, False), (2, 3, True), (2, 1, True)]
)
def test_an_engine_is_shared_by_processes_of_a_machine(size, processes, is_refused, monkeypatch):
    """Before a model is loaded: nothing but the number of processes is looked at."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    if processes == 1:
        monkeypatch.delenv("LOCAL_WORLD_SIZE")
    arguments = with_ranks(size, processes)
    said = rf"vllm_tensor_parallel: {size}.*with {processes} process.*multiple of {size}.*NPROC_PER_NODE.*leave it out"
    with pytest.raises(ValueError, match=said) if is_refused else nullcontext():
        check_ranks(arguments)
