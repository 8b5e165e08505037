"""The best constant answer: what a policy would earn that gives one answer to every prompt, without reading it.

Where one answer is right for most prompts, GRPO finds it before anything else: each prompt whose answer it is rewards
it, and the reward rises as in a run that learns the task.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from grpo_stage.rewards.answers.final_answer import final_answer
from grpo_stage.rewards.answers.verdict import voted_answer
from grpo_stage.rewards.suite import RewardSuite
from grpo_stage.rewards.trial import completion_of
from grpo_stage.types import Prompt, RolloutGroup


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ANSWERS_TRIED = 3
"""The most frequent ones. A rarer one earns more only where the rewards say something else than the references."""
PROMPTS_SCORED = 128
"""The share that an answer earns is then known within 9 percentage points (two standard errors)."""

LARGE_SHARE = 0.4
"""A policy that earns this much without reading the prompts has little to gain from reading them: seen to collapse at
0.61 (docs/monitors.md)."""
UNEVENNESS = 1.3
"""How much more frequent than at an even split of the answers. Of two answers that are right equally often, one earns
half in any case, but no more than guessing does, so that nothing draws the policy to it."""
LEAST_PROMPTS = 20
"""With fewer, the most frequent answer may be so by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantAnswer:
    """One answer given to all prompts."""

    answer: str
    """As a reference states it."""
    completion: str
    """The text that was tried: a whole reference, or the answer alone, whichever earns more."""
    frequency: float
    """Share of the references with this final answer."""
    share: float | None
    """What it earns over what the references earn, both counted from what an empty completion earns; None where the
    references earn no more than an empty completion."""
    num_prompts: int
    """Those with a reference that states an answer."""
    num_answers: int
    """Different final answers of the references."""

    @property
    def is_tempting(self) -> bool:
        """Whether a policy may settle on it."""
        return (
            self.share is not None
            and self.share >= LARGE_SHARE
            and self.frequency * self.num_answers >= UNEVENNESS
            and self.num_prompts >= LEAST_PROMPTS
        )

    @property
    def sentence(self) -> str:
        """What it is and earns."""
        earns = (
            "earns nothing that can be compared"
            if self.share is None
            else f"earns {self.share:.0%} of what the references earn"
        )
        return (
            f"Best constant answer: {self.answer!r:.80} to every prompt {earns}, and is the answer of "
            f"{self.frequency:.0%} of {self.num_prompts} prompts ({self.num_answers} different answers)."
        )

    @property
    def warning(self) -> str:
        """What a user should know before a run; empty unless the answer is tempting."""
        if not self.is_tempting:
            return ""
        assert self.share is not None
        return (
            f"The answer {self.answer!r:.80} to every prompt would earn {self.share:.0%} of what the references "
            f"earn: it is the answer of {self.frequency:.0%} of {self.num_prompts} prompts. A run may learn to give "
            "it without reading the prompt, and its reward would rise all the same. Balance the answers in the "
            "dataset or by `answer_balance: 0.5`, hold balanced prompts out (`eval_dataset`), and watch `eval_reward`."
        )


def best_constant_answer(
    rewards: RewardSuite, prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase"
) -> ConstantAnswer | None:
    """The constant answer that earns most of the frequent ones; None with fewer than two references that state one.

    The answers are counted over all prompts and scored on at most `PROMPTS_SCORED` of them, evenly spread.

    Raises:
        ValueError: if a prompt lacks what a reward function requires.
        RewardError: if a function fails.
    """
    stated = [
        (prompt, prompt.reference, answer)
        for prompt in prompts
        if prompt.reference and (answer := voted_answer(prompt.reference, is_reference=True))
    ]
    if len(stated) < 2:
        return None
    counts = Counter(answer for _, _, answer in stated)
    frequent = [answer for answer, _ in counts.most_common(ANSWERS_TRIED)]
    texts: list[tuple[str, str]] = []  # (answer, a text that gives it)
    for answer in frequent:
        shortest = min((reference for _, reference, own in stated if own == answer), key=len)
        alone = final_answer(shortest, is_reference=True).text
        texts += [(answer, text) for text in dict.fromkeys((shortest, alone))]

    num_scored = min(PROMPTS_SCORED, len(stated))
    scored = [stated[i * len(stated) // num_scored] for i in range(num_scored)]
    constants = [completion_of(text, tokenizer) for text in ("", *(text for _, text in texts))]
    groups = [
        RolloutGroup(prompt=prompt, completions=(completion_of(reference, tokenizer), *constants), policy_version=0)
        for prompt, reference, _ in scored
    ]
    totals = [[rewards.total(one) or 0.0 for one in of_prompt] for of_prompt in rewards.score(groups)]
    of_references, of_empty, *of_texts = (fmean(column) for column in zip(*totals, strict=True))
    best = max(range(len(texts)), key=of_texts.__getitem__)
    answer, completion = texts[best]
    attainable = of_references - of_empty
    return ConstantAnswer(
        answer=final_answer(completion, is_reference=True).text,
        completion=completion,
        frequency=counts[answer] / len(stated),
        share=(of_texts[best] - of_empty) / attainable if attainable > 0 else None,
        num_prompts=len(stated),
        num_answers=len(counts),
    )
