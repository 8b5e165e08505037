"""Rewards that compare a completion with the reference: `accuracy` and `exact_match`.

Of a completion with tools they read the last turn, which is the model's own: what a tool has returned is no answer.
"""

from collections.abc import Callable, Sequence

from grpo_stage.rewards.answers.final_answer import answer_tag
from grpo_stage.rewards.builtin.context import RewardContext
from grpo_stage.rewards.builtin.settings import seconds


def accuracy(context: RewardContext, timeout: float = 5.0) -> Callable[..., list[float | None]]:
    r"""1 where the completion's final answer equals the reference's, else 0; None where deciding took too long.

    Range {0, 1}. Needs references. `final_answer` says where either side states its answer, `kinds` what it may be: a
    number, a choice, several values, an interval, a formula, or words. A number has to be stated, not left to be
    worked out (`3 + 4` for 7), and alone: `6 or 7` is no answer. Numbers are compared up to a relative 1e-9, whole
    ones exactly, without regard to unit, currency and notation; formulas as math-verify does; all else as text,
    regardless of case, white space and surrounding punctuation.

    A completion that is empty or never leaves `<think>` scores 0. So does one truncated before its answer, unless the
    last number it had reached happens to be right. One on which math-verify takes longer than `timeout` is None,
    logged, and counted in `accuracy/timeouts`.

    Args:
        timeout: seconds for one completion.
    """
    timeout = seconds("timeout", timeout)

    def score(
        completions: Sequence[str], references: Sequence[str], final_turns: Sequence[str] | None = None
    ) -> list[float | None]:
        return context.judge("accuracy", final_turns or completions, references, timeout)

    return score


def exact_match(context: RewardContext) -> Callable[..., list[float]]:
    """1 where the text equals the reference, else 0.

    Range {0, 1}. Needs references. The text is what stands in the last `<answer>...</answer>`, or the whole completion
    where there are no such tags. White space around text and reference is ignored, everything else counts.
    """

    def score(
        completions: Sequence[str], references: Sequence[str], final_turns: Sequence[str] | None = None
    ) -> list[float]:
        return [
            float(_tagged(completion).strip() == reference.strip())
            for completion, reference in zip(final_turns or completions, references, strict=True)
        ]

    return score


def _tagged(completion: str) -> str:
    tagged = answer_tag(completion)
    return completion if tagged is None else tagged
