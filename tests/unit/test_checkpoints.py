"""Checkpoint folders: whole or not there, verified, rotated."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from grpo_stage.records import line_log
from grpo_stage.records.line_log import LineLog
from grpo_stage.survival import checkpoints
from grpo_stage.survival.checkpoints import STATE_FILE, CheckpointSaveError, DamagedCheckpointError


FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "grpo_rollout_0.json", "trainer_state.json")
STATE = {"recipe_hash": "x", "num_tokens": 17}


def writer(name: str, content: str) -> checkpoints.Part:
    return lambda folder: Path(folder, name).write_text(content)


def save(output_dir: Path, step: int, content: str = "saved", **changes: checkpoints.Part) -> Path:
    """`changes` replace the parts that are called like a file's stem."""
    parts = {name.partition(".")[0]: writer(name, f"{content} {name} {step}") for name in FILES}
    folder = output_dir / f"checkpoint-{step}"
    checkpoints.save(folder, parts | changes, STATE, is_saver=True)
    return folder


def names(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir())


def in_a_process_that_dies(action: Callable[[], object]) -> None:
    """Run `action` in a child that has to end by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the action came to its end"
    assert os.WTERMSIG(status) == signal.SIGKILL


def kill(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_file(name: str) -> checkpoints.Part:
    def write(folder: str) -> None:
        Path(folder, name).write_text("hal")
        kill()

    return write


# Saved and verified


def test_what_was_saved_verifies_and_its_state_comes_back(tmp_path):
    folder = save(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-3"]
    checkpoints.verify(folder)
    state = checkpoints.read_state(folder)
    assert {key: state[key] for key in STATE} == STATE
    assert sorted(state["files"]) == sorted(FILES)
    (folder / "README.md").write_text("a card")
    (folder / "more.pt").write_text("more")
    checkpoints.verify(folder)


def test_files_that_no_resume_reads_may_be_rewritten(tmp_path):
    """The host's callback saves the processor, tokenizer included, into the finished folder."""
    folder = save(tmp_path, 3, tokenizer=writer("tokenizer_config.json", "{}"))
    (folder / "tokenizer_config.json").write_text('{"processor_class": "P"}')
    checkpoints.verify(folder)


def test_files_in_folders_of_a_checkpoint_are_listed(tmp_path):
    def shards(folder: str) -> None:
        Path(folder, "shards").mkdir()
        Path(folder, "shards", "rank_0.pt").write_text("part")

    folder = save(tmp_path, 3, shards=shards)
    (folder / "shards" / "rank_0.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"shards/rank_0\.pt is missing"):
        checkpoints.verify(folder)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "is missing"),
        (lambda path: path.write_text(path.read_text()[:-2]), "bytes of"),
        (lambda path: path.write_text(""), "has 0 bytes of"),
        (flip, "has changed since it was saved"),
    ],
)
def test_every_kind_of_damage_is_named(tmp_path, name, damage, said):
    previous, folder = save(tmp_path, 2), save(tmp_path, 10)
    damage(folder / name)
    with pytest.raises(DamagedCheckpointError, match="it is damaged") as error:
        checkpoints.verify(folder)
    assert f"{name} " in str(error.value)
    assert said in str(error.value)
    assert sum(other in str(error.value) for other in FILES) == 1
    assert f"`resume_from_checkpoint: {previous}`" in str(error.value)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "is not JSON"),
        (lambda path: path.write_text(path.read_text().replace("17", "18")), "has changed"),
        (lambda path: path.write_text('{"recipe_hash": "x"}'), "has changed"),
        (lambda path: path.write_text("[]"), "has changed"),
        (lambda path: path.write_bytes(b"\x00\xff"), "is not JSON"),
    ],
)
def test_a_damaged_state_file_is_named(tmp_path, damage, said):
    folder = save(tmp_path, 4)
    damage(folder / STATE_FILE)
    for check in (checkpoints.verify, checkpoints.read_state):
        with pytest.raises(DamagedCheckpointError, match=f"{STATE_FILE} {said}.*No whole checkpoint"):
            check(folder)


def test_the_newest_whole_one_skips_damaged_and_foreign_ones(tmp_path):
    whole, cut = save(tmp_path, 9), save(tmp_path, 10)
    (cut / "optimizer.pt").write_text("")
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-12-old").mkdir()
    assert checkpoints.newest_whole(tmp_path) == whole
    assert checkpoints.newest_whole(tmp_path, before=9) is None
    assert checkpoints.newest_whole(tmp_path / "absent") is None


def test_a_large_file_is_known_by_its_size_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_HASHED_BYTES", 1)
    folder = save(tmp_path, 3)
    monkeypatch.undo()
    flip(folder / "optimizer.pt")
    checkpoints.verify(folder)
    (folder / "optimizer.pt").write_text("short")
    with pytest.raises(DamagedCheckpointError, match=r"optimizer\.pt has 5 bytes"):
        checkpoints.verify(folder)


# Failures and kills in a save


def full_disk(folder: str) -> None:
    Path(folder, "partial.pt").write_text("par")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("position", range(len(FILES)))
@pytest.mark.parametrize("is_replayed", [False, True], ids=["new", "replayed"])
def test_a_full_disk_at_any_file_leaves_the_last_good_checkpoint(tmp_path, position, is_replayed):
    last = save(tmp_path, 4)
    if is_replayed:
        last = save(tmp_path, 6)
    before = names(tmp_path)
    stems = [name.partition(".")[0] for name in FILES]
    with pytest.raises(CheckpointSaveError) as error:
        save(tmp_path, 6, content="newer", **{stems[position]: full_disk})
    assert names(tmp_path) == before
    checkpoints.verify(last)
    message = str(error.value)
    assert str(tmp_path / "checkpoint-6") in message
    assert "No space left on device" in message
    assert f"Left to save were {', '.join(stems[position:])};" in message
    assert f"The last good checkpoint is {last}." in message
    assert "GB are free" in message
    assert f"go on with `resume_from_checkpoint: {last}`" in message
    assert isinstance(error.value.__cause__, OSError)


@pytest.mark.parametrize(("owner", "name"), [(json, "dump"), (os, "fsync")])
def test_a_full_disk_at_the_seal_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, owner, name):
    last = save(tmp_path, 6)
    monkeypatch.setattr(owner, name, lambda *_: full_disk(str(tmp_path / ".tmp-checkpoint-6")))
    with pytest.raises(CheckpointSaveError, match="Left to save were the list of files"):
        save(tmp_path, 6, content="newer")
    monkeypatch.undo()
    assert names(tmp_path) == ["checkpoint-6"]
    checkpoints.verify(last)
    assert (last / "optimizer.pt").read_text() == "saved optimizer.pt 6"


def test_a_failure_between_the_two_renames_brings_the_replaced_one_back(tmp_path, monkeypatch):
    last = save(tmp_path, 6)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.startswith(".tmp-"):
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(CheckpointSaveError, match=f"The last good checkpoint is {last}"):
        save(tmp_path, 6, content="newer")
    assert names(tmp_path) == ["checkpoint-6"]
    checkpoints.verify(last)


def test_without_an_earlier_checkpoint_the_error_says_so(tmp_path):
    with pytest.raises(CheckpointSaveError, match=r"no earlier checkpoint to resume from.*start again"):
        save(tmp_path, 6, optimizer=full_disk)
    assert names(tmp_path) == []


def test_another_ranks_failure_ends_the_save_here(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "all_gather", lambda mine: [mine, "OSError(28, 'rank 1 is full')"])
    with pytest.raises(CheckpointSaveError, match="rank 1 is full"):
        save(tmp_path, 6)
    assert names(tmp_path) == []


def test_only_the_saving_rank_seals(tmp_path):
    """The others write what is theirs into the same folder."""
    checkpoints.save(tmp_path / "checkpoint-1", {"rng": writer("rng_state_1.pth", "r")}, STATE, is_saver=False)
    assert names(tmp_path) == [".tmp-checkpoint-1"]
    folder = save(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-1"]
    assert "rng_state_1.pth" in checkpoints.read_state(folder)["files"]


@pytest.mark.parametrize("position", range(len(FILES)))
def test_a_kill_at_any_file_leaves_nothing_that_is_taken_for_a_checkpoint(tmp_path, position):
    last = save(tmp_path, 4)
    stem = FILES[position].partition(".")[0]
    in_a_process_that_dies(lambda: save(tmp_path, 6, **{stem: half_a_file(FILES[position])}))
    assert names(tmp_path) == [".tmp-checkpoint-6", "checkpoint-4"]
    assert get_last_checkpoint(str(tmp_path)) == str(last)
    assert sort_checkpoints(str(tmp_path)) == [str(last)]
    checkpoints.remove_unfinished(str(tmp_path))
    assert names(tmp_path) == ["checkpoint-4"]
    checkpoints.verify(last)


@pytest.mark.parametrize("moment", range(5))
def test_a_kill_at_any_moment_of_a_replacement_leaves_one_of_the_two(tmp_path, monkeypatch, moment):
    """Before each of the renames, before the folder is flushed, and in the removal of the old one."""
    folder = save(tmp_path, 6, content="old")
    renames = []
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        renames.append(target)
        return kill() if moment == len(renames) - 1 and moment < 2 else real(self, target)

    def flush_nothing_of_the_parent(path: Path) -> None:
        if moment == 2 and path == tmp_path:
            kill()

    def rmtree(path: Path, **_: object) -> None:
        if moment == 4:
            (path / STATE_FILE).unlink()
        kill()

    def replace() -> None:
        monkeypatch.setattr(Path, "rename", rename)
        monkeypatch.setattr(checkpoints, "_flush", flush_nothing_of_the_parent)
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        save(tmp_path, 6, content="new")

    in_a_process_that_dies(replace)
    checkpoints.remove_unfinished(str(tmp_path))
    assert names(tmp_path) == ["checkpoint-6"]
    checkpoints.verify(folder)
    assert (folder / "optimizer.pt").read_text() == f"{'old' if moment < 2 else 'new'} optimizer.pt 6"


def test_a_replayed_step_replaces_its_checkpoint(tmp_path):
    save(tmp_path, 6, content="old", gone=writer("gone.pt", "gone"))
    folder = save(tmp_path, 6, content="new")
    assert names(tmp_path) == ["checkpoint-6"]
    assert (folder / "optimizer.pt").read_text() == "new optimizer.pt 6"
    assert not (folder / "gone.pt").exists()


# Rotation, and starting afresh


def saved_at(output_dir: Path, order: list[int], clock: int = 1) -> None:
    for time, step in enumerate(order):
        os.utime(save(output_dir, step), (1000 + clock * time, 1000 + clock * time))


@pytest.mark.parametrize(
    ("order", "limit", "best", "left"),
    [
        ([2, 4, 6], None, None, [2, 4, 6]),
        ([2, 4, 6], 0, None, [2, 4, 6]),
        ([2, 4, 6], 3, None, [2, 4, 6]),
        ([2, 4, 6], 2, None, [4, 6]),
        ([2, 4, 6], 1, None, [6]),
        ([2, 4, 6], 2, 2, [2, 6]),
        ([2, 4, 6], 1, 2, [2, 6]),
        ([2, 4, 6, 8, 10], 3, 4, [4, 8, 10]),
        ([2, 4, 6], 1, 6, [6]),
        ([2, 4, 6], 2, 6, [4, 6]),
        ([8, 10, 4], 2, None, [4, 10]),
        ([6, 2, 4], 2, None, [2, 4]),
        ([8, 10, 4], 1, None, [4]),
        ([8, 10, 2, 4, 6], 3, None, [2, 4, 6]),
        ([8, 2, 4], 2, 8, [4, 8]),
    ],
)
@pytest.mark.parametrize("clock", [1, 0, -1])
def test_rotation_keeps_the_newest_the_best_and_the_steps_before_it(tmp_path, order, limit, best, left, clock):
    """Also where steps are replayed from an earlier checkpoint, and whichever way the clock goes."""
    saved_at(tmp_path, order, clock)
    best_path = None if best is None else str(tmp_path / f"checkpoint-{best}")
    checkpoints.rotate(tmp_path / f"checkpoint-{order[-1]}", limit, best_path)
    assert names(tmp_path) == sorted(f"checkpoint-{step}" for step in left)


def test_the_paths_of_the_best_and_the_newest_may_be_relative(tmp_path, monkeypatch):
    saved_at(tmp_path, [2, 4, 6])
    monkeypatch.chdir(tmp_path.parent)
    checkpoints.rotate(Path(tmp_path.name, "checkpoint-6"), 2, str(tmp_path / "checkpoint-2"))
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"]


def test_a_kill_in_a_rotation_leaves_no_half_of_a_checkpoint(tmp_path, monkeypatch):
    saved_at(tmp_path, [2, 4])

    def rotate() -> None:
        monkeypatch.setattr(shutil, "rmtree", kill)
        checkpoints.rotate(tmp_path / "checkpoint-4", 1, None)

    in_a_process_that_dies(rotate)
    assert names(tmp_path) == [".tmp-checkpoint-2", "checkpoint-4"]


def test_a_fresh_start_deletes_the_earlier_runs_checkpoints_and_says_so(tmp_path):
    save(tmp_path, 2)
    save(tmp_path, 10)
    foreign = tmp_path / "checkpoint-4"
    foreign.mkdir()
    (tmp_path / ".tmp-checkpoint-12").mkdir()
    said = []
    checkpoints.logger.addFilter(lambda record: said.append(record.getMessage()))
    try:
        checkpoints.discard_earlier_run(str(tmp_path))
        assert names(tmp_path) == ["checkpoint-4"], "what is not of this stage is not ours to delete"
        checkpoints.discard_earlier_run(str(tmp_path))
        checkpoints.discard_earlier_run(str(tmp_path / "absent"))
    finally:
        checkpoints.logger.filters.clear()
    (message,) = said
    assert "checkpoint-2, checkpoint-10" in message


# Logs


def write_lines(path: Path, num_lines: int, torn: bytes = b"") -> bytes:
    content = b"".join(json.dumps({"step": step}).encode() + b"\n" for step in range(1, num_lines + 1))
    path.write_bytes(content + torn)
    return content


@pytest.mark.parametrize("torn", [b"", b'{"step": 2, "completion": "\xc3', b'{"step": 2}', b"\x00\x00\x00\n"])
def test_a_log_is_cut_after_a_step_and_loses_a_torn_line(tmp_path, torn):
    log = tmp_path / "log.jsonl"
    write_lines(log, 4, torn)
    LineLog(log).keep(lambda line: line["step"] <= 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert names(tmp_path) == ["log.jsonl"]


def test_a_log_with_nothing_to_drop_is_not_touched(tmp_path):
    log = tmp_path / "log.jsonl"
    LineLog(log).keep(lambda _: True)
    assert not log.exists()
    write_lines(log, 3)
    inode = log.stat().st_ino
    LineLog(log).keep(lambda _: True)
    assert log.stat().st_ino == inode


def test_a_kill_while_a_log_is_cut_leaves_all_of_it(tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    content = write_lines(log, 4)

    def cut() -> None:
        monkeypatch.setattr(os, "replace", kill)
        LineLog(log).keep(lambda line: line["step"] <= 2)

    in_a_process_that_dies(cut)
    assert log.read_bytes() == content


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As a full disk: a write goes as far as there is room, and the next one fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_lines_that_the_disk_does_not_take_wait_and_are_said_to_once(tmp_path, monkeypatch):
    said, clock = [], [0.0]
    monkeypatch.setattr(line_log.logger, "warning", said.append)
    monkeypatch.setattr(line_log.time, "monotonic", lambda: clock[0])
    log = LineLog(tmp_path / "log.jsonl")
    log.append(["a" * 40])
    with files_of_at_most(60):
        log.append(["b" * 40])
        log.append(["c" * 40, "d"])
        assert (tmp_path / "log.jsonl").read_text() == "a" * 40 + "\n", "no half of a line"
        assert len(said) == 1
        clock[0] = line_log.WARNING_INTERVAL_S
        log.append([])
    assert len(said) == 2
    assert all(word in said[1] for word in (str(tmp_path / "log.jsonl"), "File too large", "3 lines", "Free space"))
    log.append(["e"])
    assert (tmp_path / "log.jsonl").read_text().split("\n") == ["a" * 40, "b" * 40, "c" * 40, "d", "e", ""]
    log.append(["f"])
    assert (tmp_path / "log.jsonl").read_text().endswith("\ne\nf\n"), "written once"


def test_lines_that_wait_too_long_are_given_up_oldest_first(tmp_path, monkeypatch):
    monkeypatch.setattr(line_log, "MAX_WAITING_BYTES", 10)
    monkeypatch.setattr(line_log.logger, "warning", lambda _: None)
    log = LineLog(tmp_path / "log.jsonl")
    with files_of_at_most(0):
        for text in ("first", "second", "3"):
            log.append([text])
    log.append([])
    assert (tmp_path / "log.jsonl").read_text() == "second\n3\n"


def test_lines_that_still_wait_at_the_end_are_written_or_said_to_be_lost(tmp_path):
    """However the process ends; here with the disk full to the end, and with room again."""
    script = textwrap.dedent(
        """
        import logging, resource, sys
        from grpo_stage.records.line_log import LineLog
        logging.basicConfig(format="%(message)s")
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        log = LineLog(sys.argv[1])
        log.append(["a"])
        log.append(["b"])
        if sys.argv[2] == "room":
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        sys.exit(3)
        """
    )
    said = {}
    for disk in ("full", "room"):
        command = [sys.executable, "-c", script, str(tmp_path / f"{disk}.jsonl"), disk]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 3
        said[disk] = ended.stderr
    lost = f"2 lines are lost that {tmp_path / 'full.jsonl'} could not be given."
    assert said["full"].count(lost) == 1
    assert "lost" not in said["room"]
    assert (tmp_path / "room.jsonl").read_text() == "a\nb\n"


def test_a_log_that_cannot_be_cut_is_named_with_the_remedy(tmp_path):
    content = write_lines(tmp_path / "log.jsonl", 4)
    with files_of_at_most(0), pytest.raises(OSError, match=rf"{tmp_path}/log\.jsonl: .*Free space"):
        LineLog(tmp_path / "log.jsonl").keep(lambda line: line["step"] <= 2)
    assert (tmp_path / "log.jsonl").read_bytes() == content


# Checkpoints that cannot be deleted, or belong to another branch


def refuse(*_: object, **__: object) -> None:
    raise OSError(16, "Device or resource busy")


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(checkpoints.logger, "warning", said.append)
    saved_at(tmp_path, [2, 4, 6])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        checkpoints.rotate(tmp_path / "checkpoint-6", 2, None)
    assert names(tmp_path) == [".tmp-checkpoint-2", "checkpoint-4", "checkpoint-6"]
    (message,) = said
    for part in (
        "checkpoint-2 could not be deleted",
        "resource busy",
        str(tmp_path / ".tmp-checkpoint-2"),
        "yourself",
    ):
        assert part in message
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        checkpoints.rotate(tmp_path / "checkpoint-6", 1, None)
    assert "All of it is still there" in said[1]
    assert names(tmp_path) == [".tmp-checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_fresh_start_beside_a_checkpoint_that_stays_is_refused(tmp_path, monkeypatch):
    save(tmp_path, 2)
    monkeypatch.setattr(checkpoints.logger, "warning", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(OSError, match=r"checkpoint-2 could not be deleted.*another `output_dir`"):
            checkpoints.discard_earlier_run(str(tmp_path))
    monkeypatch.setattr(shutil, "rmtree", refuse)
    checkpoints.discard_earlier_run(str(tmp_path))
    assert names(tmp_path) == [".tmp-checkpoint-2"], "nobody takes that for one"


def test_a_resume_from_an_earlier_checkpoint_names_the_later_ones(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(checkpoints.logger, "warning", said.append)
    saved_at(tmp_path, [2, 4, 10])
    checkpoints.warn_of_later_ones(tmp_path / "checkpoint-10")
    assert said == []
    checkpoints.warn_of_later_ones(tmp_path / "checkpoint-2")
    assert "with checkpoint-4, checkpoint-10 of the same run" in said[0]
    assert "go on from checkpoint-10" in said[0]


# The end of a run


def test_the_parts_of_the_end_are_of_one_step(tmp_path):
    folder = str(tmp_path)
    assert checkpoints.parts_done(folder, 3) == frozenset()
    checkpoints.mark_done(folder, 3, checkpoints.RESULTS)
    checkpoints.mark_done(folder, 3, checkpoints.EVALUATION)
    assert checkpoints.parts_done(folder, 3) == {checkpoints.RESULTS, checkpoints.EVALUATION}
    assert checkpoints.parts_done(folder, 6) == frozenset()
    checkpoints.mark_done(folder, 6, checkpoints.RESULTS)
    assert checkpoints.parts_done(folder, 6) == {checkpoints.RESULTS}
    checkpoints.mark_unfinished(folder)
    assert checkpoints.parts_done(folder, 6) == frozenset()
    assert names(tmp_path) == []


def test_a_run_whose_last_checkpoint_was_deleted_at_its_end_is_finished(tmp_path):
    """`save_total_limit: 1` keeps the best one alone, which may be of an earlier step."""
    folder = tmp_path / "checkpoint-6"
    folder.mkdir()
    TrainerState(global_step=6, max_steps=10).save_to_json(str(folder / "trainer_state.json"))
    output_dir = str(tmp_path)
    assert not checkpoints.is_over(folder, output_dir, 10, evaluates_at_end=False)
    checkpoints.mark_done(output_dir, 10, checkpoints.RESULTS)
    assert not checkpoints.is_over(folder, output_dir, 10, evaluates_at_end=False)
    checkpoints.mark_done(output_dir, 10, checkpoints.MODEL_CARD)
    with pytest.raises(ValueError, match="is finished: it is at step 10 of 10"):
        checkpoints.is_over(folder, output_dir, 10, evaluates_at_end=False)
    assert not checkpoints.is_over(folder, output_dir, 12, evaluates_at_end=False)
    assert not checkpoints.is_over(folder, str(tmp_path / "other"), 10, evaluates_at_end=False)
