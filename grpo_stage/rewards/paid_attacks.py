"""Which attacks a recipe's rewards pay.

An attack is compared with two honest completions of the same prompt, the right answer r and a wrong one w, both as the
reference is written or both in tags, whichever form earns more. It is paid

    by a function that tells right from wrong (r - w is at least half of the range of all that it gave for the prompt)
        if it gives the attack w + (r - w) / 2 or more;
    by the total
        if that is above w + 3/4 (r - w), with w of the form that earns less.

So a reward for the form alone, such as `format`, which a wrong answer earns as well, is no finding, unless it
outweighs all else. Each prompt is asked, and an attack is named if more than half of them pay it: by accident the last
number of a question may be the answer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from grpo_stage.rewards.attacks import ATTACKS, EMPTY, FORMAT_ALONE, IN_TAGS, REFERENCE, WRONG_ANSWER, Attack
from grpo_stage.rewards.trial import TrialRow, best_form, by_prompt


PAID_BY_FUNCTION = 0.5
PAID_BY_TOTAL = 0.75
TELLS_RIGHT_FROM_WRONG = 0.5
CLEARLY_MORE = 0.1
"""Attacks inside tags earn what the tags alone earn, and are named beside those for this much more of r - w."""

TOTAL = "total"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackScore:
    """What one attack, or an honest completion beside it, earned in the mean over the prompts."""

    kind: str
    """Of an attack that is tried in two forms, the one that earned more."""
    what: str
    """In words."""
    completion: str
    """The first prompt's."""
    rewards: Mapping[str, float | None]
    """By the function's name, unweighted."""
    reward: float | None
    """The weighted sum."""
    num_prompts: int
    paid_by: tuple[str, ...] = ()
    """The functions that pay it, and `TOTAL`."""


def attack_scores(rows: Sequence[TrialRow], weights: Mapping[str, float]) -> list[AttackScore]:
    """The right and a wrong answer in the form that earns more, then each attack that was tried.

    Args:
        rows: of `try_rewards`.
        weights: of each function, by its name.
    """
    prompts = by_prompt(rows)
    if not prompts:
        return []
    form = IN_TAGS if sum(form == IN_TAGS for _, form in prompts) * 2 > len(prompts) else ""
    groups = [of_prompt for of_prompt, _ in prompts]
    scores = [
        _mean(groups, kind + form, what)
        for kind, what in ((REFERENCE, "the right answer"), (WRONG_ANSWER, "a wrong answer"))
        if any(kind + form in of_prompt for of_prompt in groups)
    ]
    by_form = _shares(groups, FORMAT_ALONE, None)
    for attack in ATTACKS:
        kinds = [kind for kind in (attack.kind, attack.kind + IN_TAGS) if any(kind in one for one in groups)]
        if not kinds:
            continue
        candidates = [_mean(groups, kind, attack.what, _payers(groups, kind, weights, by_form)) for kind in kinds]
        scores.append(max(candidates, key=lambda one: (len(one.paid_by), one.reward if one.reward is not None else 0)))
    return scores


def attack_findings(scores: Iterable[AttackScore]) -> list[str]:
    """A sentence for each function that pays attacks, with the remedies."""
    remedies = {attack.kind: attack for attack in ATTACKS}
    by_payer: dict[str, list[tuple[Attack, AttackScore]]] = {}
    for score in scores:
        for payer in score.paid_by:
            by_payer.setdefault(payer, []).append((remedies[score.kind.removesuffix(IN_TAGS)], score))
    return [
        f"{'The total' if payer == TOTAL else f'`{payer}`'} pays attacks: {_listed(payer, paid)}. A policy finds that "
        f"sooner than the task. {'. '.join(dict.fromkeys(attack.remedy for attack, _ in paid))}."
        for payer, paid in by_payer.items()
    ]


def _listed(payer: str, paid: Sequence[tuple[Attack, AttackScore]]) -> str:
    earned = [score.reward if payer == TOTAL else score.rewards[payer] for _, score in paid]
    return ", ".join(
        f"{attack.what} (`{score.kind}`) with {value or 0:g}"
        for (attack, score), value in zip(paid, earned, strict=True)
    )


def _payers(
    groups: Sequence[Mapping[str, TrialRow]], kind: str, weights: Mapping[str, float], by_form: Sequence[float]
) -> tuple[str, ...]:
    functions = [
        name
        for name, weight in weights.items()
        if weight > 0 and _is_most(_shares(groups, kind, name), PAID_BY_FUNCTION - 1e-9)
    ]
    shares = _shares(groups, kind, None)
    is_of_the_form = kind.endswith(IN_TAGS) and by_form and fmean(shares or [0]) <= fmean(by_form) + CLEARLY_MORE
    by_total = not functions and not is_of_the_form and _is_most(shares, PAID_BY_TOTAL + 1e-9)
    return (*functions, *([TOTAL] if by_total else []))


def _is_most(shares: Sequence[float], bound: float) -> bool:
    return 2 * sum(share >= bound for share in shares) > len(shares)


def _shares(groups: Sequence[Mapping[str, TrialRow]], kind: str, name: str | None) -> list[float]:
    """(attack - w) / (r - w) of each prompt that tells right from wrong, by the function `name` or in all.

    Where no wrong answer could be made, the empty completion stands for it.
    """
    shares = []
    for of_prompt in groups:
        form = best_form(of_prompt, name)
        forms = (form,) if name is not None else ("", IN_TAGS)
        wrong_rows = [of_prompt[WRONG_ANSWER + one] for one in forms if WRONG_ANSWER + one in of_prompt]
        wrongs = [value for row in wrong_rows or [of_prompt[EMPTY]] if (value := row.of(name)) is not None]
        right, attack = of_prompt[REFERENCE + form].of(name), of_prompt[kind].of(name) if kind in of_prompt else None
        if right is None or attack is None or not wrongs:
            continue
        given = [value for row in of_prompt.values() if (value := row.of(name)) is not None]
        signal = right - min(wrongs)
        tells = name is None or signal >= TELLS_RIGHT_FROM_WRONG * (max(given) - min(given))
        if signal > 0 and tells:
            shares.append((attack - min(wrongs)) / signal)
    return shares


def _mean(
    groups: Sequence[Mapping[str, TrialRow]], kind: str, what: str, paid_by: tuple[str, ...] = ()
) -> AttackScore:
    rows = [of_prompt[kind] for of_prompt in groups if kind in of_prompt]
    return AttackScore(
        kind=kind,
        what=what,
        completion=rows[0].completion,
        rewards={name: _mean_of(row.rewards[name] for row in rows) for name in rows[0].rewards},
        reward=_mean_of(row.reward for row in rows),
        num_prompts=len(rows),
        paid_by=paid_by,
    )


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
