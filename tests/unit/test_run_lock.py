"""One run a folder: who holds it is named, and nothing that is dead does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_stage.survival import run_lock
from grpo_stage.survival.run_lock import LOCK_FILE, owned, refuse_used


HOLDER = """
import os, sys, time
from grpo_stage.survival.run_lock import owned
with owned(sys.argv[1]):
    child = os.fork() if "forks" in sys.argv else None
    if child == 0:
        time.sleep(60)
    print(child, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def hold(tmp_path):
    """Start a process that owns the folder, and wait until it does; the pid of a child that it has forked."""
    started = []

    def begin(*options: str) -> tuple[subprocess.Popen, int]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", HOLDER, str(tmp_path), *options],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
        said = started[-1].stdout.readline().strip()
        return started[-1], 0 if said == "None" else int(said)

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_with_the_first_ones_process_host_and_start(tmp_path, hold):
    first, _ = hold()
    expected = rf"`output_dir: {tmp_path}` is in use: process {first.pid} on \S+ .* since \d{{4}}-\d\d-\d\d .*another"
    with pytest.raises(ValueError, match=expected), owned(str(tmp_path)):
        pytest.fail("two runs")
    with pytest.raises(ValueError, match=expected):
        refuse_used(str(tmp_path))
    first.communicate("\n", timeout=20)
    assert list(tmp_path.iterdir()) == []
    with owned(str(tmp_path)):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_killed_run_holds_nothing_nor_does_what_it_has_forked(tmp_path, hold):
    first, child = hold("forks")
    first.kill()
    first.wait()
    try:
        assert Path(f"/proc/{child}").exists()
        assert (tmp_path / LOCK_FILE).exists()
        refuse_used(str(tmp_path))
        with owned(str(tmp_path)):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_run_that_leaves_while_another_looks_is_no_obstacle(tmp_path, monkeypatch):
    """The file that the other has opened is then no longer the one that is there."""
    lockf, taken_away = run_lock.fcntl.lockf, []

    def slow(descriptor, how):
        if not taken_away:
            taken_away.append(True)
            (tmp_path / LOCK_FILE).unlink()
        lockf(descriptor, how)

    monkeypatch.setattr(run_lock.fcntl, "lockf", slow)
    with owned(str(tmp_path)):
        assert (tmp_path / LOCK_FILE).exists()
    assert taken_away


def test_a_disk_that_cannot_lock_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)
    refuse_used(str(tmp_path))
    run_lock.logger.addHandler(caplog.handler)
    try:
        with owned(str(tmp_path / "new")):
            assert "No locks available" in caplog.text
            assert str(tmp_path / "new" / LOCK_FILE) in caplog.text
    finally:
        run_lock.logger.removeHandler(caplog.handler)


def test_the_lock_lasts_as_long_as_the_block(tmp_path, hold):
    with owned(str(tmp_path)):
        started = time.monotonic()
        refused = subprocess.run(
            [sys.executable, "-c", HOLDER, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
        )
        assert f"process {os.getpid()} on" in refused.stderr
        assert time.monotonic() - started < 30
    hold()


def test_a_file_of_another_user_is_met_with_a_lock_that_needs_no_writing(tmp_path, hold, monkeypatch):
    opened = os.open

    def open_as_another(path, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *mode)

    first, _ = hold()
    monkeypatch.setattr(os, "open", open_as_another)
    with pytest.raises(ValueError, match=f"is in use: process {first.pid} on "), owned(str(tmp_path)):
        pytest.fail("two runs")
    first.kill()
    first.wait()
    with owned(str(tmp_path)):
        pass


def test_other_users_may_lock_the_file(tmp_path):
    before = os.umask(0o077)
    try:
        with owned(str(tmp_path)):
            assert (tmp_path / LOCK_FILE).stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)
