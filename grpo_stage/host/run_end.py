"""The end of a run: the model is saved, evaluated and described."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from grpo_stage.host import facade
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.survival import checkpoints
from grpo_stage.trainer import GRPOTrainer


PLOTTED_METRICS = ("loss", "reward", "completions/mean_length", "entropy", "kl", "eval_reward")


def finish(trainer: GRPOTrainer, arguments: RunArguments, train_metrics: dict[str, float] | None) -> None:
    """Save and evaluate the model. If the end of the run was interrupted before, do only what is left."""
    parts: dict[str, Callable[[], None]] = {}
    if train_metrics is not None:
        parts[checkpoints.RESULTS] = partial(_save_results, trainer, train_metrics, arguments.finetuning.plot_loss)
    if arguments.training.do_eval:
        parts[checkpoints.EVALUATION] = partial(_evaluate, trainer)
    if train_metrics is not None:
        parts[checkpoints.MODEL_CARD] = partial(_describe, trainer, arguments)
    output_dir, step = trainer.args.output_dir, trainer.state.global_step
    done = checkpoints.parts_done(output_dir, step)
    for name, do in parts.items():
        trainer.stop.check_together()
        if name in done:
            continue
        do()
        if train_metrics is not None and trainer.args.should_save:
            with _words_for_failure(trainer):
                checkpoints.mark_done(output_dir, step, name)
    trainer.delete_all_but_best()


def _evaluate(trainer: GRPOTrainer) -> None:
    metrics = trainer.evaluate()
    with _words_for_failure(trainer):
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


def _describe(trainer: GRPOTrainer, arguments: RunArguments) -> None:
    with _words_for_failure(trainer):
        facade.create_modelcard_and_push(
            trainer, arguments.model, arguments.data, arguments.training, arguments.finetuning
        )


def _save_results(trainer: GRPOTrainer, metrics: dict[str, float], plots: bool) -> None:
    with _words_for_failure(trainer):
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
        if trainer.is_world_process_zero() and plots:
            logged = {key for entry in trainer.state.log_history for key in entry}
            facade.plot_loss(trainer.args.output_dir, keys=[key for key in PLOTTED_METRICS if key in logged])


@contextlib.contextmanager
def _words_for_failure(trainer: GRPOTrainer) -> Iterator[None]:
    """A block that writes files at the end of a run. An error names a full disk; parts that are done stay done.

    Raises:
        RuntimeError: naming what failed, and how the run goes on.
    """
    try:
        yield
    except Exception as error:  # a full disk is an OSError, or another error in safetensors
        checkpoint = trainer.save_progress() if trainer.args.world_size == 1 else None
        raise RuntimeError(
            f"Training is done, and what is written at its end to {trainer.args.output_dir} failed: {error!r}. Free "
            "space on the disk, or mend what is named there, and go on with "
            f"`resume_from_checkpoint: {checkpoint or '<the last checkpoint>'}`: only what is left will be done."
        ) from error
