"""What a run gives to the builder of its engine, whichever that is."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from grpo_stage.types import ImageReader, SamplingSettings


if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """A run as its engine sees it when it starts."""

    policy: Any
    """The model that is trained, loaded."""
    tokenizer: "PreTrainedTokenizerBase"
    sampling: SamplingSettings
    keys: SimpleNamespace
    """Every key of the run, by its name, as parsed."""
    given: frozenset[str]
    """The keys that the user wrote."""
    local_process_index: int
    """This rank's place among those of its node, which share its files."""
    device_type: str
    """Where the trainer computes: `cpu`, `cuda`."""
    autocast_dtype: "torch.dtype | None"
    """The precision of the trainer's mixed-precision passes; None where it has none."""
    compute_dtype: "torch.dtype"
    """The precision that the trainer computes in."""
    changes_to_files: tuple[str, ...]
    """What was done to the model after, or while, its files were read, in words; empty where they hold it as it is."""
    load_config: "Callable[[], PretrainedConfig]"
    """Reads the config of those files."""
    announce: Callable[[str], object]
    warn: Callable[[str], object]
    images: ImageReader | None = None
    """Reads those of prompts; None in a run without."""
    processor: Any = None
    """The model's, of a run with images."""
