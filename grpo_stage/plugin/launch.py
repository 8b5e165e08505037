"""From parsed arguments to a run, and from a run that was stopped back to the command line."""

import contextlib
import gc
import os
import shlex
import sys

from transformers import TrainerCallback

from grpo_stage.host.facade import get_logger, stage_callbacks
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.monitors.alarms import AlarmStop
from grpo_stage.survival.budget import budget_callbacks
from grpo_stage.survival.run_lock import owned
from grpo_stage.survival.stop import StopRequested
from grpo_stage.workflow import run_grpo


logger = get_logger(__name__)

ALARM_EXIT = 3
"""The exit code of a run that `on_alarm: stop` has ended, as `grpo-stage` exits where it found something."""


def run(arguments: RunArguments, callbacks: list[TrainerCallback]) -> None:
    """Run the stage with the caller's callbacks and the host's own.

    Raises:
        ValueError: if another run is in `output_dir`.
        SystemExit: if a signal stopped the run, with the exit code of a process that the signal ended; if an alarm
            did, with `ALARM_EXIT`.
    """
    training = arguments.training
    training.output_dir = os.path.abspath(training.output_dir)  # a reward function may change the working directory
    try:
        with owned(training.output_dir) if training.should_save else contextlib.nullcontext():
            # What is imported stays: no collection has to look through it, which takes 0.3 s; vLLM's start asks for 8.
            gc.collect()
            gc.freeze()
            run_grpo(arguments, lambda attempt: callbacks + stage_callbacks(attempt) + budget_callbacks())
    except StopRequested as request:
        logger.warning_rank0(f"The run was {request}. {_how_to_go_on(request.checkpoint, sys.argv[1:])}")
        raise SystemExit(128 + request.signal) from None
    except AlarmStop as stop:
        logger.warning_rank0(
            f"The run was {stop}. Change the recipe as the alarm says and start anew; to go on as it is: "
            f"{_how_to_go_on(stop.checkpoint, sys.argv[1:])}"
        )
        raise SystemExit(ALARM_EXIT) from None


def _how_to_go_on(checkpoint: str | None, command_line: list[str]) -> str:
    if checkpoint is None:
        return "No step was finished, so that nothing is lost: start it again with the same command."
    is_file = bool(command_line) and command_line[0].endswith((".yaml", ".yml", ".json"))
    if is_file:
        rest = [word for word in command_line if not word.startswith("resume_from_checkpoint=")]
        command = [*rest, f"resume_from_checkpoint={checkpoint}"]
    elif "--stage" in command_line or any(word.startswith("--stage=") for word in command_line):
        command = [*command_line, "--resume_from_checkpoint", checkpoint]  # the last of two equal flags counts
    else:  # not started by the command line
        return f"Go on with `resume_from_checkpoint: {checkpoint}`."
    return f"Everything so far is in {checkpoint}. Go on with:\n\n    llamafactory-cli train {shlex.join(command)}\n"
