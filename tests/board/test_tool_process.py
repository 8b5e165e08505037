"""The commands that the Board starts: each is a process of its own, which ends with its button's event."""

import os
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
    process.start().close()
    assert process._process is not None
    assert process._process.wait(30) == 0  # it ends with the Board


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


DEVICES = """
import importlib
import torch
from grpo_stage.tools.warm import MODULES

def refused(*_, **__):
    raise RuntimeError("a device was asked for")

for owner, names in {
    torch.cuda: ("is_available", "device_count", "_lazy_init", "is_initialized", "get_device_capability"),
    torch.accelerator: ("is_available", "device_count", "current_accelerator"),
    torch._C: ("_cuda_getDeviceCount", "_cuda_init"),
}.items():
    for name in names:
        setattr(owner, name, refused)
for name in MODULES:
    importlib.import_module(name)
"""


def test_what_is_imported_before_the_forks_asks_for_no_device() -> None:
    subprocess.run([sys.executable, "-c", DEVICES], check=True)
