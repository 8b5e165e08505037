"""Generate, score, report: what an evaluation is made of."""

import dataclasses
import logging
from collections.abc import Sequence

from torch import nn
from transformers import TrainerState, TrainingArguments

from .arguments import GRPOArguments
from .records.evaluation import record_evaluation
from .records.metrics import MetricTracker
from .rewards.errors import NO_REWARD_REMEDY
from .rollout.sampler import Sampler
from .types import Prompt, SamplingSettings, TrainingProgress


logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are


class Evaluator:
    """Measures the policy on evaluation prompts. All ranks call it together.

    Args:
        policy: the unwrapped model.
        args: Trainer's.
        grpo_args: the recipe.
        sampling: how training draws completions.
        sampler: samples and scores.
    """

    def __init__(
        self,
        policy: nn.Module,
        args: TrainingArguments,
        grpo_args: GRPOArguments,
        sampling: SamplingSettings,
        sampler: Sampler,
    ) -> None:
        self._policy = policy
        self._args = args
        self._sampler = sampler
        # The seed is not training's, and is the same at every evaluation: the curve then shows the policy alone.
        temperature = grpo_args.eval_temperature
        self._sampling = dataclasses.replace(
            sampling,
            seed=sampling.seed + 1,
            num_generations=grpo_args.eval_num_generations or sampling.num_generations,
            temperature=sampling.temperature if temperature is None else temperature,
        )

    def evaluate(self, prompts: Sequence[Prompt], state: TrainerState) -> dict[str, float]:
        """Metrics of the present policy, as `record_evaluation` defines them."""
        mine = prompts[self._args.process_index :: self._args.world_size]
        version, rewards = state.global_step, self._sampler.rewards
        with self._sampler.phases.phase("evaluation", is_timed=False):
            self._sampler.sync(self._policy, version)
            groups = self._sampler.generate(mine, self._sampling, step=0, version=version)
            self._sampler.engine.sleep()
        progress = TrainingProgress(global_step=version, max_steps=state.max_steps, epoch=float(state.epoch or 0))
        scored = self._sampler.score(groups, progress)
        tracker = MetricTracker()
        record_evaluation(tracker, scored, rewards.names, by_dataset=len({prompt.dataset for prompt in prompts}) > 1)
        for name, count in rewards.take_counters().items():
            tracker.count(f"rewards/{name}", count)
        metrics = tracker.take()
        if "reward" not in metrics and self._args.process_index == 0:
            logger.warning(
                f"No reward function applied to any completion of the {len(prompts)} evaluation prompts "
                f"({', '.join(rewards.names)} all returned None), so the evaluation says nothing, and no model is the "
                f"best by it. {NO_REWARD_REMEDY}"
            )
        return metrics
