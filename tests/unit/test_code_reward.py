"""The reward `code`: which program, which tests, when an answer is right, and what it is worth."""

import json
import runpy
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from grpo_stage.arguments import GRPOArguments
from grpo_stage.host.recipe_code import code_names, code_of
from grpo_stage.rewards.builtin.code import program_in
from grpo_stage.rewards.code.cases import AssertionTests, CallTests, InputTests, asked_names, read_tests
from grpo_stage.rewards.code.comparison import same_output, same_value
from grpo_stage.rewards.code.harness import decode, encode
from grpo_stage.rewards.errors import RewardTimeoutError
from grpo_stage.rewards.loading import load_rewards
from grpo_stage.rewards.suite import RewardSuite
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup


# Which part of a completion is the program


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("print(1)", "print(1)"),
        ("First:\n```python\nprint(1)\n```\nBetter:\n```python\nprint(2)\n```\nDone.", "print(2)"),
        ("```\nprint(1)\n```", "print(1)"),
        ("```py\nprint(1)", "print(1)"),
        ("1. So:\n   ```python\n   print(1)\n   ```", "print(1)"),
        ("```python\nx = '`'\nprint(x, '```')\n```", "x = '`'\nprint(x, '```')"),
        ("<think>\n```python\nprint(1)\n```\n</think>\n```python\nprint(2)\n```", "print(2)"),
        ("<think>\n```python\nprint(1)\n```\n", ""),
        ("<think>a</think><answer>\n```python\nprint(3)\n```\n</answer>\n```\n4\n```", "print(3)"),
        ("```python\n\n```", ""),
        ("", ""),
    ],
)
def test_the_program(completion: str, program: str) -> None:
    assert program_in(completion) == program


# Forms of tests


@pytest.mark.parametrize(
    ("value", "tests"),
    [
        ({"inputs": ["1\n", "2\n"], "outputs": ["1", "2"]}, InputTests(("1\n", "2\n"), ("1", "2"))),
        ({"inputs": [["1", "2"]], "outputs": [3]}, InputTests(("1\n2",), ("3",))),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": None}, InputTests(("1",), ("1",))),
        ({"inputs": [[1, [2]]], "outputs": [3], "fn_name": "f"}, CallTests("f", ([1, [2]],), (3,))),
        ({"inputs": ['1\n"a"'], "outputs": ['[1, "a"]'], "fn_name": "f"}, CallTests("f", ([1, "a"],), ([1, "a"],))),
        (
            {"test_cases": [{"type": "stdin_stdout", "input": "1", "output": "2", "fn_name": None}]},
            InputTests(("1",), ("2",)),
        ),
        ([{"input": [1], "output": 2, "fn_name": "f"}], CallTests("f", ([1],), (2,))),
        (["assert f(1) == 2"], AssertionTests("", ("assert f(1) == 2",), "f")),
        (
            {"assertions": ["assert abs(f(1)) == 2"], "setup": "import math"},
            AssertionTests("import math", ("assert abs(f(1)) == 2",), None),
        ),
        (
            ["assert sum(1, 2) == 3", "assert sum(3, 4) == 7"],
            AssertionTests("", ("assert sum(1, 2) == 3", "assert sum(3, 4) == 7"), "sum"),
        ),
        (
            {"test": "def check(candidate):\n    assert candidate(1)", "entry_point": "Solution().f"},
            AssertionTests("", ("def check(candidate):\n    assert candidate(1)\ncheck(f)\n",), "f"),
        ),
    ],
)
def test_a_form_of_tests(value: Any, tests: Any) -> None:
    assert read_tests(value) == read_tests(json.dumps(value)) == tests
    assert len(tests) >= 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("assert f(1) == 2", "it is no JSON"),
        ("{}", "it is none of"),
        ([], "it is none of"),
        (7, "it is none of"),
        ({"inputs": [], "outputs": []}, "with one test at least"),
        ({"inputs": ["1"], "outputs": ["1", "2"]}, "of the same length"),
        ({"inputs": [1], "outputs": [1], "fn_name": "f"}, "the list of its arguments"),
        ({"inputs": ["a b"], "outputs": ["1"], "fn_name": "f"}, "is no JSON"),
        ([{"input": 1}], "a test case is not of the form"),
        ([{"input": [1], "output": 1, "fn_name": name} for name in "fg"], "call several functions"),
        (["assert f(1) =="], "it is no Python code"),
        ({"assertions": ["assert f(1)", 2]}, "an assertion is no text"),
        ({"test": "def check(", "entry_point": "f"}, "it is no Python code"),
    ],
)
def test_what_is_no_test_is_refused(value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_tests(value)


def test_a_program_cannot_take_the_place_of_pythons_own_functions() -> None:
    defined = ["f", "g", "abs", "isinstance", "__import__", "AssertionError", 3, "no name"]
    assert asked_names(defined, AssertionTests("", ("",), "f")) == ["f", "g"]
    assert asked_names(["abs"], AssertionTests("", ("",), "abs")) == ["abs"]
    assert asked_names(["f"], AssertionTests("", ("",), None)) == ["f"]


# When an answer is right


@pytest.mark.parametrize(
    ("output", "expected", "is_right"),
    [
        ("3\n", "3", True),
        ("3  \n4\n\n", "3\n4", True),
        ("3\n\n4", "3\n4", False),
        ("\n3", "3", False),
        ("3 4", "3  4", True),
        ("34", "3 4", False),
        ("", "0", False),
        ("3.0", "3", True),
        ("-0", "0", True),
        ("-3", "3", False),
        ("03", "3", True),
        ("3.5", "3", False),
        ("1000000008", "1000000007", False),
        ("123456789012345678901", "123456789012345678902", False),
        ("0.3333333", "0.333333333", True),
        ("0.3334", "0.333333333", False),
        ("1e-3", "0.001", True),
        ("12345678.9", "12345678.8", True),
        ("3", "3.0", True),
        ("nan", "0.5", False),
        ("inf", "1e9999", False),
        ("YES", "Yes", False),
        ("9" * 10_000, "9" * 9_999 + "8", False),
        ("0" * 1_000_000 + ".5", "3", False),  # at once
        ("٣", "3", False),
    ],
)
def test_an_output(output: str, expected: str, is_right: bool) -> None:
    assert same_output(output, expected) is is_right


@pytest.mark.parametrize(
    ("value", "expected", "is_right"),
    [
        (3, 3, True),
        (True, 1, True),
        (3.0, 3, True),
        (3, 4, False),
        ("3", 3, False),
        (None, None, True),
        (None, 0, False),
        ([1, 2], [1, 2], True),
        ((1, (2,)), [1, [2]], True),
        ([1, 2], [2, 1], False),
        ([1], [1, 2], False),
        ({1, 2}, [1, 2], False),
        ({1: "a", "b": (2,)}, {"1": "a", "b": [2]}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        (0.1 + 0.2, 0.3, True),
        (0.31, 0.3, False),
        (10**400, 0.5, False),
        (float("nan"), 0.5, False),
        (3, [3], True),
        (3, [3, 4], False),
        ([], [[]], True),
        ("", [], False),
    ],
)
def test_a_value(value: Any, expected: Any, is_right: bool) -> None:
    assert same_value(json.loads(json.dumps(encode(value))), expected) is is_right


@pytest.mark.parametrize("forged", [{"tuple": 3}, {"dict": [[1]]}, {"dict": 3}, {"what": []}, {}, {"a": 1, "b": 2}])
def test_a_value_of_no_form_is_wrong(forged: Any) -> None:
    assert not same_value(forged, {"a": 1})
    assert not same_value(forged, [1])


def test_values_travel_as_they_are() -> None:
    value = {(1, 2): [None, True, 1.5, "é", b"\x00", 1j, {3}, frozenset({4})], "k": {}}
    assert decode(json.loads(json.dumps(encode(value)))) == value
    assert list(decode(encode(iter([1, 2])))) == [1, 2]
    with pytest.raises(ValueError, match="object is no plain data"):
        encode([object()])


# The reward


@pytest.fixture(scope="module")
def suite(missing_tool: Callable[[str], None]) -> Iterator[RewardSuite]:
    if shutil.which("bwrap") is None:
        missing_tool("Programs run in bubblewrap: `apt-get install bubblewrap`, and `make test` runs it.")
    with closing(load_rewards(["code"], None, {"code": {"partial": True}}, max_new_tokens=9, timeout_s=60.0)) as suite:
        yield suite


def group(tests: Any, *texts: str) -> RolloutGroup:
    columns: Mapping[str, Any] = {"tests": json.dumps(tests) if tests is not None else None}
    prompt = Prompt(index=3, token_ids=(1,), messages=(), reference=None, columns=columns)
    completions = tuple(
        Completion(token_ids=(0,), sampling_logprobs=(0.0,), finish_reason=FinishReason.STOP, text=text)
        for text in texts
    )
    return RolloutGroup(prompt=prompt, completions=completions, policy_version=0)


ADD = "```python\ndef add(a, b):\n    return a + b\n```"
MAXIMUM = "```python\ndef add(a, b):\n    return max(a, b)\n```"


def test_every_form_of_tests_is_scored_by_the_share_that_is_passed(suite: RewardSuite) -> None:
    script = "```python\na, b = map(int, input().split())\nprint({})\n```"
    late = "import threading\nthreading.Thread(target=lambda: print(sum(map(int, input().split())))).start()"
    setup = "from fractions import Fraction\ndef half(x): return x / 2"
    assertions = [
        *("assert add(0, 3) == 3", "assert half(add(1, 1)) == 1"),
        *("assert not add(0, 0)", "assert add((1,), (2,)) == (1, 2)"),
    ]
    check = "def check(candidate):\n    for i in range(3):\n        assert candidate(i, 1) == i + 1"
    raises = "def check(f):\n    try:\n        f(1, 'a')\n        assert False\n    except TypeError:\n        pass"
    method = "```python\nclass Solution:\n    def add(self, a, b):\n        return a + b\n```"
    groups = [
        group(
            {"inputs": ["1 2\n", "0 4\n"], "outputs": ["3\n", "4\n"]},
            script.format("a + b"),
            script.format("a | b"),
            late,
            script.format("a * b"),
            "no program",
            "",
        ),
        group({"fn_name": "add", "inputs": [[1, 2], [0, 4]], "outputs": [3, [4]]}, ADD, MAXIMUM, method, "x = 1"),
        group({"assertions": assertions, "setup": setup}, ADD, MAXIMUM, "x = 1"),
        group({"test": check, "entry_point": "add"}, ADD, MAXIMUM, method, "```python\nraise ValueError\n```"),
        group({"test": raises, "entry_point": "add"}, ADD, "```python\ndef add(a, b): return 3\n```"),
        group(["assert list(filtered([1, 0])) == [1]"], "```python\ndef filtered(x): return filter(None, x)\n```"),
        group(None, ADD),
    ]
    assert suite.score(groups) == [
        [[1.0], [1.0], [1.0], [0.0], [0.0], [0.0]],
        [[1.0], [0.5], [1.0], [0.0]],
        [[1.0], [0.5], [0.0]],
        [[1.0], [0.0], [1.0], [0.0]],
        [[1.0], [0.0]],
        [[1.0]],
        [[None]],
    ]


def test_a_script_ends_as_any_does(suite: RewardSuite) -> None:
    """What it leaves to be written is written, and its exit code counts."""
    right = {
        "import atexit\natexit.register(print, 3)": 1.0,
        "out = open(1, 'w')\nout.write('3')": 1.0,
        "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\nprint(3)": 1.0,
        "print(3)\nimport sys\nsys.exit()": 1.0,
        "if __name__ == '__main__':\n    import os\n    print(3, flush=True)\n    os._exit(0)": 1.0,
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 3\nprint(A().x)": 1.0,
        "print(3)\nimport sys\nsys.exit('wrong')": 0.0,
        "print(3)\nimport sys\nsys.exit(2)": 0.0,
        "print(3)\n1 / 0": 0.0,
        "import atexit\natexit.register(lambda: 1 / 0)\nprint(3": 0.0,
    }
    [scores] = suite.score([group({"inputs": [""], "outputs": ["3"]}, *right)])
    assert dict(zip(right, (score for [score] in scores), strict=True)) == right


def test_the_example_is_what_its_script_writes_and_its_solutions_pass(suite: RewardSuite) -> None:
    folder = Path(__file__).resolve().parents[2] / "yaml_examples" / "data"
    rows = [json.loads(line) for line in (folder / "programs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == list(runpy.run_path(str(folder / "make_programs.py"))["rows"]())
    groups = [group(json.loads(row["tests"]), row["answer"]) for row in rows]
    assert suite.score(groups) == [[[1.0]]] * len(rows)


def test_timeouts_are_counted() -> None:
    settings = {"code": {"timeout": 0.1}}
    with closing(load_rewards(["code"], None, settings, max_new_tokens=9, timeout_s=60.0)) as hasty:
        hasty.score(
            [group(["assert add(1, 2) == 3"], "while True: pass", "while True: pass", "import os\nos._exit(0)")]
        )
        assert hasty.counters == {"code/timeouts": 2}


def test_all_or_nothing_stops_at_the_first_failure(suite: RewardSuite) -> None:
    """By default; the tests after it would take 20 s."""
    tests = ["assert add(1, 2) == 4", *["import time; time.sleep(20)"]]
    with closing(load_rewards(["code"], None, None, max_new_tokens=9, timeout_s=15.0)) as strict:
        assert strict.score([group(tests, ADD), group(["assert add(1, 2) == 3"] * 2, ADD)]) == [[[0.0]], [[1.0]]]


def test_a_batch_that_takes_too_long_ends_the_run() -> None:
    hasty = load_rewards(["code"], None, None, max_new_tokens=9, timeout_s=0.5)
    with closing(hasty), pytest.raises(RewardTimeoutError, match="Lower `timeout` or `program_timeout`"):
        hasty.score([group({"inputs": [""], "outputs": ["1"]}, "while True: pass")])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"tests": "no tests"}, "the tests of the prompt at index 3 cannot be used: it is no JSON"),
        ({"cases": "[]"}, "takes an argument 'tests', a dataset column that 1 of 1 prompts lack"),
    ],
)
def test_tests_that_cannot_be_used_are_refused_before_a_run(
    suite: RewardSuite, columns: Mapping[str, Any], said: str
) -> None:
    prompt = Prompt(index=3, token_ids=(1,), messages=(), reference=None, columns=columns)
    with pytest.raises(ValueError, match=said):
        suite.check([prompt])


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"partial": 1}, "partial is 1"), ({"timeout": 0}, "timeout is 0"), ({"memory_mb": 0.5}, "memory_mb is 0.5")],
)
def test_settings_out_of_range(suite: RewardSuite, settings: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"reward_kwargs of 'code': {said}"):
        load_rewards(["code"], None, {"code": settings}, max_new_tokens=9, timeout_s=9.0)


# Keys


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"reward_funcs": "code", "code_sandbox": "none"}, "write `run_code_without_sandbox: true` beside it"),
        ({"reward_funcs": "code", "run_code_without_sandbox": True}, "no effect with `code_sandbox: bwrap`"),
        ({"reward_funcs": "my/code.py:code2", "code_sandbox": "none"}, "Write `reward_funcs: code`"),
    ],
)
def test_to_run_programs_bare_takes_two_keys(keys: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GRPOArguments(**keys).validate()


def test_two_keys_let_programs_run_bare_and_a_recipe_from_elsewhere_says_so() -> None:
    keys = {"reward_funcs": "format,code", "code_sandbox": "none", "run_code_without_sandbox": True}
    GRPOArguments(**keys).validate()
    assert code_names(keys) == ["run_code_without_sandbox"]
    [(name, said)] = code_of(keys, code_names(keys), None).items()  # type: ignore[arg-type]
    assert (name, "with all your rights" in said) == ("run_code_without_sandbox", True)
    assert code_names({"reward_funcs": "code"}) == []
