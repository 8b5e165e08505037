"""A problem with a known optimum that every estimator and every loss has to reach, and that broken ones do not.

A completion has one to three tokens out of four, drawn for each position from a softmax of its own; its length is
nobody's doing. The reward is the share of tokens that are right. The optimum is to be right always; for `passk` it is
that the best of a group is.
"""

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch

from grpo_stage.algorithm import averages, losses
from grpo_stage.algorithm.advantages import ADVANTAGE_ESTIMATORS, gradient_energies
from grpo_stage.algorithm.catalog import ESTIMATORS
from grpo_stage.algorithm.losses import LOSSES
from grpo_stage.algorithm.ratios import LEVELS
from grpo_stage.algorithm.reward_table import RewardTable


P, G, T, V = 4, 8, 3, 4
RIGHT = torch.tensor([2, 0, 3])
WRONG = torch.tensor([1, 1, 1])
SETTINGS: dict[str, Any] = {"epsilon": 0.2, "epsilon_high": 0.28}
OF_LOSS = {"cispo": {"epsilon_high": 4.0}, "gmpo": {"epsilon": 0.4, "epsilon_high": 0.4}}


def learn(
    estimator: str = "grpo",
    loss_type: str = "dapo",
    *,
    scale: str | None = None,
    module: ModuleType = losses,
    num_rollouts: int = 50,
    sign: float = 1.0,
    masked: bool = True,
    bonus: float = 0.0,
    **settings: Any,
) -> tuple[float, float]:
    """The probability of a right token, and that the best of a group is all right, after training from seed 0."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(T, V, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.08)
    options = module.LossSettings(**{**SETTINGS, **OF_LOSS.get(loss_type, {}), **settings})
    for _ in range(num_rollouts):
        policy = logits.detach().softmax(-1)
        tokens = torch.stack(
            [torch.multinomial(policy[t], P * G, replacement=True, generator=generator) for t in range(T)], dim=1
        )
        lengths = torch.randint(1, T + 1, (P * G,), generator=generator)
        mask = (torch.arange(T) < lengths.unsqueeze(1)).float()
        right = (tokens == RIGHT).float() * mask
        tokens = torch.where(mask > 0, tokens, WRONG)  # what stands in the padding would be learned without the mask
        old = policy.log()[torch.arange(T), tokens]
        share = right.sum(1) / lengths
        greedy = (policy.argmax(-1) == RIGHT).float()
        table = RewardTable(
            totals=(share + right[:, 0] + bonus * (T - lengths)).view(P, G),
            parts=torch.stack([share, right[:, 0]], dim=1).view(P, G, 2),
            weights=torch.ones(2),
            lengths=lengths.view(P, G),
            greedy_parts=torch.stack([greedy.mean(), greedy[0]]).expand(P, 2),
            energies=gradient_energies(old, policy.square().sum(-1)).view(P, G, T),
        )
        advantages = ADVANTAGE_ESTIMATORS[estimator](table, scale or ESTIMATORS[estimator].scales[0]) * sign
        advantages = advantages.view(P * G, -1).squeeze(1)  # of completions, or of tokens
        used = mask if masked else torch.ones_like(mask)
        totals = averages.StepTotals(num_completions=P * G, num_tokens=int(used.sum()), max_completion_length=T)
        for _ in range(2):  # the second is off-policy
            logprobs = logits.log_softmax(-1)[torch.arange(T), tokens]
            inputs = module.TokenInputs(logprobs, old, advantages, used, sampling_logprobs=old)
            output = module.LOSSES[loss_type].surrogate(inputs, options)
            loss = (averages.token_weights(used, totals, loss_type) * output.token_losses).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    probabilities = logits.detach().softmax(-1)[torch.arange(T), RIGHT]
    all_right = probabilities.cumprod(0).mean()
    return probabilities.mean().item(), (1 - (1 - all_right) ** G).item()


@pytest.mark.parametrize(
    ("estimator", "scale"), [(name, scale) for name in ADVANTAGE_ESTIMATORS for scale in ESTIMATORS[name].scales]
)
def test_every_estimator_reaches_the_optimum(estimator: str, scale: str) -> None:
    mean, best = learn(estimator, scale=scale)
    assert best > 0.99
    assert mean > 0.9 or estimator == "passk"


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("level", LEVELS)
def test_every_loss_reaches_the_optimum(loss_type: str, level: str) -> None:
    assert learn(loss_type=loss_type, importance_sampling_level=level)[0] > 0.9


def test_the_start_is_far_from_it() -> None:
    mean, best = learn(num_rollouts=0)
    assert mean == pytest.approx(0.25)
    assert best < 0.61


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_wrong_sign_does_not(loss_type: str) -> None:
    assert learn(loss_type=loss_type, sign=-1.0)[0] < 0.1


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_missing_mask_does_not(loss_type: str) -> None:
    # Short completions are paid more, which no token is to blame for; but the padding of short ones is.
    assert learn(loss_type=loss_type, bonus=1.0)[0] > 0.85
    assert learn(loss_type=loss_type, bonus=1.0, masked=False)[0] < 0.6


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_swapped_bounds_do_not(loss_type: str, level: str) -> None:
    # `passk` has nothing but positive advantages, and where the upper bound is below 1 these have no gradient.
    source = inspect.getsource(losses).replace(
        "ratios.clamp(1 - epsilon, 1 + epsilon_high)", "ratios.clamp(1 + epsilon_high, 1 - epsilon)"
    )
    mutant = ModuleType("mutant")
    exec(compile(source, "mutant", "exec"), mutant.__dict__)
    assert learn("passk", loss_type, importance_sampling_level=level)[1] > 0.99
    assert learn("passk", loss_type, importance_sampling_level=level, module=mutant)[1] < 0.61
