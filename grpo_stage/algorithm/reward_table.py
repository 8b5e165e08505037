"""The rewards of one generation, and which of them differ.

P prompts    G completions a prompt (a group)    F reward functions
"""

from dataclasses import dataclass

import torch


REWARD_TOLERANCE = 1e-9
"""Relative difference up to which two rewards are equal, as that of Python's `math.isclose`. It is relative to what
the rewards were added up from: 1e-6 and 2e-6 differ as 1 and 2 do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTable:
    """The rewards of one generation, over all ranks."""

    totals: torch.Tensor
    """[P, G], weighted sums, NaN where no function applied."""
    parts: torch.Tensor
    """[P, G, F], unweighted, NaN where a function does not apply."""
    weights: torch.Tensor
    """[F]."""
    lengths: torch.Tensor
    """[P, G], tokens of each completion."""
    greedy_parts: torch.Tensor | None = None
    """[P, F], unweighted rewards of each prompt's greedy completion, NaN where a function does not apply (`remax`)."""
    energies: torch.Tensor | None = None
    """[P, G, T], `gradient_energies` of each token (`optimal_token_baseline`)."""

    def comparable(self) -> "RewardTable":
        """The table with S rows in the place of each, [P * S, G], one for each of the S sets of functions that applied
        to a completion somewhere: a row has the rewards of the completions of one set, settled, and NaN elsewhere."""
        applies = ~self.parts.isnan() & (self.weights != 0)  # [P, G, F]
        sets, own = applies.flatten(0, 1).unique(dim=0, return_inverse=True)  # [S, F], [P * G]
        absent = own.view(-1, 1, self.totals.size(1)) != torch.arange(len(sets)).view(1, -1, 1)  # [P, S, G]
        absent = absent.flatten(0, 1)  # [P * S, G]
        totals, parts, lengths, greedy, energies = (
            None if each is None else each.repeat_interleave(len(sets), dim=0)
            for each in (self.totals, self.parts, self.lengths, self.greedy_parts, self.energies)
        )
        assert totals is not None
        assert parts is not None
        assert lengths is not None
        if greedy is not None:
            theirs = sets.repeat(len(self.totals), 1)  # [P * S, F]
            differs = ((~greedy.isnan() & (self.weights != 0)) != theirs).any(dim=1, keepdim=True)  # [P * S, 1]
            greedy = greedy.masked_fill(differs, torch.nan)
        addends = (parts * self.weights).abs().nansum(dim=-1)  # [P * S, G]
        return RewardTable(
            totals=settled(totals.masked_fill(absent, torch.nan), addends),
            parts=parts.masked_fill(absent.unsqueeze(-1), torch.nan),
            weights=self.weights,
            lengths=lengths,
            greedy_parts=greedy,
            energies=energies,
        )


def settled(rewards: torch.Tensor, addends: torch.Tensor | None = None) -> torch.Tensor:
    """Rewards of which those are equal, bit by bit, that differ by rounding alone.

    Of two neighbors in a group's order the higher becomes the lower one where they differ by no more than
    `REWARD_TOLERANCE` times the larger of what they were added up from.

    Args:
        rewards: [P, G], NaN where not applicable.
        addends: [P, G], the sum of the magnitudes that a reward was added up from, which is above its own where they
            cancel; by default its own.

    Returns:
        [P, G].
    """
    sizes = rewards.abs() if addends is None else torch.maximum(rewards.abs(), addends)
    ordered, order = rewards.sort(dim=1)  # NaN comes last
    sizes = sizes.gather(1, order)
    is_new = ordered.diff(dim=1) > REWARD_TOLERANCE * torch.maximum(sizes[:, 1:], sizes[:, :-1])  # [P, G - 1]
    is_new |= ordered[:, 1:].isnan()
    places = torch.arange(rewards.size(1)).expand_as(rewards)
    first = torch.cat([places[:, :1], places[:, 1:] * is_new], dim=1).cummax(dim=1).values
    return torch.empty_like(rewards).scatter(1, order, ordered.gather(1, first))


def has_reward_variance(rewards: torch.Tensor, min_range: float = 0.0) -> torch.Tensor:
    """[P] bool: groups with at least two different rewards. The others teach nothing. `rewards` is [P, G].

    With a `min_range`, two rewards have to be further apart than that, and not by rounding alone.
    """
    rewards = settled(rewards)
    highest = rewards.nan_to_num(nan=-torch.inf).amax(dim=1)
    lowest = rewards.nan_to_num(nan=torch.inf).amin(dim=1)
    rounding = REWARD_TOLERANCE * torch.maximum(highest.abs(), lowest.abs())
    return highest - lowest > min_range + rounding


def tells_apart(table: RewardTable, function: int | None = None, min_range: float = 0.0) -> torch.Tensor:
    r"""Groups in which rewards of the same kind are far enough from each other.

    .. math:: \max_i r_i - \min_i r_i > min\_range

    DAPO (arXiv:2503.14476) leaves out groups of equal accuracy; verl's `filter_groups.metric` chooses what counts. A
    bound above 0 leaves out near ties as well, of which a division by the group's deviation makes as much as of
    others.

    Args:
        table: the rewards.
        function: whose reward counts, unweighted, over the completions that it applies to; the total of completions
            that the same functions applied to if None.
        min_range: at least 0. A range that is above it by rounding alone is not (`REWARD_TOLERANCE`).

    Returns:
        [P] bool.
    """
    rewards = table.comparable().totals if function is None else table.parts[..., function]
    return has_reward_variance(rewards, min_range).view(len(table.totals), -1).any(dim=1)
