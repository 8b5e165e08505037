"""Reward functions loaded by name, called with what they ask for, and stopped by what is not a score."""

import inspect
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_stage.rewards.errors import RewardError
from grpo_stage.rewards.loading import load_rewards
from grpo_stage.rewards.registry import BUILTIN_REWARDS
from grpo_stage.rewards.suite import RewardSuite
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup, TrainingProgress


def load(*names: str, weights: list[float] | None = None, **kwargs: dict[str, Any]) -> RewardSuite:
    return load_rewards(list(names), weights, kwargs or None, max_new_tokens=10, timeout_s=5.0)


def prompt(index: int = 0, reference: str | None = "7", **columns: Any) -> Prompt:
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": f"question {index}"})
    return Prompt(index=index, token_ids=(1, 2), messages=messages, reference=reference, columns=columns)


def group(prompt: Prompt, *texts: str) -> RolloutGroup:
    completions = tuple(
        Completion(
            token_ids=tuple(text.encode()) or (0,),
            sampling_logprobs=(0.0,) * max(1, len(text.encode())),
            finish_reason=FinishReason.STOP,
            text=text,
        )
        for text in texts
    )
    return RolloutGroup(prompt=prompt, completions=completions, policy_version=0)


GROUPS = [group(prompt(3, color="red"), "a", "bb"), group(prompt(5, color="blue"), "ccc", "dddd")]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a file of reward functions into the working directory; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(source: str, name: str = "own_rewards.py") -> str:
        (tmp_path / name).write_text(source)
        return name

    return write


# What a function receives


def test_each_argument_is_a_list_over_all_completions_prompt_major(own: Callable[[str], str]) -> None:
    file = own(
        "import json, pathlib\n"
        "def names(prompts, completions, completion_ids, messages, references, color):\n"
        "    pathlib.Path('seen.json').write_text(json.dumps(locals()))\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    suite = load(f"{file}:names")
    assert suite.names == ("names",)
    assert suite.score(GROUPS) == [[[1.0], [2.0]], [[3.0], [4.0]]]
    seen = json.loads(Path("seen.json").read_text())
    assert seen["prompts"] == ["question 3", "question 3", "question 5", "question 5"]
    assert seen["completions"] == ["a", "bb", "ccc", "dddd"]
    assert seen["completion_ids"] == [list(text.encode()) for text in seen["completions"]]
    assert [messages[-1]["content"] for messages in seen["messages"]] == seen["prompts"]
    assert [messages[0]["role"] for messages in seen["messages"]] == ["system"] * 4
    assert seen["references"] == ["7"] * 4
    assert seen["color"] == ["red", "red", "blue", "blue"]


def test_kwargs_gets_everything_and_ours_win_over_columns_of_the_same_name(own: Callable[[str], str]) -> None:
    file = own(
        "def all_of_it(**kwargs):\n"
        "    assert sorted(kwargs) == ['color', 'completion_ids', 'completions', 'environment_rewards', 'factor',\n"
        "        'final_turns', 'messages', 'prompts', 'references', 'trainer_state'], sorted(kwargs)\n"
        "    assert kwargs['completions'] == ['x'] and kwargs['color'] == ['red']\n"
        "    return [kwargs['factor']]\n"
    )
    suite = load(f"{file}:all_of_it", all_of_it={"factor": 0.5})
    assert suite.score([group(prompt(color="red", completions="a column"), "x")]) == [[[0.5]]]


def test_defaults_columns_that_are_optional_and_settings(own: Callable[[str], str]) -> None:
    file = own(
        "def f(completions, color='none', scale=1.0, bonus=0.0):\n"
        "    assert color in ('none', ['red', None]), color\n"
        "    return [scale * len(c) + bonus for c in completions]\n"
    )
    suite = load(f"{file}:f", f={"scale": 2})
    assert suite.score([group(prompt(0), "a")]) == [[[2.0]]]
    assert suite.score([group(prompt(0, color="red"), "a"), group(prompt(1), "bb")]) == [[[2.0]], [[4.0]]]


def test_a_setting_is_not_overwritten_by_a_column_of_its_name(own: Callable[[str], str]) -> None:
    file = own("def f(completions, scale=1.0):\n    return [scale] * len(completions)\n")
    assert load(f"{file}:f", f={"scale": 2.0}).score([group(prompt(scale=9.0), "a")]) == [[[2.0]]]
    assert load("overlong").score([group(prompt(max_length=1), "abcdefghi")]) == [[[-0.5]]]


def test_what_one_function_does_to_its_lists_is_not_seen_by_the_next(own: Callable[[str], str]) -> None:
    file = own(
        "def spoil(completions, completion_ids):\n"
        "    n = len(completions); completions.clear(); completion_ids.clear(); return [0.0] * n\n"
    )
    scores = load(f"{file}:spoil", "regex", "overlong", regex={"pattern": "a"}).score([group(prompt(), "a", "b")])
    assert scores == [[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]


SPOILS = """
import os
elsewhere = os.path.abspath("elsewhere")
def spoil(completions, completion_ids, messages, info, words):
    assert completion_ids == [[97]] and messages[0][1]["content"] == "question 0", (completion_ids, messages)
    assert info == [{"unit": {"names": ["m", "cm"]}, "tags": [{"hard": True}]}] and words == ["one", {"two": []}]
    completion_ids[0].clear(), messages[0].clear()
    info[0]["unit"]["names"].append("km"), info[0]["tags"][0].clear(), words[1]["two"].append(1), words.clear()
    os.chdir(elsewhere)
    return [1.0]
class Here:
    def __call__(self, completions, completion_ids, messages, info, words):
        return spoil(completions, completion_ids, messages, info, words)
here = Here()
async def awaited(completions):
    os.chdir(elsewhere)
    return [float(os.path.isfile("here.txt"))]
calls = []
def lazily(completions):
    if not calls:
        os.chdir("elsewhere")
    calls.append(1)
    return [float(os.path.isfile("here.txt"))]
"""


@pytest.mark.parametrize("place", ["spoil", "here", "awaited", "lazily"])
def test_no_call_changes_what_the_next_one_gets_nor_where_the_trainer_is(
    own: Callable[[str], str], place: str
) -> None:
    """In a process of its own, whose working directory is its own affair, and in the trainer's ("here")."""
    file, folder = own(SPOILS), os.getcwd()
    Path("elsewhere").mkdir()
    Path("elsewhere/here.txt").touch()
    row = prompt(info={"unit": {"names": ["m", "cm"]}, "tags": [{"hard": True}]})
    suite = load(
        f"{file}:{place}", **({} if place in ("awaited", "lazily") else {place: {"words": ["one", {"two": []}]}})
    )
    for _ in range(3):
        assert suite.score([group(row, "a")]) == [[[1.0]]]
        assert os.getcwd() == folder


def test_a_file_that_changes_the_directory_as_it_is_loaded_does_so_for_itself(own: Callable[[str], str]) -> None:
    file = own("import os\nos.chdir('/')\ndef f(completions): return [float(os.getcwd() == '/')]\n")
    folder = os.getcwd()
    suite = load(f"{file}:f")
    assert os.getcwd() == folder
    assert suite.score([group(prompt(), "a")]) == [[[1.0]]], "its own process is where it wants to be"


def test_a_column_of_some_datasets_is_a_list_in_every_batch(own: Callable[[str], str]) -> None:
    """Also in one that none of its prompts is in: `zip` with a default of None would fail in the middle of a run."""
    file = own(
        "def f(completions, color=None):\n"
        "    return [None if c is None else float(len(c)) for _, c in zip(completions, color)]\n"
    )
    suite = load(f"{file}:f")
    suite.check([prompt(0, color="red"), prompt(1)])
    assert suite.score([group(prompt(1), "a", "b")]) == [[[None], [None]]]


def test_trainer_state_says_where_the_run_is(own: Callable[[str], str]) -> None:
    file = own(
        "def f(completions, trainer_state, **kwargs):\n"
        "    assert not hasattr(trainer_state, 'best_metric')\n"
        "    return [trainer_state.global_step / trainer_state.max_steps + trainer_state.epoch] * len(completions)\n"
        "class Here:\n"
        "    def __call__(self, **kwargs): return f(**kwargs)\n"
        "class Asks:\n"
        "    def __call__(self, completions, trainer_state): return trainer_state.log_history\n"
        "here, asks = Here(), Asks()\n"
    )
    suite = load(f"{file}:f", f"{file}:here")
    suite.progress = TrainingProgress(global_step=3, max_steps=4, epoch=0.1)
    assert suite.score([group(prompt(), "a")]) == [[[0.85, 0.85]]]
    with pytest.raises(RewardError, match=r"`trainer_state` has global_step, max_steps and epoch .* no 'log_history'"):
        load(f"{file}:asks").score([group(prompt(), "a")])


# What a function may return


IN_THIS_PROCESS = "class F:\n    def __call__(self, completions): return RETURNED\nf = F()\n"


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.5, None, True],
        (1, 2.5, None, True),
        [np.float32(1), np.float64(2.5), None, np.bool_(True)],
        [torch.tensor(1), torch.tensor(2.5), None, torch.tensor(True)],
        np.array([1, 2.5, None, True], dtype=object),
    ],
)
def test_numbers_and_none_are_scores(
    monkeypatch: pytest.MonkeyPatch, own: Callable[[str], str], returned: Any
) -> None:
    suite = load(f"{own(IN_THIS_PROCESS)}:f")
    monkeypatch.setitem(type(suite._functions[0].function).__call__.__globals__, "RETURNED", returned)
    scores = suite.score(GROUPS)
    assert scores == [[[1.0], [2.5]], [[None], [1.0]]]
    assert {type(score) for row in scores for scored in row for score in scored} == {float, type(None)}


@pytest.mark.parametrize("array", [np.arange(4, dtype=np.float32), torch.arange(4), torch.arange(4.0).bfloat16()])
def test_arrays_and_tensors_are_scores(monkeypatch: pytest.MonkeyPatch, own: Callable[[str], str], array: Any) -> None:
    suite = load(f"{own(IN_THIS_PROCESS)}:f")
    monkeypatch.setitem(type(suite._functions[0].function).__call__.__globals__, "RETURNED", array)
    assert suite.score(GROUPS) == [[[0.0], [1.0]], [[2.0], [3.0]]]


@pytest.mark.parametrize(
    ("returned", "problem", "completion"),
    [
        ("[0.0, 1.0, float('nan'), 0.0]", "returned nan", "ccc"),
        ("[0.0, 1.0, 2.0, float('-inf')]", "returned -inf", "dddd"),
        ("[0.0, '1', 2.0, 3.0]", "returned '1' (str)", "bb"),
        ("[[0.0], [1.0], [2.0], [3.0]]", "returned [0.0] (list)", "a"),
        ("[{}, 0, 0, 0]", "returned {} (dict)", "a"),
        ("[0.0, 1.0, 2.0]", "returned 3 scores in a batch of 4", "a"),
        ("[0.0] * 5", "returned 5 scores in a batch of 4", "a"),
        ("[]", "returned 0 scores", "a"),
        ("1.0", "returned float", "a"),
        ("None", "returned NoneType", "a"),
        ("'1234'", "returned str", "a"),
        ("{'a': 1}", "returned dict", "a"),
        ("[0.0, 10 ** 400, 2.0, 3.0]", "returned inf", "bb"),
        ("[0.0, 'x' * 1_000_000, 2.0, 3.0]", "(1000002 characters) (str)", "bb"),
        ("[0.0] * 5_000_000", "returned 5000000 scores in a batch of 4", "a"),
        ("(float(len(c)) for c in completions)", "returned generator", "a"),
    ],
)
def test_what_is_not_a_score_stops_the_run(
    own: Callable[[str], str], returned: str, problem: str, completion: str
) -> None:
    suite = load("overlong", f"{own(f'def broken(completions): return {returned}')}:broken")
    with pytest.raises(RewardError, match=re.escape(problem)) as caught:
        suite.score(GROUPS)
    index = 3 if completion in ("a", "bb") else 5
    assert (caught.value.function, caught.value.completion) == ("broken", completion)
    for part in ("'broken'", f"prompt: question {index}", f"completion: {completion}"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "def broken(completions):\n    return [1 / 0]  # the culprit\n",
        "class Broken:\n    def __call__(self, completions): return [1 / 0]  # the culprit\nbroken = Broken()\n",
    ],
    ids=["function", "object"],
)
def test_a_function_that_raises_stops_the_run_with_its_traceback(own: Callable[[str], str], source: str) -> None:
    suite = load(f"{own(source)}:broken")
    with pytest.raises(RewardError) as caught:
        suite.score(GROUPS)
    message = str(caught.value)
    for part in (
        "'broken'",
        "raised ZeroDivisionError",
        "question 3",
        "completion: a",
        "# the culprit",
        "own_rewards.py",
    ):
        assert part in message


def here(arguments: str, returned: str) -> str:
    """A function that is called in this process, where it starts fastest."""
    return f"class F:\n    def __call__(self, {arguments}): return {returned}\nf = F()\n"


CONVERSATIONAL = (
    '[c[0]["content"] for c in completions]',
    '[c["content"] for c in completions]',
    '[completions[0][0]["content"]]',
    "[p[-1]['content'] for p in prompts]",
    '[c[0].get("content", "") for c in completions]',
    "[m['role'] for c in completions for m in c]",
    "[c.content for c in completions]",
    "[c[0][\n  'content'\n] + '\u00e9' for c in completions]",
)


@pytest.mark.parametrize("expression", CONVERSATIONAL)
def test_trls_conversational_format_is_answered(own: Callable[[str], str], expression: str) -> None:
    suite = load(f"{own(f'def f(prompts, completions): return {expression}')}:f")
    with pytest.raises(
        RewardError, match=r"raised (Type|Attribute)Error .*`completions` and `prompts` are texts here"
    ) as e:
        suite.score(GROUPS)
    assert 'write `completion` for `completion[0]["content"]`' in str(e.value)
    assert 'messages[i][-1]["content"]' in str(e.value)


@pytest.mark.parametrize(
    "expression",
    [
        '[c[0]["score"] for c in completions]',
        '[m[-1]["content"]["text"] for m in messages]',
        "[c.score for c in completions]",
        "[len(c) + 'content' for c in completions]",
    ],
)
def test_another_mistake_is_not_taken_for_it(own: Callable[[str], str], expression: str) -> None:
    suite = load(f"{own(here('messages, completions', expression))}:f")
    with pytest.raises(RewardError, match=r"raised (Type|Attribute)Error") as caught:
        suite.score(GROUPS)
    assert "are texts here" not in str(caught.value)


@pytest.mark.parametrize(
    ("scores", "weight", "parts"),
    [
        ("[0.0, 1e200, 2.0, 3.0]", 1.0, ["returned 1e+200 which is beyond 1e+15", "rescale", "completion: bb"]),
        ("[0.0, 1.0, -1e16, 3.0]", 1.0, ["returned -1e+16", "completion: ccc"]),
        ("[0.0, 10.0, 2.0, 3.0]", 1e300, ["returned 10, 1e+301 with its weight of 1e+300, which", "completion: bb"]),
        ("[0.0, 10.0, 2.0, 3.0]", 1e308, ["returned 10, inf with its weight of 1e+308, which"]),
        ("[0.0, 1e300, 2.0, 3.0]", 1e-300, ["returned 1e+300"]),
    ],
)
def test_a_reward_whose_advantage_overflows(
    own: Callable[[str], str], scores: str, weight: float, parts: list[str]
) -> None:
    suite = load("overlong", f"{own(here('completions', scores))}:f", weights=[1.0, weight])
    with pytest.raises(RewardError, match="'f'") as caught:
        suite.score(GROUPS)
    for part in parts:
        assert part in str(caught.value)


def test_a_large_reward_is_one(own: Callable[[str], str]) -> None:
    suite = load(f"{own(here('completions', '[1e15, -1e15, None, 0.0]'))}:f", weights=[-1.0])
    assert suite.score(GROUPS) == [[[1e15], [-1e15]], [[None], [0.0]]]


def test_a_reward_models_score_has_the_same_bound() -> None:
    suite = load("reward_model")
    suite.model = lambda groups: [[1e20] * 2, [0.0] * 2]  # type: ignore[assignment]
    with pytest.raises(RewardError, match=r"'reward_model': returned 1e\+20"):
        suite.score(GROUPS)


def test_a_long_completion_is_cut_in_the_message(own: Callable[[str], str]) -> None:
    with pytest.raises(RewardError) as caught:
        load(f"{own('def f(completions): return 0')}:f").score([group(prompt(), "x" * 50_000)])
    assert len(str(caught.value)) < 5_000
    assert "(50000 characters)" in str(caught.value)


# Shapes and totals


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), max_size=5))
def test_score_keeps_order_and_shape(sizes: list[int]) -> None:
    groups = [group(prompt(i), *("x" * (i + g + 1) for g in range(size))) for i, size in enumerate(sizes)]
    suite = load("overlong", "repetition", overlong={"max_length": 10, "cache_length": 10})
    expected = [[-min(i + g + 1, 10) / 10 for g in range(size)] for i, size in enumerate(sizes)]
    scores = suite.score(groups)
    assert [[scored[0] for scored in row] for row in scores] == expected
    assert all(len(scored) == 2 for row in scores for scored in row)


@pytest.mark.parametrize(
    ("weights", "rewards", "total"),
    [
        ([2, 3], (None, 1.0), 3.0),
        ([2, 3], (0.5, 1.0), 4.0),
        ([2, 3], (None, None), None),
        ([2, 3], (0.0, None), 0.0),
        ([2, -1], (1.0, 0.5), 1.5),
        ([0, 1], (5.0, 1.0), 1.0),
        ([0, 1], (5.0, None), None),
        (None, (0.25, 0.5), 0.75),
    ],
)
def test_total(weights: list[float] | None, rewards: tuple[float | None, ...], total: float | None) -> None:
    assert load("overlong", "repetition", weights=weights).total(rewards) == total


def test_total_wants_one_reward_for_each_function() -> None:
    with pytest.raises(ValueError, match="shorter"):
        load("overlong", "repetition").total([1.0])


# What is asked of the dataset


def test_references_are_checked_before_anything_is_scored() -> None:
    suite = load("exact_match")
    suite.check([prompt(0), prompt(1)])
    with pytest.raises(ValueError, match=r"'exact_match' needs a reference.* 2 of 3 prompts lack .*at index 1"):
        suite.check([prompt(0), prompt(1, reference=None), prompt(2, reference=" ")])
    with pytest.raises(ValueError, match="reference_column"):
        suite.score([group(prompt(reference=None), "a")])


@pytest.mark.parametrize("name", ["accuracy", "exact_match", "length"])
def test_these_built_ins_need_references(name: str) -> None:
    with pytest.raises(ValueError, match="1 of 1 prompts lack"):
        load(name).check([prompt(reference=None)])


NEED_COLUMNS = {"accuracy", "exact_match", "length", "reasoning_gym", "code"}


@pytest.mark.parametrize("name", sorted({*BUILTIN_REWARDS} - NEED_COLUMNS))
def test_the_others_do_not(name: str) -> None:
    suite = load(name, regex={"pattern": "a"}) if name == "regex" else load(name)
    suite.check([prompt(reference=None)])


def test_a_column_the_dataset_lacks_is_named_with_those_it_has(own: Callable[[str], str]) -> None:
    suite = load(f"{own('def f(completions, colour): return [0.0] * len(completions)')}:f")
    with pytest.raises(
        ValueError, match=r"'colour'.* 2 of 2 .*did you mean 'color'\?.*columns are \['color', 'size'\]"
    ):
        suite.check([prompt(0, color="red"), prompt(1, size=3)])
    with pytest.raises(
        ValueError, match=r"1 of 2 prompts lack \(the first at index 8\)\. Write `colour=None`"
    ) as caught:
        suite.check([prompt(4, colour="red"), prompt(8, color="red")])
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("log_metric", "TRL's way to log a number.*`log_metric=None`"),
        ("log_extra", "TRL's way to add columns.*completions.jsonl"),
        ("environments", "TRL's environments, .* take `environment_rewards`"),
        ("solution_str", "verl's name for one completion.*`completions`"),
    ],
)
def test_an_argument_of_another_framework_is_named(own: Callable[[str], str], argument: str, message: str) -> None:
    file = own(
        f"def f(completions, {argument}): return [0.0] * len(completions)\n"
        "class ByKey:\n"
        f"    def __call__(self, completions, **kwargs): return kwargs['{argument}']\n"
        "class Optional:\n"
        f"    def __call__(self, completions, {argument}=None): return [float({argument} is None)]\n"
        "by_key, optional = ByKey(), Optional()\n"
    )
    with pytest.raises(ValueError, match=f"'{argument}', which is {message}"):
        load(f"{file}:f").check([prompt()])
    load(f"{file}:f").check([prompt(**{argument: 1})])  # a column of that name is one
    assert load(f"{file}:optional").score([group(prompt(), "a")]) == [[[1.0]]]
    with pytest.raises(RewardError, match=f"raised KeyError .*`{argument}` is {message}"):
        load(f"{file}:by_key").score([group(prompt(), "a")])


# Loading


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        (
            "acuracy",
            ["reward 'acuracy' is not known", "Did you mean 'accuracy'?", *BUILTIN_REWARDS, "path/file.py:function"],
        ),
        ("xyzzy", ["reward 'xyzzy' is not known", *BUILTIN_REWARDS]),
        ("nowhere/file.py:f", ["there is no file", "nowhere/file.py", "working directory"]),
        ("no_such_package.sub:f", ["no module 'no_such_package.sub'", "working directory", "sys.path"]),
        ("own_rewards:cosh2", ["own_rewards has no 'cosh2'"]),
        ("own_rewards:CONSTANT", ["it must be a function"]),
        ("own_rewards.py:missing", ["has no 'missing'", "its functions are first, second"]),
        ("own_rewards.py:CONSTANT", ["it must be a function"]),
        (
            "own_rewards.py:Class",
            ["it must be a function or a callable object", "`judge = Class()`"],
        ),
        ("own_rewards.py:by_position", ["by position only"]),
        ("exits.py:f", ["loading", "exits.py failed with SystemExit: 3"]),
        ("interrupts.py:f", ["loading", "interrupts.py failed with KeyboardInterrupt"]),
        ("fails.py:f", ["loading", "fails.py failed with ZeroDivisionError"]),
        ("imports_nothing.py:f", ["ModuleNotFoundError", "no_such_thing"]),
        ("imports_nothing:f", ["importing imports_nothing failed", "'no_such_thing'"]),
        ("fails:f", ["importing fails failed with ZeroDivisionError"]),
    ],
)
def test_a_reward_that_cannot_be_loaded(own: Callable[..., str], name: str, messages: Sequence[str]) -> None:
    own(
        "from math import sqrt\nCONSTANT = 1\nclass Class: pass\ndef first(): pass\ndef second(): pass\n"
        "def _hidden(): pass\n"
    )
    own(
        (Path("own_rewards.py").read_text() + "def by_position(a, /): pass\n")
        if name.endswith(":by_position")
        else Path("own_rewards.py").read_text()
    )
    own("1 / 0", "fails.py")
    own("import sys\nsys.exit(3)", "exits.py")
    own("raise KeyboardInterrupt", "interrupts.py")
    own("import no_such_thing", "imports_nothing.py")
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the messages are compared below
        load(name)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("overlong", {"cash_length": 3}, "its settings are max_length, cache_length"),
        ("tag_count", {"tags": []}, "its settings are none"),
        ("overlong", {"max_length": -1}, "reward_kwargs of 'overlong': max_length is -1"),
        ("accuracy", {"timeout": 0}, "timeout is 0: it must be a number of seconds above 0"),
        ("length", {"timeout": "5"}, "timeout is '5'"),
        ("regex", {}, "'regex' needs the setting 'pattern'"),
        ("regex", {"pattern": "["}, "is not a regular expression"),
    ],
)
def test_settings_of_a_built_in_that_cannot_be_right(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load(name, **{name: settings})


def test_a_field_that_no_function_takes_is_refused(own: Callable[[str], str]) -> None:
    file = own("def f(completions, level=None): return [1.0] * len(completions)\ndef g(**kwargs): return []\n")

    def load_with(names: list[str]) -> None:
        load_rewards(names, None, None, max_new_tokens=10, timeout_s=5.0, fields=("level", "truth")).close()

    with pytest.raises(ValueError, match=r"`reward_columns` has 'truth', and no function .*\(f, format\).* no effect"):
        load_with([f"{file}:f", "format"])
    load_with([f"{file}:f", f"{file}:g"])


def test_settings_of_an_own_function_must_be_named_by_it(own: Callable[[str], str]) -> None:
    file = own("def f(completions, scale=1.0): return [scale] * len(completions)")
    with pytest.raises(ValueError, match=r"sets 'scael'.*it names \['completions', 'scale'\]"):
        load(f"{file}:f", f={"scael": 2})
    with pytest.raises(ValueError, match="sets 'completions', which every batch brings"):
        load(f"{file}:f", f={"completions": []})


def test_files_of_one_name_do_not_clash_and_are_loaded_once(own: Callable[[str], str], tmp_path: Path) -> None:
    source = (
        "import helper\nloads = globals().get('loads', 0) + 1\ndef {0}(completions): return [helper.VALUE + loads]\n"
    )
    for folder, value in (("one", 10), ("two", 20)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"helper_{folder}.py").write_text(f"VALUE = {value}\n")
        text = source.format(folder).replace("import helper", f"import helper_{folder} as helper")
        (tmp_path / folder / "math.py").write_text(text)
    names = ("one/math.py:one", "two/math.py:two")
    before = list(sys.path)
    first, again = load(*names), load(*names)
    assert first.score([group(prompt(), "a")]) == [[[11.0, 21.0]]]
    assert again._functions[0].function is first._functions[0].function
    assert sys.path == before
    assert sys.modules["math"] is math


def test_modules_are_looked_for_in_the_working_directory(own: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "rewards_of_mine").mkdir()
    (tmp_path / "rewards_of_mine" / "short.py").write_text(
        "class F:\n def __call__(self, completions): return [3]\nf = F()"
    )
    assert load("rewards_of_mine.short:f").score([group(prompt(), "a")]) == [[[3.0]]]


def test_loading_rewards_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from grpo_stage.rewards.loading import load_rewards\n"
        "load_rewards(['accuracy', 'length'], None, None, max_new_tokens=9, timeout_s=1.0).close()\n"
        "print(sorted({'torch', 'numpy', 'sympy', 'math_verify', 'llamafactory'} & sys.modules.keys()))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# The user's page


DOCUMENTATION = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def test_the_documented_example_runs(own: Callable[..., str]) -> None:
    [source, *_] = re.findall(r"^```python\n(.*?)```", DOCUMENTATION, re.DOTALL | re.MULTILINE)
    suite = load(f"{own(source, 'my_rewards.py')}:brevity", brevity={"target": 2})
    scores = suite.score([group(prompt(difficulty="easy"), "ab", "abc"), group(prompt(difficulty="hard"), "ab")])
    assert scores == [[[1.0], [0.0]], [[None]]]


@pytest.mark.parametrize("name", BUILTIN_REWARDS)
def test_each_built_in_and_its_settings_are_documented(name: str) -> None:
    [row] = re.findall(rf"^\| `{name}` \|.*$", DOCUMENTATION, re.MULTILINE)
    settings = list(inspect.signature(BUILTIN_REWARDS[name].factory).parameters)[1:]
    assert re.findall(r"`([a-z_]+)` \(", row) == settings
