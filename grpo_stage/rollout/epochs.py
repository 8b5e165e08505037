"""The order in which prompts are sampled, and when an epoch or a run is over."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transformers import TrainingArguments

from grpo_stage.arguments import GRPOArguments


class PromptStream:
    """Deals the indices of `num_prompts` prompts, each exactly once an epoch over all ranks.

    An epoch is one permutation, drawn from (seed, epoch) by a generator of its own and thus the same on every rank.
    Each `take` deals the permutation's next slice to the ranks, without padding or repeats. The state is the same on
    all ranks, and holds for any world size.

    Where prompts have levels, those of the present level come first, then those of the nearest one: each `go_to` sorts
    what is left of the epoch anew.

    Args:
        num_prompts: size of the dataset.
        seed: the run seed.
        shuffle: False keeps the dataset's order (the host's `disable_shuffling`).
        rank: this process.
        world_size: how many processes share the stream.
        levels: of each prompt, from 0; by default all are of one level.
    """

    def __init__(
        self,
        num_prompts: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        levels: Sequence[int] = (),
    ) -> None:
        if num_prompts < 1:
            raise ValueError(f"A prompt stream needs at least one prompt, got {num_prompts}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"The rank must lie in [0, {world_size}), got {rank}.")
        self.num_prompts = num_prompts
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._levels = levels
        self._cursor = 0
        self._visits = [(0, 0)]
        self._order = self._permutation()

    @property
    def level(self) -> int:
        """The level whose prompts come next, as long as there are any."""
        return self._visits[-1][1]

    @property
    def top_level(self) -> int:
        return max(self._levels, default=0)

    def go_to(self, level: int) -> None:
        """Deal the prompts of this level next."""
        self._visits.append((self._cursor, level))
        self._order = self._permutation()

    def take(self, count: int) -> list[int]:
        """This rank's share of the next `count` prompts, counted over all ranks.

        A call stops at the end of the epoch; the one after it starts the next epoch.
        """
        if count < 1:
            raise ValueError(f"At least one prompt must be taken at a time, got {count}.")
        self.begin_epoch_if_due()
        dealt = self._order[self._cursor : self._cursor + count]
        self._cursor += len(dealt)
        return dealt[self.rank :: self.world_size]

    def begin_epoch_if_due(self) -> None:
        """Go on to the next epoch if no prompt of this one is left."""
        if self.remaining() == 0:
            self.epoch += 1
            self._cursor = 0
            self._visits = [(0, self.level)]
            self._order = self._permutation()

    def remaining(self) -> int:
        """How many prompts of this epoch are left, over all ranks."""
        return self.num_prompts - self._cursor

    def skip_to(self, num_taken: int) -> None:
        """Leave out the prompts before the one that follows the run's first `num_taken`, if they are still to come."""
        if num_taken > self.num_taken:
            epoch, self._cursor = divmod(num_taken, self.num_prompts)
            if epoch > self.epoch:
                self.epoch, self._visits = epoch, [(0, self.level)]
            self._order = self._permutation()

    @property
    def num_taken(self) -> int:
        """How many prompts were taken since the run's start, over all epochs and ranks."""
        return self.epoch * self.num_prompts + self._cursor

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, ready for JSON."""
        return {
            "epoch": self.epoch,
            "cursor": self._cursor,
            "visits": [list(visit) for visit in self._visits],
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: if `state` was taken from other prompts or another order of them.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(
                    f"The checkpoint's prompt stream has {name}={state[name]} but this run has {name}={value}: it "
                    "would not go on with the prompts that are due. Resume with the dataset and settings of the "
                    "interrupted run, or start anew in an empty `output_dir`."
                )
        epoch, cursor = state["epoch"], state["cursor"]
        if epoch < 0 or not 0 <= cursor <= self.num_prompts:
            raise ValueError(
                f"The checkpoint's prompt stream is damaged: epoch {epoch} and cursor {cursor} do not fit "
                f"{self.num_prompts} prompts."
            )
        self.epoch, self._cursor = epoch, cursor
        self._visits = [(start, level) for start, level in state["visits"]]
        self._order = self._permutation()

    def _identity(self) -> dict[str, Any]:
        return {"num_prompts": self.num_prompts, "seed": self.seed, "shuffle": self.shuffle}

    def _permutation(self) -> list[int]:
        order = list(range(self.num_prompts))
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        for start, level in self._visits if self._levels else ():
            order[start:] = sorted(order[start:], key=lambda i: (abs(self._levels[i] - level), self._levels[i]))
        return order


class Epochs(Protocol):
    """How a run's epochs are counted."""

    def is_end(self, step: int) -> bool:
        """Whether an epoch is over after `step` optimizer steps."""

    @property
    def is_cut(self) -> bool:
        """Whether an epoch is over although Trainer expects further steps."""

    @property
    def may_roll_out(self) -> bool:
        """Whether a batch may take further prompts."""

    @property
    def is_run_over(self) -> bool:
        """Whether there is nothing left to train on, however many steps there might be."""

    def done(self, counted: float) -> float:
        """How many epochs are done; `counted` is Trainer's own number, from optimizer steps."""

    def most(self, num_epochs: int) -> int:
        """How many epochs Trainer has to allow for; `num_epochs` is its own number."""

    def resumed_at(self, step: int, num_epochs: int, num_slots: int) -> tuple[int, int]:
        """Epochs, and slots of the present one, that Trainer skips in a resume; its own numbers are given."""


class EpochsOfSteps:
    """Plain sampling: an epoch has the same number of optimizer steps each time."""

    is_cut = False
    may_roll_out = True
    is_run_over = False

    def __init__(self, steps_per_epoch: int) -> None:
        self._steps_per_epoch = steps_per_epoch

    def is_end(self, step: int) -> bool:
        return step % self._steps_per_epoch == 0

    def done(self, counted: float) -> float:
        return counted

    def most(self, num_epochs: int) -> int:
        return num_epochs

    def resumed_at(self, step: int, num_epochs: int, num_slots: int) -> tuple[int, int]:
        return num_epochs, num_slots


class EpochsOfPrompts:
    """Dynamic sampling: an epoch has fewer steps where groups are dropped, and ends when its prompts are used up.

    Args:
        stream: the prompts.
        is_everything_used: whether everything that was sampled has been trained on.
        args: how many epochs or steps the run has.
    """

    def __init__(self, stream: PromptStream, is_everything_used: Callable[[], bool], args: TrainingArguments) -> None:
        self._stream = stream
        self._is_everything_used = is_everything_used
        self._args = args

    def is_end(self, step: int) -> bool:
        return self.is_cut

    @property
    def is_cut(self) -> bool:
        return self._is_everything_used() and self._stream.remaining() == 0

    @property
    def may_roll_out(self) -> bool:
        return self._has_prompts_left and self._stream.remaining() > 0  # a batch never reaches into the next epoch

    @property
    def is_run_over(self) -> bool:
        return self._is_everything_used() and not self._has_prompts_left

    def done(self, counted: float) -> float:
        return self._stream.num_taken / self._stream.num_prompts

    def most(self, num_epochs: int) -> int:
        return self._args.max_steps if self._args.max_steps > 0 else num_epochs  # an epoch has at least one step

    def resumed_at(self, step: int, num_epochs: int, num_slots: int) -> tuple[int, int]:
        if step == 0:
            return num_epochs, num_slots
        # One slot of a begun epoch is skipped: there are always more slots than are needed.
        return (self._stream.epoch + 1, 0) if self.is_end(step) else (self._stream.epoch, 1)

    @property
    def _has_prompts_left(self) -> bool:
        """Whether the run may sample further prompts. With `max_steps` it takes as many epochs as it needs."""
        num_prompts = self._args.num_train_epochs * self._stream.num_prompts
        return self._args.max_steps > 0 or self._stream.num_taken < num_prompts


def choose_epochs(
    grpo_args: GRPOArguments,
    args: TrainingArguments,
    stream: PromptStream,
    steps_per_epoch: int,
    is_everything_used: Callable[[], bool],
) -> Epochs:
    """The way to count epochs that fits the recipe; see the classes for the arguments."""
    if grpo_args.dynamic_sampling:
        return EpochsOfPrompts(stream, is_everything_used, args)
    return EpochsOfSteps(steps_per_epoch)


def prompts_of_step(args: TrainingArguments) -> int:
    """Prompts of an optimizer step, on all devices together."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def steps_of_epoch(num_prompts: int, prompts_per_step: int, num_iterations: int) -> int:
    """Optimizer steps of an epoch; an upper bound with dynamic sampling."""
    return -(-num_prompts // prompts_per_step) * num_iterations


def steps_of_run(args: TrainingArguments, steps_per_epoch: int) -> int:
    """Optimizer steps of a run; an upper bound with dynamic sampling and without `max_steps`."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
