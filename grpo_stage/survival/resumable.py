"""A Trainer whose checkpoints are whole, and whose runs go on exactly where they were left."""

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from grpo_stage.distributed import gather_on_cpu
from grpo_stage.rewards.errors import RewardError, UnrewardedError
from grpo_stage.survival import checkpoints
from grpo_stage.survival.checkpoints import ROLLOUT_FILE, TENSORS_FILE
from grpo_stage.survival.failure import report
from grpo_stage.survival.renamed_weights import load_renamed_weights
from grpo_stage.survival.run_state import RunState, Scope
from grpo_stage.survival.stop import RunStopped, SafeStop
from grpo_stage.survival.watchdog import HangError, Watchdog
from grpo_stage.types import EngineLostError
from grpo_stage.update.strategies.choice import choose_strategy, cpus_may_shard
from grpo_stage.update.strategies.strategy import ShardedStrategy


logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are


class TrainingEnded(Exception):
    """No step is left to train: an overdue evaluation has stopped the run (early stopping)."""


class Evaluations:
    """Whether the evaluation of the last step is still due.

    Args:
        ends_epoch: whether the last step ends an epoch that is evaluated: it is saved before Trainer evaluates.
        step: the last step.
    """

    def __init__(self, ends_epoch: Callable[[], bool], step: Callable[[], int]) -> None:
        self._ends_epoch = ends_epoch
        self._step = step
        self._is_pending = False
        self._evaluated_step = -1

    @property
    def is_due(self) -> bool:
        return self._is_pending or (self._ends_epoch() and self._evaluated_step != self._step())

    @property
    def is_pending(self) -> bool:
        """Whether it was begun, or was due in the checkpoint that the run goes on from."""
        return self._is_pending

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The block in which it is done."""
        self._is_pending = True
        yield
        self._is_pending = False
        self._evaluated_step = self._step()

    def state_dict(self) -> dict[str, Any]:
        return {"is_due": self.is_due, "step": self._step()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._is_pending = state["is_due"]
        self._evaluated_step = -1 if state["is_due"] else state["step"]


class ResumableTrainer(Trainer):
    """Trainer with checkpoints as `checkpoints.save` writes them, stops, time limits, and the end of a finished run.

    A subclass sets `run_state` and answers the questions below.

    Args:
        args: Trainer's, a copy that is this trainer's own.
        recipe: what a checkpoint records of the training, beside its state.
        **kwargs: Trainer's.
    """

    control: TrainerControl

    def __init__(self, *, args: TrainingArguments, recipe: dict[str, Any], **kwargs: Any) -> None:
        vars(args)["__reduce_ex__"] = partial(_without_token, args)  # Trainer pickles the arguments beside the weights
        super().__init__(args=args, **kwargs)
        self.strategy = choose_strategy(self.accelerator)
        self.sharded = cast(ShardedStrategy, self.strategy) if self.strategy.is_collective else None
        """The strategy, where the processes hold the weights together."""
        self.run_state = RunState({})
        self.stop = SafeStop(self.args.process_index)
        self.watchdog = Watchdog(self.args.output_dir, self.args.process_index, self.stop.interrupt, self._end_hanging)
        self.evaluations = Evaluations(
            lambda: self.args.eval_strategy == "epoch" and self.is_end_of_epoch, lambda: self.state.global_step
        )
        self._recipe = recipe
        self._saved: tuple[int, bool] | None = None  # the step of the last checkpoint, and whether evaluation was due
        self._is_over = False
        self._holds_best = False  # the model has the weights of the best step, not the last

    def create_accelerator_and_postprocess(self) -> None:
        with cpus_may_shard():
            super().create_accelerator_and_postprocess()
        gather_on_cpu(self.args.ddp_timeout_delta)

    # The questions that a subclass answers

    @property
    def is_end_of_epoch(self) -> bool:
        """Whether an epoch has just ended."""
        raise NotImplementedError

    def num_steps(self, step: int) -> int:
        """Optimizer steps of the run, or an upper bound, at a step whose state is restored."""
        raise NotImplementedError

    def prepare_from(self, step: int) -> None:
        """Called before the first step of this process, with the number of steps that are done."""

    def prepare_models(self) -> None:
        """Called before the first step of this process, once the models are distributed, as they were at the start."""

    def check_learned(self, num_steps: int) -> None:
        """Raise if the run, which has ended after `num_steps`, has learned nothing."""

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, or go on from a checkpoint folder of this recipe.

        Raises:
            ValueError: if the checkpoint's run is finished: Trainer would train a step more each time.
            RunStopped: after a checkpoint was saved.
        """
        step = 0
        if resume_from_checkpoint:
            assert isinstance(resume_from_checkpoint, str)
            step = self._load_progress(resume_from_checkpoint)
            self.args.eval_on_start = False
        elif self.args.should_save:
            checkpoints.discard_earlier_run(self.args.output_dir)
        if not self.strategy.is_collective:
            self._start_models(resume_from_checkpoint or None)
        self.prepare_from(step)
        with self.stoppable():
            try:
                if resume_from_checkpoint and self._is_over:
                    output = self._finish(resume_from_checkpoint)
                else:
                    output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except TrainingEnded:
                output = self._finish()
        self.check_learned(output.global_step)
        return output

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """In this block stops, hangs, lost engines and failing rewards leave a checkpoint of the last full step."""
        with self.stop.listening():
            try:
                yield
            except RunStopped as stop:
                stop.checkpoint = self.save_progress()
                raise
            except (HangError, EngineLostError, RewardError, UnrewardedError) as error:
                # One rank alone cannot save the state of all. The weights are those of the last finished step.
                if self.args.world_size == 1 and (checkpoint := self.save_progress()) is not None:
                    error.add_note(f"What was trained until then is in {checkpoint}.")
                raise

    def _end_hanging(self, error: HangError) -> None:
        """End the process from the watchdog's thread: the main one hangs in native code and cannot be reached."""
        try:
            print(error, file=sys.stderr, flush=True)
            report(error)
            self.run_state.undo()
            if self.args.world_size == 1:
                print(f"What was trained until then is in {self.save_progress()}.", file=sys.stderr, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    # Evaluation

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.evaluations.evaluating():
            return super()._evaluate(*args, **kwargs)

    def evaluate_if_overdue(self) -> None:
        """Do the evaluation that is due at the step that was resumed from, if any.

        Raises:
            TrainingEnded: if that evaluation stops the run.
        """
        if not self.evaluations.is_pending:
            return
        self._evaluate_late()
        if self.control.should_training_stop:
            raise TrainingEnded

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """An evaluation without this metric, since its function never applied, cannot be the best one."""
        name = self.args.metric_for_best_model
        if name is not None and f"eval_{name.removeprefix('eval_')}" not in metrics:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _evaluate_late(self) -> None:
        if self._determine_best_metric(self._evaluate(None, None), None):
            best = self._folder_of(self.state.global_step)
            if os.path.isdir(best):
                self.state.best_model_checkpoint = best

    # The end of a run

    def _finish(self, checkpoint: str | None = None) -> TrainOutput:
        """The rest of a run whose last step is done: an evaluation that is due, and loading the best model."""
        if checkpoint is not None:
            logger.info(f"Every step is done in {checkpoint}: what is left is the end of the run.")
            self.state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
            if self.strategy.is_collective:
                self._prepare_for_training(self.state.max_steps, None, checkpoint)
            else:
                self._load_from_checkpoint(checkpoint)
            self.state.is_local_process_zero = self.is_local_process_zero()
            self.state.is_world_process_zero = self.is_world_process_zero()
            self._saved = (self.state.global_step, self.evaluations.is_pending)
            self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
            if self.evaluations.is_pending:
                self._evaluate_late()
        losses = [line["loss"] for line in self.state.log_history if "loss" in line]
        metrics = {"train_loss": sum(losses) / max(1, len(losses)), "total_flos": self.state.total_flos}
        self.log(metrics)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    def _load_best_model(self) -> None:
        if self.sharded is not None:
            assert self.state.best_model_checkpoint is not None
            self.sharded.load(self.model, None, self.state.best_model_checkpoint)
        elif not load_renamed_weights(self.model, cast(str, self.state.best_model_checkpoint)):
            super()._load_best_model()
        self._holds_best = True

    def _finalize_training(self, *args: Any) -> TrainOutput:
        """With `save_total_limit: 1` Trainer deletes all but the best checkpoint here: see `delete_all_but_best`."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        output = super()._finalize_training(*args)
        self.args.save_total_limit = limit
        return output

    def delete_all_but_best(self) -> None:
        """As Trainer does with `save_total_limit: 1`, but only when the last checkpoint is no longer needed."""
        best = Path(self.state.best_model_checkpoint or "")
        is_own = best.is_dir() and best.parent == Path(self.args.output_dir)
        if self.args.should_save and self.args.save_total_limit == 1 and is_own:
            checkpoints.rotate(best, limit=1, best=str(best))

    # Checkpoints

    def _folder_of(self, step: int | None) -> str:
        return os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")

    def save_progress(self) -> str | None:
        """The folder of the last finished step's checkpoint, written if it is missing; None before the first step.

        Once the best model is loaded, it is the newest checkpoint: the weights of the last step are gone.
        """
        step = self.state.global_step
        if step == 0:
            return None
        if self._holds_best:
            newest = checkpoints.newest_whole(Path(self.args.output_dir))
            return None if newest is None else str(newest)
        if self._saved != (step, self.evaluations.is_due):
            self.args.save_only_model = False
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return self._folder_of(step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's save, made atomic (`checkpoints.save`)."""
        self.store_flos()
        step = self.state.global_step
        folder, best = Path(self._folder_of(step)), Path(self._folder_of(self.state.best_global_step))
        if best == folder or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        parts: dict[str, checkpoints.Part] = {"the model": partial(self.save_model, _internal_call=True)}
        state = None
        if not self.args.save_only_model:  # without optimizer and schedule no resume is possible
            state = {**self._recipe, **self.run_state.state_dict(Scope.RUN)}
            parts |= {
                "the optimizer and the schedule": self._save_optimizer_and_scheduler,
                "the loss scale": self._save_scaler,
                "the random states": self._save_rng_state,
                "the rollouts": self._save_rank_state,
            }
            if self.args.should_save or self.strategy.is_collective:
                for name, tensors in self.run_state.state_dict(Scope.TENSORS).items():
                    parts[f"the {name}"] = partial(_save_tensors, self._tensors_file(name), tensors)
        parts["the trainer's state"] = self._save_trainer_state
        checkpoints.save(folder, parts, state, is_saver=self.args.should_save)
        self._saved = None if state is None else (step, self.evaluations.is_due)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            checkpoints.rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not load_renamed_weights(self.model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_rank_state(self, folder: str) -> None:
        name = ROLLOUT_FILE.format(rank=self.args.process_index)
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(self.run_state.state_dict(Scope.RANK), file)

    def _save_trainer_state(self, folder: str) -> None:
        """What Trainer keeps in `trainer_state.json`, the states of the callbacks included."""
        if not self.args.should_save:
            return
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states = self.state.stateful_callbacks
                name = type(callback).__name__
                if isinstance(states.get(name), list):
                    states[name].append(callback.state())
                else:
                    states[name] = callback.state()
        self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))

    def _tensors_file(self, name: str) -> str:
        """Each process has its own part where they hold the weights together."""
        return TENSORS_FILE.format(name=f"{name}_{self.args.process_index}" if self.strategy.is_collective else name)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.sharded is None:
            super().save_model(output_dir, _internal_call)
            return
        weights = self.sharded.state_dict(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharded is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.sharded.save(self.model, self.optimizer, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _start_models(self, checkpoint: str | None) -> None:
        self.prepare_models()
        if checkpoint:
            names = self.run_state.names(Scope.TENSORS)
            tensors = {name: _load_tensors(os.path.join(checkpoint, self._tensors_file(name))) for name in names}
            self.run_state.load_state_dict(Scope.TENSORS, tensors)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Where processes are to hold the weights together, they do from here on; then the checkpoint is loaded."""
        if self.sharded is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.sharded.begin(self.model)
        self._start_models(resume_from_checkpoint)
        if resume_from_checkpoint:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _load_states(self, checkpoint: str | None) -> None:
        """Of optimizer and schedule; of the weights as well, where processes hold them together."""
        if checkpoint is None or self.sharded is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.sharded.load(self.model, self.optimizer, checkpoint)
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer does; if a recovery has changed the learning rate since, the schedule goes on at the new one."""
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate wraps it
        rates = list(getattr(schedule, "base_lrs", ()))
        self._load_states(checkpoint)
        if checkpoint is None or not rates or rates == schedule.base_lrs:
            return
        for group, rate, before in zip(self.optimizer.param_groups, rates, schedule.base_lrs, strict=True):
            group["lr"] *= rate / before
            group["initial_lr"] = rate
        schedule.base_lrs = rates
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_progress(self, folder: str) -> int:
        """Restore the run's state. Returns the optimizer step of the checkpoint."""
        trainer_state = TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME))
        step = trainer_state.global_step
        rank_file = Path(folder, ROLLOUT_FILE.format(rank=self.args.process_index))
        self.run_state.load_state_dict(Scope.RUN, checkpoints.read_state(Path(folder)))
        self.run_state.load_state_dict(Scope.RANK, json.loads(rank_file.read_text(encoding="utf-8")))
        num_steps = self.num_steps(step)
        self._is_over = checkpoints.is_over(Path(folder), self.args.output_dir, num_steps, self.args.do_eval)
        if self.args.device.type == "cpu":  # with several processes it is `cpu:<rank>`, which torch.load does not know
            self.args._setup_devices = torch.device("cpu")
        if self.args.should_save:
            checkpoints.remove_unfinished(self.args.output_dir)
            if Path(folder).resolve().parent == Path(self.args.output_dir).resolve():
                checkpoints.warn_of_later_ones(Path(folder))
            if not self._is_over:
                checkpoints.mark_unfinished(self.args.output_dir)
        for callback in self.callback_handler.callbacks:  # the patience of early stopping
            saved = trainer_state.stateful_callbacks.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and isinstance(saved, dict):
                vars(callback).update(saved["attributes"])
        return step


def _save_tensors(name: str, tensors: dict[str, torch.Tensor], folder: str) -> None:
    kept = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
    torch.save(kept, os.path.join(folder, name))


def _load_tensors(file: str) -> dict[str, torch.Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True)


def _without_token(args: TrainingArguments, protocol: int) -> tuple[Any, ...]:
    """The pickle of the arguments, for `training_args.bin`, without the token that may write to the hub."""
    reduced = object.__reduce_ex__(args, protocol)
    assert isinstance(reduced, tuple)
    constructor, arguments, state = reduced[:3]
    kept = {name: value for name, value in state.items() if name != "__reduce_ex__"}
    return constructor, arguments, kept | {"hub_token": None}
