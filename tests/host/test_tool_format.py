"""Tool calls in the host's templates: the tokens of an episode against the host's encoding of the same messages."""

import copy
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llamafactory.data.template import TEMPLATES, get_template_and_fix_tokenizer
from transformers import AutoTokenizer

from grpo_stage.host.tool_format import ToolFormat, described, tool_format
from grpo_stage.rewards.workers.tool_process import Reply, Request
from grpo_stage.rollout.episodes import Episodes, EpisodeSettings
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup, SamplingSettings


SCHEMAS = [
    {
        "type": "function",
        "function": {
            "name": "multiply",
            "description": "Multiply two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer", "description": "one"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    }
]
CALL = {"name": "multiply", "arguments": {"a": 12345, "b": 6789}}
RESULT = '83810205 (exactly)\n"done"'


class Scripted:
    """An engine that gives what a script has for each round."""

    logprob_temperature = 1.0

    def __init__(self, rounds: Sequence[Sequence[int]]) -> None:
        self.rounds = list(rounds)
        self.asked: list[list[Prompt]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> list[RolloutGroup]:
        self.asked.append(list(prompts))
        ids = tuple(self.rounds.pop(0))
        completion = Completion(
            token_ids=ids, sampling_logprobs=(-0.5,) * len(ids), finish_reason=FinishReason.STOP, text=""
        )
        return [RolloutGroup(prompt=prompts[0], completions=(completion,), policy_version=7)]


class Answering:
    """Runs no code: every call has the same result."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def begin(self, requests: Sequence[Request]) -> list[int]:
        self.requests += requests
        return list(range(len(requests)))

    def replies(self, is_needed: bool) -> dict[int, Reply]:
        return {number: Reply(RESULT) for number in range(len(self.requests))}

    def end(self, episodes: Sequence[int]) -> None: ...


loaded = functools.cache(AutoTokenizer.from_pretrained)


def template_of(name: str, folder: Path, **changes: Any) -> tuple[Any, Any]:
    tokenizer = copy.deepcopy(loaded(folder))
    arguments = SimpleNamespace(
        **{"template": name, "train_on_prompt": False, "tool_format": None, "default_system": None}
        | {"enable_thinking": True, "preserve_thinking": False}
        | changes
    )
    before = copy.deepcopy(TEMPLATES[name])
    template = copy.deepcopy(get_template_and_fix_tokenizer(tokenizer, arguments))
    TEMPLATES[name] = before
    return template, tokenizer


def ended(ids: Sequence[int], ends: set[int], opening: int | None) -> list[int]:
    """What the policy samples of a turn that the host encodes: up to the token that ends it."""
    last = max((i for i, token in enumerate(ids) if token in ends), default=None)
    return [*ids, opening] if last is None else list(ids[: last + 1])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3", {}),
        ("qwen3", {"enable_thinking": False}),
        ("qwen3_nothink", {}),
        ("qwen3_5", {}),
        ("llama3", {}),
        ("mistral", {}),
        ("glm4", {}),
        ("minimax1", {}),
        ("chatml", {}),
        ("smollm2", {}),
        ("smollm2", {"tool_format": "qwen"}),
        ("lfm2", {}),
        ("granite4", {}),
        ("seed_oss", {}),
    ],
)
def test_an_episode_has_the_tokens_that_the_host_encodes(name, changes, short_tokenizer_dir):
    template, tokenizer = template_of(name, short_tokenizer_dir, **changes)
    turns = tool_format(template, name, tokenizer)
    tools = described(template, name, tokenizer, SCHEMAS)
    question = {"role": "user", "content": "What is 12345 times 6789?"}
    answer = {"role": "assistant", "content": "It is 83810205."}
    messages = [
        question,
        {"role": "function", "content": json.dumps(CALL)},
        {"role": "observation", "content": RESULT},
        answer,
    ]
    (prompt, called), (results, answered) = template.encode_multiturn(tokenizer, messages, "", tools)
    ends = set(template.get_stop_token_ids(tokenizer))
    written = [ended(called, ends, turns.opening), ended(answered, ends, tokenizer.eos_token_id)]
    engine, runner = Scripted(written), Answering()
    settings = EpisodeSettings(tools=("multiply",), max_turns=4, max_turn_tokens=1000)
    episodes = Episodes(engine, turns, runner, settings)  # type: ignore[arg-type]
    sampling = SamplingSettings(num_generations=1, max_new_tokens=1000, temperature=1.0)
    asked = Prompt(index=3, token_ids=tuple(prompt), messages=(question,), reference=None)
    (group,) = episodes.generate([asked], sampling, step=0)
    (completion,) = group.completions

    oracle = [*prompt, *called, *results, *answered]
    found = [*prompt, *completion.token_ids]
    # Behind the last token that was sampled the host may write a line break; glm's has no end token of its own.
    assert oracle[: len(found)] == found or oracle == found[:-1]
    assert [dict(each.arguments) for each in runner.requests] == [CALL["arguments"]]
    assert list(engine.asked[1][0].token_ids) == [*prompt, *completion.token_ids[: -len(written[1])]]
    assert completion.sampled_ids == (*written[0], *written[1])
    assert completion.sampled_mask == tuple(float(x == -0.5) for x in completion.sampling_logprobs)
    assert [turn.text for turn in completion.turns[1:]] == [RESULT, completion.final_turn]
    assert "83810205" in completion.final_turn
    assert "(exactly)" not in completion.final_turn
    assert group.policy_version == 7


@pytest.mark.parametrize("name", ["gemma4", "phi4_mini", "glm4_moe", "minimax2"])
def test_a_template_whose_calls_do_not_work_is_refused(name, short_tokenizer_dir):
    template, tokenizer = template_of(name, short_tokenizer_dir)
    with pytest.raises(ValueError, match=f"`template: {name}`.*Write a `template` that has tools"):
        described(template, name, tokenizer, SCHEMAS) and tool_format(template, name, tokenizer)


@pytest.mark.parametrize("name", ["llama3", "mistral", "glm4", "qwen3", "chatml", "lfm2"])
@pytest.mark.parametrize("text", ["391", "[1, 2]", "The answer is\n42", '{"answer": 3}', "<think>\nx\n</think>\n\nno"])
def test_an_answer_is_no_call(name, text, short_tokenizer_dir):
    template, tokenizer = template_of(name, short_tokenizer_dir)
    turns = tool_format(template, name, tokenizer)
    assert turns.calls([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]) == ()


def test_a_call_in_a_finished_thought_is_none(short_tokenizer_dir):
    template, tokenizer = template_of("qwen3", short_tokenizer_dir)
    turns = tool_format(template, "qwen3", tokenizer)
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'

    def calls(text: str) -> list[str]:
        return [each.name for each in turns.calls([*tokenizer.encode(text), tokenizer.eos_token_id])]

    assert calls(f"<think>\n{call}\n</think>\n\nno") == []
    assert calls(f"<think>\nwell\n</think>\n\n{call}\n{call}") == ["f", "f"]


def test_results_are_cut_to_the_room_that_is_there(short_tokenizer_dir):
    template, tokenizer = template_of("qwen3", short_tokenizer_dir)
    turns: ToolFormat = tool_format(template, "qwen3", tokenizer)
    end = tokenizer.eos_token_id
    whole, text = turns.results(end, ["word " * 200, "x"], 10_000) or ((), "")
    assert text == f"{'word ' * 200}\n</tool_response>\n<tool_response>\nx"  # as the host joins those of a dataset
    cut, text = turns.results(end, ["word " * 200], 60) or ((), "")
    assert len(cut) <= 60 < len(whole)
    assert len(cut) > 40
    assert text.startswith("word word")
    assert text.endswith(" [cut]")
    assert cut[:5] == whole[:5]
    assert cut[-3:] == whole[-3:]
    assert turns.results(end, ["word"], 5) is None
