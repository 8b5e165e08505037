"""Write programs.jsonl beside this file: small functions to write, each with a solution and tests."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


NUMBERS: list[list[Any]] = [[0], [1], [7], [-3], [100]]
PAIRS: list[list[Any]] = [[0, 0], [1, 2], [-3, 5], [10, 7], [8, 8]]
TEXTS: list[list[Any]] = [["a"], ["hello"], ["Level"], ["two words"], [""]]
LISTS: list[list[Any]] = [[[1]], [[3, 1, 2]], [[-1, -5, 4]], [[2, 2, 2]], [[10, 0, 7, 7]]]

TASKS: tuple[tuple[str, str, str, list[list[Any]]], ...] = (
    ("add(a, b)", "the sum of two numbers", "a + b", PAIRS),
    ("subtract(a, b)", "a minus b", "a - b", PAIRS),
    ("multiply(a, b)", "the product of two numbers", "a * b", PAIRS),
    ("larger(a, b)", "the larger of two numbers", "max(a, b)", PAIRS),
    ("distance(a, b)", "how far two numbers are apart, as a number that is not negative", "abs(a - b)", PAIRS),
    ("average(a, b)", "the mean of two numbers", "(a + b) / 2", PAIRS),
    ("double(n)", "two times n", "2 * n", NUMBERS),
    ("square(n)", "n times n", "n * n", NUMBERS),
    ("negate(n)", "minus n", "-n", NUMBERS),
    ("is_even(n)", "True if n is even, else False", "n % 2 == 0", NUMBERS),
    ("is_positive(n)", "True if n is above 0, else False", "n > 0", NUMBERS),
    ("last_digit(n)", "the last decimal digit of n, as a number", "abs(n) % 10", NUMBERS),
    ("count_letters(text)", "the number of characters of a text", "len(text)", TEXTS),
    ("shout(text)", "the text in capital letters", "text.upper()", TEXTS),
    ("backwards(text)", "the text from its end to its beginning", "text[::-1]", TEXTS),
    ("twice(text)", "the text two times, one after the other", "text * 2", TEXTS),
    ("total(numbers)", "the sum of a list of numbers", "sum(numbers)", LISTS),
    ("smallest(numbers)", "the smallest number of a list", "min(numbers)", LISTS),
    ("ascending(numbers)", "the list of numbers in ascending order", "sorted(numbers)", LISTS),
    ("first(numbers)", "the first number of a list", "numbers[0]", LISTS),
    ("doubled(numbers)", "a list with each number times two", "[2 * n for n in numbers]", LISTS),
    ("how_many(numbers)", "the number of items in a list", "len(numbers)", LISTS),
)


def rows() -> Iterator[dict[str, str]]:
    for i, (signature, what, expression, inputs) in enumerate(TASKS):
        solution = f"def {signature}:\n    return {expression}"
        namespace: dict[str, Any] = {}
        exec(solution, namespace)
        name = signature.partition("(")[0]
        outputs = [namespace[name](*arguments) for arguments in inputs]
        tests: Any = {"fn_name": name, "inputs": inputs, "outputs": outputs}
        if i % 2:
            shown = [", ".join(map(repr, arguments)) for arguments in inputs]
            tests = [f"assert {name}({one}) == {output!r}" for one, output in zip(shown, outputs, strict=True)]
        yield {
            "question": f"Write a Python function `{signature}` that returns {what}. Answer with the code only.",
            "answer": f"```python\n{solution}\n```",
            "tests": json.dumps(tests),
        }


if __name__ == "__main__":
    text = "".join(json.dumps(row) + "\n" for row in rows())
    Path(__file__).with_name("programs.jsonl").write_text(text, encoding="utf-8")
