"""GRPOTrainer: collect rollouts, optimise.

One Trainer step is one optimizer step:

    slot -> [buffer empty?] -> prompts -> sync -> rollout -> rewards -> advantages -> old / ref log-probs -> buffer
                               ^-- again, with dynamic_sampling --'
         -> next of buffer -> micro-batches -> policy log-probs -> loss -> backward -> (Trainer) clip, step, log, save

    P prompts    G completions a prompt    B completions in a micro-batch    T completion tokens
"""

import contextlib
import copy
import dataclasses
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from .arguments import GRPOArguments
from .distributed import all_gather
from .monitors.canary import SlopeTest, check_versions
from .records.completions import CompletionsLog
from .records.evaluation import record_evaluation
from .records.metrics import MetricTracker, record_rollout
from .rewards.errors import RewardError
from .rewards.suite import RewardSuite
from .rollout.filling import BatchGroup, DynamicSampling, Filled, fresh_rows, record_filled
from .rollout.prompts import PromptStream
from .rollout.queue import RolloutBuffer, StepData, step_state
from .survival import checkpoints
from .survival.checkpoints import REFERENCE_FILE, ROLLOUT_FILE
from .survival.stop import SafeStop, StopRequested
from .survival.watchdog import HangError, Watchdog
from .types import Prompt, RolloutEngine, RolloutGroup, SamplingSettings, ScoredGroup, TrainingProgress
from .update.credit import has_reward_variance, with_advantages
from .update.gradient import PolicyGradient
from .update.logprobs import MovingReference, ReferencePolicy, ReferenceSync, disable_dropout


logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are

NON_FINITE_REMEDY = (
    "Start anew with a lower `learning_rate` or `max_grad_norm`, or in bf16 or float32 instead of fp16; a checkpoint "
    "from before the first such step can be continued with `resume_from_checkpoint`."
)
NO_REWARD_REMEDY = (
    "Check that the references and columns of the data are of the kind that the functions expect; "
    "`grpo-stage try-rewards` shows what each of them makes of the first rows."
)
FP16_SCALES = 16
"""How often fp16's loss scale can be halved before it is hopeless; every time costs a step."""
UNREWARDED_ROLLOUTS, UNREWARDED_PROMPTS = 10, 100
"""A run ends when no reward function applied to the prompts of as many rollouts in a row, and to as many prompts."""


class UnrewardedError(RuntimeError):
    """No reward function has applied to any completion for so long that none can be expected to."""


class TrainingEnded(Exception):
    """There is no step left to train: an evaluation that was made up for has stopped the run."""


class GRPOTrainer(Trainer):
    """Group Relative Policy Optimization on transformers' Trainer.

    Trainer's own accumulation is 1; `per_device_train_batch_size` x `gradient_accumulation_steps` x world size is the
    number of prompts of an optimizer step, and the micro-batches follow from a token budget.
    """

    control: TrainerControl
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
        recipe: dict[str, Any],
        tests_slope: bool = False,
        shuffle: bool = True,
        optimizer_factory: Callable[[nn.Module, TrainingArguments], torch.optim.Optimizer | None] = lambda *_: None,
        prepare_scheduler: Callable[[TrainingArguments, int, Any], None] = lambda *_: None,
        **kwargs: Any,
    ) -> None:
        args = copy.copy(args)
        vars(args)["__reduce_ex__"] = partial(_without_token, args)  # Trainer pickles them beside the weights
        self.prompts_per_step = prompts_of_step(args)
        args.gradient_accumulation_steps = 1
        # A rank that runs out of memory in its first pass would broadcast once more than the others. All are alike.
        args.ddp_broadcast_buffers = False
        super().__init__(model=model, args=args, train_dataset=prompts, eval_dataset=eval_prompts or None, **kwargs)
        # `accelerator_config` can set it as well, and several of our steps would then make one optimizer step.
        assert self.args.gradient_accumulation_steps == 1, "accumulation is folded into the number of prompts"
        disable_dropout(model)
        self.grpo_args = grpo_args
        self.sampling = sampling
        self.prompts = prompts
        self.engine = engine
        self.rewards = rewards
        self.reference = reference
        self.recipe = recipe
        self.stream = PromptStream(len(prompts), args.seed, shuffle, args.process_index, args.world_size)
        self.dynamic: DynamicSampling | None = None
        if grpo_args.dynamic_sampling:
            self.dynamic = DynamicSampling(
                grpo_args.max_resample_times, self._can_teach, args.process_index, args.world_size
            )
        self.buffer = RolloutBuffer()
        self.tracker = MetricTracker()
        self.completions_log = CompletionsLog(args.output_dir, rewards.names, grpo_args.num_completions_to_print)
        self.stop = SafeStop(args.process_index)
        engine.on_step = self.stop.check
        self.watchdog = Watchdog(args.output_dir, args.process_index, self.stop.interrupt, self._end_hanging)
        self.gradient = PolicyGradient(
            grpo_args=grpo_args,
            sampling=sampling,
            max_sampling_logprob_diff=max_sampling_logprob_diff,
            pad_token_id=self.processing_class.pad_token_id or 0,
            accelerator=self.accelerator,
            autocast=self.accelerator.autocast,  # Accelerate puts the policy's own forward in it, and no other model's
            safe_point=self.stop.check_together,
        )
        self.slope_test: SlopeTest | None = None
        if tests_slope:
            self.slope_test = SlopeTest(
                backend=grpo_args.rollout_backend,
                score=partial(self.gradient.frozen_logprobs, model, temperature=1.0),
                adapter_off=model.disable_adapter if isinstance(model, PeftModel) else None,
            )
        self._moving_reference: MovingReference | None = None
        if grpo_args.sync_ref_model:
            self._moving_reference = cast(MovingReference, reference)
            alpha, every = grpo_args.ref_model_mixup_alpha, grpo_args.ref_model_sync_steps
            self.add_callback(ReferenceSync(self._moving_reference, alpha, every, self.accelerator.unwrap_model))
        self._optimizer_factory = optimizer_factory
        self._prepare_scheduler = prepare_scheduler
        self._num_tokens = 0
        self._num_skipped = 0  # in a row
        self._num_learned = 0  # steps that had something to learn from and were not skipped
        self._num_rewarded = 0  # groups of all ranks with a reward
        self._num_unrewarded = 0  # groups of all ranks without one, in a row
        self._saved: tuple[int, bool] | None = None  # the step of the last checkpoint, and whether evaluation was due
        self._evaluation_due = False
        self._evaluated_step = -1
        self._is_over = False
        self._holds_best = False  # the weights of another step than the last
        self._undo_rollout: Callable[[], None] | None = None

    # One optimizer step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        started = time.perf_counter()
        self.stop.check_together()
        if self._evaluation_due:
            self._evaluate_late()
            if self.control.should_training_stop:
                raise TrainingEnded
        if not self.buffer:
            with self._undone_unless_finished():
                self.buffer.extend(self.collect())
        loss = self.update(model, self.buffer.first())
        self.buffer.drop_first()
        if self.dynamic is not None:
            self._end_with_the_prompts()
        self.tracker.add("step_time", time.perf_counter() - started)
        return loss

    def collect(self) -> list[StepData]:
        """Sample, score and prepare one rollout: the data of its optimizer steps, in the order of use."""
        policy = self.accelerator.unwrap_model(self.model)
        batch = self._sample_batch(self.prompts_per_step * self.grpo_args.steps_per_generation)

        prompts_per_rank = self.prompts_per_step // self.args.world_size
        chunks = [tuple(batch[start : start + prompts_per_rank]) for start in range(0, len(batch), prompts_per_rank)]
        num_chunks = max(1, *all_gather(len(chunks)))  # the last prompts of an epoch may not reach every rank
        chunks += [()] * (num_chunks - len(chunks))
        if self.grpo_args.mask_zero_std_groups:
            chunks = [tuple(each for each in chunk if self._can_teach(each.scored)) for chunk in chunks]
        # The canary looks at the first step. It may have lost its groups, or be made of such as have waited.
        checked = next((i for i in range(num_chunks) if any(all_gather(len(fresh_rows(chunks[i])) > 0))), 0)
        chunks.insert(0, chunks.pop(checked))
        is_reused = num_chunks * self.grpo_args.num_iterations > 1
        groups = [tuple(each.scored for each in chunk) for chunk in chunks]
        with self._timed("logprobs"):
            needs_old = is_reused or self.grpo_args.kl_in_reward
            old = [self._old_logprobs(policy, chunk, needs_old) for chunk in chunks]
            ref: list[tuple[torch.Tensor, ...] | None] = [None] * num_chunks
            if self.reference is not None:
                with self.reference.activate(policy) as reference:
                    ref = [self.gradient.frozen_logprobs(reference, chunk) for chunk in groups]
        if self.grpo_args.kl_in_reward:
            groups = self._penalized(groups, old, ref)
            old = old if is_reused else [None] * num_chunks  # what is used once is used on-policy
        return [
            StepData(
                groups=groups[i],
                old_logprobs=old[i],
                ref_logprobs=ref[i],
                logprob_temperature=self.engine.logprob_temperature,
                fresh_rows=fresh_rows(chunk) if iteration == 0 and i == 0 else frozenset(),
            )
            for iteration in range(self.grpo_args.num_iterations)
            for i, chunk in enumerate(chunks)
        ]

    def _sample_batch(self, count: int) -> list[BatchGroup]:
        """This rank's share of the groups, `count` over all ranks, that the next steps train on, with advantages."""
        if self.dynamic is None:
            scored = self._with_advantages(self._roll_out(count))
            if not self.grpo_args.kl_in_reward:  # which changes the advantages
                self._log_completions(scored)
            return [BatchGroup(scored=each) for each in scored]
        if self._is_end_of_epoch:
            self.stream.begin_epoch_if_due()
        policy = self.accelerator.unwrap_model(self.model)
        filled = self.dynamic.fill(
            count, partial(self._roll_out, count), self._may_roll_out, partial(self.gradient.frozen_logprobs, policy)
        )
        record_filled(self.tracker, filled, count, is_counter=self.args.process_index == 0)
        scored = self._with_advantages([each.scored for each in filled.groups])
        self._log_completions([*scored, *filled.dropped])
        self._say_if_short(filled, count)
        return [dataclasses.replace(each, scored=own) for each, own in zip(filled.groups, scored, strict=True)]

    def _roll_out(self, count: int) -> list[ScoredGroup]:
        """Sample and score this rank's share of the next `count` prompts."""
        with self.stop.together(), self._timed("sync"):
            self._sync()
        indices = self.stream.take(count)
        with self.stop.together(), self._timed("rollout") as timer:
            groups = self._generate([self.prompts[i] for i in indices], self.sampling, self.state.global_step)
        with self.stop.together(), self._timed("canary"):
            self._let_engine_sleep(groups)
        with self._timed("reward"):
            scored = self.score(groups)
        self._record_rollout(scored, seconds=timer())
        self._count_rewarded(scored, limit=max(UNREWARDED_PROMPTS, UNREWARDED_ROLLOUTS * count))
        return scored

    def _let_engine_sleep(self, groups: Sequence[RolloutGroup]) -> None:
        """Free its memory for rewards and log-probabilities, and see whether it has followed the policy."""
        version, answers = self.state.global_step, []
        if self.slope_test is not None:
            with self.watchdog.limit("canary", self.grpo_args.rollout_timeout, "rollout_timeout"):
                answers = self.slope_test.ask(self.engine, groups, version)
        self.engine.sleep()
        if self.slope_test is not None:
            for name, value in self.slope_test.check(answers, groups, version).items():
                self.tracker.add(name, value)

    def _count_rewarded(self, scored: Sequence[ScoredGroup], limit: int) -> None:
        """Say which rollouts have no reward, and end the run when `limit` groups in a row have none."""
        ranks = all_gather((sum(each.has_reward for each in scored), len(scored)))
        num_rewarded, num_groups = (sum(column) for column in zip(*ranks, strict=True))
        self._num_rewarded += num_rewarded
        self._num_unrewarded = 0 if num_rewarded > 0 else self._num_unrewarded + num_groups
        problem = (
            f"No reward function applied to any completion ({', '.join(self.rewards.names)} all returned None) of "
            f"the {num_groups} prompts that were sampled for step {self.state.global_step + 1}"
        )
        if self._num_unrewarded >= limit:
            raise UnrewardedError(
                f"{problem}, nor of the {self._num_unrewarded - num_groups} before them, so that nothing is learned: "
                f"the run is stopped. {NO_REWARD_REMEDY}"
            )
        if num_rewarded == 0 < num_groups and self.is_world_process_zero():
            logger.warning(f"{problem}: nothing is learned from them.")

    def _say_if_short(self, filled: Filled, count: int) -> None:
        if filled.num_kept == count or self.args.process_index > 0:
            return
        where = f"The batch of step {self.state.global_step + 1} has {filled.num_kept} of {count} groups"
        if filled.num_kept == 0:
            logger.warning(f"{where}: nothing is learned from it. The task is too hard or too easy for the policy.")
            return
        if self._may_roll_out():
            logger.warning(
                f"{where}: in {filled.num_rollouts} rollouts (`max_resample_times: "
                f"{self.grpo_args.max_resample_times}`) no more were found whose rewards differ. It is trained on as "
                "it is. Where that is the rule, the task is too hard or too easy for the policy."
            )
        else:
            logger.info(f"{where}, the last of the epoch.")

    def _old_logprobs(
        self, policy: nn.Module, chunk: Sequence[BatchGroup], are_needed: bool
    ) -> tuple[torch.Tensor, ...] | None:
        """Those of the policies that sampled the chunk; None where they are the present one's and not needed."""
        fresh = [each.scored for each in chunk if each.old_logprobs is None]
        if not are_needed and len(fresh) == len(chunk):
            return None
        logprobs = iter(self.gradient.frozen_logprobs(policy, fresh))
        return tuple(
            values
            for each in chunk
            for values in each.old_logprobs or [next(logprobs) for _ in each.scored.group.completions]
        )

    def _penalized(
        self,
        chunks: Sequence[tuple[ScoredGroup, ...]],
        old: Sequence[tuple[torch.Tensor, ...] | None],
        ref: Sequence[tuple[torch.Tensor, ...] | None],
    ) -> list[tuple[ScoredGroup, ...]]:
        """The chunks with advantages of rewards that the KL was taken off (`kl_in_reward`)."""
        flat_old, flat_ref = ([tokens for chunk in of_chunks for tokens in chunk or ()] for of_chunks in (old, ref))
        penalties = self.gradient.objective.reward_penalty(flat_old, flat_ref)
        scored = self._with_advantages([each for chunk in chunks for each in chunk], penalties)
        self._log_completions(scored)
        remaining = iter(scored)
        return [tuple(next(remaining) for _ in chunk) for chunk in chunks]

    def _sync(self) -> None:
        with self.watchdog.limit("sync", self.grpo_args.sync_timeout, "sync_timeout"):
            self.engine.sync(self.accelerator.unwrap_model(self.model), self.state.global_step)

    def _generate(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> list[RolloutGroup]:
        with self.watchdog.limit("rollout", self.grpo_args.rollout_timeout, "rollout_timeout"):
            groups = self.engine.generate(prompts, sampling, step)
        check_versions(groups, self.state.global_step)
        return groups

    def _reward(self, groups: Sequence[RolloutGroup]) -> list[list[list[float | None]]]:
        # A function in a worker process has a limit of its own; this one is for those in this process, together.
        limit = self.grpo_args.reward_timeout * (len(self.rewards.names) + 1)
        self.rewards.progress = TrainingProgress(
            global_step=self.state.global_step, max_steps=self.state.max_steps, epoch=float(self.state.epoch or 0)
        )
        with self.stop.together(), self.watchdog.limit("reward", limit, "reward_timeout"), self.stop.interruptible():
            return self.rewards.score(groups)

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """The groups with their rewards; advantages wait for the batch to be complete."""
        rewards = self._reward(groups)  # [P][G][F]
        totals = [[self.rewards.total(row) for row in group] for group in rewards]  # [P][G]
        return [
            ScoredGroup(
                group=group,
                rewards=tuple(tuple(row) for row in group_rewards),
                total_rewards=tuple(group_totals),
                advantages=(0.0,) * len(group_totals),
            )
            for group, group_rewards, group_totals in zip(groups, rewards, totals, strict=True)
        ]

    def _can_teach(self, scored: ScoredGroup) -> bool:
        """Whether its rewards differ, and the loss uses any of its completions."""
        is_used = any(scored.used(self.grpo_args.mask_truncated_completions))
        return is_used and has_reward_variance(scored, self.rewards.weights)

    def _is_used(self, data: StepData) -> bool:
        """Whether the loss uses any completion."""
        masks = self.grpo_args.mask_truncated_completions
        return any(any(scored.used(masks)) for scored in data.groups)

    def _is_learned_from(self, data: StepData) -> bool:
        """Whether the loss uses a completion whose advantage is not 0."""
        masks = self.grpo_args.mask_truncated_completions
        return any(
            is_used and advantage != 0
            for scored in data.groups
            for is_used, advantage in zip(scored.used(masks), scored.advantages, strict=True)
        )

    def _with_advantages(
        self, groups: Sequence[ScoredGroup], penalties: Sequence[float] | None = None
    ) -> list[ScoredGroup]:
        """The groups of a batch with their advantages. Statistics are taken over the whole batch, on all ranks."""
        return with_advantages(
            groups,
            estimator=self.grpo_args.advantage_estimator,
            scale_rewards=self.grpo_args.scale_rewards,
            weights=self.rewards.weights,
            penalties=penalties,
        )

    def update(self, model: nn.Module, data: StepData) -> torch.Tensor:
        """Accumulate the gradient of one optimizer step. The loss is the mean of what the ranks return."""
        with self._timed("update"):
            model.train()
            loss, metrics = self.gradient.accumulate(model, data, self.state.global_step)
            is_finite = self._is_finite(model, loss)
            if self.accelerator.scaler is None and not any(all_gather(self._is_used(data))):
                model.zero_grad()  # gradients of 0 would move the weights, by momentum and by decay
        loss = loss * self.args.world_size
        self.tracker.count("skipped_steps", 0.0 if is_finite or self.args.process_index > 0 else 1.0)
        if is_finite:
            self._num_skipped = 0
            self._num_learned += self._is_learned_from(data)
            self.gradient.objective.adapt(metrics)
            self.tracker.merge(metrics.state_dict())
            # Trainer's own mean forgets, when it resumes, the steps of a line that is not yet written.
            self.tracker.add("loss", loss)
        else:
            self._skip_step(model, data, loss)
        return loss

    def _is_finite(self, model: nn.Module, loss: torch.Tensor) -> bool:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        return all(all_gather(bool(torch.isfinite(loss)) and bool(torch.isfinite(norm))))

    def _skip_step(self, model: nn.Module, data: StepData, loss: torch.Tensor) -> None:
        """Leave the weights as they are: optimizers pass by a parameter without a gradient."""
        limit = self.grpo_args.max_skipped_steps
        if self.accelerator.scaler is None:
            model.zero_grad()
        else:
            limit += FP16_SCALES  # the scaler skips the step by itself, and lowers its scale
            next(p.grad for p in model.parameters() if p.grad is not None).fill_(math.inf)
        self._num_skipped += 1
        step, rank = self.state.global_step + 1, self.args.process_index
        file = os.path.join(self.args.output_dir, f"skipped_step_{step}_rank{rank}.json")
        where = f"The batch is in {file}."
        try:
            os.makedirs(self.args.output_dir, exist_ok=True)
            _write_json(file, {"step": step, "loss": str(loss.item()), **step_state(data)})
        except OSError as error:  # a look at it is not worth the run
            where = f"The batch could not be written to {file}: {error}."
        problem = f"The loss or its gradient in step {step} is not finite"
        if self._num_skipped > limit:
            raise FloatingPointError(
                f"{problem}, and so were those of the {self._num_skipped - 1} steps before (`max_skipped_steps: "
                f"{self.grpo_args.max_skipped_steps}`): the run is stopped. {where} "
                f"{NON_FINITE_REMEDY}"
            )
        logger.warning(f"{problem}: the step is skipped, and the weights stay as they are. {where}")

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the present policy on the evaluation prompts, as `evaluation.record_evaluation` defines them."""
        prompts = self.eval_dataset if eval_dataset is None else eval_dataset
        mine = prompts[self.args.process_index :: self.args.world_size]
        with self.stop.together():
            self._sync()
            groups = self._generate(mine, self._eval_sampling, step=0)
            self.engine.sleep()
        rewards = self._reward(groups)  # [P][G][F]
        totals = [[self.rewards.total(row) for row in group] for group in rewards]  # [P][G]
        tracker = MetricTracker()
        by_dataset = len({prompt.dataset for prompt in prompts}) > 1
        record_evaluation(tracker, groups, rewards, totals, self.rewards.names, by_dataset)
        for name, count in self.rewards.take_counters().items():
            tracker.count(f"rewards/{name}", count)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in tracker.take().items()}
        if f"{metric_key_prefix}_reward" not in metrics and self.is_world_process_zero():
            logger.warning(
                f"No reward function applied to any completion of the {len(prompts)} evaluation prompts "
                f"({', '.join(self.rewards.names)} all returned None), so the evaluation says nothing, and no model "
                f"is the best by it. {NO_REWARD_REMEDY}"
            )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._evaluation_due = True
        metrics = super()._evaluate(*args, **kwargs)
        self._evaluation_due = False
        self._evaluated_step = self.state.global_step
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """An evaluation to whose completions the function never applied has not measured the metric: no best one."""
        name = self.args.metric_for_best_model
        if name is not None and f"eval_{name.removeprefix('eval_')}" not in metrics:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _evaluate_late(self) -> None:
        """The evaluation of the step that was resumed from: the run was interrupted before or in it."""
        step = self.state.global_step
        if self._determine_best_metric(self._evaluate(None, None), None):
            best = os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
            if os.path.isdir(best):
                self.state.best_model_checkpoint = best

    @property
    def _is_evaluation_due(self) -> bool:
        """Also at the end of an epoch, whose last step is saved before Trainer evaluates."""
        ends_epoch = self.args.eval_strategy == "epoch" and self._is_end_of_epoch
        return self._evaluation_due or (ends_epoch and self._evaluated_step != self.state.global_step)

    @property
    def _eval_sampling(self) -> SamplingSettings:
        """Another seed than training's, and the same at every evaluation: the curve then shows the policy alone."""
        num_generations, temperature = self.grpo_args.eval_num_generations, self.grpo_args.eval_temperature
        return dataclasses.replace(
            self.sampling,
            seed=self.sampling.seed + 1,
            num_generations=num_generations or self.sampling.num_generations,
            temperature=self.sampling.temperature if temperature is None else temperature,
        )

    # Logs

    def _record_rollout(self, scored: Sequence[ScoredGroup], seconds: float) -> None:
        record_rollout(self.tracker, scored, self.rewards.names, self.rewards.weights)
        for name, count in self.rewards.take_counters().items():
            self.tracker.count(f"rewards/{name}", count)
        tokens = sum(len(c.token_ids) for s in scored for c in s.group.completions)
        self.tracker.add("rollout_tokens_per_second", sum(all_gather(tokens)), seconds)
        prompt_tokens = sum(len(s.group.prompt.token_ids) * len(s.group.completions) for s in scored)
        self._num_tokens += sum(all_gather(tokens + prompt_tokens))

    def _log_completions(self, scored: Sequence[ScoredGroup]) -> None:
        if self.grpo_args.log_completions:
            everyone = [s for rank in all_gather(list(scored)) for s in rank]
            if self.is_world_process_zero():
                self.completions_log.record(self.state.global_step + 1, everyone)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.tracker.take() | {"num_tokens": float(self._num_tokens)}
            if self.grpo_args.log_completions and self.is_world_process_zero():
                self.completions_log.print_table()
        super().log(logs, start_time)

    @contextlib.contextmanager
    def _undone_unless_finished(self) -> Iterator[None]:
        """A rollout that is left by an error was never begun: its prompts are due again."""
        stream, metrics, num_tokens = self.stream.state_dict(), self.tracker.state_dict(), self._num_tokens
        puts_back = [each.undo() for each in (self.dynamic, self.slope_test) if each is not None]
        num_groups = self._num_rewarded, self._num_unrewarded

        def undo() -> None:
            for put_back in puts_back:
                put_back()
            self.stream.load_state_dict(stream)
            self.tracker.load_state_dict(metrics)
            self._num_tokens = num_tokens
            self._num_rewarded, self._num_unrewarded = num_groups

        self._undo_rollout = undo
        try:
            yield
        except BaseException:
            undo()
            raise
        finally:
            self._undo_rollout = None

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[Callable[[], float]]:
        """Log the seconds spent as time/{name}; yields a clock that reads them."""
        started = time.perf_counter()
        elapsed: list[float] = []
        yield lambda: elapsed[0] if elapsed else time.perf_counter() - started
        elapsed.append(time.perf_counter() - started)
        self.tracker.add(f"time/{name}", elapsed[0])

    # What Trainer needs to know

    @property
    def steps_per_epoch(self) -> int:
        return steps_of_epoch(len(self.prompts), self.prompts_per_step, self.grpo_args.num_iterations)

    def get_train_dataloader(self) -> DataLoader:
        """One empty slot an optimizer step: the prompts come from `stream`, whatever a step needs of them."""
        slots: Any = [{} for _ in range(self.steps_per_epoch)]
        return DataLoader(slots, batch_size=1, collate_fn=lambda batch: batch[0])

    @property
    def _is_end_of_epoch(self) -> bool:
        """Whether nothing of an epoch is left to be trained on."""
        if self.dynamic is None:
            return self.state.global_step % self.steps_per_epoch == 0
        return self._is_everything_used and self.stream.remaining() == 0

    # An epoch of dynamic sampling has fewer steps than `steps_per_epoch` where groups are dropped: it ends when its
    # prompts are used up, and so does the run.

    @property
    def _is_everything_used(self) -> bool:
        """Whether all that was sampled is trained on."""
        return not self.buffer and (self.dynamic is None or self.dynamic.num_waiting == 0)

    @property
    def _has_prompts_left(self) -> bool:
        """Whether the run may sample further prompts. Under `max_steps` it takes as many epochs as it needs."""
        return self.args.max_steps > 0 or self.stream.num_taken < self.args.num_train_epochs * len(self.prompts)

    def _may_roll_out(self) -> bool:
        """Whether a batch may take further prompts: none reaches into the next epoch."""
        return self._has_prompts_left and self.stream.remaining() > 0

    @property
    def _is_over_early(self) -> bool:
        """Whether there is nothing left to train on, however many steps there might be."""
        return self.dynamic is not None and self._is_everything_used and not self._has_prompts_left

    def _end_with_the_prompts(self) -> None:
        """Have Trainer end the epoch or the run after this step if its prompts are used up."""
        if self._is_end_of_epoch:
            self.control.should_epoch_stop = True
        if self._is_over_early and self.state.global_step + 1 < self.state.max_steps:
            logger.info(
                f"The prompts of all {self.args.num_train_epochs:g} epochs are used up: the run ends with step "
                f"{self.state.global_step + 1} of at most {self.state.max_steps}."
            )
            self.state.max_steps = self.state.global_step + 1

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> Any:
        num_train_epochs, *others = super().set_initial_training_values(args, dataloader)
        if self.dynamic is not None and args.max_steps > 0:
            num_train_epochs = args.max_steps  # an epoch has a step at least
        return num_train_epochs, *others

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        num_epochs, num_slots = super()._init_training_state(*args)
        if self.dynamic is None or self.state.global_step == 0:
            return num_epochs, num_slots
        # Of a begun epoch one slot is left out: there are always more than are needed.
        return (self.stream.epoch + 1, 0) if self._is_end_of_epoch else (self.stream.epoch, 1)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.dynamic is not None:
            self.state.epoch = self.stream.num_taken / len(self.prompts)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def num_examples(self, dataloader: DataLoader) -> int:
        return len(self.prompts)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return self.prompts_per_step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self._optimizer_factory(self.model, self.args)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self._prepare_scheduler(self.args, num_training_steps, optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer saves, but whole or not at all (`checkpoints.save`)."""
        self.store_flos()
        output_dir = Path(self._get_output_dir(trial))
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == folder or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        parts: dict[str, checkpoints.Part] = {"the model": partial(self.save_model, _internal_call=True)}
        state = None
        if not self.args.save_only_model:  # without optimizer and schedule nothing could be continued
            state = {
                **self.recipe,
                "prompts": self.stream.state_dict(),
                "num_tokens": self._num_tokens,
                "evaluation_due": self._is_evaluation_due,
                "objective": self.gradient.objective.state_dict(),
            }
            parts |= {
                "the optimizer and the schedule": self._save_optimizer_and_scheduler,
                "the loss scale": self._save_scaler,
                "the random states": self._save_rng_state,
                "the rollouts": self._save_rank_state,
            }
            if self._moving_reference is not None and self.args.should_save:
                parts["the reference"] = self._save_reference
        parts["the trainer's state"] = self._save_trainer_state
        checkpoints.save(folder, parts, state, is_saver=self.args.should_save)
        self._saved = None if state is None else (self.state.global_step, self._is_evaluation_due)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            checkpoints.rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _save_rank_state(self, folder: str) -> None:
        state = {
            "steps": self.buffer.state_dict(),
            "dynamic_sampling": None if self.dynamic is None else self.dynamic.state_dict(),
            "slope_test": None if self.slope_test is None else self.slope_test.state_dict(),
            "metrics": self.tracker.state_dict(),
            "num_skipped": self._num_skipped,
            "num_learned": self._num_learned,
            "num_rewarded": self._num_rewarded,
            "num_unrewarded": self._num_unrewarded,
            "token_budget": self.gradient.token_budget,
        }
        _write_json(os.path.join(folder, ROLLOUT_FILE.format(rank=self.args.process_index)), state)

    def _save_reference(self, folder: str) -> None:
        assert self._moving_reference is not None
        state = {name: tensor.detach().cpu() for name, tensor in self._moving_reference.state_dict().items()}
        torch.save(state, os.path.join(folder, REFERENCE_FILE))

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

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, or go on from a checkpoint folder of this recipe.

        Raises:
            ValueError: if the checkpoint's run is finished: Trainer would train a step more each time.
            StopRequested: where a signal asked for it, after a checkpoint was saved.
        """
        step = 0
        if resume_from_checkpoint:
            assert isinstance(resume_from_checkpoint, str)
            step = self._load_progress(resume_from_checkpoint)
            self.args.eval_on_start = False
        elif self.args.should_save:
            checkpoints.discard_earlier_run(self.args.output_dir)
        if self.grpo_args.log_completions and self.is_world_process_zero():
            # A rollout that waits for its first use is not sampled again, and was logged as of the next step.
            self.completions_log.drop_after(step + 1 if self.buffer else step)
        with self.stoppable():
            try:
                if resume_from_checkpoint and self._is_over:
                    output = self._finish(resume_from_checkpoint)
                else:
                    output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except TrainingEnded:
                output = self._finish()
        self._check_learned(output.global_step)
        return output

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """In this block a stop, a hang and a failing reward leave a checkpoint of the last finished step."""
        with self.stop.listening():
            try:
                yield
            except StopRequested as request:
                request.checkpoint = self.save_progress()
                raise
            except (HangError, RewardError, UnrewardedError) as error:
                # One rank alone cannot save what all have. The weights are those of the last finished step.
                if self.args.world_size == 1 and (checkpoint := self.save_progress()) is not None:
                    error.add_note(f"What was trained until then is in {checkpoint}.")
                raise

    def _check_learned(self, num_steps: int) -> None:
        """No run that learned nothing is a success."""
        if sum(all_gather(self._num_learned)) > 0:
            return
        if self._num_rewarded == 0:
            raise UnrewardedError(
                f"No reward function applied to any completion of the {num_steps} steps "
                f"({', '.join(self.rewards.names)} always returned None), so that nothing was learned. "
                f"{NO_REWARD_REMEDY}"
            )
        if self._num_skipped == 0:
            raise RuntimeError(
                f"In none of the {num_steps} steps was a completion that the loss uses better or worse than the "
                "others, so that nothing was learned: the task is too hard or too easy for the policy, the reward "
                "functions do not tell its completions apart, or `mask_truncated_completions` leaves out those that "
                "differ. Raise `num_generations`, `temperature` or `max_new_tokens`, or choose other prompts or "
                "`reward_funcs`; `completions.jsonl` shows what was sampled with `log_completions: true`."
            )
        raise FloatingPointError(
            f"None of the {num_steps} steps had a finite loss and gradient, so that all were skipped and "
            f"nothing was learned. {NON_FINITE_REMEDY}"
        )

    def _finish(self, checkpoint: str | None = None) -> TrainOutput:
        """What is left of a run whose last step is done: an evaluation that is due, and the best model."""
        if checkpoint is not None:
            logger.info(f"Every step is done in {checkpoint}: what is left is the end of the run.")
            self._load_from_checkpoint(checkpoint)
            self.state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
            self.state.is_local_process_zero = self.is_local_process_zero()
            self.state.is_world_process_zero = self.is_world_process_zero()
            self._saved = (self.state.global_step, self._evaluation_due)
            self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
            if self._evaluation_due:
                self._evaluate_late()
        losses = [line["loss"] for line in self.state.log_history if "loss" in line]
        metrics = {"train_loss": sum(losses) / max(1, len(losses)), "total_flos": self.state.total_flos}
        self.log(metrics)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._holds_best = True

    def _finalize_training(self, *args: Any) -> TrainOutput:
        """With `save_total_limit: 1` Trainer deletes all but the best checkpoint here: see `delete_all_but_best`."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        output = super()._finalize_training(*args)
        self.args.save_total_limit = limit
        return output

    def delete_all_but_best(self) -> None:
        """As Trainer does with `save_total_limit: 1`, but once nothing goes on from the last checkpoint any more."""
        best = Path(self.state.best_model_checkpoint or "")
        is_own = best.is_dir() and best.parent == Path(self.args.output_dir)
        if self.args.should_save and self.args.save_total_limit == 1 and is_own:
            checkpoints.rotate(best, limit=1, best=str(best))

    def save_progress(self) -> str | None:
        """The folder of a checkpoint of the last finished step, written if it is not yet; None before the first.

        Once the best model is loaded, the newest that there is: the weights of the last step are gone.
        """
        step = self.state.global_step
        if step == 0:
            return None
        if self._holds_best:
            newest = checkpoints.newest_whole(Path(self.args.output_dir))
            return None if newest is None else str(newest)
        folder = os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        if self._saved != (step, self._is_evaluation_due):
            self.args.save_only_model = False
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return folder

    def _end_hanging(self, error: HangError) -> None:
        """End the process from the watchdog's thread: the main one hangs in native code and cannot be reached."""
        try:
            print(error, file=sys.stderr, flush=True)
            if self._undo_rollout is not None:
                self._undo_rollout()
            if self.args.world_size == 1:
                print(f"What was trained until then is in {self.save_progress()}.", file=sys.stderr, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _load_progress(self, folder: str) -> int:
        """Restore prompts and rollouts; returns the optimizer step that the checkpoint was taken at."""
        trainer_state = TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME))
        step = trainer_state.global_step
        state = checkpoints.read_state(Path(folder))
        of_rank = _read_json(os.path.join(folder, ROLLOUT_FILE.format(rank=self.args.process_index)))
        self.stream.load_state_dict(state["prompts"])
        self.buffer.load_state_dict(of_rank["steps"], self.prompts)
        if self.dynamic is not None:
            self.dynamic.load_state_dict(of_rank["dynamic_sampling"], self.prompts)
        if self.slope_test is not None and of_rank["slope_test"] is not None:  # None: in another precision until now
            self.slope_test.load_state_dict(of_rank["slope_test"], self.prompts)
        num_steps = steps_of_run(self.args, self.steps_per_epoch)
        if self.args.max_steps <= 0 and self._is_over_early:
            num_steps = step
        self._is_over = checkpoints.is_over(Path(folder), self.args.output_dir, num_steps, self.args.do_eval)
        if self.args.device.type == "cpu":  # of several processes it is `cpu:<rank>`, no place that torch.load knows
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
        self._num_tokens, self._evaluation_due = state["num_tokens"], state["evaluation_due"]
        self._evaluated_step = -1 if self._evaluation_due else step
        self.gradient.objective.load_state_dict(state["objective"])
        if self._moving_reference is not None:
            weights = torch.load(os.path.join(folder, REFERENCE_FILE), map_location="cpu", weights_only=True)
            self._moving_reference.load_state_dict(weights)
        self.tracker.load_state_dict(of_rank["metrics"])
        self._num_skipped, self._num_learned = of_rank["num_skipped"], of_rank["num_learned"]
        self._num_rewarded, self._num_unrewarded = of_rank["num_rewarded"], of_rank["num_unrewarded"]
        # Either may have been lowered: by the user, or where memory ran out.
        self.gradient.token_budget = min(self.gradient.token_budget, of_rank["token_budget"])
        return step


def _without_token(args: TrainingArguments, protocol: int) -> tuple[Any, ...]:
    """How the arguments are pickled, into `training_args.bin`: without the token that writes to the hub."""
    reduced = object.__reduce_ex__(args, protocol)
    assert isinstance(reduced, tuple)
    constructor, arguments, state = reduced[:3]
    kept = {name: value for name, value in state.items() if name != "__reduce_ex__"}
    return constructor, arguments, kept | {"hub_token": None}


def prompts_of_step(args: TrainingArguments) -> int:
    """On all devices together."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def steps_of_epoch(num_prompts: int, prompts_per_step: int, num_iterations: int) -> int:
    """Optimizer steps that an epoch has; with dynamic sampling, at most."""
    return -(-num_prompts // prompts_per_step) * num_iterations


def steps_of_run(args: TrainingArguments, steps_per_epoch: int) -> int:
    """Optimizer steps that a run has; with dynamic sampling and no `max_steps`, at most."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)


def _write_json(path: str, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file)


def _read_json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)
