"""The gradient of an optimizer step: micro-batches -> policy log-probs -> loss -> backward.

B completions in a micro-batch    T completion tokens
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from grpo_stage.algorithm.losses import StepTotals
from grpo_stage.arguments import GRPOArguments
from grpo_stage.distributed import all_gather, sum_gradients
from grpo_stage.monitors.canary import check_difference
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.rollout.queue import StepData
from grpo_stage.types import PolicyBatch, SamplingSettings, ScoredGroup
from grpo_stage.update.batch import count_totals, dummy_batch, micro_batches
from grpo_stage.update.logprobs import token_logprobs
from grpo_stage.update.objective import Objective, TokenSelection


logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are


class PolicyGradient:
    """Computes gradients in micro-batches under a token budget, which gives way where memory runs out."""

    def __init__(
        self,
        *,
        grpo_args: GRPOArguments,
        sampling: SamplingSettings,
        max_sampling_logprob_diff: float,
        pad_token_id: int,
        accelerator: Accelerator,
        autocast: Callable[[], AbstractContextManager],
        safe_point: Callable[[], None],
    ) -> None:
        """
        Args:
            grpo_args: the objective.
            sampling: how completions are drawn: the policy is the distribution at its temperature.
            max_sampling_logprob_diff: the canary's bound, in nats.
            pad_token_id: fills micro-batches.
            accelerator: for backward, device and rank.
            autocast: the precision of a forward pass.
            safe_point: called on all ranks before each micro-batch; what it raises ends the pass.
        """
        self.token_budget = grpo_args.max_tokens_per_micro_batch
        self.objective = Objective(grpo_args)
        self._grpo_args = grpo_args
        self._sampling = sampling
        self._max_sampling_logprob_diff = max_sampling_logprob_diff
        self._pad_token_id = pad_token_id
        self._accelerator = accelerator
        self._autocast = autocast
        self._safe_point = safe_point

    def accumulate(self, model: nn.Module, data: StepData, step: int) -> tuple[torch.Tensor, MetricTracker]:
        """Leave the gradient of one optimizer step, summed over ranks, in the parameters.

        Args:
            model: the policy, wrapped (DDP) or not.
            data: what the step trains on.
            step: its number, which what is drawn at random depends on.

        Returns:
            This rank's share of the loss, and the metrics of the pass.

        Raises:
            StaleRolloutError: if fresh completions do not come from `model` (the canary).
            RuntimeError: if not even a single completion fits into memory.
        """
        totals = self._global_totals(data.groups)
        selection = self._selection(model, data, step) if self.objective.selects else None
        outcome = None
        while outcome is None:
            outcome = self._try_to_accumulate(model, data, totals, selection)
        sum_gradients(model)
        return outcome

    def _try_to_accumulate(
        self, model: nn.Module, data: StepData, totals: StepTotals, selection: TokenSelection | None
    ) -> tuple[torch.Tensor, MetricTracker] | None:
        """This rank's loss and gradient; None, and no gradient, where memory ran out on some rank."""
        metrics = MetricTracker()
        loss = torch.zeros((), device=self._accelerator.device)
        # Gradients are summed over ranks after the last backward: a rank can run out of memory in any.
        is_checked = False
        with self._accelerator.no_sync(model):
            for batch in self._micro_batches(data.groups, totals):
                self._safe_point()
                memory_error = None
                try:
                    check = not is_checked and not data.fresh_rows.isdisjoint(batch.rows)
                    micro_loss = self._micro_batch_loss(model, batch, data, selection, metrics, check)
                    is_checked = is_checked or check
                    self._accelerator.backward(micro_loss)
                    loss += micro_loss.detach()
                except RuntimeError as error:
                    if not should_reduce_batch_size(error):
                        raise
                    memory_error = error.with_traceback(None)  # its frames hold tensors
                if any(all_gather(memory_error is not None)):
                    model.zero_grad()
                    if memory_error is not None:
                        self._halve_token_budget(batch, memory_error)
                    return None
        return loss, metrics

    def _micro_batch_loss(
        self,
        model: nn.Module,
        batch: PolicyBatch,
        data: StepData,
        selection: TokenSelection | None,
        metrics: MetricTracker,
        check: bool,
    ) -> torch.Tensor:
        with self._autocast():
            logprobs, entropy = token_logprobs(  # [B, T]
                model,
                batch,
                self._sampling.temperature,
                with_entropy=True,
                entropy_gradient=self.objective.pays_entropy,
            )
        assert entropy is not None
        if check and torch.isfinite(logprobs).all():
            self._check_canary(model, batch, logprobs.detach(), data, metrics)
        old = logprobs.detach() if data.old_logprobs is None else _padded(data.old_logprobs, batch)
        ref = None if data.ref_logprobs is None else _padded(data.ref_logprobs, batch)
        learned = None if selection is None else _padded(selection.learned, batch)
        held = None if selection is None else _padded(selection.held, batch)
        token_losses = self.objective.token_losses(batch, logprobs, entropy, old, ref, metrics, learned, held)
        return (batch.loss_weights * token_losses).sum()

    def _check_canary(
        self,
        model: nn.Module,
        batch: PolicyBatch,
        logprobs: torch.Tensor,
        data: StepData,
        metrics: MetricTracker,
    ) -> None:
        if data.logprob_temperature != self._sampling.temperature:
            with torch.no_grad(), self._autocast():
                policy = self._accelerator.unwrap_model(model)
                logprobs, _ = token_logprobs(policy, batch, data.logprob_temperature)
        fresh = torch.tensor([row in data.fresh_rows for row in batch.rows], device=logprobs.device)  # [B]
        mask = batch.completion_mask * fresh.unsqueeze(1)  # [B, T]
        difference = (logprobs - batch.sampling_logprobs).abs() * mask
        metrics.add("sampling/sampling_logp_difference/mean", difference.sum(), mask.sum())
        metrics.highest("sampling/sampling_logp_difference/max", difference.max().item())
        mean = (difference.sum() / mask.sum()).item()
        check_difference(mean, self._max_sampling_logprob_diff, self._grpo_args.rollout_backend)

    def _selection(self, model: nn.Module, data: StepData, step: int) -> TokenSelection:
        policy = self._accelerator.unwrap_model(model)
        logprobs, entropies = self._frozen(policy, data.groups, self._sampling.temperature, with_entropy=True)
        masks = self._grpo_args.mask_truncated_completions
        return self.objective.select(
            logprobs,
            entropies,
            [advantage for scored in data.groups for advantage in scored.advantages],
            [is_used for scored in data.groups for is_used in scored.used(masks)],
            [
                f"{scored.group.prompt.index} {completion.token_ids}"
                for scored in data.groups
                for completion in scored.group.completions
            ],
            step,
            self._sampling.seed,
        )

    def frozen_logprobs(
        self, model: nn.Module, groups: Sequence[ScoredGroup], temperature: float | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Log-probabilities under `model` as it is now: one tensor a completion, prompt-major, on the CPU.

        At the sampling temperature, unless another is given.
        """
        return self._frozen(model, groups, self._sampling.temperature if temperature is None else temperature)[0]

    @torch.no_grad()
    def _frozen(
        self, model: nn.Module, groups: Sequence[ScoredGroup], temperature: float, with_entropy: bool = False
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Log-probabilities, and entropies where they are asked for."""
        totals = count_totals(groups, self._sampling.max_new_tokens, mask_truncated_completions=False)
        result: dict[int, torch.Tensor] = {}
        entropies: dict[int, torch.Tensor] = {}
        while len(result) < totals.num_completions:
            for batch in self._split(groups, totals):
                try:
                    with self._autocast():
                        logprobs, entropy = token_logprobs(model, batch, temperature, with_entropy=with_entropy)
                except RuntimeError as error:
                    if not should_reduce_batch_size(error):
                        raise
                    memory_error = error.with_traceback(None)
                else:
                    lengths = batch.completion_mask.sum(dim=1).int()
                    for position, (row, length) in enumerate(zip(batch.rows, lengths, strict=True)):
                        result[row] = logprobs[position, :length].cpu()
                        if entropy is not None:
                            entropies[row] = entropy[position, :length].cpu()
                    continue
                self._halve_token_budget(batch, memory_error)
                break
        return tuple(tuple(each[row] for row in range(len(each))) for each in (result, entropies))  # type: ignore[return-value]

    def _halve_token_budget(self, batch: PolicyBatch, error: RuntimeError) -> None:
        """Make micro-batches of this rank smaller than `batch`, which did not fit into memory."""
        rows, length = batch.input_ids.shape
        if rows == 1:
            raise RuntimeError(
                f"Out of memory with a single completion of {length} tokens, "
                "prompt included, in the micro-batch: there is nothing left to split. Lower `max_new_tokens` or "
                "`cutoff_len`, leave gradient checkpointing on, give vLLM less (`vllm_gpu_util`, `vllm_sleep`), or "
                "train fewer weights (LoRA, `quantization_bit`)."
            ) from error
        budget, self.token_budget = self.token_budget, min(self.token_budget, rows * length) // 2
        clear_device_cache(garbage_collection=True)
        logger.warning(
            f"Out of memory on rank {self._accelerator.process_index}: the pass is done again with "
            f"micro-batches of {self.token_budget} tokens instead of {budget}, which changes nothing but "
            f"the speed. Write `max_tokens_per_micro_batch: {self.token_budget}` to start with that."
        )

    def _global_totals(self, groups: Sequence[ScoredGroup]) -> StepTotals:
        mine = count_totals(groups, self._sampling.max_new_tokens, self._grpo_args.mask_truncated_completions)
        ranks = all_gather(mine)
        return dataclasses.replace(
            mine,
            num_completions=sum(totals.num_completions for totals in ranks),
            num_tokens=sum(totals.num_tokens for totals in ranks),
            num_left_out=sum(totals.num_left_out for totals in ranks),
        )

    def _micro_batches(self, groups: Sequence[ScoredGroup], totals: StepTotals) -> list[PolicyBatch]:
        """This rank's micro-batches; every rank gets as many, since each backward may be a collective."""
        batches = self._split(groups, totals)
        missing = max(1, *all_gather(len(batches))) - len(batches)
        return batches + [dummy_batch(self._pad_token_id, self._accelerator.device)] * missing

    def _split(self, groups: Sequence[ScoredGroup], totals: StepTotals) -> list[PolicyBatch]:
        return micro_batches(
            groups,
            totals,
            loss_type=self._grpo_args.loss_type,
            mask_truncated_completions=self._grpo_args.mask_truncated_completions,
            max_tokens=self.token_budget,
            pad_token_id=self._pad_token_id,
            device=self._accelerator.device,
        )


def _padded(logprobs: tuple[torch.Tensor, ...], batch: PolicyBatch) -> torch.Tensor:
    """[B, T] of the batch's rows, 0 outside the completions."""
    padded = torch.zeros_like(batch.completion_mask)
    for position, row in enumerate(batch.rows):
        if row >= 0:  # a dummy has none
            padded[position, : len(logprobs[row])] = logprobs[row].to(padded.device)
    return padded
