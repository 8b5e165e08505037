"""What built-in rewards get beside their settings."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from grpo_stage.rewards.code.grading import Graders
from grpo_stage.rewards.code.sandbox import BWRAP
from grpo_stage.rewards.workers.answer_checker import AnswerChecker


@dataclass(frozen=True)
class RewardContext:
    """The limits of a run, what decides in other processes, and the counters: one object for all built-in rewards."""

    max_new_tokens: int
    checker: AnswerChecker
    graders: Graders = field(default_factory=Graders)
    timeout_s: float = 600.0
    """For the completions of one rollout."""
    code_sandbox: str = BWRAP
    """Where programs run."""
    counters: Counter[str] = field(default_factory=Counter)

    def judge(
        self, name: str, completions: Sequence[str], references: Sequence[str], timeout_s: float
    ) -> list[float | None]:
        """1, 0 or None for each completion, each decided within `timeout_s`; time-outs are counted as `name`'s."""
        verdicts = self.checker.check(list(zip(completions, references, strict=True)), timeout_s)
        if timeouts := verdicts.count(None):
            self.counters[f"{name}/timeouts"] += timeouts
        return [None if verdict is None else float(verdict) for verdict in verdicts]
