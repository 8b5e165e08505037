"""The base class of monitors, and what a monitor is made from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grpo_stage.arguments import GRPOArguments
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.types import Prompt, RolloutEngine, RolloutGroup, ScoredGroup


Scores = Sequence[torch.Tensor]
"""One [T] for each completion, prompt-major."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorRequest:
    """A run as its monitors see it when they are made."""

    policy: nn.Module
    """The unwrapped model."""
    grpo_args: GRPOArguments
    prompts: Sequence[Prompt]
    """The dataset."""
    prompts_per_rollout: int
    """Over all ranks."""
    reward_names: Sequence[str]
    rank: int
    score: Callable[[Sequence[RolloutGroup]], Scores]
    """The trainer's log-probabilities of completions at temperature 1."""
    max_sampling_logprob_diff: float
    """As the recipe has it, or as the precision asks for."""
    tests_slope: bool
    """Whether that bound is too wide to find every fault."""


class Monitor:
    """Watches a run for one kind of fault. A subclass overrides the hooks that it needs; the others do nothing.

    A monitor says what it finds by a metric, by a warning (on rank 0), or by an error, which ends the run. Every rank
    calls each hook, so that a hook may gather. What is given is this rank's share.
    """

    def before_sleep(self, engine: RolloutEngine, groups: Sequence[RolloutGroup], version: int) -> None:
        """Called while the engine has the weights of `version` of the policy. It has just sampled `groups` from it;
        with `rollout_ahead` from the version before."""

    def after_sleep(self, groups: Sequence[RolloutGroup], version: int, metrics: MetricTracker) -> None:
        """Called once the engine has given up its memory, or samples ahead, and before the groups are scored."""

    def after_scoring(self, groups: Sequence[ScoredGroup], version: int, metrics: MetricTracker) -> None:
        """Called with the rewards of the same groups; what it adds to `metrics` is logged with the step."""

    def after_step(self, metrics: MetricTracker) -> None:
        """Called with the metrics of a step whose gradient is computed, before the weights change."""

    def state_dict(self) -> Any:
        """What a checkpoint keeps, ready for JSON."""

    def load_state_dict(self, state: Any) -> None:
        """Go on from what `state_dict` gave."""
