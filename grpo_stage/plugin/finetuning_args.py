"""The host's fine-tuning arguments with ours, which registration puts in place of the host's own.

Registration imports this module while the host's parser is being imported. So it may import only modules of ours that
import nothing of the host, and other modules have to import `llamafactory.hparams` before they import this one.
"""

import copy
import dataclasses
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from llamafactory.hparams.finetuning_args import FinetuningArguments

from grpo_stage.arguments import GRPOArguments, grpo_field_names
from grpo_stage.records.redaction import mask


@dataclass
class GRPOFinetuningArguments(GRPOArguments, FinetuningArguments):
    r"""The host's fine-tuning arguments with this stage's among them."""

    stage: Literal["pt", "sft", "rm", "ppo", "dpo", "kto", "grpo"] = field(
        default="sft", metadata=FinetuningArguments.__dataclass_fields__["stage"].metadata
    )

    def __post_init__(self) -> None:
        FinetuningArguments.__post_init__(self)
        GRPOArguments.__post_init__(self)

    def to_dict(self) -> dict[str, Any]:
        r"""The host's mapping, which trackers get; in other stages without this stage's keys."""
        values = {**super().to_dict(), **self.as_written}
        return (
            mask(values) if self.stage == "grpo" else {k: v for k, v in values.items() if k not in grpo_field_names()}
        )


def _keep_help_only(fields: dict[str, "dataclasses.Field[Any]"]) -> None:
    """HfArgumentParser gives all metadata of a field to argparse, which knows nothing of ours but `help`."""
    for name in grpo_field_names():
        fields[name] = copy.copy(fields[name])
        fields[name].metadata = MappingProxyType({"help": fields[name].metadata["help"]})


_keep_help_only(GRPOFinetuningArguments.__dataclass_fields__)
