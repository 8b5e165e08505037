"""Prompts -> completions of the present policy -> their rewards, for training and evaluation."""

from collections.abc import Sequence

from torch import nn

from grpo_stage.arguments import GRPOArguments
from grpo_stage.monitors.canary import check_versions
from grpo_stage.rewards.suite import RewardSuite
from grpo_stage.survival.phase import Phases
from grpo_stage.types import (
    AheadEngine,
    Prompt,
    RolloutEngine,
    RolloutGroup,
    SamplingSettings,
    ScoredGroup,
    TrainingProgress,
)


class Sampler:
    """Samples and scores, each within its time limit.

    Args:
        engine: samples completions.
        rewards: score them.
        phases: limits what takes too long.
        grpo_args: the limits.
    """

    def __init__(self, engine: RolloutEngine, rewards: RewardSuite, phases: Phases, grpo_args: GRPOArguments) -> None:
        self.engine = engine
        self.rewards = rewards
        self.phases = phases
        self._grpo_args = grpo_args

    def sync(self, policy: nn.Module, version: int) -> None:
        """Have the engine sample from `policy` (unwrapped) from now on."""
        with self.phases.limited("sync", self._grpo_args.sync_timeout, "sync_timeout"):
            self.engine.sync(policy, version)

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int, version: int
    ) -> list[RolloutGroup]:
        """The groups of the prompts, in order.

        Args:
            prompts: those of this rank.
            sampling: how completions are drawn.
            step: the step that the seeds depend on.
            version: the policy's version.

        Raises:
            StaleRolloutError: if the completions come from another version.
        """
        with self.phases.limited("rollout", self._grpo_args.rollout_timeout, "rollout_timeout"):
            groups = self.engine.generate(prompts, sampling, step)
        check_versions(groups, version)
        return groups

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> None:
        """Have the engine begin with what `generate` does; only where it can sample ahead."""
        self._ahead.submit(prompts, sampling, step)

    def collect(self) -> tuple[list[RolloutGroup], float]:
        """The groups of the rollout that was submitted, and the seconds that the engine took for them."""
        with self.phases.limited("rollout", self._grpo_args.rollout_timeout, "rollout_timeout"):
            return self._ahead.collect()

    def discard(self) -> None:
        """Have the engine give up a rollout that was submitted."""
        self._ahead.discard()

    @property
    def _ahead(self) -> AheadEngine:
        assert isinstance(self.engine, AheadEngine), f"{type(self.engine).__name__} cannot sample ahead"
        return self.engine

    def score(self, groups: Sequence[RolloutGroup], progress: TrainingProgress) -> list[ScoredGroup]:
        """The groups with their rewards. Every rank must call it, if with no groups."""
        # A function in a worker process has a limit of its own; this one is for those in this process, together.
        limit = self._grpo_args.reward_timeout * (len(self.rewards.names) + 1)
        self.rewards.progress = progress
        with (
            self.phases.phase("reward", is_timed=False),
            self.phases.limited("reward", limit, "reward_timeout", is_interruptible=True),
        ):
            rewards = self.rewards.score(groups)  # [P][G][F]
        return [
            ScoredGroup(
                group=group,
                rewards=tuple(tuple(row) for row in group_rewards),
                total_rewards=tuple(self.rewards.total(row) for row in group_rewards),
            )
            for group, group_rewards in zip(groups, rewards, strict=True)
        ]
