"""Every YAML key of the stage: type, bounds, default, help text.

The names follow the host where it has the option, TRL where it does not, so that a recipe moves over with its numbers.
`metadata["group"]` is the heading in docs/configuration.md and in LLaMA Board; `metadata["min"]` and `["max"]` are
inclusive bounds, `["above"]` an exclusive lower one, `["most"]` an upper one far from any use, for slips of the pen.
Choices are the field's Literal. `metadata["only_with"]` maps other keys to the values under which this one has an
effect: elsewhere it is refused, and hidden in LLaMA Board.
"""

import dataclasses
import json
import math
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from .algorithm.conditions import Above, applies, shown, shown_condition
from .rewards.options import REWARD_COLUMNS_EXAMPLE, as_weight, check_rewards


ROLLOUT, REWARDS, OBJECTIVE, EVALUATION = "Rollout", "Rewards", "Objective", "Evaluation"
MEMORY, LIMITS, MONITORING = "Memory", "Limits", "Monitoring"
CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "gspo_token")
"""Those of `loss_type` that PPO's clip is in."""
ADVANTAGE_SCALES = MappingProxyType(
    {
        "grpo": ("group", "batch", "none"),
        "dr_grpo": ("none",),
        "rloo": ("none", "batch"),
        "reinforce_plus_plus": ("batch",),
        "reinforce_plus_plus_baseline": ("batch",),
        "gdpo": ("batch",),
        "passk": ("none", "group", "batch"),
        "opo": ("none",),
    }
)
"""The values of `scale_rewards` that each `advantage_estimator` goes with; the first is the paper's."""
GROUP_ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline", "opo")
"""Those of `advantage_estimator` by which a group has advantages of 0 just where its totals are equal."""
SIGNED_ESTIMATORS = tuple(estimator for estimator in ADVANTAGE_SCALES if estimator != "passk")
"""Those of `advantage_estimator` that give advantages below 0."""
MOST_GENERATIONS = 16_384
"""Far more completions of one prompt than any paper has."""
LONGEST_TIMEOUT_S = 1e9
"""About what a system call takes at most."""


@dataclass
class GRPOArguments:
    r"""Arguments of `stage: grpo`."""

    # Rollout
    rollout_backend: Literal["vllm", "hf"] = field(
        default="vllm",
        metadata={
            "group": ROLLOUT,
            "help": (
                "The engine that samples completions: `vllm` runs vLLM in this process on the training device, "
                "`hf` uses transformers' generate, slower but everywhere."
            ),
        },
    )
    num_generations: int = field(
        default=8,
        metadata={
            "group": ROLLOUT,
            "min": 2,
            "most": MOST_GENERATIONS,
            "help": (
                "Completions sampled for each prompt (the group size G); one alone would have nothing to be compared "
                "with. A batch is counted in prompts: "
                "per_device_train_batch_size x gradient_accumulation_steps x devices prompts make one optimizer step, "
                "each sampled this many times."
            ),
        },
    )
    steps_per_generation: int = field(
        default=1,
        metadata={
            "group": ROLLOUT,
            "min": 1,
            "most": 10_000,
            "help": (
                "Optimizer steps fed by one rollout: the rollout samples this many steps' prompts at once. "
                "Past 1 the later steps are slightly off-policy."
            ),
        },
    )
    dynamic_sampling: bool = field(
        default=False,
        metadata={
            "group": ROLLOUT,
            "only_with": {"advantage_estimator": GROUP_ESTIMATORS},
            "help": (
                "DAPO's dynamic sampling: leave out groups whose total rewards are all equal, which teach nothing, "
                "and roll out further prompts until the batch is full. What is sampled too much waits for the next "
                "batch. An epoch then has fewer steps: it ends when its prompts are used up."
            ),
        },
    )
    max_resample_times: int = field(
        default=3,
        metadata={
            "group": ROLLOUT,
            "only_with": {"dynamic_sampling": (True,)},
            "min": 1,
            "most": 10_000,
            "help": (
                "How many further rollouts, each of as many prompts as the first, dynamic sampling may take for a "
                "batch. After them the step trains on the groups it has."
            ),
        },
    )
    overlong_prompts: Literal["drop", "truncate"] = field(
        default="drop",
        metadata={
            "group": ROLLOUT,
            "help": (
                "What happens to a prompt of more than `cutoff_len` tokens: `drop` leaves it out and counts it in the "
                "log, `truncate` keeps its last `cutoff_len` tokens."
            ),
        },
    )
    reference_column: str | None = field(
        default=None,
        metadata={
            "group": ROLLOUT,
            "help": (
                "The dataset column that holds the reference answer for the rewards, or a field of one by its path, "
                "such as `reward_model.ground_truth`. By default the last assistant turn is the reference."
            ),
        },
    )
    # Rewards
    reward_funcs: str | None = field(
        default=None,
        metadata={
            "group": REWARDS,
            "help": (
                "Reward functions, separated by commas or as a YAML list: a built-in name, `path/file.py:function`, "
                "or `package.module:function`; and `reward_model` for the model that LLaMA-Factory's `reward_model` "
                "gives, which is what this key is by default where there is one."
            ),
        },
    )
    reward_weights: str | None = field(
        default=None,
        metadata={
            "group": REWARDS,
            "help": "One weight for each reward function, separated by commas or as a YAML list. 1 each by default.",
        },
    )
    reward_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "group": REWARDS,
            "help": (
                "Settings of reward functions as a mapping (or a JSON string) from the function's name to its keyword "
                'arguments, e.g. {"length": {"max_length": 512}}.'
            ),
        },
    )
    reward_columns: dict | str | None = field(
        default=None,
        metadata={
            "group": REWARDS,
            "help": (
                "Fields of dataset columns for reward functions, as a mapping (or a JSON string) from an argument's "
                'name to the path of a field, e.g. {"ground_truth": "reward_model.ground_truth"}. A column itself '
                "needs no entry: an argument of its name gets it."
            ),
        },
    )
    # Objective
    advantage_estimator: Literal[
        "grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gdpo", "passk", "opo"
    ] = field(
        default="grpo",
        metadata={
            "group": OBJECTIVE,
            "help": (
                "What a completion's reward is compared with: `grpo` the mean of its group, divided as "
                "`scale_rewards` says, `dr_grpo` the same undivided, `rloo` the mean of the others of its group, "
                "`opo` the group's mean weighted by length, `passk` the best of the others (pass@k with k = "
                "num_generations), `reinforce_plus_plus` the mean of the batch, `reinforce_plus_plus_baseline` the "
                "group's mean, whitened over the batch, `gdpo` each reward function on its own."
            ),
        },
    )
    scale_rewards: Literal["auto", "group", "batch", "none"] = field(
        default="auto",
        metadata={
            "group": OBJECTIVE,
            "help": (
                "What advantages are divided by: the standard deviation of the `group`, of the whole `batch` of one "
                "generation over all devices, or `none`. `auto` is what the paper of `advantage_estimator` has: "
                "`group` for `grpo`."
            ),
        },
    )
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo", "gspo_token", "gmpo"] = field(
        default="dapo",
        metadata={
            "group": OBJECTIVE,
            "help": (
                "What a token's loss is, and how they are averaged. PPO's clip: `grpo` over each completion and then "
                "over completions, `dapo` over all tokens of the step, `dr_grpo` over completions x max_new_tokens; "
                "`bnpo` is `dapo` here, since denominators are counted over the whole optimizer step. `gspo` and "
                "`gspo_token` clip the ratio of the whole completion. `cispo` bounds the importance weight and clips "
                "nothing, `sapo` fades where others clip, `gmpo` takes the geometric mean over tokens."
            ),
        },
    )
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = field(
        default="token",
        metadata={
            "group": OBJECTIVE,
            "only_with": {"loss_type": ("grpo", "bnpo", "dr_grpo", "dapo")},
            "help": (
                "Whose ratio is clipped: each `token`'s, or the completion's (`sequence`, the geometric mean of its "
                "tokens'); `sequence_token` has the completion's value and each token's gradient. "
                "`loss_type: gspo` is `grpo` with `sequence`."
            ),
        },
    )
    epsilon: float = field(
        default=0.2,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"loss_type": (*CLIPPED_LOSSES, "gmpo")},
            "above": 0.0,
            "help": (
                "Lower clip range of the ratio: it is kept above 1 - epsilon (`gmpo`: above exp(-epsilon)). The ratio "
                "of a whole completion moves less: GSPO's paper has 3e-4, GMPO's 0.4."
            ),
        },
    )
    epsilon_high: float | None = field(
        default=None,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"loss_type": (*CLIPPED_LOSSES, "gmpo", "cispo")},
            "above": 0.0,
            "help": (
                "Upper clip range of the ratio: it is kept below 1 + epsilon_high (`gmpo`: below exp(epsilon_high)). "
                "`epsilon` by default; DAPO recommends 0.28, GSPO 4e-4. `cispo` needs it: TRL's 5.0 is 4.0 here."
            ),
        },
    )
    delta: float | None = field(
        default=None,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"loss_type": CLIPPED_LOSSES, "advantage_estimator": SIGNED_ESTIMATORS},
            "above": 1.0,
            "help": (
                "Upper bound of the ratio where the advantage is negative (dual clip), which the clip leaves without "
                "one. Above 1 + epsilon_high; verl has 3.0. No bound by default."
            ),
        },
    )
    sapo_temperature_pos: float = field(
        default=1.0,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"loss_type": ("sapo",)},
            "above": 0.0,
            "help": "How fast the gradient fades away from ratio 1 where the advantage is positive.",
        },
    )
    sapo_temperature_neg: float = field(
        default=1.05,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"loss_type": ("sapo",), "advantage_estimator": SIGNED_ESTIMATORS},
            "above": 0.0,
            "help": "How fast the gradient fades away from ratio 1 where the advantage is not positive.",
        },
    )
    beta: float = field(
        default=0.0,
        metadata={
            "group": OBJECTIVE,
            "min": 0.0,
            "most": 1000.0,
            "help": (
                "Weight of the KL divergence to the reference policy. 0 needs no reference policy; "
                "DeepSeekMath used 0.04."
            ),
        },
    )
    kl_estimator: Literal["k1", "k2", "k3"] = field(
        default="k3",
        metadata={
            "group": OBJECTIVE,
            "only_with": {"beta": Above(0)},
            "help": (
                "How the divergence is estimated from the sampled tokens: `k1` the log-ratio, `k2` half its square, "
                "`k3` GRPO's own. `k1` goes with `kl_in_reward` or `use_bias_correction_kl`, where it is unbiased."
            ),
        },
    )
    use_bias_correction_kl: bool = field(
        default=False,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"beta": Above(0), "kl_in_reward": (False,), "kl_estimator": ("k1", "k3")},
            "help": (
                "Multiply the KL estimate by the ratio, through which the gradient flows too (DeepSeek-V3.2): then "
                "the gradient is that of the divergence, and not of the reversed one."
            ),
        },
    )
    kl_in_reward: bool = field(
        default=False,
        metadata={
            "group": OBJECTIVE,
            "only_with": {
                "beta": Above(0),
                "kl_estimator": ("k1",),
                "dynamic_sampling": (False,),
                "mask_zero_std_groups": (False,),
            },
            "help": (
                "Take beta x the sum of k1 over a completion off its reward, before advantages are computed, in the "
                "place of a KL term in the loss (PPO, RLOO and REINFORCE++ have it so)."
            ),
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"beta": Above(0)},
            "above": 0.0,
            "help": (
                "The `kl` of the log, in nats a token, that `beta` is adapted to: it starts as written and changes by "
                "up to 2 percent a step. Fixed by default."
            ),
        },
    )
    sync_ref_model: bool = field(
        default=False,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"beta": Above(0)},
            "help": (
                "Move the reference towards the policy every `ref_model_sync_steps` steps. It takes a copy of the "
                "trainable weights."
            ),
        },
    )
    ref_model_mixup_alpha: float = field(
        default=0.6,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"sync_ref_model": (True,)},
            "above": 0.0,
            "max": 1.0,
            "help": "The policy's share in the new reference; the rest is the old one's.",
        },
    )
    ref_model_sync_steps: int = field(
        default=512,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"sync_ref_model": (True,)},
            "min": 1,
            "help": "Optimizer steps between two moves of the reference.",
        },
    )
    rollout_correction: Literal["none", "token", "sequence"] = field(
        default="none",
        metadata={
            "group": OBJECTIVE,
            "help": (
                "Weigh the policy's loss by how much more probable the trainer finds what the engine sampled: each "
                "`token`, or the whole `sequence` (the product over its tokens). Only where sampling is neutral."
            ),
        },
    )
    rollout_correction_mode: Literal["truncate", "mask"] = field(
        default="truncate",
        metadata={
            "group": OBJECTIVE,
            "only_with": {"rollout_correction": ("token", "sequence")},
            "help": "What becomes of a weight beyond the bounds: it is set to the bound, or to 0.",
        },
    )
    rollout_correction_max: float = field(
        default=2.0,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"rollout_correction": ("token", "sequence")},
            "min": 1.0,
            "help": "Upper bound of the weight.",
        },
    )
    rollout_correction_min: float = field(
        default=0.0,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"rollout_correction": ("token", "sequence")},
            "min": 0.0,
            "max": 1.0,
            "help": "Lower bound of the weight; 0 is none.",
        },
    )
    off_policy_mask_threshold: float | None = field(
        default=None,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"advantage_estimator": SIGNED_ESTIMATORS},
            "above": 0.0,
            "help": (
                "Leave a completion with a negative advantage out of the policy's loss where its tokens have become "
                "less probable than they were sampled by more than this mean, in nats (DeepSeek-V3.2). Only where "
                "sampling is neutral. Off by default."
            ),
        },
    )
    entropy_coef: float = field(
        default=0.0,
        metadata={
            "group": OBJECTIVE,
            "min": 0.0,
            "help": (
                "What the policy is paid in the loss for a nat of entropy a token, against a collapse of its "
                "entropy. It takes memory, since the gradient flows through the whole distribution. With "
                "`entropy_target` it is where the coefficient starts."
            ),
        },
    )
    entropy_target: float | None = field(
        default=None,
        metadata={
            "group": OBJECTIVE,
            "above": 0.0,
            "help": (
                "The `entropy` of the log, in nats a token, that the coefficient of the bonus is adapted to: it rises "
                "by `entropy_coef_delta` after a step at or under it and falls after one over it, and is paid only "
                "after the former (Skywork-OR1). Fixed by default."
            ),
        },
    )
    entropy_coef_delta: float = field(
        default=0.0005,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"entropy_target": Above(0)},
            "above": 0.0,
            "help": "How much the coefficient of the entropy bonus changes in a step.",
        },
    )
    entropy_coef_max: float = field(
        default=0.05,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"entropy_target": Above(0)},
            "above": 0.0,
            "help": "The highest coefficient of the entropy bonus.",
        },
    )
    top_entropy_quantile: float = field(
        default=1.0,
        metadata={
            "group": OBJECTIVE,
            "above": 0.0,
            "max": 1.0,
            "help": (
                "The share of tokens, those of the highest entropy in the whole step, that the policy learns from; "
                "0.2 in the paper. Below 1 a step takes one more forward pass."
            ),
        },
    )
    covariance_control: Literal["none", "clip_cov", "kl_cov"] = field(
        default="none",
        metadata={
            "group": OBJECTIVE,
            "help": (
                "What is done about the few tokens that lower the entropy most: of those with a high covariance of "
                "log-probability and advantage `clip_cov` leaves some out of the loss, and `kl_cov` holds the highest "
                "to where they were before the update. A step takes one more forward pass."
            ),
        },
    )
    covariance_frac: float = field(
        default=0.0002,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"covariance_control": ("clip_cov", "kl_cov")},
            "above": 0.0,
            "max": 1.0,
            "help": "The share of all tokens that it is done to; the paper has 2e-4, and 2e-3 for `kl_cov` on 7B.",
        },
    )
    clip_cov_min: float = field(
        default=1.0,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"covariance_control": ("clip_cov",)},
            "help": "The lowest covariance of a token that may be left out.",
        },
    )
    clip_cov_max: float = field(
        default=5.0,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"covariance_control": ("clip_cov",)},
            "help": "The highest covariance of a token that may be left out.",
        },
    )
    kl_cov_coef: float = field(
        default=1.0,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"covariance_control": ("kl_cov",)},
            "above": 0.0,
            "help": "Weight of the distance from the old log-probability in the loss of such a token.",
        },
    )
    num_iterations: int = field(
        default=1,
        metadata={
            "group": OBJECTIVE,
            "min": 1,
            "most": 1000,
            "help": "How many times each rollout is trained on (mu in the paper).",
        },
    )
    mask_truncated_completions: bool = field(
        default=False,
        metadata={
            "group": OBJECTIVE,
            "help": (
                "DAPO's overlong filtering: leave completions that reached `max_new_tokens` out of the loss and of "
                "its averages. They still count in the rewards and in the statistics of their group."
            ),
        },
    )
    mask_zero_std_groups: bool = field(
        default=False,
        metadata={
            "group": OBJECTIVE,
            "only_with": {"dynamic_sampling": (False,), "advantage_estimator": GROUP_ESTIMATORS},
            "help": (
                "Leave groups whose total rewards are all equal out of the loss, of its KL term and of its averages: "
                "their advantages are 0, and they would be pulled to the reference (`beta`) for nothing. With "
                "`dynamic_sampling` there are none."
            ),
        },
    )
    # Evaluation
    eval_num_generations: int | None = field(
        default=None,
        metadata={
            "group": EVALUATION,
            "only_with": {"eval_strategy": ("steps", "epoch")},
            "min": 1,
            "most": MOST_GENERATIONS,
            "help": (
                "Completions sampled for each prompt in an evaluation: the k of mean@k, pass@k and maj@k. "
                "`num_generations` by default."
            ),
        },
    )
    eval_temperature: float | None = field(
        default=None,
        metadata={
            "group": EVALUATION,
            "only_with": {"eval_strategy": ("steps", "epoch")},
            "min": 0.0,
            "most": 100.0,
            "help": (
                "Sampling temperature of evaluations; 0 takes the most probable token each time, and goes with "
                "`eval_num_generations: 1`. `temperature` by default."
            ),
        },
    )
    # Memory
    max_tokens_per_micro_batch: int = field(
        default=4096,
        metadata={
            "group": MEMORY,
            "min": 1,
            "help": (
                "How many tokens (prompts, completions and padding) go through the model at once in the update. "
                "It changes memory and speed, never the gradient. Where memory runs out in an update it is halved and "
                "the update done again."
            ),
        },
    )
    vllm_base: Literal["auto", "trainer"] = field(
        default="auto",
        metadata={
            "group": MEMORY,
            "only_with": {"rollout_backend": ("vllm",)},
            "help": (
                "Where vLLM gets the model that an adapter stands on: `auto` reads `model_name_or_path` where that is "
                "the model that is trained (on a GPU a 4-bit base stays in 4 bits), and otherwise has the trainer's "
                "written out once, dequantized; `trainer` always has it written out."
            ),
        },
    )
    vllm_sleep: int = field(
        default=0,
        metadata={
            "group": MEMORY,
            "only_with": {"rollout_backend": ("vllm",)},
            "min": 0,
            "max": 2,
            "help": (
                "What vLLM gives up on the GPU during the update: 0 nothing, 1 its KV cache and, into main memory, "
                "its weights, 2 both for good, since full and freeze tuning deliver all weights anew. "
                "A CPU has nothing to give up."
            ),
        },
    )
    # Limits
    sync_timeout: float = field(
        default=600.0,
        metadata={
            "group": LIMITS,
            "above": 0.0,
            "most": LONGEST_TIMEOUT_S,
            "help": "Seconds that the delivery of the weights to the engine may take before the run is ended.",
        },
    )
    rollout_timeout: float = field(
        default=3600.0,
        metadata={
            "group": LIMITS,
            "above": 0.0,
            "most": LONGEST_TIMEOUT_S,
            "help": "Seconds that sampling one rollout may take before the run is ended.",
        },
    )
    reward_timeout: float = field(
        default=600.0,
        metadata={
            "group": LIMITS,
            "above": 0.0,
            "most": LONGEST_TIMEOUT_S,
            "help": (
                "Seconds that a reward function may take for the completions of one rollout before the run is ended. "
                "`accuracy` has a limit for each completion too, `timeout` in its `reward_kwargs`."
            ),
        },
    )
    max_skipped_steps: int = field(
        default=5,
        metadata={
            "group": LIMITS,
            "min": 0,
            "help": (
                "How many steps in a row may be skipped for a loss or gradient that is not finite; one more ends the "
                "run. The batch of each is written to the output folder."
            ),
        },
    )
    resume_with_changes: bool = field(
        default=False,
        metadata={
            "group": LIMITS,
            "help": (
                "Resume although the dataset's rows or the files of reward functions have changed since the "
                "checkpoint. Without it such a resume is refused, and what has changed is named."
            ),
        },
    )
    # Monitoring
    max_sampling_logprob_diff: float | None = field(
        default=None,
        metadata={
            "group": MONITORING,
            "above": 0.0,
            "help": (
                "The run stops when the mean difference between the engine's and the trainer's log-probabilities of "
                "the sampled tokens passes this bound, since completions then come from another policy. By default "
                "chosen by the precision."
            ),
        },
    )
    log_completions: bool = field(
        default=False,
        metadata={
            "group": MONITORING,
            "help": (
                "Print a table of sampled completions with their rewards at every logging step, and write all "
                "completions to completions.jsonl in the output folder."
            ),
        },
    )
    num_completions_to_print: int = field(
        default=4,
        metadata={
            "group": MONITORING,
            "only_with": {"log_completions": (True,)},
            "min": 1,
            "help": "Rows of the table that `log_completions` prints.",
        },
    )

    def __post_init__(self) -> None:
        self.reward_funcs: list[str] = _split(self.reward_funcs)  # type: ignore[assignment]
        if self.reward_weights is not None:
            weights = [as_weight(item) for item in _split(self.reward_weights)]
            self.reward_weights: list[float] | None = weights  # type: ignore[assignment]
        if isinstance(self.reward_kwargs, str):
            self.reward_kwargs = _mapping("reward_kwargs", self.reward_kwargs, '{"length": {"max_length": 512}}')
        if isinstance(self.reward_columns, str):
            self.reward_columns = _mapping("reward_columns", self.reward_columns, REWARD_COLUMNS_EXAMPLE)

        if self.scale_rewards == "auto":
            self.scale_rewards = ADVANTAGE_SCALES.get(self.advantage_estimator, ("group",))[0]  # type: ignore[assignment]

    def validate(self, given: Collection[str] = ()) -> None:
        """Refuse values that are out of bounds, and those that contradict one another.

        Args:
            given: the keys that the user wrote; one of another value than its default is taken for written, too.

        Raises:
            ValueError: naming the key, its value, the rule and the remedy.
        """
        for spec in dataclasses.fields(GRPOArguments):
            value = getattr(self, spec.name)
            _check_bounds(spec, value)
            asks_for_nothing = value is None or value is False or value == "none"
            if value != spec.default or (spec.name in given and not asks_for_nothing):
                _check_effect(spec, vars(self))

        read: Any = self  # `__post_init__` has made lists and mappings of texts
        check_rewards(read.reward_funcs, read.reward_weights, read.reward_kwargs or {}, read.reward_columns or {})
        _check_scale(self.advantage_estimator, self.scale_rewards)
        _check_clip_range(self.loss_type, self.epsilon, self.epsilon_high, self.delta)
        _check_kl(self)
        _check_exploration(self)
        _check_tokenwise(self)


def grpo_field_names() -> frozenset[str]:
    """The YAML keys that only this stage knows."""
    return frozenset(f.name for f in dataclasses.fields(GRPOArguments))


def _check_effect(spec: "dataclasses.Field[Any]", values: Mapping[str, Any]) -> None:
    value = values[spec.name]
    conditions = spec.metadata.get("only_with", {})
    if applies(conditions, values):
        return
    broken = {key: allowed for key, allowed in conditions.items() if key in values and values[key] not in allowed}
    there = ", ".join(f"`{key}: {shown(values[key])}`" for key in broken)
    remedy = " and ".join(f"`{key}: {shown_condition(allowed)}`" for key, allowed in broken.items())
    raise ValueError(
        f"`{spec.name}: {shown(value)}` would have no effect with {there}. Write {remedy}, or leave it out. "
        f"{spec.metadata['help']}"
    )


def broken_bound(value: Any, bounds: Mapping[str, Any]) -> str | None:
    """What a number would have to be, in words: the first bound that it breaks, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        return "a finite number"
    for bound, words, is_broken in (
        ("above", "above", operator.le),
        ("min", "at least", operator.lt),
        ("max", "at most", operator.gt),
        ("most", "at most", operator.gt),
        ("below", "below", operator.ge),
    ):
        if (limit := bounds.get(bound)) is not None and is_broken(value, limit):
            return f"{words} {limit if isinstance(limit, int) else format(limit, 'g')}"
    return None


def _check_bounds(spec: "dataclasses.Field[Any]", value: Any) -> None:
    if (rule := broken_bound(value, spec.metadata)) is None:
        return
    default = f"write `{spec.name}: {spec.default}`, the default" if spec.default is not None else "leave it out"
    raise ValueError(
        f"`{spec.name}: {value}` must be {rule}. {spec.metadata['help']} Give it such a value, or {default}."
    )


_WHY_NOT_DIVIDED = MappingProxyType(
    {
        "dr_grpo": "it is `grpo` without the division",
        "rloo": "divided by the group's deviation it is `grpo` times G / (G - 1)",
        "reinforce_plus_plus": "it has no groups, and is whitened over the batch",
        "reinforce_plus_plus_baseline": "it is whitened over the batch",
        "gdpo": "each function is divided by the group's deviation, and their sum by the batch's",
        "opo": "its baseline is the best for rewards as they are",
    }
)


def _check_scale(estimator: str, scale: str) -> None:
    if scale not in ADVANTAGE_SCALES[estimator]:
        raise ValueError(
            f"`scale_rewards: {scale}` cannot go with `advantage_estimator: {estimator}`: "
            f"{_WHY_NOT_DIVIDED[estimator]}. Write `scale_rewards: {' or '.join(ADVANTAGE_SCALES[estimator])}`, leave "
            "it out, or write `advantage_estimator: grpo`."
        )


def _check_clip_range(loss_type: str, epsilon: float, epsilon_high: float | None, delta: float | None) -> None:
    if loss_type == "cispo":
        if epsilon_high is None:
            raise ValueError(
                "`loss_type: cispo` needs `epsilon_high`: the importance weight is bounded by 1 + epsilon_high and by "
                "nothing else. Write for example `epsilon_high: 4.0`, which is TRL's 5.0."
            )
        return
    if epsilon >= 1.0 and loss_type != "gmpo":  # which clips the log
        raise ValueError(
            f"`epsilon: {epsilon}` must be below 1: a ratio is never negative, so that a lower clip at 1 - epsilon "
            "<= 0 would never act. Write for example `epsilon: 0.2`; the upper range is `epsilon_high`."
        )
    if epsilon_high is not None and epsilon_high < epsilon:
        raise ValueError(
            f"`epsilon_high: {epsilon_high}` is below `epsilon: {epsilon}`: the upper clip range is meant to be the "
            "wider one (DAPO: 0.2 and 0.28). Raise `epsilon_high`, or leave it out to use `epsilon` for both."
        )
    upper = 1 + (epsilon if epsilon_high is None else epsilon_high)
    if delta is not None and delta <= upper:
        raise ValueError(
            f"`delta: {delta}` must be above 1 + epsilon_high = {upper:g}: below it, a bad completion would lose its "
            "gradient before a good one does. Write for example `delta: 3.0`, or leave it out."
        )


def _check_kl(args: GRPOArguments) -> None:
    if args.beta > 0 and args.kl_estimator == "k1" and not (args.kl_in_reward or args.use_bias_correction_kl):
        raise ValueError(
            "`kl_estimator: k1` does nothing in the loss: the mean of its gradient is 0, whatever the divergence. "
            "Write `use_bias_correction_kl: true` or `kl_in_reward: true`, or `kl_estimator: k2` or `k3`."
        )
    if args.kl_in_reward and args.advantage_estimator == "gdpo":
        raise ValueError(
            "`kl_in_reward: true` cannot go with `advantage_estimator: gdpo`, which normalizes each reward function "
            "on its own and has no place for a term that is none. Leave `kl_in_reward` out to have the KL in the loss."
        )
    if args.kl_in_reward and args.advantage_estimator == "passk":
        raise ValueError(
            "`kl_in_reward: true` cannot go with `advantage_estimator: passk`: the best completion of a group alone "
            "would feel the KL. Leave `kl_in_reward` out to have the KL in the loss."
        )
    if args.kl_in_reward and args.scale_rewards == "group":
        raise ValueError(
            "`kl_in_reward: true` cannot go with `scale_rewards: group` (the default of `advantage_estimator: "
            f"{args.advantage_estimator}`): where the rewards of a group are equal, what is left of them is the KL's "
            "noise, and dividing by its deviation makes advantages of 1 out of it, whatever `beta` is. Write "
            "`scale_rewards: none` or `batch`, or leave `kl_in_reward` out to have the KL in the loss."
        )


def _check_exploration(args: GRPOArguments) -> None:
    if args.entropy_target is not None and args.entropy_coef > args.entropy_coef_max:
        raise ValueError(
            f"`entropy_coef: {args.entropy_coef}` is above `entropy_coef_max: {args.entropy_coef_max}`, which it may "
            "not pass where `entropy_target` adapts it. Lower the one or raise the other."
        )
    if args.clip_cov_min >= args.clip_cov_max:
        raise ValueError(
            f"`clip_cov_min: {args.clip_cov_min}` must be below `clip_cov_max: {args.clip_cov_max}`: no covariance is "
            "between them. The paper has 1 and 5."
        )
    if args.covariance_control == "kl_cov" and args.num_iterations == args.steps_per_generation == 1:
        raise ValueError(
            "`covariance_control: kl_cov` has no effect where each rollout makes one step: no token has left the "
            "log-probability that it is held to. Write for example `steps_per_generation: 4` or `num_iterations: 2`, "
            "or `covariance_control: clip_cov`."
        )


def _check_tokenwise(args: GRPOArguments) -> None:
    """Refuse what weighs tokens one by one where each token's loss is that of the whole completion."""
    if args.loss_type in ("gspo", "gmpo"):
        there = f"`loss_type: {args.loss_type}`"
    elif args.importance_sampling_level == "sequence":
        there = "`importance_sampling_level: sequence`"
    else:
        return
    remedy = {
        "`loss_type: gspo`": "`loss_type: gspo_token`",
        "`loss_type: gmpo`": "another `loss_type`",
        "`importance_sampling_level: sequence`": "`importance_sampling_level: sequence_token`",
    }[there]
    for key, is_tokenwise, other in (
        ("rollout_correction", args.rollout_correction == "token", "write `rollout_correction: sequence`"),
        ("top_entropy_quantile", args.top_entropy_quantile < 1, "leave `top_entropy_quantile` out"),
        ("covariance_control", args.covariance_control == "clip_cov", "leave `covariance_control` out"),
    ):
        if is_tokenwise:
            raise ValueError(
                f"`{key}: {getattr(args, key)}` weighs tokens one by one, and with {there} the loss of each token is "
                "that of its whole completion: a token that is left out would be learned with the rest. Write "
                f"{remedy}, or {other}."
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
