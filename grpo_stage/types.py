"""The records that flow through a step, and the Protocols of a rollout engine and of a reward.

Shapes are written with one letter an axis, here and in the whole package:

    P prompts of one optimizer step on one rank      G completions a prompt (`num_generations`)
    F reward functions                               B completions in a micro-batch
    T completion tokens, right-padded                M sampled tokens of a micro-batch, one after another

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
class PromptImage:
    """An image of a prompt as its dataset has it. Pixels are made of it where they are needed."""

    sha256: str
    """Of the file's content."""
    num_bytes: int
    """Of the file."""
    path: str | None
    """The file, or the name that a dataset gives to an image which it holds itself."""
    data: bytes | None = None
    """The content, where the dataset holds it; None where it is in the file."""

    @property
    def name(self) -> str:
        """For a reader."""
        return self.path or f"sha256:{self.sha256[:16]}"


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
    images: tuple[PromptImage, ...] = ()
    """In the order of their places in the prompt."""
    room: int | None = None
    """How many tokens may be sampled at most, where that is fewer than `SamplingSettings.max_new_tokens`: of a
    conversation that has already used a part of them (`rollout.episodes`)."""

    @property
    def identity(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Equal for prompts that a model takes for the same: by their tokens and images."""
        return self.token_ids, tuple(image.sha256 for image in self.images)

    @property
    def text(self) -> str:
        """The last user turn, for logs and for rewards that ask for `prompts`."""
        return self.messages[-1]["content"] if self.messages else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A part of a completion of a run with tools: what the policy wrote, or what the tools answered."""

    num_tokens: int
    """At least 1. The token that ends a turn of the policy belongs to it, and what the template writes between two
    turns to that of the tools."""
    text: str
    """What the policy wrote, without the token that ended it; or the results, without the template's words."""
    is_sampled: bool
    """The policy wrote it. What tools answered has no loss."""
    num_calls: int = 0
    """Of tools: those that the policy asks for, or those that are answered."""
    num_errors: int = 0
    """Of the calls that are answered, those whose answer is the text of an error."""
    is_cut: bool = False
    """The results were longer than the room that was left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer; with tools all that follows the prompt, their results included."""

    token_ids: tuple[int, ...]
    """Sampled tokens; with `FinishReason.STOP` the last one is the end token. Never empty. With tools those of all
    `turns`, one after another."""
    sampling_logprobs: tuple[float, ...]
    """The engine's log-probability of each token, at `RolloutEngine.logprob_temperature`; 0 where none was sampled."""
    finish_reason: FinishReason
    text: str
    """What rewards see: see `rollout.engines.decoding.completion_text`."""
    turns: tuple[Turn, ...] = ()
    """In a run with tools; the first and the last one are the policy's. Empty in others: every token was sampled."""
    environment_reward: float | None = None
    """What the `get_reward` of its environment returned; None without one."""

    @property
    def sampled_mask(self) -> tuple[int, ...]:
        """[T], 1 on the tokens that the policy sampled."""
        if not self.turns:
            return (1,) * len(self.token_ids)
        return tuple(int(turn.is_sampled) for turn in self.turns for _ in range(turn.num_tokens))

    @property
    def sampled_ids(self) -> tuple[int, ...]:
        """The tokens that the policy sampled."""
        if not self.turns:
            return self.token_ids
        return tuple(token for token, mask in zip(self.token_ids, self.sampled_mask, strict=True) if mask)

    @property
    def num_sampled(self) -> int:
        """How many tokens the policy sampled: what the length of a completion is in metrics."""
        return sum(turn.num_tokens for turn in self.turns if turn.is_sampled) or len(self.token_ids)

    @property
    def final_turn(self) -> str:
        """The text that holds the answer: what the policy wrote last."""
        return self.turns[-1].text if self.turns else self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """G completions of one prompt, and the policy they came from."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    policy_version: int
    """The version that the engine had really loaded when it sampled, not the one that it was asked to load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How completions are drawn."""

    num_generations: int
    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    """The least share of the most probable token's probability that another token needs to be kept."""
    repetition_penalty: float = 1.0
    structured_outputs: Mapping[str, Any] | None = None
    """What completions have to match, as vLLM's `StructuredOutputsParams`: one of `regex`, `json`, `choice`,
    `grammar`."""
    stop_token_ids: tuple[int, ...] = ()
    """Each of these ends a completion: all EOS ids of the generation config, and the template's stop words."""
    seed: int = 0
    """The run seed; see `rollout.engines.seeds.sample_seed`."""

    @property
    def is_neutral(self) -> bool:
        """Whether completions come from the policy's own distribution, with nothing but the temperature applied."""
        cuts = self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0 or self.structured_outputs is not None
        return not cuts and self.repetition_penalty == 1.0


class EngineLostError(RuntimeError):
    """Nothing of the engine answers any more. What the trainer has is sound: it is saved before the run ends."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions from the policy. One instance a process; used by one thread."""

    logprob_temperature: float
    """The temperature of the distribution that `Completion.sampling_logprobs` refer to."""
    on_step: Callable[[], None]
    """Called in `generate` about once for each token position; an exception from it ends the rollout."""

    def sync(self, policy: "torch.nn.Module", version: int) -> None:
        """Sample from `policy`'s present weights from now on. `version` is their optimizer step, and increases."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> list[RolloutGroup]:
        """Sample exactly `sampling.num_generations` completions for each prompt, in order.

        The seed of each completion depends on (sampling.seed, step, prompt.index, sample) alone. Neither the global
        random state nor the policy's training mode is changed. Of a prompt with a `room` no more tokens are needed,
        and others than these are not looked at; prompt and room together fit wherever a prompt of `cutoff_len` and
        `max_new_tokens` do.

        Raises:
            RuntimeError: if `sync` was never called.
        """

    def score(self, groups: Sequence[RolloutGroup]) -> "list[torch.Tensor]":
        """Log-probabilities of given completions at temperature 1: one [T] each, prompt-major.

        A prompt and its completion must leave room for one more token. Neither the global random state nor the
        policy's training mode is changed.

        Raises:
            RuntimeError: if `sync` was never called.
        """

    def sleep(self) -> None:
        """Free what the engine does not need until the next `sync`; may be a no-op."""

    def close(self) -> None:
        """Free what the engine holds. May be called twice."""


@runtime_checkable
class AheadEngine(RolloutEngine, Protocol):
    """An engine that samples while its caller does something else: one on a device, or at least in a process, of its
    own. One rollout can be under way; until it is collected or discarded, nothing else may be asked for."""

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> None:
        """Begin with what `generate` does, from the weights of the last `sync`, and return at once."""

    def collect(self) -> tuple[list[RolloutGroup], float]:
        """Wait for the rollout that was submitted. Returns its groups, and the seconds that the engine took for it."""

    def discard(self) -> None:
        """Give up the rollout that is under way, if there is one."""


@runtime_checkable
class ReplicatedEngine(RolloutEngine, Protocol):
    """An engine that holds the policy several times, each of which may be wrong alone."""

    def score_each(self, groups: Sequence[RolloutGroup]) -> "dict[str, list[torch.Tensor]]":
        """What `score` returns, of each that is there, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingProgress:
    """How far a run is: what a reward function gets as `trainer_state`, with transformers' names."""

    global_step: int = 0
    """Optimizer steps that are done."""
    max_steps: int = 1
    """Optimizer steps of the whole run; an upper bound with `dynamic_sampling`."""
    epoch: float = 0.0
    """Epochs that are done, the fraction of the present one included."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"`trainer_state` has global_step, max_steps and epoch in `stage: grpo`, and no {name!r}")


class Reward(Protocol):
    """A reward that scores groups, rather than the lists that a reward function gets."""

    name: str

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[float | None]]:
        """Score [P][G]; None means that the function does not apply to that completion.

        Raises:
            RewardError: if anything but a score comes out.
        """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredGroup:
    """A rollout group with its rewards and no advantages yet: these need the whole batch."""

    group: RolloutGroup
    rewards: tuple[tuple[float | None, ...], ...]
    """[G][F], unweighted."""
    total_rewards: tuple[float | None, ...]
    """[G], the weighted sum over the functions that applied; None where none did."""
    old_logprobs: "tuple[torch.Tensor, ...] | None" = None
    """[G] of [T], of the policy that sampled the group, if that is an earlier one. None if it is the present policy,
    whose log-probabilities can be computed at any time; and if the ratio is to the present policy in any case (see
    `Sample.old_logprobs`)."""
    ref_logprobs: "tuple[torch.Tensor, ...] | None" = None
    """[G] of [T], of the reference."""
    energies: "tuple[torch.Tensor, ...] | None" = None
    """[G] of [T], `gradient_energies` of the tokens, for the estimator that weighs by them."""
    greedy_rewards: tuple[float | None, ...] | None = None
    """[F], unweighted, of the prompt's greedy completion, for the estimator that compares with it."""

    @property
    def has_reward(self) -> bool:
        """Whether a reward function applied to any of its completions."""
        return any(total is not None for total in self.total_rewards)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One completion and all that is known of it: what an update is made of, and what a checkpoint holds."""

    prompt: Prompt
    completion: Completion
    policy_version: int
    """The optimizer step whose policy sampled it. In that step the sample is fresh: its ratio is 1."""
    rewards: tuple[float | None, ...]
    """[F], unweighted."""
    total_reward: float | None
    advantage: float
    """0 where there is no total; the mean over tokens that have their own."""
    loss_mask: tuple[int, ...]
    """[T], 1 on the tokens that the loss uses: those that were sampled; all 0 for a completion that is left out."""
    old_logprobs: "torch.Tensor | None" = None
    """[T] of the policy that sampled it: computed by the trainer, or with `rollout_ahead` by the engine. None if that
    is the policy of the step that trains on it, or if `rollout_correction` weighs the step from the one policy to the
    other: the ratio is then 1 by definition."""
    ref_logprobs: "torch.Tensor | None" = None
    """[T] of the reference; None without a KL term."""
    trained_mask: "torch.Tensor | None" = None
    """[T] float, 1 on the tokens that have a policy loss; None for all of `loss_mask`."""
    anchor_mask: "torch.Tensor | None" = None
    """[T] float, 1 on the tokens that are held to their old log-probability; None for none."""
    token_advantages: "torch.Tensor | None" = None
    """[T], under an estimator that gives each token its own."""

    @property
    def is_used(self) -> bool:
        """Whether the loss uses any of its tokens."""
        return any(self.loss_mask)

    @property
    def teaches(self) -> bool:
        """Whether the loss uses it, with an advantage other than 0."""
        own = self.token_advantages
        return self.is_used and (self.advantage != 0 if own is None else bool(own.any()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """What one optimizer step trains on, on this rank."""

    samples: tuple[Sample, ...]
    logprob_temperature: float
    """The temperature that the samples' `sampling_logprobs` refer to."""


class ImageReader(Protocol):
    """What a model takes of prompts with images, and of prompts without in a run that has some."""

    placeholder: int
    """The token that stands for a part of an image. Each one in a prompt has its part. Sampled, it ends a completion:
    the model would look for the image of one that is read again."""
    num_images: int
    """The most that a prompt of the run has."""

    def arguments(self, prompts: "Sequence[Prompt]") -> "dict[str, torch.Tensor]":
        """Arguments of the model's forward pass with the images of `prompts`, one after another; none without images.

        Made once for equal prompts as long as memory allows, and on the CPU.
        """

    def positions(self, prompt: Prompt) -> "torch.Tensor":
        """[K, prompt tokens] positions, which count in K dimensions; what follows goes on behind the highest."""

    def token_types(self, prompt: Prompt) -> "torch.Tensor | None":
        """[prompt tokens], 1 on the tokens of images, for a model that has to be told; None for others."""

    def compact(self, prompt: Prompt) -> tuple[list[int], list[Any]]:
        """The prompt for an engine that makes pixels itself: tokens with one placeholder an image, and the images as
        PIL has them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelInputs:
    """The tokens of a micro-batch as they go through the model: R rows of N tokens, as a layout places them."""

    input_ids: "torch.Tensor"
    """[R, N]."""
    position_ids: "torch.Tensor"
    """[R, N], of each token in its own sequence; [K, R, N] where positions count in K dimensions."""
    predictors: "torch.Tensor"
    """[M] int, where in the flattened rows the sampled tokens are predicted, completion by completion."""
    counts: "torch.Tensor"
    """[R, N] float: in how many of the completions' sequences a token predicts another one; 0 for padding."""
    attention_mask: "torch.Tensor | None" = None
    """[R, N], from lengths and never from `ids == pad`; None where nothing is padded."""
    shared_prompts: Any = None
    """`attention.SharedPrompts`, where completions share the tokens of their prompt."""
    images: "Mapping[str, torch.Tensor]" = field(default_factory=dict)
    """Further arguments of the model, in a run with images."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenBatch:
    """Completions as tensors, right-padded, and what goes through the model to get their log-probabilities."""

    inputs: ModelInputs
    completion_ids: "torch.Tensor"
    """[B, T]."""
    completion_mask: "torch.Tensor"
    """[B, T] float, 1 on the sampled tokens of a completion, its end token included: 0 on the results of tools, and
    behind the completion."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleBatch(TokenBatch):
    """A micro-batch of samples as tensors; what is [B, T] is 0 outside `completion_mask`."""

    loss_mask: "torch.Tensor"
    """[B, T] float, 1 on the tokens that the loss uses."""
    loss_weights: "torch.Tensor"
    """[B, T] float: the weight of each token's loss in the sum; 0 outside `loss_mask`."""
    advantages: "torch.Tensor"
    """[B], or [B, T] where each token has its own."""
    sampling_logprobs: "torch.Tensor"
    """[B, T]."""
    policy_versions: "torch.Tensor"
    """[B] int, the version of the policy that sampled each; -1 for a dummy."""
    old_logprobs: "torch.Tensor | None" = None
    """[B, T]; this and the next three are None if the samples have none."""
    ref_logprobs: "torch.Tensor | None" = None
    trained_mask: "torch.Tensor | None" = None
    anchor_mask: "torch.Tensor | None" = None
