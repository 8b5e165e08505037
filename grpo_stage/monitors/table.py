"""The monitors and watches of a run: each is one file and one row."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from grpo_stage.monitors.alarm import Watch
from grpo_stage.monitors.canary import LogprobDifference
from grpo_stage.monitors.monitor import Monitor, MonitorRequest
from grpo_stage.monitors.slope_test import SlopeTest
from grpo_stage.monitors.unrewarded import UnrewardedRollouts


MONITORS: Mapping[str, Callable[[MonitorRequest], Monitor | None]] = MappingProxyType(
    {
        "logprob_difference": LogprobDifference.of,
        "slope_test": SlopeTest.of,
        "unrewarded": UnrewardedRollouts.of,
    }
)
"""By the name of their state in checkpoints. Each function makes the monitor that a run needs, or returns None."""


def make_monitors(request: MonitorRequest) -> dict[str, Monitor]:
    """The monitors of a run, in the order in which they are called."""
    return {name: monitor for name, make in MONITORS.items() if (monitor := make(request)) is not None}


WATCHES: Mapping[str, type[Watch]] = MappingProxyType({})
"""By the name that alarms and `on_alarm` use."""


def make_watches(settings: Mapping[str, Any]) -> dict[str, Watch]:
    """The watches of a run with these settings, see `Watch`."""
    return {name: watch(settings) for name, watch in WATCHES.items()}
