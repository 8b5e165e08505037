"""Rewards tried on completions of known worth: the scores and warnings of `grpo-stage try-rewards`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo_stage.rewards.answers.verdict import unjudged_reason
from grpo_stage.rewards.attacks import (
    EMPTY,
    IN_TAGS,
    REFERENCE,
    REPEATED,
    TRUNCATED,
    UNFINISHED,
    WRONG_ANSWER,
    Task,
    texts_of,
)
from grpo_stage.rewards.errors import RewardError, RewardTimeoutError
from grpo_stage.rewards.registry import names_that_ask_checker
from grpo_stage.rewards.suite import RewardSuite
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SAMPLED = "sampled"
SHOWN_KINDS = (REFERENCE, REFERENCE + IN_TAGS, WRONG_ANSWER, TRUNCATED, REPEATED, SAMPLED)
"""What is shown of each prompt; the attacks are shown by their means."""

_REMEDY = (
    "Either the rewards do not say what you mean, or the reference answer is no example of what they reward, as it is "
    "or in `<answer>` tags."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """One completion and what it earned."""

    prompt_index: int
    prompt: str
    reference: str | None
    kind: str
    completion: str
    num_tokens: int
    """The end token included."""
    rewards: Mapping[str, float | None]
    """By the function's name, unweighted."""
    reward: float | None
    """The weighted sum."""

    def of(self, name: str | None) -> float | None:
        """What the function `name` gave, or the weighted sum."""
        return self.reward if name is None else self.rewards[name]


def completions_for(task: Task, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Completion]:
    """`texts_of` as an engine would return them: no end token where generation would have been cut."""
    return {
        kind: completion_of(text, tokenizer, is_finished=kind not in UNFINISHED)
        for kind, text in texts_of(task).items()
    }


def completion_of(text: str, tokenizer: "PreTrainedTokenizerBase", *, is_finished: bool = True) -> Completion:
    """`text` as an engine would return it: with an end token, unless generation would have been cut."""
    token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    if is_finished:
        token_ids += (tokenizer.eos_token_id,)
    return Completion(
        token_ids=token_ids,
        sampling_logprobs=(0.0,) * len(token_ids),
        finish_reason=FinishReason.STOP if is_finished else FinishReason.LENGTH,
        text=text,
    )


def try_rewards(
    rewards: RewardSuite, prompts: Sequence[Prompt], completions: Sequence[Sequence[tuple[str, Completion]]]
) -> list[TrialRow]:
    """Score the completions of each prompt, which come with their kind.

    Raises:
        ValueError: if a prompt lacks what a function requires.
        RewardError: if a function fails, with the completion that it fails on wherever one alone makes it fail.
    """
    groups = [
        RolloutGroup(prompt=prompt, completions=tuple(one for _, one in of_prompt), policy_version=0)
        for prompt, of_prompt in zip(prompts, completions, strict=True)
    ]
    return [
        TrialRow(
            prompt_index=prompt.index,
            prompt=prompt.text,
            reference=prompt.reference,
            kind=kind,
            completion=completion.text,
            num_tokens=len(completion.token_ids),
            rewards=dict(zip(rewards.names, values, strict=True)),
            reward=rewards.total(values),
        )
        for prompt, of_prompt, scores in zip(prompts, completions, _score(rewards, groups), strict=True)
        for (kind, completion), values in zip(of_prompt, scores, strict=True)
    ]


def _score(rewards: RewardSuite, groups: Sequence[RolloutGroup]) -> list[list[list[float | None]]]:
    """Score all at once, as a run does; after a failure one by one, to find the completion that fails."""
    try:
        return rewards.score(groups)
    except RewardTimeoutError:
        raise
    except RewardError:
        for group in groups:
            for completion in group.completions:
                rewards.score([RolloutGroup(prompt=group.prompt, completions=(completion,), policy_version=0)])
        raise


def findings_in(rows: Sequence[TrialRow], names: Sequence[str]) -> list[str]:
    """Defects of the rewards, or of the references for them; empty where there are none."""
    findings = [
        f"`{name}` applied to none of the completions, so that it has no say. Look at when it returns None."
        for name in names
        if all(row.rewards[name] is None for row in rows)
    ]
    if judged_by := names_that_ask_checker(names):
        findings += _unjudged(rows, min(judged_by))
    groups = by_prompt(rows)
    is_compared = len(rows) > len(groups)
    if is_compared and len({row.reward for row in rows}) == 1:
        return [
            *findings,
            f"All completions have the same total reward ({_shown(rows[0].reward)}): nothing can be learned from "
            f"that. {_REMEDY}",
        ]
    not_told_apart = (
        _not_told_apart([(one[REFERENCE + form], one[EMPTY]) for one, form in groups if EMPTY in one], "an empty one"),
        _not_told_apart(
            [(one[REFERENCE + form], one[WRONG_ANSWER + form]) for one, form in groups if WRONG_ANSWER + form in one],
            "a wrong one in the same form",
        ),
    )
    return findings + [finding for finding in not_told_apart if finding]


def remarks_on(rows: Sequence[TrialRow]) -> list[str]:
    """What the rows cannot tell, which is no defect by itself."""
    remarks = []
    if not any(row.kind == REFERENCE for row in rows):
        remarks.append(
            "No row has a reference answer, so that there is no perfect completion to compare a broken one with. "
            "`--completions model` samples some; `reference_column` names the column that holds the answers."
        )
    sampled: dict[int, list[float | None]] = {}
    for row in rows:
        if row.kind == SAMPLED:
            sampled.setdefault(row.prompt_index, []).append(row.reward)
    if level := sum(len(set(rewards)) == 1 for rewards in sampled.values()):
        remarks.append(
            f"In {level} of {len(sampled)} rows all sampled completions earn the same: a run learns nothing from such "
            "a group. Where that stays so, the task is too hard or too easy for the model, or the reward too coarse."
        )
    return remarks


def by_prompt(rows: Sequence[TrialRow]) -> list[tuple[dict[str, TrialRow], str]]:
    """The rows of each prompt that has a reference, by kind, without sampled ones; and the form that earns more.

    The form is the end of a kind's name: `IN_TAGS`, or nothing for the form of the reference.
    """
    prompts: dict[int, dict[str, TrialRow]] = {}
    for row in rows:
        if row.kind != SAMPLED:
            prompts.setdefault(row.prompt_index, {})[row.kind] = row
    return [(of_prompt, best_form(of_prompt)) for of_prompt in prompts.values() if REFERENCE in of_prompt]


def best_form(of_prompt: Mapping[str, TrialRow], name: str | None = None) -> str:
    """The form in which the right answer earns more, of the function `name` or in all."""
    tagged = of_prompt.get(REFERENCE + IN_TAGS)
    return IN_TAGS if tagged is not None and is_above(tagged.of(name), of_prompt[REFERENCE].of(name)) else ""


def _unjudged(rows: Sequence[TrialRow], name: str) -> list[str]:
    references = {row.prompt_index: row.reference for row in rows if row.kind == REFERENCE and row.reference}
    reasons = {index: reason for index, text in references.items() if (reason := unjudged_reason(text))}
    return [
        f"`{name}` does not judge {count} of {len(references)} reference answers: each {reason}, first that of the "
        f"prompt of index {index}: {references[index]!r:.200}. Only a copy of it counts as correct. Put the answer "
        "itself, a number, a formula, a choice or a few words, into `\\boxed{}`, into `<answer>` tags, behind `####` "
        "or into a column of its own (`reference_column`); or use a function of your own or a reward model."
        for reason, count in Counter(reasons.values()).items()
        for index in [next(index for index, one in reasons.items() if one == reason)]
    ]


def _not_told_apart(pairs: Sequence[tuple[TrialRow, TrialRow]], words: str) -> str:
    wrong = [(perfect, broken) for perfect, broken in pairs if not is_above(perfect.reward, broken.reward)]
    if not wrong:
        return ""
    perfect, broken = wrong[0]
    return (
        f"In {len(wrong)} of {len(pairs)} rows the right answer (`{perfect.kind}`) earns no more than {words} "
        f"(`{broken.kind}`), first for the prompt of index {perfect.prompt_index}: {_shown(perfect.reward)} against "
        f"{_shown(broken.reward)}. {_REMEDY}"
    )


def is_above(perfect: float | None, broken: float | None) -> bool:
    """True if the update prefers the perfect completion. One without a reward takes no part in it."""
    return perfect is not None and (broken is None or perfect > broken)


def _shown(reward: float | None) -> str:
    return "none" if reward is None else f"{reward:g}"
