"""`answer_balance`: prompts weigh less the more of the dataset has their answer."""

from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import fmean


def answer_weights(answers: Sequence[Hashable], exponent: float) -> list[float]:
    """[P] the weight of each prompt, 1 in the mean: the share of its answer to the power of -`exponent`.

    With 0 all weigh the same, with 1 all answers do, however many prompts have them; 1/2 is the square-root sampling
    of long-tailed recognition (arXiv:1910.09217, section 4.1), as weights. A policy that gives one answer to every
    prompt then earns the weight of that answer's prompts, and not their number.

    Args:
        answers: [P] of the dataset.
        exponent: between 0 and 1.
    """
    counts = Counter(answers)
    raw = [counts[answer] ** -exponent for answer in answers]
    mean = fmean(raw)
    return [weight / mean for weight in raw]
