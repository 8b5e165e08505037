"""What happens when a watch finds something: it is told, and the run goes on, stops, or goes back and tries again."""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from grpo_stage.algorithm.conditions import as_lines
from grpo_stage.distributed import all_gather
from grpo_stage.monitors.alarm import Alarm, History, Watch
from grpo_stage.records.line_log import LineLog
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.records.run_files import ALARMS_FILE
from grpo_stage.survival.stop import RunStopped


logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are

QUIET_STEPS = 20
"""A watch that has found something is heard again once it has found nothing for this many steps: a fault that lasts is
told once, and one that comes and goes does not fill the log."""


class Action(StrEnum):
    """What an alarm does to the run."""

    WARN = "warn"
    STOP = "stop"
    RECOVER = "recover"


def action_of(on_alarm: str | Mapping[str, str], monitor: str) -> Action:
    """The action that `on_alarm` has for a watch; a mapping leaves those that it does not name at `warn`."""
    return Action(on_alarm if isinstance(on_alarm, str) else on_alarm.get(monitor, Action.WARN))


class AlarmStop(RunStopped):
    """An alarm has ended the run (`on_alarm: stop`)."""

    def __init__(self, alarms: Sequence[Alarm]) -> None:
        super().__init__(f"stopped by `on_alarm`: {', '.join(alarm.monitor for alarm in alarms)}")


class RecoveryRequested(Exception):
    """Alarms ask the run to go back to where it was sound, and to go on from there with their remedies."""

    def __init__(self, alarms: Sequence[Alarm], num_prompts: int = 0) -> None:
        super().__init__(f"{', '.join(alarm.monitor for alarm in alarms)} at step {alarms[0].step}")
        self.alarms = tuple(alarms)
        self.num_prompts = num_prompts
        """That the run has sampled since its start."""


class Alarms:
    """Judges a run by its log after each step. All ranks call it together; the first one judges.

    Args:
        watches: by name.
        on_alarm: see `action_of`.
        possible_settings: those of a remedy's settings that the run's recipe can have.
        may_recover: False once the run has gone back as often as it may: `recover` then stops it.
        output_dir: gets `alarms.jsonl`, a line an alarm.
        rank: this process.
        metrics: counts the alarms of each watch as alarms/{name}, logged with the step after.
    """

    def __init__(
        self,
        watches: Mapping[str, Watch],
        on_alarm: str | Mapping[str, str],
        possible_settings: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        may_recover: bool,
        output_dir: str,
        rank: int,
        metrics: MetricTracker,
    ) -> None:
        self._watches = watches
        self._on_alarm = on_alarm
        self._possible_settings = possible_settings
        self._may_recover = may_recover
        self._log = LineLog(os.path.join(output_dir, ALARMS_FILE))
        self._is_first_rank = rank == 0
        self._metrics = metrics
        self._history = History()
        self._num_read = 0  # lines of the log
        self._pending: dict[Action, list[Alarm]] = {action: [] for action in Action}
        self._last_found: dict[str, int] = {}  # the step at which a watch found something last

    def drop_after(self, step: int) -> None:
        """Delete alarms of later steps than `step`, which are done again, but for those that made the run go back."""
        if self._is_first_rank:
            self._log.keep(lambda line: line["step"] <= step or line["action"] == Action.RECOVER)

    def judge(self, log_history: Sequence[Mapping[str, Any]]) -> None:
        """Judge the run by the lines of its log, of which some may be new, and tell what is found."""
        new = log_history[self._num_read :]
        self._num_read = len(log_history)
        for line in new:
            self._history.add(line)
        if not new or "train_loss" in new[-1]:  # the line of a run's end
            return
        alarms = all_gather(self._judge() if self._is_first_rank else [])[0]
        for alarm in alarms:
            action = self._action(alarm)
            if self._is_first_rank:
                self._tell(alarm, action)
            self._pending[action].append(alarm)

    def act(self, num_prompts: int = 0) -> None:
        """Do what the alarms ask for that `judge` has found; where a step is whole, and saved if it was due.

        Args:
            num_prompts: that the run has sampled since its start.

        Raises:
            AlarmStop: if an alarm ends the run.
            RecoveryRequested: if alarms make it go back.
        """
        pending, self._pending = self._pending, {action: [] for action in Action}
        if pending[Action.STOP]:
            raise AlarmStop(pending[Action.STOP])
        if pending[Action.RECOVER]:
            raise RecoveryRequested(pending[Action.RECOVER], num_prompts)

    def state_dict(self) -> dict[str, int]:
        return self._last_found.copy()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._last_found = state.copy()

    def _judge(self) -> list[Alarm]:
        """What is found now and was not found lately."""
        alarms = []
        step = self._history.step
        for name, watch in self._watches.items():
            alarm = watch.judge(self._history)
            if alarm is None:
                continue
            if step - self._last_found.get(name, -QUIET_STEPS - 1) > QUIET_STEPS:
                alarms.append(dataclasses.replace(alarm, settings=self._possible_settings(alarm.settings)))
            self._last_found[name] = step
        return alarms

    def _action(self, alarm: Alarm) -> Action:
        if self._watches[alarm.monitor].is_advice and alarm.monitor not in self._on_alarm:
            return Action.WARN
        action = action_of(self._on_alarm, alarm.monitor)
        if action is not Action.RECOVER:
            return action
        if not alarm.settings and not alarm.skips_prompts:
            return Action.WARN  # going back alone would only repeat it
        return action if self._may_recover else Action.STOP

    def _tell(self, alarm: Alarm, action: Action) -> None:
        settings = "" if not alarm.settings else f"\n\n{indented(alarm.settings)}\n"
        logger.warning(f"{alarm.monitor} at step {alarm.step}: {alarm.seen} {alarm.meaning} {alarm.remedy}{settings}")
        line = {**dataclasses.asdict(alarm), "action": action.value}
        self._log.append([json.dumps(line, ensure_ascii=False)])
        self._metrics.count(f"alarms/{alarm.monitor}", 1.0)


def indented(settings: Mapping[str, Any]) -> str:
    """Keys as the lines of a recipe, set off from a text."""
    return "\n".join(f"    {line}" for line in as_lines(settings).splitlines())
