"""Groups and samples for JSON, exact: floats survive, and a prompt is kept as its index in the dataset."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup, Sample, ScoredGroup, Step, Turn


def step_state(step: Step) -> dict[str, Any]:
    """A step for JSON; `load_step` is the inverse."""
    return {
        "samples": [_sample_state(sample) for sample in step.samples],
        "logprob_temperature": step.logprob_temperature,
    }


def load_step(state: dict[str, Any], prompts: Sequence[Prompt]) -> Step:
    """The step of a `step_state`; `prompts` is the dataset."""
    return Step(
        samples=tuple(_load_sample(sample, prompts) for sample in state["samples"]),
        logprob_temperature=state["logprob_temperature"],
    )


def group_state(group: RolloutGroup) -> dict[str, Any]:
    """A group for JSON; `load_group` is the inverse."""
    return {
        "prompt": group.prompt.index,
        "policy_version": group.policy_version,
        "completions": [_completion_state(completion) for completion in group.completions],
    }


def load_group(state: dict[str, Any], prompts: Sequence[Prompt]) -> RolloutGroup:
    """The group of a `group_state`; `prompts` is the dataset."""
    return RolloutGroup(
        prompt=prompts[state["prompt"]],
        policy_version=state["policy_version"],
        completions=tuple(_load_completion(completion) for completion in state["completions"]),
    )


def scored_state(scored: ScoredGroup) -> dict[str, Any]:
    """A scored group for JSON; `load_scored` is the inverse."""
    return {
        "group": group_state(scored.group),
        "rewards": scored.rewards,
        "total_rewards": scored.total_rewards,
        "old_logprobs": tensors_state(scored.old_logprobs),
    }


def load_scored(state: dict[str, Any], prompts: Sequence[Prompt]) -> ScoredGroup:
    """The scored group of a `scored_state`; `prompts` is the dataset."""
    return ScoredGroup(
        group=load_group(state["group"], prompts),
        rewards=tuple(tuple(row) for row in state["rewards"]),
        total_rewards=tuple(state["total_rewards"]),
        old_logprobs=load_tensors(state["old_logprobs"]),
    )


def tensors_state(tensors: Sequence[torch.Tensor] | None) -> list[list[float]] | None:
    """Tensors of one dimension for JSON; `load_tensors` is the inverse."""
    return None if tensors is None else [tensor.tolist() for tensor in tensors]


def load_tensors(state: list[list[float]] | None) -> tuple[torch.Tensor, ...] | None:
    """The tensors of a `tensors_state`."""
    return None if state is None else tuple(torch.tensor(values) for values in state)


def _sample_state(sample: Sample) -> dict[str, Any]:
    return {
        "prompt": sample.prompt.index,
        "policy_version": sample.policy_version,
        "completion": _completion_state(sample.completion),
        "rewards": sample.rewards,
        "total_reward": sample.total_reward,
        "advantage": sample.advantage,
        "token_advantages": None if sample.token_advantages is None else sample.token_advantages.tolist(),
        "loss_mask": sample.loss_mask if len({*sample.loss_mask}) > 1 else sample.loss_mask[0],
        "old_logprobs": None if sample.old_logprobs is None else sample.old_logprobs.tolist(),
        "ref_logprobs": None if sample.ref_logprobs is None else sample.ref_logprobs.tolist(),
    }


def _load_sample(state: dict[str, Any], prompts: Sequence[Prompt]) -> Sample:
    completion, mask = _load_completion(state["completion"]), state["loss_mask"]
    return Sample(
        prompt=prompts[state["prompt"]],
        completion=completion,
        policy_version=state["policy_version"],
        rewards=tuple(state["rewards"]),
        total_reward=state["total_reward"],
        advantage=state["advantage"],
        token_advantages=None if state["token_advantages"] is None else torch.tensor(state["token_advantages"]),
        loss_mask=tuple(mask) if isinstance(mask, list) else (mask,) * len(completion.token_ids),
        old_logprobs=None if state["old_logprobs"] is None else torch.tensor(state["old_logprobs"]),
        ref_logprobs=None if state["ref_logprobs"] is None else torch.tensor(state["ref_logprobs"]),
    )


def _completion_state(completion: Completion) -> dict[str, Any]:
    of_tools = {
        "turns": [dataclasses.asdict(turn) for turn in completion.turns],
        "environment_reward": completion.environment_reward,
    }
    return {
        "token_ids": completion.token_ids,
        "sampling_logprobs": completion.sampling_logprobs,
        "finish_reason": completion.finish_reason,
        "text": completion.text,
        **(of_tools if completion.turns else {}),
    }


def _load_completion(state: dict[str, Any]) -> Completion:
    return Completion(
        token_ids=tuple(state["token_ids"]),
        sampling_logprobs=tuple(state["sampling_logprobs"]),
        finish_reason=FinishReason(state["finish_reason"]),
        text=state["text"],
        turns=tuple(Turn(**turn) for turn in state.get("turns", ())),
        environment_reward=state.get("environment_reward"),
    )
