"""`entropy_coef`, `entropy_target`: the bonus for entropy in the loss, and the metric `entropy`."""

from typing import Any

import torch

from grpo_stage.algorithm.exploration import adapted_entropy_coefficient
from grpo_stage.arguments import GRPOArguments
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.update.terms.term import Term, TermInputs


class EntropyBonus(Term):
    """Always in the objective, since the entropy is always logged. See `adapted_entropy_coefficient`."""

    def __init__(self, args: GRPOArguments) -> None:
        self.entropy_gradient = args.entropy_coef > 0 or args.entropy_target is not None  # type: ignore[misc]
        self.acts_without_advantage = self.entropy_gradient  # type: ignore[misc]
        self._coefficient = args.entropy_coef
        self._is_low = args.entropy_target is None  # a target is first compared after a step has measured the entropy
        self._args = args

    @staticmethod
    def of(args: GRPOArguments) -> Term | None:
        return EntropyBonus(args)

    @property
    def coefficient(self) -> float:
        """The bonus for a nat of entropy in this step."""
        return self._coefficient if self._is_low else 0.0

    def summand(self, x: TermInputs, metrics: MetricTracker) -> torch.Tensor | None:
        x.record_mean(metrics, "entropy", x.entropy)
        return -(self.coefficient * x.entropy) if self.entropy_gradient else None

    def adapt(self, metrics: MetricTracker) -> None:
        args = self._args
        if args.entropy_target is None:
            return
        metrics.add("entropy_coef", self.coefficient)
        entropy = metrics.mean_over_ranks("entropy")
        if entropy is not None:
            self._coefficient = adapted_entropy_coefficient(
                self._coefficient, entropy, args.entropy_target, args.entropy_coef_delta, args.entropy_coef_max
            )
            self._is_low = entropy <= args.entropy_target

    def state_dict(self) -> dict[str, Any]:
        return {"entropy_coef": self._coefficient, "is_entropy_low": self._is_low, "entropy_keys": self._keys}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["entropy_keys"] == self._keys:  # not where a recovery has set others
            self._coefficient, self._is_low = state["entropy_coef"], state["is_entropy_low"]

    @property
    def _keys(self) -> list[float | None]:
        return [self._args.entropy_coef, self._args.entropy_target]
