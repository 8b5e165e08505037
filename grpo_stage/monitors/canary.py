"""The canary: does the engine really sample from the trainer's policy?

The largest class of silent failures in this field is rollouts from another model than the one that trains: an adapter
never delivered, delivered twice, scaled wrongly, answered from a stale cache. Two tests look for them, each where what
it compares is at hand:

- The difference between the engine's and the trainer's log-probability of the very tokens that were sampled. In
  float32 the two agree so closely that a small bound on it finds every fault at once. The update computes it anyhow,
  and `LogprobDifference` judges it after the step.
  With `rollout_ahead` no such tokens exist: there `ProbeDifference` has the engine score a few after each sync.
- In half precision rounding alone makes a difference as large as an update does. There `slope_test` asks after the
  rollout, while the engine is awake, whether its log-probabilities *move* as the trainer's do.

The version that an engine stamps its completions with is no matter of measurement: `check_versions` is part of every
sampling, that of an evaluation too.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from grpo_stage.monitors.monitor import Monitor, MonitorRequest, Scores
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.types import Completion, RolloutEngine, RolloutGroup, SampleBatch


# float32, measured with vLLM 0.23 on the CPU: a sound engine differs from the trainer by 5e-6 nats a token on average
# (SmolLM2-135M; 2e-6 on a tiny model), a base model that answers in place of the adapter by 2e-3 after one update, and
# each fault injected in tests/engines by 0.4 and more.
# Half precision: sound engines differ by up to 0.06 (docs/metrics.md), so this bound catches only gross faults. The
# slope finds the others.
TIGHT_BOUND = 2e-4
DEFAULT_BOUNDS = {torch.float32: TIGHT_BOUND, torch.float16: 0.5, torch.bfloat16: 0.5}

_TOKENS_A_SEQUENCE = 32
_PROBE_SEQUENCES = 2
"""In float32 the mean over their tokens is known to a few millionths of a nat; more would only take longer."""


class StaleRolloutError(RuntimeError):
    """The engine sampled from another policy than the trainer's."""


def check_versions(groups: Sequence[RolloutGroup], version: int, num_behind: int = 0) -> None:
    """Raise unless every group was sampled from the version that is due.

    Args:
        groups: what was sampled.
        version: the trainer's.
        num_behind: by how many versions the groups are behind it, exactly.
    """
    behind = f", and they have to come from the {num_behind} before" if num_behind else ""
    for group in groups:
        if group.policy_version != version - num_behind:
            raise StaleRolloutError(
                f"The engine sampled prompt {group.prompt.index} from policy version {group.policy_version}, but the "
                f"trainer is at version {version}{behind}: training on it would push the policy the wrong way. The "
                "run is stopped. Resume from the last checkpoint; if it happens again, use `rollout_backend: hf`."
            )


_DIFFERENCE = "sampling/sampling_logp_difference"


def record_difference(logprobs: torch.Tensor, batch: SampleBatch, version: int, metrics: MetricTracker) -> None:
    """Record how far the engine is from the trainer in fresh samples: those that the policy of `version` has sampled.

    Args:
        logprobs: [B, T] of that policy, computed by the trainer at the temperature of `batch.sampling_logprobs`.
        batch: holds at least one such sample.
        version: the present version.
        metrics: gets the difference.
    """
    mask = batch.completion_mask * (batch.policy_versions == version).unsqueeze(1)  # [B, T]
    difference = (logprobs - batch.sampling_logprobs).abs() * mask
    metrics.add(f"{_DIFFERENCE}/mean", difference.sum(), mask.sum())
    metrics.highest(f"{_DIFFERENCE}/max", difference.max().item())


@dataclass(frozen=True, slots=True)
class LogprobDifference(Monitor):
    """Whether the engine's and the trainer's log-probabilities of fresh completions are the same."""

    bound: float
    """`max_sampling_logprob_diff`, in nats."""
    backend: str
    """The engine's name, for the message."""

    @classmethod
    def of(cls, request: MonitorRequest) -> "LogprobDifference":
        return cls(request.max_sampling_logprob_diff, request.grpo_args.rollout_backend)

    def after_step(self, metrics: MetricTracker) -> None:
        """Check what `record_difference` has measured, if the step had fresh samples on this rank.

        Raises:
            StaleRolloutError: if the mean difference is above the bound.
        """
        mean = metrics.own_mean(f"{_DIFFERENCE}/mean")
        if mean is not None:
            _refuse_above(self.bound, mean, self.backend)


@dataclass(slots=True)
class ProbeDifference(Monitor):
    """Whether they are the same for a few tokens that the engine scores after each sync.

    For `rollout_ahead`, whose completions come from the version before. In float32 alone: the bound is tight there.
    """

    bound: float
    backend: str
    score: Callable[[Sequence[RolloutGroup]], Scores]
    """The trainer's log-probabilities at temperature 1."""
    _probe: tuple[RolloutGroup, ...] = ()
    _answers: Scores = ()
    """Between `before_sleep` and `after_sleep`."""

    @classmethod
    def of(cls, request: MonitorRequest) -> "ProbeDifference | None":
        if not request.grpo_args.rollout_ahead or request.tests_slope:
            return None
        return cls(request.max_sampling_logprob_diff, request.grpo_args.rollout_backend, request.score)

    def before_sleep(self, engine: RolloutEngine, groups: Sequence[RolloutGroup], version: int) -> None:
        self._probe = beginnings(groups, _PROBE_SEQUENCES)
        self._answers = engine.score(self._probe) if self._probe else ()

    def after_sleep(self, groups: Sequence[RolloutGroup], version: int, metrics: MetricTracker) -> None:
        """Compare, and record the difference.

        Raises:
            StaleRolloutError: if the mean difference is above the bound.
        """
        scores = self.score(self._probe)  # by every rank: with weights in shards a pass is a collective
        if not self._probe:
            return
        difference = (torch.cat(list(self._answers)) - torch.cat([own.cpu() for own in scores])).abs()
        metrics.add(f"{_DIFFERENCE}/mean", difference.sum(), len(difference))
        metrics.highest(f"{_DIFFERENCE}/max", difference.max().item())
        _refuse_above(self.bound, difference.mean().item(), self.backend)


def beginnings(groups: Sequence[RolloutGroup], count: int) -> tuple[RolloutGroup, ...]:
    """The beginnings of `count` completions, from as many different prompts as possible, the shortest first."""
    groups = sorted(groups, key=lambda group: len(group.prompt.token_ids))
    per_group = -(-count // max(1, len(groups)))
    chosen = []
    for group in groups[:count]:
        completions = [_beginning(each) for each in group.completions[:per_group]]
        completions = [each for each in completions if each.token_ids]
        if completions:
            chosen.append(dataclasses.replace(group, completions=tuple(completions)))
    return tuple(chosen)


def _beginning(completion: Completion) -> Completion:
    """The first tokens, without the last one of the first turn: the engine needs room for one more token."""
    first_turn = completion.turns[0].num_tokens if completion.turns else len(completion.token_ids)
    count = min(_TOKENS_A_SEQUENCE, first_turn - 1)
    return dataclasses.replace(
        completion,
        token_ids=completion.token_ids[:count],
        sampling_logprobs=completion.sampling_logprobs[:count],
        turns=(),
    )


def _refuse_above(bound: float, mean: float, backend: str) -> None:
    if mean > bound:  # False for NaN
        raise StaleRolloutError(
            f"The log-probabilities of the sampled tokens differ by {mean:.2g} nats on average between the "
            f"{backend} engine and the trainer; the bound is {bound:.2g} (`max_sampling_logprob_diff`). The "
            "completions come from another policy than the one that is trained: an adapter that was not delivered, or "
            "not as it is, another precision, or another temperature; or a `learning_rate` far too high has made the "
            "weights so large that rounding alone makes the difference: is `grad_norm` or `kl` in the log out of "
            "bounds? Training on them would teach the wrong thing, so the run is stopped. Try a lower `learning_rate` "
            "if that is it, else `rollout_backend: hf`; if that is quiet, please report the model and the vLLM "
            "version. Raise the bound only if you know why the two engines differ, for example a quantized engine."
        )
