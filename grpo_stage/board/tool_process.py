"""A subcommand of `grpo-stage` in a process of its own, and its result as far as it is written.

In its own process a user's function is loaded anew each time, can be ended if it hangs, and frees its memory. The
process is a fork of one that has imported torch and transformers already, and is kept for that.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


POLL_INTERVAL_S = 0.5
CONFIG = "{config}"
"""Stands in the words of a command for the file of the recipe."""
_PROGRAM = "grpo_stage.tools.warm"
_NO_RESULT = (
    "`grpo-stage {command}` has ended without a result. If no error stands below, the system has ended it, as it does "
    "where memory is short.\n\n{said}"
)


@dataclass(frozen=True, slots=True)
class ToolState:
    """What is known of a command that runs or has run."""

    elapsed_s: float
    answer: Mapping[str, Any] | None = None
    """The content of its `--json` file, which may grow while it runs."""
    error: str | None = None
    """Why it has ended without an answer."""
    is_done: bool = False


class WarmProcess:
    """The process that forks into commands: started as soon as it is likely to be needed, it ends with the Board."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._requests = socket.socket()
        self._lock = threading.Lock()

    def start(self) -> socket.socket:
        """Start it unless it runs. Returns at once: what is sent to the socket waits until it is warm."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._requests.close()
                self._requests, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with its_end:
                    self._process = subprocess.Popen([sys.executable, "-m", _PROGRAM], stdin=its_end.fileno())
            return self._requests

    def run(self, words: Sequence[str], errors: Path) -> Generator[None, None, None]:
        """Run a command, and yield every now and then while it runs; closing the iterator ends its process."""
        channel, its_end = socket.socketpair()
        with channel:
            with its_end, errors.open("wb") as file:
                request = json.dumps(words).encode()
                socket.send_fds(self.start(), [request], [file.fileno(), its_end.fileno()])
            while not _is_ready(channel.fileno()):
                yield
            pid = channel.recv(20)
        if not pid:
            errors.write_text(f"{_PROGRAM}, which would have started it, has ended: the Board's terminal says why.")
            return
        with suppress(ProcessLookupError):  # it has ended
            process = os.pidfd_open(int(pid))
            try:
                while not _is_ready(process):
                    yield
            finally:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGTERM)  # its reward workers end with the process
                select.select([process], [], [])
                os.close(process)


def _is_ready(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], POLL_INTERVAL_S)[0])


WARM = WarmProcess()


def run_tool(words: Sequence[str], arguments: Mapping[str, Any] | None = None) -> Generator[ToolState, None, None]:
    """Run `grpo-stage` with these words and `--json`; closing the iterator ends the process.

    Args:
        words: the subcommand and its options; `CONFIG` among them stands for a file with the arguments.
        arguments: of a run.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="grpo-stage-tool-") as folder:
        recipe, file, errors = (Path(folder) / name for name in ("recipe.yaml", "answer.json", "errors.txt"))
        if arguments is not None:
            recipe.write_text(yaml.safe_dump(dict(arguments), allow_unicode=True), encoding="utf-8")
        command = [str(recipe) if word == CONFIG else word for word in words]
        with closing(WARM.run([*command, "--json", str(file)], errors)) as running:
            yield ToolState(0)
            for _ in running:
                yield ToolState(time.monotonic() - started, _read(file))
        elapsed_s, answer = time.monotonic() - started, _read(file)
        if answer is not None and answer.get("is_whole", True):
            # With a result, an exit code tells whether something was found.
            yield ToolState(elapsed_s, answer, is_done=True)
            return
        said = errors.read_text(encoding="utf-8", errors="replace").strip()
        _, is_explained, explanation = said.rpartition("grpo-stage: ")  # the host's warnings come before it
        error = explanation if is_explained else _NO_RESULT.format(command=words[0], said=said)
        yield ToolState(elapsed_s, error=error, is_done=True)


def _read(file: Path) -> dict[str, Any] | None:
    """The answer; it is written at once each time."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
