"""Tools: what they may be, their process, and completions of several turns up to the gradient."""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_stage.algorithm.averages import StepTotals
from grpo_stage.arguments import GRPOArguments
from grpo_stage.board.groups import group_of
from grpo_stage.monitors.canary import beginnings
from grpo_stage.records.completion_groups import CompletionGroups
from grpo_stage.records.completions import CompletionsLog
from grpo_stage.records.metrics import MetricTracker, record_completions
from grpo_stage.rewards.loading import load_rewards
from grpo_stage.rewards.user_tools import load_tools
from grpo_stage.rewards.workers.tool_process import Reply, Request
from grpo_stage.rewards.workers.tool_worker import ToolError, ToolWorker
from grpo_stage.rollout.episodes import Episodes, EpisodeSettings, ToolCall, reset_request
from grpo_stage.rollout.serialization import load_step, step_state
from grpo_stage.types import (
    Completion,
    FinishReason,
    Prompt,
    RolloutGroup,
    Sample,
    SamplingSettings,
    ScoredGroup,
    Step,
    Turn,
)
from grpo_stage.update.attention import attention_of
from grpo_stage.update.batch import PaddedLayout, SharedPromptLayout, count_totals
from grpo_stage.update.credit import Credit
from grpo_stage.update.logprobs import Forward


VOCAB = 61
CPU = torch.device("cpu")
FILE = '''
import os, random, time
from math import sqrt

SEEN = []


def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: the first.
        b: the second.
    """
    SEEN.append(a)
    assert SEEN == [a], "an earlier call was seen"
    return a * b


def fail(how: str) -> str:
    """Fail.

    Args:
        how: in which way.
    """
    if how == "exit":
        os._exit(3)
    if how == "hang":
        time.sleep(60)
    if how == "nap":
        time.sleep(6)
    if how == "huge":
        return "x" * 3_000_000
    raise ValueError(f"failed by {how}")


async def draw() -> dict:
    """Draw a number."""
    return {"drawn": random.random()}


def untyped(a) -> int:
    """Add one.

    Args:
        a: a number.
    """


def undocumented(a: int) -> int:
    return a


def half_documented(a: int, b: int) -> int:
    """Add.

    Args:
        a: the first.
    """


class Game:
    def __init__(self):
        self.guesses = []

    def reset(self, low, **row):
        self.secret = random.randint(low, low + 99)
        return f" The number is at least {low}."

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: the guess.
        """
        if number < 0:
            os._exit(1)
        if number == 0:
            time.sleep(60)
        self.guesses.append(number)
        return f"{len(self.guesses)}: {number == self.secret}"

    def get_reward(self):
        return 1 / len(self.guesses) if self.guesses else None

    def _hidden(self): ...


class Hungry:
    def __init__(self, food): ...
    def reset(self): ...
    def eat(self) -> str:
        """Eat."""


class Bare:
    def reset(self): ...


NUMBER = 3
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tools") / "my_tools.py"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def worker(file: Path) -> Iterator[ToolWorker]:
    """One process for all tests: its start is what takes time."""
    names = [f"{file}:{name}" for name in ("multiply", "fail", "draw")]
    started = ToolWorker(load_tools(names, f"{file}:Game", file.parent, print).load, timeout_s=1.5)
    yield started
    started.close()


# What a tool may be


def test_the_model_is_told_of_functions_and_methods(file):
    said: list[str] = []
    tools = load_tools(["my_tools.py:multiply", f"{file}:draw"], "my_tools.py:Game", file.parent, said.append)
    assert tools.names == ("multiply", "draw", "guess")
    assert tools.schemas[0] == {
        "type": "function",
        "function": {
            "name": "multiply",
            "description": "Multiply two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "the first."},
                    "b": {"type": "integer", "description": "the second."},
                },
                "required": ["a", "b"],
            },
        },
    }
    assert list(tools.schemas[2]["function"]["parameters"]["properties"]) == ["number"]
    assert tools.has_environment
    assert tools.has_reward
    assert [line.split(" of ")[0] for line in said] == [
        f"Tool code that will run: function `{name}`" for name in ("multiply", "draw", "Game")
    ]
    assert set(tools.code) == {"tools/multiply", "tools/draw", "environment/Game"}


@pytest.mark.parametrize(
    ("tools", "environment", "words"),
    [
        (["untyped"], None, "`tools: .*:untyped` cannot be told to the model.*missing a type hint.*def add"),
        (["undocumented"], None, "cannot be told to the model.*no docstring.*Args:"),
        (["half_documented"], None, "cannot be told to the model.*b"),
        (["nowhere"], None, "has no 'nowhere'"),
        (["sqrt"], None, "'sqrt' is only imported in"),
        (["NUMBER"], None, "NUMBER` is int: a tool is a function"),
        (["Game"], None, "A class with methods"),
        (["multiply", "multiply"], None, "two functions called 'multiply'"),
        ([], "multiply", "an environment is a class"),
        ([], "Hungry", "needs food to be made"),
        ([], "Bare", "has no tools: its public methods"),
        ([], "NUMBER", "NUMBER` is int"),
    ],
)
def test_what_cannot_be_a_tool_is_refused(file, tools, environment, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        load_tools(
            [f"{file}:{name}" for name in tools], environment and f"{file}:{environment}", file.parent, lambda _: None
        )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("os:system", "does not name a function of a file of yours"),
        ("my_tools.py", "does not name a function"),
        ("missing.py:f", "there is no file"),
        (f"{json.__file__}:loads", "Python's own"),
        (f"{torch.__file__}:manual_seed", "belongs to an installed package"),
    ],
)
def test_a_tool_is_code_of_the_user(file, spec, words):
    with pytest.raises(ValueError, match=words):
        load_tools([spec], None, file.parent, lambda _: pytest.fail("nothing may be loaded"))


def test_a_file_that_cannot_be_loaded_and_one_that_has_changed(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    with pytest.raises(ValueError, match=r"cannot be loaded: ZeroDivisionError.*Mend it"):
        load_tools([f"{broken}:f"], None, tmp_path, lambda _: None)
    file = tmp_path / "changing.py"
    file.write_text('def now() -> int:\n    """Say it."""\n    return 1\n')
    tools = load_tools([f"{file}:now"], None, tmp_path, lambda _: None)
    file.write_text(file.read_text().replace("1", "2"))
    with pytest.raises(ValueError, match="has changed since the run began"):
        tools.load()


# Their process


def test_calls_are_answered_apart_and_in_order(worker):
    requests = [Request(i, "multiply", {"a": i, "b": 10}, seed=i) for i in range(5)]
    assert worker.run(requests) == [Reply(str(10 * i)) for i in range(5)]  # and none sees another one's list
    first, again, other = worker.run([Request(0, "draw", {}, seed) for seed in (4, 4, 5)])
    assert first == again != other
    assert json.loads(first.value)["drawn"] < 1


def test_what_fails_is_an_answer_and_ends_nothing_else(worker):
    started = time.monotonic()
    replies = worker.run(
        [
            *(Request(0, "fail", {"how": how}, 0) for how in ("hang", "exit", "hang", "value", "huge")),
            Request(0, "multiply", {"a": 1}, 0),
            Request(0, "multiply", {"a": 2, "b": 3}, 0),
        ]
    )
    assert time.monotonic() - started < 10  # those that hang do it at the same time
    texts = [reply.value for reply in replies]
    assert texts[0] == texts[2] == "Error: it took longer than 1.5 s and was ended."
    assert texts[1] == "Error: its process ended with exit code 3."
    assert texts[3] == "Error: ValueError: failed by value"
    assert len(texts[4]) == 1_000_000
    assert "missing 1 required positional argument: 'b'" in texts[5]
    assert texts[6] == "6"
    assert [reply.is_error for reply in replies] == [True, True, True, True, False, True, False]


def test_each_episode_has_an_environment_of_its_own(worker):
    columns = {"low": 5, "question": "?"}
    resets = worker.run([reset_request(episode, columns) for episode in (1, 2)])
    assert [reply.value for reply in resets] == [" The number is at least 5."] * 2

    def guess(episode: int, number: int) -> Request:
        return Request(episode, "guess", {"number": number}, 0)

    found = worker.run([guess(1, n) for n in range(5, 105)])
    secret = next(i for i, reply in enumerate(found) if reply.value.endswith("True")) + 5
    (same,) = worker.run([guess(2, secret)])
    assert same.value == "1: True"  # a row's environments begin alike, and neither sees the other's guesses
    died, gone = worker.run([guess(2, -1), guess(2, 3)])
    assert died.value == "Error: its process ended with exit code 1."
    assert gone.is_gone
    rewards = worker.run([Request(episode, "get_reward", {}, 0) for episode in (1, 2)])
    assert rewards[0] == Reply(1 / 100)
    assert rewards[1].is_gone
    worker.end([1, 2])
    assert worker.run([guess(1, 3)])[0].is_gone
    failed = worker.run([reset_request(1, {"high": 3})])
    assert "missing 1 required positional argument: 'low'" in failed[0].value


def test_replies_come_as_they_are_there_and_those_of_an_ended_episode_never(file):
    def quick(n: int) -> Request:
        return Request(0, "multiply", {"a": n, "b": 1}, 0)

    names = [f"{file}:{name}" for name in ("multiply", "fail")]
    tools = load_tools(names, f"{file}:Game", file.parent, lambda _: None)
    worker = ToolWorker(tools.load, timeout_s=60, patience_s=2)
    worker.run([quick(1)])  # its process has started
    began = time.monotonic()
    numbers = worker.begin([Request(0, "fail", {"how": "nap"}, 0), *map(quick, range(1, 20))])  # not all at once
    assert worker.replies(is_needed=False) == {number: Reply(f"{n}") for n, number in enumerate(numbers) if n > 0}
    assert worker.replies(is_needed=False) == {}
    later = worker.begin([quick(3)])
    assert worker.replies() == {later[0]: Reply("3")}
    assert time.monotonic() - began < 6, "the slow one was waited for"
    assert worker.replies() == {numbers[0]: Reply("Error: ValueError: failed by nap", is_error=True)}
    assert worker.replies() == {}
    worker.run([reset_request(3, {"low": 1})])
    worker.begin([Request(3, "guess", {"number": 0}, 0)] * 2)
    worker.end([3])
    assert worker.run([quick(4)]) == [Reply("4")]
    assert worker.replies() == {}
    worker.close()


def test_a_stop_ends_the_calls_and_the_next_one_starts_anew(file):
    worker = ToolWorker(load_tools([f"{file}:fail"], None, file.parent, lambda _: None).load, timeout_s=60)

    def stop() -> None:
        raise KeyboardInterrupt

    worker.check = stop
    with pytest.raises(KeyboardInterrupt):
        worker.run([Request(0, "fail", {"how": "hang"}, 0)])
    worker.check = lambda: None
    assert worker.run([Request(0, "fail", {"how": "again"}, 0)])[0].value == "Error: ValueError: failed by again"
    worker.close()
    worker.close()


# Completions of several turns

END, CALL, UNKNOWN = 1, 2, 8
"""The token that ends a turn, the one that asks for a tool, and one before which that is no tool there is."""


class Letters:
    """A format in which tokens are letters, and results are told between 50 and 51."""

    def text(self, token_ids: Sequence[int], finish_reason: FinishReason) -> str:
        ids = token_ids[:-1] if finish_reason is FinishReason.STOP else token_ids
        return "".join(chr(97 + token) for token in ids)

    def calls(self, token_ids: Sequence[int]) -> Sequence[ToolCall]:
        number = list(token_ids).count(CALL)
        name = "unknown" if token_ids[0] == UNKNOWN else "echo"
        return [ToolCall(name, json.dumps({"n": token_ids[0]}))] * number

    def results(self, last_token: int, results: Sequence[str], most_tokens: int) -> tuple[tuple[int, ...], str] | None:
        text = ",".join(results)[: max(0, most_tokens - 2)]
        return None if most_tokens < 2 else ((50, *(ord(c) % VOCAB for c in text), 51), text)


class Planned:
    """An engine whose turns are planned by prompt and turn; notes what it is asked."""

    logprob_temperature = 0.7

    def __init__(self, plan: dict[int, list[tuple[int, ...]]]) -> None:
        self.plan = {index: list(turns) for index, turns in plan.items()}
        self.asked: list[tuple[list[Prompt], SamplingSettings]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> list[RolloutGroup]:
        self.asked.append((list(prompts), sampling))
        groups = []
        for prompt in prompts:
            completions = []
            for _ in range(sampling.num_generations):
                ids = self.plan[prompt.token_ids[0]].pop(0)
                reason = FinishReason.STOP if ids[-1] == END else FinishReason.LENGTH
                logprobs = tuple(-0.01 * token for token in ids)
                completions.append(
                    Completion(token_ids=ids, sampling_logprobs=logprobs, finish_reason=reason, text="")
                )
            groups.append(RolloutGroup(prompt=prompt, completions=tuple(completions), policy_version=4))
        return groups


class Echo:
    def __init__(self, text: str = "r") -> None:
        self.asked: list[list[Request]] = []
        self.text = text

    def begin(self, requests: Sequence[Request]) -> list[int]:
        self.asked.append(list(requests))
        return list(range(len(requests)))

    def replies(self, is_needed: bool) -> dict[int, Reply]:
        return {
            number: Reply(self.text, is_error=request.arguments == {"n": 9})
            for number, request in enumerate(self.asked[-1])
        }

    def end(self, episodes: Sequence[int]) -> None: ...


def play(plan: dict[int, list[tuple[int, ...]]], runner: Any = None, group: int = 1, **settings: Any) -> Any:
    engine = Planned(plan)
    runner = runner or Echo()
    room = settings.pop("room", 40)
    chosen = EpisodeSettings(
        **{"tools": ("echo",), "max_turns": 3, "max_turn_tokens": settings.pop("turn_room", room)} | settings
    )
    episodes = Episodes(engine, Letters(), runner, chosen)  # type: ignore[arg-type]
    prompts = [Prompt(index=i, token_ids=(i, 7), messages=(), reference=None) for i in plan]
    sampling = SamplingSettings(num_generations=group, max_new_tokens=room, temperature=1.0)
    return episodes.generate(prompts, sampling, 5), engine, runner


def test_rounds_go_on_with_what_was_written_until_none_asks():
    groups, engine, runner = play({0: [(3, CALL, END), (4, END)], 5: [(6, END)], 8: [(9, CALL, CALL, END), (10, END)]})
    first, second, third = (group.completions[0] for group in groups)
    assert first.token_ids == (3, CALL, END, 50, ord("r") % VOCAB, 51, 4, END)
    assert first.sampled_mask == (1, 1, 1, 0, 0, 0, 1, 1)
    assert first.sampled_ids == (3, CALL, END, 4, END)
    assert first.num_sampled == 5
    assert first.sampling_logprobs == (-0.03, -0.02, -0.01, 0.0, 0.0, 0.0, -0.04, -0.01)
    assert second.token_ids == (6, END)
    assert [turn.num_tokens for turn in second.turns] == [2]
    assert [(turn.num_calls, turn.num_errors) for turn in third.turns] == [(2, 0), (2, 2), (0, 0)]
    assert [len(prompts) for prompts, _ in engine.asked] == [3, 2]  # both unfinished ones together
    again = engine.asked[1][0]
    assert again[0].token_ids == (0, 7, *first.token_ids[:6])
    assert len(runner.asked) == 1
    assert len({request.seed for request in runner.asked[0]}) == 3
    assert {group.policy_version for group in groups} == {4}
    assert first.finish_reason is FinishReason.STOP
    assert first.text == first.turns[0].text + "b" + Letters().text(first.token_ids[3:], FinishReason.STOP)


class Slow(Echo):
    """Answers calls with n = 9 only where nothing else is under way, and sometimes a call of an earlier rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.open: dict[int, Request] = {}
        self.needed: list[bool] = []

    def begin(self, requests: Sequence[Request]) -> list[int]:
        self.asked.append(list(requests))
        numbers = [100 * len(self.asked) + i for i in range(len(requests))]
        self.open |= zip(numbers, requests, strict=True)
        return numbers

    def replies(self, is_needed: bool) -> dict[int, Reply]:
        self.needed.append(is_needed)
        now = [number for number, request in self.open.items() if request.arguments != {"n": 9}]
        if is_needed and not now:
            now = list(self.open)
        return {7: Reply("stale")} | {number: Reply(f"{self.open.pop(number).arguments['n']}") for number in now}


def test_a_slow_tool_keeps_only_its_own_completion_waiting():
    plan = {
        0: [(3, CALL, END), (4, CALL, END), (5, END)],
        5: [(9, CALL, CALL, END), (10, CALL, END), (11, END)],
        8: [(6, CALL, END), (12, END)],
    }  # fmt: skip
    groups, engine, runner = play(plan, Slow())
    assert [[prompt.token_ids[0] for prompt in prompts] for prompts, _ in engine.asked] == [
        [0, 5, 8],
        [0, 8],
        [0],
        [5],
        [5],
    ]
    assert runner.needed == [True] * 4
    at_once, _, _ = play(plan, Quick())
    assert groups == at_once  # and nothing else depends on who waited
    assert [[turn.text for turn in group.completions[0].turns if not turn.is_sampled] for group in groups] == [
        ["3", "4"], ["9,9", "10"], ["6"],
    ]  # fmt: skip


def test_what_is_answered_with_an_error_waits_for_no_tool():
    _, engine, runner = play({0: [(UNKNOWN, CALL, END), (4, END)], 5: [(9, CALL, END), (10, END)]}, Slow())
    assert [[prompt.token_ids[0] for prompt in prompts] for prompts, _ in engine.asked] == [[0, 5], [0], [5]]
    assert runner.needed == [False, True]


class Quick(Slow):
    def replies(self, is_needed: bool) -> dict[int, Reply]:
        return {number: Reply(f"{self.open.pop(number).arguments['n']}") for number in list(self.open)}


def test_seeds_of_later_turns_differ_and_depend_on_prompt_sample_and_turn_alone():
    def indices(plan: dict[int, list[tuple[int, ...]]]) -> list[int]:
        _, engine, _ = play(plan, group=2)
        return [prompt.index for prompts, _ in engine.asked[1:] for prompt in prompts]

    calls = [(3, CALL, END)] * 4 + [(4, END)] * 2
    both = indices({0: calls, 1: calls})
    assert len({*both, 0, 1}) == 10
    assert indices({1: calls}) == [*both[2:4], *both[6:]]


def test_a_completion_ends_with_its_turns_and_says_what_nobody_answers():
    groups, engine, runner = play({0: [(3, CALL, END)] * 3})
    (completion,) = groups[0].completions
    assert [turn.is_sampled for turn in completion.turns] == [True, False, True, False, True]
    assert completion.turns[-1].num_calls == 1
    assert len(engine.asked) == 3
    assert len(runner.asked) == 2
    tracker = MetricTracker()
    record_completions(tracker, [completion])
    metrics = tracker.take()
    assert metrics["completions/mean_turns"] == 3
    assert metrics["tools/call_frequency"] == 2
    assert metrics["tools/unanswered_frac"] == 1
    assert metrics["completions/mean_length"] == 9  # what was sampled
    assert metrics["completions/clipped_ratio"] == 0


def test_the_room_is_for_all_turns_and_results_together():
    groups, engine, _ = play({0: [(3, CALL, END), (4,) * 9]}, room=13)
    (completion,) = groups[0].completions
    assert engine.asked[1][0][0].room == 13 - 6
    assert len(completion.token_ids) == 13  # an engine that looks at no room is cut
    assert completion.finish_reason is FinishReason.LENGTH
    groups, engine, _ = play({0: [(3, CALL, END), (4, END)]}, room=60, turn_room=20)
    assert [sampling.max_new_tokens for _, sampling in engine.asked] == [20, 20]


def test_results_take_half_of_the_room_that_is_left_and_are_cut_or_end_the_completion(caplog):
    groups, *_ = play({0: [(3, CALL, END), (4, END)]}, Echo("r" * 30), room=23)
    (completion,) = groups[0].completions
    assert completion.turns[1].is_cut
    assert completion.turns[1].num_tokens == 10
    assert "were cut to 10 tokens" in caplog.text
    groups, engine, _ = play({0: [(3, CALL, END)]}, room=6)
    (completion,) = groups[0].completions
    assert completion.token_ids == (3, CALL, END)
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.turns[-1].num_calls == 1
    assert len(engine.asked) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (ToolCall("other", "{}"), "there is no tool 'other'; there are echo."),
        (ToolCall("echo", "[1]"), "the arguments of 'echo' must be a JSON object"),
        (ToolCall("echo", "{"), "the arguments of 'echo' must be a JSON object"),
    ],
)
def test_a_call_that_cannot_be_run_is_answered(monkeypatch, call, words):
    monkeypatch.setattr(Letters, "calls", lambda self, ids: [call] if CALL in ids else [])
    groups, _, runner = play({0: [(3, CALL, END), (4, END)]}, room=400)
    result = groups[0].completions[0].turns[1]
    assert words in result.text
    assert result.num_errors == 1
    assert runner.asked == []


def test_no_prompts_are_no_completions():
    groups, _, runner = play({})
    assert groups == []
    assert runner.asked == []


def test_an_environment_is_made_for_each_completion_and_gives_its_reward():
    class World(Echo):
        ended: Sequence[int] = ()

        def run(self, requests: Sequence[Request]) -> list[Reply]:
            self.asked.append(list(requests))
            kinds = {"reset": Reply(None), "get_reward": Reply(0.5), "echo": Reply("r")}
            return [
                Reply("gone", is_error=True, is_gone=True)
                if request.name == "get_reward" and request.episode == 1
                else kinds[request.name]
                for request in requests
            ]

        def end(self, episodes: Sequence[int]) -> None:
            self.ended = episodes

    plan = {0: [(3, CALL, END), (3, END), (4, END)]}
    groups, _, world = play(plan, World(), group=2, has_environment=True, has_reward=True)
    assert [each.environment_reward for each in groups[0].completions] == [0.5, None]
    assert [[request.name for request in asked] for asked in world.asked] == [
        ["reset"] * 2, ["echo"], ["get_reward"] * 2
    ]  # fmt: skip
    assert world.ended == [0, 1]
    seeds = [request.seed for request in world.asked[0]]
    assert seeds[0] == seeds[1]
    for reply, words in (
        (Reply("Error: boom", is_error=True), "`reset` of the environment failed for prompt 0"),
        (Reply("other"), "another text for prompt 0"),
    ):
        broken = World()
        broken.run = lambda requests, reply=reply: [reply for _ in requests]  # type: ignore[method-assign]
        with pytest.raises(ToolError, match=words):
            play({0: [(3, END)]}, broken, has_environment=True)
        assert broken.ended == [0]


# Their way through the update


def turn(num_tokens: int, is_sampled: bool, **counts: Any) -> Turn:
    return Turn(num_tokens=num_tokens, text="w" * num_tokens, is_sampled=is_sampled, **counts)


def completion_of(lengths: Sequence[int], seed: int) -> Completion:
    """Turns of these lengths, the policy's and results by turns."""
    generator = torch.Generator().manual_seed(seed)
    turns = tuple(turn(length, i % 2 == 0) for i, length in enumerate(lengths))
    mask = [each.is_sampled for each in turns for _ in range(each.num_tokens)]
    return Completion(
        token_ids=tuple(torch.randint(VOCAB, (sum(lengths),), generator=generator).tolist()),
        sampling_logprobs=tuple(-1.0 if sampled else 0.0 for sampled in mask),
        finish_reason=FinishReason.STOP,
        text="text",
        turns=turns if len(lengths) > 1 else (),
    )


def samples() -> list[Sample]:
    prompts = [Prompt(index=i, token_ids=(1, 2, 3 + i), messages=(), reference=None) for i in range(2)]
    groups = [
        ScoredGroup(
            group=RolloutGroup(
                prompt=prompt,
                completions=(
                    completion_of((2, 3, 4, 1, 2), i),
                    completion_of((5,), 9 + i),
                    completion_of((1, 2, 1), 7),
                ),
                policy_version=0,
            ),
            rewards=((1.0,), (0.0,), (0.5,)),
            total_rewards=(1.0, 0.0, 0.5),
        )
        for i, prompt in enumerate(prompts)
    ]
    return [sample for of in Credit("grpo", "group", (1.0,), False).assign(groups) for sample in of]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("layout", [PaddedLayout(0, CPU), SharedPromptLayout(0, CPU)])
def test_results_are_read_and_have_no_loss_and_no_gradient(model, layout, is_chunked):
    step = samples()
    totals = count_totals(step, 100)
    assert totals == StepTotals(num_completions=6, num_tokens=30, max_completion_length=100)  # 8 + 5 + 2 of a group
    batch = layout.samples(step, totals, "dapo")
    seen: list[torch.Tensor] = []

    def keep(_: Any, __: Any, logits: torch.Tensor) -> None:
        if not is_chunked:
            logits.retain_grad()
            seen.append(logits)

    handle = model.lm_head.register_forward_hook(keep)
    with attention_of(model, batch.inputs.shared_prompts):
        found = Forward(layout, is_chunked=is_chunked).statistics(model, batch, 1.0)
        (batch.loss_weights * -found.logprobs * batch.advantages.unsqueeze(1)).sum().backward()
    handle.remove()
    for row, sample in enumerate(step):
        ids = torch.tensor([[*sample.prompt.token_ids, *sample.completion.token_ids]])
        length = len(sample.completion.token_ids)
        with torch.no_grad():
            plain = model(input_ids=ids).logits[0, -length - 1 : -1].log_softmax(-1)[range(length), ids[0, -length:]]
        mask = torch.tensor(sample.completion.sampled_mask)
        assert torch.allclose(found.logprobs[row, :length], plain * mask, atol=1e-5)
        assert torch.equal(found.logprobs[row, :length] == 0, mask == 0)
        assert torch.equal(found.entropies[row, :length] == 0, mask == 0)
        assert torch.equal(batch.loss_weights[row, :length] > 0, mask == 1)
        assert sample.loss_mask == sample.completion.sampled_mask
    if not is_chunked and isinstance(layout, PaddedLayout):  # the logits of all positions are there
        (logits,) = seen
        gradients = logits.grad.flatten(0, 1).abs().sum(dim=1)
        length = batch.inputs.input_ids.size(1)
        offset = length - logits.size(1)
        taught = {int(p) // length * logits.size(1) + int(p) % length - offset for p in batch.inputs.predictors}
        assert {i for i, value in enumerate(gradients.tolist()) if value != 0.0} <= taught
        assert len(taught) == 30


def test_a_result_that_differs_changes_later_tokens_alone(model):
    layout = PaddedLayout(0, CPU)
    one = samples()[:1]
    changed = list(one[0].completion.token_ids)
    changed[3] = (changed[3] + 1) % VOCAB
    other = [dataclasses.replace(one[0], completion=dataclasses.replace(one[0].completion, token_ids=tuple(changed)))]
    with torch.no_grad():
        first, second = (
            Forward(layout).statistics(model, layout.samples(each, count_totals(one, 9), "dapo"), 1.0).logprobs[0]
            for each in (one, other)
        )
    assert torch.equal(first[:5], second[:5])
    assert (first[5:9] != second[5:9]).all()


def test_a_token_baseline_counts_sampled_tokens_alone():
    whole, bare = samples()[:3], []
    energies = []
    for sample in whole:
        mask = torch.tensor(sample.completion.sampled_mask)
        energies.append(torch.rand(len(mask), generator=torch.Generator().manual_seed(1)) * mask + 5 * (1 - mask))
    credit = Credit("optimal_token_baseline", "none", (1.0,), False)
    group = ScoredGroup(
        group=RolloutGroup(prompt=whole[0].prompt, completions=tuple(s.completion for s in whole), policy_version=0),
        rewards=((1.0,), (0.0,), (0.5,)),
        total_rewards=(1.0, 0.0, 0.5),
        energies=tuple(energies),
    )
    for sample in whole:
        ids = sample.completion.sampled_ids
        bare.append(
            Completion(token_ids=ids, sampling_logprobs=(0.0,) * len(ids), finish_reason=FinishReason.STOP, text="")
        )
    short = dataclasses.replace(
        group,
        group=dataclasses.replace(group.group, completions=tuple(bare)),
        energies=tuple(
            e[torch.tensor(s.completion.sampled_mask, dtype=torch.bool)] for e, s in zip(energies, whole, strict=True)
        ),
    )
    (found,), (expected,) = credit.assign([group]), credit.assign([short])
    for own, other in zip(found, expected, strict=True):
        mask = torch.tensor(own.completion.sampled_mask, dtype=torch.bool)
        assert own.token_advantages is not None
        assert torch.equal(own.token_advantages[mask], other.token_advantages)
        assert not own.token_advantages[~mask].any()
        assert own.advantage == other.advantage


def test_a_step_with_turns_survives_json_exactly():
    step = Step(samples=tuple(samples()), logprob_temperature=0.7)
    prompts = [sample.prompt for sample in step.samples[::3]]
    state = json.loads(json.dumps(step_state(step)))
    assert load_step(state, prompts).samples[0].completion == step.samples[0].completion
    assert step_state(load_step(state, prompts)) == step_state(step)
    assert "turns" not in state["samples"][1]["completion"]  # of one turn


def test_the_canary_asks_for_the_first_turn_alone():
    completions = (completion_of((4, 3, 9), 1),)
    (probe,) = beginnings([RolloutGroup(prompt=samples()[0].prompt, completions=completions, policy_version=0)], 1)
    (begun,) = probe.completions
    assert len(begun.token_ids) == 3
    assert begun.sampled_mask == (1, 1, 1)


def test_episodes_are_shown_by_turn(tmp_path):
    log = CompletionsLog(str(tmp_path), ["r"], 1, is_writer=True)
    turns = (
        Turn(num_tokens=3, text="<think>hm</think>f\n{}", is_sampled=True, num_calls=1),
        Turn(num_tokens=2, text="<b>42", is_sampled=False, num_calls=1, num_errors=1, is_cut=True),
        Turn(num_tokens=4, text="It is 42", is_sampled=True),
    )
    sample = dataclasses.replace(
        samples()[0], completion=dataclasses.replace(completion_of((3, 2, 4), 0), turns=turns)
    )
    log.record(1, [sample])
    line = json.loads((tmp_path / "completions.jsonl").read_text())
    assert line["turns"][1] == {
        "role": "tool", "text": "<b>42", "num_tokens": 2, "num_calls": 1, "num_errors": 1, "is_cut": True
    }  # fmt: skip
    assert line["num_tokens"] == 7
    groups = CompletionGroups(tmp_path)
    assert groups.update()
    (group,) = groups.at_step(1)
    assert group.rewards == [1.0]
    shown = group_of(group, groups.records(group), 1)
    assert shown["completions"][0]["parts"] == [
        ("thinking", "hm"), ("call", "f\n{}"), ("tool", "<b>42"), ("text", "It is 42")
    ]  # fmt: skip


# Keys


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"max_turns": 3}, "`max_turns: 3` would have no effect without `tools` and `environment`"),
        ({"completion_limit": "turn"}, "`completion_limit: turn` would have no effect"),
        ({"tool_timeout": 3.0}, "`tool_timeout: 3.0` would have no effect"),
        ({"tools": "f.py:f", "rollout_ahead": 1}, "`rollout_ahead: 1` cannot go with `tools` and `environment`"),
        ({"tools": "f.py:f", "vllm_tensor_parallel": 2}, "`vllm_tensor_parallel: 2` cannot go with `tools` and"),
        ({"environment": "f.py:F", "structured_outputs": {"regex": "a"}}, "`structured_outputs: .*` cannot go with"),
        ({"reward_funcs": "environment"}, "asks for the reward of an environment, and none is given"),
    ],
)
def test_keys_that_cannot_be_right_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        GRPOArguments(**{"reward_funcs": "accuracy"} | keys).validate(keys)
    GRPOArguments(reward_funcs="accuracy", tools="a.py:f, b.py:g", max_turns=3, dynamic_sampling=True).validate()


# What rewards see


def test_rewards_see_the_turns_and_grade_what_the_model_wrote_last(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "def own(completions, messages, final_turns, environment_rewards):\n"
        "    assert [len(each) for each in messages] == [4, 4], messages\n"
        '    assert messages[0][2] == {"role": "observation", "content": "42"}\n'
        '    assert all("42" in text for text in completions)\n'
        "    return environment_rewards\n"
    )
    turns = [
        Turn(num_tokens=2, text="6 times 7?", is_sampled=True, num_calls=1),
        Turn(num_tokens=1, text="42", is_sampled=False, num_calls=1),
    ]
    completions = tuple(
        dataclasses.replace(
            completion_of((2, 1, 2), 0),
            text=f"6 times 7? 42 {text}",
            turns=(*turns, Turn(num_tokens=2, text=text, is_sampled=True)),
            environment_reward=0.25,
        )
        for text in ("It is 42.", "")
    )
    prompt = Prompt(index=0, token_ids=(1,), messages=({"role": "user", "content": "?"},), reference="42")
    names = ["accuracy", "exact_match", "environment", f"{file}:own"]
    rewards = load_rewards(names, None, None, max_new_tokens=8, timeout_s=60)
    (scores,) = rewards.score([RolloutGroup(prompt=prompt, completions=completions, policy_version=0)])
    rewards.close()
    assert scores == [[1.0, 0.0, 0.25, 0.25], [0.0, 0.0, 0.25, 0.25]]  # the tool's result is no answer
