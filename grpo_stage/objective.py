"""What the loss of a token is made of, and the coefficients that adapt from step to step.

B completions in a micro-batch    T completion tokens
"""

from collections.abc import Sequence
from typing import Any

import torch

from .algorithm.correction import correction_weights, off_policy_mask
from .algorithm.kl import KL_ESTIMATORS, adapted_coefficient, bias_corrected, k3
from .algorithm.losses import LOSSES, LossSettings, TokenInputs
from .arguments import GRPOArguments
from .distributed import all_gather
from .metrics import MetricTracker, record_update, used_tokens
from .types import PolicyBatch


class Objective:
    """The recipe's loss. Which one it is stands in tables, and not here."""

    def __init__(self, args: GRPOArguments) -> None:
        self.beta = args.beta
        """The weight of the KL, which changes with `kl_target`."""
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
    ) -> torch.Tensor:
        """The loss of each token of a micro-batch, [B, T]; `batch.loss_weights` average them.

        Args:
            batch: the micro-batch.
            logprobs: [B, T] of the policy, with gradient.
            entropy: [B, T] of the policy, for the log.
            old_logprobs: [B, T] of the policy at the start of the update.
            ref_logprobs: [B, T] of the reference, None without a KL.
            metrics: where what was seen is counted.
        """
        inputs = TokenInputs(logprobs, old_logprobs, batch.advantages, batch.completion_mask)
        surrogate = self._loss.surrogate(inputs, self._settings)
        losses = surrogate.token_losses
        for factor in self._policy_factors(batch, logprobs.detach(), old_logprobs, metrics):
            losses = losses * factor
        kl = None
        if ref_logprobs is not None:
            kl = k3(logprobs, ref_logprobs)
            if not self._args.kl_in_reward:
                losses = losses + self.beta * self._kl_loss(logprobs, old_logprobs, ref_logprobs)
        record_update(metrics, batch, surrogate, entropy, kl)
        return losses

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
        if self._args.kl_target is None:
            return
        metrics.add("beta", self.beta)
        measured = [state["means"]["kl"] for state in all_gather(metrics.state_dict())]
        count = sum(count for _, count in measured)
        if count > 0:
            kl = sum(total for total, _ in measured) / count
            self.beta = adapted_coefficient(self.beta, kl, self._args.kl_target)

    def state_dict(self) -> dict[str, Any]:
        """The coefficients, ready for JSON."""
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.beta = state["beta"]
