"""What each loss, advantage estimator, loss term and engine is and needs. Imports no torch: the code is elsewhere.

A fact about one of them stands here and nowhere else: `combinations` derives from it which keys have an effect and
which contradict one another. Some losses and estimators have a second name (an alias), which the arguments replace
when they are made (`canonical`): `losses.LOSSES` and `advantages.ADVANTAGE_ESTIMATORS` know the first names alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from grpo_stage.algorithm.conditions import Above, Allowed, Below, Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class LossType:
    """A value of `loss_type`."""

    reads: tuple[str, ...]
    """The keys that it looks at: elsewhere they have no effect."""
    rules: tuple[Rule, ...] = ()
    """What the values of these keys may not be."""
    tokenwise_remedy: str | None = None
    """Given where the loss of each token is that of its whole completion, so that no token can be weighed by itself:
    what to write to be able to."""
    alias_of: str | None = None
    """The loss that this is another name of."""
    sets: Mapping[str, str] = field(default_factory=dict)
    """The values that an alias gives to keys of that loss."""
    is_of_completions: bool = False
    """A completion has one advantage there, although its tokens may be weighed by themselves."""
    vanishes_without_advantage: bool = True
    """The loss of a completion with an advantage of 0 is 0, whatever its ratio."""
    compares_with_engine: bool = False
    """Its ratio is to the engine's log-probabilities, which have to be those of the distribution that is trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """A value of `advantage_estimator`."""

    scales: tuple[str, ...]
    """The values of `scale_rewards` that it goes with; the first is the paper's."""
    why_no_other_scale: str = ""
    ties_are_zero: bool = False
    """A group has advantages of 0 just where its total rewards are equal."""
    has_negative: bool = True
    """It gives advantages below 0."""
    why_no_kl_in_reward: str = ""
    """Given where `kl_in_reward` cannot go with it."""
    needs_greedy: bool = False
    """It compares with the reward of one more completion of each prompt, the most probable one."""
    is_of_tokens: bool = False
    """It gives each token an advantage of its own."""
    alias_of: str | None = None
    """The estimator that this is another name of."""
    sets: Mapping[str, str] = field(default_factory=dict)
    """The values that an alias gives to other keys."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The keys that have an effect on, or because of, advantages such as these."""
        of_completions = _OF_NEGATIVE_COMPLETIONS if self.has_negative and not self.is_of_tokens else ()
        negative = _OF_NEGATIVE_ADVANTAGES if self.has_negative else ()
        return (*(_OF_TIES if self.ties_are_zero else ()), *negative, *of_completions)


@dataclass(frozen=True, slots=True)
class Part:
    """What a value of a key switches on."""

    key: str
    values: Allowed
    reads: tuple[str, ...] = ()
    """The keys that it looks at: elsewhere they have no effect."""
    tokenwise_remedy: str | None = None
    """Given where it weighs single tokens, which not every loss allows: what to write instead."""


_OF_TIES = ("dynamic_sampling", "mask_zero_std_groups")
_OF_NEGATIVE_ADVANTAGES = ("delta", "sapo_temperature_neg")
_OF_NEGATIVE_COMPLETIONS = ("vespo_k_neg", "vespo_lambda_neg", "off_policy_mask_threshold")

_EPSILON_BELOW_1 = Rule(
    lambda v: v.epsilon >= 1.0,
    "`epsilon: {epsilon}` must be below 1: a ratio is never negative, so that a lower clip at 1 - epsilon <= 0 would "
    "never act. Write for example `epsilon: 0.2`; the upper range is `epsilon_high`.",
)
_UPPER_RANGE_IS_WIDER = Rule(
    lambda v: v.epsilon_high is not None and v.epsilon_high < v.epsilon,
    "`epsilon_high: {epsilon_high}` is below `epsilon: {epsilon}`: the upper clip range is meant to be the wider one "
    "(DAPO: 0.2 and 0.28). Raise `epsilon_high`, or leave it out to use `epsilon` for both.",
)


def _upper_bound(v: Any) -> float:
    return 1 + (v.epsilon if v.epsilon_high is None else v.epsilon_high)


_DELTA_ABOVE_THE_CLIP = Rule(
    lambda v: v.delta is not None and v.delta <= _upper_bound(v),
    lambda v: (
        f"`delta: {v.delta}` must be above 1 + epsilon_high = {_upper_bound(v):g}: below it, a bad completion would "
        "lose its gradient before a good one does. Write for example `delta: 3.0`, or leave it out."
    ),
)
_CISPO_NEEDS_ITS_BOUND = Rule(
    lambda v: v.epsilon_high is None,
    "`loss_type: cispo` needs `epsilon_high`: the importance weight is bounded by 1 + epsilon_high and by nothing "
    "else. Write for example `epsilon_high: 4.0`, which is TRL's 5.0.",
)
_DIVERGENCE_BELOW_1 = Rule(
    lambda v: max(v.epsilon, v.epsilon_high or 0.0) >= 1.0,
    "`epsilon: {epsilon}` and `epsilon_high: {epsilon_high}` must be below 1 with `loss_type: dppo_tv`: a total "
    "variation is never above 1, so that the bound would never act. Write for example `epsilon: 0.15`.",
)
_NO_CORRECTION = Rule(
    lambda v: v.rollout_correction != "none",
    "`rollout_correction: {rollout_correction}` cannot go with `loss_type: {loss_type}`, whose own weight of a token "
    "or completion already holds the ratio that it corrects. Leave it out.",
)


def learns_one_behind(v: Any) -> bool:
    """Whether the ratio of a step is to the policy one update before."""
    return v.rollout_ahead > 0 and v.rollout_correction == "none"


_GPG_IS_ON_POLICY = Rule(
    lambda v: v.num_iterations * v.steps_per_generation > 1,
    "`loss_type: gpg` has no ratio, and would take what an earlier policy sampled for the present one's: with "
    "`num_iterations: {num_iterations}` and `steps_per_generation: {steps_per_generation}` a rollout is trained on "
    "more than once. Write 1 for both, or `loss_type: dapo`.",
)
_GPG_NEEDS_A_CORRECTION = Rule(
    learns_one_behind,
    "`loss_type: gpg` has no ratio, and would take what the policy before has sampled for the present one's: "
    "`rollout_ahead: {rollout_ahead}` samples it one update before. Write `rollout_correction: token` or `sequence`, "
    "or `loss_type: dapo`.",
)
_DRO_NEEDS_ITS_BETA = Rule(
    lambda v: v.dro_beta is None,
    "`loss_type: dro` needs `dro_beta`: nothing else keeps a token near its old log-probability. Write for example "
    "`dro_beta: 0.1`.",
)
_CLIPPED = LossType(
    reads=("importance_sampling_level", "epsilon", "epsilon_high", "delta"),
    rules=(_EPSILON_BELOW_1, _UPPER_RANGE_IS_WIDER, _DELTA_ABOVE_THE_CLIP),
)


def _clipped_at(level: str, tokenwise_remedy: str | None = None) -> LossType:
    reads = tuple(key for key in _CLIPPED.reads if key != "importance_sampling_level")
    sets = {"importance_sampling_level": level}
    return replace(_CLIPPED, reads=reads, tokenwise_remedy=tokenwise_remedy, alias_of="grpo", sets=sets)


LOSS_TYPES: Mapping[str, LossType] = MappingProxyType(
    {
        "grpo": _CLIPPED,
        "bnpo": replace(_CLIPPED, alias_of="dapo"),  # TRL's mean over a micro-batch, which is the whole step here
        "dr_grpo": _CLIPPED,
        "dapo": _CLIPPED,
        "cispo": LossType(reads=("epsilon_high",), rules=(_CISPO_NEEDS_ITS_BOUND,)),
        "sapo": LossType(reads=("sapo_temperature_pos", "sapo_temperature_neg")),
        "gspo": _clipped_at("sequence", tokenwise_remedy="`loss_type: gspo_token`"),
        "gspo_token": _clipped_at("sequence_token"),
        # The bounds are of the ratio's logarithm, so that `epsilon` may be above 1.
        "gmpo": LossType(
            reads=("epsilon", "epsilon_high"),
            rules=(_UPPER_RANGE_IS_WIDER,),
            tokenwise_remedy="another `loss_type`",
        ),
        "luspo": replace(
            _CLIPPED,
            reads=tuple(key for key in _CLIPPED.reads if key != "importance_sampling_level"),
            tokenwise_remedy="`loss_type: gspo_token`",
        ),
        "vespo": LossType(
            reads=("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
            rules=(_NO_CORRECTION,),
            is_of_completions=True,
        ),
        "dppo_tv": LossType(
            reads=("epsilon", "epsilon_high", "dppo_ratio_max"),
            rules=(_DIVERGENCE_BELOW_1, _UPPER_RANGE_IS_WIDER, _NO_CORRECTION),
            compares_with_engine=True,
        ),
        "dppo_kl": LossType(
            reads=("epsilon", "epsilon_high", "dppo_ratio_max"),
            rules=(_UPPER_RANGE_IS_WIDER, _NO_CORRECTION),
            compares_with_engine=True,
        ),
        "gpg": LossType(reads=(), rules=(_GPG_IS_ON_POLICY, _GPG_NEEDS_A_CORRECTION)),
        "dro": LossType(reads=("dro_beta",), rules=(_DRO_NEEDS_ITS_BETA,), vanishes_without_advantage=False),
    }
)
OFF_POLICY_KEYS = frozenset(key for loss in LOSS_TYPES.values() for key in loss.reads)
"""Keys that act where the policy has moved away from the one that sampled: at a ratio of 1 all losses are alike."""

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        "grpo": Estimator(scales=("group", "batch", "none"), ties_are_zero=True),
        "dr_grpo": Estimator(
            scales=("none",),
            why_no_other_scale="it is `grpo` without the division",
            ties_are_zero=True,
            alias_of="grpo",
            sets={"scale_rewards": "none"},
        ),
        "rloo": Estimator(
            scales=("none", "batch"),
            why_no_other_scale="divided by the group's deviation it is `grpo` times G / (G - 1)",
            ties_are_zero=True,
        ),
        "reinforce_plus_plus": Estimator(
            scales=("batch",), why_no_other_scale="it has no groups, and is whitened over the batch"
        ),
        "reinforce_plus_plus_baseline": Estimator(
            scales=("batch",), why_no_other_scale="it is whitened over the batch", ties_are_zero=True
        ),
        "gdpo": Estimator(
            scales=("batch",),
            why_no_other_scale="each function is divided by the group's deviation, and their sum by the batch's",
            why_no_kl_in_reward=(
                "it normalizes each reward function on its own and has no place for a term that is none"
            ),
        ),
        "passk": Estimator(
            scales=("none", "group", "batch"),
            has_negative=False,
            why_no_kl_in_reward="the best completion of a group alone would feel the KL",
        ),
        "opo": Estimator(
            scales=("none",),
            why_no_other_scale="its baseline is the best for rewards as they are",
            ties_are_zero=True,
        ),
        "remax": Estimator(
            scales=("none",),
            why_no_other_scale="its baseline is the reward of another completion, and no statistic of the group",
            needs_greedy=True,
            why_no_kl_in_reward="the greedy completion that it compares with is not trained on, and has no KL",
        ),
        "optimal_token_baseline": Estimator(
            scales=("none",),
            why_no_other_scale="its baseline is the best for rewards as they are",
            is_of_tokens=True,
        ),
    }
)

_CORRECTION = (
    *("rollout_correction_mode", "rollout_correction_max", "rollout_correction_min", "rollout_correction_normalize"),
)
TERMS = (
    Part(
        "beta",
        Above(0),
        reads=("kl_estimator", "use_bias_correction_kl", "kl_in_reward", "kl_target", "sync_ref_model", "ref_model"),
    ),
    Part("kl_in_reward", (False,), reads=("use_bias_correction_kl",)),
    Part("kl_estimator", ("k1",), reads=("use_bias_correction_kl", "kl_in_reward")),
    Part("kl_estimator", ("k3",), reads=("use_bias_correction_kl",)),
    Part("sync_ref_model", (True,), reads=("ref_model_mixup_alpha", "ref_model_sync_steps")),
    Part("rollout_correction", ("token",), _CORRECTION, tokenwise_remedy="write `rollout_correction: sequence`"),
    Part("rollout_correction", ("sequence",), _CORRECTION),
    Part("rollout_rejection", ("sequence", "geometric"), reads=("rollout_rejection_max", "rollout_rejection_min")),
    Part("top_entropy_quantile", Below(1), tokenwise_remedy="leave `top_entropy_quantile` out"),
    Part(
        "covariance_control",
        ("clip_cov",),
        reads=("covariance_frac", "clip_cov_min", "clip_cov_max"),
        tokenwise_remedy="leave `covariance_control` out",
    ),
    Part("covariance_control", ("kl_cov",), reads=("covariance_frac", "kl_cov_coef")),
    Part("entropy_target", Above(0), reads=("entropy_coef_delta", "entropy_coef_max")),
)
"""What is added to a loss, or multiplied with it."""

ENGINE_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "vllm": (
            *("vllm_base", "vllm_lora", "vllm_sleep", "vllm_maxlen", "vllm_gpu_util", "vllm_max_lora_rank"),
            *("vllm_enforce_eager", "vllm_config", "structured_outputs", "rollout_ahead", "vllm_tensor_parallel"),
        ),
        "vllm_server": (
            *("vllm_server_urls", "vllm_server_transfer", "vllm_lora", "vllm_maxlen", "vllm_gpu_util"),
            *("vllm_max_lora_rank", "vllm_enforce_eager", "vllm_config", "structured_outputs", "rollout_ahead"),
        ),
        "hf": (),
    }
)
"""The values of `rollout_backend`, with the keys that each engine looks at: elsewhere they have no effect. How they
are built, and what they refuse, is in `rollout.engines.table`."""


def canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys whose values change where aliases are replaced by what they stand for, with the new values."""
    changes: dict[str, Any] = {}
    for key, table in (("loss_type", LOSS_TYPES), ("advantage_estimator", ESTIMATORS)):
        entry = table.get(values.get(key, ""))
        if entry is not None and entry.alias_of is not None:
            changes |= {key: entry.alias_of, **entry.sets}
    return changes
