"""Does a run with `rollout_ahead: 1` learn as one without? On a toy task, over seeds, on a CPU in minutes.

    python benchmarks/rollout_ahead_learning.py [--seeds 3] [--steps 60] [--learning-rate 2e-3]

A small random Llama over 61 tokens gets the share of even tokens of its completions as reward. An engine in this
process stands in for vLLM: it samples from a copy of the policy as it was at the last sync. Printed are the rewards of
each arm, means over fifths of the run, for each seed.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import logging
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from grpo_stage.rollout.engines.seeds import sample_seed
from grpo_stage.types import Completion, FinishReason, RolloutGroup
from tests.unit import trainer_on_fakes as fakes


ARMS: dict[str, dict[str, Any]] = {
    "off": {},
    "ahead": {"rollout_ahead": 1},
    "ahead, rollout_correction: token": {"rollout_ahead": 1, "rollout_correction": "token"},
}
NUM_PROMPTS, NUM_TOKENS = 8, 6


class SamplingEngine(fakes.FakeEngine):
    """Samples `NUM_TOKENS` tokens for each completion; a rollout that is submitted, when it is collected."""

    def __init__(self) -> None:
        super().__init__()
        self._submitted: tuple[Any, ...] | None = None

    def sync(self, policy, version):
        super().sync(policy, version)
        self._policy = copy.deepcopy(policy)

    @torch.no_grad()
    def generate(self, prompts, sampling, step):
        return [self._group(prompt, sampling, step) for prompt in prompts]

    def submit(self, *request):
        self._submitted = request

    def collect(self):
        assert self._submitted is not None
        return self.generate(*self._submitted), 0.0

    def discard(self):
        self._submitted = None

    def score(self, groups):
        raise NotImplementedError

    def _group(self, prompt, sampling, step):
        count = sampling.num_generations
        ids, logprobs = torch.tensor([prompt.token_ids] * count), []
        generators = [
            torch.Generator().manual_seed(sample_seed(sampling.seed, step, prompt.index, i)) for i in range(count)
        ]
        for _ in range(NUM_TOKENS):
            rows = self._policy(input_ids=ids).logits[:, -1].log_softmax(-1)
            tokens = torch.stack(
                [
                    torch.multinomial(row.exp(), 1, generator=generator)
                    for row, generator in zip(rows, generators, strict=True)
                ]
            )
            logprobs.append(rows.gather(1, tokens))
            ids = torch.cat([ids, tokens], dim=1)
        sampled = ids[:, len(prompt.token_ids) :].tolist()
        return RolloutGroup(
            prompt=prompt,
            completions=tuple(
                Completion(
                    token_ids=tuple(own),
                    sampling_logprobs=tuple(scores),
                    finish_reason=FinishReason.LENGTH,
                    text="",
                )
                for own, scores in zip(sampled, torch.cat(logprobs, dim=1).tolist(), strict=True)
            ),
            policy_version=self.synced[-1],
        )


def rewards_of(keys: dict[str, Any], seed: int, steps: int, learning_rate: float) -> list[float]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = fakes.make_trainer(
            Path(folder),
            num_prompts=NUM_PROMPTS,
            engine=SamplingEngine(),
            training={
                "per_device_train_batch_size": 4,
                "max_steps": steps,
                "learning_rate": learning_rate,
                "seed": seed,
            },
            **keys,
        )
        trainer.collector._sampling = dataclasses.replace(trainer.collector._sampling, seed=seed)
        if trainer.collector.ahead is not None:
            trainer.collector.ahead._sampling = trainer.collector._sampling
        trainer.train()
    return [line["reward"] for line in trainer.state.log_history if "reward" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    fifth = args.steps // 5
    for arm, keys in ARMS.items():
        for seed in range(args.seeds):
            rewards = rewards_of(keys, seed, args.steps, args.learning_rate)
            curve = [fmean(rewards[i * fifth : (i + 1) * fifth]) for i in range(5)]
            print(f"{arm:34}seed {seed}  {'  '.join(f'{value:.3f}' for value in curve)}", flush=True)


if __name__ == "__main__":
    main()
