"""The host's fine-tuning arguments with ours: what registration puts in their place.

Registration imports this while the host's parser is being imported. So nothing of ours is imported here but what
imports none of the host, and whoever else wants the class imports `llamafactory.hparams` first.
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
        r"""As the host's, which trackers get; other stages do not see this stage's keys."""
        values = {**super().to_dict(), **self.as_written}
        return (
            mask(values) if self.stage == "grpo" else {k: v for k, v in values.items() if k not in grpo_field_names()}
        )


def _keep_help_only(fields: dict[str, "dataclasses.Field[Any]"]) -> None:
    """HfArgumentParser rewrites a field's type and hands argparse all metadata, which knows `help` alone of ours."""
    for name in grpo_field_names():
        fields[name] = copy.copy(fields[name])
        fields[name].metadata = MappingProxyType({"help": fields[name].metadata["help"]})


_keep_help_only(GRPOFinetuningArguments.__dataclass_fields__)
