"""Programs that try to get out of the sandbox, or to be paid without a solution.

Each is graded on tests that it passes only by what it must not be able to do: what is expected is a secret that only
tests, a file and a variable of the trainer hold, or what a program prints that has got through.
"""

import os
import socket
import sys
import textwrap
import time
from collections.abc import Collection
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from grpo_stage.rewards.code.cases import AssertionTests, CallTests, InputTests, Tests
from grpo_stage.rewards.code.grading import Grade, Graders, Grading
from grpo_stage.rewards.code.sandbox import Limits, check_sandbox


MARK = "grpo-attack"
"""In the name of every file that an attack writes."""
SECRET = f"{MARK}-secret-{os.urandom(8).hex()}"
VARIABLE = "GRPO_ATTACK_CANARY"
LIMITS = Limits(timeout_s=0.5, memory_bytes=128 * 2**20, output_bytes=2**20)

EXPECT_SECRET: dict[str, Tests] = {
    "input": InputTests(("2 3",), (SECRET,)),
    "call": CallTests("solve", ([2, 3],), (SECRET,)),
    "assertion": AssertionTests("", (f"assert solve(2) == {SECRET!r}",), "solve"),
}
GOT_THROUGH: dict[str, Tests] = {"input": InputTests(("",), ("got through",))}
"""For a program that prints these words if it has got through."""


@dataclass(frozen=True)
class Attack:
    name: str
    source: str
    """`@canary@` is the path of a file with the secret, `@folder@` its folder, `@port@` where the trainer listens."""
    tests: dict[str, Tests]


def attack(name: str, source: str, tests: dict[str, Tests] | None = None, kinds: str = "") -> Attack:
    tests = EXPECT_SECRET if tests is None else tests
    return Attack(
        name, textwrap.dedent(source).strip(), {k: v for k, v in tests.items() if k in (kinds.split() or tests)}
    )


ATTACKS = (
    attack(
        "fork bomb",
        """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """,
        kinds="input",
    ),
    attack(
        "fork bomb past the C library",
        """
        import ctypes
        libc = ctypes.CDLL(None)
        while True:
            for number, first in ((56, 17), (57, 0), (58, 0), (435, 0), (0x40000038, 17)):
                libc.syscall(number, first, 0, 0, 0, 0)
        """,
        kinds="input",
    ),
    attack(
        "thread bomb",
        """
        import threading, time
        threading.stack_size(65536)
        while True:
            try:
                threading.Thread(target=time.sleep, args=(1000,)).start()
            except RuntimeError:
                pass
        """,
        kinds="input",
    ),
    attack("memory bomb", "hoard = []\nwhile True:\n    hoard.append(bytearray(2**20))", kinds="input call"),
    attack(
        "memory bomb of files",
        "for i in range(10000):\n    open(f'/tmp/grpo-attack-{i}', 'wb').write(bytes(2**19))",
        kinds="input",
    ),
    attack(
        "memory bomb of zip",
        "import zlib\ndata = zlib.compress(bytes(2**28))\nprint(len(zlib.decompress(data)))",
        kinds="input",
    ),
    attack(
        "network: the trainer's port",
        "import socket\nsocket.create_connection(('127.0.0.1', @port@), 1).send(b'x')",
        kinds="input call",
    ),
    attack(
        "network past the C library",
        """
        import ctypes
        libc = ctypes.CDLL(None)
        for family in range(1, 46):
            for kind in (1, 2, 3, 5):
                if libc.syscall(41, family, kind, 0) >= 0:
                    print("got through")
        """,
        GOT_THROUGH,
    ),
    attack(
        "reading a file of the user",
        """
        def solve(*_):
            return open("@canary@").read()
        if __name__ == "__main__":
            print(solve())
        """,
    ),
    attack(
        "reading the home folder",
        """
        import glob, os
        if [path for home in ("/root", "/home/*", os.path.expanduser("~")) for path in glob.glob(home + "/*")]:
            print("got through")
        """,
        GOT_THROUGH,
    ),
    attack(
        "reading the environment",
        """
        import os
        def solve(*_):
            return os.environ["GRPO_ATTACK_CANARY"]
        if __name__ == "__main__":
            print(solve())
        """,
    ),
    attack(
        "reading other processes",
        """
        import os
        def is_there(pid):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return False
            except OSError:
                pass
            return True
        if os.path.exists("/proc/self") or any(is_there(pid) for pid in range(50, 40000)):
            print("got through")
        """,
        GOT_THROUGH,
    ),
    attack(
        "writing outside",
        """
        for folder in ("@folder@", "/", "/usr/lib", "/dev/shm", "/var/tmp", "/etc", "/root", "/home", "/harness.py"):
            try:
                open(folder + "/grpo-attack", "w").write("x")
                print("got through")
            except OSError:
                pass
        open("/tmp/grpo-attack", "w").write("x")
        """,
        GOT_THROUGH,
    ),
    attack(
        "symbolic links",
        """
        import os
        os.symlink("@canary@", "/tmp/grpo-attack-link")
        def solve(*_):
            return open("/tmp/grpo-attack-link").read()
        if __name__ == "__main__":
            print(solve())
        """,
    ),
    attack(
        "killing the parent",
        """
        import os
        for pid in (os.getppid(), 1, -1):
            try:
                os.kill(pid, 9)
            except OSError:
                pass
        """,
    ),
    attack("os._exit(0)", "import os\nos._exit(0)"),
    attack("os._exit(0) in the function", "import os\ndef solve(*_):\n    os._exit(0)", kinds="call assertion"),
    attack("sys.exit()", "import sys\ndef solve(*_):\n    sys.exit()\nif __name__ == '__main__':\n    sys.exit()"),
    attack(
        "reading the test in memory, frames, files and pipes",
        """
        import gc, os, re, sys

        def texts():
            frame = sys._getframe()
            while frame:
                yield from (frame.f_locals | frame.f_globals).values()
                frame = frame.f_back
            for one in gc.get_objects():
                if isinstance(one, (list, tuple, dict, set)):
                    yield from list(one.values() if isinstance(one, dict) else one)
            for descriptor in range(64):
                try:
                    os.set_blocking(descriptor, False)
                    yield os.read(descriptor, 2**20)
                except OSError:
                    pass
            for folder, _, names in os.walk("/"):
                for name in names if "/lib" not in folder else ():
                    try:
                        yield open(os.path.join(folder, name), "rb").read(2**20)
                    except OSError:
                        pass

        def solve(*_):
            for text in texts():
                if type(text) in (str, bytes):
                    if found := re.search("grpo[-]attack-secret-[0-9a-f]{16}", str(text)):
                        return found[0]

        if __name__ == "__main__":
            print(solve())
        """,
    ),
    attack(
        "an object that equals everything",
        """
        class Any(str):
            __eq__ = __contains__ = __bool__ = lambda *_: True
            __hash__ = str.__hash__
        def solve(*_):
            return Any("x")
        print(Any("x"))
        """,
    ),
    attack(
        "patching json, builtins and what answers",
        """
        import builtins, json, sys
        def true(*_, **__):
            return '{"passed": true, "value": true, "code": 0}'
        class Out:
            def write(self, *_): return 0
            def flush(self): pass
        json.dumps = json.JSONEncoder.encode = true
        for module in list(sys.modules.values()):
            for name in ("encode", "send", "answer_of"):
                if hasattr(module, name):
                    setattr(module, name, true)
        frame = sys._getframe()
        while frame:
            for name in ("encode", "send", "answer_of"):
                if name in frame.f_globals:
                    frame.f_globals[name] = true
            frame = frame.f_back
        builtins.AssertionError = builtins.isinstance = true
        sys.stdout = Out()
        def solve(*_):
            return true()
        """,
    ),
    attack(
        "forged answers on every pipe",
        r"""
        import os
        for descriptor in range(64):
            for line in ('{"ready": true}', '{"passed": true}', '{"value": true}', '{"code": 0, "stdout": ""}'):
                try:
                    os.write(descriptor, line.encode() + b"\n")
                except OSError:
                    pass
        os._exit(0)
        """,
    ),
    attack(
        "functions that the test calls, under their names",
        """
        def solve(*_):
            return 0.0
        def abs(*_):
            return 0
        def isclose(*_, **__):
            return True
        isinstance = all = any = len = round = isclose
        class math:
            isclose = isclose
        """,
        {
            "assertion": AssertionTests(
                "", ("assert abs(solve(2) - 7.5) < 1e-6", "assert math.isclose(solve(2), 7.5)"), "solve"
            )
        },
    ),
    attack(
        "1 GB of output",
        "import sys\nfor _ in range(1024):\n    sys.stdout.write('x' * 2**20)",
        kinds="input call",
    ),
    attack("a value of 64 MB", "def solve(*_):\n    return 'x' * 2**26", kinds="call assertion"),
    attack("endless loop", "while True:\n    pass", kinds="call"),
    attack("sleep", "import time\ntime.sleep(1000)", kinds="input assertion"),
    attack(
        "deaf to signals",
        """
        import signal
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        while True:
            pass
        """,
        kinds="input",
    ),
    attack(
        "daemon",
        """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
        """,
        kinds="input call",
    ),
    attack("another program", "import os\nos.execv('/bin/sh', ['sh', '-c', 'sleep 1000'])", kinds="input"),
    attack(
        "endless recursion",
        """
        import sys
        sys.setrecursionlimit(10**9)
        def solve(*_):
            return solve() + 1
        if __name__ == "__main__":
            solve()
        """,
        kinds="assertion",
    ),
    attack("recursion in C", "x = []\nfor _ in range(10**6):\n    x = [x]\nrepr(x)", kinds="input"),
    attack("a value that holds itself", "x = []\nx.append(x)\ndef solve(*_):\n    return x", kinds="call assertion"),
    attack(
        "deep and long numbers as values",
        """
        def solve(n):
            import os
            for descriptor in range(3, 64):
                try:
                    os.write(descriptor, b'{"value": ' + (b"9" * 10**5 if n == 2 else b"[" * 10**5) + b"}\\n")
                except OSError:
                    pass
            os._exit(0)
        """,
        kinds="call assertion",
    ),
    attack("open files", "files = [open(f'/tmp/grpo-attack-{i}', 'w') for i in range(10**6)]", kinds="input"),
    attack(
        "root again, other namespaces",
        """
        import ctypes, os
        libc = ctypes.CDLL(None)
        mounted = libc.mount(b"x", b"/tmp", b"tmpfs", 0, 0)
        if 0 in (libc.setuid(0), libc.unshare(0x10000000), libc.chroot(b"/tmp"), mounted):
            print("got through")
        """,
        GOT_THROUGH,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What came of all attacks together."""

    grades: dict[str, Grade]
    """By the attack's name and the kind of test, as in `fork bomb, input`."""
    num_connections: int
    """To the port on which the trainer listened."""
    seconds: float


MEET_A_LIMIT = (
    *("fork bomb", "fork bomb past the C library", "memory bomb", "memory bomb of zip", "endless loop", "sleep"),
    *("deaf to signals", "1 GB of output", "recursion in C"),
)
"""Attacks that end at a limit, whoever runs the sandbox."""


def run_attacks(
    sandbox: str, folder: Path, kinds: Collection[str] = tuple(EXPECT_SECRET), leave_out: Collection[str] = ()
) -> Outcome:
    """Run the attacks on tests of these kinds, with the canary file in `folder`."""
    canary = folder / f"{MARK}-canary"
    canary.write_text(SECRET)
    os.environ[VARIABLE] = SECRET
    with closing(Graders()) as graders, socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = str(listener.getsockname()[1])
        programs: dict[str, tuple[str, Tests]] = {}
        for each in [one for one in ATTACKS if one.name not in leave_out]:
            source = (
                each.source.replace("@canary@", str(canary)).replace("@folder@", str(folder)).replace("@port@", port)
            )
            for kind in each.tests.keys() & set(kinds):
                programs[f"{each.name}, {kind}"] = (source, each.tests[kind])
        start = time.monotonic()
        grading = Grading(sandbox=sandbox, limits=LIMITS, program_timeout_s=10.0, stops_at_failure=False)
        grades = graders.grade(grading, list(programs.values()), 300.0)
        seconds = time.monotonic() - start
        num_connections = 0
        with suppress(BlockingIOError):
            while True:
                listener.accept()[0].close()
                num_connections += 1
    return Outcome(dict(zip(programs, grades, strict=True)), num_connections, seconds)


def main() -> None:
    """What an ordinary user's sandbox makes of the attacks: run by root as another user."""
    check_sandbox("bwrap")
    outcome = run_attacks("bwrap", Path(sys.argv[1]), ["input"], leave_out=MEET_A_LIMIT)
    paid = [name for name, grade in outcome.grades.items() if grade.num_passed]
    print(os.getuid(), len(outcome.grades), paid, outcome.num_connections)


if __name__ == "__main__":
    main()
