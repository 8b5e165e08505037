"""Every YAML key of the stage: type, bounds, default, help text.

The names follow the host where it has the option, TRL where it does not, so that a recipe moves over with its numbers.
`metadata["group"]` is the heading in docs/configuration.md and in LLaMA Board; `metadata["min"]` and `["max"]` are
inclusive bounds, `["above"]` an exclusive lower one. Choices are the field's Literal. `metadata["only_with"]` maps
other keys to the values under which this one has an effect: elsewhere it is refused, and hidden in LLaMA Board.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


ROLLOUT, REWARDS, OBJECTIVE, EVALUATION = "Rollout", "Rewards", "Objective", "Evaluation"
MEMORY, LIMITS, MONITORING = "Memory", "Limits", "Monitoring"
BUILTIN_REWARDS = ("accuracy", "exact_match", "format", "tag_count", "length", "overlong", "repetition", "regex")


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
                "The dataset column that holds the reference answer for the rewards. "
                "By default the last assistant turn is the reference."
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
    # Objective
    beta: float = field(
        default=0.0,
        metadata={
            "group": OBJECTIVE,
            "min": 0.0,
            "help": (
                "Weight of the KL divergence to the reference policy in the loss. 0 needs no reference policy; "
                "DeepSeekMath used 0.04."
            ),
        },
    )
    epsilon: float = field(
        default=0.2,
        metadata={
            "group": OBJECTIVE,
            "above": 0.0,
            "help": "Lower clip range of the ratio: it is kept above 1 - epsilon.",
        },
    )
    epsilon_high: float | None = field(
        default=None,
        metadata={
            "group": OBJECTIVE,
            "above": 0.0,
            "help": (
                "Upper clip range of the ratio: it is kept below 1 + epsilon_high. `epsilon` by default; "
                "DAPO recommends 0.28."
            ),
        },
    )
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = field(
        default="dapo",
        metadata={
            "group": OBJECTIVE,
            "help": (
                "How token losses are averaged: `grpo` over each completion and then over completions, `dapo` over "
                "all tokens of the step, `dr_grpo` over completions x max_new_tokens. `bnpo` is `dapo` here, since "
                "denominators are counted over the whole optimizer step."
            ),
        },
    )
    scale_rewards: Literal["group", "batch", "none"] = field(
        default="group",
        metadata={
            "group": OBJECTIVE,
            "help": (
                "What advantages are divided by: the standard deviation of the `group`, of the whole `batch` of one "
                "generation, or `none`."
            ),
        },
    )
    num_iterations: int = field(
        default=1,
        metadata={
            "group": OBJECTIVE,
            "min": 1,
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
            "only_with": {"dynamic_sampling": (False,)},
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
            "help": "Seconds that the delivery of the weights to the engine may take before the run is ended.",
        },
    )
    rollout_timeout: float = field(
        default=3600.0,
        metadata={
            "group": LIMITS,
            "above": 0.0,
            "help": "Seconds that sampling one rollout may take before the run is ended.",
        },
    )
    reward_timeout: float = field(
        default=600.0,
        metadata={
            "group": LIMITS,
            "above": 0.0,
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
            weights = [_weight(item) for item in _split(self.reward_weights)]
            self.reward_weights: list[float] | None = weights  # type: ignore[assignment]
        if isinstance(self.reward_kwargs, str):
            self.reward_kwargs = _mapping(self.reward_kwargs)

    def validate(self) -> None:
        """Refuse values that are out of bounds, and those that contradict one another.

        Raises:
            ValueError: naming the key, its value, the rule and the remedy.
        """
        for spec in dataclasses.fields(GRPOArguments):
            _check_bounds(spec, getattr(self, spec.name))
            _check_effect(spec, vars(self))

        _check_rewards(list(self.reward_funcs or ()), self.reward_weights, self.reward_kwargs or {})
        _check_clip_range(self.epsilon, self.epsilon_high)


def grpo_field_names() -> frozenset[str]:
    """The YAML keys that only this stage knows."""
    return frozenset(f.name for f in dataclasses.fields(GRPOArguments))


def applies(spec: "dataclasses.Field[Any]", values: Mapping[str, Any]) -> bool:
    """Whether a key has an effect beside these values of other keys; one that `values` lacks stands in no way."""
    conditions = spec.metadata.get("only_with", {})
    return all(values[key] in allowed for key, allowed in conditions.items() if key in values)


def _check_effect(spec: "dataclasses.Field[Any]", values: Mapping[str, Any]) -> None:
    value = values[spec.name]
    if value == spec.default or applies(spec, values):
        return
    conditions = spec.metadata["only_with"].items()
    broken = {key: allowed for key, allowed in conditions if key in values and values[key] not in allowed}
    there = ", ".join(f"`{key}: {_shown(values[key])}`" for key in broken)
    remedy = " and ".join(f"`{key}: {' or '.join(map(_shown, allowed))}`" for key, allowed in broken.items())
    raise ValueError(
        f"`{spec.name}: {_shown(value)}` would have no effect with {there}. Write {remedy}, or leave it out. "
        f"{spec.metadata['help']}"
    )


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_bounds(spec: "dataclasses.Field[Any]", value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, high, above = (spec.metadata.get(bound) for bound in ("min", "max", "above"))
    if not math.isfinite(value):
        broken = "a finite number"
    elif low is not None and value < low:
        broken = f"at least {low}"
    elif high is not None and value > high:
        broken = f"at most {high}"
    elif above is not None and value <= above:
        broken = f"above {above:g}"
    else:
        return
    raise ValueError(f"`{spec.name}: {value}` must be {broken} (default: {spec.default}). {spec.metadata['help']}")


def _check_rewards(names: list[str], weights: Any, kwargs: Any) -> None:
    """`weights` is None or a list, `kwargs` a mapping."""
    listed = ", ".join(names)
    if not names:
        raise ValueError(
            "`reward_funcs` is missing: without a reward there is nothing to learn from. Name one or more of "
            f"{', '.join(BUILTIN_REWARDS)}, or a function of yours as `path/file.py:function`; or give a "
            "`reward_model`."
        )
    if len(set(names)) < len(names):
        raise ValueError(
            f"`reward_funcs: {listed}` names a function twice. Name each once, and give it more weight in "
            "`reward_weights`."
        )
    for name, settings in kwargs.items():
        if not isinstance(settings, dict):
            raise ValueError(
                f"`reward_kwargs` maps a function's name to its keyword arguments, but {name!r} has {settings!r}. "
                'Write for example {"length": {"max_length": 512}}.'
            )
    if weights is None:
        return
    shown = ", ".join(map(str, weights))
    if len(weights) != len(names):
        raise ValueError(
            f"`reward_weights: {shown}` has {len(weights)} values for the {len(names)} functions of "
            f"`reward_funcs: {listed}`. Give one weight for each, in the same order."
        )
    if not all(map(math.isfinite, weights)):
        raise ValueError(
            f"`reward_weights: {shown}` must be finite, since rewards are multiplied by them. Write for example 0.5."
        )
    if not any(weights):
        raise ValueError(
            f"`reward_weights: {shown}`: every reward would be 0, and nothing would be learned. Give at least one "
            "function a weight other than 0."
        )


def _check_clip_range(epsilon: float, epsilon_high: float | None) -> None:
    if epsilon >= 1.0:
        raise ValueError(
            f"`epsilon: {epsilon}` must be below 1: a ratio is never negative, so that a lower clip at 1 - epsilon "
            "<= 0 would never act. Write for example `epsilon: 0.2`; the upper range is `epsilon_high`."
        )
    if epsilon_high is not None and epsilon_high < epsilon:
        raise ValueError(
            f"`epsilon_high: {epsilon_high}` is below `epsilon: {epsilon}`: the upper clip range is meant to be the "
            "wider one (DAPO: 0.2 and 0.28). Raise `epsilon_high`, or leave it out to use `epsilon` for both."
        )


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`reward_kwargs: {text}` is not valid JSON: {error}. Write a YAML mapping or mend it."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f'`reward_kwargs: {text}` is not a mapping. Write for example {{"length": {{"max_length": 512}}}}.'
        )
    return value


def _weight(item: Any) -> float:
    try:
        return float(item)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`reward_weights` holds {item!r}, which is not a number. Write one number for each reward function, "
            "separated by commas or as a YAML list."
        ) from error


def _split(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]
