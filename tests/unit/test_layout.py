"""The simulation of steps on several devices, against closed forms; a layout's syntax; what sharding leaves a rank."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch

from grpo_stage.layout.cards import CARDS, Card
from grpo_stage.layout.costs import EngineCost, ModelCost, Rates, Work, sync_seconds, update_cost
from grpo_stage.layout.simulation import NoRoomError, fixed, of_file, roll_out, simulate, uniform
from grpo_stage.layout.syntax import Layout, parse_layout
from grpo_stage.memory.optimizers import Trained
from grpo_stage.memory.parts import Budget, phase
from grpo_stage.memory.sharding import sharded
from grpo_stage.memory.sizes import Sizes
from grpo_stage.update.model_flops import TokenFlops


CARD = Card(name="round", memory=1e6, flops=1e6, memory_bandwidth=1e3, link=100.0, network=160.0)
EXACT = Rates(
    update=1, layer_s=0, prefill=1, memory=1, collective=1, token_s=0, sequence_s=0, reduction_s=0, sync_s=0.5, load=10
)
MODEL = ModelCost(
    num_layers=1, engine_weights=50.0, kv=2.0, kv_parts=4, engine_flops=0.0, key_flops=0.0,
    token=TokenFlops(3e3, 0.0, 0.0, 1e3), weights=40.0, gradients=20.0, sharded_gradients=10.0, delivered=100.0,
    is_adapter=False,
)  # fmt: skip
WORK = Work(num_prompts=1, group_size=2, prompt_length=3, checkpointing=False)


def engine(
    rates: Rates = EXACT, num_cards: int = 1, memory: float = 1e6, most: int = 1024, **model: float
) -> EngineCost:
    """An engine of round numbers, with what is named of the model replaced."""
    return EngineCost(
        card=CARD, num_cards=num_cards, model=dataclasses.replace(MODEL, **model), rates=rates, memory=memory,
        max_in_flight=most,
    )  # fmt: skip


def layout(text: str) -> Layout:
    """A layout of round cards."""
    return dataclasses.replace(parse_layout(text), card=CARD, engine_card=CARD)


def test_equal_lengths_have_a_closed_form():
    """L passes read the weights, and keys of B (P + a half to L - a half) tokens."""
    rollout = roll_out([engine(engine_flops=1e3)], 3, [[10, 10], [10, 10]])
    assert rollout.total == pytest.approx(2 * 3 * 1e-3 + (10 * 50 + 2 * 4 * (10 * 3 + 10 * 10 / 2)) / 1e3)
    assert rollout.parts["weights"] == pytest.approx(10 * 50 / 1e3)
    assert rollout.busy == rollout.total
    assert sum(rollout.parts.values()) == pytest.approx(rollout.total)


def test_unequal_lengths_are_the_sum_over_all_passes():
    """The jumps from end to end are what a loop over tokens adds up, overheads and several cards included."""
    lengths = [7, 1, 30, 12, 12, 4]
    rates = dataclasses.replace(EXACT, token_s=0.01, sequence_s=0.001, reduction_s=0.002)
    rollout = roll_out([engine(rates, num_cards=2)], 5, [lengths[:3], lengths[3:]])
    total = 0.0
    for done in range(max(lengths)):
        running = [length for length in lengths if length > done]
        read = 50.0 + 2.0 * sum(5 + done + 0.5 for _ in running)
        total += 0.01 + 0.001 * len(running) + 2 * 0.002 + read / 2 / 1e3
    assert rollout.total == pytest.approx(total)


def test_the_longer_of_bytes_and_operations_counts():
    slow = roll_out([engine(kv=1e-9, engine_flops=1e6)], 0, [[10, 10, 10]])
    assert slow.total == pytest.approx(10 * 3 * 1e6 / 1e6)
    assert slow.parts["compute"] == pytest.approx(slow.total - slow.parts["weights"])


def test_a_second_server_halves_what_is_read_for_completions_and_not_what_is_read_of_weights():
    groups = [[10] * 4] * 4
    keys, weights = {"engine_weights": 0.0}, {"kv": 1e-9}
    for model, share in ((keys, 1 / 2), (weights, 1)):
        one, two = (roll_out([engine(**model)] * count, 3, groups).total for count in (1, 2))
        assert two == pytest.approx(one * share)


def test_completions_wait_for_a_place_and_take_the_one_that_is_free_first():
    one = roll_out([engine(kv=1e-9, most=2)], 0, [[10] * 4])
    assert one.total == pytest.approx(2 * 10 * 50 / 1e3), "two at a time, twice"
    greedy = roll_out([engine(kv=1e-9, most=1)] * 2, 0, [[5, 1, 1, 1, 1, 1]])
    assert greedy.total == pytest.approx(5 * 50 / 1e3), "one server has the long one, the other all that are short"


def test_the_cache_limits_how_many_run_and_holds_a_prompt_once():
    """Room for 13 tokens of 2 bytes: a prompt of 3 and two completions of 5, and not a third."""
    tight = engine(memory=50 + 2 * 13)
    assert tight.capacity == 13
    rollout = roll_out([dataclasses.replace(tight, model=dataclasses.replace(MODEL, kv=2.0))], 3, [[5, 5, 5, 5]])
    alone = roll_out([engine()], 3, [[5, 5]])
    assert rollout.total == pytest.approx(2 * alone.total)
    with pytest.raises(NoRoomError, match="a prompt with a completion takes 14"):
        roll_out([tight], 3, [[11]])


def test_a_prompt_is_computed_once_on_each_server_that_has_a_part_of_its_group():
    work = engine(engine_flops=1e3, key_flops=2e3)
    prompt = (1e3 * 4 + 2e3 * 10) / 1e6
    one, two = roll_out([work], 4, [[2, 2]]), roll_out([work] * 2, 4, [[2, 2]])
    assert (one.parts["prompts"], two.parts["prompts"]) == pytest.approx((prompt, prompt))


def test_a_mixture_reads_the_experts_that_its_tokens_meet():
    mixture = engine(kv=0.0, engine_experts=40.0, expert_share=0.25)
    assert [round(1e3 * mixture.decode(n, 0).weights, 6) for n in (1, 2)] == [10 + 40 * 0.25, 10 + 40 * (1 - 0.75**2)]


def test_keys_are_divided_over_cards_as_far_as_there_are_heads():
    read = [engine(num_cards=n, engine_weights=0.0).decode(1, 100).keys for n in (1, 2, 4, 8)]
    assert read == pytest.approx([0.2, 0.1, 0.05, 0.05])


def test_the_tail_is_the_time_of_the_last_tenth():
    rollout = roll_out([engine(kv=1e-9)], 0, [[10] * 9 + [100]])
    assert rollout.tail == pytest.approx(90 * 50 / 1e3)


# An update


def test_an_update_on_one_card():
    cost = update_cost(layout("train 1xH100"), MODEL, WORK, EXACT, [[4, 6]])
    assert cost == pytest.approx((3e3 * (3 + 3 + 5) / 1e6, 0.0))
    plain = dataclasses.replace(WORK, shares_prompts=False)
    assert update_cost(layout("train 1xH100"), MODEL, plain, EXACT, [[4, 6]]).compute == pytest.approx(3e3 * 14 / 1e6)
    more = dataclasses.replace(WORK, checkpointing=True, num_iterations=2, num_scorings=1)
    once, again = 3e3 * 11 / 1e6, 1e3 * 13 / 1e6
    found = update_cost(layout("train 1xH100"), MODEL, more, EXACT, [[4, 6]]).compute
    assert found == pytest.approx(2 * (once + again) + once / 3)
    launched = dataclasses.replace(EXACT, layer_s=0.1)
    small = dataclasses.replace(WORK, max_tokens=5)
    found = update_cost(layout("train 1xH100"), MODEL, small, launched, [[4, 6]]).compute
    assert found == pytest.approx(once + 3 * 0.1), "13 tokens are three micro-batches of 5"


def test_what_ranks_move():
    """DDP: gradients twice, less each rank's own part. ZeRO-3: weights twice and gradients once a micro-batch."""
    small = dataclasses.replace(WORK, max_tokens=7)
    ddp, zero2, zero3 = (
        update_cost(layout(f"train 4xH100 {name}"), MODEL, small, EXACT, [[4, 6]]) for name in ("", "zero2", "zero3")
    )
    assert ddp.communication == pytest.approx(2 * 20 * 3 / 4 / 100)
    assert zero2.communication == pytest.approx(2 * 10 * 3 / 4 / 100)
    assert zero3.total == pytest.approx(2 * (2 * 40 + 10) * 3 / 4 / 100), "the computation is hidden behind it"
    slow = dataclasses.replace(EXACT, update=1e-3)
    hidden = update_cost(layout("train 4xH100 fsdp"), MODEL, small, slow, [[4, 6]])
    assert hidden.communication == 0
    assert hidden.compute == pytest.approx(ddp.compute * 1e3)
    apart = dataclasses.replace(layout("train 4xH100; nodes 2"), card=dataclasses.replace(CARD, network=10.0))
    assert update_cost(apart, MODEL, small, EXACT, [[4, 6]]).communication == pytest.approx(ddp.communication * 10)


# A delivery


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("train 1xH100", 10),
        ("train 4xH100 zero2", 10),
        ("train 4xH100 fsdp", 10 + 1),
        ("train 4xH100 fsdp; serve 2x2xH100", 10 + 1 + 1),
        ("train 8xH100; serve 2x4xH100", 10 + 100 / (160 / 8)),
    ],
)
def test_whole_weights_are_gathered_sent_and_taken(text, seconds):
    assert sync_seconds(layout(text), MODEL, EXACT) == pytest.approx(0.5 + seconds)


def test_an_adapter_is_only_sent():
    adapter = dataclasses.replace(MODEL, is_adapter=True, delivered=20.0)
    assert sync_seconds(layout("train 4xH100 fsdp"), adapter, EXACT) == 0.5
    assert sync_seconds(layout("train 4xH100 fsdp; serve 4xH100"), adapter, EXACT) == pytest.approx(0.5 + 20 / 100)


# Steps


def test_a_step_is_rollout_update_and_sync_by_turns():
    found = simulate(layout("train 2xH100"), MODEL, WORK, 1e6, fixed(10), rates=EXACT)
    assert found.step == pytest.approx(found.rollout + found.update + found.sync)
    assert found.rollout == pytest.approx(roll_out([engine()], 3, [[10, 10]]).total), "each card its own prompts"
    assert found.idle == {"train and sample": pytest.approx(0)}
    assert (found.num_prompts, found.num_tokens) == (2, 40)
    assert found.hours(1800) == pytest.approx(900 * found.step / 3600)
    assert found.tokens_per_s == pytest.approx(40 / found.step)


@pytest.mark.parametrize("speed", [1, 1e-3])
def test_ahead_a_step_is_the_longer_of_both(speed):
    rates = dataclasses.replace(EXACT, update=speed)
    place, small = layout("train 1xH100; serve 1xH100"), dataclasses.replace(MODEL, delivered=1.0)
    turns = simulate(place, small, WORK, 1e6, fixed(10), rates=rates)
    ahead = simulate(place, small, dataclasses.replace(WORK, runs_ahead=True), 1e6, fixed(10), rates=rates)
    assert turns.step == pytest.approx(turns.rollout + turns.update + turns.sync)
    assert ahead.step == pytest.approx(max(turns.rollout, turns.update) + turns.sync)
    idle = {"train": ahead.rollout - ahead.update, "serve": ahead.update - ahead.rollout}
    assert ahead.idle == {name: pytest.approx(max(0, seconds) / ahead.step) for name, seconds in idle.items()}
    assert ahead.bottleneck.startswith("rollout" if speed == 1 else "update")
    assert turns.idle["train"] == pytest.approx(turns.rollout / turns.step)


def test_all_wait_for_the_slowest():
    work = dataclasses.replace(WORK, group_size=1)
    place = layout("train 4xH100")
    random_ = random.Random(0)
    steps = [[random_.randint(1, 50) for _ in range(4)] for _ in range(5)]
    found = simulate(place, MODEL, work, 1e6, uniform(50), rates=EXACT)
    slowest = [max(3e3 * (3 + length - 1) / 1e6 for length in lengths) for lengths in steps]
    communication = 2 * 20 * 3 / 4 / 100
    assert found.update == pytest.approx(sum(slowest) / 5 + communication)
    assert found.idle["train and sample"] > 0.1


def test_ahead_needs_cards_of_its_own():
    with pytest.raises(ValueError, match="needs cards of its own"):
        simulate(layout("train 2xH100"), MODEL, dataclasses.replace(WORK, runs_ahead=True), 1e6, fixed(1))


def test_lengths_of_a_file(tmp_path: Path):
    file = tmp_path / "completions.jsonl"
    file.write_text("".join(json.dumps({"step": 1, "num_tokens": length}) + "\n" for length in (3, 3, 9)))
    random_ = random.Random(1)
    drawn = [of_file(file)(random_) for _ in range(300)]
    assert set(drawn) == {3, 9}
    assert drawn.count(3) / 300 == pytest.approx(2 / 3, abs=0.1)


@pytest.mark.parametrize("text", ["", "{}\n", "3\n", '{"num_tokens": 0}\n', '{"num_tokens": true}\n', '{"num_tok'])
def test_a_file_without_lengths_is_refused(tmp_path: Path, text: str):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"is no file of completions.*log_completions"):
        of_file(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        of_file(tmp_path / "none.jsonl")


# What a user writes


def test_layouts():
    both = parse_layout("train 24xH100 fsdp; serve 2x4xH200")
    assert (both.card, both.num_trainers, both.sharding) == (CARDS["H100"], 24, "fsdp")
    assert (both.engine_card, both.num_engines, both.engine_size) == (CARDS["H200"], 2, 4)
    assert (both.is_colocated, both.num_cards, both.num_nodes, both.cards_of_a_node) == (False, 32, 4, 8)
    alone = parse_layout("train 1x4090")
    assert (alone.is_colocated, alone.sharding, alone.num_engines, alone.engine_size) == (True, "none", 1, 1)
    assert parse_layout("serve 3x4090;train 2xa100;").num_engines == 3
    assert parse_layout("train 8xH100; colocate 2x4").engine_size == 4
    assert parse_layout("train 8xH100; nodes 2").cards_of_a_node == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "does not say which cards train"),
        ("serve 1xH100", "does not say which cards train"),
        ("train 8 H100", "is no part of a layout"),
        ("train 8xH100 zero4", "is no part of a layout"),
        ("teach 8xH100", "is no part of a layout"),
        ("train 8xB100", "no card that is known. Choose from 4090, A100, H100, H200"),
        ("train 0xH100", "must be at least 1"),
        ("train 8xH100; serve 0xH100", "must be at least 1"),
        ("train 8xH100; train 8xH100", "two parts `train`"),
        ("train 8xH100; serve 1xH100; colocate 8x1", "Leave one out"),
        ("train 8xH100; colocate 3x2", "are 6 cards, and 8 train"),
        ("train 2xH100; nodes 3", "3 nodes and 2 cards"),
    ],
)
def test_what_is_no_layout_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_layout(text)


# Memory


def test_sharding_divides_as_the_papers_say():
    """Bytes a weight in arXiv:1910.02054: 2 + 14 / N and 16 / N with Adam and gradients of 2; here they take 4."""
    count = 1000
    trained = (Trained("w", torch.Size([count]), 4),)
    sizes = Sizes(count, 0.0, 4.0 * count, 0.0, 0.0, trained)
    parts = {
        "weights, trained": 4.0 * count, "optimizer": 8.0 * count, "gradients": 4.0 * count,
        "gradient buckets": 4.0 * count, "activations": 77.0,
    }  # fmt: skip
    whole = Budget("GRPO", (phase("update", parts),))
    zero2, zero3 = (sharded(whole, name, 8, sizes, 2, 33.0).peak for name in ("zero2", "fsdp"))
    assert zero3.total == 16 * count / 8 + 33.0 + 77.0
    assert zero2.total - zero2.parts["gradient buckets"] == 2 * count + (14 + 2) * count / 8 + 77.0
    assert zero2.parts["gradient buckets"] == 2 * 2 * count
    frozen = Budget("GRPO", (phase("update", {"weights, frozen": 160.0, "reference": 16.0}),))
    nothing = dataclasses.replace(sizes, trainable=())
    assert sharded(frozen, "zero3", 8, nothing, 2, 0.0).peak.parts == {"weights, frozen": 20.0, "reference": 2.0}
    assert sharded(frozen, "zero2", 8, nothing, 2, 0.0).peak.parts == {"weights, frozen": 160.0, "reference": 16.0}
