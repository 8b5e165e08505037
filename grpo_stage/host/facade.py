"""The host symbols that a run uses, each imported once; `plugin.contract` checks them before a run.

Importing this module imports the host.
"""

import json
import os
import signal
import time
from collections import deque
from datetime import timedelta
from typing import Any

from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.extras.constants import TRAINER_LOG
from llamafactory.extras.ploting import plot_loss
from llamafactory.model import load_config, load_model, load_tokenizer, load_valuehead_params
from llamafactory.model.adapter import init_adapter
from llamafactory.model.model_utils.checkpointing import prepare_model_for_training
from llamafactory.train.callbacks import (
    LogCallback,
    ModuleProfilerCallback,
    PissaConvertCallback,
    ReporterCallback,
    SaveProcessorCallback,
    TorchProfilerCallback,
)
from llamafactory.train.trainer_utils import (
    create_custom_optimizer,
    create_custom_scheduler,
    create_modelcard_and_push,
    create_ref_model,
    create_reward_model,
    get_swanlab_callback,
)
from transformers import EarlyStoppingCallback, TrainerCallback

from grpo_stage.host.log import get_logger
from grpo_stage.host.other_models import arguments_for
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.records.line_log import LineLog


__all__ = [
    "MetricsLogCallback",
    "SaveProcessorCallback",
    "arguments_for",
    "closing_tokens",
    "create_custom_optimizer",
    "create_custom_scheduler",
    "create_modelcard_and_push",
    "create_ref_model",
    "create_reward_model",
    "get_logger",
    "get_template_and_fix_tokenizer",
    "init_adapter",
    "load_config",
    "load_model",
    "load_tokenizer",
    "load_valuehead_params",
    "plot_loss",
    "prepare_model_for_training",
    "stage_callbacks",
]


def closing_tokens(template: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that the host's `stage: rm` puts after an answer: the end token, often with a line break."""
    slots, content = template.format_assistant.slots, "a"
    position = next(i for i, slot in enumerate(slots) if isinstance(slot, str) and "{{content}}" in slot)
    before, _, _ = slots[position].partition("{{content}}")
    # Encoded with some content, as in training: some tokenizers encode the start of a text differently.
    opening = template._convert_elements_to_ids(tokenizer, [*slots[:position], before + content])
    answer = template._convert_elements_to_ids(tokenizer, template.format_assistant.apply(content=content))
    closing = answer[len(opening) :]
    return (*closing, *([tokenizer.eos_token_id] if template.efficient_eos else []))


class MetricsLogCallback(LogCallback):
    """The host's LogCallback, which writes a fixed set of keys to trainer_log.jsonl, with every metric added.

    LLaMA Board reads that file, so the host's own keys stay as they are and win over a metric of the same name. A
    resumed run continues the file at its checkpoint's step, and estimates the remaining time from its own steps.
    """

    def __init__(self) -> None:
        before = signal.getsignal(signal.SIGABRT)
        super().__init__()
        if before is not None and signal.getsignal(signal.SIGABRT) is not before:
            signal.signal(signal.SIGABRT, before)  # the host's handler stops nothing before the first step
        self._metrics: deque[dict[str, Any]] = deque()
        self._first_step = 0
        self._log: LineLog | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the log of a resumed run: with `overwrite_output_dir` the host deletes it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first_step = state.global_step
        if args.should_save:
            self._log = LineLog(os.path.join(args.output_dir, TRAINER_LOG))
            # A run from the start repeats the evaluation before the first step, and every run repeats its end.
            self._log.keep(lambda line: 0 < self._first_step >= line["current_steps"] and "train_loss" not in line)
        super().on_train_begin(args, state, control, **kwargs)

    def _timing(self, cur_steps: int) -> None:
        super()._timing(cur_steps)
        num_steps = cur_steps - self._first_step
        seconds_per_step = (time.time() - self.start_time) / num_steps if num_steps > 0 else 0.0
        self.remaining_time = str(timedelta(seconds=int((self.max_steps - cur_steps) * seconds_per_step)))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save and self.thread_pool is not None:  # the host then writes exactly one line
            self._metrics.append({k: v for k, v in state.log_history[-1].items() if k != "step"})
        super().on_log(args, state, control, **kwargs)
        if self.thread_pool is not None:
            self.thread_pool.submit(int).result()  # waits: the line has to be on disk before its step's checkpoint

    def _write_log(self, output_dir: str, logs: dict[str, Any]) -> None:
        log = self._log or LineLog(os.path.join(output_dir, TRAINER_LOG))
        log.append([json.dumps({**(self._metrics.popleft() if self._metrics else {}), **logs})])


class PissaCallback(PissaConvertCallback):
    """The host's conversion, relative to the initial adapter of the run; a resume must not replace that adapter."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        initial = os.path.join(args.output_dir, "pissa_init")
        if state.global_step == 0:
            super().on_train_begin(args, state, control, **kwargs)
        elif not os.path.isdir(initial):
            raise ValueError(
                f"`pissa_convert: true` needs the adapter that the run began with, and {initial} is not there: the "
                "converted adapter would be another policy. Resume in the run's own `output_dir`, or leave "
                "`pissa_convert` out."
            )


def stage_callbacks(arguments: RunArguments) -> list[TrainerCallback]:
    """The callbacks that the host's `_training_function` assembles for every stage, with our log callback."""
    training, finetuning = arguments.training, arguments.finetuning
    callbacks: list[TrainerCallback] = [MetricsLogCallback()]
    if finetuning.pissa_convert:
        callbacks.append(PissaCallback())
    if finetuning.use_swanlab:
        callbacks.append(get_swanlab_callback(finetuning))
    if finetuning.early_stopping_steps is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=finetuning.early_stopping_steps))
    if training.enable_torch_profiler:
        callbacks.append(TorchProfilerCallback(training))
    if training.profile_modules:
        callbacks.append(ModuleProfilerCallback(training.profile_modules))
    callbacks.append(ReporterCallback(arguments.model, arguments.data, finetuning, arguments.generating))
    return callbacks
