"""The gradient of an optimizer step: micro-batches -> policy log-probs -> loss -> backward.

B completions in a micro-batch    T completion tokens
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from grpo_stage.algorithm.averages import StepTotals
from grpo_stage.arguments import GRPOArguments
from grpo_stage.distributed import all_gather
from grpo_stage.monitors.canary import record_difference
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.types import Sample, SampleBatch, SamplingSettings, Step
from grpo_stage.update.attention import attention_of
from grpo_stage.update.batch import count_totals
from grpo_stage.update.logprobs import Forward, FrozenPass
from grpo_stage.update.objective import Objective
from grpo_stage.update.routing import RouterLoss
from grpo_stage.update.strategies.strategy import Strategy
from grpo_stage.update.token_budget import OutOfMemory, PolicyBudget


class PolicyGradient:
    """Computes gradients in micro-batches under a token budget, which shrinks if memory runs out.

    Args:
        grpo_args: the recipe.
        objective: the loss.
        sampling: how completions are drawn; its temperature is part of the policy's distribution.
        forward: how samples go through the model.
        budget: how many tokens go through the model at once.
        frozen: a pass over the whole step, for what has to be known before the first micro-batch.
        strategy: how the parameters are distributed over processes.
        autocast: the precision of a forward pass.
        device: where the loss is added up.
        gather: returns the value of every rank. It is also a safe point: it may raise and end the pass on all ranks.
        router_loss: the loss of a mixture's routers, where the recipe asks for it.
    """

    def __init__(
        self,
        *,
        grpo_args: GRPOArguments,
        objective: Objective,
        sampling: SamplingSettings,
        forward: Forward,
        budget: PolicyBudget,
        frozen: FrozenPass,
        strategy: Strategy,
        autocast: Callable[[], AbstractContextManager],
        device: torch.device,
        gather: Callable[[Any], list[Any]],
        router_loss: RouterLoss | None = None,
    ) -> None:
        self._grpo_args = grpo_args
        self._objective = objective
        self._sampling = sampling
        self._forward = forward
        self._budget = budget
        self._frozen = frozen
        self.router_loss = router_loss
        self._strategy = strategy
        self._autocast = autocast
        self._device = device
        self._gather = gather

    def accumulate(self, model: nn.Module, step: Step, number: int) -> tuple[torch.Tensor, MetricTracker, Step]:
        """Leave the gradient of one optimizer step, summed over ranks, in the parameters.

        Args:
            model: the policy, wrapped (DDP) or not.
            step: this rank's share of the step.
            number: the step's number. Samples of that policy version are fresh; random draws depend on it.

        Returns:
            This rank's share of the loss, the metrics of the pass, and the step as its terms have marked it.

        Raises:
            RuntimeError: if not even a single completion fits into memory.
        """
        if self._objective.looks_at_step:
            policy = self._strategy.unwrap(model)
            logprobs, entropies = self._frozen.logprobs_and_entropies(policy, step.samples)
            key = f"{self._sampling.seed} {number}"
            step = dataclasses.replace(step, samples=self._objective.mark(step.samples, logprobs, entropies, key))
        if self.router_loss is not None:
            self.router_loss.look_at_step(self._strategy.unwrap(model), self._frozen, step.samples)
        totals = self._totals_of_all_ranks(step.samples)
        outcome = None
        while outcome is None:
            outcome = self._try_to_accumulate(model, step, totals, number)
        self._strategy.sum_gradients(model)
        return *outcome, step

    def _try_to_accumulate(
        self, model: nn.Module, step: Step, totals: StepTotals, number: int
    ) -> tuple[torch.Tensor, MetricTracker] | None:
        """This rank's loss and its gradient; None and no gradient if memory ran out on any rank."""
        metrics = MetricTracker()
        loss = torch.zeros((), device=self._device)
        samples = self.trained(step.samples, number)
        is_checked = not any(sample.policy_version == number for sample in samples)

        def run(positions: Sequence[int], is_last: bool) -> bool:
            nonlocal loss
            chunk = [samples[position] for position in positions]
            batch = self._batch(chunk, totals)
            if chunk:
                metrics.add("packing_ratio", sum(map(_length, chunk)), layout.num_tokens(chunk))
            check = not is_checked and bool((batch.policy_versions == number).any())
            with attention_of(model, batch.inputs.shared_prompts):
                micro_loss = self._micro_batch_loss(model, batch, step, number if check else None, metrics)
                self._strategy.backward(model, micro_loss, is_last=is_last)
            loss += micro_loss.detach()
            return check

        layout = self._forward.layout
        chunks = list(layout.split(samples, self._budget.max_tokens))
        num_passes = self._strategy.num_passes(len(chunks), self._gather)
        chunks += [[]] * (num_passes - len(chunks))
        with self._strategy.accumulating(model):
            for i, positions in enumerate(chunks):
                outcome = self._budget.attempt(partial(run, positions, i + 1 == num_passes))
                # A rank can run out of memory in any. After the last one the step is done: no place to stop.
                gather = self._gather if i + 1 < num_passes else all_gather
                if any(gather(isinstance(outcome, OutOfMemory))):
                    self._strategy.drop_gradient(model)
                    if isinstance(outcome, OutOfMemory):
                        chunk = [samples[position] for position in positions]
                        self._budget.give_way(len(chunk), layout.num_tokens(chunk), outcome, keeps_activations=True)
                    return None
                is_checked = is_checked or outcome is True
        return loss, metrics

    def _micro_batch_loss(
        self, model: nn.Module, batch: SampleBatch, step: Step, fresh_version: int | None, metrics: MetricTracker
    ) -> torch.Tensor:
        own = None
        if step.logprob_temperature != self._sampling.temperature and self._strategy.any(fresh_version is not None):
            with torch.no_grad(), self._autocast():
                own = self._forward.statistics(self._strategy.unwrap(model), batch, step.logprob_temperature).logprobs
        routers: AbstractContextManager[list[torch.Tensor]] = nullcontext([])
        if self.router_loss is not None:
            routers = self.router_loss.recording()
        with self._autocast(), routers as router_outputs:
            statistics = self._forward.statistics(model, batch, self._sampling.temperature)
        logprobs, entropies = statistics.logprobs, statistics.entropies  # [B, T]
        if not self._objective.entropy_gradient:
            entropies = entropies.detach()
        if fresh_version is not None and torch.isfinite(logprobs).all():
            record_difference(logprobs.detach() if own is None else own, batch, fresh_version, metrics)
        loss = (batch.loss_weights * self._objective.token_losses(batch, logprobs, entropies, metrics)).sum()
        if self.router_loss is not None:
            loss = loss + self.router_loss.of_micro_batch(router_outputs, batch.inputs, metrics)
        return loss

    def trained(self, samples: Sequence[Sample], number: int) -> list[Sample]:
        """Those of a step's samples, as its terms have marked them, that go through the model in step `number`."""
        trained = [sample for sample in samples if self._has_gradient(sample)]
        fresh = [sample for sample in samples if sample.policy_version == number]
        if fresh and not any(sample.policy_version == number for sample in trained):
            trained.append(fresh[0])  # for the canary, which has to see every rollout
        return trained

    def _has_gradient(self, sample: Sample) -> bool:
        """Whether it has to go through the model: what the loss uses does, for the routers, whatever its advantage."""
        return self._objective.has_gradient(sample) if self.router_loss is None else sample.is_used

    def _totals_of_all_ranks(self, samples: Sequence[Sample]) -> StepTotals:
        mine = count_totals(samples, self._sampling.max_new_tokens)
        ranks = all_gather(mine)
        return dataclasses.replace(
            mine,
            num_completions=sum(totals.num_completions for totals in ranks),
            num_tokens=sum(totals.num_tokens for totals in ranks),
            num_left_out=sum(totals.num_left_out for totals in ranks),
        )

    def _batch(self, samples: Sequence[Sample], totals: StepTotals) -> SampleBatch:
        """A micro-batch; a dummy of no samples."""
        if not samples:
            return self._forward.layout.dummy()
        return self._forward.layout.samples(
            samples, totals, self._grpo_args.loss_type, self._grpo_args.loss_aggregation
        )


def _length(sample: Sample) -> int:
    return len(sample.prompt.token_ids) + len(sample.completion.token_ids)
