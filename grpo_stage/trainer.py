"""GRPOTrainer: collect rollouts, optimise.

One Trainer step is one optimizer step:

    slot -> [buffer empty?] -> prompts -> sync -> rollout -> rewards -> advantages -> old / ref log-probs -> buffer
         -> next of buffer -> micro-batches -> policy log-probs -> loss -> backward -> (Trainer) clip, step, log, save

    P prompts    G completions a prompt    B completions in a micro-batch    T completion tokens
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .algorithm.advantages import group_advantages
from .algorithm.kl import k3
from .algorithm.losses import StepTotals, clipped_surrogate
from .arguments import GRPOArguments
from .batch import count_totals, dummy_batch, micro_batches
from .buffer import RolloutBuffer, StepData
from .canary import check_difference, check_versions
from .completions_log import CompletionsLog
from .metrics import MetricTracker, all_gather, record_rollout, record_update
from .policy import ReferencePolicy, disable_dropout, token_logprobs
from .prompts import PromptStream
from .rewards import RewardSuite
from .types import PolicyBatch, Prompt, RolloutEngine, RolloutGroup, SamplingSettings, ScoredGroup


STATE_FILE = "grpo_state.json"
"""In every checkpoint: the recipe, and where the prompts are."""
ROLLOUT_FILE = "grpo_rollout_{rank}.json"
"""In every checkpoint: what is left of the last rollout on that rank."""


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
        shuffle: bool = True,
        optimizer_factory: Callable[[nn.Module, TrainingArguments], torch.optim.Optimizer | None] = lambda *_: None,
        prepare_scheduler: Callable[[TrainingArguments, int, Any], None] = lambda *_: None,
        **kwargs: Any,
    ) -> None:
        args = copy.copy(args)
        self.prompts_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        args.gradient_accumulation_steps = 1
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
        self.max_sampling_logprob_diff = max_sampling_logprob_diff
        self.recipe = recipe
        self.stream = PromptStream(len(prompts), args.seed, shuffle, args.process_index, args.world_size)
        self.buffer = RolloutBuffer()
        self.tracker = MetricTracker()
        self.completions_log = CompletionsLog(args.output_dir, rewards.names, grpo_args.num_completions_to_print)
        self._optimizer_factory = optimizer_factory
        self._prepare_scheduler = prepare_scheduler
        self._num_tokens = 0

    # One optimizer step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        started = time.perf_counter()
        if not self.buffer:
            self.buffer.extend(self.collect())
        loss = self.update(model, self.buffer.next())
        self.tracker.add("step_time", time.perf_counter() - started)
        return loss

    def collect(self) -> list[StepData]:
        """Sample, score and prepare one rollout: the data of its optimizer steps, in the order of use."""
        version = self.state.global_step
        policy = self.accelerator.unwrap_model(self.model)
        indices = self.stream.take(self.prompts_per_step * self.grpo_args.steps_per_generation)
        with self._timed("sync"):
            self.engine.sync(policy, version)
        with self._timed("rollout") as timer:
            groups = self.engine.generate([self.prompts[i] for i in indices], self.sampling, step=version)
        check_versions(groups, version)
        with self._timed("reward"):
            scored = self.score(groups)
        self._record_rollout(scored, seconds=timer())

        prompts_per_rank = self.prompts_per_step // self.args.world_size
        chunks = [tuple(scored[start : start + prompts_per_rank]) for start in range(0, len(scored), prompts_per_rank)]
        num_chunks = max(all_gather(len(chunks)))  # the last prompts of an epoch may not reach every rank
        chunks += [()] * (num_chunks - len(chunks))
        uses_per_rollout = num_chunks * self.grpo_args.num_iterations
        with self._timed("logprobs"):
            old = [self._frozen_logprobs(policy, chunk) if uses_per_rollout > 1 else None for chunk in chunks]
            ref: list[tuple[torch.Tensor, ...] | None] = [None] * num_chunks
            if self.reference is not None:
                with self.reference.activate(policy) as reference:
                    ref = [self._frozen_logprobs(reference, chunk) for chunk in chunks]
        return [
            StepData(groups=chunk, old_logprobs=old[i], ref_logprobs=ref[i], is_fresh=iteration == 0 and i == 0)
            for iteration in range(self.grpo_args.num_iterations)
            for i, chunk in enumerate(chunks)
        ]

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """Rewards and advantages. Statistics of a batch are taken over all ranks of the generation."""
        rewards = self.rewards.score(groups)  # [P][G][F]
        totals = [[self.rewards.total(row) for row in group] for group in rewards]  # [P][G]
        totals_of_ranks = all_gather(totals)
        everyone = torch.tensor(
            [
                [float("nan") if total is None else total for total in group]
                for rank in totals_of_ranks
                for group in rank
            ],
            dtype=torch.float64,
        )
        if everyone.isnan().all():
            raise ValueError(
                f"No reward function applied to any of the {everyone.numel()} completions of step "
                f"{self.state.global_step + 1} ({', '.join(self.rewards.names)} all returned None), so nothing can be "
                "learned from them. Check that the dataset's references are of the kind that the functions expect."
            )
        first = sum(len(rank) for rank in totals_of_ranks[: self.args.process_index])
        advantages = group_advantages(everyone, self.grpo_args.scale_rewards)[first : first + len(groups)].tolist()
        return [
            ScoredGroup(
                group=group,
                rewards=tuple(tuple(row) for row in group_rewards),
                total_rewards=tuple(group_totals),
                advantages=tuple(group_advantage),
            )
            for group, group_rewards, group_totals, group_advantage in zip(
                groups, rewards, totals, advantages, strict=True
            )
        ]

    def update(self, model: nn.Module, data: StepData) -> torch.Tensor:
        """Accumulate the gradient of one optimizer step. The loss is the mean of what the ranks return."""
        with self._timed("update"):
            model.train()
            totals = self._global_totals(data.groups)
            batches = self._micro_batches(data.groups, totals)
            loss = torch.zeros((), device=self.args.device)
            is_checked = data.is_fresh and len(data.groups) > 0
            for index, batch in enumerate(batches):
                is_last = index == len(batches) - 1
                # DDP reduces gradients in the last backward alone.
                with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                    micro_loss = self._micro_batch_loss(model, batch, data, check=is_checked and index == 0)
                    self.accelerator.backward(micro_loss)
                loss += micro_loss.detach()
        self._refuse_non_finite(loss, "loss")
        return loss

    def _micro_batch_loss(self, model: nn.Module, batch: PolicyBatch, data: StepData, check: bool) -> torch.Tensor:
        with self.compute_loss_context_manager():
            logprobs, entropy = token_logprobs(model, batch, self.sampling.temperature, with_entropy=True)  # [B, T]
        assert entropy is not None
        self._refuse_non_finite(logprobs, "policy's log-probabilities")
        if check:
            self._check_canary(model, batch, logprobs.detach())
        old = logprobs.detach() if data.old_logprobs is None else _padded(data.old_logprobs, batch)
        surrogate = clipped_surrogate(
            logprobs,
            old,
            batch.advantages,
            self.grpo_args.epsilon,
            self.grpo_args.epsilon if self.grpo_args.epsilon_high is None else self.grpo_args.epsilon_high,
        )
        token_losses, kl = surrogate.token_losses, None
        if data.ref_logprobs is not None:
            kl = k3(logprobs, _padded(data.ref_logprobs, batch))
            token_losses = token_losses + self.grpo_args.beta * kl
        record_update(self.tracker, batch, surrogate, entropy, kl)
        # DDP averages gradients over ranks; the weights already divide by the counts of all ranks.
        return (batch.loss_weights * token_losses).sum() * self.args.world_size

    def _check_canary(self, model: nn.Module, batch: PolicyBatch, logprobs: torch.Tensor) -> None:
        if self.engine.logprob_temperature != self.sampling.temperature:
            with torch.no_grad(), self.compute_loss_context_manager():
                policy = self.accelerator.unwrap_model(model)
                logprobs, _ = token_logprobs(policy, batch, self.engine.logprob_temperature)
        difference = (logprobs - batch.sampling_logprobs).abs() * batch.completion_mask
        self.tracker.add("sampling/sampling_logp_difference/mean", difference.sum(), batch.completion_mask.sum())
        self.tracker.highest("sampling/sampling_logp_difference/max", difference.max().item())
        mean = (difference.sum() / batch.completion_mask.sum()).item()
        check_difference(mean, self.max_sampling_logprob_diff, self.grpo_args.rollout_backend)

    @torch.no_grad()
    def _frozen_logprobs(self, model: nn.Module, groups: Sequence[ScoredGroup]) -> tuple[torch.Tensor, ...]:
        """Log-probabilities under `model` as it is now: one tensor a completion, prompt-major, on the CPU."""
        totals = count_totals(groups, self.sampling.max_new_tokens, mask_truncated_completions=False)
        result: dict[int, torch.Tensor] = {}
        for batch in self._split(groups, totals):
            with self.compute_loss_context_manager():
                logprobs, _ = token_logprobs(model, batch, self.sampling.temperature)
            for row, values, length in zip(batch.rows, logprobs, batch.completion_mask.sum(dim=1).int(), strict=True):
                result[row] = values[:length].cpu()
        return tuple(result[row] for row in range(len(result)))

    def _global_totals(self, groups: Sequence[ScoredGroup]) -> StepTotals:
        mine = count_totals(groups, self.sampling.max_new_tokens, self.grpo_args.mask_truncated_completions)
        ranks = all_gather(mine)
        return dataclasses.replace(
            mine,
            num_completions=sum(totals.num_completions for totals in ranks),
            num_tokens=sum(totals.num_tokens for totals in ranks),
        )

    def _micro_batches(self, groups: Sequence[ScoredGroup], totals: StepTotals) -> list[PolicyBatch]:
        """This rank's micro-batches; every rank gets as many, since each backward may be a collective."""
        batches = self._split(groups, totals)
        missing = max(1, *all_gather(len(batches))) - len(batches)
        return batches + [dummy_batch(self._pad_token_id, self.args.device)] * missing

    def _split(self, groups: Sequence[ScoredGroup], totals: StepTotals) -> list[PolicyBatch]:
        return micro_batches(
            groups,
            totals,
            loss_type=self.grpo_args.loss_type,
            mask_truncated_completions=self.grpo_args.mask_truncated_completions,
            max_tokens=self.grpo_args.max_tokens_per_micro_batch,
            pad_token_id=self._pad_token_id,
            device=self.args.device,
        )

    @property
    def _pad_token_id(self) -> int:
        return self.processing_class.pad_token_id or 0

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean rewards of the present policy on the evaluation prompts, sampled as in training."""
        prompts = self.eval_dataset if eval_dataset is None else eval_dataset
        version = self.state.global_step
        self.engine.sync(self.accelerator.unwrap_model(self.model), version)
        mine = prompts[self.args.process_index :: self.args.world_size]
        # Another seed than training's, and the same at every evaluation: the curve then shows the policy alone.
        sampling = dataclasses.replace(self.sampling, seed=self.sampling.seed + 1)
        groups = self.engine.generate(mine, sampling, step=0)
        check_versions(groups, version)
        tracker = MetricTracker()
        record_rollout(tracker, self.score(groups), self.rewards.names)
        for name, count in self.rewards.take_counters().items():
            tracker.count(f"rewards/{name}", count)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in tracker.take().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Logs

    def _record_rollout(self, scored: Sequence[ScoredGroup], seconds: float) -> None:
        record_rollout(self.tracker, scored, self.rewards.names)
        for name, count in self.rewards.take_counters().items():
            self.tracker.count(f"rewards/{name}", count)
        tokens = sum(len(c.token_ids) for s in scored for c in s.group.completions)
        self.tracker.add("rollout_tokens_per_second", sum(all_gather(tokens)), seconds)
        prompt_tokens = sum(len(s.group.prompt.token_ids) * len(s.group.completions) for s in scored)
        self._num_tokens += sum(all_gather(tokens + prompt_tokens))
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
        return -(-len(self.prompts) // self.prompts_per_step) * self.grpo_args.num_iterations

    def get_train_dataloader(self) -> DataLoader:
        """One empty slot an optimizer step: the prompts come from `stream`, whatever a step needs of them."""
        slots: Any = [{} for _ in range(self.steps_per_epoch)]
        return DataLoader(slots, batch_size=1, collate_fn=lambda batch: batch[0])

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

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is not None:  # fp16: a step that overflows is skipped, and the scale lowered
            return norm
        self._refuse_non_finite(torch.as_tensor(norm), "gradient's norm")
        return norm

    def _refuse_non_finite(self, values: torch.Tensor, what: str) -> None:
        if not torch.isfinite(values).all():
            raise FloatingPointError(
                f"The {what} in step {self.state.global_step + 1} is not finite. The run is stopped before the "
                "weights are harmed. Start anew with a lower `learning_rate` or `max_grad_norm`, or in bf16 or "
                "float32 instead of fp16; `adapter_name_or_path` can name the last checkpoint of a LoRA run."
            )

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if not self.args.save_only_model:  # without optimizer and schedule nothing could be continued
            os.makedirs(folder, exist_ok=True)
            rollout_file = os.path.join(folder, ROLLOUT_FILE.format(rank=self.args.process_index))
            _write_json(rollout_file, self.buffer.state_dict())
            if self.args.should_save:
                state = {**self.recipe, "prompts": self.stream.state_dict(), "num_tokens": self._num_tokens}
                _write_json(os.path.join(folder, STATE_FILE), state)
        super()._save_checkpoint(model, trial)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, or go on from a checkpoint folder of this recipe.

        Raises:
            ValueError: if the checkpoint's run is finished: Trainer would train a step more each time.
        """
        step = 0
        if resume_from_checkpoint:
            assert isinstance(resume_from_checkpoint, str)
            step = self._load_progress(resume_from_checkpoint)
        if self.grpo_args.log_completions and self.is_world_process_zero():
            self.completions_log.drop_after(step)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _load_progress(self, folder: str) -> int:
        """Restore prompts and rollouts; returns the optimizer step that the checkpoint was taken at."""
        step = TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME)).global_step
        num_steps = self.args.max_steps
        if num_steps <= 0:
            num_steps = math.ceil(self.args.num_train_epochs * self.steps_per_epoch)
        if step >= num_steps:
            raise ValueError(
                f"The run in {folder} is finished: it is at step {step} of {num_steps}. Train longer by raising "
                "`max_steps` or `num_train_epochs` (under a constant schedule), continue its adapter in another "
                "`output_dir` with `adapter_name_or_path`, or write `overwrite_output_dir: true` to start afresh."
            )
        state = _read_json(os.path.join(folder, STATE_FILE))
        self.stream.load_state_dict(state["prompts"])
        self._num_tokens = state["num_tokens"]
        rollout_file = os.path.join(folder, ROLLOUT_FILE.format(rank=self.args.process_index))
        self.buffer.load_state_dict(_read_json(rollout_file), self.prompts)
        return step


def _padded(logprobs: tuple[torch.Tensor, ...], batch: PolicyBatch) -> torch.Tensor:
    """[B, T] of the batch's rows, 0 outside the completions."""
    padded = torch.zeros_like(batch.completion_mask)
    for position, row in enumerate(batch.rows):
        if row >= 0:  # a dummy has none
            padded[position, : len(logprobs[row])] = logprobs[row].to(padded.device)
    return padded


def _write_json(path: str, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file)


def _read_json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)
