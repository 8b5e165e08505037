"""Rollouts waiting for their uses, and how they are kept in a checkpoint.

A rollout serves `steps_per_generation` optimizer steps, `num_iterations` times over. What is left of it when a
checkpoint is taken is part of the checkpoint: sampling it anew would give other completions.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class StepData:
    """What one optimizer step trains on, on this rank."""

    groups: tuple[ScoredGroup, ...]
    old_logprobs: tuple[torch.Tensor, ...] | None
    """Per completion (prompt-major), one float a token: the trainer's own, under the policy that sampled it. None
    where that is the policy of this very step for all of them: the ratio is then 1 by definition."""
    ref_logprobs: tuple[torch.Tensor, ...] | None
    """Per completion, of the reference; None without a KL term."""
    logprob_temperature: float
    """The temperature that `sampling_logprobs` refer to."""
    fresh_rows: frozenset[int]
    """Where in the flat list of completions (prompt-major) those stand that the policy of this very step has sampled:
    their log-probabilities must be the engine's. Empty where the policy has moved since."""


class RolloutBuffer:
    """A queue of `StepData` in the order of use."""

    def __init__(self) -> None:
        self._steps: deque[StepData] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    def extend(self, steps: Sequence[StepData]) -> None:
        self._steps.extend(steps)

    def first(self) -> StepData:
        return self._steps[0]

    def drop_first(self) -> None:
        self._steps.popleft()

    def state_dict(self) -> list[dict[str, Any]]:
        """JSON-serialisable and exact: floats survive, prompts are kept as their index in the dataset."""
        return [step_state(step) for step in self._steps]

    def load_state_dict(self, state: Sequence[dict[str, Any]], prompts: Sequence[Prompt]) -> None:
        """Restore what `state_dict` gave. `prompts` is the dataset that the indices point into."""
        self._steps = deque(
            StepData(
                groups=tuple(load_group(group, prompts) for group in step["groups"]),
                old_logprobs=load_tensors(step["old_logprobs"]),
                ref_logprobs=load_tensors(step["ref_logprobs"]),
                logprob_temperature=step["logprob_temperature"],
                fresh_rows=frozenset(step["fresh_rows"]),
            )
            for step in state
        )


def step_state(step: StepData) -> dict[str, Any]:
    """One element of `RolloutBuffer.state_dict`."""
    return {
        "groups": [group_state(scored) for scored in step.groups],
        "old_logprobs": tensors_state(step.old_logprobs),
        "ref_logprobs": tensors_state(step.ref_logprobs),
        "logprob_temperature": step.logprob_temperature,
        "fresh_rows": sorted(step.fresh_rows),
    }


def group_state(scored: ScoredGroup) -> dict[str, Any]:
    """A group for JSON, its prompt as its index in the dataset; `load_group` reads it."""
    return {
        "prompt": scored.group.prompt.index,
        "policy_version": scored.group.policy_version,
        "completions": [
            {
                "token_ids": completion.token_ids,
                "sampling_logprobs": completion.sampling_logprobs,
                "finish_reason": completion.finish_reason,
                "text": completion.text,
            }
            for completion in scored.group.completions
        ],
        "rewards": scored.rewards,
        "total_rewards": scored.total_rewards,
        "advantages": scored.advantages,
    }


def load_group(state: dict[str, Any], prompts: Sequence[Prompt]) -> ScoredGroup:
    """What `group_state` gave; `prompts` is the dataset."""
    return ScoredGroup(
        group=RolloutGroup(
            prompt=prompts[state["prompt"]],
            policy_version=state["policy_version"],
            completions=tuple(
                Completion(
                    token_ids=tuple(completion["token_ids"]),
                    sampling_logprobs=tuple(completion["sampling_logprobs"]),
                    finish_reason=FinishReason(completion["finish_reason"]),
                    text=completion["text"],
                )
                for completion in state["completions"]
            ),
        ),
        rewards=tuple(tuple(row) for row in state["rewards"]),
        total_rewards=tuple(state["total_rewards"]),
        advantages=tuple(state["advantages"]),
    )


def tensors_state(tensors: tuple[torch.Tensor, ...] | None) -> list[list[float]] | None:
    """Tensors of one dimension for JSON; `load_tensors` reads them."""
    return None if tensors is None else [tensor.tolist() for tensor in tensors]


def load_tensors(state: list[list[float]] | None) -> tuple[torch.Tensor, ...] | None:
    """What `tensors_state` gave."""
    return None if state is None else tuple(torch.tensor(values) for values in state)
