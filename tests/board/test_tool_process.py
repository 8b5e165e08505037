"""The commands that the Board starts: each is a process of its own, which ends with its button's event."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from grpo_stage.board import tool_process
from grpo_stage.board.tool_process import CONFIG, ToolState, WarmProcess, run_tool

from .conftest import REPOSITORY


HANGS = """
import os, time
from pathlib import Path

def hangs(completions):
    Path({file!r}).write_text(str(os.getpid()))
    time.sleep(600)
"""


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[WarmProcess]:
    """One for all tests of the file."""
    process = WarmProcess()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool_process, "WARM", process)
        yield process
    process.close()
    assert process._process is None or process._process.wait(30) == 0  # it ends with the Board


def recipe(**changes: object) -> dict[str, object]:
    folder = REPOSITORY / "yaml_examples"
    return {
        **yaml.safe_load((folder / "quickstart.yaml").read_text()),
        "dataset_dir": str(folder / "data"),
        "model_name_or_path": None,
        **changes,
    }


def wait_for(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_commands_run_beside_one_another_and_are_forks_of_one_process(warm: WarmProcess) -> None:
    trial = ("try-rewards", CONFIG, "--rows", "1")
    first, second = (run_tool(trial, recipe(reward_funcs=name)) for name in ("accuracy", "format"))
    states = [next(first), next(second)]
    assert states == [ToolState(0), ToolState(0)]
    (*_, last), (*_, other) = first, second
    assert last.answer is not None
    assert last.answer["functions"] == ["accuracy"]
    assert other.answer is not None
    assert other.answer["functions"] == ["format"]
    process = warm._process
    assert process is not None
    # A command that the process itself refuses, in its own words and without those of the host before them.
    *_, refused = run_tool(trial, recipe(reward_funcs="nothing"))
    assert refused.error is not None
    assert refused.error.startswith("reward 'nothing' is not known")
    assert warm._process is process
    assert len(os.listdir(f"/proc/{process.pid}/task")) == 1  # a fork beside threads may hang, and Python 3.12 says so


def test_a_closed_iterator_ends_the_command_and_what_it_has_started(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    (tmp_path / "own.py").write_text(HANGS.format(file=str(file)))
    states = run_tool(("try-rewards", CONFIG), recipe(reward_funcs=f"{tmp_path}/own.py:hangs"))
    for _ in states:
        if file.exists() and file.read_text():
            break
    states.close()
    wait_for(lambda: not os.path.exists(f"/proc/{file.read_text()}"))


def test_a_process_that_is_gone_is_told_and_started_anew(warm: WarmProcess) -> None:
    states = run_tool(("check", CONFIG), recipe())
    next(states)
    warm.start()
    assert warm._process is not None
    gone = warm._process
    gone.send_signal(signal.SIGSTOP)
    next(states)  # the request waits
    gone.kill()
    *_, last = states
    assert last.error is not None
    assert "grpo_stage.tools.warm, which would have started it, has ended" in last.error
    *_, last = run_tool(("try-rewards", CONFIG, "--rows", "1"), recipe())
    assert last.answer is not None
    assert warm._process is not gone


def test_a_command_that_is_killed_says_so(warm: WarmProcess, tmp_path: Path) -> None:
    states = run_tool(("try-rewards", CONFIG), recipe(reward_funcs=f"{tmp_path}/own.py:hangs"))
    (tmp_path / "own.py").write_text(HANGS.format(file=str(tmp_path / "pid")))
    for _ in states:
        if (tmp_path / "pid").exists():
            break
    assert warm._process is not None
    children = Path(f"/proc/{warm._process.pid}/task/{warm._process.pid}/children").read_text().split()
    (child,) = children
    os.kill(int(child), signal.SIGKILL)
    *_, last = states
    assert last.error is not None
    assert last.error.startswith("`grpo-stage try-rewards` has ended without a result.")
    assert "Reward code that will run" in last.error  # what it has said until then


def test_half_an_answer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: WarmProcess, words: list[str], errors: Path) -> Iterator[None]:
        errors.write_text("noise")
        Path(words[-1]).write_text('{"is_whole": false, "num_sampled": 2}')
        yield

    monkeypatch.setattr(WarmProcess, "run", run)
    *_, running, last = run_tool(("probe", CONFIG), {})
    assert running.answer == {"is_whole": False, "num_sampled": 2}
    assert last.answer is None
    assert last.error is not None
    assert "has ended without a result" in last.error


LIGHT = """
import os, sys
from grpo_stage.tools import cli, warm

def main(words):
    print(words, os.environ.get("USE_MODELSCOPE_HUB"), len(os.environ.get("LONG", "")), os.getcwd(), file=sys.stderr)

cli.main = main
warm.MODULES = ()
{more}
warm.main()
"""


@pytest.fixture
def light(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., WarmProcess]]:
    """Make a process that has not imported much, whose commands say which they are."""
    started: list[WarmProcess] = []

    def make(more: str = "") -> WarmProcess:
        (tmp_path / "light.py").write_text(LIGHT.format(more=more))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.setattr(tool_process, "_PROGRAM", "light")
        started.append(WarmProcess())
        return started[-1]

    yield make
    for process in started:
        process.close()


def said_by(process: WarmProcess, tmp_path: Path, *words: str) -> str:
    for _ in process.run(words, tmp_path / "errors.txt"):
        pass
    return (tmp_path / "errors.txt").read_text()


def test_a_command_has_the_environment_and_the_folder_of_the_board_at_the_press(
    light: Callable[..., WarmProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = light(more="import torch")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "0")
    process.start()
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")  # as LLaMA-Factory's "Hub name" does
    for name in range(4):
        monkeypatch.setenv(f"FILLER_{name}", "x" * 100_000)  # more than a message may be
    monkeypatch.setenv("LONG", "x" * 100_000)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    # Also in a Board with many open files.
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most), most))
    with open(os.devnull) as file:
        many = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 0) for _ in range(1100)]
        try:
            assert said_by(process, tmp_path, "check") == f"['check'] 1 100000 {tmp_path / 'folder'}\n"
        finally:
            for descriptor in many:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
    monkeypatch.delenv("USE_MODELSCOPE_HUB")
    assert said_by(process, tmp_path).startswith("[] None 100000")


def test_a_fork_that_could_not_use_a_device_begins_anew(light: Callable[..., WarmProcess], tmp_path: Path) -> None:
    process = light(more="import torch; torch.cuda.device_count(); torch.cuda.is_available()")
    assert "invalid choice: 'nonsense'" in said_by(process, tmp_path, "nonsense")  # not by `main` of the fork


def test_a_process_that_hangs_is_replaced(
    light: Callable[..., WarmProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = light(more="import time; time.sleep(600)")
    waiting = process.run(["check"], tmp_path / "errors.txt")
    next(waiting)
    first = process._process
    waiting.close()
    assert first is not None
    assert first.wait(30) == -signal.SIGKILL
    with monkeypatch.context() as patch:
        patch.setattr(tool_process, "PATIENCE_S", 1)
        assert "Try again: a new one is started" in said_by(process, tmp_path, "check")
    light()
    process.start()
    assert said_by(process, tmp_path, "check").startswith("['check']")


def test_what_is_installed_meanwhile_is_what_a_command_runs(
    light: Callable[..., WarmProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages, ours = tmp_path / "site-packages", tmp_path / "grpo_stage"
    (ours / "host").mkdir(parents=True)
    (ours / "host" / "rules.py").touch()
    packages.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
    monkeypatch.setattr(tool_process, "_PACKAGE", ours)
    process = light()
    processes = []
    for change in (lambda: None, (packages / "flash_attn").mkdir, (ours / "host" / "rules.py").touch, lambda: None):
        time.sleep(0.05)  # the clock of a file system has ticks
        change()
        process.start()
        processes.append(process._process)
    first, second, third, same = processes
    assert len({first, second, third}) == 3
    assert same is third
    assert first is not None
    assert first.wait(30) == 0


DEVICES = """
import importlib, os
import torch
from grpo_stage.tools.warm import ENVIRONMENT, MODULES

def refused(*_, **__):
    raise RuntimeError("a device was asked for")

os.environ.update(ENVIRONMENT)
torch.cuda._device_count_nvml = lambda: 1  # which asks the driver's library, and not CUDA
for owner, names in {
    torch.cuda: ("_lazy_init", "is_initialized", "get_device_capability"),
    torch.accelerator: ("is_available", "device_count", "current_accelerator"),
    torch._C: ("_cuda_getDeviceCount", "_cuda_init"),
}.items():
    for name in names:
        setattr(owner, name, refused)
for name in MODULES:
    importlib.import_module(name)
from transformers.utils import is_flash_attn_2_available
assert is_flash_attn_2_available() and is_flash_attn_2_available.cache_info().currsize
"""


def test_what_is_imported_before_the_forks_asks_for_no_device(tmp_path: Path) -> None:
    """Also with flash-attn, for which transformers asks whether there is a device."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("__version__ = '2.8.3'")
    metadata = tmp_path / "flash_attn-2.8.3.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    (metadata / "top_level.txt").write_text("flash_attn")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", DEVICES], check=True, env={**os.environ, "PYTHONPATH": path})
