"""From parsed arguments to a run."""

from transformers import TrainerCallback

from ..workflow import run_grpo
from .facade import stage_callbacks
from .parser import RunArguments


def run(arguments: RunArguments, callbacks: list[TrainerCallback]) -> None:
    """Run the stage with the caller's callbacks and the host's own."""
    run_grpo(arguments, callbacks + stage_callbacks(arguments))
