"""Rewards on length and repetition: `length`, `overlong`, `repetition`. All count tokens, the end token included."""

import math
from collections.abc import Callable, Sequence

from grpo_stage.rewards.builtin.context import RewardContext
from grpo_stage.rewards.builtin.settings import finite_number, positive_int, seconds


def length(
    context: RewardContext,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    max_length: int | None = None,
    timeout: float = 5.0,
) -> Callable[..., list[float | None]]:
    r"""Cosine-scaled length: a correct answer earns more the shorter it is, a wrong one loses less the longer it is.

        r = end + (start - end) * (1 + cos(pi * min(tokens / max_length, 1))) / 2

    with (start, end) = (max_value_correct, min_value_correct) for a correct completion and
    (min_value_wrong, max_value_wrong) for a wrong one: `start` is the reward of length 0, `end` that of `max_length`
    and beyond. Range: what the four values span. Needs references; correct is what `accuracy` says, and None where it
    says None (counted in `length/timeouts`).
    Source: "Demystifying Long Chain-of-Thought Reasoning in LLMs" (arXiv:2502.03373), as open-r1's
    `get_cosine_scaled_reward`, which counts characters.

    Args:
        min_value_wrong: reward of an empty wrong completion.
        max_value_wrong: reward of a wrong completion of `max_length` tokens.
        min_value_correct: reward of a correct completion of `max_length` tokens.
        max_value_correct: reward of the shortest correct completion.
        max_length: tokens at which the scale ends; `max_new_tokens` by default.
        timeout: seconds in which one completion has to be found correct or wrong.
    """
    timeout = seconds("timeout", timeout)
    max_length = positive_int("max_length", context.max_new_tokens if max_length is None else max_length)
    wrong = (finite_number("min_value_wrong", min_value_wrong), finite_number("max_value_wrong", max_value_wrong))
    correct = (
        finite_number("max_value_correct", max_value_correct),
        finite_number("min_value_correct", min_value_correct),
    )
    if wrong[0] > wrong[1] or correct[1] > correct[0]:
        raise ValueError(
            f"min_value_wrong {min_value_wrong} must not be above max_value_wrong {max_value_wrong}, nor "
            f"min_value_correct {min_value_correct} above max_value_correct {max_value_correct}"
        )

    def scaled(is_correct: float | None, tokens: int) -> float | None:
        if is_correct is None:
            return None
        start, end = correct if is_correct else wrong
        return end + (start - end) * (1.0 + math.cos(math.pi * min(tokens / max_length, 1.0))) / 2.0

    def score(
        completions: Sequence[str],
        references: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        final_turns: Sequence[str] | None = None,
    ) -> list[float | None]:
        verdicts = context.judge("length", final_turns or completions, references, timeout)
        return [scaled(verdict, len(ids)) for verdict, ids in zip(verdicts, completion_ids, strict=True)]

    return score


def overlong(
    context: RewardContext, max_length: int | None = None, cache_length: int | None = None
) -> Callable[..., list[float]]:
    """DAPO's soft overlong punishment.

        r = 0                                              tokens <= max_length - cache_length
            (max_length - cache_length - tokens) / cache_length     up to max_length
            -1                                             beyond

    Range [-1, 0]. A completion truncated at `max_new_tokens` gets -1 by default. Source: DAPO (arXiv:2503.14476),
    equation 13.

    Args:
        max_length: tokens from which the punishment is -1; `max_new_tokens` by default.
        cache_length: over how many tokens before `max_length` the punishment grows; a fifth of it by default.
    """
    max_length = positive_int("max_length", context.max_new_tokens if max_length is None else max_length)
    cache_length = positive_int("cache_length", max(1, max_length // 5) if cache_length is None else cache_length)
    if cache_length > max_length:
        raise ValueError(f"cache_length {cache_length} must not be above max_length {max_length}")
    free = max_length - cache_length

    def score(completion_ids: Sequence[Sequence[int]]) -> list[float]:
        return [-min(max(len(ids) - free, 0) / cache_length, 1.0) for ids in completion_ids]

    return score


def repetition(context: RewardContext, ngram_size: int = 3, max_penalty: float = -1.0) -> Callable[..., list[float]]:
    """Penalty for repeated n-grams of tokens.

        r = max_penalty * (1 - distinct n-grams / n-grams)

    Range (max_penalty, 0]; 0 for a completion shorter than `ngram_size`. Tokens, not words, so that it works for
    languages written without spaces. Source: as open-r1's `get_repetition_penalty_reward`, which counts words.

    Args:
        ngram_size: tokens in an n-gram.
        max_penalty: what a completion that only repeats itself tends to; not above 0.
    """
    ngram_size = positive_int("ngram_size", ngram_size)
    if finite_number("max_penalty", max_penalty) > 0:
        raise ValueError(f"max_penalty is {max_penalty}: it must not be above 0, or repetition would be rewarded")

    def penalty(ids: Sequence[int]) -> float:
        total = len(ids) - ngram_size + 1
        if total <= 0:
            return 0.0
        distinct = len({tuple(ids[i : i + ngram_size]) for i in range(total)})
        return max_penalty * (1.0 - distinct / total)

    def score(completion_ids: Sequence[Sequence[int]]) -> list[float]:
        return [penalty(ids) for ids in completion_ids]

    return score
