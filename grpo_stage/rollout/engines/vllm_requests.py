"""What vLLM is asked for, whether in this process or over HTTP."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from grpo_stage.types import Prompt, RolloutGroup, SamplingSettings


SCORING: Mapping[str, Any] = MappingProxyType(
    {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "prompt_logprobs": 0, "detokenize": False}
)
"""vLLM's `SamplingParams` for the log-probabilities of a prompt. One token is sampled, since vLLM knows no request
without, and thrown away."""


def most_tokens(prompt: Prompt, sampling: SamplingSettings) -> int:
    """How many tokens a completion may have."""
    return sampling.max_new_tokens if prompt.room is None else min(prompt.room, sampling.max_new_tokens)


def sampling_arguments(prompt: Prompt, sampling: SamplingSettings, seed: int) -> dict[str, Any]:
    """vLLM's `SamplingParams` for one completion, but for `structured_outputs`, which is a mapping here."""
    return {
        "seed": seed,
        "max_tokens": most_tokens(prompt, sampling),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "structured_outputs": None if sampling.structured_outputs is None else dict(sampling.structured_outputs),
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # the end tokens are those above, and no other that vLLM finds in a checkpoint
        "logprobs": 0,
        "detokenize": False,
    }


def refuse_long_prompts(prompts: Sequence[Prompt], sampling: SamplingSettings, max_model_len: int) -> None:
    """Raise ValueError for a prompt whose completions have no room."""
    for prompt in prompts:
        most = most_tokens(prompt, sampling)
        if len(prompt.token_ids) + most > max_model_len:
            raise ValueError(
                f"Prompt {prompt.index} has {len(prompt.token_ids)} tokens: with max_new_tokens {most} it passes the "
                f"engine's {max_model_len}. Raise `vllm_maxlen`, or lower `cutoff_len` or `max_new_tokens`."
            )


def temperature_of_logprobs(fixed: float | None, sampling: SamplingSettings) -> float:
    """The temperature that the log-probabilities of sampled tokens refer to.

    Args:
        fixed: `VLLMSettings.logprob_temperature`.
        sampling: what is sampled with.

    Raises:
        ValueError: if the engine gives those of the sampled distribution, and that is not the policy's.
    """
    if fixed is not None:
        return fixed
    if not sampling.is_neutral:
        raise ValueError(
            "The engine was started for neutral sampling, and top_k, top_p, min_p, repetition_penalty or "
            "structured_outputs is set: its log-probabilities would not be the policy's. Start it with "
            "logprob_temperature=1.0."
        )
    return sampling.temperature or 1.0


def with_logprobs(groups: Sequence[RolloutGroup], scores: Iterable[Any]) -> list[RolloutGroup]:
    """The groups with other log-probabilities of what was sampled: a [T] for each completion, prompt-major.

    Under structured outputs vLLM gives those of what is left of the distribution, its raw ones included.
    """
    each_score = iter(scores)
    return [
        dataclasses.replace(
            group,
            completions=tuple(
                dataclasses.replace(each, sampling_logprobs=tuple(next(each_score).tolist()))
                for each in group.completions
            ),
        )
        for group in groups
    ]
