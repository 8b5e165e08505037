"""GRPOTrainer: collect rollouts, learn from them.

One Trainer step is one optimizer step:

    slot -> [queue empty? collector: prompts -> rollout -> rewards -> log-probs -> advantages -> queue]
         -> learner: next of queue -> micro-batches -> policy log-probs -> loss -> backward
         -> (Trainer) clip, step, log, save
"""

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from accelerate.utils import AutocastKwargs
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from .arguments import GRPOArguments
from .collector import Collector
from .distributed import all_gather
from .evaluator import Evaluator
from .learner import Learner
from .monitors.alarms import Alarms
from .monitors.monitor import Monitor, MonitorRequest
from .monitors.table import make_monitors, make_watches
from .records.activity import Activity
from .records.metrics import MetricTracker
from .rewards.suite import RewardSuite
from .rollout.epochs import prompts_of_step, steps_of_run
from .rollout.sampler import Sampler
from .survival.phase import Phases
from .survival.resumable import ResumableTrainer
from .survival.run_state import Part, RunState, Scope
from .types import ImageReader, Prompt, RolloutEngine, SamplingSettings
from .update.batch import rows_of
from .update.dropout import disable_dropout
from .update.output_layer import compute_output_layer_in_float32
from .update.reference import MovingReference, ReferencePolicy, ReferenceSync, ShardableReference
from .update.routing import RouterLoss


logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are


class GRPOTrainer(ResumableTrainer):
    """Group Relative Policy Optimization on transformers' Trainer.

    Trainer's own accumulation is 1; `per_device_train_batch_size` x `gradient_accumulation_steps` x world size is the
    number of prompts of an optimizer step, and the micro-batches follow from a token budget.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        grpo_args: GRPOArguments,
        sampling: SamplingSettings,
        prompts: Sequence[Prompt],
        eval_prompts: Sequence[Prompt],
        engine: RolloutEngine,
        rewards: RewardSuite,
        reference: ReferencePolicy | None,
        max_sampling_logprob_diff: float,
        tests_slope: bool = False,
        settings: Mapping[str, Any] = MappingProxyType({}),
        possible_settings: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
        may_recover: bool = False,
        num_prompts_to_skip: int = 0,
        checkpoints_if_needed: bool = False,
        router_aux_loss_coef: float = 0.0,
        shuffle: bool = True,
        optimizer_factory: Callable[[nn.Module, TrainingArguments], torch.optim.Optimizer | None] = lambda *_: None,
        prepare_scheduler: Callable[[TrainingArguments, int, Any], None] = lambda *_: None,
        activity: Activity | None = None,
        images: ImageReader | None = None,
        **kwargs: Any,
    ) -> None:
        prompts_per_step = prompts_of_step(args)
        super().__init__(
            model=model, args=_own(args), train_dataset=prompts, eval_dataset=eval_prompts or None, **kwargs
        )
        # `accelerator_config` can set it as well; one optimizer step would then take several steps of this trainer.
        assert self.args.gradient_accumulation_steps == 1, "accumulation is folded into the number of prompts"
        # A layer uses each weight once a pass. Copies in half precision that wait for a second use would take as much
        # memory as all weights in half precision.
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        disable_dropout(model)
        if grpo_args.cast_lm_head_to_fp32:
            compute_output_layer_in_float32(model)
        engine.on_step = self.stop.check
        self.grpo_args = grpo_args
        self.reference = reference
        self.activity = activity or Activity(None)
        self.tracker = MetricTracker()
        self.phases = phases = Phases(self.stop, self.watchdog, self.tracker)
        sampler = Sampler(engine, rewards, phases, grpo_args)
        self.alarms = Alarms(
            make_watches(settings),
            grpo_args.on_alarm,
            possible_settings,
            may_recover,
            self.args.output_dir,
            self.args.process_index,
            self.tracker,
        )
        self.monitors = self._make_monitors(prompts_per_step, rewards.names, max_sampling_logprob_diff, tests_slope)
        self.learner = Learner(
            args=self.args,
            grpo_args=grpo_args,
            sampling=sampling,
            monitors=self.monitors.values(),
            router_loss=RouterLoss(model, router_aux_loss_coef) if router_aux_loss_coef > 0 else None,
            pad_token_id=self.processing_class.pad_token_id or 0,
            accelerator=self.accelerator,
            strategy=self.strategy,
            checkpoints_if_needed=checkpoints_if_needed,
            phases=phases,
            gather=self.stop.gather,
            images=images,
        )
        self.collector = Collector(
            policy=model,
            args=self.args,
            grpo_args=grpo_args,
            sampling=sampling,
            prompts=prompts,
            prompts_per_step=prompts_per_step,
            shuffle=shuffle,
            sampler=sampler,
            frozen=self.learner.frozen,
            objective=self.learner.objective,
            reference=reference,
            monitors=self.monitors.values(),
        )
        self.evaluator = Evaluator(model, self.args, grpo_args, sampling, sampler)
        self._num_prompts_to_skip = num_prompts_to_skip
        self.run_state = RunState(self._stateful_parts())
        if grpo_args.sync_ref_model:
            self.add_callback(ReferenceSync(cast(MovingReference, reference), grpo_args, self.strategy.unwrap))
        self._optimizer_factory = optimizer_factory
        self._prepare_scheduler = prepare_scheduler

    def _make_monitors(
        self, prompts_per_step: int, reward_names: Sequence[str], max_sampling_logprob_diff: float, tests_slope: bool
    ) -> dict[str, Monitor]:
        request = MonitorRequest(
            policy=self.model,
            grpo_args=self.grpo_args,
            prompts=self.train_dataset,
            prompts_per_rollout=prompts_per_step * self.grpo_args.steps_per_generation,
            reward_names=reward_names,
            rank=self.args.process_index,
            score=lambda groups: self.learner.frozen.logprobs(self.model, rows_of(groups), temperature=1.0),
            max_sampling_logprob_diff=max_sampling_logprob_diff,
            tests_slope=tests_slope,
        )
        return make_monitors(request)

    def _stateful_parts(self) -> dict[str, Part]:
        """Everything that a resume restores, under its name in checkpoints."""
        collector, learner = self.collector, self.learner
        parts = {
            "stream": Part(collector.stream, Scope.RUN, is_undone=True),
            "objective": Part(learner.objective, Scope.RUN),
            "evaluations": Part(self.evaluations, Scope.RUN),
            "queue": Part(collector.queue, Scope.RANK),
            "filling": Part(collector.filling, Scope.RANK, is_undone=True),
            "tracker": Part(self.tracker, Scope.RANK, is_undone=True),
            "collector": Part(collector, Scope.RANK, is_undone=True),
            "alarms": Part(self.alarms, Scope.RUN, is_optional=True),
            "learner": Part(learner, Scope.RANK),
            "budget": Part(learner.budget, Scope.RANK),
        }
        for name, monitor in self.monitors.items():
            parts[f"monitors/{name}"] = Part(monitor, Scope.RANK, is_undone=True, is_optional=True)
        if collector.curriculum is not None:
            parts["curriculum"] = Part(collector.curriculum, Scope.RUN, is_undone=True)
        if collector.ahead is not None:
            parts["ahead"] = Part(collector.ahead, Scope.RANK, is_undone=True)
        if self.grpo_args.sync_ref_model:
            parts["reference"] = Part(cast(MovingReference, self.reference), Scope.TENSORS)
        return parts

    # One optimizer step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        started = time.perf_counter()
        self.stop.check_together()
        self.evaluate_if_overdue()
        queue = self.collector.queue
        if not queue:
            with self.run_state.undone_on_error():
                self.collector.collect(self.state)
        loss = self.learner.learn(model, queue.first(), self.state.global_step)
        queue.drop_first()
        self._end_with_the_prompts()
        self.tracker.add("step_time", time.perf_counter() - started)
        return loss

    def _end_with_the_prompts(self) -> None:
        """Have Trainer end the epoch or the run after this step if its prompts are used up before the steps are."""
        epochs, step = self.collector.epochs, self.state.global_step + 1
        if epochs.is_cut:
            self.control.should_epoch_stop = True
        if epochs.is_run_over and step < self.state.max_steps:
            logger.info(
                f"The prompts of all {self.args.num_train_epochs:g} epochs are used up: the run ends with step "
                f"{step} of at most {self.state.max_steps}."
            )
            self.state.max_steps = step

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the present policy on the evaluation prompts, as `records.evaluation` defines them."""
        prompts = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.collector.ahead is not None:
            self.collector.ahead.settle()  # the engine has one policy at a time
        with self.activity.during("evaluation"):
            measured = self.evaluator.evaluate(prompts, self.state)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.tracker.take() | {"num_tokens": float(self.collector.num_tokens)}
            if self.grpo_args.log_completions and self.is_world_process_zero():
                self.collector.completions_log.print_table()
        super().log(logs, start_time)
        self.alarms.judge(self.state.log_history)  # before the step is saved: a resume tells nothing twice

    # The questions that ResumableTrainer asks

    @property
    def is_end_of_epoch(self) -> bool:
        return self.collector.epochs.is_end(self.state.global_step)

    def num_steps(self, step: int) -> int:
        if self.args.max_steps <= 0 and self.collector.epochs.is_run_over:
            return step
        return steps_of_run(self.args, self.collector.steps_per_epoch)

    def save_progress(self) -> str | None:
        self.activity.begin("stopping")
        return super().save_progress()

    def prepare_models(self) -> None:
        if self.reference is not None and self.sharded is not None:
            cast(ShardableReference, self.reference).distribute(self.model, self.sharded.distribute)
        self.learner.prepare(self.model, self.reference, self.train_dataset)

    def prepare_from(self, step: int) -> None:
        self.alarms.drop_after(step)
        self.collector.stream.skip_to(self._num_prompts_to_skip)
        if self.grpo_args.log_completions:
            # A rollout that waits for its first use was logged under the next step, and is not sampled again.
            self.collector.completions_log.drop_after(step + 1 if self.collector.queue else step)

    def check_learned(self, num_steps: int) -> None:
        """No run that learned nothing is a success."""
        if sum(all_gather(self.learner.num_learned)) == 0:
            self.collector.check_rewarded(num_steps)
            self.learner.refuse_unlearned(num_steps)

    # Hooks of Trainer

    def get_train_dataloader(self) -> DataLoader:
        """One empty slot for each optimizer step: the collector takes as many prompts as a step needs."""
        slots: Any = [{} for _ in range(self.collector.steps_per_epoch)]
        return DataLoader(slots, batch_size=1, collate_fn=lambda batch: batch[0])

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> Any:
        num_train_epochs, *others = super().set_initial_training_values(args, dataloader)
        return self.collector.epochs.most(num_train_epochs), *others

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        num_epochs, num_slots = super()._init_training_state(*args)  # restores `state.global_step`
        return self.collector.epochs.resumed_at(self.state.global_step, num_epochs, num_slots)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.state.epoch = self.collector.epochs.done(self.state.epoch)
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.alarms.act(self.collector.stream.num_taken)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self.strategy.grad_norm(model, super()._get_grad_norm(model, grad_norm=grad_norm))

    def num_examples(self, dataloader: DataLoader) -> int:
        return len(self.train_dataset)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return self.collector.prompts_per_step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self._optimizer_factory(self.model, self.args)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self._prepare_scheduler(self.args, num_training_steps, optimizer)
        return super().create_scheduler(num_training_steps, optimizer)


def _own(args: TrainingArguments) -> TrainingArguments:
    """A copy of the arguments for Trainer, with accumulation 1."""
    args = copy.copy(args)
    args.gradient_accumulation_steps = 1
    # A rank that runs out of memory in its first pass would broadcast its buffers once more than the others do.
    # The buffers are the same on all ranks, so nothing has to be broadcast.
    args.ddp_broadcast_buffers = False
    return args
