"""Every YAML key of the stage: type, bounds, default, help text.

The names follow the host where it has the option, TRL where it does not, so that a recipe moves over with its numbers.
Choices are the field's Literal. Which keys have an effect beside which others is in `algorithm.combinations`.
"""

import dataclasses
import functools
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .algorithm.catalog import ENGINE_KEYS, ESTIMATORS, LOSS_TYPES, canonical
from .algorithm.combinations import check_effect, refuse_contradictions
from .algorithm.conditions import broken_bound
from .algorithm.refusals import apart
from .rewards.options import REWARD_COLUMNS_EXAMPLE, as_weight, check_filter, check_rewards


if TYPE_CHECKING:
    LossType = str
    AdvantageEstimator = str
    RolloutBackend = str
else:
    LossType, AdvantageEstimator = Literal[tuple(LOSS_TYPES)], Literal[tuple(ESTIMATORS)]
    RolloutBackend = Literal[tuple(ENGINE_KEYS)]

ROLLOUT, REWARDS, OBJECTIVE, EVALUATION = "Rollout", "Rewards", "Objective", "Evaluation"
MEMORY, LIMITS, MONITORING = "Memory", "Limits", "Monitoring"
ALARM_ACTIONS = ("warn", "stop", "recover")
MOST_GENERATIONS = 16_384
"""Far more completions of one prompt than any paper has."""
LONGEST_TIMEOUT_S = 1e9
"""About what a system call takes at most."""


def _key(default: Any, group: str, explanation: str, **bounds: float) -> Any:
    """A field of the arguments.

    Args:
        default: of the key.
        group: the heading in docs/configuration.md and in LLaMA Board.
        explanation: the help text.
        bounds: `min` and `max` are inclusive, `above` is an exclusive lower one, `most` an upper one far from any
            use, for slips of the pen.
    """
    return field(default=default, metadata={"group": group, "help": explanation, **bounds})


@dataclass
class GRPOArguments:
    r"""Arguments of `stage: grpo`."""

    # Rollout
    rollout_backend: RolloutBackend = _key(
        "vllm",
        ROLLOUT,
        "The engine that samples completions: `vllm` runs vLLM in this process on the training device, `vllm_server` "
        "asks vLLM servers on the same or other machines, `hf` uses transformers' generate, slower but everywhere.",
    )
    vllm_server_urls: str | None = _key(
        None,
        ROLLOUT,
        "The addresses of the servers that sample, comma-separated, such as `http://a:8000,http://b:8000`. Each is a "
        "`vllm serve` with the flags that `grpo-stage serve` prints; results do not depend on their number. They have "
        "to see `output_dir` under the same path. A key is taken from the environment (VLLM_API_KEY).",
    )
    num_generations: int = _key(
        8,
        ROLLOUT,
        "Completions sampled for each prompt (the group size G); one alone would have nothing to be compared with. A "
        "batch is counted in prompts: per_device_train_batch_size x gradient_accumulation_steps x devices prompts "
        "make one optimizer step, each sampled this many times.",
        min=2,
        most=MOST_GENERATIONS,
    )
    steps_per_generation: int = _key(
        1,
        ROLLOUT,
        "Optimizer steps fed by one rollout: the rollout samples this many steps' prompts at once. Past 1 the later "
        "steps are slightly off-policy.",
        min=1,
        most=10_000,
    )
    rollout_ahead: int = _key(
        0,
        ROLLOUT,
        "Rollouts that are sampled ahead: with 1 vLLM runs in a process of its own and samples the next step's "
        "completions while this step trains. They come from the policy one update before, which the loss's ratio "
        "corrects, or `rollout_correction`. It pays where vLLM has a device of its own.",
        min=0,
        max=1,
    )
    dynamic_sampling: bool = _key(
        False,
        ROLLOUT,
        "DAPO's dynamic sampling: leave out groups whose total rewards are all equal, which teach nothing, and roll "
        "out further prompts until the batch is full. What is sampled too much waits for the next batch. An epoch "
        "then has fewer steps: it ends when its prompts are used up.",
    )
    max_resample_times: int = _key(
        3,
        ROLLOUT,
        "How many further rollouts, each of as many prompts as the first, dynamic sampling may take for a batch. "
        "After them the step trains on the groups it has.",
        min=1,
        most=10_000,
    )
    filter_metric: str | None = _key(
        None,
        ROLLOUT,
        "The reward function by which dynamic sampling tells whether the completions of a group differ, such as "
        "`accuracy`; by default the total reward. A group whose totals are all equal is left out in any case.",
    )
    filter_min_range: float = _key(
        0.0,
        ROLLOUT,
        "Dynamic sampling leaves out groups whose highest and lowest reward differ by no more than this: where they "
        "nearly tie, dividing by the group's deviation makes large advantages of noise.",
        min=0.0,
    )
    overlong_prompts: Literal["drop", "truncate"] = _key(
        "drop",
        ROLLOUT,
        "What happens to a prompt of more than `cutoff_len` tokens: `drop` leaves it out and counts it in the log, "
        "`truncate` keeps its last `cutoff_len` tokens.",
    )
    reference_column: str | None = _key(
        None,
        ROLLOUT,
        "The dataset column that holds the reference answer for the rewards, or a field of one by its path, such as "
        "`reward_model.ground_truth`. By default the last assistant turn is the reference.",
    )
    dataset_kwargs: dict | str | None = _key(
        None,
        ROLLOUT,
        "Settings of generated datasets as a mapping (or a JSON string) from the task's name to them, e.g. "
        '{"leg_counting": {"max_animals": 5}} for `dataset: reasoning_gym:leg_counting`; `size` and `seed` among '
        "them, which are `max_samples` and the run's `seed` by default.",
    )
    curriculum_threshold: float = _key(
        0.0,
        ROLLOUT,
        "Above 0, generated tasks (`dataset: reasoning_gym:...`) have rows of all their levels, easy ones first: the "
        "next level begins once the mean of the reward `reasoning_gym` over 32 prompts of the present one is at least "
        "this, and the level before comes back once it is below half of it. An epoch still has every row once.",
        min=0.0,
        max=1.0,
    )
    min_p: float = _key(
        0.0,
        ROLLOUT,
        "Sample from those tokens alone whose probability is at least this share of the most probable one's; 0 keeps "
        "all. As with `top_p` and `top_k`, completions then come from another distribution than the policy's.",
        min=0.0,
        max=1.0,
    )
    structured_outputs: dict | str | None = _key(
        None,
        ROLLOUT,
        "What every completion has to match, as a mapping (or a JSON string) with one of vLLM's forms: `regex`, "
        '`choice` (a list of texts), `json` (a schema) or `grammar`, e.g. {"regex": "<think>.*</think> [0-9]+"}. '
        "Tokens that cannot match are never sampled, so that completions come from another distribution than the "
        "policy's; the reward `regex` scores a form without forcing it.",
    )
    # Tools
    tools: str | None = _key(
        None,
        ROLLOUT,
        "Functions that the model may call while it answers, as `path/file.py:function`, separated by commas or as a "
        "YAML list. Each has types and a docstring with its arguments, of which the model is told in the tool format "
        "of the `template`. What they return has no loss.",
    )
    environment: str | None = _key(
        None,
        ROLLOUT,
        "A class of which each completion has an object, as `path/file.py:Class`: its `reset(**row)` gets the columns "
        "of the row and may return a text for the prompt, its other public methods are tools, and its `get_reward()` "
        "gives the reward `environment`. Or a game of the package textarena, such as `textarena:GuessTheNumber-v0`, "
        "which needs no `dataset`.",
    )
    max_turns: int = _key(
        8,
        ROLLOUT,
        "Turns of the model in a completion, with `tools` or `environment`: the tools that the last one calls are not "
        "run.",
        min=1,
        most=10_000,
    )
    completion_limit: Literal["total", "turn"] = _key(
        "total",
        ROLLOUT,
        "What `max_new_tokens` limits, with `tools` or `environment`: `total` a whole completion, the results of its "
        "tools included, `turn` each turn of the model, and max_turns x max_new_tokens the whole.",
    )
    # Rewards
    reward_funcs: str | None = _key(
        None,
        REWARDS,
        "Reward functions, separated by commas or as a YAML list: a built-in name, `path/file.py:function`, or "
        "`package.module:function`; and `reward_model` for the model that LLaMA-Factory's `reward_model` gives, which "
        "is what this key is by default where there is one.",
    )
    reward_weights: str | None = _key(
        None,
        REWARDS,
        "One weight for each reward function, separated by commas or as a YAML list. 1 each by default.",
    )
    reward_kwargs: dict | str | None = _key(
        None,
        REWARDS,
        "Settings of reward functions as a mapping (or a JSON string) from the function's name to its keyword "
        'arguments, e.g. {"length": {"max_length": 512}}.',
    )
    reward_columns: dict | str | None = _key(
        None,
        REWARDS,
        "Fields of dataset columns for reward functions, as a mapping (or a JSON string) from an argument's name to "
        'the path of a field, e.g. {"ground_truth": "reward_model.ground_truth"}. A column itself needs no entry: an '
        "argument of its name gets it.",
    )
    code_sandbox: Literal["bwrap", "none"] = _key(
        "bwrap",
        REWARDS,
        "Where the reward `code` runs the programs of completions: `bwrap` in bubblewrap, without network, files of "
        "yours and rights; `none` as you, with all your rights, which `run_code_without_sandbox` has to confirm.",
    )
    run_code_without_sandbox: bool = _key(
        False,
        REWARDS,
        "Confirm `code_sandbox: none`: what the model writes may read, change and send whatever you may.",
    )
    # Objective
    advantage_estimator: AdvantageEstimator = _key(
        "grpo",
        OBJECTIVE,
        "What a completion's reward is compared with: `grpo` the mean of its group, divided as `scale_rewards` says, "
        "`dr_grpo` the same undivided, `rloo` the mean of the others of its group, `opo` the group's mean weighted by "
        "length, `passk` the best of the others (pass@k with k = num_generations), `reinforce_plus_plus` the mean of "
        "the batch, `reinforce_plus_plus_baseline` the group's mean, whitened over the batch, `gdpo` each reward "
        "function on its own, `remax` the prompt's most probable completion, which is sampled and scored beside the "
        "others, `optimal_token_baseline` the group's mean at each token, weighted by how much its completions have "
        "to learn until there, for which a rollout takes one more forward pass.",
    )
    scale_rewards: Literal["auto", "group", "batch", "none"] = _key(
        "auto",
        OBJECTIVE,
        "What advantages are divided by: the standard deviation of the `group`, of the whole `batch` of one "
        "generation over all devices, or `none`. `auto` is what the paper of `advantage_estimator` has: `group` for "
        "`grpo`.",
    )
    loss_type: LossType = _key(
        "dapo",
        OBJECTIVE,
        "What a token's loss is, and how they are averaged. PPO's clip: `grpo` over each completion and then over "
        "completions, `dapo` over all tokens of the step, `dr_grpo` over completions x max_new_tokens; `bnpo` is "
        "`dapo` here, since denominators are counted over the whole optimizer step. `gspo` and `gspo_token` clip the "
        "ratio of the whole completion, and `luspo` weighs it by its length as well. `cispo` bounds the importance "
        "weight and clips nothing, `sapo` fades where others clip, and so does `vespo`, by the whole completion; "
        "`gmpo` takes the geometric mean over tokens. `dppo_tv` and `dppo_kl` leave out tokens by their divergence "
        "from the engine's policy, `dro` holds each token back by a spring, `gpg` has no ratio at all.",
    )
    loss_aggregation: Literal[
        "auto", "token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"
    ] = _key(
        "auto",
        OBJECTIVE,
        "How the losses of a step's tokens are averaged, counted over all devices: over all tokens (`token_mean`), "
        "over each completion and then over completions (`seq_mean_token_mean`), summed over each completion and then "
        "averaged (`seq_mean_token_sum`), or divided by completions x max_new_tokens (`seq_mean_token_sum_norm`). "
        "`token_sum` divides by nothing, so that the gradient grows with the batch. `auto` is what the paper of "
        "`loss_type` has.",
    )
    vespo_k_pos: float = _key(
        2.0, OBJECTIVE, "Exponent of `vespo`'s gate where the advantage is not negative.", min=0.0, most=100.0
    )
    vespo_lambda_pos: float = _key(
        3.0, OBJECTIVE, "Rate of `vespo`'s gate where the advantage is not negative.", above=0.0, most=100.0
    )
    vespo_k_neg: float = _key(
        3.0, OBJECTIVE, "Exponent of `vespo`'s gate where the advantage is negative.", min=0.0, most=100.0
    )
    vespo_lambda_neg: float = _key(
        2.0, OBJECTIVE, "Rate of `vespo`'s gate where the advantage is negative.", above=0.0, most=100.0
    )
    dppo_ratio_max: float = _key(
        20.0,
        OBJECTIVE,
        "Upper bound of the ratio of trainer to engine that `dppo_tv` and `dppo_kl` weigh a token with.",
        min=1.0,
    )
    dro_beta: float | None = _key(
        None,
        OBJECTIVE,
        "How strongly `dro` holds each token to its old log-probability; undivided advantages are meant "
        "(`scale_rewards: none`).",
        above=0.0,
    )
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = _key(
        "token",
        OBJECTIVE,
        "Whose ratio is clipped: each `token`'s, or the completion's (`sequence`, the geometric mean of its tokens'); "
        "`sequence_token` has the completion's value and each token's gradient. `loss_type: gspo` is `grpo` with "
        "`sequence`.",
    )
    epsilon: float = _key(
        0.2,
        OBJECTIVE,
        "Lower clip range of the ratio: it is kept above 1 - epsilon (`gmpo`: above exp(-epsilon)). The ratio of a "
        "whole completion moves less: GSPO's paper has 3e-4, GMPO's 0.4.",
        above=0.0,
    )
    epsilon_high: float | None = _key(
        None,
        OBJECTIVE,
        "Upper clip range of the ratio: it is kept below 1 + epsilon_high (`gmpo`: below exp(epsilon_high)). "
        "`epsilon` by default; DAPO recommends 0.28, GSPO 4e-4. `cispo` needs it: TRL's 5.0 is 4.0 here.",
        above=0.0,
    )
    delta: float | None = _key(
        None,
        OBJECTIVE,
        "Upper bound of the ratio where the advantage is negative (dual clip), which the clip leaves without one. "
        "Above 1 + epsilon_high; verl has 3.0. No bound by default.",
        above=1.0,
    )
    sapo_temperature_pos: float = _key(
        1.0,
        OBJECTIVE,
        "How fast the gradient fades away from ratio 1 where the advantage is positive.",
        above=0.0,
    )
    sapo_temperature_neg: float = _key(
        1.05,
        OBJECTIVE,
        "How fast the gradient fades away from ratio 1 where the advantage is not positive.",
        above=0.0,
    )
    answer_balance: float = _key(
        0.0,
        OBJECTIVE,
        "How far the advantages of a prompt are lowered because many prompts have its answer, from 0 (not at all) to "
        "1 (every answer weighs the same): for datasets on which one answer to all prompts would earn much. They are "
        "multiplied by the answer's share of the dataset to the power of minus this value, in the mean by 1.",
        min=0.0,
        max=1.0,
    )
    beta: float = _key(
        0.0,
        OBJECTIVE,
        "Weight of the KL divergence to the reference policy. 0 needs no reference policy; DeepSeekMath used 0.04.",
        min=0.0,
        most=1000.0,
    )
    kl_estimator: Literal["k1", "k2", "k3"] = _key(
        "k3",
        OBJECTIVE,
        "How the divergence is estimated from the sampled tokens: `k1` the log-ratio, `k2` half its square, `k3` "
        "GRPO's own. `k1` goes with `kl_in_reward` or `use_bias_correction_kl`, where it is unbiased.",
    )
    use_bias_correction_kl: bool = _key(
        False,
        OBJECTIVE,
        "Multiply the KL estimate by the ratio, through which the gradient flows too (DeepSeek-V3.2): then the "
        "gradient is that of the divergence, and not of the reversed one.",
    )
    kl_in_reward: bool = _key(
        False,
        OBJECTIVE,
        "Take beta x the sum of k1 over a completion off its reward, before advantages are computed, in the place of "
        "a KL term in the loss (PPO, RLOO and REINFORCE++ have it so).",
    )
    kl_target: float | None = _key(
        None,
        OBJECTIVE,
        "The `kl` of the log, in nats a token, that `beta` is adapted to: it starts as written and changes by up to 2 "
        "percent a step. Fixed by default.",
        above=0.0,
    )
    sync_ref_model: bool = _key(
        False,
        OBJECTIVE,
        "Move the reference towards the policy every `ref_model_sync_steps` steps. It takes a copy of the trainable "
        "weights.",
    )
    ref_model_mixup_alpha: float = _key(
        0.6,
        OBJECTIVE,
        "The policy's share in the new reference; the rest is the old one's.",
        above=0.0,
        max=1.0,
    )
    ref_model_sync_steps: int = _key(
        512,
        OBJECTIVE,
        "Optimizer steps between two moves of the reference.",
        min=1,
    )
    rollout_correction: Literal["none", "token", "sequence"] = _key(
        "none",
        OBJECTIVE,
        "Weigh the policy's loss by how much more probable the trainer finds what the engine sampled: each `token`, "
        "or the whole `sequence` (the product over its tokens). Only where sampling is neutral.",
    )
    rollout_correction_normalize: bool = _key(
        False,
        OBJECTIVE,
        "Divide the weights of `rollout_correction` by their mean over the step, so that they change how much tokens "
        "count beside one another, and not the size of the gradient. A step takes one more forward pass.",
    )
    rollout_correction_mode: Literal["truncate", "mask"] = _key(
        "truncate",
        OBJECTIVE,
        "What becomes of a weight beyond the bounds: it is set to the bound, or to 0.",
    )
    rollout_correction_max: float = _key(
        2.0,
        OBJECTIVE,
        "Upper bound of the weight.",
        min=1.0,
    )
    rollout_correction_min: float = _key(
        0.0,
        OBJECTIVE,
        "Lower bound of the weight; 0 is none.",
        min=0.0,
        max=1.0,
    )
    rollout_rejection: Literal["none", "sequence", "geometric"] = _key(
        "none",
        OBJECTIVE,
        "Leave completions out of the loss and its averages that the trainer finds far more, or far less, probable "
        "than the engine that sampled them: by the product of their tokens' ratios (`sequence`) or its geometric mean "
        "(`geometric`). Only where sampling is neutral. A step takes one more forward pass.",
    )
    rollout_rejection_max: float = _key(
        2.0, OBJECTIVE, "A completion of a higher ratio of trainer to engine is left out.", min=1.0
    )
    rollout_rejection_min: float = _key(
        0.5,
        OBJECTIVE,
        "A completion of a lower ratio of trainer to engine is left out; 0 is no bound.",
        min=0.0,
        max=1.0,
    )
    off_policy_mask_threshold: float | None = _key(
        None,
        OBJECTIVE,
        "Leave a completion with a negative advantage out of the policy's loss where its tokens have become less "
        "probable than they were sampled by more than this mean, in nats (DeepSeek-V3.2). Only where sampling is "
        "neutral. Off by default.",
        above=0.0,
    )
    entropy_coef: float = _key(
        0.0,
        OBJECTIVE,
        "What the policy is paid in the loss for a nat of entropy a token, against a collapse of its entropy. It "
        "takes memory, since the gradient flows through the whole distribution. With `entropy_target` it is where the "
        "coefficient starts.",
        min=0.0,
    )
    entropy_target: float | None = _key(
        None,
        OBJECTIVE,
        "The `entropy` of the log, in nats a token, that the coefficient of the bonus is adapted to: it rises by "
        "`entropy_coef_delta` after a step at or under it and falls after one over it, and is paid only after the "
        "former (Skywork-OR1). Fixed by default.",
        above=0.0,
    )
    entropy_coef_delta: float = _key(
        0.0005,
        OBJECTIVE,
        "How much the coefficient of the entropy bonus changes in a step.",
        above=0.0,
    )
    entropy_coef_max: float = _key(
        0.05,
        OBJECTIVE,
        "The highest coefficient of the entropy bonus.",
        above=0.0,
    )
    top_entropy_quantile: float = _key(
        1.0,
        OBJECTIVE,
        "The share of tokens, those of the highest entropy in the whole step, that the policy learns from; 0.2 in the "
        "paper. Below 1 a step takes one more forward pass.",
        above=0.0,
        max=1.0,
    )
    covariance_control: Literal["none", "clip_cov", "kl_cov"] = _key(
        "none",
        OBJECTIVE,
        "What is done about the few tokens that lower the entropy most: of those with a high covariance of "
        "log-probability and advantage `clip_cov` leaves some out of the loss, and `kl_cov` holds the highest to "
        "where they were before the update. A step takes one more forward pass.",
    )
    covariance_frac: float = _key(
        0.0002,
        OBJECTIVE,
        "The share of all tokens that it is done to; the paper has 2e-4, and 2e-3 for `kl_cov` on 7B.",
        above=0.0,
        max=1.0,
    )
    clip_cov_min: float = _key(
        1.0,
        OBJECTIVE,
        "The lowest covariance of a token that may be left out.",
    )
    clip_cov_max: float = _key(
        5.0,
        OBJECTIVE,
        "The highest covariance of a token that may be left out.",
    )
    kl_cov_coef: float = _key(
        1.0,
        OBJECTIVE,
        "Weight of the distance from the old log-probability in the loss of such a token.",
        above=0.0,
    )
    cast_lm_head_to_fp32: bool = _key(
        False,
        OBJECTIVE,
        "Compute the trainer's logits in float32 where the rest is in half precision: log-probabilities are then "
        "rounded less, and so are ratios. A pass takes a float32 copy of the output layer.",
    )
    num_iterations: int = _key(
        1,
        OBJECTIVE,
        "How many times each rollout is trained on (mu in the paper).",
        min=1,
        most=1000,
    )
    mask_truncated_completions: bool = _key(
        False,
        OBJECTIVE,
        "DAPO's overlong filtering: leave completions that reached `max_new_tokens` out of the loss and of its "
        "averages. They still count in the rewards and in the statistics of their group.",
    )
    mask_zero_std_groups: bool = _key(
        False,
        OBJECTIVE,
        "Leave groups whose total rewards are all equal out of the loss, of its KL term and of its averages: their "
        "advantages are 0, and they would be pulled to the reference (`beta`) for nothing. With `dynamic_sampling` "
        "there are none.",
    )
    # Evaluation
    eval_num_generations: int | None = _key(
        None,
        EVALUATION,
        "Completions sampled for each prompt in an evaluation: the k of mean@k, pass@k and maj@k. `num_generations` "
        "by default.",
        min=1,
        most=MOST_GENERATIONS,
    )
    eval_temperature: float | None = _key(
        None,
        EVALUATION,
        "Sampling temperature of evaluations; 0 takes the most probable token each time, and goes with "
        "`eval_num_generations: 1`. `temperature` by default.",
        min=0.0,
        most=100.0,
    )
    # Memory
    max_tokens_per_micro_batch: int = _key(
        4096,
        MEMORY,
        "How many tokens (prompts, completions and any padding) go through the model at once in the update. It "
        "changes memory and speed, never the gradient. Where memory runs out in an update it is halved and the update "
        "done again.",
        min=1,
    )
    disable_prompt_sharing: bool = _key(
        False,
        MEMORY,
        "Give each completion its own copy of the prompt in the update. Otherwise a prompt goes through the model "
        "once for its group, without padding: two to four times faster with long prompts, with the same gradient. A "
        "model for which that is not exact is found at the start, and trained as with `true`.",
    )
    disable_logit_chunking: bool = _key(
        False,
        MEMORY,
        "Compute the logits of a whole micro-batch at once. Otherwise the log-probabilities are computed for a part "
        "of the tokens at a time, so that memory does not grow with the vocabulary.",
    )
    disable_zero_advantage_skipping: bool = _key(
        False,
        MEMORY,
        "Have completions with an advantage of 0 go through the update although they add nothing to the gradient "
        "(groups of equal rewards). Otherwise they are left out, and `entropy` and the other metrics of the update "
        "are means over the tokens that are trained on.",
    )
    vllm_base: Literal["auto", "trainer"] = _key(
        "auto",
        MEMORY,
        "Where vLLM gets the model that an adapter stands on: `auto` reads `model_name_or_path` where that is the "
        "model that is trained (on a GPU a 4-bit base stays in 4 bits), and otherwise has the trainer's written out "
        "once, dequantized; `trainer` always has it written out.",
    )
    vllm_lora: Literal["native", "merged"] = _key(
        "native",
        MEMORY,
        "How vLLM gets a LoRA adapter: `native` as an adapter on the model that it holds, a few megabytes at each "
        "delivery; `merged` as all weights with the adapter in them, so that DoRA and any rank are possible and "
        "sampling is that of a model without an adapter. In half precision merged weights are rounded, so that vLLM "
        "differs more from the trainer.",
    )
    vllm_server_transfer: Literal["files", "nccl"] = _key(
        "files",
        MEMORY,
        "How whole weights reach vLLM servers (full and freeze tuning, `vllm_lora: merged`): `files` writes them to "
        "`output_dir`, where the servers read them; `nccl` sends them from the trainer's GPU to those of the servers, "
        "for which vLLM has to be installed beside the trainer as well. No GPU has run `nccl` yet: its tests have a "
        "stand-in for NCCL.",
    )
    vllm_sleep: int = _key(
        0,
        MEMORY,
        "What vLLM gives up on the GPU during the update: 0 nothing, 1 its KV cache and, into main memory, its "
        "weights, 2 both for good, since full and freeze tuning deliver all weights anew. A CPU has nothing to give "
        "up.",
        min=0,
        max=2,
    )
    vllm_tensor_parallel: int = _key(
        1,
        MEMORY,
        "How many processes of a machine are one vLLM together, each holding that part of the model on its device: "
        "for models that do not fit beside the training on one. They sample the prompts of all of them together, and "
        "results do not depend on it. Servers have their own number of devices (`vllm_config: "
        "{tensor_parallel_size: 2}` with `rollout_backend: vllm_server`).",
        min=1,
    )
    # Limits
    sync_timeout: float = _key(
        600.0,
        LIMITS,
        "Seconds that the delivery of the weights to the engine may take before the run is ended.",
        above=0.0,
        most=LONGEST_TIMEOUT_S,
    )
    rollout_timeout: float = _key(
        3600.0,
        LIMITS,
        "Seconds that sampling one rollout may take before the run is ended.",
        above=0.0,
        most=LONGEST_TIMEOUT_S,
    )
    reward_timeout: float = _key(
        600.0,
        LIMITS,
        "Seconds that a reward function may take for the completions of one rollout before the run is ended. "
        "`accuracy` has a limit for each completion too, `timeout` in its `reward_kwargs`.",
        above=0.0,
        most=LONGEST_TIMEOUT_S,
    )
    tool_timeout: float = _key(
        30.0,
        LIMITS,
        "Seconds that one call of a tool may take. After them it is ended, and the model reads that it took too long.",
        above=0.0,
        most=LONGEST_TIMEOUT_S,
    )
    max_skipped_steps: int = _key(
        5,
        LIMITS,
        "How many steps in a row may be skipped for a loss or gradient that is not finite; one more ends the run. The "
        "batch of each is written to the output folder.",
        min=0,
    )
    on_alarm: dict | str = _key(
        "warn",
        MONITORING,
        "What an alarm of a monitor does: `warn` tells it and goes on, `stop` ends the run with a checkpoint, "
        "`recover` goes back to the last checkpoint before the fault and goes on with the remedy that it names. "
        'One word for all, or a mapping (or a JSON string) by monitor, e.g. {"entropy_collapse": "recover"}; '
        "docs/monitors.md has their names.",
    )
    max_recoveries: int = _key(
        2,
        MONITORING,
        "How often a run may go back by `on_alarm: recover`; after that such an alarm stops it.",
        min=1,
        most=100,
    )
    resume_with_changes: bool = _key(
        False,
        LIMITS,
        "Resume although the dataset's rows or the files of reward functions have changed since the checkpoint. "
        "Without it such a resume is refused, and what has changed is named.",
    )
    # Monitoring
    max_sampling_logprob_diff: float | None = _key(
        None,
        MONITORING,
        "The run stops when the mean difference between the engine's and the trainer's log-probabilities of the "
        "sampled tokens passes this bound, since completions then come from another policy. By default chosen by the "
        "precision.",
        above=0.0,
    )
    log_completions: bool = _key(
        False,
        MONITORING,
        "Print a table of sampled completions with their rewards at every logging step, and write all completions to "
        "completions.jsonl in the output folder.",
    )
    num_completions_to_print: int = _key(
        4,
        MONITORING,
        "Rows of the table that `log_completions` prints.",
        min=1,
    )

    def __post_init__(self) -> None:
        self.reward_funcs: list[str] = _split(self.reward_funcs)  # type: ignore[assignment]
        self.tools: list[str] = _split(self.tools)  # type: ignore[assignment]
        if self.reward_weights is not None:
            weights = [as_weight(item) for item in _split(self.reward_weights)]
            self.reward_weights: list[float] | None = weights  # type: ignore[assignment]
        if isinstance(self.reward_kwargs, str):
            self.reward_kwargs = _mapping("reward_kwargs", self.reward_kwargs, '{"length": {"max_length": 512}}')
        if isinstance(self.structured_outputs, str):
            self.structured_outputs = _mapping("structured_outputs", self.structured_outputs, '{"regex": "[0-9]+"}')
        self.on_alarm = actions_of_alarms(self.on_alarm)
        if isinstance(self.dataset_kwargs, str):
            self.dataset_kwargs = _mapping("dataset_kwargs", self.dataset_kwargs, '{"leg_counting": {"size": 100}}')
        if isinstance(self.reward_columns, str):
            self.reward_columns = _mapping("reward_columns", self.reward_columns, REWARD_COLUMNS_EXAMPLE)

        if self.scale_rewards == "auto" and self.advantage_estimator in ESTIMATORS:
            self.scale_rewards = ESTIMATORS[self.advantage_estimator].scales[0]  # type: ignore[assignment]
        stands_for = canonical(vars(self))
        self.as_written = {name: getattr(self, name) for name in stands_for}
        """The values that other ones have taken the place of, since they were another name of them."""
        vars(self).update(stands_for)

    def validate(self, given: Collection[str] = ()) -> None:
        """Refuse values that are out of bounds, and those that contradict one another.

        Args:
            given: the keys that the user wrote; one of another value than its default is taken for written, too.

        Raises:
            ValueError: naming the key, its value, the rule and the remedy.
        """
        values = {name: getattr(self, name) for name in grpo_field_names()} | self.as_written
        for spec in dataclasses.fields(GRPOArguments):
            value = values[spec.name]
            with apart():
                _check_bounds(spec, value)
                asks_for_nothing = value is None or value is False or value == "none"
                if value != spec.default or (spec.name in given and not asks_for_nothing):
                    check_effect(spec.name, values, spec.metadata["help"])

        read: Any = self  # `__post_init__` has made lists and mappings of texts
        check_rewards(read.reward_funcs, read.reward_weights, read.reward_kwargs or {}, read.reward_columns or {})
        with apart():
            check_filter(self.filter_metric, read.reward_funcs)
        with apart():
            _check_on_alarm(read.on_alarm)
        refuse_contradictions(values)


@functools.cache
def grpo_field_names() -> frozenset[str]:
    """The YAML keys that only this stage knows."""
    return frozenset(f.name for f in dataclasses.fields(GRPOArguments))


def actions_of_alarms(on_alarm: dict | str) -> dict[str, str] | str:
    """`on_alarm` as one word, or as a mapping from monitors to words."""
    if isinstance(on_alarm, str) and on_alarm.lstrip().startswith("{"):
        return _mapping("on_alarm", on_alarm, '{"entropy_collapse": "recover"}')
    return on_alarm


def _check_on_alarm(on_alarm: Any) -> None:
    for action in on_alarm.values() if isinstance(on_alarm, dict) else [on_alarm]:
        if action not in ALARM_ACTIONS:
            raise ValueError(
                f"`on_alarm: {action}` is no action: an alarm can {', '.join(ALARM_ACTIONS)}. Write one of these for "
                'all monitors, or a mapping by monitor such as {"entropy_collapse": "recover"}.'
            )


def _check_bounds(spec: "dataclasses.Field[Any]", value: Any) -> None:
    if (rule := broken_bound(value, spec.metadata)) is None:
        return
    default = f"write `{spec.name}: {spec.default}`, the default" if spec.default is not None else "leave it out"
    raise ValueError(
        f"`{spec.name}: {value}` must be {rule}. {spec.metadata['help']} Give it such a value, or {default}."
    )


def _mapping(key: str, text: str, example: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{key}: {text}` is not valid JSON: {error}. Write a YAML mapping or mend it.") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{key}: {text}` is not a mapping. Write for example {example}.")
    return value


def _split(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]
