"""Explanations of frequent failures of reward functions: made for another framework, or a misuse of processes."""

import linecache
import re
import traceback
from collections.abc import Mapping
from pickle import PicklingError
from types import MappingProxyType


NOT_SUPPLIED: Mapping[str, str] = MappingProxyType(
    {
        "log_extra": "TRL's way to add columns to its table of completions: `log_completions: true` writes "
        "completions.jsonl with every reward. Leave it out, or give it a default (`log_extra=None`) and test for it",
        "log_metric": "TRL's way to log a number: each function's mean and deviation are logged here, and a function "
        "of weight 0 is only logged. Leave it out, or give it a default (`log_metric=None`) and test for it",
        "environments": "TRL's environments, which run in processes of their own here: take `environment_rewards`, "
        "which their `get_reward` returned, or `messages`, which has their results",
        "solution_str": "verl's name for one completion: a function here gets all of them, as the list `completions`, "
        "and returns a list. Write one that calls yours for each",
    }
)
"""Arguments that functions written for other frameworks take: what each is, and what to do."""

_INDEXES_MESSAGE = re.compile(r"\[\s*[\"'](content|role)[\"']\s*\]$")
_READS_MESSAGE = re.compile(r"\.(get\(\s*[\"'])?(content|role)\b")
_CONVERSATIONS = (
    "`completions` and `prompts` are texts here, and not lists of messages as in TRL's conversational format: write "
    '`completion` for `completion[0]["content"]`. The messages of a prompt are the argument `messages`, so that '
    '`prompt[-1]["content"]` is `prompts[i]` or `messages[i][-1]["content"]`.'
)
_PICKLED = (
    "What goes to another process has to be defined at the top level of a module: no lambda, no function within a "
    "function, no open file or lock. Move it there, or use threads."
)
_BROKEN = (
    "A process that the function had started died; its own error, where it has one, is in the run's terminal output."
)


def explanation_of(failure: BaseException) -> str:
    """The cause of an exception of a user's function, and the remedy; empty unless they are known for sure."""
    text = str(failure)
    if text.startswith("string indices must be integers") and _INDEXES_MESSAGE.search(_failed_expression(failure)):
        return _CONVERSATIONS
    if text.startswith("'str' object has no attribute") and _READS_MESSAGE.search(_failed_lines(failure)):
        return _CONVERSATIONS
    if isinstance(failure, PicklingError) or re.match("(can't|cannot) (pickle|get local object)", text.lower()):
        return _PICKLED
    if type(failure).__name__ in ("BrokenProcessPool", "TerminatedWorkerError"):
        return _BROKEN
    if isinstance(failure, KeyError) and failure.args and failure.args[0] in NOT_SUPPLIED:
        return f"`{failure.args[0]}` is {NOT_SUPPLIED[failure.args[0]]}."
    return ""


def _failed_lines(failure: BaseException) -> str:
    """The source lines of the expression that raised `failure`; empty if the source cannot be read."""
    *_, frame = traceback.extract_tb(failure.__traceback__)
    last = frame.end_lineno or frame.lineno or 0
    return "".join(linecache.getline(frame.filename, number) for number in range(frame.lineno or 1, last + 1))


def _failed_expression(failure: BaseException) -> str:
    """`_failed_lines` up to the end of the expression that failed."""
    *_, frame = traceback.extract_tb(failure.__traceback__)
    *lines, last = _failed_lines(failure).encode().splitlines(keepends=True) or [b""]
    return b"".join([*lines, last[: frame.end_colno]]).decode(errors="replace").strip()
