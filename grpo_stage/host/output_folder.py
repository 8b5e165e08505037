"""The output folder of a run: whether it is writable, and which checkpoint in it the run resumes from."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.trainer_utils import get_last_checkpoint

from grpo_stage.host.adapters import items
from grpo_stage.host.distribution import distribution
from grpo_stage.host.recipe import check_checkpoint, recipe_of
from grpo_stage.survival.run_lock import refuse_used


if TYPE_CHECKING:
    from grpo_stage.host.run_arguments import RunArguments


def check_output_folder(output_dir: str) -> None:
    """Refuse a folder that cannot be made or written to. The check leaves no files behind."""
    path = Path(output_dir).absolute()
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir():
        where = "is a file" if nearest == path else f"is below {nearest}, which is a file"
        raise ValueError(f"`output_dir: {output_dir}` {where}. Name a folder, for example `output_dir: saves/my-run`.")
    try:
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".grpo-stage-"):
            pass
    except OSError as error:
        raise ValueError(
            f"`output_dir: {output_dir}` cannot be written to: {error.strerror} ({nearest}). Name a folder that you "
            "may write to, on a disk with room."
        ) from error


def check_resume(arguments: "RunArguments") -> None:
    """Decide which checkpoint the run resumes from, and refuse one of another recipe.

    Raises:
        ValueError: naming the folder, the reason and the remedy.
    """
    training = arguments.training
    if training.should_save:  # the rank that will own the folder
        refuse_used(training.output_dir)  # another run may add and delete checkpoints during the check
    if training.resume_from_checkpoint is True:
        training.resume_from_checkpoint = (
            get_last_checkpoint(training.output_dir) if os.path.isdir(training.output_dir) else None
        )
        if training.resume_from_checkpoint is None:
            raise ValueError(
                f"`resume_from_checkpoint: true`, but there is no checkpoint in `output_dir: {training.output_dir}`. "
                "Leave `resume_from_checkpoint` out to start afresh, or name the checkpoint's folder."
            )
    if not training.resume_from_checkpoint:
        _check_fresh_start(arguments)
        return
    folder = Path(training.resume_from_checkpoint)
    if not folder.is_dir():
        raise ValueError(
            f"`resume_from_checkpoint: {folder}` is no folder. Name a checkpoint's folder "
            "(`<output_dir>/checkpoint-<step>`), or leave it out to start afresh."
        )
    check_checkpoint(folder, recipe_of(arguments), distribution(training.deepspeed))


def _check_fresh_start(arguments: "RunArguments") -> None:
    """Refuse a fresh run that would delete an earlier run's checkpoints, unless that is wanted."""
    model, finetuning, output_dir = arguments.model, arguments.finetuning, arguments.training.output_dir
    last = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if last is None:
        return
    if not arguments.training.overwrite_output_dir:
        raise ValueError(
            f"`resume_from_checkpoint: false` with an earlier run's {os.path.basename(last)} in `output_dir: "
            f"{output_dir}`: the two runs' checkpoints could not be told apart. Choose another `output_dir`, or write "
            "`overwrite_output_dir: true` to have the earlier ones deleted."
        )
    for key, path in (
        ("model_name_or_path", model.model_name_or_path),
        ("ref_model", finetuning.ref_model),
        ("reward_model", finetuning.reward_model),
        *(("adapter_name_or_path", adapter) for adapter in items(model.adapter_name_or_path)),
        *(("ref_model_adapters", adapter) for adapter in items(finetuning.ref_model_adapters)),
        *(("reward_model_adapters", adapter) for adapter in items(finetuning.reward_model_adapters)),
    ):
        if path and str(Path(path).resolve()).startswith(os.path.join(Path(output_dir).resolve(), "checkpoint-")):
            raise ValueError(
                f"`{key}: {path}` is in the `output_dir` that `overwrite_output_dir: true` empties of checkpoints. "
                "Choose another `output_dir`."
            )
