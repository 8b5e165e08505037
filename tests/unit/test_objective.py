"""The objective in the trainer: what the options do together, whatever the split, and over a resume."""

import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grpo_stage.algorithm.advantages import ADVANTAGE_ESTIMATORS
from grpo_stage.algorithm.averages import AVERAGES
from grpo_stage.algorithm.catalog import ESTIMATORS, LOSS_TYPES, canonical
from grpo_stage.algorithm.combinations import _zero_advantage_rules
from grpo_stage.algorithm.kl import KL_ESTIMATORS
from grpo_stage.algorithm.losses import LOSSES
from grpo_stage.algorithm.ratios import LEVELS
from grpo_stage.algorithm.reward_table import RewardTable
from grpo_stage.arguments import GRPOArguments
from grpo_stage.monitors.canary import StaleRolloutError
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.types import RolloutGroup, SampleBatch, ScoredGroup, Step
from grpo_stage.update.batch import PaddedLayout
from grpo_stage.update.credit import Credit
from grpo_stage.update.objective import Objective
from grpo_stage.update.reference import InitialWeightsReference, ModelReference
from grpo_stage.update.terms.kl_penalty import KLPenalty

from .test_combinations import cells, options_of
from .trainer_on_fakes import LengthRewards, collect, gradient_of, groups_of, make_trainer, relative, watch_steps


# What a loss needs beside its name.
NEEDS: dict[str, dict[str, Any]] = {
    "cispo": {"epsilon_high": 1.0},
    "dro": {"dro_beta": 0.1},
    "gpg": {"num_iterations": 1},
}
NEW_LOSSES = ("luspo", "vespo", "dppo_tv", "dppo_kl", "dro")
OBJECTIVES: list[dict[str, Any]] = [
    *(
        {"loss_type": loss, "importance_sampling_level": level}
        for loss, level in itertools.product(("grpo", "bnpo", "dapo", "dr_grpo"), LEVELS)
    ),
    *({"loss_type": loss, **NEEDS.get(loss, {})} for loss in ("cispo", "sapo", "gspo", "gspo_token", "gmpo")),
    *({"loss_type": loss, **NEEDS.get(loss, {})} for loss in NEW_LOSSES),
    *({"loss_aggregation": each} for each in AVERAGES),
]
FACTORS: list[dict[str, Any]] = [
    {"rollout_correction": "token", "rollout_correction_min": 0.5},
    {"rollout_correction": "sequence", "rollout_correction_mode": "mask", "rollout_correction_min": 0.01},
    {"off_policy_mask_threshold": 0.01},
    {"top_entropy_quantile": 0.3},
    {"covariance_control": "kl_cov", "covariance_frac": 0.2, "kl_cov_coef": 0.5},
    {"entropy_coef": 0.05},
]
OF_THE_WHOLE_STEP: list[dict[str, Any]] = [
    {"rollout_correction": "token", "rollout_correction_min": 0.5, "rollout_correction_normalize": True},
    {"rollout_correction": "sequence", "rollout_correction_max": 1e6, "rollout_correction_normalize": True},
    {"rollout_rejection": "geometric", "rollout_rejection_max": 1.5, "rollout_rejection_min": 0.2},
    {"rollout_rejection": "sequence", "rollout_rejection_max": 1.5, "rollout_rejection_min": 0.01},
]
CLIP_COV: dict[str, Any] = {
    "covariance_control": "clip_cov",
    "covariance_frac": 0.2,
    "clip_cov_min": 0.1,
    "clip_cov_max": 9.0,
}
KLS: list[dict[str, Any]] = [
    {"beta": 0.1},
    {"beta": 0.1, "kl_estimator": "k2"},
    {"beta": 0.1, "use_bias_correction_kl": True},
    {"beta": 0.1, "use_bias_correction_kl": True, "kl_estimator": "k1"},
    {"beta": 0.1, "kl_in_reward": True, "kl_estimator": "k1"},
    {"beta": 0.1, "kl_target": 0.01},
    {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
]


def named(options: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items()) or "plain"


def is_tokenwise(options: dict[str, Any]) -> bool:
    """Whether it weighs single tokens, which a loss that is the completion's has no place for."""
    correction, covariance = options.get("rollout_correction"), options.get("covariance_control")
    return correction == "token" or covariance == "clip_cov" or "top_entropy_quantile" in options


def moved(trainer: Any, seed: int = 1, scale: float = 0.02) -> None:
    """Take the weights somewhere else, so that ratios differ from 1."""
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))


def reversed_order(data: Step) -> Step:
    """The same samples in another order."""
    return dataclasses.replace(data, samples=data.samples[::-1])


def beta_of(trainer: Any) -> float:
    (term,) = (term for term in trainer.learner.objective.terms if isinstance(term, KLPenalty))
    return term.beta


def check_invariance(tmp_path, **options):
    trainer = make_trainer(tmp_path, num_iterations=2, reference=InitialWeightsReference, **options)
    data = collect(trainer)[1]
    moved(trainer)
    trainer.learner.budget.max_tokens = 10_000
    whole = gradient_of(trainer, data)
    assert whole.norm() > 1e-4
    for budget, same in itertools.product((10_000, 1, 23), (data, reversed_order(data))):
        trainer.learner.budget.max_tokens = budget
        assert relative(gradient_of(trainer, same), whole) < 1e-5


@pytest.mark.parametrize("options", OBJECTIVES, ids=named)
def test_no_loss_depends_on_the_split_or_the_order(tmp_path, options):
    check_invariance(tmp_path, beta=0.1, mask_truncated_completions=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        *FACTORS,
        *OF_THE_WHOLE_STEP,
        CLIP_COV | {"mask_truncated_completions": True},
        *(kl for kl in KLS if "kl_target" not in kl),
    ],
    ids=named,
)
def test_no_factor_depends_on_the_split_or_the_order(tmp_path, options):
    check_invariance(tmp_path, **{"beta": 0.0, **options})


@pytest.mark.parametrize("options", [*OBJECTIVES, *FACTORS, *OF_THE_WHOLE_STEP, CLIP_COV, *KLS], ids=named)
def test_a_dummy_micro_batch_adds_nothing(options):
    """A rank goes through it where others have more micro-batches, or no rank has a completion."""
    batch = PaddedLayout(0, torch.device("cpu")).dummy()
    logprobs, metrics = torch.zeros(1, 1, requires_grad=True), MetricTracker()
    losses = Objective(GRPOArguments(**options)).token_losses(batch, logprobs, torch.zeros(1, 1), metrics)
    (batch.loss_weights * losses).sum().backward()
    assert logprobs.grad.item() == 0
    assert all(both == (0, 0) for both in metrics.state_dict()["means"].values())


def test_the_tables_and_the_arguments_know_the_same_names():
    hints = {f.name: f for f in dataclasses.fields(GRPOArguments)}

    def choices(key):
        return set(hints[key].type.__args__)

    def first_names(table):
        return {name for name, entry in table.items() if entry.alias_of is None}

    assert choices("loss_type") == LOSS_TYPES.keys()
    assert first_names(LOSS_TYPES) == LOSSES.keys()
    assert choices("advantage_estimator") == ESTIMATORS.keys()
    assert first_names(ESTIMATORS) == ADVANTAGE_ESTIMATORS.keys()
    assert choices("importance_sampling_level") == set(LEVELS)
    assert choices("kl_estimator") == KL_ESTIMATORS.keys()


# Two steps with each cell of docs/combinations.md that says yes, and with more


# Beside the value of a cell: so that it does something to the few tokens of a test.
ACTING: dict[str, dict[str, Any]] = {
    "rollout_correction: token": {"rollout_correction_min": 0.5},
    "rollout_correction: sequence": {"rollout_correction_mode": "mask", "rollout_correction_min": 0.01},
    "covariance_control: clip_cov": CLIP_COV,
    "covariance_control: kl_cov": {"covariance_frac": 0.2, "kl_cov_coef": 0.5},
}
CELLS = [options_of(row, column) | ACTING.get(column, {}) for row, column, verdict in cells() if verdict == "yes"]
# The page has levels and the rest in two tables.
LEVELS_AND_THE_REST = [
    objective | factor
    for objective in OBJECTIVES
    if objective.get("importance_sampling_level", "token") != "token"
    for factor in [*FACTORS, CLIP_COV, KLS[2]]
    if objective["importance_sampling_level"] == "sequence_token" or not is_tokenwise(factor)
]
# In words: with each of the forms of the KL.
KL_CELLS = [options for options in CELLS if "kl_estimator" in options and "advantage_estimator" not in options]
WITH_EACH_KL = [
    kl | other
    for kl in KL_CELLS
    for other in ({"kl_target": 0.01}, {"sync_ref_model": True, "ref_model_sync_steps": 1})
]
SCALES_WITH_THE_KL_IN_THE_REWARD = [
    {"advantage_estimator": estimator, "scale_rewards": scale, "beta": 0.1, "kl_in_reward": True, "kl_estimator": "k1"}
    for estimator, facts in ESTIMATORS.items()
    for scale in facts.scales
    if not facts.why_no_kl_in_reward and scale != "group"
]
TARGETS = [{"entropy_target": target, "entropy_coef": 0.01} for target in (0.1, 9.0)]


class HalfOfThePrompts(LengthRewards):
    """Rewards that are the same throughout the groups of every other prompt."""

    def score(self, groups):
        scores = super().score(groups)
        return [[[0.5]] * 4 if g.prompt.index % 2 else own for g, own in zip(groups, scores, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        *({"loss_type": loss, **NEEDS.get(loss, {})} for loss in LOSS_TYPES),
        *CELLS,
        *LEVELS_AND_THE_REST,
        *OF_THE_WHOLE_STEP,
        *WITH_EACH_KL,
        *SCALES_WITH_THE_KL_IN_THE_REWARD,
        *TARGETS,
    ],
    ids=named,
)
def test_two_steps(tmp_path, options):
    options = {"num_iterations": 2, **options}
    GRPOArguments(reward_funcs="even", rollout_backend="hf", **options).validate()
    reference = InitialWeightsReference if options.get("beta") else None
    leaves_out = bool({"dynamic_sampling", "mask_zero_std_groups"} & options.keys())
    # A step so small that no second one finds every token clipped.
    run = {"max_steps": 2, "learning_rate": 1e-5}
    rewards = HalfOfThePrompts() if leaves_out else None
    trainer = make_trainer(tmp_path, reference=reference, rewards=rewards, training=run, **options)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trained_on = watch_data(trainer)
    trainer.train()
    assert any(not torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True))
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        check_line(line, options)
    check_advantages(trained_on[0], options)
    if leaves_out:
        assert all(len({sample.total_reward for sample in g}) > 1 for step in trained_on for g in groups_of(step))
        assert lines[0]["frac_reward_zero_std"] > 0
        assert len(groups_of(trained_on[0])) == (2 if "dynamic_sampling" in options else 1)
    if "entropy_target" in options:
        is_low = options["entropy_target"] == 9.0
        second = 0.01 + trainer.grpo_args.entropy_coef_delta if is_low else 0.0
        assert [line["entropy_coef"] for line in lines] == pytest.approx(
            [0.0, second]
        )  # nothing was measured before the first
    if "kl_target" in options:  # the first step is at the reference
        assert [line["beta"] for line in lines] == pytest.approx([0.1, 0.098])


def watch_data(trainer):
    """What the steps of `trainer` train on."""
    seen = []
    watch_steps(trainer, seen.append)
    return seen


def check_line(line, options):
    assert math.isfinite(line["loss"])
    assert line["grad_norm"] > 0
    assert line["skipped_steps"] == 0
    assert ("kl" in line) == ("beta" in options)
    assert ("clip_ratio/delta_mean" in line) == ("delta" in options)
    if not options.get("loss_type", "").startswith("dppo"):  # the fake engine is far from the policy
        assert line["clip_ratio/region_mean"] == 0, "nothing has moved as far as that"
    if "rollout_correction" in options:
        assert 0 < line["rollout_correction/weight_mean"] <= options.get("rollout_correction_max", 2.0)
        assert 0 < line["rollout_correction/bounded_frac"] < 1 or options.get("rollout_correction_max") == 1e6
    if "off_policy_mask_threshold" in options:
        assert 0 < line["off_policy_masked_frac"] < 1
    if "top_entropy_quantile" in options:
        assert 0.3 <= line["token_selection/learned_frac"] < 0.4
    if "covariance_control" in options:
        left, held = 1 - line["token_selection/learned_frac"], line["token_selection/held_frac"]
        touched, other = (left, held) if options["covariance_control"] == "clip_cov" else (held, left)
        assert 0 < touched <= 0.25
        assert other == 0


def check_advantages(data, options):
    """Those of the first batch are the estimator's, divided as `scale_rewards` says, but where the KL is taken off."""
    estimator = options.get("advantage_estimator", "grpo")
    if options.get("kl_in_reward") or ESTIMATORS[estimator].needs_greedy or ESTIMATORS[estimator].is_of_tokens:
        return  # which have tests of their own
    groups = groups_of(data)
    totals = torch.tensor([[sample.total_reward for sample in group] for group in groups], dtype=torch.float64)
    estimator = options.get("advantage_estimator", "grpo")
    table = RewardTable(
        totals=totals,
        parts=totals.unsqueeze(-1),
        weights=torch.ones(1, dtype=torch.float64),
        lengths=torch.tensor([[len(sample.completion.token_ids) for sample in group] for group in groups]),
    )
    scale = options.get("scale_rewards", ESTIMATORS[estimator].scales[0])
    estimator = canonical(options).get("advantage_estimator", estimator)
    expected = ADVANTAGE_ESTIMATORS[estimator](table, scale)
    actual = torch.tensor([[sample.advantage for sample in group] for group in groups], dtype=torch.float64)
    if "mask_zero_std_groups" not in options:  # whose batch is more than what is trained on
        torch.testing.assert_close(actual, expected)


# What the objective adds up


def tiny_batch(**changes: Any) -> SampleBatch:
    fields = {
        "inputs": None,
        "completion_ids": torch.zeros(2, 2),
        "completion_mask": torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        "loss_mask": torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        "loss_weights": torch.tensor([[0.25, 0.25], [0.5, 0.0]]),
        "advantages": torch.tensor([1.0, -1.0]),
        "sampling_logprobs": torch.tensor([[-1.0, -2.0], [-1.5, 0.0]]),
        "policy_versions": torch.tensor([0, 0]),
    }
    return SampleBatch(**{**fields, **changes})


def token_losses(options: dict[str, Any], policy, old, ref) -> tuple[list[list[float]], MetricTracker]:
    batch, metrics = tiny_batch(old_logprobs=old, ref_logprobs=ref), MetricTracker()
    objective = Objective(GRPOArguments(**options))
    losses = objective.token_losses(batch, policy, torch.zeros_like(policy), metrics)
    return (losses * batch.completion_mask).tolist(), metrics


def test_the_correction_weighs_the_policys_loss_and_not_the_kl():
    policy = torch.tensor([[-1.0, -2.0], [-1.0, 0.0]])
    old = torch.tensor([[-1.2, -2.0], [-0.8, 0.0]])
    ref = torch.tensor([[-1.5, -2.5], [-0.5, 0.0]])
    options = {"rollout_correction": "token", "rollout_correction_max": 1.5, "beta": 0.5, "loss_type": "grpo"}
    losses, metrics = token_losses(options, policy, old, ref)

    def k3(p, r):
        return math.exp(r - p) - (r - p) - 1

    first = min(math.exp(-0.2), 1.5) * -min(math.exp(0.2), 1.2) + 0.5 * k3(-1.0, -1.5)
    second = 1.0 * -1.0 + 0.5 * k3(-2.0, -2.5)
    third = 1.5 * max(math.exp(-0.2), 0.8) + 0.5 * k3(-1.0, -0.5)  # exp(-0.8 + 1.5) is over the bound
    assert losses == [pytest.approx([first, second], rel=1e-5), pytest.approx([third, 0.0], rel=1e-5)]
    weights, count = metrics.state_dict()["means"]["rollout_correction/weight_mean"]
    assert (weights, count) == (pytest.approx(math.exp(-0.2) + 1 + 1.5, rel=1e-5), 3)
    assert metrics.state_dict()["means"]["rollout_correction/bounded_frac"] == (1, 3)
    assert metrics.state_dict()["means"]["kl"] == (
        pytest.approx(k3(-1.0, -1.5) + k3(-2.0, -2.5) + k3(-1.0, -0.5), rel=1e-5),
        3,
    )


@pytest.mark.parametrize("level", ["sequence", "geometric"])
def test_a_rejected_completion_is_in_no_part_of_the_loss_and_in_no_average(tmp_path, level):
    """The gradient is that of a step without it, KL and averages included."""
    options = {"beta": 0.1, "reference": InitialWeightsReference, "num_iterations": 2, "loss_type": "grpo"}
    bounds = {"rollout_rejection_min": 0.2, "rollout_rejection_max": 1.5}
    trainer = make_trainer(tmp_path, rollout_rejection=level, **bounds, **options)
    data = collect(trainer)[1]
    moved(trainer)

    def is_kept(sample):
        log_ratios = sample.old_logprobs.double() - torch.tensor(sample.completion.sampling_logprobs).double()
        ratio = (log_ratios.mean() if level == "geometric" else log_ratios.sum()).exp().item()
        return 0.2 <= ratio <= 1.5

    kept = tuple(sample for sample in data.samples if is_kept(sample))
    assert 0 < len(kept) < len(data.samples)
    rejecting = gradient_of(trainer, data)
    assert trainer.tracker.take()["rollout_rejection/rejected_frac"] == 1 - len(kept) / len(data.samples)
    plain = make_trainer(tmp_path, **options)
    moved(plain)
    assert relative(rejecting, gradient_of(plain, dataclasses.replace(data, samples=kept))) < 1e-5
    assert relative(rejecting, gradient_of(plain, data)) > 0.1


def test_a_step_whose_completions_are_all_rejected_leaves_the_weights_as_they_are(tmp_path):
    """And has taught nothing: with gradients of 0, momentum and weight decay would move the weights."""
    bounds = {"rollout_rejection_min": 1.0, "rollout_rejection_max": 1.0}
    trainer = make_trainer(tmp_path, rollout_rejection="sequence", num_iterations=2, **bounds)
    data = collect(trainer)[1]
    trainer.learner.learn(trainer.model, data, trainer.state.global_step)
    assert trainer.tracker.take()["rollout_rejection/rejected_frac"] == 1
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.learner.num_learned == 0


def test_normalized_weights_have_a_mean_of_1_over_the_step(tmp_path):
    """The policy's gradient is that of plain weights, divided by their mean over the tokens of the step."""
    options = {"rollout_correction": "token", "rollout_correction_max": 1e6, "num_iterations": 2}
    plain, normalized = (
        make_trainer(tmp_path, max_tokens_per_micro_batch=20, rollout_correction_normalize=normalize, **options)
        for normalize in (False, True)
    )
    data = collect(plain)[1]
    moved(plain), moved(normalized)
    ratios = [
        (sample.old_logprobs - torch.tensor(sample.completion.sampling_logprobs)).exp() for sample in data.samples
    ]
    mean = torch.cat(ratios).mean()
    assert relative(gradient_of(normalized, data), gradient_of(plain, data) / mean) < 1e-5
    logged = plain.tracker.take()
    assert logged["sampling/importance_sampling_ratio/mean"] == pytest.approx(mean.item(), rel=1e-5)
    assert logged["sampling/importance_sampling_ratio/max"] == pytest.approx(torch.cat(ratios).max().item(), rel=1e-5)
    assert logged["sampling/importance_sampling_ratio/min"] == pytest.approx(torch.cat(ratios).min().item(), rel=1e-5)


def test_the_off_policy_mask_leaves_the_kl():
    policy = torch.tensor([[-3.0, -4.0], [-2.5, 0.0]])  # both completions have lost two nats or one a token
    ref = policy + 0.5
    options = {"off_policy_mask_threshold": 0.9, "beta": 0.5, "loss_type": "grpo"}
    losses, metrics = token_losses(options, policy, policy, ref)
    kl = 0.5 * (math.exp(0.5) - 0.5 - 1)
    assert losses == [pytest.approx([-1.0 + kl] * 2), pytest.approx([kl, 0.0])]
    assert metrics.state_dict()["means"]["off_policy_masked_frac"] == (1.0, 2.0)


def test_with_the_kl_in_the_reward_there_is_none_in_the_loss():
    policy = torch.tensor([[-1.0, -2.0], [-1.0, 0.0]])
    plain, _ = token_losses({"loss_type": "grpo"}, policy, policy, None)
    in_reward = {"loss_type": "grpo", "beta": 0.5, "kl_in_reward": True, "kl_estimator": "k1"}
    losses, metrics = token_losses(in_reward, policy, policy, policy - 1.0)
    assert losses == plain
    assert metrics.state_dict()["means"]["kl"] == (pytest.approx(3 * math.exp(-1.0)), 3)
    penalty = Objective(GRPOArguments(**in_reward)).reward_penalties(
        [torch.tensor([-1.0, -2.0]), torch.tensor([-1.0])], [torch.tensor([-1.5, -2.5]), torch.tensor([-0.5])]
    )
    assert penalty == pytest.approx([0.5 * 1.0, 0.5 * -0.5])


def test_the_kl_in_the_reward_moves_the_advantages(tmp_path):
    """Every reward is the same, so that the KL alone tells the completions of a group apart."""
    same = type("Same", (LengthRewards,), {"score": lambda _, groups: [[[0.5]] * 4 for _ in groups]})()
    trainer = make_trainer(
        tmp_path,
        beta=0.2,
        kl_in_reward=True,
        kl_estimator="k1",
        advantage_estimator="rloo",
        num_iterations=2,
        reference=InitialWeightsReference,
        rewards=same,
        log_completions=True,
    )
    moved(trainer)
    for group in groups_of(collect(trainer)[0]):
        assert [s.total_reward for s in group] == [0.5] * 4, "the reward that is logged is the functions'"
        own = [0.2 * (s.old_logprobs.double() - s.ref_logprobs.double()).sum().item() for s in group]
        expected = [-own[i] + (sum(own) - own[i]) / 3 for i in range(4)]
        assert [s.advantage for s in group] == pytest.approx(expected, rel=1e-6)
        assert max(map(abs, expected)) > 1e-3


def test_remax_compares_with_a_greedy_completion_of_the_same_policy(tmp_path):
    """The fake engine's greedy completion of a prompt is its first sample."""
    trainer = make_trainer(tmp_path, advantage_estimator="remax", num_prompts=2)
    asked = []
    generate = trainer.engine.generate
    trainer.engine.generate = lambda prompts, sampling, step: (
        asked.append((sampling.temperature, sampling.num_generations)) or generate(prompts, sampling, step)
    )
    (step,) = collect(trainer)
    assert asked == [(0.0, 1), (1.0, 4)], "the greedy one first: what the engine says of itself is of the sampled ones"
    for group in groups_of(step):
        rewards = [sample.total_reward for sample in group]
        assert [sample.advantage for sample in group] == pytest.approx([reward - rewards[0] for reward in rewards])
    assert trainer.tracker.take()["greedy_reward"] == pytest.approx(
        sum(group[0].total_reward for group in groups_of(step)) / 2
    )


def test_the_optimal_token_baseline_is_that_of_the_policys_own_energies(tmp_path):
    trainer = make_trainer(tmp_path, advantage_estimator="optimal_token_baseline", num_prompts=2, temperature=0.7)
    (step,) = collect(trainer)
    for group in groups_of(step):
        energies, rewards = [], [sample.total_reward for sample in group]
        for sample in group:
            prompt, completion = sample.prompt.token_ids, sample.completion.token_ids
            with torch.no_grad():
                logits = trainer.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
            p = logits.double().softmax(-1)
            energies.append((1 - 2 * p[range(len(completion)), completion] + p.square().sum(-1)).cumsum(0).tolist())
        for sample, reward in zip(group, rewards, strict=True):
            for t, advantage in enumerate(sample.token_advantages.tolist()):
                reach = [i for i in range(4) if len(energies[i]) > t]
                if len(reach) > 1:
                    weights = [energies[i][t] for i in reach]
                    baseline = sum(w * rewards[i] for w, i in zip(weights, reach, strict=True)) / sum(weights)
                    assert advantage == pytest.approx(reward - baseline, abs=1e-5)
            assert sample.advantage == pytest.approx(sample.token_advantages.mean().item())
    assert gradient_of(trainer, step).norm() > 1e-3


@pytest.mark.parametrize(
    "estimator", [name for name in ADVANTAGE_ESTIMATORS if name not in ("remax", "optimal_token_baseline")]
)
def test_an_estimator_sees_the_parts_the_weights_and_the_lengths(tmp_path, estimator):
    trainer = make_trainer(tmp_path, advantage_estimator=estimator, num_prompts=2)
    groups = groups_of(collect(trainer)[0])
    scale = ESTIMATORS[estimator].scales[0]
    rows = [[[0.1 * i + 0.3 * g, float(i % 2)] for i in range(4)] for g in range(2)]
    scored = [
        ScoredGroup(
            group=RolloutGroup(
                prompt=group[0].prompt, completions=tuple(s.completion for s in group), policy_version=0
            ),
            rewards=tuple(map(tuple, rows[g])),
            total_rewards=tuple(2 * a - b for a, b in rows[g]),
        )
        for g, group in enumerate(groups)
    ]
    actual = Credit(estimator, scale, weights=(2.0, -1.0), mask_truncated=False).assign(scored)
    table = RewardTable(
        totals=torch.tensor([[2 * a - b for a, b in row] for row in rows], dtype=torch.float64),
        parts=torch.tensor(rows, dtype=torch.float64),
        weights=torch.tensor([2.0, -1.0], dtype=torch.float64),
        lengths=torch.tensor([[len(s.completion.token_ids) for s in group] for group in groups]),
    )
    expected = ADVANTAGE_ESTIMATORS[estimator](table, scale)
    assert torch.equal(torch.tensor([[s.advantage for s in g] for g in actual], dtype=torch.float64), expected)
    assert expected.abs().max() > 0

    by_prompt = {group[0].prompt.index: 0.5 + g for g, group in enumerate(groups)}
    balanced = Credit(estimator, scale, (2.0, -1.0), False, [by_prompt[i] for i in sorted(by_prompt)]).assign(scored)
    for samples, of_group in zip(balanced, actual, strict=True):
        weight = by_prompt[samples[0].prompt.index]
        assert [s.advantage for s in samples] == [weight * s.advantage for s in of_group]


# What adapts, and goes on after a resume


def test_beta_follows_the_divergence(tmp_path):
    run = {"num_train_epochs": 2}
    far = make_trainer(tmp_path / "far", beta=0.1, kl_target=1e-9, reference=InitialWeightsReference, training=run)
    far.train()
    near = make_trainer(tmp_path / "near", beta=0.1, kl_target=1e9, reference=InitialWeightsReference, training=run)
    near.train()
    # The first step is at the reference itself: no divergence, 2 percent down. Then it is over the target.
    betas = [line["beta"] for line in far.state.log_history if "loss" in line]
    assert betas == pytest.approx([0.1, 0.1 * 0.98, *(0.1 * 0.98 * 1.02**i for i in range(1, len(betas) - 1))])
    betas = [line["beta"] for line in near.state.log_history if "loss" in line]
    assert betas == pytest.approx([0.1 * 0.98**i for i in range(len(betas))])
    assert beta_of(far) > beta_of(near)


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_beta_and_the_reference_are_part_of_a_checkpoint(tmp_path, stop_at):
    settings: dict[str, Any] = {
        "num_iterations": 2,
        "beta": 0.1,
        "kl_target": 0.01,
        "sync_ref_model": True,
        "ref_model_mixup_alpha": 0.4,
        "ref_model_sync_steps": 2,
        "reference": InitialWeightsReference,
    }
    run = {"save_strategy": "steps", "save_steps": stop_at, "num_train_epochs": 2}
    whole = make_trainer(tmp_path / "whole", training=run, **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", training=run, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop_at}"))
    assert beta_of(resumed) == beta_of(whole) != 0.1
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = resumed.reference.state_dict(), whole.reference.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_reference_moves_as_written(tmp_path):
    trainer = make_trainer(
        tmp_path,
        beta=0.1,
        sync_ref_model=True,
        ref_model_mixup_alpha=0.25,
        ref_model_sync_steps=2,
        reference=InitialWeightsReference,
    )
    initial = {name: p.clone() for name, p in trainer.reference.state_dict().items()}
    seen = []

    class Watcher(type(trainer.callback_handler.callbacks[0])):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

    trainer.add_callback(Watcher())
    trainer.train()
    assert len(seen) == 3
    for name, p in trainer.reference.state_dict().items():
        torch.testing.assert_close(p, 0.75 * initial[name] + 0.25 * seen[1][name])
        assert not torch.equal(p, initial[name])


def test_another_model_moves_only_if_it_is_of_the_same_shape(tmp_path):
    policy, other = make_trainer(tmp_path / "a").model, make_trainer(tmp_path / "b").model
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    reference = ModelReference(other)
    reference.check_alike(policy)
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    reference.mix(policy, 0.5)
    for name, p in other.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.5)
    saved = {name: p.detach().clone() for name, p in reference.state_dict().items()}
    reference.mix(policy, 1.0)
    reference.load_state_dict(saved)
    for name, p in other.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.5)
    with pytest.raises(ValueError, match=r"2 weights of it are of another name or shape"):
        ModelReference(torch.nn.Linear(2, 3)).check_alike(policy)


def test_another_model_is_held_in_the_precision_of_the_policys_weights():
    """Those of layers that are trained whole beside an adapter included, which PEFT gives other names."""
    policy = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).to(torch.bfloat16),
        LoraConfig(target_modules=["0"], modules_to_save=["1"]),
    )
    for p in policy.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    other = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3))).to(torch.bfloat16)
    ModelReference(other).match_precision(policy)
    assert [layer.weight.dtype for layer in other] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_a_mix_in_bfloat16_does_not_vanish_in_rounding():
    model = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    reference = InitialWeightsReference(model)
    with torch.no_grad():
        model.weight.fill_(2.0)
    reference.mix(model, 0.01)
    assert reference.state_dict()["weight"].item() == pytest.approx(1.0078125), "the nearest to 1.01 there is"


# What has no gradient does not go through the model

ACTS_WITHOUT_ADVANTAGE: list[dict[str, Any]] = [
    {"kl_target": 0.01},
    {"entropy_coef": 0.05},
    {"entropy_target": 1.0},
    {"covariance_control": "kl_cov"},
    {"loss_type": "dro", "dro_beta": 0.1},
]


@pytest.mark.parametrize("options", [*OBJECTIVES, *FACTORS, *OF_THE_WHOLE_STEP, CLIP_COV, *KLS], ids=named)
def test_leaving_out_completions_without_an_advantage_changes_no_gradient(tmp_path, options):
    options = {"num_iterations": 2, "beta": 0.0, "mask_truncated_completions": True, **options}
    trainer = make_trainer(tmp_path, reference=InitialWeightsReference, rewards=RewardsOfHalf(), **options)
    every = make_trainer(
        tmp_path,
        reference=InitialWeightsReference,
        rewards=RewardsOfHalf(),
        disable_zero_advantage_skipping=True,
        **options,
    )
    data = collect(trainer)[1]
    assert any(sample.advantage == 0 for sample in data.samples)
    moved(trainer)
    moved(every)
    assert relative(gradient_of(trainer, data), gradient_of(every, data)) < 1e-5
    objective = trainer.learner.objective
    acts = any(options.items() >= each.items() for each in ACTS_WITHOUT_ADVANTAGE)
    acts |= options["beta"] > 0 and not options.get("kl_in_reward", False)
    for sample in data.samples:
        assert objective.has_gradient(sample) == (sample.is_used if acts else sample.teaches)
    chosen = dataclasses.asdict(GRPOArguments(**options)) | {"disable_zero_advantage_skipping": True}
    broken = [rule for rule in _zero_advantage_rules() if rule.broken(SimpleNamespace(**chosen))]
    assert bool(broken) == acts, "where the key has no effect it is refused"
    assert all(every.learner.objective.has_gradient(sample) for sample in data.samples)


def test_a_step_of_equal_rewards_has_a_gradient_of_zeros_and_still_counts(tmp_path):
    trainer = make_trainer(tmp_path, rewards=RewardsOfHalf(share=0.0), training={"max_steps": 3})
    trainer.learner.gradient.accumulate(trainer.model, collect(trainer)[0], 0)
    assert all(p.grad is not None and (p.grad == 0).all() for p in trainer.model.parameters())


class RewardsOfHalf(LengthRewards):
    """Tells the completions of every second prompt apart, or of none."""

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.share = share

    def score(self, groups):
        scores = super().score(groups)
        return [
            own if self.share and g.prompt.index % 2 else [[1.0]] * len(own)
            for own, g in zip(scores, groups, strict=True)
        ]


def test_the_canary_sees_a_rollout_that_teaches_nothing(tmp_path):
    """Its first step may be one of equal groups alone, and the others of later versions."""
    trainer = make_trainer(tmp_path, rewards=RewardsOfHalf(share=0.0), bound=1e-3)
    with pytest.raises(StaleRolloutError):
        trainer.learner.learn(trainer.model, collect(trainer)[0], 0)
