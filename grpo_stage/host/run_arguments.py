"""What a run is made from: the host's five sets of arguments, with the stage's own in one of them."""

from dataclasses import dataclass

from llamafactory.hparams.data_args import DataArguments
from llamafactory.hparams.generating_args import GeneratingArguments
from llamafactory.hparams.model_args import ModelArguments
from llamafactory.hparams.training_args import TrainingArguments

from grpo_stage.plugin.finetuning_args import GRPOFinetuningArguments


@dataclass(frozen=True)
class RunArguments:
    """The arguments, parsed."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    finetuning: GRPOFinetuningArguments
    generating: GeneratingArguments
    given: frozenset[str]
    """The keys that the user wrote, since afterwards a default cannot be told from a choice."""
