"""The arguments of a run: the host's five parts, with our keys among them."""

from dataclasses import dataclass
from types import SimpleNamespace

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

    def values(self) -> SimpleNamespace:
        """The value of every key of the run, by its name."""
        parts = (self.model, self.data, self.training, self.finetuning, self.generating)
        return SimpleNamespace(**{key: value for part in parts for key, value in vars(part).items()})
