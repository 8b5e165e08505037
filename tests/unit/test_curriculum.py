"""A curriculum by level: the order that it gives an epoch, and when it moves."""

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_stage.arguments import GRPOArguments
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.rollout.curriculum import LEVEL, WINDOW, Curriculum
from grpo_stage.rollout.epochs import PromptStream


LEVELS = [index % 4 for index in range(40)]


def stream_of(**changes: Any) -> PromptStream:
    return PromptStream(len(LEVELS), seed=5, levels=LEVELS, **changes)


def test_the_present_level_comes_first_and_then_the_nearest():
    stream = stream_of()
    assert {LEVELS[i] for i in stream.take(4)} == {0}
    stream.go_to(2)
    assert [LEVELS[i] for i in stream.take(36)] == [2] * 10 + [1] * 10 + [3] * 10 + [0] * 6
    assert {LEVELS[i] for i in stream.take(10)} == {2}  # the next epoch begins where this one was


@pytest.mark.parametrize("seed", range(10))
def test_every_prompt_is_dealt_once_an_epoch_however_the_level_moves(seed):
    chance = random.Random(seed)
    streams = [stream_of(rank=rank, world_size=2, shuffle=seed % 2 == 0) for rank in range(2)]
    for epoch in range(3):
        dealt: list[int] = []
        while len(dealt) < len(LEVELS):
            count = chance.randint(1, 9)
            shares = [stream.take(count) for stream in streams]
            dealt += [*shares[0], *shares[1]]
            if chance.random() < 0.5:
                level = chance.randrange(4)
                for stream in streams:
                    stream.go_to(level)
        assert sorted(dealt) == list(range(len(LEVELS))), epoch


def test_a_resumed_stream_deals_what_the_other_one_does():
    stream = stream_of()
    for count, level in ((3, 1), (7, 3), (5, 2), (1, 1), (30, 0)):
        stream.take(count)
        stream.go_to(level)
        state = stream.state_dict()
        assert json.loads(json.dumps(state)) == state
        resumed = stream_of()
        resumed.load_state_dict(state)
        assert [*resumed.take(40), *resumed.take(40)] == [*other_of(stream).take(40), *other_of(stream, 1).take(40)]


def other_of(stream: PromptStream, num_before: int = 0) -> PromptStream:
    """A stream that has gone the same way without a resume."""
    copied = stream_of()
    copied.epoch, copied._cursor, copied._visits, copied._order = (
        stream.epoch,
        stream._cursor,
        list(stream._visits),
        list(stream._order),
    )
    for _ in range(num_before):
        copied.take(40)
    return copied


def test_without_levels_the_order_is_the_permutation():
    stream = PromptStream(40, seed=5)
    order = list(range(40))
    random.Random("5/0").shuffle(order)
    assert stream.take(40) == order


def rollout(level: int, *rewards: float | None, num: int = 1) -> list[Any]:
    """Groups whose second reward function has given `rewards`."""
    prompt = SimpleNamespace(columns={LEVEL: level})
    group = SimpleNamespace(group=SimpleNamespace(prompt=prompt), rewards=tuple((9.0, each) for each in rewards))
    return [group] * num


def curriculum_at(level: int, threshold: float = 0.8) -> tuple[Curriculum, PromptStream, MetricTracker]:
    stream = stream_of()
    stream.go_to(level)
    return Curriculum(stream, threshold, function=1), stream, MetricTracker()


@pytest.mark.parametrize(
    ("level", "reward", "then"),
    [(1, 0.8, 2), (1, 0.79, 1), (1, 0.4, 1), (1, 0.39, 0), (0, 0.0, 0), (3, 1.0, 3)],
)
def test_a_window_of_prompts_moves_the_level(level, reward, then):
    curriculum, stream, tracker = curriculum_at(level)
    curriculum.heed(rollout(level, reward, reward, num=WINDOW - 1), tracker)
    assert stream.level == level
    curriculum.heed(rollout(level, reward, reward), tracker)
    assert stream.level == then


def test_only_the_last_prompts_of_the_present_level_with_a_reward_count():
    curriculum, stream, tracker = curriculum_at(1)
    curriculum.heed(rollout(1, 0.0, num=8), tracker)
    curriculum.heed([*rollout(2, 1.0, num=WINDOW), *rollout(1, None, None, num=WINDOW)], tracker)
    assert (stream.level, curriculum.state_dict()) == (1, [0.0] * 8)
    curriculum.heed(rollout(1, 1.0, None, num=WINDOW), tracker)  # what is older than the window is forgotten
    assert (stream.level, curriculum.state_dict()) == (2, [])
    curriculum.heed(rollout(1, 1.0, num=WINDOW), tracker)  # it has moved on
    assert stream.level == 2


def test_the_state_is_that_of_the_window_and_the_level_is_logged():
    curriculum, stream, tracker = curriculum_at(1)
    curriculum.heed(rollout(1, 0.9, num=WINDOW - 1), tracker)
    resumed, other, _ = curriculum_at(1)
    resumed.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    for each in (curriculum, resumed):
        each.heed(rollout(1, 0.9), tracker)
    assert stream.level == other.level == 2
    assert tracker.take()["curriculum/level"] == 1


def test_it_needs_the_reward_that_it_decides_by():
    with pytest.raises(ValueError, match=r"`curriculum_threshold: 0\.5` decides by the reward `reasoning_gym`"):
        GRPOArguments(reward_funcs="accuracy", curriculum_threshold=0.5).validate()
    GRPOArguments(reward_funcs="accuracy, reasoning_gym", curriculum_threshold=0.5).validate()
