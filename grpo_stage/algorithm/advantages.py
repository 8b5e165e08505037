"""Advantages: how much better a completion is than what is to be expected of its prompt, or of the batch.

A reward of NaN means "no reward function applied": everywhere here it takes no part in any mean or deviation, and its
advantage is 0. All statistics of a batch are over the prompts that are given: all of a generation, over all ranks.

Two rules hold for every estimator:

- Completions are compared with those alone that the same functions applied to (`ADVANTAGE_ESTIMATORS`). The sum over
  fewer functions is no lower reward: a completion whose `accuracy` timed out would pass for a wrong one.
- Rewards that differ by rounding alone are equal (`settled`): .3 and .1 + .2 would have advantages of 1e-13.

    P prompts    G completions a prompt (a group)    F reward functions
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from grpo_stage.algorithm.reward_table import REWARD_TOLERANCE, RewardTable, has_reward_variance, settled


STD_EPS = 1e-4
"""Added to the standard deviation. TRL uses 1e-4 too, verl 1e-6, OpenRLHF 1e-9; all divide by the sample
standard deviation (ddof=1)."""
ENERGY_EPS = 1e-8
"""Added to each token's energy, so that tokens of which the policy is certain have the group's mean for a baseline;
verl adds it to the sum over the group, which makes the baseline 0 there."""


def group_advantages(
    rewards: torch.Tensor, scale_rewards: Literal["group", "batch", "none"] = "group"
) -> torch.Tensor:
    r"""Advantages of completions relative to their group.

    .. math:: A_{i} = (r_{i} - mean(r)) / (std(r) + 1e-4)

    The mean is always the group's. `scale_rewards` says whose standard deviation divides: the group's (DeepSeekMath,
    arXiv:2402.03300, outcome supervision), that of all rewards given (`batch`), or nothing (`none`: Dr. GRPO,
    arXiv:2503.20783, which argues that dividing by the group's favors questions that are too easy or too hard).

    A reward of NaN means "no reward function applied": it takes no part in any mean or deviation and its advantage is
    0. A group whose rewards are all equal, or that has fewer than two rewards, has advantages of exactly 0.

    Args:
        rewards: [P, G] total rewards, NaN where not applicable. With `batch`, all prompts of the generation, over all
            ranks: the deviation must not depend on how many ranks share the work.
        scale_rewards: what to divide by.

    Returns:
        [P, G] in the rewards' dtype.

    Raises:
        ValueError: if `rewards` is not of two dimensions, G < 2, or `scale_rewards` is unknown.
    """
    rewards = _checked(rewards)
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)  # [P, G]
    return _divided(_only_where_rewards_differ(centred, rewards), rewards, scale_rewards)


def leave_one_out_advantages(rewards: torch.Tensor, scale_rewards: Literal["batch", "none"] = "none") -> torch.Tensor:
    r"""RLOO: the baseline of a completion is the mean of the others of its group.

    .. math:: A_i = r_i - \frac{1}{G - 1} \sum_{j \neq i} r_j = \frac{G}{G - 1} (r_i - mean(r))

    Ahmadian et al., "Back to Basics" (arXiv:2402.14740); unlike GRPO's, the baseline does not contain the reward
    itself, so that the gradient is unbiased. With `batch` it is divided by (the deviation of the batch's rewards +
    1e-4); TRL's `normalize_advantages` takes that of the advantages.

    Args:
        rewards: [P, G] total rewards, NaN where not applicable.
        scale_rewards: what to divide by.

    Returns:
        [P, G]; exactly 0 in a group of equal rewards.

    Raises:
        ValueError: as `group_advantages`.
    """
    count = (~rewards.isnan()).sum(dim=1, keepdim=True).to(rewards.dtype)  # [P, 1]
    return group_advantages(rewards, scale_rewards) * (count / (count - 1).clamp(min=1))


def whitened_advantages(rewards: torch.Tensor) -> torch.Tensor:
    r"""REINFORCE++: no group at all, the batch is the baseline.

    .. math:: A = (r - mean_{batch}(r)) / (std_{batch}(r) + 1e-4)

    Hu et al. (arXiv:2501.03262). OpenRLHF and verl whiten over tokens, so that a long completion counts more, with
    1e-8 under the root; here a completion counts once.

    Args:
        rewards: [S, P * G] total rewards, each row a batch of its own, NaN where not applicable.

    Returns:
        [S, P * G]; exactly 0 where all rewards of the batch are equal.

    Raises:
        ValueError: as `group_advantages`.
    """
    return group_advantages(rewards, "group")


def whitened_group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    r"""REINFORCE++ with the group's baseline: centered in the group, divided by the batch's deviation of the result.

    .. math:: A = (r - mean_{group}(r)) / (std_{batch}(r - mean_{group}(r)) + 1e-4)

    Hu et al. (arXiv:2501.03262), "REINFORCE++-baseline". The mean over the batch, which they subtract, is 0 after the
    group's. GRPO with `scale_rewards: batch` divides by the deviation of the rewards themselves, in which the prompts'
    difficulties stand as well.

    Args:
        rewards: [P, G] total rewards, NaN where not applicable.

    Returns:
        [P, G]; exactly 0 in a group of equal rewards.

    Raises:
        ValueError: as `group_advantages`.
    """
    return _whitened(group_advantages(rewards, "none"), ~rewards.isnan())


def decoupled_advantages(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""GDPO: each reward function is normalized within the group on its own, so that none drowns another.

    .. math:: A = \sum_f w_f \frac{r_f - mean_{group}(r_f)}{std_{group}(r_f) + 1e-4},\quad
              \hat A = A / (std_{batch}(A) + 1e-4)

    Liu et al. (arXiv:2601.05242). The mean over the batch, which they subtract, is 0 after the groups'. TRL 1.16's
    `normalize_then_sum` is this one; verl has 1e-6. A function that does not apply to a completion adds nothing to it.
    Parts that cancel (beyond `REWARD_TOLERANCE`) add up to exactly 0.

    Args:
        rewards: [P, G, F] of each function, unweighted, NaN where it does not apply.
        weights: [F].

    Returns:
        [P, G]; exactly 0 where no function tells the completions of a group apart.

    Raises:
        ValueError: if `rewards` is not of three dimensions, or as `group_advantages`.
    """
    if rewards.dim() != 3:
        raise ValueError(f"rewards must be [prompts, completions, functions], got shape {tuple(rewards.shape)}.")
    parts = torch.stack(
        [weight * group_advantages(part, "group") for weight, part in zip(weights, rewards.unbind(-1), strict=True)]
    )  # [F, P, G]
    sums = parts.sum(dim=0)
    sums = torch.where(sums.abs() > REWARD_TOLERANCE * parts.abs().sum(dim=0), sums, torch.zeros_like(sums))
    counts = (~rewards.isnan() & (weights != 0)).any(dim=-1)  # [P, G]
    return _whitened(sums, counts)


def best_of_group_advantages(
    rewards: torch.Tensor, scale_rewards: Literal["group", "batch", "none"] = "none"
) -> torch.Tensor:
    r"""pass@k for k = G: what a completion adds to the best of its group.

    .. math:: A_i = \max_j r_j - \max_{j \neq i} r_j

    Tang et al. (arXiv:2503.19595), the leave-one-out form for k = G, as verl's `grpo_passk` has it: the best
    completion, where there is but one, gets its lead over the second, and all others 0. verl divides by (the group's
    deviation + 1e-6) unless told not to; here `scale_rewards` says, with 1e-4.

    Args:
        rewards: [P, G] total rewards, NaN where not applicable.
        scale_rewards: what to divide by.

    Returns:
        [P, G], never negative; exactly 0 in a group of equal rewards, or of fewer than two.

    Raises:
        ValueError: as `group_advantages`.
    """
    rewards = _checked(rewards)
    known = rewards.nan_to_num(nan=-torch.inf)
    best, second = known.topk(2, dim=1).values.unbind(dim=1)  # [P]
    lead = torch.where(second.isfinite(), best - second, torch.zeros_like(best)).unsqueeze(1)  # [P, 1]
    advantages = torch.where(known == best.unsqueeze(1), lead, torch.zeros_like(rewards))
    return _divided(advantages, rewards, scale_rewards)


def optimal_baseline_advantages(rewards: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    r"""OPO: the group's mean, in which a completion counts by its length.

    .. math:: A_i = r_i - \frac{\sum_j |o_j| r_j}{\sum_j |o_j|}

    Hao et al. (arXiv:2505.23585): the baseline of least variance, if a completion's squared gradient is as long as the
    completion. Made for on-policy training. verl's `opo` is the same.

    Args:
        rewards: [P, G] total rewards, NaN where not applicable.
        lengths: [P, G] tokens of each completion, at least 1.

    Returns:
        [P, G]; exactly 0 in a group of equal rewards. They sum to 0 when weighted by length.

    Raises:
        ValueError: as `group_advantages`.
    """
    rewards = _checked(rewards)
    known = torch.where(rewards.isnan(), torch.zeros_like(rewards), lengths.to(rewards.dtype))
    baseline = (known * rewards.nan_to_num(nan=0.0)).sum(dim=1, keepdim=True) / known.sum(dim=1, keepdim=True).clamp(
        min=1
    )
    return _only_where_rewards_differ(rewards - baseline, rewards)


def remax_advantages(
    rewards: torch.Tensor, greedy_rewards: torch.Tensor, addends: torch.Tensor | None = None
) -> torch.Tensor:
    r"""ReMax: the baseline is the reward of the prompt's greedy completion.

    .. math:: A_i = r_i - r_{greedy}

    Li et al. (arXiv:2310.10505), one sampled completion a prompt; verl's `remax` has several. No completion is in its
    own baseline, so that the gradient is unbiased. A group of equal rewards does have advantages, where the greedy
    completion has another.

    Args:
        rewards: [P, G] total rewards, NaN where not applicable; G may be 1.
        greedy_rewards: [P], NaN where not applicable.
        addends: [P, G + 1], what these, the greedy one last, were added up from; see `settled`.

    Returns:
        [P, G]; exactly 0 where a reward is the greedy one's, and where either does not apply.

    Raises:
        ValueError: if the shapes do not go together.
    """
    if rewards.dim() != 2 or rewards.size(1) < 1 or greedy_rewards.shape != rewards.shape[:1]:
        raise ValueError(
            "rewards must be [prompts, completions] and the greedy ones [prompts], got shapes "
            f"{tuple(rewards.shape)} and {tuple(greedy_rewards.shape)}."
        )
    both = settled(torch.cat([rewards, greedy_rewards.unsqueeze(1)], dim=1), addends)  # [P, G + 1]
    return (both[:, :-1] - both[:, -1:]).nan_to_num(nan=0.0)


def gradient_energies(logprobs: torch.Tensor, sum_squares: torch.Tensor) -> torch.Tensor:
    r"""Squared length of the gradient of a token's log-probability by the logits.

    .. math:: \| e_{o_t} - \pi \|^2 = 1 - 2 \pi(o_t) + \sum_v \pi(v)^2

    The "logit-gradient proxy" of arXiv:2602.07078, which takes a forward pass alone.

    Args:
        logprobs: of the tokens, any shape.
        sum_squares: the sum of the squared probabilities of the vocabulary at each, same shape:
            exp(logsumexp(2 z) - 2 logsumexp(z)) of logits z at the sampling temperature; verl's `sum_pi_squared`.

    Returns:
        Same shape, from 0 to 2.
    """
    return (1 - 2 * logprobs.exp() + sum_squares).clamp(min=0)


def optimal_token_advantages(rewards: torch.Tensor, energies: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    r"""The optimal token baseline: at each position the group's mean, in which a completion counts by its energy.

    .. math:: A_{i, t} = r_i - \frac{\sum_j W_{j, t} r_j}{\sum_j W_{j, t}},\quad
              W_{j, t} = \sum_{s \leq t} (\| \nabla \log \pi(o_{j, s}) \|^2 + 10^{-8})

    Li et al. (arXiv:2602.07078): the baseline of least variance for each token, over the completions that reach it;
    verl's `optimal_token_baseline`. A position that one completion alone reaches has nothing to be compared with.
    There the baseline stays what it was at the last position of two; verl has 0, so that the end of the longest
    completion is rewarded as it stands, even in a group of equal rewards.

    Args:
        rewards: [P, G] total rewards, NaN where not applicable.
        energies: [P, G, T] of each token (`gradient_energies`), anything past the completion's end. Where
            `rollout_correction` weighs tokens, times the weight's square.
        lengths: [P, G] tokens of each completion, at most T.

    Returns:
        [P, G, T]; 0 past a completion's end; exactly 0 in a group of equal rewards.

    Raises:
        ValueError: if the energies are not one for each token, or as `group_advantages`.
    """
    rewards = _checked(rewards)
    if energies.dim() != 3 or energies.shape[:2] != rewards.shape:
        raise ValueError(
            f"energies must be [prompts, completions, tokens], got shape {tuple(energies.shape)} beside rewards of "
            f"{tuple(rewards.shape)}."
        )
    is_token = torch.arange(energies.size(2)) < lengths.unsqueeze(2)  # [P, G, T]
    counts = is_token & ~rewards.isnan().unsqueeze(2)
    spent = torch.where(is_token, energies + ENERGY_EPS, torch.zeros_like(energies)).cumsum(dim=2) * counts
    totals = (spent * rewards.nan_to_num(nan=0.0).unsqueeze(2)).sum(dim=1)  # [P, T]
    baselines = totals / spent.sum(dim=1).clamp(min=torch.finfo(spent.dtype).tiny)
    num_compared = (counts.sum(dim=1) >= 2).sum(dim=1, keepdim=True)  # [P, 1] positions of two or more
    places = torch.minimum(torch.arange(energies.size(2)), (num_compared - 1).clamp(min=0))  # [P, T]
    advantages = rewards.unsqueeze(2) - baselines.gather(1, places).unsqueeze(1)
    teaches = has_reward_variance(rewards).view(-1, 1, 1) & counts
    return torch.where(teaches, advantages, torch.zeros_like(advantages))


def _compared(estimate: Callable[[RewardTable, str], torch.Tensor], table: RewardTable, scale: str) -> torch.Tensor:
    """The advantages [P, G] or [P, G, T] of an estimator, each relative to the completions that the same functions
    applied to."""
    advantages = estimate(table.comparable(), scale)
    return advantages.view(len(table.totals), -1, *advantages.shape[1:]).sum(dim=1)


def _compared_in_batch(
    estimate: Callable[[RewardTable, str], torch.Tensor], table: RewardTable, scale: str
) -> torch.Tensor:
    """As `_compared`, for an estimator that has no groups: all completions of the batch are one."""
    _checked(table.totals)
    batch = RewardTable(
        totals=table.totals.reshape(1, -1),
        parts=table.parts.flatten(0, 1).unsqueeze(0),
        weights=table.weights,
        lengths=table.lengths.reshape(1, -1),
    )
    return _compared(estimate, batch, scale).view(table.totals.shape)


ADVANTAGE_ESTIMATORS: dict[str, Callable[[RewardTable, str], torch.Tensor]] = {
    "grpo": partial(_compared, lambda table, scale: group_advantages(table.totals, scale)),  # type: ignore[arg-type]
    "rloo": partial(_compared, lambda table, scale: leave_one_out_advantages(table.totals, scale)),  # type: ignore[arg-type]
    "reinforce_plus_plus": partial(_compared_in_batch, lambda table, _: whitened_advantages(table.totals)),
    "reinforce_plus_plus_baseline": partial(_compared, lambda table, _: whitened_group_advantages(table.totals)),
    "gdpo": partial(_compared, lambda table, _: decoupled_advantages(table.parts, table.weights)),
    "passk": partial(_compared, lambda table, scale: best_of_group_advantages(table.totals, scale)),  # type: ignore[arg-type]
    "opo": partial(_compared, lambda table, _: optimal_baseline_advantages(table.totals, table.lengths)),
    "remax": partial(_compared, lambda table, _: _remax(table)),
    "optimal_token_baseline": partial(_compared, lambda table, _: _optimal_token_baseline(table)),
}
"""`advantage_estimator` to the advantages [P, G], of tokens [P, G, T], under a `scale_rewards`, each among the
completions that the same functions applied to; `catalog.ESTIMATORS` says which go together. `remax` needs a table with
`greedy_parts`, and `optimal_token_baseline` one with `energies`, which may be of one rank: it looks at no other group.
"""


def _remax(table: RewardTable) -> torch.Tensor:
    if table.greedy_parts is None:
        raise ValueError("The baseline of `remax` is a greedy completion of each prompt, whose rewards are missing.")
    weighted = torch.cat([table.parts, table.greedy_parts.unsqueeze(1)], dim=1) * table.weights  # [P, G + 1, F]
    applies = ~table.greedy_parts.isnan() & (table.weights != 0)  # [P, F]
    greedy_totals = weighted[:, -1].nansum(dim=-1).masked_fill(~applies.any(dim=-1), torch.nan)  # [P]
    return remax_advantages(table.totals, greedy_totals, weighted.abs().nansum(dim=-1))


def _optimal_token_baseline(table: RewardTable) -> torch.Tensor:
    if table.energies is None:
        raise ValueError("`optimal_token_baseline` needs the energies of the tokens.")
    return optimal_token_advantages(table.totals, table.energies, table.lengths)


def _checked(rewards: torch.Tensor) -> torch.Tensor:
    if rewards.dim() != 2 or rewards.size(1) < 2:
        raise ValueError(f"rewards must be [prompts, completions >= 2], got shape {tuple(rewards.shape)}.")
    return settled(rewards)


def _only_where_rewards_differ(advantages: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Exact zeros for what teaches nothing: rounding in a mean would leave 1e-8, which a division then blows up."""
    teaches = has_reward_variance(rewards).unsqueeze(1) & ~rewards.isnan()
    return torch.where(teaches, advantages, torch.zeros_like(advantages))


def _divided(advantages: torch.Tensor, rewards: torch.Tensor, scale_rewards: str) -> torch.Tensor:
    if scale_rewards == "group":
        return advantages / (_nanstd(rewards, dim=1).unsqueeze(1) + STD_EPS)
    if scale_rewards == "batch":
        return advantages / (_nanstd(rewards.flatten(), dim=0) + STD_EPS)
    if scale_rewards == "none":
        return advantages
    raise ValueError(f"scale_rewards is {scale_rewards!r}; it is one of group, batch, none.")


def _whitened(centred: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Divided by the deviation over the batch of those that count; their mean is 0 already."""
    return centred / (_nanstd(torch.where(counts, centred, torch.nan).flatten(), dim=0) + STD_EPS)


def _nanstd(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sample standard deviation without NaNs; 0 where fewer than two values are left."""
    count = (~values.isnan()).sum(dim=dim)
    squares = (values - values.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim)
    return torch.where(count > 1, squares / (count - 1).clamp(min=1), torch.zeros_like(squares)).sqrt()
