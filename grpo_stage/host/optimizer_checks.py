"""A trial construction of the optimizer and its schedule, so that errors come before a model is loaded."""

import inspect
from typing import TYPE_CHECKING

import torch
from transformers import Trainer, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType


if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments


_NEED_A_MODEL = ("galore", "apollo", "lomo")
_WITHOUT_SETTINGS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
"""`get_scheduler` passes no settings to these."""
_OF_THE_RUN = frozenset(("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"))


def refuse_optimizer(training_args: "Seq2SeqTrainingArguments") -> None:
    """Refuse an optimizer or a schedule that cannot be made.

    Raises:
        ValueError: naming the keys, their values, the reason and the remedy.
    """
    optim, optim_args = str(getattr(training_args.optim, "value", training_args.optim)), training_args.optim_args
    if not any(part in optim for part in _NEED_A_MODEL):
        try:
            Trainer.get_optimizer_cls_and_kwargs(training_args)
        except (ValueError, ImportError, TypeError) as error:
            arguments = f" with `optim_args: {optim_args}`" if optim_args else ""
            raise ValueError(
                f"`optim: {optim}`{arguments} is not possible: {_first_line(error)}. Install what it needs, write its "
                "arguments as `name=value,name=value`, or write `optim: adamw_torch`."
            ) from error

    schedule, settings = SchedulerType(training_args.lr_scheduler_type), training_args.lr_scheduler_kwargs or {}
    if schedule in _WITHOUT_SETTINGS and settings:
        raise ValueError(
            f"`lr_scheduler_kwargs: {settings}` would have no effect with `lr_scheduler_type: {schedule.value}`. "
            "Leave it out, or write for example `lr_scheduler_type: cosine_with_restarts`."
        )
    rate, lowest = training_args.learning_rate, settings.get("min_lr")
    if schedule.value.startswith("cosine") and isinstance(lowest, int | float) and lowest > rate:
        raise ValueError(
            f"`lr_scheduler_kwargs: {settings}` has a `min_lr` above `learning_rate: {rate}`, so that the rate would "
            "rise where it should fall. Write one below it."
        )
    try:
        get_scheduler(schedule, torch.optim.SGD([torch.zeros(1)], lr=rate), 10, 100, dict(settings))
    except (ValueError, TypeError) as error:
        known = [
            name
            for name in inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[schedule]).parameters
            if name not in _OF_THE_RUN
        ]
        raise ValueError(
            f"`lr_scheduler_type: {schedule.value}` with `lr_scheduler_kwargs: {settings}` is not possible: "
            f"{_first_line(error)}. Write a mapping with {', '.join(known) or 'nothing in it'}, or leave it out."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
