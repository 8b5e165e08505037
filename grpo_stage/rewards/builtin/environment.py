"""The reward that an environment gives itself: `environment`."""

from collections.abc import Callable, Sequence

from grpo_stage.rewards.builtin.context import RewardContext


def environment(context: RewardContext) -> Callable[..., list[float | None]]:
    """What `get_reward()` of the completion's environment returned at its end.

    Range: any. None where it returned None, and where the environment was ended because a call took too long or ended
    its process.
    """

    def score(environment_rewards: Sequence[float | None]) -> list[float | None]:
        return list(environment_rewards)

    return score
