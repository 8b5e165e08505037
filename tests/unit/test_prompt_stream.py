"""Which prompt is sampled from when."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_stage.rollout.epochs import PromptStream
from grpo_stage.rollout.prompts import build_prompts


sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)
worlds = st.integers(1, 6)
takes = st.lists(st.integers(1, 17), min_size=1, max_size=30)


def streams_of(num_prompts: int, seed: int, world_size: int) -> list[PromptStream]:
    return [PromptStream(num_prompts, seed, rank=rank, world_size=world_size) for rank in range(world_size)]


@given(num_prompts=sizes, seed=seeds, start=st.integers(0, 60), skipped=st.integers(0, 60))
def test_skipped_prompts_are_left_out_and_no_other(num_prompts, seed, start, skipped):
    """As if each had been taken alone; prompts that were dealt already do not come again."""
    expected, stream = PromptStream(num_prompts, seed), PromptStream(num_prompts, seed)
    for _ in range(max(start, skipped)):
        expected.take(1)
    for _ in range(start):
        stream.take(1)
    stream.skip_to(skipped)
    assert stream.num_taken == max(start, skipped)
    assert [stream.take(1) for _ in range(2 * num_prompts)] == [expected.take(1) for _ in range(2 * num_prompts)]


@given(num_prompts=sizes, seed=seeds, world_size=worlds, counts=takes)
def test_every_prompt_is_dealt_exactly_once_an_epoch(num_prompts, seed, world_size, counts):
    streams = streams_of(num_prompts, seed, world_size)
    dealt: dict[int, list[int]] = {}
    for count in counts:
        shares = [stream.take(count) for stream in streams]
        assert len({stream.epoch for stream in streams}) == 1
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        dealt.setdefault(streams[0].epoch, []).extend(index for share in shares for index in share)

    for epoch, indices in dealt.items():
        assert len(indices) == len(set(indices))
        if epoch < streams[0].epoch:
            assert sorted(indices) == list(range(num_prompts))
    assert streams[0].remaining() == num_prompts - len(dealt[streams[0].epoch])


@given(num_prompts=sizes, seed=seeds, world_size=worlds, counts=takes)
def test_the_ranks_together_hold_what_one_process_would(num_prompts, seed, world_size, counts):
    alone, streams = PromptStream(num_prompts, seed), streams_of(num_prompts, seed, world_size)
    for count in counts:
        whole, shares = alone.take(count), [stream.take(count) for stream in streams]
        assert [share for rank, share in enumerate(shares)] == [whole[rank::world_size] for rank in range(world_size)]
        assert sorted(index for share in shares for index in share) == sorted(whole)


@given(num_prompts=sizes, seed=seeds, counts=takes)
def test_a_call_never_crosses_an_epoch(num_prompts, seed, counts):
    stream = PromptStream(num_prompts, seed)
    for count in counts:
        left = stream.remaining() or num_prompts
        assert len(stream.take(count)) == min(count, left)
        assert stream.remaining() == left - min(count, left)


@given(num_prompts=sizes, seed=seeds, counts=takes, rest=takes, world_size=worlds, data=st.data())
def test_a_restored_stream_goes_on_identically_on_every_rank(num_prompts, seed, counts, rest, world_size, data):
    streams = streams_of(num_prompts, seed, world_size)
    for count in counts:
        for stream in streams:
            stream.take(count)
    states = [json.loads(json.dumps(stream.state_dict())) for stream in streams]
    assert all(state == states[0] for state in states)

    rank = data.draw(st.integers(0, world_size - 1))
    restored = PromptStream(num_prompts, seed, rank=rank, world_size=world_size)
    restored.load_state_dict(states[0])
    assert (restored.epoch, restored.remaining()) == (streams[rank].epoch, streams[rank].remaining())
    assert [restored.take(count) for count in rest] == [streams[rank].take(count) for count in rest]


@settings(max_examples=10)
@given(seed=seeds)
def test_the_global_generators_are_neither_read_nor_moved(seed):
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def reset() -> None:
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)

    reset()
    untouched = draw()
    reset()
    stream = PromptStream(9, seed)
    first = [stream.take(5) for _ in range(6)]
    assert draw() == untouched
    again = PromptStream(9, seed)
    assert [again.take(5) for _ in range(6)] == first


def test_epochs_and_seeds_are_shuffled_differently():
    def epochs(seed: int) -> list[list[int]]:
        stream = PromptStream(50, seed)
        return [stream.take(50) for _ in range(3)]

    orders = epochs(0) + epochs(1)
    assert len({tuple(order) for order in orders}) == 6
    assert list(range(50)) not in orders


def test_without_shuffling_the_order_is_the_datasets():
    stream = PromptStream(5, seed=3, shuffle=False)
    assert [stream.take(2) for _ in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]
    assert stream.epoch == 1


def test_a_rank_may_get_nothing():
    assert [stream.take(3) for stream in streams_of(2, 0, 4)][2:] == [[], []]


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (PromptStream(11, seed=1), "num_prompts=11"),
        (PromptStream(10, seed=2), "seed=2"),
        (PromptStream(10, seed=1, shuffle=False), "shuffle=False"),
    ],
)
def test_the_state_of_another_stream_is_refused(other, name):
    stream = PromptStream(10, seed=1)
    with pytest.raises(ValueError, match=name):
        stream.load_state_dict(other.state_dict())


@pytest.mark.parametrize("damage", [{"cursor": 11}, {"cursor": -1}, {"epoch": -1}])
def test_a_damaged_state_is_refused(damage):
    stream = PromptStream(10, seed=1)
    with pytest.raises(ValueError, match="damaged"):
        stream.load_state_dict(stream.state_dict() | damage)


@pytest.mark.parametrize("arguments", [{"num_prompts": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}])
def test_impossible_streams_are_refused(arguments):
    with pytest.raises(ValueError, match="got"):
        PromptStream(**({"num_prompts": 3, "seed": 0} | arguments))


@pytest.mark.parametrize("count", [0, -1])
def test_taking_nothing_is_refused(count):
    with pytest.raises(ValueError, match="got"):
        PromptStream(3, seed=0).take(count)


def record(token_ids: list[int]) -> str:
    return json.dumps({"token_ids": token_ids, "messages": [], "reference": None, "columns": {"id": len(token_ids)}})


def test_prompts_are_counted_and_indexed_after_dropping():
    records = [record([1, 2]), "null", record([1, 2, 3, 4]), record([5, 6, 7])]
    built = build_prompts(iter(records), max_length=3, overlong="drop")
    assert [(prompt.index, prompt.token_ids) for prompt in built.prompts] == [(0, (1, 2)), (1, (5, 6, 7))]
    assert [prompt.columns["id"] for prompt in built.prompts] == [2, 3]
    assert (built.num_rows, built.num_unreadable, built.num_overlong) == (4, 1, 1)


def test_truncation_keeps_the_end():
    built = build_prompts([record([1, 2, 3, 4]), record([1, 2])], max_length=3, overlong="truncate")
    assert [prompt.token_ids for prompt in built.prompts] == [(2, 3, 4), (1, 2)]
    assert built.num_overlong == 1
