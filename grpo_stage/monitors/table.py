"""The monitors and watches of a run: each is one file and one row."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from grpo_stage.monitors.alarm import Watch
from grpo_stage.monitors.canary import LogprobDifference, ProbeDifference
from grpo_stage.monitors.dead_groups import DeadGroups, GroupOutcomes
from grpo_stage.monitors.divergence import KLExplosion, RatioExplosion
from grpo_stage.monitors.engine_drift import EngineDrift
from grpo_stage.monitors.entropy import EntropyCollapse, EntropyExplosion
from grpo_stage.monitors.gradients import GradientSpikes
from grpo_stage.monitors.language import LanguageMixing, MixedLanguages
from grpo_stage.monitors.lengths import LengthExplosion, Truncation
from grpo_stage.monitors.memory_growth import MemoryGrowth
from grpo_stage.monitors.monitor import Monitor, MonitorRequest
from grpo_stage.monitors.one_answer import AnswerDiversity, OneAnswer
from grpo_stage.monitors.repetition import Repetition, Repetitions
from grpo_stage.monitors.reward_collapse import RewardCollapse
from grpo_stage.monitors.reward_hacking import PaidCompletions, PaidLength, RewardHacking, SharedTexts
from grpo_stage.monitors.slope_test import SlopeTest
from grpo_stage.monitors.slow_rewards import SlowRewards
from grpo_stage.monitors.unrewarded import UnrewardedRollouts


MONITORS: Mapping[str, Callable[[MonitorRequest], Monitor | None]] = MappingProxyType(
    {
        "logprob_difference": LogprobDifference.of,
        "probe_difference": ProbeDifference.of,
        "slope_test": SlopeTest.of,
        "unrewarded": UnrewardedRollouts.of,
        "group_outcomes": GroupOutcomes.of,
        "answer_diversity": AnswerDiversity.of,
        "repetition": Repetition.of,
        "language_mixing": LanguageMixing.of,
        "paid_completions": PaidCompletions.of,
    }
)
"""By the name of their state in checkpoints. Each function makes the monitor that a run needs, or returns None."""


def make_monitors(request: MonitorRequest) -> dict[str, Monitor]:
    """The monitors of a run, in the order in which they are called."""
    return {name: monitor for name, make in MONITORS.items() if (monitor := make(request)) is not None}


WATCHES: Mapping[str, type[Watch]] = MappingProxyType(
    {
        "entropy_collapse": EntropyCollapse,
        "entropy_explosion": EntropyExplosion,
        "one_answer": OneAnswer,
        "dead_groups": DeadGroups,
        "repetition": Repetitions,
        "language_mixing": MixedLanguages,
        "length_explosion": LengthExplosion,
        "truncation": Truncation,
        "reward_collapse": RewardCollapse,
        "reward_hacking": RewardHacking,
        "shared_texts": SharedTexts,
        "paid_length": PaidLength,
        "kl_explosion": KLExplosion,
        "ratio_explosion": RatioExplosion,
        "engine_drift": EngineDrift,
        "gradient_spikes": GradientSpikes,
        "slow_rewards": SlowRewards,
        "memory_growth": MemoryGrowth,
    }
)
"""By the name that alarms and `on_alarm` use."""


def make_watches(settings: Mapping[str, Any]) -> dict[str, Watch]:
    """The watches of a run with these settings, see `Watch`."""
    return {name: watch(settings) for name, watch in WATCHES.items()}
