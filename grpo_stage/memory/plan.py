"""GRPO and PPO on one device: parts -> phases -> the most that is held at one time."""

from collections.abc import Mapping
from dataclasses import dataclass

from grpo_stage.memory.engine import Engine
from grpo_stage.memory.parts import GIB, Budget, phase
from grpo_stage.memory.sizes import Sizes
from grpo_stage.memory.trace import Trace


CONTEXT = {"cuda": 0.5 * GIB, "cpu": 1.0 * GIB}
"""What is there without a model: CUDA's context and kernels; Python with its libraries and the dataset."""
USABLE = 0.95
"""The share of a device that tensors can fill: the rest is lost between them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainee:
    """A model that is trained: the policy, or a critic."""

    sizes: Sizes
    states: float
    """Bytes of the optimizer's states."""
    micro_batch: Trace
    is_only_micro_batch: bool
    """Whether the step has no other: its gradients then come into being while its activations go, and are part of
    the trace."""
    buckets: float = 0.0
    """Bytes that DistributedDataParallel keeps for gradients, on several devices."""

    @property
    def resting(self) -> Mapping[str, float]:
        """What is there in every phase."""
        return {
            "weights, frozen": self.sizes.frozen,
            "weights, trained": self.sizes.trained,
            "adapters": self.sizes.adapters,
            "optimizer": self.states,
            "gradient buckets": self.buckets,
        }

    @property
    def learning(self) -> Mapping[str, float]:
        """What an update adds."""
        trace = self.micro_batch
        return {
            "gradients": 0.0 if self.is_only_micro_batch else self.sizes.gradients,
            "activations": trace.peak - trace.head + self.sizes.largest_dequantized,
            "head": trace.head,
        }

    @property
    def stepping(self) -> Mapping[str, float]:
        """What is there while the optimizer takes its step."""
        return {"gradients": self.sizes.gradients}


@dataclass(frozen=True, slots=True, kw_only=True)
class Others:
    """What is held beside the models that are trained, bytes."""

    process: float
    engine: Engine
    reference: float = 0.0
    reward_model: float = 0.0

    @property
    def parts(self) -> Mapping[str, float]:
        return {"process": self.process, "reference": self.reference, "reward model": self.reward_model}

    @property
    def engine_awake(self) -> Mapping[str, float]:
        engine = self.engine
        return {
            "engine's weights": engine.weights,
            "KV cache": engine.kv_cache,
            "CUDA graphs": engine.graphs,
            "sampling": engine.sampling,
        }

    @property
    def engine_in_update(self) -> Mapping[str, float]:
        return {"engine in the update": self.engine.left_in_update}


def grpo(policy: Trainee, others: Others, name: str = "GRPO") -> Budget:
    """The phases of a step of this stage; later ones hold the optimizer's states, which the first has not yet."""
    resting = {**others.parts, **policy.resting}
    return Budget(
        name,
        (
            phase("rollout", {**resting, **others.engine_awake}),
            phase("update", {**resting, **policy.learning, **others.engine_in_update}),
            phase("optimizer", {**resting, **policy.stepping, **others.engine_in_update}),
        ),
    )


def ppo(policy: Trainee, critic: Trainee, others: Others, name: str) -> Budget:
    """The same step with a critic that is a model of its own; policy and critic learn one after the other."""
    resting = {**others.parts, **policy.resting, **_of_critic(critic.resting)}
    return Budget(
        name,
        (
            phase("rollout", {**resting, **others.engine_awake}),
            phase("update of the policy", {**resting, **policy.learning, **others.engine_in_update}),
            phase("optimizer", {**resting, **policy.stepping, **others.engine_in_update}),
            phase("update of the critic", {**resting, **_of_critic(critic.learning), **others.engine_in_update}),
            phase("optimizer of the critic", {**resting, **_of_critic(critic.stepping), **others.engine_in_update}),
        ),
    )


def _of_critic(parts: Mapping[str, float]) -> dict[str, float]:
    return {f"critic: {name}": size for name, size in parts.items()}
