"""Rewards tried on completions of known worth: the scores and warnings of `grpo-stage try-rewards`."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo_stage.rewards.answers.verdict import unjudged_reason
from grpo_stage.rewards.errors import RewardError, RewardTimeoutError
from grpo_stage.rewards.registry import names_that_ask_checker
from grpo_stage.rewards.suite import RewardSuite
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


REFERENCE, EMPTY, TRUNCATED, WRONG_NUMBER, REPEATED = "reference", "empty", "truncated", "wrong_number", "repeated"
SAMPLED = "sampled"

REPETITIONS = 20
_UNFINISHED = (TRUNCATED, REPEATED)
_BELOW_THE_REFERENCE = {EMPTY: "an empty one", WRONG_NUMBER: "one whose last number is wrong"}
_REMEDY = (
    "Either the rewards do not say what you mean, or the reference answer is no example of what they reward, such as "
    "a bare number where `format` wants tags."
)
_TO_LAST_DIGIT = re.compile(r".*([0-9])", re.DOTALL)


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


def texts_from(reference: str | None) -> dict[str, str]:
    """A perfect completion and broken ones by kind; those left out that cannot be made of `reference`."""
    if reference is None or not reference.strip():
        return {EMPTY: ""}
    texts = {REFERENCE: reference, EMPTY: "", TRUNCATED: reference[: len(reference) // 2]}
    if not texts[TRUNCATED].strip():
        del texts[TRUNCATED]
    if match := _TO_LAST_DIGIT.match(reference):
        start, end = match.span(1)
        other_digit = "8" if match[1] == "9" else str(int(match[1]) + 1)
        texts[WRONG_NUMBER] = reference[:start] + other_digit + reference[end:]
    texts[REPEATED] = "\n".join([reference] * REPETITIONS)
    return texts


def completions_from(reference: str | None, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Completion]:
    """`texts_from` as an engine would return them: no end token where generation would have been cut."""
    return {
        kind: completion_of(text, tokenizer, is_finished=kind not in _UNFINISHED)
        for kind, text in texts_from(reference).items()
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


def warnings_about(rows: Sequence[TrialRow], names: Sequence[str]) -> list[str]:
    """What a user should know before training with these rewards; empty where nothing is wrong."""
    by_prompt: dict[int, list[TrialRow]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_index, []).append(row)
    warnings = [
        f"`{name}` applied to none of the completions, so that it has no say. Look at when it returns None."
        for name in names
        if all(row.rewards[name] is None for row in rows)
    ]
    if judged_by := names_that_ask_checker(names):
        warnings += _unjudged(rows, min(judged_by))
    if not any(row.kind == REFERENCE for row in rows):
        warnings.append(
            "No row has a reference answer, so that there is no perfect completion to compare a broken one with. "
            "`--completions model` samples some; `reference_column` names the column that holds the answers."
        )
    is_compared = len(rows) > len(by_prompt)
    if is_compared and len({row.reward for row in rows}) == 1:
        return [
            *warnings,
            f"All completions have the same total reward ({_shown(rows[0].reward)}): nothing can be learned from "
            f"that. {_REMEDY}",
        ]
    groups = list(by_prompt.values())
    not_told_apart = [_not_told_apart(groups, kind, words) for kind, words in _BELOW_THE_REFERENCE.items()]
    return warnings + [warning for warning in (*not_told_apart, _equal_groups(groups)) if warning]


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


def _not_told_apart(groups: Sequence[Sequence[TrialRow]], kind: str, words: str) -> str:
    by_kind = [{row.kind: row for row in group} for group in groups]
    pairs = [(group[REFERENCE], group[kind]) for group in by_kind if REFERENCE in group and kind in group]
    wrong = [(perfect, broken) for perfect, broken in pairs if not _is_above(perfect.reward, broken.reward)]
    if not wrong:
        return ""
    perfect, broken = wrong[0]
    return (
        f"In {len(wrong)} of {len(pairs)} rows the reference answer earns no more than {words} (`{kind}`), first for "
        f"the prompt of index {perfect.prompt_index}: {_shown(perfect.reward)} against {_shown(broken.reward)}. "
        f"{_REMEDY}"
    )


def _equal_groups(groups: Sequence[Sequence[TrialRow]]) -> str:
    sampled = [rewards for group in groups if (rewards := [row.reward for row in group if row.kind == SAMPLED])]
    level = [rewards for rewards in sampled if len(set(rewards)) == 1]
    if not level:
        return ""
    return (
        f"In {len(level)} of {len(sampled)} rows all sampled completions earn the same: a run learns nothing from "
        "such a group. Where that stays so, the task is too hard or too easy for the model, or the reward too coarse."
    )


def _is_above(perfect: float | None, broken: float | None) -> bool:
    """True if the update prefers the perfect completion. One without a reward takes no part in it."""
    return perfect is not None and (broken is None or perfect > broken)


def _shown(reward: float | None) -> str:
    return "none" if reward is None else f"{reward:g}"
