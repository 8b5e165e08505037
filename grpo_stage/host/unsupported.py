"""Keys of the host that `stage: grpo` never supports, each with reason and remedy."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Keys that this stage never supports, whatever the other keys are."""

    keys: str
    reason: str
    remedy: str = "Leave it out."
    harmless: tuple[Any, ...] = (False,)
    """Values without any effect, which are allowed; `null` always is."""


# The first group has objectives and loops of other stages. Some keys exist only on the host's main.
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
    # Optimization
    Unsupported(
        "fsdp fsdp_config parallelism_config",
        "it is the launcher that says how weights are sharded",
        "Leave it out, and launch with `accelerate launch --config_file fsdp2.yaml` (docs/devices.md).",
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
