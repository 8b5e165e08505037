"""Stacks as text: how faulthandler writes threads, the same for asyncio's tasks, and the one line to quote of them."""

import asyncio
import linecache
import re
from types import FrameType
from typing import Any


_TASK = "Task"
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$', re.MULTILINE)


def task_stack(task: "asyncio.Task[Any]") -> str:
    """Where `task` is, as faulthandler would write it."""
    lines = [
        f'  File "{_as_dumped(frame.f_code.co_filename)}", line {frame.f_lineno} in {frame.f_code.co_name}'
        for frame in reversed(_awaiting_frames(task.get_coro()))
    ]
    return "\n".join(["", f"{_TASK} {task.get_name()}:", *lines, ""])


def _awaiting_frames(coroutine: Any) -> list[FrameType]:
    """From the outermost to the one that waits."""
    frames = []
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is not None:
            frames.append(frame)
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
    return frames


def line_to_quote(stacks: str, source_file: str, serving_file: str) -> str:
    """Where the function is: its innermost line in its own file, or else in whatever it called.

    Args:
        stacks: of all threads and tasks of the function's process; empty where none could be written.
        source_file: the function's own file.
        serving_file: the file that calls the function, by which its thread is known.
    """
    wanted, serving = _as_dumped(source_file), _as_dumped(serving_file)
    candidates = []
    for stack in stacks.split("\n\n"):
        frames = list(_FRAME.finditer(stack))
        if stack.lstrip().startswith(_TASK) or any(frame["file"] == serving for frame in frames):
            candidates += [frame for frame in frames if frame["file"] == wanted] or frames[:1]
    if not candidates:
        return ""
    frame = next((frame for frame in candidates if frame["file"] == wanted), candidates[0])
    path = source_file if frame["file"] == wanted else frame["file"]
    line = linecache.getline(path, int(frame["line"])).strip()
    return f"line {frame['line']} of {path}, in {frame['function']}" + (f": `{line}`" if line else "")


def _as_dumped(path: str) -> str:
    return path.encode("ascii", "backslashreplace").decode()
