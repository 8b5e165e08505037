"""Which keys have an effect beside the others, derived from what the chosen parts read, and what contradicts what.

docs/combinations.md shows the result as tables, cell by cell tested.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

from grpo_stage.algorithm.catalog import ENGINE_KEYS, ESTIMATORS, LOSS_TYPES, TERMS, Part, learns_one_behind
from grpo_stage.algorithm.conditions import (
    Allowed,
    Given,
    Naming,
    Rule,
    applies,
    refuse_broken,
    shown,
    shown_condition,
)


# Parts of a run beside the objective.
_OTHERS = (
    Part("dynamic_sampling", (False,), reads=("kl_in_reward", "mask_zero_std_groups")),
    Part("dynamic_sampling", (True,), reads=("max_resample_times", "filter_metric", "filter_min_range")),
    Part("mask_zero_std_groups", (False,), reads=("kl_in_reward",)),
    Part("on_alarm", Naming("recover"), reads=("max_recoveries",)),
    Part("reward_funcs", Naming("code"), reads=("code_sandbox",)),
    Part("code_sandbox", ("none",), reads=("run_code_without_sandbox",)),
    Part("log_completions", (True,), reads=("num_completions_to_print",)),
    Part("eval_strategy", ("steps",), reads=("eval_steps",)),
    Part("eval_strategy", ("steps", "epoch"), reads=("eval_num_generations", "eval_temperature")),
    Part("save_strategy", ("steps",), reads=("save_steps",)),
    Part("logging_strategy", ("steps",), reads=("logging_steps",)),
    Part("max_steps", (-1,), reads=("num_train_epochs",)),
    Part("ref_model", Given(), reads=("ref_model_adapters", "ref_model_quantization_bit")),
    Part(
        "reward_model",
        Given(),
        reads=("reward_model_type", "reward_model_adapters", "reward_model_quantization_bit"),
    ),
    Part("reward_model_type", ("full",), reads=("reward_model_adapters", "reward_model_quantization_bit")),
)


def _parts() -> Iterator[Part]:
    yield from (Part("loss_type", (name,), loss.reads) for name, loss in LOSS_TYPES.items())
    yield from TERMS
    yield from (Part("rollout_backend", (name,), keys) for name, keys in ENGINE_KEYS.items())
    yield from _OTHERS
    yield from (Part("advantage_estimator", (name,), each.reads) for name, each in ESTIMATORS.items())


def _only_with() -> Mapping[str, Mapping[str, Allowed]]:
    conditions: dict[str, dict[str, Allowed]] = {}
    for part in _parts():
        for key in part.reads:
            earlier = conditions.setdefault(key, {}).get(part.key, ())
            if isinstance(earlier, tuple) and isinstance(part.values, tuple):
                conditions[key][part.key] = (*earlier, *part.values)
            else:
                assert earlier == (), f"{key} is read under two conditions on {part.key}"
                conditions[key][part.key] = part.values
    return MappingProxyType(conditions)


ONLY_WITH = _only_with()
"""To each key that not every run reads, the other keys and their values under which it has an effect. Elsewhere it is
refused, and hidden in LLaMA Board."""


def check_effect(key: str, values: Mapping[str, Any], explanation: str) -> None:
    """Refuse a key that no chosen part reads.

    Raises:
        ValueError: naming the key, its value, what stands in its way and the remedy.
    """
    conditions = ONLY_WITH.get(key, {})
    if applies(conditions, values):
        return
    broken = {
        other: allowed for other, allowed in conditions.items() if other in values and values[other] not in allowed
    }
    there = ", ".join(f"`{other}: {shown(values[other])}`" for other in broken)
    remedy = " and ".join(f"`{other}: {shown_condition(allowed)}`" for other, allowed in broken.items())
    raise ValueError(
        f"`{key}: {shown(values[key])}` would have no effect with {there}. Write {remedy}, or leave it out. "
        f"{explanation}"
    )


def _scale_rules() -> Iterator[Rule]:
    for name, estimator in ESTIMATORS.items():
        yield Rule(
            lambda v, name=name, scales=estimator.scales: (  # type: ignore[misc]
                v.advantage_estimator == name and v.scale_rewards not in scales
            ),
            f"`scale_rewards: {{scale_rewards}}` cannot go with `advantage_estimator: {name}`: "
            f"{estimator.why_no_other_scale}. Write `scale_rewards: {' or '.join(estimator.scales)}`, leave it out, "
            "or write `advantage_estimator: grpo`.",
        )


def _loss_rules() -> Iterator[Rule]:
    for name, loss in LOSS_TYPES.items():
        for rule in loss.rules:
            yield Rule(
                lambda v, name=name, broken=rule.broken: v.loss_type == name and broken(v),  # type: ignore[misc]
                rule.message,
            )


def _tokenwise_rules() -> Iterator[Rule]:
    """What weighs tokens one by one has no place where each token's loss is that of the whole completion."""
    whole = [("loss_type", name, loss.tokenwise_remedy) for name, loss in LOSS_TYPES.items() if loss.tokenwise_remedy]
    whole.append(("importance_sampling_level", "sequence", "`importance_sampling_level: sequence_token`"))
    for key, value, remedy in whole:
        for term in TERMS:
            if term.tokenwise_remedy is None:
                continue
            yield Rule(
                lambda v, key=key, value=value, term=term: (  # type: ignore[misc]
                    getattr(v, key) == value and getattr(v, term.key) in term.values
                ),
                f"`{term.key}: {{{term.key}}}` weighs tokens one by one, and with `{key}: {value}` the loss of each "
                "token is that of its whole completion: a token that is left out would be learned with the rest. "
                f"Write {remedy}, or {term.tokenwise_remedy}.",
            )


def _kl_in_reward_rules() -> Iterator[Rule]:
    for name, estimator in ESTIMATORS.items():
        if estimator.why_no_kl_in_reward:
            yield Rule(
                lambda v, name=name: v.kl_in_reward and v.advantage_estimator == name,  # type: ignore[misc]
                f"`kl_in_reward: true` cannot go with `advantage_estimator: {name}`: {estimator.why_no_kl_in_reward}. "
                "Leave `kl_in_reward` out to have the KL in the loss.",
            )


def _zero_advantage_rules() -> Iterator[Rule]:
    """Where something acts on completions without an advantage, they go through the update anyway."""
    for text, acts in (
        ("beta: {beta}", lambda v: v.beta > 0 and (not v.kl_in_reward or v.kl_target is not None)),
        ("entropy_coef: {entropy_coef}", lambda v: v.entropy_coef > 0),
        ("entropy_target: {entropy_target}", lambda v: v.entropy_target is not None),
        ("covariance_control: kl_cov", lambda v: v.covariance_control == "kl_cov"),
        ("loss_type: {loss_type}", lambda v: not LOSS_TYPES[v.loss_type].vanishes_without_advantage),
    ):
        yield Rule(
            lambda v, acts=acts: v.disable_zero_advantage_skipping and acts(v),  # type: ignore[misc]
            f"`disable_zero_advantage_skipping: true` would have no effect with `{text}`, which acts on completions "
            "without an advantage as well: none of them is skipped. Leave it out.",
        )


def _ahead_rules() -> Iterator[Rule]:
    """What one rollout ahead cannot go with."""
    for key, is_set, reason, remedy in (
        (
            "dynamic_sampling",
            lambda v: v.dynamic_sampling,
            "it samples until a batch is full, and the rewards that say so are not there while the rollout is under "
            "way",
            "`mask_zero_std_groups: true`, which drops the same groups and fills nothing up",
        ),
        (
            "steps_per_generation",
            lambda v: v.steps_per_generation > 1,
            "the later steps of a rollout would be further behind than the one update that is corrected",
            "`steps_per_generation: 1`",
        ),
        (
            "num_iterations",
            lambda v: v.num_iterations > 1,
            "the later uses of a rollout would be further behind than the one update that is corrected",
            "`num_iterations: 1`",
        ),
        (
            "vllm_sleep",
            lambda v: v.vllm_sleep > 0,
            "vLLM samples while the update runs, and has to stay awake",
            "`vllm_sleep: 0`",
        ),
        (
            "vllm_tensor_parallel",
            lambda v: v.vllm_tensor_parallel > 1,
            "vLLM samples ahead in a process of its own for each process that trains, and these are not one engine",
            "`rollout_backend: vllm_server` with servers of several devices",
        ),
        (
            "advantage_estimator",
            lambda v: (estimator := ESTIMATORS.get(v.advantage_estimator)) is not None and estimator.needs_greedy,
            "the most probable completion that it compares with would be that of another policy",
            "another estimator, such as `rloo`",
        ),
        (
            "rollout_rejection",
            lambda v: v.rollout_rejection != "none" and v.rollout_correction == "none",
            "it compares the trainer's log-probability of the policy that sampled with the engine's, and the trainer "
            "has that policy no longer",
            "`rollout_correction: token` or `sequence` beside it, which both then measure from the present policy",
        ),
    ):
        yield Rule(
            lambda v, is_set=is_set: v.rollout_ahead > 0 and is_set(v),  # type: ignore[misc]
            f"`{key}: {{{key}}}` cannot go with `rollout_ahead: {{rollout_ahead}}`: {reason}. Write {remedy}, or "
            "leave `rollout_ahead` out.",
        )


def _uses_tools(v: SimpleNamespace) -> bool:
    return bool(v.tools) or v.environment is not None


WITH_TOOLS: Mapping[str, Any] = MappingProxyType({"max_turns": 8, "completion_limit": "total", "tool_timeout": 30.0})
"""Keys that only a run with `tools` or an `environment` reads, and their defaults."""


def _tool_rules() -> Iterator[Rule]:
    """What tools need, and cannot go with."""
    for key, default in WITH_TOOLS.items():
        yield Rule(
            lambda v, key=key, default=default: getattr(v, key) != default and not _uses_tools(v),  # type: ignore[misc]
            f"`{key}: {{{key}}}` would have no effect without `tools` and `environment`: a completion then has one "
            "turn. Leave it out, or name what the model may call.",
        )
    for key, is_set, reason, remedy in (
        (
            "rollout_ahead",
            lambda v: v.rollout_ahead > 0,
            "a rollout that is sampled while the update runs cannot stop for the calls of its completions",
            "Leave it out",
        ),
        (
            "vllm_tensor_parallel",
            lambda v: v.vllm_tensor_parallel > 1,
            "processes that share an engine ask it together, and each would have its own number of turns",
            "Leave it out, or write `rollout_backend: vllm_server` with servers of several devices",
        ),
        (
            "structured_outputs",
            lambda v: bool(v.structured_outputs),
            "every turn would have to match it, those that call a tool as well",
            "Leave it out, and score the form of the answer with the reward `regex`",
        ),
    ):
        yield Rule(
            lambda v, is_set=is_set: _uses_tools(v) and is_set(v),  # type: ignore[misc]
            f"`{key}: {{{key}}}` cannot go with `tools` and `environment`: {reason}. {remedy}, or leave these out.",
        )
    yield Rule(
        lambda v: v.environment is None and "environment" in _names(v.reward_funcs),
        "`reward_funcs: {reward_funcs}` asks for the reward of an environment, and none is given. Write `environment: "
        "path/file.py:Class`, or leave `environment` out of `reward_funcs`.",
    )


def _curriculum_rules() -> Iterator[Rule]:
    yield Rule(
        lambda v: v.curriculum_threshold > 0 and "reasoning_gym" not in _names(v.reward_funcs),
        "`curriculum_threshold: {curriculum_threshold}` decides by the reward `reasoning_gym`, which `reward_funcs: "
        "{reward_funcs}` does not name. Add it there, or leave `curriculum_threshold` out.",
    )
    yield Rule(
        lambda v: (
            v.curriculum_threshold > 0
            and (v.on_alarm.get("gradient_spikes") if isinstance(v.on_alarm, Mapping) else v.on_alarm) == "recover"
        ),
        "`on_alarm: {on_alarm}` makes the run go back after `gradient_spikes` and leave out the prompts since then, "
        "and with `curriculum_threshold: {curriculum_threshold}` their order may have changed in between, so that "
        "others would be left out. Write a mapping of the other monitors alone, such as "
        '{{"entropy_collapse": "recover"}}, or leave `curriculum_threshold` out.',
    )


def _names(value: Any) -> list[str]:
    return [name.strip() for name in (value.split(",") if isinstance(value, str) else value or ())]


def _token_advantage_rules() -> Iterator[Rule]:
    """An advantage for each token has no place where a completion has one loss, or one weight."""
    whole = [
        ("loss_type", name) for name, loss in LOSS_TYPES.items() if loss.tokenwise_remedy or loss.is_of_completions
    ]
    whole.append(("importance_sampling_level", "sequence"))
    for name, estimator in ESTIMATORS.items():
        if not estimator.is_of_tokens:
            continue
        for key, value in whole:
            yield Rule(
                lambda v, name=name, key=key, value=value: (  # type: ignore[misc]
                    v.advantage_estimator == name and getattr(v, key) == value
                ),
                f"`advantage_estimator: {name}` gives each token its own advantage, and with `{key}: {value}` a "
                "completion has one. Write `loss_type: dapo`, or another estimator.",
            )
        yield Rule(
            lambda v, name=name: v.advantage_estimator == name and v.rollout_correction != "none",  # type: ignore[misc]
            f"`rollout_correction: {{rollout_correction}}` cannot go with `advantage_estimator: {name}`, whose "
            "baseline is the best without those weights. Leave it out, or write another estimator.",
        )


RULES = (
    *_scale_rules(),
    *_token_advantage_rules(),
    *_loss_rules(),
    Rule(
        lambda v: v.beta > 0 and v.kl_estimator == "k1" and not (v.kl_in_reward or v.use_bias_correction_kl),
        "`kl_estimator: k1` does nothing in the loss: the mean of its gradient is 0, whatever the divergence. Write "
        "`use_bias_correction_kl: true` or `kl_in_reward: true`, or `kl_estimator: k2` or `k3`.",
    ),
    *_kl_in_reward_rules(),
    Rule(
        lambda v: v.kl_in_reward and v.scale_rewards == "group",
        "`kl_in_reward: true` cannot go with `scale_rewards: group` (the default of `advantage_estimator: "
        "{advantage_estimator}`): where the rewards of a group are equal, what is left of them is the KL's noise, and "
        "dividing by its deviation makes advantages of 1 out of it, whatever `beta` is. Write `scale_rewards: none` "
        "or `batch`, or leave `kl_in_reward` out to have the KL in the loss.",
    ),
    Rule(
        lambda v: v.entropy_target is not None and v.entropy_coef > v.entropy_coef_max,
        "`entropy_coef: {entropy_coef}` is above `entropy_coef_max: {entropy_coef_max}`, which it may not pass where "
        "`entropy_target` adapts it. Lower the one or raise the other.",
    ),
    Rule(
        lambda v: v.code_sandbox == "none" and not v.run_code_without_sandbox,
        "`code_sandbox: none` runs what the model writes with all your rights. If that is meant, write "
        "`run_code_without_sandbox: true` beside it; else leave `code_sandbox` out.",
    ),
    Rule(
        lambda v: v.clip_cov_min >= v.clip_cov_max,
        "`clip_cov_min: {clip_cov_min}` must be below `clip_cov_max: {clip_cov_max}`: no covariance is between them. "
        "The paper has 1 and 5.",
    ),
    Rule(
        lambda v: (
            v.covariance_control == "kl_cov"
            and v.num_iterations == v.steps_per_generation == 1
            and not learns_one_behind(v)
        ),
        "`covariance_control: kl_cov` has no effect where each rollout makes one step: no token has left the "
        "log-probability that it is held to. Write for example `steps_per_generation: 4` or `num_iterations: 2`, or "
        "`covariance_control: clip_cov`.",
    ),
    *_ahead_rules(),
    *_tool_rules(),
    *_curriculum_rules(),
    *_tokenwise_rules(),
    *_zero_advantage_rules(),
)


def refuse_contradictions(values: Mapping[str, Any]) -> None:
    """Refuse keys of the stage that cannot be right together.

    Args:
        values: every key of the stage, aliases as they were written.

    Raises:
        ValueError: naming a key, its value, the rule and the remedy.
    """
    refuse_broken(RULES, SimpleNamespace(**values))
