"""Rewards on the form of the text: `format`, `tag_count`, `regex`."""

import re
from collections.abc import Callable, Sequence

from grpo_stage.rewards.builtin.context import RewardContext


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_THINK_THEN_ANSWER = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


def think_answer_format(context: RewardContext, think_prefilled: bool = False) -> Callable[..., list[float]]:
    """1 where the completion is exactly `<think>...</think>` and then `<answer>...</answer>`, else 0.

    Range {0, 1}. Each tag stands once; only white space may surround the two blocks. A truncated completion scores 0.
    Source: the format reward of DeepSeek-R1.

    Args:
        think_prefilled: set it where the template already opens `<think>` in the prompt, so that the completion
            starts inside the block and must not open it again.
    """
    if not isinstance(think_prefilled, bool):
        raise ValueError(f"think_prefilled is {think_prefilled!r}: it must be true or false")
    prefix = "<think>" if think_prefilled else ""

    def has_form(completion: str) -> bool:
        text = prefix + completion
        return all(text.count(tag) == 1 for tag in TAGS) and _THINK_THEN_ANSWER.fullmatch(text) is not None

    def score(completions: Sequence[str]) -> list[float]:
        return [float(has_form(completion)) for completion in completions]

    return score


def tag_count(context: RewardContext) -> Callable[..., list[float]]:
    """0.25 for each of `<think>`, `</think>`, `<answer>`, `</answer>` that occurs exactly once.

    Range [0, 1]. Order does not matter, which makes it a gentler slope towards `format`. Where the template opens
    `<think>` in the prompt, 0.75 is the most a completion can get. Source: open-r1's `tag_count_reward`, which also
    wants line breaks around the tags.
    """

    def score(completions: Sequence[str]) -> list[float]:
        return [sum(0.25 for tag in TAGS if completion.count(tag) == 1) for completion in completions]

    return score


def regex(context: RewardContext, pattern: str, full_match: bool = False) -> Callable[..., list[float]]:
    """1 where the completion matches `pattern`, else 0.

    Range {0, 1}. Python's `re`; flags are written in the pattern, e.g. `(?s)` to let a dot match line breaks.

    Args:
        pattern: the regular expression.
        full_match: the whole completion must match, not a part of it.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"pattern is {pattern!r}: it must be a regular expression as text; put it in quotes")
    if not isinstance(full_match, bool):
        raise ValueError(f"full_match is {full_match!r}: it must be true or false")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    find = compiled.fullmatch if full_match else compiled.search

    def score(completions: Sequence[str]) -> list[float]:
        return [float(find(completion) is not None) for completion in completions]

    return score
