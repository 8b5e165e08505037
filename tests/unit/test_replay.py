"""Whole short runs, replayed in float64 from what was recorded of them, against the gradients that were applied.

Recorded are the weights before each step, and of each rollout the tokens, the engine's log-probabilities and the
rewards. All else is computed anew: which completions a step trains on, their advantages, the three log-probabilities
(of the policy, of that which sampled, of the reference), the losses and their average. One completion goes through the
network at a time, without padding. The formulas are the loops over numbers of test_objective_oracle.py and
test_objective_terms.py; nothing is shared with the package but the network.
"""

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from grpo_stage.types import FinishReason
from grpo_stage.update.reference import InitialWeightsReference

from .test_objective_oracle import oracle_advantages
from .test_objective_terms import SETTINGS, Row, estimate, row_gradient
from .trainer_on_fakes import MAX_NEW_TOKENS, FakeEngine, make_trainer


PROMPTS_PER_STEP, TEMPERATURE = 2, 0.8
BUDGETS = (10_000, 20)
"""Micro-batches of all completions, and of one or two."""
TWICE = {"num_iterations": 2}
# The package's defaults are written out: the oracle has its own.
DEFAULTS: dict[str, Any] = SETTINGS | {
    "epsilon": 0.2,
    "epsilon_high": None,
    "advantage_estimator": "grpo",
    "scale_rewards": "group",
    "rewards": ("even", "low"),
    "num_prompts": 3,  # the last step has one
    "num_iterations": 1,
    "steps_per_generation": 1,
    "mask_truncated_completions": False,
    "dynamic_sampling": False,
}
RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dapo, used twice, two steps": {
        **TWICE,
        "num_prompts": 5,
        "loss_type": "dapo",
        "steps_per_generation": 2,
        "scale_rewards": "batch",
        "epsilon_high": 0.28,
        "beta": 0.1,
    },
    "bnpo, two steps, some not applicable": {
        "loss_type": "bnpo",
        "steps_per_generation": 2,
        "rewards": ("even", "known"),
        "delta": 1.3,
    },
    "dr_grpo, truncated ones masked": {
        **TWICE,
        "loss_type": "dr_grpo",
        "advantage_estimator": "dr_grpo",
        "scale_rewards": "none",
        "mask_truncated_completions": True,
        "beta": 0.1,
    },
    "grpo, truncated ones masked": {"loss_type": "grpo", "mask_truncated_completions": True, "beta": 0.1},
    "dynamic sampling": {
        **TWICE,
        "num_prompts": 7,
        "loss_type": "dapo",
        "rewards": ("low",),
        "dynamic_sampling": True,
    },
    "gspo, KL in the reward": {
        **TWICE,
        "loss_type": "gspo",
        "advantage_estimator": "rloo",
        "scale_rewards": "none",
        "rewards": ("even",),
        "beta": 0.1,
        "kl_in_reward": True,
        "kl_estimator": "k1",
    },
    "corrected tokens": {
        "loss_type": "dr_grpo",
        "advantage_estimator": "opo",
        "scale_rewards": "none",
        "beta": 0.1,
        "rollout_correction": "token",
    },
    "corrected completions": {
        **TWICE,
        "loss_type": "gspo_token",
        "advantage_estimator": "reinforce_plus_plus_baseline",
        "scale_rewards": "batch",
        "rollout_correction": "sequence",
        "rollout_correction_mode": "mask",
        "rollout_correction_min": 1e-3,
        "rollout_correction_max": 1e3,
        "off_policy_mask_threshold": 0.5,
    },
    "cispo, paid for entropy": {
        **TWICE,
        "loss_type": "cispo",
        "advantage_estimator": "reinforce_plus_plus",
        "scale_rewards": "batch",
        "entropy_coef": 0.05,
    },
    "sapo, of the highest entropy": {
        **TWICE,
        "loss_type": "sapo",
        "advantage_estimator": "gdpo",
        "scale_rewards": "batch",
        "top_entropy_quantile": 0.4,
        "beta": 0.1,
        "use_bias_correction_kl": True,
    },
    "gmpo": {**TWICE, "loss_type": "gmpo", "advantage_estimator": "passk", "scale_rewards": "none"},
}
WEIGHTS = {"even": 0.7, "low": 0.5, "known": 0.5}


# What is recorded


def rewarded(name: str, tokens: tuple[int, ...]) -> float | None:
    if name == "even":
        return sum(token % 2 == 0 for token in tokens) / len(tokens)
    if name == "known" and tokens[0] % 3 == 0:
        return None
    return float(tokens[0] < 20)


@dataclass(frozen=True)
class Sampled:
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    sampling: tuple[float, ...]
    is_truncated: bool
    rewards: tuple[float | None, ...]


@dataclass
class Recording(TrainerCallback):
    names: tuple[str, ...]
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """Before each step."""
    gradients: list[list[torch.Tensor]] = field(default_factory=list)
    """What the optimizer was given in each step."""
    rollouts: list[tuple[int, list[list[Sampled]]]] = field(default_factory=list)
    """The step before which the groups were sampled, and these."""
    trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        self.trainer.learner.budget.max_tokens = BUDGETS[state.global_step % 2]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append([p.grad.double() for p in model.parameters()])

    # As a reward suite

    @property
    def weights_of_rewards(self) -> tuple[float, ...]:
        return tuple(WEIGHTS[name] for name in self.names)

    def score(self, groups: Any) -> list[list[list[float | None]]]:
        rewards = [[[rewarded(name, c.token_ids) for name in self.names] for c in g.completions] for g in groups]
        sampled = [
            [
                Sampled(
                    prompt=group.prompt.token_ids,
                    tokens=c.token_ids,
                    sampling=c.sampling_logprobs,
                    is_truncated=c.finish_reason is FinishReason.LENGTH,
                    rewards=tuple(parts),
                )
                for c, parts in zip(group.completions, of_group, strict=True)
            ]
            for group, of_group in zip(groups, rewards, strict=True)
        ]
        self.rollouts.append((groups[0].policy_version, sampled))
        return rewards


class RecordedRewards:
    def __init__(self, recording: Recording) -> None:
        self.names, self.weights, self.score = recording.names, recording.weights_of_rewards, recording.score

    def total(self, rewards: list[float | None]) -> float | None:
        applied = [w * r for w, r in zip(self.weights, rewards, strict=True) if r is not None]
        return math.fsum(applied) if applied else None

    def take_counters(self) -> dict[str, int]:
        return {}


# What is computed anew


class Network:
    """The policy of any step, in float64."""

    def __init__(self, model: torch.nn.Module, recording: Recording) -> None:
        self._model = copy.deepcopy(model).double()
        self._recording = recording
        self._kept: dict[tuple[int, Sampled], list[float]] = {}

    def at(self, step: int) -> torch.nn.Module:
        self._model.load_state_dict(self._recording.weights[step])
        return self._model

    def logits(self, c: Sampled) -> torch.Tensor:
        """[T, V] of the distributions that the tokens were drawn from, log-normalized."""
        ids = torch.tensor([[*c.prompt, *c.tokens]])
        logits = self._model(input_ids=ids, use_cache=False).logits[0, len(c.prompt) - 1 : -1]
        return (logits / TEMPERATURE).log_softmax(-1)

    def logprobs(self, c: Sampled, step: int) -> list[float]:
        if (step, c) not in self._kept:
            self.at(step)
            with torch.no_grad():
                self._kept[step, c] = self.logits(c)[range(len(c.tokens)), list(c.tokens)].tolist()
        return self._kept[step, c]


@dataclass(frozen=True)
class Used:
    """A completion in a step."""

    sampled: Sampled
    sampled_at: int
    advantage: float


def steps(recording: Recording, s: dict[str, Any], network: Network) -> Iterator[list[Used]]:
    """What each optimizer step trains on, in their order."""
    rollouts, waiting = list(recording.rollouts), []
    step, size = 0, PROMPTS_PER_STEP * s["steps_per_generation"]
    while rollouts or waiting:
        batch, waiting = waiting, []
        while rollouts and rollouts[0][0] == step:
            assert len(batch) < size, "a batch was full, and more was sampled"
            batch += [(step, g) for g in rollouts.pop(0)[1] if not s["dynamic_sampling"] or has_signal(g)]
        batch, waiting = batch[:size], batch[size:]
        with_advantages = advantages_of(batch, s, network)
        chunks = [with_advantages[i : i + PROMPTS_PER_STEP] for i in range(0, len(batch), PROMPTS_PER_STEP)]
        for chunk in chunks * s["num_iterations"]:
            yield list(itertools.chain.from_iterable(chunk))
            step += 1


def has_signal(group: list[Sampled]) -> bool:
    return len({c.rewards for c in group}) > 1


def advantages_of(batch: list[tuple[int, list[Sampled]]], s: dict[str, Any], network: Network) -> list[list[Used]]:
    weights = [WEIGHTS[name] for name in s["rewards"]]
    parts = [[[math.nan if r is None else r for r in c.rewards] for c in group] for _, group in batch]
    if s["kl_in_reward"]:
        for (step, group), of_group in zip(batch, parts, strict=True):
            for c, row in zip(group, of_group, strict=True):
                logprobs = zip(network.logprobs(c, step), network.logprobs(c, 0), strict=True)
                row[0] -= s["beta"] * math.fsum(estimate(s["kl_estimator"], p, r) for p, r in logprobs) / weights[0]
    lengths = [[len(c.tokens) for c in group] for _, group in batch]
    advantages = oracle_advantages(s["advantage_estimator"], s["scale_rewards"], parts, weights, lengths)
    return [
        [Used(c, step, advantage) for c, advantage in zip(group, row, strict=True)]
        for (step, group), row in zip(batch, advantages, strict=True)
    ]


def token_weights(completions: list[Used], s: dict[str, Any]) -> list[float]:
    """Of each token of a completion; 0 where the loss leaves the completion out."""
    in_loss = [not (s["mask_truncated_completions"] and c.sampled.is_truncated) for c in completions]
    lengths = [len(c.sampled.tokens) for c in completions]
    used = [n for n, is_used in zip(lengths, in_loss, strict=True) if is_used]
    if s["loss_type"] == "dr_grpo":
        weights = [1 / (len(completions) * MAX_NEW_TOKENS)] * len(completions)
    elif s["loss_type"] in ("dapo", "bnpo", "cispo"):
        weights = [1 / sum(used)] * len(completions)
    else:
        weights = [1 / (len(used) * n) for n in lengths]
    return [w * is_used for w, is_used in zip(weights, in_loss, strict=True)]


def gradient(step: int, completions: list[Used], s: dict[str, Any], network: Network) -> tuple[list[Any], list[Row]]:
    rows, policies, entropies = [], [], []
    olds = [network.logprobs(c.sampled, c.sampled_at) for c in completions]
    refs = [network.logprobs(c.sampled, 0) for c in completions]
    model = network.at(step)
    for c, old, ref, weight in zip(completions, olds, refs, token_weights(completions, s), strict=True):
        n, distributions = len(old), network.logits(c.sampled)
        policies.append(distributions[range(n), list(c.sampled.tokens)])
        entropies.append(-(distributions.exp() * distributions).sum(-1))
        rows.append(
            Row(
                advantage=c.advantage,
                policy=policies[-1].tolist(),
                old=old,
                sampling=list(c.sampled.sampling),
                ref=ref,
                entropy=entropies[-1].tolist(),
                learned=[1.0] * n,
                held=[0.0] * n,
                weights=[weight] * n,
            )
        )
    if s["top_entropy_quantile"] < 1:
        ordered = sorted((e for row in rows if row.is_used for e in row.entropy), reverse=True)
        lowest = ordered[math.ceil(s["top_entropy_quantile"] * len(ordered)) - 1]
        for row in rows:  # the same tokens after the same prompt differ by rounding
            row.learned = [float(e >= lowest - 1e-9) for e in row.entropy]
    loss = torch.zeros(()).double()
    for row, policy, entropy in zip(rows, policies, entropies, strict=True):
        slopes = row_gradient(row, s | {"learned": s["top_entropy_quantile"] < 1})
        loss = loss + (torch.tensor(slopes).double() * policy).sum()
        loss = loss - s["entropy_coef"] * (torch.tensor(row.weights).double() * entropy).sum()
    return list(torch.autograd.grad(loss, list(model.parameters()))), rows


@pytest.mark.parametrize("name", RUNS)
def test_the_gradients_of_a_run_are_those_of_its_record(tmp_path: Any, name: str) -> None:
    s = DEFAULTS | RUNS[name]
    recording = Recording(s["rewards"])
    trainer = make_trainer(
        tmp_path,
        temperature=TEMPERATURE,
        rewards=RecordedRewards(recording),
        engine=FakeEngine(),
        reference=InitialWeightsReference if s["beta"] > 0 else None,
        training={"per_device_train_batch_size": PROMPTS_PER_STEP, "max_grad_norm": 0.0, "learning_rate": 1e-3},
        **{key: value for key, value in s.items() if key != "rewards"},
    )
    recording.trainer = trainer
    trainer.add_callback(recording)
    trainer.train()

    network = Network(trainer.model, recording)
    largest, moved = 0.0, 0.0
    for step, completions in enumerate(steps(recording, s, network)):
        expected, rows = gradient(step, completions, s, network)
        moved = max(
            moved, *(abs(math.exp(p - o) - 1) for row in rows for p, o in zip(row.policy, row.old, strict=True))
        )
        norm = math.sqrt(sum(each.square().sum().item() for each in expected))
        both = zip(recording.gradients[step], expected, strict=True)
        difference = math.sqrt(sum((actual - own).square().sum().item() for actual, own in both))
        assert difference < 2e-5 * max(norm, 0.1), f"step {step}"
        largest = max(largest, norm)
    assert step + 1 == trainer.state.global_step == len(recording.gradients)
    assert largest > 0.1
    is_reused = s["num_iterations"] * s["steps_per_generation"] > 1
    assert (moved > s["epsilon"]) == is_reused, "a ratio passes the bounds, or is 1"
