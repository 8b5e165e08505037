"""`on_alarm: recover`: back to the last checkpoint before a fault, and on from there with the remedy.

<output_dir>/recoveries.json      what was changed, from which step on; a resume of the run goes on with it
<output_dir>/before-recovery-1/   what the run did after that step: checkpoints, logs, completions
"""

import copy
import dataclasses
import gc
import json
import shutil
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from grpo_stage.arguments import GRPOArguments, grpo_field_names
from grpo_stage.distributed import all_gather
from grpo_stage.host.bounds import refuse_out_of_bounds
from grpo_stage.host.log import get_logger
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.monitors.alarms import QUIET_STEPS, RecoveryRequested, indented
from grpo_stage.records.completions import COMPLETIONS_FILE
from grpo_stage.records.run_files import ALARMS_FILE, LOG_FILE
from grpo_stage.survival import checkpoints


logger = get_logger(__name__)

RECOVERIES_FILE = "recoveries.json"
ABANDONED_FOLDER = "before-recovery-{number}"


@dataclasses.dataclass(frozen=True, slots=True)
class Recovery:
    """One time that a run went back."""

    alarms: tuple[str, ...]
    """The monitors' names."""
    step: int
    """At which they were raised."""
    resumed_step: int
    """That of the checkpoint that the run went back to; 0 is its start."""
    settings: Mapping[str, Any]
    """Keys of the recipe with their values from then on."""
    num_prompts_to_skip: int = 0
    """How many of the run's prompts, from its start, are not sampled after this."""


class Recoveries:
    """The recoveries of a run, in order. All ranks use it together.

    Args:
        output_dir: of the run.
        limit: `max_recoveries`.
        is_saver: whether this rank writes.
        done: earlier ones.
    """

    def __init__(self, output_dir: str, limit: int, is_saver: bool, done: list[Recovery]) -> None:
        self._output_dir = Path(output_dir)
        self._limit = limit
        self._is_saver = is_saver
        self._done = done
        self._checkpoint: str | None = None  # the one that the last of them goes on from

    @classmethod
    def of(cls, arguments: RunArguments) -> "Recoveries":
        """Those of the run that is resumed; a run from the start has none, and forgets those of an earlier run."""
        training = arguments.training
        file = Path(training.output_dir, RECOVERIES_FILE)
        checkpoint = training.resume_from_checkpoint
        is_own = bool(checkpoint) and Path(checkpoint).resolve().parent == Path(training.output_dir).resolve()
        if training.should_save and not is_own:
            file.unlink(missing_ok=True)
            Path(training.output_dir, ALARMS_FILE).unlink(missing_ok=True)
        own = json.loads(file.read_text(encoding="utf-8")) if is_own and file.is_file() else []
        (noted, *_) = all_gather(own)  # other nodes may not see the disk
        done = [Recovery(**{**each, "alarms": tuple(each["alarms"])}) for each in noted]
        return cls(training.output_dir, arguments.finetuning.max_recoveries, training.should_save, done)

    @property
    def is_allowed(self) -> bool:
        """Whether the run may go back once more."""
        return len(self._done) < self._limit

    @property
    def num_prompts_to_skip(self) -> int:
        """Of the run's prompts, from its start: those before and during a fault whose alarm leaves them out."""
        return max((each.num_prompts_to_skip for each in self._done), default=0)

    def apply(self, arguments: RunArguments) -> RunArguments:
        """A copy of the recipe's arguments with all remedies so far, for the next attempt."""
        changed = dataclasses.replace(
            arguments,
            **{
                part: copy.copy(getattr(arguments, part))
                for part in ("model", "data", "training", "finetuning", "generating")
            },
        )
        for recovery in self._done:
            for key, value in recovery.settings.items():
                _set(changed, key, value)
        if self._checkpoint is not None:
            changed.training.resume_from_checkpoint = self._checkpoint or None
            # As the host's parser does before a run: a new adapter begins as that of the first attempt.
            set_seed(changed.training.seed)
        return changed

    def add(self, request: RecoveryRequested) -> None:
        """Go back: put aside what the run did since its last sound checkpoint, and note the remedy."""
        gc.collect()  # the model of the last attempt
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        before = min(alarm.onset for alarm in request.alarms) + 1
        if self._done and request.alarms[0].step - self._done[-1].resumed_step <= QUIET_STEPS:
            before = min(before, self._done[-1].resumed_step)  # that was not far enough: the fault came again at once
        found = checkpoints.newest_whole(self._output_dir, before=before) if self._is_saver else None
        self._checkpoint = all_gather("" if found is None else str(found))[0]
        resumed_step = checkpoints.step_of(Path(self._checkpoint)) if self._checkpoint else 0
        settings = dict(
            ChainMap(*(dict(alarm.settings) for alarm in request.alarms))
        )  # the first one's, if two differ
        names = tuple(alarm.monitor for alarm in request.alarms)
        num_skipped = request.num_prompts if any(alarm.skips_prompts for alarm in request.alarms) else 0
        self._done = [*self._done, Recovery(names, request.alarms[0].step, resumed_step, settings, num_skipped)]
        if self._is_saver:
            self._put_aside(resumed_step)
            checkpoints.write_json(
                self._output_dir / RECOVERIES_FILE, [dataclasses.asdict(each) for each in self._done]
            )
        logger.warning_rank0(
            f"Recovery {len(self._done)} of at most {self._limit}, after {', '.join(names)} at step "
            f"{request.alarms[0].step}: the run goes back to "
            f"{f'step {resumed_step}' if resumed_step else 'its start'} and on from there with "
            f"{'other prompts than it had' if num_skipped else 'the same prompts'} and\n\n"
            f"{indented(settings) or '    the same settings'}\n"
        )

    def _put_aside(self, resumed_step: int) -> None:
        folder = self._output_dir / ABANDONED_FOLDER.format(number=len(self._done))
        if folder.exists():
            shutil.rmtree(folder)  # of an earlier run in this folder
        folder.mkdir(parents=True)
        for name in (LOG_FILE, COMPLETIONS_FILE, ALARMS_FILE):
            if (self._output_dir / name).exists():
                shutil.copyfile(self._output_dir / name, folder / name)
        checkpoints.put_aside(self._output_dir, resumed_step, folder)


def possible(arguments: RunArguments, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a remedy that the recipe can have beside its other keys."""
    values = vars(arguments.values())
    chosen: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "num_iterations" and arguments.training.max_steps <= 0:
            continue  # epochs have fewer steps with it: the run would end with prompts that it never sampled
        trial = {**values, **chosen, key: value}
        try:
            refuse_out_of_bounds({**vars(arguments.values()), key: value})
            stage = GRPOArguments(**{name: trial[name] for name in grpo_field_names()})
            stage.validate({*arguments.given, *chosen, key})
        except ValueError:  # the rules of a recipe say it in this way
            continue
        chosen[key] = value
    return chosen


def _set(arguments: RunArguments, key: str, value: Any) -> None:
    for part in (arguments.finetuning, arguments.training, arguments.generating, arguments.data, arguments.model):
        if hasattr(part, key):
            setattr(part, key, value)
            return
    raise AssertionError(f"{key} is no key")
