"""What the loss of a token is made of, and the coefficients that adapt from step to step.

B completions in a micro-batch    T completion tokens
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grpo_stage.algorithm.correction import correction_weights, off_policy_mask
from grpo_stage.algorithm.exploration import (
    adapted_entropy_coefficient,
    clip_cov_tokens,
    highest_entropy_tokens,
    kl_cov_tokens,
    token_covariances,
)
from grpo_stage.algorithm.kl import KL_ESTIMATORS, adapted_coefficient, bias_corrected, k3
from grpo_stage.algorithm.losses import LOSSES, LossSettings, TokenInputs
from grpo_stage.arguments import GRPOArguments
from grpo_stage.distributed import all_gather, process_index
from grpo_stage.records.metrics import MetricTracker, record_update, used_tokens
from grpo_stage.types import PolicyBatch


@dataclass(frozen=True, slots=True)
class TokenSelection:
    """Of each completion of this rank, one float a token; empty for those that the loss leaves out."""

    learned: tuple[torch.Tensor, ...]
    """1 where the policy learns from the token."""
    held: tuple[torch.Tensor, ...]
    """1 where the token is held to its old log-probability."""


class Objective:
    """The recipe's loss. Which one it is stands in tables, and not here."""

    def __init__(self, args: GRPOArguments) -> None:
        self.beta = args.beta
        """The weight of the KL, which changes with `kl_target`."""
        self.pays_entropy = args.entropy_coef > 0 or args.entropy_target is not None
        """True where the gradient flows through the entropy."""
        self._entropy_coef = args.entropy_coef
        self._is_entropy_low = args.entropy_target is None  # a target is compared with what was measured
        self._args = args
        self._loss = LOSSES[args.loss_type]
        self._settings = LossSettings(
            epsilon=args.epsilon,
            epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
            delta=args.delta,
            importance_sampling_level=args.importance_sampling_level,
            sapo_temperature_pos=args.sapo_temperature_pos,
            sapo_temperature_neg=args.sapo_temperature_neg,
        )

    def token_losses(
        self,
        batch: PolicyBatch,
        logprobs: torch.Tensor,
        entropy: torch.Tensor,
        old_logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor | None,
        metrics: MetricTracker,
        learned: torch.Tensor | None = None,
        held: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of each token of a micro-batch, [B, T]; `batch.loss_weights` average them.

        Args:
            batch: the micro-batch.
            logprobs: [B, T] of the policy, with gradient.
            entropy: [B, T] of the policy, with gradient where it is paid.
            old_logprobs: [B, T] of the policy at the start of the update.
            ref_logprobs: [B, T] of the reference, None without a KL.
            metrics: where what was seen is counted.
            learned: [B, T], 1 on the tokens that `select` leaves in the policy's loss; None for all.
            held: [B, T], 1 on the tokens that `select` holds to their old log-probability; None for none.
        """
        inputs = TokenInputs(logprobs, old_logprobs, batch.advantages, batch.completion_mask)
        surrogate = self._loss.surrogate(inputs, self._settings)
        losses = surrogate.token_losses
        for factor in self._policy_factors(batch, logprobs.detach(), old_logprobs, metrics):
            losses = losses * factor
        used = used_tokens(batch)
        if learned is not None:
            metrics.add("token_selection/learned_frac", (learned * used).sum(), used.sum())
            losses = losses * learned
        if held is not None:
            metrics.add("token_selection/held_frac", (held * used).sum(), used.sum())
            losses = losses + self._args.kl_cov_coef * held * (logprobs - old_logprobs).abs()
        if self.pays_entropy:
            losses = losses - self.entropy_coef * entropy
        kl = None
        if ref_logprobs is not None:
            kl = k3(logprobs, ref_logprobs)
            if not self._args.kl_in_reward:
                losses = losses + self.beta * self._kl_loss(logprobs, old_logprobs, ref_logprobs)
        record_update(metrics, batch, surrogate, entropy.detach(), kl)
        return losses

    @property
    def entropy_coef(self) -> float:
        """What a nat of entropy is paid in this step."""
        return self._entropy_coef if self._is_entropy_low else 0.0

    @property
    def selects(self) -> bool:
        """True where `select` is to be asked before a step."""
        return self._args.top_entropy_quantile < 1 or self._args.covariance_control != "none"

    def select(
        self,
        logprobs: Sequence[torch.Tensor],
        entropies: Sequence[torch.Tensor],
        advantages: Sequence[float],
        used: Sequence[bool],
        keys: Sequence[str],
        step: int,
        seed: int,
    ) -> TokenSelection:
        """Which tokens of this rank the policy learns from, by statistics over all ranks, each of which calls this.

        Args:
            logprobs: of the present policy, one tensor a completion.
            entropies: likewise.
            advantages: of each completion.
            used: False for the completions that the loss leaves out.
            keys: what a completion is known by. What is drawn of it depends on this, `step` and `seed` alone: not on
                the order of completions, nor on how many ranks share them.
            step: the optimizer step.
            seed: the run's.
        """
        lengths = [len(tokens) if is_used else 0 for tokens, is_used in zip(logprobs, used, strict=True)]
        mine = [
            torch.cat([torch.zeros(0), *(tokens[:n] for tokens, n in zip(each, lengths, strict=True))])
            for each in (
                logprobs,
                entropies,
                [torch.full((n,), advantage) for n, advantage in zip(lengths, advantages, strict=True)],
                [_draws(n, f"{seed} {step} {key}") for n, key in zip(lengths, keys, strict=True)],
            )
        ]
        ranks = all_gather(mine)
        all_logprobs, all_entropies, all_advantages, draws = (torch.cat(each) for each in zip(*ranks, strict=True))
        learned = torch.ones_like(all_logprobs, dtype=torch.bool)
        held = torch.zeros_like(learned)
        if self._args.top_entropy_quantile < 1:
            learned &= highest_entropy_tokens(all_entropies, self._args.top_entropy_quantile)
        if self._args.covariance_control != "none" and len(all_logprobs) > 0:
            covariances = token_covariances(all_logprobs, all_advantages)
            if self._args.covariance_control == "clip_cov":
                bounds = self._args.clip_cov_min, self._args.clip_cov_max
                learned &= ~clip_cov_tokens(covariances, self._args.covariance_frac, *bounds, draws)
            else:
                held = kl_cov_tokens(covariances, self._args.covariance_frac, draws)
        first = sum(len(rank[0]) for rank in ranks[: process_index()])
        own = slice(first, first + len(mine[0]))
        return TokenSelection(
            learned=tuple(learned[own].float().split(lengths)), held=tuple(held[own].float().split(lengths))
        )

    def _policy_factors(
        self, batch: PolicyBatch, logprobs: torch.Tensor, old_logprobs: torch.Tensor, metrics: MetricTracker
    ) -> list[torch.Tensor]:
        """What the policy's loss is multiplied with, and the KL is not; each [B, T] or [B, 1]."""
        args, factors, used = self._args, [], used_tokens(batch)
        if args.rollout_correction != "none":
            weights = correction_weights(
                old_logprobs,
                batch.sampling_logprobs,
                batch.completion_mask,
                level=args.rollout_correction,
                mode=args.rollout_correction_mode,
                lower=args.rollout_correction_min,
                upper=args.rollout_correction_max,
            )
            metrics.add("rollout_correction/weight_mean", (weights * used).sum(), used.sum())
            outside = (weights <= args.rollout_correction_min) | (weights >= args.rollout_correction_max)
            metrics.add("rollout_correction/bounded_frac", (outside * used).sum(), used.sum())
            factors.append(weights)
        if args.off_policy_mask_threshold is not None:
            kept = off_policy_mask(
                logprobs,
                batch.sampling_logprobs,
                batch.advantages,
                batch.completion_mask,
                args.off_policy_mask_threshold,
            )
            completions = used.amax(dim=1, keepdim=True)  # [B, 1]
            metrics.add("off_policy_masked_frac", ((1 - kept) * completions).sum(), completions.sum())
            factors.append(kept)
        return factors

    def _kl_loss(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
        kl = KL_ESTIMATORS[self._args.kl_estimator](logprobs, ref_logprobs)
        return bias_corrected(kl, logprobs, old_logprobs) if self._args.use_bias_correction_kl else kl

    def reward_penalty(self, logprobs: Sequence[torch.Tensor], ref_logprobs: Sequence[torch.Tensor]) -> list[float]:
        """What `kl_in_reward` takes off the reward of each completion, given its tokens' log-probabilities."""
        estimate = KL_ESTIMATORS[self._args.kl_estimator]
        return [
            self.beta * estimate(policy.double(), ref.double()).sum().item()
            for policy, ref in zip(logprobs, ref_logprobs, strict=True)
        ]

    def adapt(self, metrics: MetricTracker) -> None:
        """Change the coefficients by what a step has measured on all ranks, each of which calls this."""
        args = self._args
        if args.kl_target is not None:
            metrics.add("beta", self.beta)
            kl = _mean_over_ranks(metrics, "kl")
            self.beta = self.beta if kl is None else adapted_coefficient(self.beta, kl, args.kl_target)
        if args.entropy_target is not None:
            metrics.add("entropy_coef", self.entropy_coef)
            entropy = _mean_over_ranks(metrics, "entropy")
            if entropy is not None:
                self._entropy_coef = adapted_entropy_coefficient(
                    self._entropy_coef, entropy, args.entropy_target, args.entropy_coef_delta, args.entropy_coef_max
                )
                self._is_entropy_low = entropy <= args.entropy_target

    def state_dict(self) -> dict[str, Any]:
        """The coefficients, ready for JSON."""
        return {
            "beta": self.beta,
            "entropy_coef": self._entropy_coef,
            "is_entropy_low": self._is_entropy_low,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.beta = state["beta"]
        self._entropy_coef, self._is_entropy_low = state["entropy_coef"], state["is_entropy_low"]


def _draws(length: int, key: str) -> torch.Tensor:
    """[length] random numbers, in float64 for none to be equal, that depend on `key` alone."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
    return torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _mean_over_ranks(metrics: MetricTracker, name: str) -> float | None:
    """None where no rank has counted anything."""
    measured = [state["means"][name] for state in all_gather(metrics.state_dict())]
    count = sum(count for _, count in measured)
    return sum(total for total, _ in measured) / count if count > 0 else None
