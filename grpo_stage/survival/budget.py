"""An end of a run by what it has spent: how `grpo-stage sweep` gives runs of different settings equal budgets.

The budget comes in a variable of the environment, which also reaches the processes that torchrun starts.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from transformers import TrainerCallback


VARIABLE = "GRPO_STAGE_BUDGET"
Unit = Literal["tokens", "steps", "seconds"]


@dataclass(frozen=True, slots=True)
class Budget:
    """How much a run may spend."""

    unit: Unit
    """`tokens`: prompt and completion tokens that were sampled, the prompt's once for each completion, over all ranks
    (the metric `num_tokens`). `steps`: optimizer steps. `seconds`: the time in steps, without the start, evaluations
    and checkpoints (the sum of the metric `step_time`)."""
    limit: int

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read `tokens=2e6`.

        Raises:
            ValueError: if the text is no budget.
        """
        unit, _, number = text.partition("=")
        try:
            limit = float(number)
        except ValueError:
            limit = 0.0
        if unit not in get_args(Unit) or not 1 <= limit < 1e18:
            raise ValueError(
                f"`{text}` is no budget. Write one of {', '.join(f'`{one}=N`' for one in get_args(Unit))} with N of "
                "at least 1, such as `tokens=2e6`."
            )
        return cls(cast(Unit, unit), int(limit))

    def __str__(self) -> str:
        return f"{self.unit}={self.limit}"

    def spent(self, lines: Sequence[Mapping[str, Any]]) -> list[float]:
        """What a run had spent at each of its log lines, which are one a step.

        Args:
            lines: of training steps alone, from the run's first step on.
        """
        if self.unit == "tokens":
            return [float(line["num_tokens"]) for line in lines]
        spent, total = [], 0.0
        for line in lines:
            total += 1.0 if self.unit == "steps" else float(line["step_time"])
            spent.append(total)
        return spent


def is_step(line: Mapping[str, Any]) -> bool:
    """Whether a log line is that of a training step: not an evaluation's, nor the run's last."""
    return "num_tokens" in line and "step_time" in line


class BudgetCallback(TrainerCallback):
    """Ends the training with the first step that reaches the budget. `logging_steps` has to be 1."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        spent = self._budget.spent([line for line in state.log_history if is_step(line)])
        if spent and spent[-1] >= self._budget.limit:
            control.should_training_stop = True


def budget_callbacks() -> list[TrainerCallback]:
    """The callback of the budget that this process was started with; none without one."""
    text = os.environ.get(VARIABLE)
    return [BudgetCallback(Budget.parse(text))] if text else []
