"""Programs in the sandbox: attacks, limits, and what the sandbox says where it cannot be."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from grpo_stage.rewards.code import harness, sandbox
from grpo_stage.rewards.code.cases import InputTests, Tests
from grpo_stage.rewards.code.grading import Grade, Graders, Grading
from grpo_stage.rewards.code.sandbox import FIRST_UID, NUM_UIDS, Limits, check_sandbox
from grpo_stage.rewards.code.system_calls import filter_of_programs
from grpo_stage.rewards.loading import load_rewards
from grpo_stage.rewards.workers.processes import STOP_SIGNALS

from . import code_attacks
from .code_attacks import ATTACKS, EXPECT_SECRET, LIMITS, MARK, MEET_A_LIMIT, SECRET, Outcome, run_attacks


PACKAGE = Path(__file__).resolve().parents[2] / "grpo_stage"


@pytest.fixture(scope="module", autouse=True)
def _bubblewrap(missing_tool: Callable[[str], None]) -> None:
    if shutil.which("bwrap") is None:
        missing_tool("Programs run in bubblewrap: `apt-get install bubblewrap`, and `make test` runs it.")


@pytest.fixture(scope="module")
def graders() -> Iterator[Graders]:
    with closing(Graders()) as graders:
        yield graders


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_attacks("bwrap", tmp_path_factory.mktemp("attacks"))


def grade(
    graders: Graders, *programs: tuple[str, Tests], sandbox: str = "bwrap", limits: Limits = LIMITS
) -> list[Grade]:
    grading = Grading(sandbox=sandbox, limits=limits, program_timeout_s=10.0, stops_at_failure=False)
    return graders.grade(grading, programs, 60.0)


# Attacks


def test_the_sandbox_holds_here() -> None:
    check_sandbox("bwrap")


def test_no_attack_is_paid(outcome: Outcome) -> None:
    assert len(outcome.grades) > len(ATTACKS)
    assert [name for name, grade in outcome.grades.items() if grade.num_passed] == []


def test_no_attack_reaches_the_trainer(outcome: Outcome) -> None:
    assert outcome.num_connections == 0


def test_nothing_is_left(outcome: Outcome) -> None:
    """No process of a sandbox, and no file but the canary."""
    started = [p.info for p in psutil.process_iter(["pid", "ppid", "cmdline", "uids"]) if _is_of_attack(p)]
    assert started == []
    places = {Path(place) for place in (tempfile.gettempdir(), "/tmp", "/dev/shm", "/var/tmp", "/", Path.home(), ".")}
    assert [file for place in places for file in place.glob(f"{MARK}*")] == []


def _is_of_attack(process: psutil.Process) -> bool:
    uids = process.info["uids"]
    is_ours = process.info["ppid"] == os.getpid() and "bwrap" in " ".join(process.info["cmdline"] or ())
    own_uids = {FIRST_UID + slot % NUM_UIDS for slot in Graders.slots()}
    return is_ours or (uids is not None and uids.real in own_uids)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sleep, input", "timeout"),
        ("endless loop, call", "timeout"),
        ("1 GB of output, input", "output"),
        ("os._exit(0), assertion", "ended"),
    ],
)
def test_what_a_program_died_of_is_told(outcome: Outcome, name: str, reason: str) -> None:
    assert outcome.grades[name].died_of == {reason}


def test_an_attack_would_find_what_is_there(graders: Graders, tmp_path: Path) -> None:
    """The attacks are real: without a sandbox they get through, and a secret that is inside is found."""
    sources = {attack.name: attack.source for attack in ATTACKS}
    search = sources["reading the test in memory, frames, files and pipes"]
    assert grade(graders, (search, InputTests((SECRET,), (SECRET,))))[0].has_passed
    canary = tmp_path / "canary"
    canary.write_text(SECRET)
    reading = sources["reading a file of the user"].replace("@canary@", str(canary))
    assert [g.num_passed for g in grade(graders, (reading, EXPECT_SECRET["call"]), sandbox="none")] == [1]
    assert [g.num_passed for g in grade(graders, (reading, EXPECT_SECRET["call"]))] == [0]


def test_without_a_sandbox_limits_and_the_filter_stay(graders: Graders) -> None:
    names = ("fork bomb", "memory bomb", "daemon", "another program", "sleep", "network past the C library")
    programs = [(attack.source, attack.tests["input"]) for attack in ATTACKS if attack.name in names]
    assert len(programs) == len(names)
    assert [g.num_passed for g in grade(graders, *programs, sandbox="none")] == [0] * len(names)


def test_an_ordinary_user_has_a_sandbox_too(missing_tool: Callable[[str], None]) -> None:
    """Root has another way into the sandbox: as another user the attacks are run once more."""
    with tempfile.TemporaryDirectory(prefix="grpo-stage-user-") as name:
        folder = Path(name)
        package = folder / "grpo_stage"
        shutil.copytree(PACKAGE / "rewards", package / "rewards", ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("__init__.py", "survival/__init__.py", "survival/descendants.py"):
            (package / file).parent.mkdir(exist_ok=True)
            shutil.copy(PACKAGE / file, package / file)
        shutil.copy(code_attacks.__file__, folder / "attacks.py")
        command = [sys.executable, str(folder / "attacks.py")]
        if os.getuid() == 0:
            python = shutil.which("python3", path="/usr/bin")
            if python is None or shutil.which("setpriv") is None:
                missing_tool("As root, the sandbox of an ordinary user needs /usr/bin/python3 and setpriv.")
            user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]
            command = [*user, str(python), str(folder / "attacks.py")]
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o777 if path.is_dir() else 0o644)
        done = subprocess.run(
            [*command, str(folder)], cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True
        )
    num_tried = sum("input" in attack.tests and attack.name not in MEET_A_LIMIT for attack in ATTACKS)
    uid = 65534 if os.getuid() == 0 else os.getuid()
    assert (done.stdout, done.stderr) == (f"{uid} {num_tried} [] 0\n", "")


def in_sandboxes(process: psutil.Process) -> list[psutil.Process]:
    """bubblewrap below a process, and what runs in it."""
    return [
        each
        for bwrap in process.children()
        if bwrap.name() == "bwrap"
        for each in (bwrap, *bwrap.children(recursive=True))
    ]


def test_a_stop_signal_does_not_fail_a_program(graders: Graders) -> None:
    """LLaMA Board sends its signal to all that a run has started, and a scheduler to the whole job."""
    program = "import time\ntime.sleep(0.8)\nprint(3)", InputTests(("",), ("3",))
    num_signals = 0
    with ThreadPoolExecutor(1) as thread:
        graded = thread.submit(grade, graders, program)
        while not graded.done():
            for process in in_sandboxes(psutil.Process()):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(STOP_SIGNALS[num_signals % len(STOP_SIGNALS)])
                    num_signals += 1
            time.sleep(0.02)
    assert graded.result()[0].has_passed
    assert num_signals > 8


def test_a_sandbox_ends_with_the_trainer() -> None:
    code = (
        "import time\nfrom grpo_stage.rewards.code.sandbox import Limits, Session\n"
        "session = Session('bwrap', 7, Limits(timeout_s=60), source='while True: pass')\n"
        "print('ready', flush=True)\nsession.ask({'stdin': ''}, time.monotonic() + 60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "ready\n"
        time.sleep(0.3)
        inside = in_sandboxes(psutil.Process(trainer.pid))
        trainer.kill()
    assert len(inside) == 3  # bubblewrap, the harness, the program
    assert psutil.wait_procs(inside, 20.0)[1] == []


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_ends_in_a_verdict(machine: str) -> None:
    """Every way through it: each jump stays inside, and the last instruction returns."""
    code = filter_of_programs(machine)
    assert code is not None
    size = len(code) // 8
    for i in range(size):
        operation, if_true, if_false = (
            int.from_bytes(code[8 * i : 8 * i + 2], "little"),
            code[8 * i + 2],
            code[8 * i + 3],
        )
        assert operation == 0x06 or i + 1 + max(if_true, if_false) < size
    assert code[-8] == 0x06
    assert filter_of_programs("riscv64") is None


# Where there is no sandbox


@pytest.fixture
def fake_bwrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a program in the place of bubblewrap, whose version it has unless it says another."""

    def put(script: str) -> None:
        file = tmp_path / "bin" / "bwrap"
        file.parent.mkdir()
        file.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && {{ echo bubblewrap ${{VERSION:-0.8.0}}; exit; }}\n{script}\n'
        )
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")

    return put


def refusal() -> str:
    """What a run is refused with, before a model is loaded."""
    with pytest.raises(ValueError, match="`code_sandbox: bwrap`") as refused:
        load_rewards(["code"], None, None, max_new_tokens=9, timeout_s=9.0)
    said = str(refused.value)
    assert "`run_code_without_sandbox: true`" in said
    return said


def test_without_bubblewrap_a_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install bubblewrap" in refusal()


def test_an_old_bubblewrap_is_refused(fake_bwrap: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_bwrap("exit 1")
    monkeypatch.setenv("VERSION", "0.6.1")
    assert "bubblewrap 0.6.1 is older than 0.8" in refusal()


def test_where_namespaces_are_off_the_reason_is_told(fake_bwrap: Callable[[str], None]) -> None:
    fake_bwrap("echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
    said = refusal()
    assert "No permissions to create new namespace" in said
    assert "kernel.apparmor_restrict_unprivileged_userns=0" in said


def test_a_sandbox_that_does_not_hold_is_refused(fake_bwrap: Callable[[str], None]) -> None:
    fake_bwrap(f'while [ "$1" != -I ]; do python=$1; shift; done; exec "$python" -I -S {harness.__file__}')
    said = refusal()
    assert "it does not hold: a program in it could " in said


def test_checks_of_several_processes_do_not_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    users = set()

    def start(kind: str, slot: int, *more: object, **others: object) -> None:
        users.add(slot % NUM_UIDS)
        raise sandbox.SandboxError("only its user is asked for")

    monkeypatch.setattr(sandbox, "Session", start)
    for pid in (4_000, 4_001):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        with pytest.raises(ValueError, match="only its user is asked for"):
            check_sandbox("bwrap")
    assert len(users) == 2
