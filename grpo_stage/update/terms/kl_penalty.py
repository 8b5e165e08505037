"""`beta` and its keys: the KL to the reference, added to the loss or taken off the reward, and the metric `kl`."""

from collections.abc import Sequence
from typing import Any

import torch

from grpo_stage.algorithm.kl import KL_ESTIMATORS, adapted_coefficient, bias_corrected, k3
from grpo_stage.arguments import GRPOArguments
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.update.terms.term import Term, TermInputs


class KLPenalty(Term):
    """See `algorithm.kl`. The metric is k3, whichever estimator the loss uses."""

    def __init__(self, args: GRPOArguments) -> None:
        self.acts_without_advantage = not args.kl_in_reward or args.kl_target is not None  # type: ignore[misc]
        self.beta = args.beta
        """The weight of the KL, which changes with `kl_target`."""
        self._args = args
        self._estimate = KL_ESTIMATORS[args.kl_estimator]

    @staticmethod
    def of(args: GRPOArguments) -> Term | None:
        return KLPenalty(args) if args.beta > 0 else None

    def summand(self, x: TermInputs, metrics: MetricTracker) -> torch.Tensor | None:
        if (ref_logprobs := x.batch.ref_logprobs) is None:  # of a dummy batch
            return None
        x.record_mean(metrics, "kl", k3(x.logprobs.detach(), ref_logprobs))
        if self._args.kl_in_reward:
            return None
        kl = self._estimate(x.logprobs, ref_logprobs)
        if self._args.use_bias_correction_kl:
            kl = bias_corrected(kl, x.logprobs, x.old_logprobs)
        return self.beta * kl

    def reward_penalties(
        self, old_logprobs: Sequence[torch.Tensor], ref_logprobs: Sequence[torch.Tensor]
    ) -> list[float]:
        return [
            self.beta * self._estimate(policy.double(), ref.double()).sum().item()
            for policy, ref in zip(old_logprobs, ref_logprobs, strict=True)
        ]

    def adapt(self, metrics: MetricTracker) -> None:
        if self._args.kl_target is None:
            return
        metrics.add("beta", self.beta)
        kl = metrics.mean_over_ranks("kl")
        self.beta = self.beta if kl is None else adapted_coefficient(self.beta, kl, self._args.kl_target)

    def state_dict(self) -> dict[str, Any]:
        return {"beta": self.beta, "first_beta": self._args.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("first_beta") == self._args.beta:  # not where a recovery has set another one
            self.beta = state["beta"]
