"""Completions -> micro-batches under a token budget, with every token's weight in the step's loss.

B completions in a micro-batch    T completion tokens    L prompt + completion tokens
"""

from collections.abc import Iterator, Sequence

import torch

from grpo_stage.algorithm.losses import StepTotals, token_weights
from grpo_stage.types import PolicyBatch, Prompt, ScoredGroup


def count_totals(groups: Sequence[ScoredGroup], max_new_tokens: int, mask_truncated_completions: bool) -> StepTotals:
    """What this rank adds to the step's denominators: the completions, those that the loss uses, and their tokens."""
    completions = [
        (len(completion.token_ids), is_used)
        for scored in groups
        for completion, is_used in zip(scored.group.completions, scored.used(mask_truncated_completions), strict=True)
    ]
    lengths = [length for length, is_used in completions if is_used]
    return StepTotals(
        num_completions=len(lengths),
        num_tokens=sum(lengths),
        max_completion_length=max_new_tokens,
        num_left_out=len(completions) - len(lengths),
    )


def micro_batches(
    groups: Sequence[ScoredGroup],
    totals: StepTotals,
    *,
    loss_type: str,
    mask_truncated_completions: bool,
    max_tokens: int,
    pad_token_id: int,
    device: torch.device,
) -> list[PolicyBatch]:
    """Split a step's completions of this rank into micro-batches of at most `max_tokens` padded tokens.

    Completions of like length go together, longest first, so that little is padded and a budget that does not fit
    into memory fails at once rather than hours later. A single completion longer than the budget is a micro-batch of
    its own.

    Args:
        groups: this rank's share of the step.
        totals: denominators of the step over all ranks.
        loss_type: see `token_weights`.
        mask_truncated_completions: leave truncated completions out of the loss.
        max_tokens: the budget, counted as rows x (longest prompt + longest completion).
        pad_token_id: fills the rows; any id does, since masks come from lengths.
        device: where the tensors go.
    """
    rows = [(scored.group.prompt, index) for scored in groups for index in range(len(scored.group.completions))]
    completions = [completion for scored in groups for completion in scored.group.completions]
    advantages = [advantage for scored in groups for advantage in scored.advantages]
    is_used = [each for scored in groups for each in scored.used(mask_truncated_completions)]

    batches = []
    for chosen in _chunks_under_budget(rows, [len(c.token_ids) for c in completions], max_tokens):
        prompt_length = max(len(rows[row][0].token_ids) for row in chosen)
        completion_length = max(len(completions[row].token_ids) for row in chosen)
        input_ids = torch.full((len(chosen), prompt_length + completion_length), pad_token_id)  # [B, L]
        attention_mask = torch.zeros_like(input_ids)  # [B, L]
        completion_mask = torch.zeros(len(chosen), completion_length)  # [B, T]
        sampling_logprobs = torch.zeros_like(completion_mask)  # [B, T]
        used = torch.tensor([[float(is_used[row])] for row in chosen])  # [B, 1]
        for position, row in enumerate(chosen):
            prompt_ids, completion = rows[row][0].token_ids, completions[row]
            start, end = prompt_length - len(prompt_ids), prompt_length + len(completion.token_ids)
            input_ids[position, start:end] = torch.tensor(prompt_ids + completion.token_ids)
            attention_mask[position, start:end] = 1
            completion_mask[position, : len(completion.token_ids)] = 1
            sampling_logprobs[position, : len(completion.token_ids)] = torch.tensor(completion.sampling_logprobs)
        batches.append(
            PolicyBatch(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                completion_ids=input_ids[:, prompt_length:].to(device),
                completion_mask=completion_mask.to(device),
                loss_weights=token_weights(completion_mask * used, totals, loss_type).to(device),
                advantages=torch.tensor([advantages[row] for row in chosen], device=device),
                sampling_logprobs=sampling_logprobs.to(device),
                rows=tuple(chosen),
            )
        )
    return batches


def dummy_batch(pad_token_id: int, device: torch.device) -> PolicyBatch:
    """No completion at all: for a rank that has run out of micro-batches while the others have not."""
    zero = torch.zeros(1, 1, device=device)
    return PolicyBatch(
        input_ids=torch.full((1, 2), pad_token_id, device=device),
        attention_mask=torch.ones(1, 2, dtype=torch.long, device=device),
        completion_ids=torch.full((1, 1), pad_token_id, device=device),
        completion_mask=zero,
        loss_weights=zero,
        advantages=torch.zeros(1, device=device),
        sampling_logprobs=zero,
        rows=(-1,),
    )


def _chunks_under_budget(
    rows: Sequence[tuple[Prompt, int]], completion_lengths: Sequence[int], max_tokens: int
) -> Iterator[list[int]]:
    prompt_lengths = [len(prompt.token_ids) for prompt, _ in rows]
    order = sorted(range(len(rows)), key=lambda row: prompt_lengths[row] + completion_lengths[row], reverse=True)
    chunk: list[int] = []
    for row in order:
        longest = max(prompt_lengths[r] for r in [*chunk, row]) + max(completion_lengths[r] for r in [*chunk, row])
        if chunk and longest * (len(chunk) + 1) > max_tokens:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk
