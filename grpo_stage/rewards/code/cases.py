"""The tests of a row of the dataset: standard inputs, calls of a function, or assertions."""

import ast
import builtins
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class InputTests:
    """The program is a script: it reads a standard input and writes an output."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, slots=True)
class CallTests:
    """The program defines a function, or a class `Solution` with a method of that name."""

    function: str
    arguments: tuple[list[Any], ...]
    values: tuple[Any, ...]
    """What it shall return, as JSON has it."""

    def __len__(self) -> int:
        return len(self.arguments)


@dataclass(frozen=True, slots=True)
class AssertionTests:
    """Tests are Python code that calls what the program defines."""

    setup: str
    sources: tuple[str, ...]
    entry_point: str | None
    """The function that is called even where its name is that of a builtin one."""

    def __len__(self) -> int:
        return len(self.sources)


Tests = InputTests | CallTests | AssertionTests
_FORMS = (
    '{"inputs": [...], "outputs": [...]} of texts, with "fn_name" of arguments and values; {"test_cases": [{"input": '
    '..., "output": ...}]}; a list of assertions; {"assertions": [...], "setup": ...}; {"test": "def check(...): '
    '...", "entry_point": ...}'
)


def read_tests(value: Any) -> Tests:
    """The tests that a field of the dataset holds, as JSON text or as the value itself.

    Raises:
        ValueError: if it is of no form that is known, or holds no test.
    """
    if isinstance(value, str):
        return _read_text(value)
    return _read(value)


@functools.lru_cache(maxsize=256)  # about the prompts of a rollout
def _read_text(text: str) -> Tests:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error}): {text!r:.100}") from error
    return _read(value)


def _read(value: Any) -> Tests:
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return _assertions(value) if all(isinstance(one, str) for one in value) else _cases(value)
    if isinstance(value, Mapping):
        if value.get("inputs") is not None and value.get("outputs") is not None:
            return _pairs(value["inputs"], value["outputs"], value.get("fn_name"))
        if value.get("test_cases"):
            return _read(value["test_cases"])
        if value.get("assertions"):
            return _assertions(value["assertions"], value.get("setup") or "", value.get("entry_point"))
        if value.get("test") and value.get("entry_point"):
            return _check_program(value["test"], str(value["entry_point"]), value.get("setup") or "")
    raise ValueError(f"it is none of {_FORMS}: {value!r:.100}")


def _cases(cases: Sequence[Any]) -> Tests:
    if not all(isinstance(case, Mapping) and "input" in case and "output" in case for case in cases):
        raise ValueError(f'a test case is not of the form {{"input": ..., "output": ...}}: {cases!r:.100}')
    names = {case.get("fn_name") for case in cases}
    if len(names) > 1:
        raise ValueError(f"its test cases call several functions: {sorted(map(str, names))}")
    return _pairs([case["input"] for case in cases], [case["output"] for case in cases], names.pop())


def _pairs(inputs: Any, outputs: Any, function: Any) -> Tests:
    if not (isinstance(inputs, list) and isinstance(outputs, list) and 0 < len(inputs) == len(outputs)):
        raise ValueError("`inputs` and `outputs` must be lists of the same length, with one test at least")
    if not function:
        return InputTests(tuple(map(_as_text, inputs)), tuple(map(_as_text, outputs)))
    # LiveCodeBench writes an argument a line, each as JSON.
    if all(isinstance(one, str) for one in inputs):
        try:
            inputs = [[json.loads(line) for line in one.splitlines() if line.strip()] for one in inputs]
            outputs = [json.loads(one) if isinstance(one, str) else one for one in outputs]
        except ValueError as error:
            raise ValueError(f"an argument or value of {function!r} is no JSON: {error}") from error
    if not all(isinstance(one, list) for one in inputs):
        raise ValueError(f"each of the `inputs` of {function!r} must be the list of its arguments")
    return CallTests(str(function), tuple(inputs), tuple(outputs))


def _as_text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _assertions(sources: Sequence[Any], setup: str = "", entry_point: str | None = None) -> AssertionTests:
    called: list[set[str]] = []
    for source in sources:
        if not isinstance(source, str):
            raise ValueError(f"an assertion is no text: {source!r:.100}")
        calls = (node.func for node in ast.walk(_parsed(source)) if isinstance(node, ast.Call))
        called.append({function.id for function in calls if isinstance(function, ast.Name)})
    _parsed(setup)
    if entry_point is None and len(by_all := set.intersection(*called)) == 1:
        entry_point = by_all.pop()
    return AssertionTests(setup, tuple(sources), _method(entry_point))


def _check_program(test: str, entry_point: str, setup: str) -> AssertionTests:
    name = _method(entry_point)
    source = f"{test}\ncheck({name})\n"
    _parsed(setup), _parsed(source)
    return AssertionTests(setup, (source,), name)


def _method(entry_point: str | None) -> str | None:
    """`twoSum` of `Solution().twoSum`."""
    return None if entry_point is None else entry_point.rpartition(".")[2]


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"it is no Python code ({error}): {source!r:.100}") from error


def asked_names(defined: Sequence[Any], tests: AssertionTests) -> list[str]:
    """The names under which tests call the program.

    A program that defines `abs` or `all` must not change what these mean in a test. So names of Python's own are the
    program's only where they are what is tested.

    Args:
        defined: the callables at the program's top level.
        tests: whose entry point is always among the names.
    """
    names = {
        name
        for name in defined
        if isinstance(name, str) and name.isidentifier() and not name.startswith("__") and not hasattr(builtins, name)
    }
    return sorted(names | ({tests.entry_point} if tests.entry_point else set()))
