"""Group-relative advantages: how much better a completion is than the others of its prompt.

P prompts    G completions a prompt (a group)
"""

from typing import Literal

import torch


STD_EPS = 1e-4
"""Added to the standard deviation. TRL uses 1e-4 too, verl 1e-6, OpenRLHF 1e-9; all divide by the sample
standard deviation (ddof=1)."""


def group_advantages(
    rewards: torch.Tensor, scale_rewards: Literal["group", "batch", "none"] = "group"
) -> torch.Tensor:
    r"""Advantages of completions relative to their group.

    .. math:: A_{i} = (r_{i} - mean(r)) / (std(r) + 1e-4)

    The mean is always the group's. `scale_rewards` says whose standard deviation divides: the group's (DeepSeekMath,
    arXiv:2402.03300, outcome supervision), that of all rewards given (`batch`), or nothing (`none`: Dr. GRPO,
    arXiv:2503.20783, which argues that dividing by the group's favours questions that are too easy or too hard).

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
    if rewards.dim() != 2 or rewards.size(1) < 2:
        raise ValueError(f"rewards must be [prompts, completions >= 2], got shape {tuple(rewards.shape)}.")
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards is {scale_rewards!r}; it is one of group, batch, none.")

    centred = rewards - rewards.nanmean(dim=1, keepdim=True)  # [P, G]
    # Rounding in the mean would leave 1e-8 in a group of equal rewards, which the division then blows up.
    centred = torch.where(has_reward_variance(rewards).unsqueeze(1), centred, torch.zeros_like(centred))
    if scale_rewards == "group":
        centred = centred / (_nanstd(rewards, dim=1).unsqueeze(1) + STD_EPS)
    elif scale_rewards == "batch":
        centred = centred / (_nanstd(rewards.flatten(), dim=0) + STD_EPS)
    return torch.where(rewards.isnan(), torch.zeros_like(centred), centred)


def has_reward_variance(rewards: torch.Tensor) -> torch.Tensor:
    """[P] bool: groups with at least two different rewards. The others teach nothing. `rewards` is [P, G]."""
    highest = rewards.nan_to_num(nan=-torch.inf).amax(dim=1)
    lowest = rewards.nan_to_num(nan=torch.inf).amin(dim=1)
    return highest > lowest


def _nanstd(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sample standard deviation without NaNs; 0 where fewer than two values are left."""
    count = (~values.isnan()).sum(dim=dim)
    squares = (values - values.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim)
    return torch.where(count > 1, squares / (count - 1).clamp(min=1), torch.zeros_like(squares)).sqrt()
