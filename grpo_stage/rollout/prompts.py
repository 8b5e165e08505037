"""Dataset rows as prompts, and the order in which they are sampled from."""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from grpo_stage.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The prompts of one dataset, and what became of the rows that gave none."""

    prompts: list[Prompt]
    num_rows: int
    num_unreadable: int
    """Rows whose turns do not alternate."""
    num_overlong: int
    """Prompts of more than `max_length` tokens: dropped or cut."""


def build_prompts(
    records: Iterable[str],
    max_length: int,
    overlong: Literal["drop", "truncate"],
    dataset: str | None = None,
    first_index: int = 0,
) -> PromptSet:
    """Turn records, one JSON string a row, into prompts.

    Args:
        records: `{"token_ids", "messages", "reference", "columns"}` of each row, or `null` for an unreadable one.
        max_length: the most tokens that a prompt may have.
        overlong: `drop` leaves a longer prompt out, `truncate` keeps its last `max_length` tokens.
        dataset: the evaluation dataset that the records are.
        first_index: where the prompts' indices start: those of several evaluation datasets must differ.
    """
    prompts: list[Prompt] = []
    num_rows = num_unreadable = num_overlong = 0
    # Most ids recur thousands of times: one object for each keeps a large dataset at 8 bytes a token instead of 36.
    shared_ids: dict[int, int] = {}
    for record in records:
        num_rows += 1
        row: dict[str, Any] | None = json.loads(record)
        if row is None:
            num_unreadable += 1
            continue
        token_ids = row["token_ids"]
        if len(token_ids) > max_length:
            num_overlong += 1
            if overlong == "drop":
                continue
        prompts.append(
            Prompt(
                index=first_index + len(prompts),
                token_ids=tuple(shared_ids.setdefault(token, token) for token in token_ids[-max_length:]),
                messages=tuple(row["messages"]),
                reference=row["reference"],
                columns=row["columns"],
                dataset=dataset,
            )
        )
    return PromptSet(prompts=prompts, num_rows=num_rows, num_unreadable=num_unreadable, num_overlong=num_overlong)


class PromptStream:
    """Deals the indices of `num_prompts` prompts, each exactly once an epoch over all ranks.

    An epoch is one permutation, drawn from (seed, epoch) by a generator of its own and thus the same on every rank.
    Each `take` deals the permutation's next slice to the ranks, without padding or repeats. The state is the same on
    all ranks, and holds for any world size.

    Args:
        num_prompts: size of the dataset.
        seed: the run seed.
        shuffle: False keeps the dataset's order (the host's `disable_shuffling`).
        rank: this process.
        world_size: how many processes share the stream.
    """

    def __init__(self, num_prompts: int, seed: int, shuffle: bool = True, rank: int = 0, world_size: int = 1) -> None:
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
        self._cursor = 0
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
        """Go on to the next epoch where no prompt of this one is left."""
        if self.remaining() == 0:
            self.epoch += 1
            self._cursor = 0
            self._order = self._permutation()

    def remaining(self) -> int:
        """How many prompts of this epoch are left, over all ranks."""
        return self.num_prompts - self._cursor

    @property
    def num_taken(self) -> int:
        """How many prompts were taken since the run's start, over all epochs and ranks."""
        return self.epoch * self.num_prompts + self._cursor

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, ready for JSON."""
        return {"epoch": self.epoch, "cursor": self._cursor, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: if it was taken from other prompts or another order of them.
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
        self._order = self._permutation()

    def _identity(self) -> dict[str, Any]:
        return {"num_prompts": self.num_prompts, "seed": self.seed, "shuffle": self.shuffle}

    def _permutation(self) -> list[int]:
        order = list(range(self.num_prompts))
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order
