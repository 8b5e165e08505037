"""The arguments of a run: the host's five parts, with our keys among them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from llamafactory.hparams.data_args import DataArguments
from llamafactory.hparams.generating_args import GeneratingArguments
from llamafactory.hparams.model_args import ModelArguments
from llamafactory.hparams.training_args import TrainingArguments

from grpo_stage.plugin.finetuning_args import GRPOFinetuningArguments


@dataclass(frozen=True)
class RunArguments:
    """The arguments of a run."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    finetuning: GRPOFinetuningArguments
    generating: GeneratingArguments
    given: frozenset[str]
    """The keys that the user wrote: the values do not show whether a default was chosen."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Those keys with their values, as they were before the host and this stage derived others from them."""

    def values(self) -> SimpleNamespace:
        """The value of every key of the run, by its name."""
        parts = (self.model, self.data, self.training, self.finetuning, self.generating)
        return SimpleNamespace(**{key: value for part in parts for key, value in vars(part).items()})
