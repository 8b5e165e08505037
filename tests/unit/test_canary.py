"""The slope test on log-probabilities that are made up: known moves, known noise.

b, p, e as in `canary.Slope`: the trainer's before and now, and the engine's now. `true` is what a pass without
rounding would give.
"""

import json
import math
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grpo_stage.monitors.canary import StaleRolloutError
from grpo_stage.monitors.slope_test import Slope, SlopeTest
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup


TOKENS = 512


def drawn(seed: int, scale: float, count: int = TOKENS) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def slope_of(before: torch.Tensor, policy: torch.Tensor, engine: torch.Tensor, length: int = 32) -> Slope:
    slope = Slope()
    for b, p, e in zip(before.split(length), policy.split(length), engine.split(length), strict=True):
        slope.add([b], [p], [e])
    return slope


def test_by_hand():
    """Two prompts: x = 1, 2 and 1; y = 1, 1 and 2."""
    slope = Slope()
    slope.add([torch.tensor([-5.0, -5.0])], [torch.tensor([-4.0, -3.0])], [torch.tensor([-4.0, -4.0])])
    slope.add([torch.tensor([-5.0])], [torch.tensor([-4.0])], [torch.tensor([-3.0])])
    assert slope.value == pytest.approx(5 / 6)
    assert slope.num_clusters == pytest.approx(n := 36 / (25 + 1))
    # cluster scores xy - slope xx: 3 - 5/6 x 5, 2 - 5/6
    scores = np.array([3 - 25 / 6, 2 - 5 / 6])
    assert slope.error == pytest.approx(math.sqrt((scores**2).sum() * n / (n - 1)) / 6)
    assert slope.yy == 1 + 1 + 4


def test_a_cluster_is_a_block_of_eight_tokens_of_all_completions_of_a_prompt():
    slope = Slope()
    for lengths in ((8, 8), (16,), (3,)):
        slope.add(*[[torch.full((length,), value) for length in lengths] for value in (0.0, 1.0, 1.0)])
    sizes = np.array([16, 8, 8, 3])
    assert slope.num_clusters == pytest.approx(sizes.sum() ** 2 / (sizes**2).sum())


def test_few_tokens_that_hold_all_of_the_move_are_no_verdict():
    """As of a policy that has not moved, and whose passes round a few tokens otherwise."""
    for loud in (1, 2, 3, 5):
        for seed in range(50):
            noise = [drawn(100 * seed + i, 0.05) for i in range(2)]
            quiet = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))[loud:]
            for each in noise:
                each[quiet] = 0.0
            slope = slope_of(torch.zeros(TOKENS), noise[0], noise[1])
            assert not slope.is_defined or slope.is_sound


@pytest.mark.parametrize("loud_share", [0.01, 0.02, 0.05, 0.2])
def test_noise_that_few_tokens_have_is_no_alarm(loud_share):
    """A policy whose entropy has fallen: nearly all tokens are certain, and rounded 80 times less than the others."""
    for seed in range(150):
        chance = torch.rand(TOKENS, generator=torch.Generator().manual_seed(seed))
        scale = torch.where(chance < loud_share, 0.055, 0.0007).double()
        before, policy, engine = (drawn(10 * seed + i, 1.0) * scale for i in range(3))
        slope = slope_of(before, policy, engine)
        assert not slope.is_defined or slope.is_sound


@pytest.mark.parametrize("copies", [4, 8, 16])
def test_equal_completions_are_one_observation(copies):
    for seed in range(100):
        slope = Slope()
        for prompt in range(16 // copies):
            b, p, e = (drawn(1000 * seed + 10 * prompt + i, 0.05, 32) for i in range(3))
            slope.add([b] * copies, [p] * copies, [e] * copies)
        assert not slope.is_defined or slope.is_sound


def test_what_is_not_finite_is_left_out():
    slope = Slope()
    slope.add([torch.zeros(8)], [torch.full((8,), math.nan)], [torch.zeros(8)])
    assert slope == Slope()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 2.0])
def test_without_noise_it_is_the_share_that_arrived(share):
    move = drawn(0, 0.1)
    slope = slope_of(torch.zeros(TOKENS), move, share * move)
    assert slope.value == pytest.approx(share)
    assert slope.is_sound is (share == 1.0)


@pytest.mark.parametrize("move", [0.001, 0.01, 0.05, 0.2])
@pytest.mark.parametrize(("trainer_noise", "engine_noise"), [(0.05, 0.05), (0.05, 0.0), (0.0, 0.05), (0.02, 0.1)])
def test_noise_draws_a_sound_slope_towards_a_half_and_never_below(move, trainer_noise, engine_noise):
    """And one of an engine that is behind from 0 towards a half: the two stay on their sides."""
    sound, behind = Slope(), Slope()
    for seed in range(20):
        true = drawn(10 * seed, move)
        before, policy, engine = (
            drawn(10 * seed + i, s) for i, s in ((1, trainer_noise), (2, trainer_noise), (3, engine_noise))
        )
        for slope, answer in ((sound, true + engine), (behind, engine)):
            slope.add(before.split(32), (true + policy).split(32), answer.split(32))
    expected = 0.5 + 0.5 * move**2 / (move**2 + 2 * trainer_noise**2)
    assert sound.value == pytest.approx(expected, abs=4 * sound.error + 1e-3)
    assert behind.value == pytest.approx(1 - expected, abs=4 * behind.error + 1e-3)
    assert sound.is_sound


def test_the_standard_error_is_what_repeated_draws_show():
    """With errors that whole blocks share, which a formula for independent tokens would miss by a factor of 2."""
    move = drawn(1, 0.05)
    slopes = []
    for seed in range(300):
        noise = drawn(seed + 5, 0.05, TOKENS // 8).repeat_interleave(8)
        slopes.append(slope_of(torch.zeros(TOKENS), move, move + noise))
    values = np.array([slope.value for slope in slopes])
    assert np.mean([slope.error for slope in slopes]) == pytest.approx(values.std(), rel=0.15)
    assert values.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("share", "move", "noise"),
    [(0.0, 0.1, 0.05), (0.5, 0.2, 0.05), (0.5, 0.5, 0.02), (2.0, 0.1, 0.05), (0.7, 0.5, 0.01)],
)
def test_a_fault_that_stands_out_of_the_noise_is_found(share, move, noise):
    true = drawn(0, move)
    assert not slope_of(drawn(1, noise), true + drawn(2, noise), share * true + drawn(3, noise)).is_sound


def test_too_little_is_no_verdict():
    """Seven clusters and noise as large as the move: Student's t with six degrees of freedom allows for a lot."""
    true = drawn(0, 0.05, 56)
    assert slope_of(torch.zeros(56), true, drawn(1, 0.05, 56)).is_sound
    agreeing = slope_of(torch.zeros(16), torch.ones(16), torch.full((16,), 0.5))
    assert agreeing.error == 0
    assert agreeing.is_sound, "two clusters that agree by chance"
    assert not Slope().is_defined
    assert not slope_of(torch.zeros(8), drawn(0, 1.0, 8), drawn(0, 1.0, 8)).is_defined


def test_forgetting_alone_changes_no_verdict():
    slope = slope_of(drawn(0, 0.03), drawn(1, 0.05), drawn(1, 0.05) + drawn(2, 0.03))
    before = (slope.value, slope.error, slope.num_clusters)
    slope.forget(0.5)
    assert (slope.value, slope.error, slope.num_clusters) == pytest.approx(before)


def test_an_old_observation_is_forgotten():
    """100 sound syncs and 20 of an engine that is behind: over all it is sound, over the last ones it is not."""
    whole, last = Slope(), Slope()
    for sync in range(120):
        last.forget(1 - 1 / 16)
        true = drawn(sync, 0.1)
        for slope in (whole, last):
            engine = true * (sync < 100) + drawn(500 + sync, 0.02)
            for b, p, e in zip(torch.zeros(TOKENS).split(32), true.split(32), engine.split(32), strict=True):
                slope.add([b], [p], [e])
    assert whole.is_sound
    assert not last.is_sound


def completions_of(prompt: Prompt, version: int, length: int = 40) -> RolloutGroup:
    return RolloutGroup(
        prompt=prompt,
        policy_version=version,
        completions=tuple(
            Completion(
                token_ids=tuple(range(i, i + length)),
                sampling_logprobs=(-1.0,) * length,
                finish_reason=FinishReason.LENGTH if i % 2 else FinishReason.STOP,
                text="",
            )
            for i in range(4)
        ),
    )


PROMPTS = [Prompt(index=i, token_ids=(i,), messages=(), reference=None) for i in range(8)]


class World:
    """A policy whose log-probabilities wander with the version, an engine that has what it was given, and noise."""

    def __init__(self, has_adapter: bool = True, rate: float = 0.05, noise: float = 0.03, backlog: int = 0) -> None:
        self.rate, self.noise, self.backlog = rate, noise, backlog
        self.share = 1.0
        self.paths: dict[int, list[torch.Tensor]] = {}
        self.version = 0
        self.passes = 0
        self.asked: list[int] = []
        self.test = SlopeTest(
            backend="made up",
            score=self.policy,
            adapter_off=self.adapter_off if has_adapter else None,
            prompts=PROMPTS,
        )

    def true(self, groups, version: int) -> list[torch.Tensor]:
        rows = [(g.prompt.index, c.token_ids) for g in groups for c in g.completions]
        return [self.wandered(31 * prompt + tokens[0], version)[: len(tokens)] for prompt, tokens in rows]

    def wandered(self, row: int, version: int) -> torch.Tensor:
        path = self.paths.setdefault(row, [torch.full((40,), -2.0, dtype=torch.float64)])
        while len(path) <= version:
            path.append(path[-1] + drawn(1000 * len(path) + row, self.rate, 40))
        return path[version]

    def rounded(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        self.passes += bool(rows)
        return [row + drawn(77 * self.passes + i, self.noise, len(row)) for i, row in enumerate(rows)]

    def policy(self, groups):
        return tuple(row.float() for row in self.rounded(self.true(groups, self.version)))

    @contextmanager
    def adapter_off(self):
        version, self.version = self.version, 0
        yield
        self.version = version

    def score(self, groups):
        self.asked.append(sum(len(group.completions) for group in groups))
        held = self.true(groups, max(0, self.version - self.backlog))
        start = self.true(groups, 0)
        return self.rounded([s + self.share * (h - s) for s, h in zip(start, held, strict=True)])

    def step(self, groups=None):
        groups = [completions_of(prompt, self.version) for prompt in PROMPTS] if groups is None else groups
        figures = self.test.check(self.test.ask(self, groups, self.version), groups, self.version)
        self.version += 1
        return figures


@pytest.mark.parametrize("has_adapter", [True, False])
@pytest.mark.parametrize("noise", [0.0, 0.03, 0.3])
def test_a_sound_engine_is_quiet_over_200_syncs(has_adapter, noise):
    world = World(has_adapter, rate=0.01, noise=noise)
    for _ in range(200):
        figures = world.step()
    assert figures.keys() == {f"sampling/{f}/{n}" for f in ("slope", "slope_error") for n in ("start", "previous")}
    if noise == 0.0:
        assert figures["sampling/slope/start"] == pytest.approx(1)
        assert figures["sampling/slope/previous"] == pytest.approx(1)
    assert world.asked == [16] + [24] * 199, "16 completions of the first rollout, and 8 of the one before"


@pytest.mark.parametrize(
    ("fault", "match", "at_most"),
    [
        ({"share": 0.0}, "those of the model without its adapter by 0.[012]", 2),
        ({"share": 0.5}, "those of the model without its adapter by 0.[3-6]", 4),
        ({"share": 2.0}, "those of the model without its adapter by 1", 2),
        ({"backlog": 1}, "those of the (sync before|model without its adapter)", 2),
    ],
)
def test_each_fault_of_delivery_is_found_at_once_where_updates_are_large(fault, match, at_most):
    world = World()
    vars(world).update(fault)
    with pytest.raises(StaleRolloutError, match=match):  # noqa: PT012
        while world.version < 20:
            world.step()
    assert world.version <= at_most


@pytest.mark.parametrize("rate", [0.05, 0.04])
def test_an_engine_one_sync_behind_is_found_when_its_error_says_so(rate):
    """Small updates, one like the other in size: evidence adds up as the square root of the number of syncs."""
    noise = 0.03
    world = World(rate=rate, noise=noise, backlog=1)
    with pytest.raises(StaleRolloutError, match="those of the sync before"):  # noqa: PT012
        while world.version < 400:
            world.step()
    # Half a unit of distance, less what the noise takes of it and the margin, against 5.2 to 6 standard errors.
    kept = rate**2 / (rate**2 + 2 * noise**2)
    error_of_one_sync = math.sqrt(1.5) * noise / math.sqrt(8 * 32 * (rate**2 + 2 * noise**2))
    promised = (6 * error_of_one_sync / (0.5 * kept - 0.1)) ** 2
    assert world.version < 1.5 * promised + 3


@pytest.mark.parametrize("has_adapter", [True, False])
def test_what_was_there_before_the_run_counts_where_an_adapter_can_be_switched_off(has_adapter):
    """A continued adapter that never arrives, or a run that goes on with another engine."""
    world = World(has_adapter)
    world.version, world.share = 5, 0.0
    if has_adapter:
        with pytest.raises(StaleRolloutError, match=r"at step 5 .* those of the model without its adapter by 0"):
            world.step()
    else:
        world.step()


def test_a_fault_that_begins_late_is_found():
    """By the sums over the last syncs, after 27: those over the whole run hold 60 sound ones, and would take 70."""
    world = World(rate=0.04)
    for _ in range(60):
        world.step()
    world.backlog = 1
    with pytest.raises(StaleRolloutError, match="those of the sync before"):  # noqa: PT012
        while world.version < 100:
            world.step()


def test_one_sync_that_is_lost_is_found_at_once_where_updates_are_large():
    """30 sound syncs are in the memory, and do not hide it."""
    world = World(rate=0.1)
    for _ in range(30):
        world.step()
    world.backlog = 1
    with pytest.raises(StaleRolloutError, match=r"those of the sync before by -?0\.[0-3]"):
        world.step()


def test_a_version_is_looked_at_once_and_a_rank_may_have_sampled_nothing():
    world = World()
    assert world.step([]) == {}
    assert world.asked == [0], "it asks nothing, along with the ranks that are one engine with it"
    world.step()
    world.version -= 1  # dynamic sampling: another rollout of the same version
    assert world.step() == {}
    figures = world.step([])
    assert "sampling/slope/previous" in figures
    assert world.asked == [0, 16, 0, 24]


def test_the_shortest_prompts_are_asked_for():
    """An engine may hold the logits of a whole prompt to answer."""
    prompts = [Prompt(index=i, token_ids=(i,) * (20 - i), messages=(), reference=None) for i in range(20)]
    asked = []
    world = World()
    engine = SimpleNamespace(score=lambda groups: asked.extend(group.prompt.index for group in groups) or [])
    world.test.ask(engine, [completions_of(prompt, 0) for prompt in prompts], 0)
    assert asked == list(range(19, 3, -1))


def test_the_last_token_of_a_completion_is_left_out():
    """The engine wants room for one more, and there may be none."""
    world = World()
    lengths = []
    world.score = lambda groups: [  # type: ignore[method-assign]
        lengths.append(len(c.token_ids)) or torch.full((len(c.token_ids),), -2.0)
        for g in groups
        for c in g.completions
    ]
    groups = [completions_of(PROMPTS[0], 0, length=10), completions_of(PROMPTS[1], 0, length=1)]
    world.test.ask(world, groups, 0)
    assert lengths == [9, 9, 9, 9]


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_it_goes_on_from_a_checkpoint_and_can_be_undone(cut):
    whole, resumed = World(), World()
    expected = [whole.step() for _ in range(10)]
    seen = [resumed.step() for _ in range(cut)]
    state = json.loads(json.dumps(resumed.test.state_dict()))
    passes = resumed.passes
    before = resumed.test.state_dict()
    resumed.step()
    resumed.test.load_state_dict(before)
    assert json.loads(json.dumps(resumed.test.state_dict())) == state
    anew = World()
    anew.version, anew.passes = cut, passes
    anew.test.load_state_dict(state)
    seen += [anew.step() for _ in range(10 - cut)]
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert all(a != b for a, b in pairwise(seen[1:]))


def test_what_another_engine_has_shown_is_not_this_ones():
    world, other = World(), World()
    for _ in range(3):
        other.step()
    world.test.backend = "hf"
    before = world.test.state_dict()
    world.test.load_state_dict(json.loads(json.dumps(other.test.state_dict())))
    assert world.test.state_dict() == before


def test_completions_of_one_token_are_no_probe():
    world = World()
    short = [completions_of(prompt, 0, length=1) for prompt in PROMPTS]
    assert world.step(short) == {}
    assert world.asked == [0]
    world.step()
    assert world.asked == [0, 16], "the first rollout with a longer one"


class Replicas(World):
    """An engine of several servers, one of which is behind."""

    logprob_temperature = 1.0

    def __init__(self, num_servers: int, **changed: float) -> None:
        super().__init__(**changed)
        self.servers = [f"http://server-{i}" for i in range(num_servers)]
        self.behind = 0

    def score_each(self, groups):
        scores = {}
        for server in self.servers:
            self.backlog = self.behind if server == self.servers[-1] else 0
            scores[server] = self.score(groups)
        return scores

    def on_step(self) -> None: ...

    def sync(self, policy, version) -> None: ...

    def generate(self, prompts, sampling, step): ...

    def sleep(self) -> None: ...

    def close(self) -> None: ...


def test_one_server_of_many_that_is_behind_is_named():
    """In the mean over eight servers it would be an eighth of what is judged."""
    world = Replicas(8, rate=0.1)
    for _ in range(10):
        figures = world.step()
    assert 0.8 < figures["sampling/slope/previous"] < 1.1
    state = world.test.state_dict()
    world.test.load_state_dict(json.loads(json.dumps(state)))
    assert world.test.state_dict() == state
    world.behind = 1
    with pytest.raises(StaleRolloutError, match=r"engine at http://server-7 does not follow .* sync before"):
        world.step()


def test_a_server_that_is_out_for_a_while_is_tested_again():
    world = Replicas(2)
    for version in range(6):
        world.servers = ["http://server-0"] if version in (2, 3) else ["http://server-0", "http://server-1"]
        assert world.step() is not None
