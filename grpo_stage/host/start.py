"""The start model of a recipe, ready to sample from as a run would, without a trainer."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grpo_stage.host.engine import start_engine
from grpo_stage.host.inputs import RunInputs
from grpo_stage.host.policy import load_policy
from grpo_stage.host.reward_models import load_reward_model
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.host.sampling import sampling_settings
from grpo_stage.rewards.suite import RewardSuite
from grpo_stage.types import RolloutEngine, SamplingSettings


@dataclass(frozen=True, slots=True)
class StartedPolicy:
    """The policy before its first step."""

    model: Any
    engine: RolloutEngine
    """It has the model's weights."""
    sampling: SamplingSettings


@contextlib.contextmanager
def started_policy(
    arguments: RunArguments, inputs: RunInputs, rewards: RewardSuite, num_generations: int
) -> Iterator[StartedPolicy]:
    """Load the model and the reward model, and start the recipe's engine; it is closed at the end of the block.

    Args:
        arguments: of the recipe.
        inputs: of the recipe.
        rewards: get the reward model, where the recipe has one.
        num_generations: completions for each prompt, in the place of the recipe's.
    """
    model = load_policy(arguments, inputs.tokenizer)
    sampling = sampling_settings(arguments, model, inputs.template, inputs.tokenizer, inputs.images)
    sampling = dataclasses.replace(sampling, num_generations=num_generations)
    if arguments.finetuning.reward_model is not None:
        rewards.model = load_reward_model(arguments, model, inputs.template, inputs.tokenizer)
    with contextlib.closing(start_engine(arguments, model, sampling, inputs)) as engine:
        engine.sync(model, version=0)
        yield StartedPolicy(model, engine, sampling)
