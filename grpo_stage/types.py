"""Records that flow through a step, and the two seams (rollout engine, reward) as Protocols.

Shapes are written with one letter an axis, here and in the whole package:

    P prompts of one optimizer step on one rank      G completions a prompt (`num_generations`)
    F reward functions                               B completions in a micro-batch
    T completion tokens, right-padded                L prompt + completion tokens

Imports nothing of ours and nothing heavy at run time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable


if TYPE_CHECKING:
    import torch


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """The policy sampled an end token; that token belongs to the completion."""
    LENGTH = "length"
    """`max_new_tokens` was reached first: the completion is truncated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of the dataset, ready to be sampled from."""

    index: int
    """Position among the run's training or evaluation prompts: stable over epochs and resumes, and part of every
    sampling seed."""
    token_ids: tuple[int, ...]
    """The prompt as the host's template encodes it, generation header included."""
    messages: tuple[Mapping[str, str], ...]
    """The conversation without the answer, roles `user` / `assistant` / `system` / `observation` / `function`."""
    reference: str | None
    """The whole reference answer, never cut to `cutoff_len`; None where the row has none."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Every column of the raw row, by its own name."""
    dataset: str | None = None
    """The evaluation dataset that it belongs to; None for a prompt of `dataset`, `val_size` included."""
    images: tuple[Any, ...] = ()
    """Reserved for image prompts, which are refused for now."""

    @property
    def text(self) -> str:
        """The last user turn, for logs and for rewards that ask for `prompts`."""
        return self.messages[-1]["content"] if self.messages else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer."""

    token_ids: tuple[int, ...]
    """Sampled tokens; with `FinishReason.STOP` the last one is the end token. Never empty."""
    sampling_logprobs: tuple[float, ...]
    """The engine's log-probability of each token, at `RolloutEngine.logprob_temperature`."""
    finish_reason: FinishReason
    text: str
    """What rewards see: see `rollout.decoding.completion_text`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """G completions of one prompt, and the policy they came from."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    policy_version: int
    """Read back from what the engine had loaded when it sampled, not from what it was asked to load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How completions are drawn."""

    num_generations: int
    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    """Each of these ends a completion: all EOS ids of the generation config, and the template's stop words."""
    seed: int = 0
    """The run seed; see `rollout.seeds.sample_seed`."""

    @property
    def is_neutral(self) -> bool:
        """True where only the temperature stands between the policy's logits and the sampled distribution."""
        return self.top_p == 1.0 and self.top_k == 0 and self.repetition_penalty == 1.0


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions from the policy. One instance a process; used by one thread."""

    logprob_temperature: float
    """The temperature of the distribution that `Completion.sampling_logprobs` refer to."""
    on_step: Callable[[], None]
    """Called in `generate` for each token position or so; what it raises ends the rollout."""

    def sync(self, policy: "torch.nn.Module", version: int) -> None:
        """Make `policy`'s present weights the ones sampled from, under `version` (an optimizer step; increases)."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> list[RolloutGroup]:
        """Sample exactly `sampling.num_generations` completions for each prompt, in order.

        The seed of each completion depends on (sampling.seed, step, prompt.index, sample) alone. Neither the global
        random state nor the policy's training mode is changed.

        Raises:
            RuntimeError: if `sync` was never called.
        """

    def score(self, groups: Sequence[RolloutGroup]) -> "list[torch.Tensor]":
        """Log-probabilities of given completions at temperature 1: one [T] each, prompt-major.

        A prompt and its completion leave room for one more token. Neither the global random state nor the policy's
        training mode is changed.

        Raises:
            RuntimeError: if `sync` was never called.
        """

    def sleep(self) -> None:
        """Free what the engine does not need until the next `sync`; may be a no-op."""

    def close(self) -> None:
        """Free what the engine holds. May be called twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingProgress:
    """Where a run is: what a reward function gets as `trainer_state`, with the names that transformers has."""

    global_step: int = 0
    """Optimizer steps that are done."""
    max_steps: int = 1
    """Optimizer steps of the whole run; the most that there can be with `dynamic_sampling`."""
    epoch: float = 0.0
    """Epochs that are done, the fraction of the present one included."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"`trainer_state` has global_step, max_steps and epoch in `stage: grpo`, and no {name!r}")


class Reward(Protocol):
    """A reward that is no function of a batch's lists."""

    name: str

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[float | None]]:
        """Score [P][G]; None means that the function does not apply to that completion.

        Raises:
            RewardError: on anything that is not a score.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A rollout group with its rewards and advantages: what an update is made of, and what a checkpoint holds."""

    group: RolloutGroup
    rewards: tuple[tuple[float | None, ...], ...]
    """[G][F], unweighted."""
    total_rewards: tuple[float | None, ...]
    """[G], the weighted sum over the functions that applied; None where none did."""
    advantages: tuple[float, ...]
    """[G]; 0 where the total is None, and everywhere until the batch that they are relative to is complete."""

    @property
    def has_reward(self) -> bool:
        """Whether a reward function applied to any of its completions."""
        return any(total is not None for total in self.total_rewards)

    def used(self, mask_truncated_completions: bool) -> tuple[bool, ...]:
        """[G], whether the loss uses a completion."""
        return tuple(
            not (mask_truncated_completions and completion.finish_reason is FinishReason.LENGTH)
            for completion in self.group.completions
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyBatch:
    """A micro-batch of completions as tensors. Prompts are left-padded and completions right-padded."""

    input_ids: "torch.Tensor"
    """[B, L] prompt and completion."""
    attention_mask: "torch.Tensor"
    """[B, L], from lengths and never from `ids == pad`."""
    completion_ids: "torch.Tensor"
    """[B, T]."""
    completion_mask: "torch.Tensor"
    """[B, T] float, 1 on the tokens of a completion, its end token included."""
    loss_weights: "torch.Tensor"
    """[B, T] float: what each token's loss is multiplied with before summing; 0 outside `completion_mask`."""
    advantages: "torch.Tensor"
    """[B]."""
    sampling_logprobs: "torch.Tensor"
    """[B, T], 0 outside `completion_mask`."""
    rows: tuple[int, ...]
    """Where each row stands in the step's flat list of completions (prompt-major); -1 marks a dummy."""
