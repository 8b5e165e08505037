"""How often the 95 % intervals of `grpo-stage probe` hold what is true, on simulated prompts whose rates are known.

    python benchmarks/interval_coverage.py

64 prompts a set; a table of covered share, mean estimate and truth of the dead share, by population, samples and size.
"""

import argparse

import numpy as np

from grpo_stage.forecast.group_size import binary_moments, interval


SIZES = (4, 16, 64)
NUM_PROMPTS = 64
POPULATIONS = {
    "Beta(0.5, 1.5)": lambda rng, count: rng.beta(0.5, 1.5, size=count),
    "half at 0, half even in .2 to .8": lambda rng, count: np.where(
        rng.random(count) < 0.5, 0.0, rng.uniform(0.2, 0.8, size=count)
    ),
    "even in .3 to .7": lambda rng, count: rng.uniform(0.3, 0.7, size=count),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    trials = parser.parse_args().trials
    rng = np.random.default_rng(0)
    print("| population | samples | G | covered | mean estimate | truth |\n|---|---|---|---|---|---|")
    for name, population in POPULATIONS.items():
        many = population(rng, 200_000)
        for num_samples in (4, 16):
            covered, estimate = np.zeros(len(SIZES)), np.zeros(len(SIZES))
            truth = np.array([np.mean(many**size + (1 - many) ** size) for size in SIZES])
            for _ in range(trials):
                right = rng.binomial(num_samples, population(rng, NUM_PROMPTS))
                found = binary_moments(right, [num_samples] * NUM_PROMPTS, SIZES, rng, num_draws=200)
                for j in range(len(SIZES)):
                    mean, low, high = interval(found.dead[:, j])
                    covered[j] += low <= truth[j] <= high
                    estimate[j] += mean / trials
            for row in zip(SIZES, covered / trials, estimate, truth, strict=True):
                print(
                    f"| {name} | {num_samples} | {row[0]} | {row[1]:.0%} | {row[2]:.3f} | {row[3]:.3f} |", flush=True
                )


if __name__ == "__main__":
    main()
