"""What an evaluation measures: mean@n, pass@k and maj@n of each reward function, and the names they are logged under.

n is `eval_num_generations`, the completions sampled for each prompt. A completion passes a function that gives it at
least 1; one that the function does not apply to (None) does not pass.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from grpo_stage.records.metrics import MetricTracker, record_completions
from grpo_stage.rewards.answers.verdict import voted_answer
from grpo_stage.rewards.options import REWARD_MODEL
from grpo_stage.types import ScoredGroup


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    r"""The probability that at least one of k samples is correct, drawn without replacement from `num_samples`.

    1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al. 2021 (arXiv:2107.03374), as the product that
    neither overflows nor cancels.

    Args:
        num_samples: n, the samples of one prompt.
        num_correct: c, how many of them are correct.
        k: how many are drawn.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise ValueError(f"pass@{k} of {num_samples} samples with {num_correct} correct ones is not defined.")
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_correct + 1, num_samples + 1))


def maj_at_k(answers: Sequence[str | None], passed: Sequence[bool]) -> float:
    """The probability that the most frequent answer passes; of several equally frequent ones, one is drawn.

    Args:
        answers: [k] what each completion answers; None votes for nothing.
        passed: [k] whether it passes. If completions of one answer differ in passing, one of them is drawn.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    # The leading answers have the same number of votes, so a mean over their completions is one over the answers.
    elected = [ok for answer, ok in zip(answers, passed, strict=True) if answer is not None and votes[answer] == most]
    return sum(elected) / len(elected) if elected else 0.0


def record_evaluation(
    tracker: MetricTracker,
    groups: Sequence[ScoredGroup],
    reward_names: Sequence[str],
    by_dataset: bool,
) -> None:
    """Metrics of an evaluation; logged with `eval_` before the name.

    ======================================  ==========================================================================
    reward                                  mean over completions of the weighted total
    rewards/{function}/mean@{n}             mean over the completions that the function applied to
    rewards/{function}/pass@{k}             mean over prompts of the probability that one of k completions passes;
                                            k = 1, 2, 4, ... and n
    rewards/{function}/maj@{n}              mean over prompts of whether the answer of most completions passes
    rewards/{function}/frac_not_applicable  share of completions for which the function returned None
    completions/...                         as in training
    {dataset}_reward, {dataset}_rewards/..  the same over the prompts of one dataset; only with several of them
    ======================================  ==========================================================================

    pass@k and maj@n leave out prompts if the function applied to none of their completions. The reward model has
    neither, since its scores have a scale of their own.

    Args:
        tracker: gets the metrics.
        groups: [P] this rank's groups, of n completions each.
        reward_names: [F].
        by_dataset: whether the prompts come from several datasets.
    """
    for scored in groups:
        completions = scored.group.completions
        record_completions(tracker, completions)
        answers = [voted_answer(completion.final_turn) for completion in completions]
        applied = [total for total in scored.total_rewards if total is not None]
        for prefix in ("", f"{scored.group.prompt.dataset}_") if by_dataset else ("",):
            tracker.add(f"{prefix}reward", sum(applied), len(applied))
            for name, scores in zip(reward_names, zip(*scored.rewards, strict=True), strict=True):
                for measure, total, count in _measure(name, scores, answers):
                    tracker.add(f"{prefix}rewards/{name}/{measure}", total, count)


def rewarding_metrics(reward_names: Sequence[str], num_generations: int, datasets: Sequence[str]) -> list[str]:
    """The names, with `eval_`, of those metrics of an evaluation that are better when they are higher.

    Args:
        reward_names: the functions' names in metrics.
        num_generations: n.
        datasets: the evaluation datasets; empty where prompts are split off by `val_size`.
    """
    n = num_generations
    passing = [*(f"pass@{k}" for k in _ks(n)), f"maj@{n}"]
    own = [
        "reward",
        *(
            f"rewards/{name}/{measure}"
            for name in reward_names
            for measure in (f"mean@{n}", *([] if name == REWARD_MODEL else passing))
        ),
    ]
    prefixes = ["", *(f"{name}_" for name in datasets)] if len(datasets) > 1 else [""]
    return [f"eval_{prefix}{name}" for prefix in prefixes for name in own]


def _measure(
    name: str, scores: Sequence[float | None], answers: Sequence[str | None]
) -> Iterator[tuple[str, float, int]]:
    """(measure, sum, count) of one function on the completions of one prompt."""
    n = len(scores)
    applied = [score for score in scores if score is not None]
    yield "frac_not_applicable", n - len(applied), n
    if not applied:
        return
    yield f"mean@{n}", sum(applied), len(applied)
    if name == REWARD_MODEL:  # on its scale 1 means nothing
        return
    passed = [score is not None and score >= 1.0 for score in scores]
    for k in _ks(n):
        yield f"pass@{k}", pass_at_k(n, sum(passed), k), 1
    yield f"maj@{n}", maj_at_k(answers, passed), 1


def _ks(num_generations: int) -> list[int]:
    """1, 2, 4, ... and `num_generations` itself."""
    powers = [1 << exponent for exponent in range(num_generations.bit_length())]
    return sorted({*powers, num_generations})
