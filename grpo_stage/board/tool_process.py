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

import grpo_stage


POLL_INTERVAL_S = 0.5
CONFIG = "{config}"
"""Stands in the words of a command for the file of the recipe."""
PATIENCE_S = 600
"""With a process that is to fork: its first imports from a slow network folder may take minutes."""
_PROGRAM = "grpo_stage.tools.warm"
_PACKAGE = Path(grpo_stage.__file__).parent
_NOT_STARTED = (
    f"{_PROGRAM}, which would have started it, has ended, or has not answered for {PATIENCE_S} s and was ended. The "
    "Board's terminal may say why. Try again: a new one is started."
)
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
        self._installed = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start it unless it runs with the code that is installed. Returns at once: requests wait until it is warm."""
        with self._lock:
            self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        installed = _last_installation()
        if self._process is None or self._process.poll() is not None or self._installed != installed:
            self.close()
            self._requests, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with its_end:
                self._process = subprocess.Popen([sys.executable, "-m", _PROGRAM], stdin=its_end.fileno())
            self._installed = installed
        return self._process

    def close(self) -> None:
        """Let it end once it has started what it was asked for."""
        self._requests.close()

    def _give_up(self, process: subprocess.Popen[bytes]) -> None:
        """End it at once. It may take its time for that, too, so that nobody waits for it."""
        with self._lock:
            process.kill()
            if self._process is process:
                self._process = None

    def run(self, words: Sequence[str], errors: Path) -> Generator[None, None, None]:
        """Run a command, and yield every now and then while it runs; closing the iterator ends its process."""
        channel, its_end = socket.socketpair()
        with channel:
            with its_end, errors.open("wb") as file, tempfile.TemporaryFile("w+", encoding="utf-8") as request:
                json.dump({"words": words, "environment": dict(os.environ), "folder": os.getcwd()}, request)
                request.seek(0)
                with self._lock:
                    warm = self._start()
                    socket.send_fds(self._requests, [b"."], [request.fileno(), file.fileno(), its_end.fileno()])
            pid = b""
            deadline = time.monotonic() + PATIENCE_S
            try:
                while time.monotonic() < deadline:
                    if _is_ready(channel.fileno()):
                        pid = channel.recv(20)
                        break
                    yield
            finally:
                if not pid:
                    self._give_up(warm)
        if not pid:
            errors.write_text(_NOT_STARTED)
            return
        with suppress(ProcessLookupError):  # it has ended
            process = os.pidfd_open(int(pid))
            try:
                while not _is_ready(process):
                    yield
            finally:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGTERM)  # its reward workers end with the process
                _is_ready(process, None)
                os.close(process)


def _is_ready(descriptor: int, timeout_s: float | None = POLL_INTERVAL_S) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def _last_installation() -> int:
    """When a package was last installed, or a file of this one changed, on the clock of the file system."""
    installed = [path for path in map(Path, sys.path) if path.name in ("site-packages", "dist-packages")]
    return max(path.stat().st_mtime_ns for path in (*installed, *_PACKAGE.rglob("*.py")))


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
