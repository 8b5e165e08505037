"""A step of samples -> the gradient in the parameters, or a step that is skipped."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments

from .arguments import GRPOArguments
from .distributed import all_gather
from .monitors.monitor import Monitor
from .rollout.serialization import step_state
from .survival.phase import Phases
from .types import ImageReader, Prompt, SamplingSettings, Step
from .update.activations import keep_activations_if_they_fit
from .update.batch import PaddedLayout, SharedPromptLayout
from .update.exactness import probe_rows, settle
from .update.gradient import PolicyGradient
from .update.logprobs import Forward, FrozenPass
from .update.model_flops import flops_of_update, peak_flops
from .update.objective import Objective
from .update.reference import ReferencePolicy
from .update.routing import RouterLoss
from .update.strategies.strategy import Strategy
from .update.token_budget import PolicyBudget


logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are

NON_FINITE_REMEDY = (
    "Start anew with a lower `learning_rate` or `max_grad_norm`, or in bf16 or float32 instead of fp16; a checkpoint "
    "from before the first such step can be continued with `resume_from_checkpoint`."
)
FP16_SCALES = 16
"""How often fp16's loss scale may be halved; each halving skips a step. Past that the run is hopeless."""


class Learner:
    """Learns from steps. All ranks call it together.

    Args:
        args: Trainer's.
        grpo_args: the recipe.
        sampling: how completions are drawn.
        monitors: see the metrics of each step.
        router_loss: see `PolicyGradient`.
        pad_token_id: fills micro-batches.
        accelerator: knows device and precision.
        strategy: how the policy's parameters are distributed over processes.
        checkpoints_if_needed: whether gradient checkpointing may be switched off where memory allows it.
        phases: times the update.
        gather: see `PolicyGradient`.
        images: see `Layout`.
    """

    def __init__(
        self,
        *,
        args: TrainingArguments,
        grpo_args: GRPOArguments,
        sampling: SamplingSettings,
        monitors: Iterable[Monitor],
        router_loss: RouterLoss | None,
        pad_token_id: int,
        accelerator: Accelerator,
        strategy: Strategy,
        checkpoints_if_needed: bool,
        phases: Phases,
        gather: Callable[[Any], list[Any]],
        images: ImageReader | None = None,
    ) -> None:
        # Accelerate wraps the forward of the policy alone in autocast; the reference needs it as well.
        autocast: Callable[[], AbstractContextManager] = accelerator.autocast
        self._plain = PaddedLayout(pad_token_id, accelerator.device, images)
        layout = (
            self._plain
            if grpo_args.disable_prompt_sharing
            else SharedPromptLayout(pad_token_id, accelerator.device, images)
        )
        self.forward = Forward(layout, is_chunked=not grpo_args.disable_logit_chunking)
        self.strategy = strategy
        self.objective = Objective(grpo_args)
        self.budget = PolicyBudget(
            grpo_args.max_tokens_per_micro_batch, args.process_index, can_repeat=not strategy.is_collective
        )
        self.frozen = FrozenPass(self.forward, self.budget, autocast, sampling.temperature, strategy)
        self.gradient = PolicyGradient(
            grpo_args=grpo_args,
            objective=self.objective,
            sampling=sampling,
            forward=self.forward,
            budget=self.budget,
            frozen=self.frozen,
            router_loss=router_loss,
            strategy=self.strategy,
            autocast=autocast,
            device=accelerator.device,
            gather=gather,
        )
        self.num_learned = 0
        """Steps that had a completion with an advantage, and were not skipped."""
        self.num_skipped = 0
        """Steps that were skipped."""
        self._num_skipped_in_row = 0
        self._autocast = autocast
        self._checkpoints_if_needed = checkpoints_if_needed
        self._args = args
        self._grpo_args = grpo_args
        self._sampling = sampling
        self._scales_loss = accelerator.scaler is not None
        self._peak_flops = peak_flops(accelerator.device)
        self._is_mixed = accelerator.mixed_precision != "no"
        self._monitors = tuple(monitors)
        self._phases = phases
        self._tracker = phases.tracker

    def prepare(self, policy: nn.Module, reference: ReferencePolicy | None, prompts: Sequence[Prompt]) -> None:
        """Find out how these models can be trained on these prompts; before the first step, on all ranks together."""
        settle(self.forward, self._plain, policy, prompts, self._autocast, self.strategy)
        if reference is not None:
            with reference.activate(policy) as model:
                if model is not policy:
                    settle(self.forward, self._plain, model, prompts, self._autocast, self.strategy)
        # Where it runs out of memory because of this, a pass has to be made again.
        if self._checkpoints_if_needed and not self.strategy.is_collective:
            longest = max(len(prompt.token_ids) for prompt in prompts) + self._sampling.max_new_tokens
            max_tokens = max(self.budget.max_tokens, longest)
            self.budget.relief = keep_activations_if_they_fit(
                self.forward, policy, probe_rows(prompts, self._plain.images), max_tokens, self._autocast
            )

    def learn(self, model: nn.Module, step: Step, global_step: int) -> torch.Tensor:
        """Leave the gradient of a step in the parameters, or none if the step is skipped. Returns the loss.

        Args:
            model: the policy, wrapped (DDP) or not.
            step: this rank's share of the step.
            global_step: optimizer steps that are done.

        Raises:
            FloatingPointError: if more than `max_skipped_steps` in a row had to be skipped (fp16: `FP16_SCALES` more).
            Exception: what a monitor ends the run with.
        """
        with self._phases.timed("update") as clock:
            model.train()
            loss, metrics, marked = self.gradient.accumulate(model, step, global_step)
            for monitor in self._monitors:
                monitor.after_step(metrics)
            is_finite = all(all_gather(bool(torch.isfinite(loss)) and self.strategy.has_finite_gradient(model)))
            is_used = any(sample.is_used for sample in marked.samples)
            # With gradients of 0, momentum and weight decay would move the weights. In fp16 they do: its scaler fails
            # where no parameter has a gradient.
            if not self._scales_loss and not any(all_gather(is_used)):
                self.strategy.drop_gradient(model)
        self._record_speed(model, step, marked, global_step, clock.seconds)
        loss = loss * self._args.world_size  # Trainer logs the mean over ranks
        self._tracker.count("skipped_steps", 0.0 if is_finite or self._args.process_index > 0 else 1.0)
        if is_finite:
            self._num_skipped_in_row = 0
            self.num_learned += any(sample.teaches for sample in marked.samples)
            self.objective.adapt(metrics)
            self._tracker.merge(metrics.state_dict())
            # A resume makes Trainer's own mean forget the steps since the last log line.
            self._tracker.add("loss", loss)
        else:
            self._skip(model, step, loss, global_step)
        return loss

    def refuse_unlearned(self, num_steps: int) -> None:
        """End a run with rewards, of whose `num_steps` none has taught anything, with an error that says why.

        Raises:
            RuntimeError: if no step had a signal.
            FloatingPointError: if steps were skipped.
        """
        no_signal = (
            "was a completion that the loss uses better or worse than the others, so that nothing was learned: the "
            "task is too hard or too easy for the policy, the reward functions do not tell its completions apart, or "
            "`mask_truncated_completions` leaves out those that differ. Raise `num_generations`, `temperature` or "
            "`max_new_tokens`, or choose other prompts or `reward_funcs`; `completions.jsonl` shows what was sampled "
            "with `log_completions: true`."
        )
        if self.num_skipped == 0:
            raise RuntimeError(f"In none of the {num_steps} steps {no_signal}")
        if self.num_skipped == num_steps:
            raise FloatingPointError(
                f"None of the {num_steps} steps had a finite loss and gradient, so that all were skipped and "
                f"nothing was learned. {NON_FINITE_REMEDY}"
            )
        raise FloatingPointError(
            f"{self.num_skipped} of the {num_steps} steps were skipped, since their loss or gradient was not finite. "
            f"{NON_FINITE_REMEDY} In none of the others {no_signal}"
        )

    def state_dict(self) -> dict[str, int]:
        """The counters, ready for JSON."""
        return {
            "num_learned": self.num_learned,
            "num_skipped": self.num_skipped,
            "num_skipped_in_row": self._num_skipped_in_row,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_learned, self.num_skipped = state["num_learned"], state["num_skipped"]
        self._num_skipped_in_row = state["num_skipped_in_row"]

    def _record_speed(self, model: nn.Module, step: Step, marked: Step, global_step: int, seconds: float) -> None:
        tokens = sum(len(each.prompt.token_ids) + len(each.completion.token_ids) for each in step.samples)
        self._tracker.add("update_tokens_per_second", tokens * self._args.world_size, seconds)
        policy = self.strategy.unwrap(model)
        tflop = flops_of_update(policy, self.gradient.trained(marked.samples, global_step)) / 1e12
        self._tracker.add("update_tflops", tflop, seconds)  # every rank brings its own seconds: a mean over devices
        is_half = self._is_mixed or next(policy.parameters()).dtype in (torch.bfloat16, torch.float16)
        if self._peak_flops is not None and is_half:
            self._tracker.add("update_mfu", tflop, seconds * self._peak_flops / 1e12)

    def _skip(self, model: nn.Module, step: Step, loss: torch.Tensor, global_step: int) -> None:
        """Leave the weights as they are: optimizers ignore a parameter without a gradient."""
        number = global_step + 1  # as the log counts
        limit, allowed = self._grpo_args.max_skipped_steps, f"`max_skipped_steps: {self._grpo_args.max_skipped_steps}`"
        if self._scales_loss:  # an infinite gradient has the scaler skip the step and lower its scale
            limit += FP16_SCALES
            allowed += f", and {FP16_SCALES} more in which fp16 lowers the loss scale"
            next(p.grad for p in model.parameters() if p.grad is not None).fill_(math.inf)
        else:
            self.strategy.drop_gradient(model)
        self.num_skipped += 1
        self._num_skipped_in_row += 1
        file = os.path.join(self._args.output_dir, f"skipped_step_{number}_rank{self._args.process_index}.json")
        where = f"The batch is in {file}."
        try:
            os.makedirs(self._args.output_dir, exist_ok=True)
            with open(file, "w", encoding="utf-8") as kept:
                json.dump({"step": number, "loss": str(loss.item()), **step_state(step)}, kept)
        except OSError as error:  # the file is a convenience: the run goes on without it
            where = f"The batch could not be written to {file}: {error}."
        problem = f"The loss or its gradient in step {number} is not finite"
        if self._num_skipped_in_row > limit:
            raise FloatingPointError(
                f"{problem}, and so were those of the {self._num_skipped_in_row - 1} steps before ({allowed}): the "
                f"run is stopped. {where} {NON_FINITE_REMEDY}"
            )
        logger.warning(f"{problem}: the step is skipped, and the weights stay as they are. {where}")
