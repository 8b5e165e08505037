"""Steps of a layout, event by event: completions of drawn lengths on engines, updates of ranks, deliveries."""

import heapq
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_stage.layout.costs import EngineCost, ModelCost, Rates, Work, sync_seconds, update_cost
from grpo_stage.layout.syntax import Layout


Draw = Callable[[random.Random], int]
"""Gives the length of one completion."""
FEW = 0.1
"""The tail of a rollout is the time in which no more than this share of its completions still runs."""


class NoRoomError(ValueError):
    """A prompt with a completion is larger than an engine's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What a rollout took, seconds."""

    total: float
    """To the end of the last completion."""
    busy: float
    """Of an engine, in the mean."""
    tail: float
    parts: dict[str, float]
    """Of the engine that ends last, by what they went to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Means over the simulated steps. A step is a rollout and all that learns from it; seconds."""

    step: float
    rollout: float
    update: float
    sync: float
    communication: float
    """The part of `update` that is not computation."""
    tail: float
    """The part of `rollout` in which few completions still run."""
    rollout_parts: dict[str, float]
    idle: dict[str, float]
    """The share of a step in which a group of cards waits."""
    num_prompts: int
    num_tokens: float
    """Sampled."""
    num_cards: int
    bottleneck: str

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.step

    def hours(self, num_prompts: int) -> float:
        """For each of `num_prompts` once."""
        return num_prompts / self.num_prompts * self.step / 3600


class _Engine:
    """Its clock jumps from the end of one completion to that of the next."""

    def __init__(self, cost: EngineCost, prompt_length: int) -> None:
        self._cost, self._prompt_length = cost, prompt_length
        self.now = 0.0
        self._passes = 0
        """How many tokens a completion would have that was there from the start."""
        self._running: list[tuple[int, int, int]] = []
        """A heap: the pass in which a completion ends, its tokens, and its group."""
        self._of_group: Counter[int] = Counter()
        """Completions that run, by group; a group that was here once has its prompt in the cache."""
        self._context = 0
        self._reserved = 0
        self.parts = dict.fromkeys(("prompts", "overhead", "weights", "keys and values", "compute"), 0.0)

    @property
    def in_flight(self) -> int:
        return len(self._running)

    @property
    def next_end(self) -> float:
        """When the next completion will have ended, if no other is added."""
        return self.now + sum(self._until_next())

    def has_room(self, group: int, length: int) -> bool:
        """For a completion of `group` up to its end.

        Raises:
            NoRoomError: if there is none even without others.
        """
        if self._prompt_length + length > self._cost.capacity:
            raise NoRoomError(
                f"An engine of {self._cost.num_cards} x {self._cost.card.name} has room for {self._cost.capacity:,} "
                f"tokens beside its weights, and a prompt with a completion takes {self._prompt_length + length:,}. "
                "Give it more cards (`serve 4x2xH100` has two), or sample shorter completions."
            )
        held = length if self._of_group[group] else length + self._prompt_length
        most = min(self._cost.card.max_sequences, self._cost.max_in_flight)
        return not self._running or (self.in_flight < most and self._reserved + held <= self._cost.capacity)

    def add(self, group: int, length: int) -> None:
        """Begin a completion, and compute the prompt of its group if that was not here yet."""
        if group not in self._of_group:
            seconds = self._cost.prefill(self._prompt_length)
            self.now += seconds
            self.parts["prompts"] += seconds
        self._reserved += length if self._of_group[group] else length + self._prompt_length
        self._of_group[group] += 1
        self._context += self._prompt_length
        heapq.heappush(self._running, (self._passes + length, length, group))

    def advance(self) -> float:
        """Go on to the end of the next completion, and take it out."""
        for name, seconds in zip(
            ("overhead", "weights", "keys and values", "compute"), self._until_next(), strict=True
        ):
            self.parts[name] += seconds
            self.now += seconds
        num_running = self.in_flight
        end, length, group = heapq.heappop(self._running)
        self._context += num_running * (end - self._passes) - length - self._prompt_length
        self._passes = end
        self._of_group[group] -= 1
        self._reserved -= length if self._of_group[group] else length + self._prompt_length
        return self.now

    def _until_next(self) -> tuple[float, ...]:
        """Seconds of the passes to the next end; a pass takes longer by the same amount than the one before it."""
        passes = self._running[0][0] - self._passes
        middle = self._context + self.in_flight * passes / 2
        return tuple(passes * each for each in self._cost.decode(self.in_flight, middle))


def roll_out(engines: Sequence[EngineCost], prompt_length: int, groups: Sequence[Sequence[int]]) -> Rollout:
    """Sample groups. Each completion goes to the engine with the fewest in flight that has room for it.

    Raises:
        NoRoomError: if a prompt with a completion has no room in an engine.
    """
    running = [_Engine(cost, prompt_length) for cost in engines]
    waiting = deque((i, length) for i, group in enumerate(groups) for length in group)

    def give(candidates: Sequence[_Engine]) -> None:
        while waiting:
            free = [engine for engine in candidates if engine.has_room(*waiting[0])]
            if not free:
                return
            min(free, key=lambda engine: engine.in_flight).add(*waiting.popleft())

    give(running)
    events = [(engine.next_end, i) for i, engine in enumerate(running) if engine.in_flight]
    heapq.heapify(events)
    ends: list[float] = []
    while events:
        _, i = heapq.heappop(events)
        ends.append(running[i].advance())
        give([running[i]])
        if running[i].in_flight:
            heapq.heappush(events, (running[i].next_end, i))
    last = max(running, key=lambda engine: engine.now)
    ends.sort()
    return Rollout(
        total=last.now,
        busy=sum(engine.now for engine in running) / len(running),
        tail=last.now - ends[int((1 - FEW) * (len(ends) - 1))],
        parts=last.parts,
    )


def simulate(
    layout: Layout,
    model: ModelCost,
    work: Work,
    engine_memory: float,
    draw: Draw,
    *,
    rates: Rates | None = None,
    num_steps: int = 5,
    seed: int = 0,
) -> Outcome:
    """Simulate steps.

    Args:
        layout: the cards.
        model: what it costs.
        work: a rollout and its updates.
        engine_memory: bytes of each card that an engine's weights and cache can take.
        draw: gives the lengths of completions.
        rates: what is reached of the data sheets' figures; None is those of `Rates`.
        num_steps: whose mean is taken.
        seed: of the lengths.

    Raises:
        NoRoomError: if a prompt with a completion has no room in an engine.
        ValueError: if `rollout_ahead` has nothing to overlap.
    """
    rates = rates or Rates()
    if work.runs_ahead and layout.is_colocated:
        raise ValueError(
            "`rollout_ahead: 1` needs cards of its own for the engines, since the next rollout runs beside the "
            "update. Add a part `serve` to `--layout`, or leave `rollout_ahead` out."
        )
    engine = EngineCost(
        card=layout.engine_card,
        num_cards=layout.engine_size,
        model=model,
        rates=rates,
        memory=engine_memory,
        max_in_flight=work.max_in_flight,
    )
    random_ = random.Random(seed)
    drawn = [
        [[draw(random_) for _ in range(work.group_size)] for _ in range(work.num_prompts * layout.num_trainers)]
        for _ in range(num_steps + 1)
    ]
    # With `rollout_ahead` an update runs beside the rollout after its own; the last one drawn is only for that.
    *rollouts, after = (_rollout_of(layout, engine, work.prompt_length, groups) for groups in drawn)
    updates, means, hidden = [], [], []
    for groups in drawn[:num_steps]:
        ranks = [
            update_cost(layout, model, work, rates, groups[rank :: layout.num_trainers])
            for rank in range(layout.num_trainers)
        ]
        slowest = max(ranks, key=lambda cost: cost.total)
        updates.append(slowest.total)
        hidden.append(slowest.communication)
        means.append(_mean([cost.total for cost in ranks]))
    sync = sync_seconds(layout, model, rates)
    steps = [
        sync + (max(update, following.total) if work.runs_ahead else update + rollout.total)
        for rollout, following, update in zip(rollouts, [*rollouts[1:], after], updates, strict=True)
    ]
    step = _mean(steps)
    rollout, update = _mean([each.total for each in rollouts]), _mean(updates)
    engine_busy, train_busy = _mean([each.busy for each in rollouts]) + sync, _mean(means) + sync
    idle = (
        {"train and sample": 1 - (engine_busy + train_busy - sync) / step}
        if layout.is_colocated
        else {"train": 1 - train_busy / step, "serve": 1 - engine_busy / step}
    )
    parts = {name: _mean([each.parts[name] for each in rollouts]) for name in rollouts[0].parts}
    return Outcome(
        step=step,
        rollout=rollout,
        update=update,
        sync=sync,
        communication=_mean(hidden),
        tail=_mean([each.tail for each in rollouts]),
        rollout_parts=parts,
        idle={name: max(0.0, share) for name, share in idle.items()},
        num_prompts=work.num_prompts * layout.num_trainers,
        num_tokens=_mean([sum(map(sum, groups)) for groups in drawn[:num_steps]]),
        num_cards=layout.num_cards,
        bottleneck=_bottleneck(rollout, update, sync, _mean(hidden), parts),
    )


def _rollout_of(layout: Layout, engine: EngineCost, prompt_length: int, groups: Sequence[Sequence[int]]) -> Rollout:
    """On servers that share all groups, or on engines that each sample the prompts of their own ranks."""
    if not layout.is_colocated:
        return roll_out([engine] * layout.num_engines, prompt_length, groups)
    each = [
        roll_out(
            [engine],
            prompt_length,
            [group for i, group in enumerate(groups) if i % layout.num_trainers // layout.engine_size == number],
        )
        for number in range(layout.num_engines)
    ]
    last = max(each, key=lambda rollout: rollout.total)
    return Rollout(total=last.total, busy=_mean([one.total for one in each]), tail=last.tail, parts=last.parts)


def _bottleneck(rollout: float, update: float, sync: float, communication: float, parts: dict[str, float]) -> str:
    """What the largest part of a step goes to."""
    largest = max((rollout, "rollout"), (update, "update"), (sync, "sync"))[1]
    if largest == "rollout":
        return f"rollout: {max(parts, key=lambda name: parts[name])}"
    if largest == "update":
        return "update: communication" if communication > update / 2 else "update: computation"
    return largest


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def fixed(length: int) -> Draw:
    """All completions of one length."""
    return lambda _: length


def uniform(longest: int) -> Draw:
    """Lengths from 1 to `longest`, all equally frequent."""
    return lambda random_: random_.randint(1, longest)


def of_file(path: Path) -> Draw:
    """Lengths of the completions that a run logged.

    Raises:
        ValueError: if the file has none.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lengths = [_length(line) for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`--lengths {path}` cannot be read: {error}") from error
    if not lengths or None in lengths:
        raise ValueError(
            f"`--lengths {path}` is no file of completions: each line is an object with `num_tokens`, a number above "
            "0. A run with `log_completions: true` writes it as completions.jsonl."
        )
    return lambda random_: random_.choice(lengths)  # type: ignore[return-value]


def _length(line: str) -> int | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    length = record.get("num_tokens") if isinstance(record, dict) else None
    return length if isinstance(length, int) and not isinstance(length, bool) and length > 0 else None
