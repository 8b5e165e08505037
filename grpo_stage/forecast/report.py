"""The report of `grpo-stage probe`: whether GRPO can learn from a recipe's prompts with its start model, and why."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean

import numpy as np

from grpo_stage.forecast.contrast import Contrasts
from grpo_stage.forecast.group_size import (
    NUM_DRAWS,
    SIZES,
    GroupMoments,
    binary_moments,
    interval,
    length_that_ends,
    prompt_weights,
    rate_draws,
    resampled_moments,
    signal,
)
from grpo_stage.records.evaluation import pass_at_k
from grpo_stage.types import FinishReason, ScoredGroup


CORRECTNESS = ("accuracy", "exact_match")
"""Built-in rewards that say themselves what is right, in the order of preference."""
LEARNABLE = (0.2, 0.8)
"""The share of right samples between which `--write` keeps a prompt, as in arXiv:2510.26788."""
LEAST_LIVE = 0.1
"""With fewer live groups than this a step learns from less than a tenth of what it samples."""
MOST_TRUNCATED = 0.05
"""The share that `max_new_tokens` may cut: the 95 % quantile of the length is then known."""
FEW_VALUES = 10
"""Up to so many different totals the best of them is what is right."""
NUM_BINS = 10


class Advice(StrEnum):
    """What a verdict tells the user to do."""

    LEARN = "learn"
    COLD_START = "cold_start"
    HARDER_PROMPTS = "harder_prompts"
    RAISE_MAX_NEW_TOKENS = "raise_max_new_tokens"
    REWARD = "look_at_the_rewards"
    BALANCE_ANSWERS = "balance_answers"
    GROUP_SIZE = "group_size"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One conclusion."""

    advice: Advice
    text: str

    @property
    def needs_attention(self) -> bool:
        return self.advice not in (Advice.LEARN, Advice.GROUP_SIZE)


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedPrompt:
    """A prompt and its samples."""

    index: int
    prompt: str
    num_samples: int
    """Those with a reward."""
    num_right: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeForecast:
    """What a group of `size` is worth."""

    size: int
    dead: Estimate
    """Share of groups whose rewards are all equal."""
    std: Estimate
    """Mean standard deviation of a group's rewards."""
    signal: Estimate | None
    """Relative to the best size; None where no gradients were measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeChoice:
    """The group size that buys most."""

    best: int
    low: int
    """The 95 % interval of the best size."""
    high: int
    contrast: Estimate
    """See `group_size.signal`, in units of the reward."""
    agreement: Estimate
    num_prompts: int
    """Those whose gradients were measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """The content of the `--json` file."""

    num_prompts: int
    num_samples: int
    right: str
    """What counts as right, in words."""
    accuracy: Estimate
    pass_at_k: dict[int, Estimate]
    always_right: float
    """Share of prompts, as the next two."""
    always_wrong: float
    mixed: float
    rewards: list[tuple[float, float, float]]
    """(from, to, share) of the total reward; from = to where a single value is meant."""
    no_reward: float
    """Share of completions to which no function applied."""
    max_new_tokens: int
    truncated: float
    """Share of completions."""
    length_95: int | None
    """The `max_new_tokens` that would end 95 % of the completions; None where too few ended to tell."""
    mean_length: float
    tokens_per_second: float
    num_generations: int
    """The recipe's."""
    sizes: list[SizeForecast]
    choice: SizeChoice | None
    constant_answer: str | None
    """The best one, in words."""
    verdicts: list[Verdict]
    prompts: list[ProbedPrompt]


def define_right(
    groups: Sequence[ScoredGroup], names: Sequence[str], threshold: float | None
) -> tuple[str, list[list[bool | None]]]:
    """What counts as right, in words, and which completions are; None for one without a reward.

    The total reward's threshold where one is given; else a built-in reward that compares with the reference; else the
    best total seen, or, where totals take many values, the upper half of their range.
    """
    totals = [[*group.total_rewards] for group in groups]
    by_name = next((name for name in CORRECTNESS if name in names), None)
    if threshold is None and by_name is not None:
        position = names.index(by_name)
        own = [[row[position] for row in group.rewards] for group in groups]
        return f"`{by_name}` is 1", [[None if one is None else one >= 1.0 for one in of] for of in own]
    if threshold is not None:
        words = f"the total reward is at least {threshold:g} (--right-at)"
    else:
        values = sorted({total for of in totals for total in of if total is not None})
        if not values:
            return "nothing: no completion has a reward", [[None] * len(of) for of in totals]
        if len(values) == 1:
            words = f"nothing: every completion earns {values[0]:g}; `--right-at` says what is right"
            return words, [[None if one is None else False for one in of] for of in totals]
        if len(values) <= FEW_VALUES:
            threshold = values[-1]
            words = f"the total reward is {threshold:g}, the best seen"
        else:
            threshold = (values[0] + values[-1]) / 2
            words = f"the total reward is at least {threshold:g}, halfway between the lowest and the highest seen"
    return words, [[None if one is None else one >= threshold - 1e-9 for one in of] for of in totals]


def group_moments(
    groups: Sequence[ScoredGroup], sizes: Sequence[int], rng: np.random.Generator
) -> GroupMoments | None:
    """The moments of the total reward; None without two samples of a prompt."""
    totals = [[total for total in group.total_rewards if total is not None] for group in groups]
    totals = [of for of in totals if len(of) > 1]
    if not totals:
        return None
    values = sorted({total for of in totals for total in of})
    if len(values) > 2:
        return resampled_moments(totals, sizes, rng)
    num_high = [sum(total == values[-1] for total in of) for of in totals]
    span = values[-1] - values[0]
    if span == 0:  # each is the only value seen: another could still come
        num_high, span = [0 for _ in totals], 1.0
    found = binary_moments(num_high, [len(of) for of in totals], sizes, rng)
    return GroupMoments(sizes=found.sizes, dead=found.dead, std=found.std * span, square=found.square * span * span)


def make_report(
    groups: Sequence[ScoredGroup],
    names: Sequence[str],
    *,
    threshold: float | None,
    num_generations: int,
    max_new_tokens: int,
    seconds: float,
    contrasts: Contrasts | None,
    constant_answer: tuple[str, bool] | None,
    seed: int,
) -> ProbeReport:
    """Everything that the samples say.

    Args:
        groups: the prompts' samples with their rewards; at least one prompt.
        names: [F] of the reward functions.
        threshold: of the total reward, from which on a completion is right; None for what `define_right` chooses.
        num_generations: the recipe's.
        max_new_tokens: the recipe's.
        seconds: that the sampling took.
        contrasts: measured on gradients; None where they were not.
        constant_answer: the best one in words, and whether a run may settle on it.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    completions = [completion for group in groups for completion in group.group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    has_ended = [completion.finish_reason is FinishReason.STOP for completion in completions]
    truncated = 1 - fmean(has_ended)
    words, is_right = define_right(groups, names, threshold)
    prompts = [
        ProbedPrompt(
            index=group.group.prompt.index,
            prompt=group.group.prompt.text,
            num_samples=sum(one is not None for one in of),
            num_right=sum(one is True for one in of),
        )
        for group, of in zip(groups, is_right, strict=True)
    ]
    judged = [one for one in prompts if one.num_samples > 0]
    sizes = sorted({*SIZES, num_generations})
    moments = group_moments(groups, sizes, rng)
    forecasts, choice = _forecast(moments, contrasts, rng) if moments is not None else ([], None)
    totals = [total for group in groups for total in group.total_rewards]
    applied = [total for total in totals if total is not None]
    num_judged = max(1, len(judged))
    report = ProbeReport(
        num_prompts=len(groups),
        num_samples=max(len(group.group.completions) for group in groups),
        right=words,
        accuracy=_accuracy(judged, rng),
        pass_at_k=_pass_curve(judged, rng),
        always_right=sum(one.num_right == one.num_samples for one in judged) / num_judged,
        always_wrong=sum(one.num_right == 0 for one in judged) / num_judged,
        mixed=sum(0 < one.num_right < one.num_samples for one in judged) / num_judged,
        rewards=_histogram(applied),
        no_reward=1 - len(applied) / len(totals),
        max_new_tokens=max_new_tokens,
        truncated=truncated,
        length_95=length_that_ends(lengths, has_ended, 0.95),
        mean_length=fmean(lengths),
        tokens_per_second=sum(lengths) / seconds,
        num_generations=num_generations,
        sizes=forecasts,
        choice=choice,
        constant_answer=constant_answer[0] if constant_answer else None,
        verdicts=[],
        prompts=prompts,
    )
    report.verdicts.extend(_verdicts(report, bool(constant_answer and constant_answer[1])))
    return report


def _accuracy(judged: Sequence[ProbedPrompt], rng: np.random.Generator) -> Estimate:
    if not judged:
        return Estimate(0.0, 0.0, 1.0)
    x, k = (np.array([getattr(one, name) for one in judged], dtype=float) for name in ("num_right", "num_samples"))
    draws = np.sum(prompt_weights(len(x), NUM_DRAWS, rng) * rate_draws(x, k, rng, NUM_DRAWS), axis=1)
    return Estimate(float(np.mean(x / k)), *interval(draws)[1:])


def _pass_curve(judged: Sequence[ProbedPrompt], rng: np.random.Generator) -> dict[int, Estimate]:
    """For k = 1, 2, 4, ... and the number of samples that every prompt has."""
    if not judged:
        return {}
    most = min(one.num_samples for one in judged)
    weights = prompt_weights(len(judged), NUM_DRAWS, rng)
    curve = {}
    for k in sorted({*(1 << exponent for exponent in range(most.bit_length())), most}):
        passing = np.array([pass_at_k(one.num_samples, one.num_right, k) for one in judged])
        curve[k] = Estimate(float(passing.mean()), *interval(weights @ passing)[1:])
    return curve


def _histogram(totals: Sequence[float]) -> list[tuple[float, float, float]]:
    counts = Counter(totals)
    if len(counts) <= FEW_VALUES:
        return [(value, value, count / len(totals)) for value, count in sorted(counts.items())]
    heights, edges = np.histogram(totals, bins=NUM_BINS)
    return [
        (float(low), float(high), float(height) / len(totals))
        for height, low, high in zip(heights, edges[:-1], edges[1:], strict=True)
    ]


def _forecast(
    moments: GroupMoments, contrasts: Contrasts | None, rng: np.random.Generator
) -> tuple[list[SizeForecast], SizeChoice | None]:
    choice, relative = None, None
    if contrasts is not None:
        contrast, agreement = contrasts.draws(rng, len(moments.dead))
        signals = signal(moments, contrast, agreement)
        relative = signals / np.maximum(signals.max(axis=1, keepdims=True), 1e-300)
        best = np.asarray(moments.sizes)[np.argmax(relative, axis=1)]
        low, high = np.quantile(best, [0.025, 0.975], method="closest_observation")
        choice = SizeChoice(
            best=moments.sizes[int(np.argmax(relative.mean(axis=0)))],
            low=int(low),
            high=int(high),
            contrast=Estimate(*interval(contrast)),
            agreement=Estimate(*interval(agreement)),
            num_prompts=len(contrasts.spread),
        )
    forecasts = [
        SizeForecast(
            size=size,
            dead=Estimate(*interval(moments.dead[:, j])),
            std=Estimate(*interval(moments.std[:, j])),
            signal=None if relative is None else Estimate(*interval(relative[:, j])),
        )
        for j, size in enumerate(moments.sizes)
    ]
    return forecasts, choice


def _verdicts(report: ProbeReport, constant_is_tempting: bool) -> list[Verdict]:
    own = next((one for one in report.sizes if one.size == report.num_generations), None)
    if own is None:
        text = "The rewards apply to too few completions to say anything. `grpo-stage try-rewards` shows why."
        return [Verdict(advice=Advice.REWARD, text=text)]
    verdicts = []
    if report.truncated > MOST_TRUNCATED:
        verdicts.append(Verdict(advice=Advice.RAISE_MAX_NEW_TOKENS, text=_truncation(report)))
    live = 1 - own.dead.value
    share = f"{live:.0%} of groups of {own.size} ({1 - own.dead.high:.0%} to {1 - own.dead.low:.0%})"
    if 1 - own.dead.high >= LEAST_LIVE or live >= LEAST_LIVE:
        verdicts.append(Verdict(advice=Advice.LEARN, text=_learning(report, share, own.dead.value)))
    elif len(report.rewards) < 2 and not 0 < report.accuracy.value < 1 and report.right.startswith("nothing"):
        text = "All completions earn the same, and nothing says whether that is much: `--right-at` does."
        verdicts.append(Verdict(advice=Advice.REWARD, text=text))
    elif report.accuracy.value > 0.5:
        text = (
            f"These prompts are too easy: {report.accuracy.value:.0%} of the completions are right, and only {share} "
            "would have different rewards to learn from. Take harder prompts, or keep those between "
            f"{LEARNABLE[0]:.0%} and {LEARNABLE[1]:.0%} out of more prompts (`-n`, `--write`)."
        )
        verdicts.append(Verdict(advice=Advice.HARDER_PROMPTS, text=text))
    else:
        most = max(report.pass_at_k)
        text = (
            f"Do a cold start: {report.accuracy.value:.1%} of the completions are right, {most} samples find a right "
            f"one for {report.pass_at_k[most].value:.0%} of the prompts, and only {share} would have different "
            "rewards to learn from. Train on some worked answers first (`stage: sft`) and continue from that "
            "adapter; or take easier prompts, or a reward that gives part of the score for part of the way."
        )
        verdicts.append(Verdict(advice=Advice.COLD_START, text=text))
    if constant_is_tempting and report.constant_answer:
        verdicts.append(Verdict(advice=Advice.BALANCE_ANSWERS, text=report.constant_answer))
    if report.choice is not None:
        verdicts.append(Verdict(advice=Advice.GROUP_SIZE, text=_size_words(report, report.choice)))
    return verdicts


def _truncation(report: ProbeReport) -> str:
    cut = f"{report.truncated:.0%} of the completions reach `max_new_tokens: {report.max_new_tokens}`"
    if report.length_95 is not None:
        return f"Raise max_new_tokens: {cut}. {report.length_95} would end 95 %."
    return (
        f"Raise max_new_tokens: {cut}. What would end 95 % cannot be told, since fewer ended: try "
        f"`max_new_tokens={2 * report.max_new_tokens}` with this command."
    )


def _learning(report: ProbeReport, share: str, dead: float) -> str:
    text = f"GRPO can learn here: {share} would have different rewards."
    passing = report.pass_at_k
    if len(passing) > 1:
        most = max(passing)
        text += (
            f" One sample is right for {passing[1].value:.0%}, the best of {most} for {passing[most].value:.0%}: what "
            "lies between is within reach of sharpening (arXiv:2504.13837)."
        )
    if dead > 0.5:
        text += " `--write` keeps the prompts worth sampling; `dynamic_sampling: true` skips the others in a run."
    return text


def _size_words(report: ProbeReport, choice: SizeChoice) -> str:
    by_size = {one.size: one.signal for one in report.sizes}
    own, best = by_size[report.num_generations], choice.best
    within = f"between {choice.low} and {choice.high}" if choice.low < choice.high else "no other"
    text = f"At an equal number of completions, groups of {best} carry most signal (95 %: {within})"
    if own is not None and report.num_generations != best:
        text += f"; the recipe's {report.num_generations} carry {own.value:.0%} of it"
    return f"{text}. More completions a prompt then mean fewer prompts a step."


def learnable(report: ProbeReport) -> list[int]:
    """The indices of the prompts that `--write` keeps."""
    low, high = LEARNABLE
    return [one.index for one in report.prompts if one.num_samples and low <= one.num_right / one.num_samples <= high]
