"""What a run notes of itself for those who watch it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from grpo_stage.records.activity import ACTIVITY_FILE, Activity
from grpo_stage.survival.stop import RunStopped


def noted(folder: Path) -> dict[str, Any]:
    return json.loads((folder / ACTIVITY_FILE).read_text())


def test_what_a_run_does_is_noted_with_what_it_did(tmp_path: Path) -> None:
    activity = Activity(str(tmp_path / "run"))
    with activity.until_its_end():
        activity.begin("model")
        activity.begin("engine")
        assert noted(tmp_path / "run")["activity"] == "engine"
        assert [name for name, _ in noted(tmp_path / "run")["done"]] == ["model"]
        activity.begin("training")
        with activity.during("evaluation"):
            assert noted(tmp_path / "run")["activity"] == "evaluation"
        assert noted(tmp_path / "run")["activity"] == "training"
    assert noted(tmp_path / "run")["activity"] == "finished"


def test_how_a_run_ended_is_noted(tmp_path: Path) -> None:
    activity = Activity(str(tmp_path))
    for error, words in ((ValueError("`beta` is -1."), "`beta` is -1."), (RuntimeError("out"), "RuntimeError: out")):
        with pytest.raises(type(error)), activity.until_its_end():
            raise error
        assert (noted(tmp_path)["activity"], noted(tmp_path)["error"]) == ("failed", words)
        assert "raise error" in noted(tmp_path)["log"]
    stop = RunStopped("stopped by SIGTERM")
    stop.checkpoint = "checkpoint-3"
    with pytest.raises(RunStopped), activity.until_its_end():
        raise stop
    assert (noted(tmp_path)["activity"], noted(tmp_path)["checkpoint"]) == ("stopped", "checkpoint-3")


def test_a_rank_that_does_not_save_notes_nothing_and_a_full_disk_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Activity(None).begin("model")
    (tmp_path / "file").touch()
    activity = Activity(str(tmp_path / "file" / "run"))
    with caplog.at_level(logging.WARNING):
        activity.begin("model")
        activity.begin("engine")
    assert caplog.text.count("cannot be written") == 1
