"""Log histories of simulated runs: completions are drawn, and the figures of a log line are computed from them.

Each prompt has a rate of its own at which its completions are right (Beta around the policy's rate), so that the
shares of equal groups, the reward's noise and the agreement of answers are those that such batches really have.
Other figures (entropy, lengths, norms) follow a given curve with multiplicative noise.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from grpo_stage.monitors.one_answer import agreement


Curve = Callable[[float], float]
"""Of the step."""
Line = dict[str, float]


def constant(value: float) -> Curve:
    return lambda step: value


def logistic(start: float, end: float, middle: float, rate: float) -> Curve:
    return lambda step: start + (end - start) / (1 + math.exp(-(step - middle) * rate))


def decay(start: float, end: float, half_life: float) -> Curve:
    return lambda step: end + (start - end) * 0.5 ** (step / half_life)


def linear(start: float, end: float, steps: float) -> Curve:
    return lambda step: start + (end - start) * min(step / steps, 1.0)


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a simulated run goes."""

    steps: int = 150
    prompts: int = 8
    group: int = 8
    rate: Curve = field(default_factory=lambda: logistic(0.15, 0.75, 40, 0.06))
    """At which completions are right."""
    spread: float = 1.5
    """Of the Beta over prompts, its two parameters together: less is more prompts that are always right or wrong."""
    references: Mapping[str, float] = field(default_factory=lambda: {str(i): 1.0 for i in range(40)})
    """Final answers by frequency."""
    favorite: Curve = field(default_factory=lambda: constant(0.1))
    """Share of wrong completions that give the most frequent wrong answer; the others are all different."""
    entropy: Curve = field(default_factory=lambda: decay(0.7, 0.3, 30))
    length: Curve = field(default_factory=lambda: constant(200.0))
    noise: float = 0.1
    """Of entropy, length and norms, multiplicative."""
    others: Mapping[str, Curve] = field(default_factory=dict)
    """Further metrics, with `noise`."""
    shares: Mapping[str, Curve] = field(default_factory=dict)
    """Metrics that are shares of the completions, drawn from a binomial."""
    evaluated: Curve | None = None
    """Rate at which held-out completions are right; that of training by default."""
    eval_steps: int = 0
    eval_prompts: int = 100
    level: Curve | None = None
    """Of a curriculum."""


def lines_of(run: Run, seed: int) -> list[Line]:
    """What `trainer_log.jsonl` would hold."""
    draws = random.Random(seed)
    return [line for step in range(1, run.steps + 1) for line in _of_step(run, step, draws)]


def _of_step(run: Run, step: int, draws: random.Random) -> list[Line]:
    counts, given, right = [], [], []
    for _ in range(run.prompts):
        num_right, answers, reference = _group(run, step, draws)
        counts.append(num_right)
        given.append(answers)
        right.append({reference: 1.0})
    alive = sum(0 < count < run.group for count in counts)
    deviations = [stdev([1.0] * count + [0.0] * (run.group - count)) for count in counts]
    completions = run.prompts * run.group

    def noisy(value: float) -> float:
        return value * math.exp(draws.gauss(0.0, run.noise))

    line: Line = {
        "current_steps": step,
        "reward": sum(counts) / completions,
        "rewards/accuracy/mean": sum(counts) / completions,
        "reward_std": fmean(deviations),
        "frac_reward_zero_std": 1 - alive / run.prompts,
        "completions/frac_groups_all_right": sum(count == run.group for count in counts) / run.prompts,
        "completions/frac_groups_all_wrong": sum(count == 0 for count in counts) / run.prompts,
        "entropy": noisy(run.entropy(step)),
        "completions/mean_length": noisy(run.length(step)),
        "completions/max_length": noisy(1.6 * run.length(step)),
        "grad_norm": noisy(0.4) * math.sqrt(alive / run.prompts) * math.exp(draws.gauss(0.0, 0.2)),
        "sampling/sampling_logp_difference/mean": noisy(6e-6),
        "time/reward": noisy(0.1),
        "step_time": noisy(20.0),
        "memory/update": 6.0 + 0.4 * draws.random(),
        "completions/length_reward_correlation": draws.gauss(0.1, 0.5 / math.sqrt(max(alive, 1))),
    }
    for name, answers in (("same_answer_frac", given), ("same_reference_frac", right)):
        same, pairs = agreement(answers)
        line[f"completions/{name}"] = same / pairs
    least = max(2.0, run.prompts / 4)
    shares = {"looped_frac": constant(0.005), "mixed_language_frac": constant(0.003), "clipped_ratio": constant(0.02)}
    for name, curve in ({f"completions/{name}": curve for name, curve in shares.items()} | dict(run.shares)).items():
        rate = min(1.0, max(0.0, curve(step)))
        line[name] = sum(draws.random() < rate for _ in range(completions)) / completions
    if run.prompts >= 4:
        totals = {answer for row in right for answer in row}
        shared = {one for one in totals if sum(one in row for row in right) >= least}
        line["completions/shared_reference_frac"] = sum(next(iter(row)) in shared for row in right) / run.prompts
    line.update({name: noisy(curve(step)) for name, curve in run.others.items()})
    if run.level is not None:  # the last prompts of a level that is used up are of the one before
        lower = sum(draws.random() < 0.05 for _ in range(run.prompts))
        line["curriculum/level"] = max(0.0, run.level(step) - lower / run.prompts)
    lines = [line]
    if run.eval_steps and step % run.eval_steps == 0:
        rate = (run.evaluated or run.rate)(step)
        rates = [draws.betavariate(run.spread * rate, run.spread * (1 - rate)) for _ in range(run.eval_prompts)]
        lines.append({"current_steps": step, "eval_reward": fmean(float(draws.random() < each) for each in rates)})
    return lines


def _group(run: Run, step: int, draws: random.Random) -> tuple[int, dict[str, float], str]:
    """How many completions of a prompt are right, the shares of its answers, and its reference."""
    reference = draws.choices(list(run.references), weights=list(run.references.values()))[0]
    most_frequent = max(run.references, key=lambda answer: run.references[answer])
    rate = min(0.999, max(0.001, run.rate(step)))
    own = draws.betavariate(run.spread * rate, run.spread * (1 - rate))
    answers: dict[str, float] = {}
    others = [answer for answer in run.references if answer != reference]
    num_right = 0
    for i in range(run.group):
        if draws.random() < own:
            num_right += 1
            answer = reference
        elif len(run.references) <= 4:  # a task with few answers has few wrong ones
            answer = draws.choice(others)
        elif draws.random() < run.favorite(step):
            answer = most_frequent if most_frequent != reference else others[0]
        else:
            answer = f"wrong {draws.random()} {i}"
        answers[answer] = answers.get(answer, 0.0) + 1 / run.group
    return num_right, answers, reference


def curriculum(
    changes: Mapping[int, int], longer: float = 1.35, less_sure: float = 1.25, speed: float = 0.2, **others: object
) -> Run:
    """A run that has a level from each of these steps on, and learns it.

    Args:
        changes: the level by the step from which on it is that of the prompts.
        longer: factor of the length from level to level.
        less_sure: the same of the entropy.
        speed: of learning, at each level from a rate of 0.3 to 0.8.
        others: of the run.
    """

    def level(step: float) -> float:
        return changes[max(first for first in changes if first <= step)]

    def since(step: float) -> float:
        return step - max(first for first in changes if first <= step)

    keys: dict[str, object] = {
        "steps": 200,
        "rate": lambda step: logistic(0.3, 0.8, 3 / speed, speed)(since(step)),
        "length": lambda step: 150 * longer ** level(step),
        "entropy": lambda step: 0.4 * less_sure ** level(step) * decay(1.0, 0.7, 10)(since(step)),
        "level": level,
    }
    return Run(**keys | others)  # type: ignore[arg-type]


STAIRS = {step: i for i, step in enumerate(range(0, 180, 30))}
QUICK = {step: i for i, step in enumerate(range(0, 108, 12))}


def few(*shares: float) -> dict[str, float]:
    """References of a few answers."""
    return {chr(ord("A") + i): share for i, share in enumerate(shares)}


HEALTHY: Mapping[str, Run] = {
    "fast learning, entropy levels off": Run(steps=80, rate=logistic(0.1, 0.9, 12, 0.35), entropy=decay(0.7, 0.09, 5)),
    "noisy small batches": Run(
        steps=200, prompts=2, group=4, rate=logistic(0.2, 0.6, 150, 0.02), noise=0.25, entropy=decay(0.6, 0.2, 80)
    ),
    "already solved": Run(rate=constant(0.97), spread=3.0, entropy=constant(0.06)),
    "solved within the run": Run(steps=200, rate=logistic(0.3, 0.98, 40, 0.1), entropy=decay(0.5, 0.02, 15)),
    "yes or no": Run(references=few(1, 1), rate=logistic(0.52, 0.9, 60, 0.06), spread=3.0),
    "yes or no, two to one": Run(references=few(2, 1), rate=logistic(0.55, 0.85, 60, 0.06), spread=3.0, prompts=4),
    "four choices": Run(references=few(1, 1, 1, 1), rate=logistic(0.3, 0.8, 60, 0.06)),
    "one answer is frequent": Run(
        references={"1": 0.6, **{str(i): 0.05 for i in range(2, 10)}}, favorite=constant(0.5)
    ),
    "reasoning grows": Run(
        steps=200,
        prompts=16,
        rate=logistic(0.2, 0.65, 90, 0.03),
        length=linear(300, 900, 200),
        entropy=linear(0.4, 0.55, 200),
        shares={"completions/clipped_ratio": linear(0.01, 0.08, 200)},
    ),
    "noisy evaluations": Run(
        steps=200,
        rate=logistic(0.2, 0.5, 40, 0.06),
        evaluated=logistic(0.2, 0.45, 40, 0.06),
        eval_steps=10,
        eval_prompts=50,
    ),
    "learned by a plateau": Run(
        steps=200, rate=logistic(0.2, 0.6, 30, 0.1), entropy=decay(0.8, 0.25, 20), eval_steps=20
    ),
    "short": Run(steps=12, rate=logistic(0.1, 0.6, 8, 0.5), entropy=decay(0.8, 0.2, 4)),
    "very short": Run(steps=5),
    "code or mathematics": Run(
        prompts=16,
        others={"completions/repeated_frac": constant(0.12), "rewards/format/mean": logistic(0.4, 0.95, 20, 0.2)},
        shares={"completions/looped_frac": constant(0.02), "completions/mixed_language_frac": constant(0.01)},
    ),
    "Chinese": Run(
        prompts=16,
        others={"completions/repeated_frac": constant(0.04)},
        shares={"completions/mixed_language_frac": constant(0.02)},
    ),
    "hard at first": Run(steps=200, prompts=32, rate=logistic(0.04, 0.4, 90, 0.05), spread=0.7),
    "a base model that learns to stop": Run(
        shares={"completions/clipped_ratio": decay(0.95, 0.05, 12), "completions/looped_frac": decay(0.6, 0.02, 12)},
        rate=logistic(0.02, 0.5, 40, 0.1),
        length=decay(900, 300, 20),
    ),
    "several updates a rollout, with a KL": Run(
        steps=200, others={"kl": linear(0.01, 0.35, 200), "clip_ratio/region_mean": linear(0.02, 0.18, 200)}
    ),
    "a curriculum": curriculum(STAIRS, eval_steps=20, evaluated=linear(0.2, 0.45, 200)),
    "a curriculum of long answers, small batches": curriculum(STAIRS, longer=1.7, less_sure=1.1, prompts=4),
    "a curriculum of open answers": curriculum(STAIRS, longer=1.1, less_sure=1.5, steps=260),
    "a curriculum whose answers become sure": curriculum(
        STAIRS, longer=1.0, entropy=lambda step: 0.7 * 0.75 ** (step // 30) * decay(1.0, 0.3, 10)(step % 30)
    ),
    "a curriculum in quick steps, longer prompts": curriculum(
        QUICK,
        longer=1.0,
        less_sure=1.0,
        speed=0.5,
        others={"memory/update": lambda step: 6 * 1.06 ** min(step // 12, 8)},
    ),
    "a curriculum that goes back": curriculum({0: 0, 25: 1, 50: 2, 75: 3, 95: 2, 115: 3, 135: 2, 155: 3}),
    "two rewards, one traded": Run(
        others={"rewards/brevity/mean": linear(0.8, 0.62, 150)}, length=linear(200, 290, 150)
    ),
}
"""Runs that nothing is wrong with, by kind."""


def failing(**changes: object) -> Run:
    return Run(**{"steps": 120, **changes})  # type: ignore[arg-type]


GCD = {"1": 0.61, "2": 0.15, "3": 0.07, "4": 0.04, "5": 0.03, "6": 0.03, "7": 0.02, "8": 0.01, "9": 0.01, "10": 0.03}
FAILING: Mapping[str, Run] = {
    "entropy_collapse": failing(rate=logistic(0.1, 0.35, 10, 0.3), entropy=decay(0.7, 0.002, 10), spread=0.3),
    "entropy_explosion": failing(rate=logistic(0.3, 0.05, 70, 0.1), entropy=logistic(0.6, 6.0, 80, 0.15)),
    "dead_groups": failing(rate=constant(0.02)),
    "repetition": failing(shares={"completions/looped_frac": logistic(0.005, 0.4, 70, 0.1)}),
    "language_mixing": failing(shares={"completions/mixed_language_frac": logistic(0.003, 0.5, 70, 0.1)}),
    "length_explosion": failing(rate=constant(0.3), length=linear(200, 700, 150)),
    "truncation": failing(shares={"completions/clipped_ratio": linear(0.01, 0.6, 150)}),
    "reward_hacking": failing(
        steps=250,
        rate=logistic(0.2, 0.9, 100, 0.04),
        evaluated=lambda step: 0.2 + 0.3 * min(step / 80, 1.0) - 0.25 * max(0.0, step - 80) / 170,
        eval_steps=15,
    ),
    "reward_collapse": failing(rate=lambda step: 0.1 + 0.5 * min(step / 30, 1.0) if step < 60 else 0.003),
    "shared_texts": failing(others={"completions/shared_text_reward_frac": logistic(0.05, 0.9, 60, 0.1)}),
    "paid_length": failing(
        rate=logistic(0.2, 0.8, 50, 0.1),
        length=linear(200, 600, 150),
        others={"completions/length_reward_correlation": constant(0.8)},
    ),
    "kl_explosion": failing(rate=constant(0.3), others={"kl": lambda step: 0.02 + 4.5 * (step / 150) ** 2.4}),
    "ratio_explosion": failing(others={"clip_ratio/region_mean": linear(0.1, 0.7, 150)}),
    "engine_drift": failing(others={"sampling/sampling_logp_difference/mean": lambda step: 6e-6 * 1.05**step}),
    "gradient_spikes": failing(others={"grad_norm": lambda step: 0.5 * (80 if step in (90, 110) else 1)}),
    "slow_rewards": failing(others={"time/reward": logistic(0.1, 15.0, 70, 0.2)}),
    "memory_growth": failing(others={"memory/reward": linear(4, 9, 150)}, noise=0.01),
}
"""A run for each watch, with its fault alone as far as it comes alone. `one_answer` has its own drawing."""


def one_answer_lines(seed: int, steps: int = 20, prompts: int = 8, group: int = 8) -> list[Line]:
    """A policy that comes to give "1" to everything, as on greatest common divisors: 61 % are right."""
    draws = random.Random(seed)
    run = failing(prompts=prompts, group=group)
    lines = []
    for step in range(1, steps + 1):
        share_of_one = logistic(0.1, 0.98, 6, 0.8)(step)
        references = draws.choices(list(GCD), weights=list(GCD.values()), k=prompts)
        given, counts = [], []
        for reference in references:
            answers: Sequence[str] = [
                "1" if draws.random() < share_of_one else f"{draws.randint(2, 40)}" for _ in range(group)
            ]
            counts.append(sum(answer == reference for answer in answers))
            given.append({answer: answers.count(answer) / group for answer in answers})
        line = _of_step(run, step, draws)[0]
        same, pairs = agreement(given)
        same_reference, _ = agreement([{reference: 1.0} for reference in references])
        line |= {
            "reward": sum(counts) / (prompts * group),
            "completions/same_answer_frac": same / pairs,
            "completions/same_reference_frac": same_reference / pairs,
        }
        lines.append(line)
    return lines
