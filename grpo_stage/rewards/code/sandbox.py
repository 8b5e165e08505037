"""The sandbox: Debian's bubblewrap around Python, asked line by line. `harness` is what runs inside.

A sandbox has no network, sees the Python standard library and the system's shared libraries and nothing else of the
machine, writes to a scratch folder in memory alone, and has namespaces of its own for processes, users, mounts, IPC,
host name and cgroups. Root needs no user namespace: it takes on a user id that nobody has.
"""

import json
import logging
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_stage.rewards.code import harness
from grpo_stage.rewards.code.system_calls import filter_of_programs
from grpo_stage.survival.descendants import kill_descendants


logger = logging.getLogger(__name__)

BWRAP, NO_SANDBOX = "bwrap", "none"
OLDEST_BWRAP = (0, 8)
"""The first that limits the size of a scratch folder in memory and switches user namespaces off inside."""
SCRATCH_BYTES = 64 * 2**20
FIRST_UID, NUM_UIDS = 64_000, 1_000
"""User ids for the programs of a run by root: in a range that Debian gives to no user by itself."""
START_S = 60.0
"""For the start of an interpreter on a machine under load, which takes 20 ms else."""
SLACK_S = 5.0
"""How much later than its own time limit a harness may answer on a machine under load."""
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")


class SandboxError(RuntimeError):
    """No sandbox could be started. The fault is the machine's, not a program's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use."""

    timeout_s: float = 5.0
    """Processor time of one test; the clock may show twice as much."""
    memory_bytes: int = 512 * 2**20
    output_bytes: int = 2**20
    """Of one test's output, and of each file."""

    @property
    def wall_s(self) -> float:
        return 2 * self.timeout_s + 1


class Session:
    """One interpreter in its sandbox. To be closed, which ends all that runs in it.

    Args:
        kind: `BWRAP` or `NO_SANDBOX`.
        slot: tells sandboxes that run at the same time apart.
        limits: of the programs inside.
        source: the program that it serves; "" where it runs tests.
        tests: what `harness.run_tests` is told; None where it serves a program.

    Raises:
        SandboxError: if it could not be started.
    """

    def __init__(
        self, kind: str, slot: int, limits: Limits, *, source: str = "", tests: Mapping[str, Any] | None = None
    ) -> None:
        is_apart = kind == BWRAP
        self._output_bytes = limits.output_bytes
        # A program's longest answer, written as JSON: six characters for a byte, or more of brackets than of values.
        self._longest_line = 16 * limits.output_bytes + 2**16
        self._scratch = None if is_apart else tempfile.TemporaryDirectory(prefix="grpo-stage-code-")
        self._buffer = b""
        self._is_lost = False
        self._first_inside: int | None = None
        setup = {
            "source": source,
            "tests": tests,
            "uid": FIRST_UID + slot % NUM_UIDS if is_apart and os.geteuid() == 0 else None,
            "is_apart": is_apart,
            "filter": _filter().hex(),
            "cpu_s": limits.timeout_s,
            "wall_s": limits.wall_s,
            "memory_bytes": limits.memory_bytes,
            "output_bytes": limits.output_bytes,
        }
        info, info_of_bwrap = os.pipe()
        try:
            self._process = subprocess.Popen(
                sandbox_command(info_of_bwrap) if is_apart else interpreter_command(_harness_file()),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT,
                cwd=self._scratch.name if self._scratch else "/",
                start_new_session=True,
                pass_fds=[info_of_bwrap] if is_apart else [],
                bufsize=0,
            )
        except OSError as error:
            os.close(info)
            self._clear()
            raise SandboxError(f"{error.strerror}: {error.filename}") from error
        finally:
            os.close(info_of_bwrap)
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        ready = self._exchange(setup, time.monotonic() + START_S)
        os.set_blocking(info, False)
        with open(info, "rb") as file:
            said_by_bwrap = file.read()  # before it started what is ready
        if ready != {"ready": True}:
            self._process.kill()
            said = self._said()
            self.close()
            raise SandboxError(said or "it ended at once without a word")
        if said_by_bwrap:
            with suppress(ProcessLookupError):  # it has ended
                self._first_inside = os.pidfd_open(json.loads(said_by_bwrap)["child-pid"])

    def ask(self, request: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        """The reply to a request, as `harness.serve_program` and `run_tests` describe it.

        Where there is none by the deadline (by `time.monotonic`), or the sandbox has ended, it is `{"died": reason}`,
        and so is any later one.
        """
        return self._exchange(request, deadline)

    def read(self, deadline: float) -> dict[str, Any]:
        """The next message of a sandbox of tests, as `ask`."""
        return self._exchange(None, deadline)

    def close(self) -> None:
        """End the sandbox with all that runs in it, and wait for that. May be called twice."""
        if self._process.poll() is None:
            if self._first_inside is not None:
                # All others inside end with it, and bubblewrap reaps it. Were bubblewrap killed, it would be left to
                # the machine's first process, which in a container often reaps none.
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._first_inside, signal.SIGKILL)
            else:
                kill_descendants(self._process.pid)
                self._process.kill()
        self._process.wait()
        if self._first_inside is not None:
            os.close(self._first_inside)
            self._first_inside = None
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None and not pipe.closed:
                pipe.close()
        self._clear()

    def _exchange(self, message: Mapping[str, Any] | None, deadline: float) -> dict[str, Any]:
        if self._is_lost:
            return {"died": harness.ENDED}
        try:
            return _reply(self._line(message, deadline))
        except TimeoutError:
            reason = harness.TIMEOUT
        except OverflowError:
            reason = harness.OUTPUT
        except (EOFError, BrokenPipeError):
            reason = harness.ENDED
        self._is_lost = True  # what comes later could be taken for the reply to another request
        return {"died": reason}

    def _line(self, message: Mapping[str, Any] | None, deadline: float) -> bytes:
        """Write a line, if there is one, and read one.

        Raises:
            TimeoutError: at the deadline.
            OverflowError: if the line is longer than any answer.
            EOFError, BrokenPipeError: if the sandbox has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        into, out = self._process.stdin.fileno(), self._process.stdout.fileno()
        unsent = memoryview(json.dumps(message).encode() + b"\n" if message is not None else b"")
        while True:
            line, end, rest = self._buffer.partition(b"\n")
            if end and not unsent:
                self._buffer = rest
                return line
            if len(self._buffer) > self._longest_line:
                raise OverflowError
            if (left_s := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            poll = select.poll()
            poll.register(out, select.POLLIN)
            if unsent:
                poll.register(into, select.POLLOUT)
            events = dict(poll.poll(left_s * 1000))
            if into in events:
                unsent = unsent[os.write(into, unsent) :]
            if out in events:
                part = os.read(out, 2**16)
                if not part:
                    raise EOFError
                self._buffer += part

    def _said(self) -> str:
        """What bubblewrap or the interpreter has written about their end."""
        assert self._process.stderr is not None
        return self._process.stderr.read(4096).decode("utf-8", "replace").strip()

    def _clear(self) -> None:
        if self._scratch is not None:
            with suppress(OSError):  # what a program has made unreadable
                self._scratch.cleanup()


def _reply(line: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):  # too many digits or brackets
        reply = None
    return reply if isinstance(reply, dict) else {"died": harness.ENDED}


ENVIRONMENT = {
    "PATH": os.defpath,
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the same program gets the same reward
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",  # each thread would reserve 64 MiB of the memory's limit
}
"""All that a program finds in its environment."""


def interpreter_command(script: str) -> list[str]:
    """The interpreter of this process, without site-packages and anything of the user's."""
    # -I: no variables, no user's folder; -S: no site-packages; -B: no cache files.
    return [_interpreter(), "-I", "-S", "-B", "-X", "utf8", script]


def sandbox_command(info_descriptor: int) -> list[str]:
    """bubblewrap around the harness. It writes the number of the first process inside to `info_descriptor`."""
    inside = "/harness" + Path(_harness_file()).suffix
    bound = dict.fromkeys([_interpreter(), *_libraries()])
    links = {name: os.readlink(name) for name in _LIBRARIES if os.path.islink(name)}
    parents = sorted({str(parent) for path in [*bound, "/tmp"] for parent in Path(path).parents} - {"/"})
    return [
        shutil.which(BWRAP) or BWRAP,
        *("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        # Root keeps what it needs to become another user; the harness does so before it reads a program.
        *("--cap-drop", "ALL"),
        *(
            ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
            if os.geteuid() == 0
            else ("--unshare-user", "--disable-userns")
        ),
        *(
            "--info-fd",
            str(info_descriptor),
            "--as-pid-1",
            "--die-with-parent",
            "--new-session",
            "--hostname",
            "sandbox",
        ),
        *(word for parent in parents for word in ("--perms", "0755", "--dir", parent)),
        *(word for path in bound for word in ("--ro-bind", path, path)),
        *(word for name, place in links.items() for word in ("--symlink", place, name)),
        *("--ro-bind", _harness_file(), inside),
        *("--size", str(SCRATCH_BYTES), "--perms", "1777", "--tmpfs", "/tmp"),
        *("--remount-ro", "/", "--chdir", "/tmp"),
        *interpreter_command(inside),
    ]


def _harness_file() -> str:
    """The harness as this interpreter has compiled it, which takes a sandbox 10 ms less, or else its source."""
    compiled = harness.__spec__.cached if harness.__spec__ else None
    return compiled if compiled and os.path.isfile(compiled) else harness.__file__


def _interpreter() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _libraries() -> list[str]:
    """The folders of the standard library and of shared libraries, none within another."""
    prefixes = {os.path.realpath(prefix) for prefix in (sys.base_prefix, sys.base_exec_prefix)}
    own = [os.path.join(prefix, name) for prefix in sorted(prefixes) for name in ("lib", "lib64")]
    system = [name for name in _LIBRARIES if not os.path.islink(name)]
    folders = [folder for folder in dict.fromkeys([*system, *own]) if os.path.isdir(folder)]
    return [f for f in folders if not any(f != other and f.startswith(other + os.sep) for other in folders)]


def _filter() -> bytes:
    found = filter_of_programs()
    if found is None:
        raise SandboxError(f"no filter of system calls is known for a {platform.machine()}")
    return found


# Whether it holds here

_PROBE = """
import os, socket, threading, time

def breaches(canary, counts_threads):
    import decimal  # read only now: as the user that programs run as
    found = []
    def attempt(what, act):
        try:
            act()
        except (OSError, RuntimeError):
            return
        found.append(what)
    def fork():
        if os.fork() == 0:
            os._exit(0)
    def start_threads():
        threading.stack_size(2**16)
        for _ in range(200):
            threading.Thread(target=time.sleep, args=(0.5,), daemon=True).start()
    threading.Thread(target=len, args=("",)).start()
    attempt("start processes", fork)
    attempt("open connections", socket.socket)
    if counts_threads:
        attempt("read files of yours", lambda: os.stat(canary))
        attempt("write outside its scratch folder", lambda: open("/written", "w"))
        attempt("start threads without end", start_threads)
        attempt("be root", lambda: os.setuid(0))
    try:
        open("scratch", "w").write("here it may")
    except OSError:
        found.append("not write to its scratch folder")
    return found
"""
_PACKAGE = "Install it: `apt-get install bubblewrap`"
_NAMESPACES = (
    "Allow namespaces: for an ordinary user `sysctl -w kernel.unprivileged_userns_clone=1` (Debian) or `sysctl -w "
    "kernel.apparmor_restrict_unprivileged_userns=0` (Ubuntu 24.04); in a container start it with the capability "
    "SYS_ADMIN and without its filter of system calls (docker: `--cap-add SYS_ADMIN --security-opt "
    "seccomp=unconfined --security-opt apparmor=unconfined`)"
)
_BARE = (
    "or, if what this model writes may run with all your rights, write `code_sandbox: none` and "
    "`run_code_without_sandbox: true`"
)


def first_slot() -> int:
    """The number of the first of 64 sandboxes that only this process has."""
    return os.getpid() * 64


def check_sandbox(kind: str) -> None:
    """Run a program that tries to get out.

    Raises:
        ValueError: if there is no sandbox of this kind here, or it does not hold; with the reason and a remedy.
    """
    if sys.platform != "linux":
        raise _refusal(kind, "it needs Linux", "Run it there")
    if filter_of_programs() is None:
        raise _refusal(kind, f"no filter of system calls is known for a {platform.machine()}", "Use x86_64 or aarch64")
    if kind == BWRAP:
        _check_version()
    try:
        with tempfile.NamedTemporaryFile(prefix="grpo-stage-canary-") as canary:
            # Not the slot of another process: a user's threads count together, and the probe starts all there may be.
            session = Session(kind, first_slot(), Limits(timeout_s=START_S / 3), source=_PROBE)
            try:
                reply = session.ask(
                    {"call": ["breaches", [canary.name, kind == BWRAP], {}]}, time.monotonic() + START_S
                )
            finally:
                session.close()
    except SandboxError as error:
        raise _refusal(kind, f"it cannot be started: {error}", _NAMESPACES) from error
    if reply.get("value") != []:
        could = ", ".join(reply["value"]) if reply.get("value") else f"not be tested: {reply}"
        raise _refusal(kind, f"it does not hold: a program in it could {could}", _NAMESPACES)


def _check_version() -> None:
    path = shutil.which(BWRAP)
    if path is None:
        raise _refusal(BWRAP, "bubblewrap (`bwrap`) is not installed", _PACKAGE)
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    version = tuple(map(int, re.findall(r"\d+", said)))
    if version < OLDEST_BWRAP:
        oldest = ".".join(map(str, OLDEST_BWRAP))
        raise _refusal(
            BWRAP, f"{said.strip() or path} is older than {oldest}", f"Install bubblewrap {oldest} or later"
        )


def _refusal(kind: str, reason: str, remedy: str) -> ValueError:
    return ValueError(
        f"`code_sandbox: {kind}`: the programs of completions run in a sandbox, and {reason}. {remedy}"
        + (f"; {_BARE}." if kind == BWRAP else ".")
    )
