"""The reward that runs programs: `code`."""

import json
import re
from collections.abc import Sequence
from typing import Any

from grpo_stage.rewards.answers.final_answer import after_reasoning, answer_tag
from grpo_stage.rewards.builtin.context import RewardContext
from grpo_stage.rewards.builtin.settings import boolean, positive_int, seconds
from grpo_stage.rewards.code import harness
from grpo_stage.rewards.code.cases import Tests, read_tests
from grpo_stage.rewards.code.grading import Grading
from grpo_stage.rewards.code.sandbox import Limits, SandboxError
from grpo_stage.rewards.errors import CompletionError, CompletionTimeoutError
from grpo_stage.types import Prompt


_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


class CodeReward:
    """`code`: called with a rollout's completions and the tests of their prompts."""

    def __init__(self, context: RewardContext, grading: Grading, partial: bool) -> None:
        self._context, self._grading, self._partial = context, grading, partial

    def __call__(self, completions: Sequence[str], tests: Sequence[Any]) -> list[float | None]:
        programs: dict[tuple[str, str], tuple[str, Tests]] = {}
        keys: list[tuple[str, str] | None] = []
        for completion, value in zip(completions, tests, strict=True):
            source = program_in(completion)
            keys.append((source, value if isinstance(value, str) else json.dumps(value)) if source and value else None)
            if keys[-1] is not None and keys[-1] not in programs:
                programs[keys[-1]] = source, read_tests(value)
        try:
            found = self._context.graders.grade(self._grading, list(programs.values()), self._context.timeout_s)
        except TimeoutError as error:
            raise CompletionTimeoutError(
                0,
                f"took longer than {self._context.timeout_s:g} s (`reward_timeout`) over the {len(programs)} "
                f"different programs of a batch of {len(completions)} completions. Lower `timeout` or "
                "`program_timeout` in `reward_kwargs`, or raise `reward_timeout`.",
            ) from error
        except SandboxError as error:
            raise CompletionError(0, f"could not start a sandbox, which worked when the run began: {error}") from error
        grades = dict(zip(programs, found, strict=True))
        if timeouts := sum(harness.TIMEOUT in grades[key].died_of for key in keys if key):
            self._context.counters["code/timeouts"] += timeouts
        scores = {key: grade.share if self._partial else float(grade.has_passed) for key, grade in grades.items()}
        # Without tests it does not apply; without a program nothing is right.
        return [None if not value else scores[key] if key else 0.0 for key, value in zip(keys, tests, strict=True)]

    def check_columns(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError where the tests of a prompt cannot be read."""
        for prompt in prompts:
            try:
                if value := prompt.columns["tests"]:
                    read_tests(value)
            except ValueError as error:
                raise ValueError(
                    f"reward 'code': the tests of the prompt at index {prompt.index} cannot be used: {error}. "
                    "docs/code_rewards.md has the forms of tests"
                ) from error


def code(
    context: RewardContext,
    partial: bool = False,
    timeout: float = 5.0,
    program_timeout: float = 60.0,
    memory_mb: int = 512,
    output_kb: int = 1024,
) -> CodeReward:
    """1 where the completion's program passes all tests of its prompt, else 0; None for a prompt without tests.

    Range {0, 1}, or [0, 1] with `partial`. Takes the argument `tests`: a column of the dataset of that name, or the
    field that `reward_columns` names. `cases` says what forms tests have, `program_in` which part of a completion is
    the program, `comparison` when an output is right. Programs run in the sandbox that `code_sandbox` names.

    Args:
        partial: give the share of the tests that are passed.
        timeout: seconds of processor time for one test; by the clock, twice as many and one.
        program_timeout: seconds by the clock for all tests of a program.
        memory_mb: MiB of memory of a program.
        output_kb: KiB of the output of one test, and of a file that a program writes.
    """
    limits = Limits(
        timeout_s=seconds("timeout", timeout),
        memory_bytes=positive_int("memory_mb", memory_mb) * 2**20,
        output_bytes=positive_int("output_kb", output_kb) * 2**10,
    )
    partial = boolean("partial", partial)
    grading = Grading(
        sandbox=context.code_sandbox,
        limits=limits,
        program_timeout_s=seconds("program_timeout", program_timeout),
        stops_at_failure=not partial,
    )
    return CodeReward(context, grading, partial)


def program_in(completion: str) -> str:
    """The last fenced code block of the answer; all of the answer where there is none. "" where there is no answer.

    The answer is what follows `</think>`, and of that the last `<answer>...</answer>` if there is one. A block that
    is not closed ends with the text.
    """
    answer = after_reasoning(completion)
    tagged = answer_tag(answer)
    answer = answer if tagged is None else tagged
    blocks = _FENCED.findall(answer)
    return (blocks[-1] if blocks else answer).strip()
