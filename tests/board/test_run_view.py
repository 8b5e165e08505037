"""The view of a run, without a browser: which files it reads, and what it makes of them."""

import json
import os
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from grpo_stage.board import run_view
from grpo_stage.board.run_view import PLOTS, RunView, _is_saved
from grpo_stage.board.tables import literal, table

from .browser import append_line, write_run


FOLDER = Path("saves/Custom/lora/run")
NAMES = ("status", "alarms", *(plot.name for plot in PLOTS), "table", "page", "seen")


class View:
    """One page's view."""

    def __init__(self, view: RunView | None = None) -> None:
        with gr.Blocks():
            self.view = view or RunView()
        self._seen: Any = None

    def look(self, folder: Path = FOLDER, is_own: bool = True, step: Any = None, page: Any = 1) -> dict[str, Any]:
        """What changes on the page, by element; nothing where nothing does."""
        answer = self.view._refresh("en", str(folder), is_own, step, "best", page, self._seen)
        if not isinstance(answer, list):
            return {}
        changed = dict(zip(NAMES, answer, strict=True))
        self._seen = changed["seen"]
        return changed


def drawn(plot: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """The curves of a plot."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for step, value, name in plot["value"].itertuples(index=False):
        curves.setdefault(name, []).append((step, value))
    return curves


def test_more_runs_than_are_kept_stay_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_view, "_KEPT_RUNS", 2)
    view, pages = View().view, []
    for i in range(4):
        folder = FOLDER.with_name(f"run{i}")
        write_run(folder, [{"reward": 0.5}])
        pages.append((folder, View(view)))
    assert all("Step 1 of 100" in page.look(folder)["status"] for folder, page in pages)
    assert all(page.look(folder) == {} for folder, page in pages)
    for folder, _ in pages:
        append_line(folder, current_steps=2, reward=0.5)
    assert all("Step 2 of 100" in page.look(folder)["status"] for folder, page in pages)


def test_a_metric_that_comes_later_is_drawn_in_a_color_of_its_own() -> None:
    view = View()
    write_run(FOLDER, [{"reward": 0.5}, {"reward": 0.75}])
    before = view.look()["reward"]
    append_line(FOLDER, current_steps=3, reward=1.0, **{"rewards/format/mean": 0.25})
    append_line(FOLDER, current_steps=4, reward=1.0, **{"rewards/format/mean": 0.5})
    after = view.look()["reward"]
    assert drawn(after)["format"] == [(3, 0.25), (4, 0.5)]
    colors = after["color_map"]
    assert colors.keys() == {"reward", "format"}
    assert colors["format"] != colors["reward"] == before["color_map"]["reward"]


def test_a_single_point_is_a_line() -> None:
    view = View()
    write_run(FOLDER, [{"reward": 0.5}])
    shown = view.look()
    room = {run_view._UNSEEN: [(1, 0.25), (1, 0.75)]}
    assert drawn(shown["reward"]) == {"reward": [(0.99, 0.5), (1, 0.5), (1.01, 0.5)], **room}
    append_line(FOLDER, current_steps=201, reward=0.75, eval_reward=0.5)
    shown = view.look()
    assert drawn(shown["reward"]) == {"reward": [(1, 0.5), (201, 0.75)]}
    assert [step for step, _ in drawn(shown["evaluation"])["eval_reward"]] == pytest.approx([198.99, 201, 203.01])


def test_a_plot_is_told_only_what_has_changed() -> None:
    """With its frame it is made anew; and with limits a page of Gradio 5.50 updates itself without end."""
    view = View()
    write_run(FOLDER, [{"reward": 0.5}, {"reward": 0.75}])
    assert view.look()["reward"].keys() >= {"value", "visible", "color_map"}
    append_line(FOLDER, current_steps=3, reward=1.0)
    assert view.look()["reward"].keys() == {"value", "__type__"}


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([0.0], (-1, 1)),
        ([-2, -2, -2.0], (-3, -1)),
        ([1.2e-4, 1.2e-4 + 1e-15], (6e-5, 1.8e-4)),
        ([1.7e308], (8.5e307, 1.7e308)),
        ([0.13, 0.87], None),
        ([-1e308, 1e308], None),
    ],
)
def test_an_axis_around_a_constant_has_ends(values: list[float], ends: tuple[float, float] | None) -> None:
    assert run_view._ends_around(min(values), max(values)) == (ends and pytest.approx(ends))


@pytest.mark.parametrize(
    ("step", "shown", "is_said"),
    [
        *((None, 30, False), (10, 10, False), (15, 10, False), (-5, 10, True), (0, 10, True), (1e99, 30, True)),
        *((31, 30, True), ("abc", 30, True), (float("nan"), 30, True)),
    ],
)
def test_a_step_out_of_range_is_bounded_and_said(step: Any, shown: int, is_said: bool) -> None:
    write_run(FOLDER, [{"reward": 0.5}], [(10, "a"), (30, "b")])
    status = View().look(step=step)["status"]
    assert f"Completions of step {shown}:" in status
    assert ("There is no step" in status) == is_said


@pytest.mark.parametrize(
    ("page", "shown"), [(1, 1), (2, 2), (3, 2), (0, 1), (-3, 1), (1e99, 2), (None, 1), ("abc", 1), (1.5, 1)]
)
def test_a_page_out_of_range_is_set_right(page: Any, shown: int) -> None:
    write_run(FOLDER, [{"reward": 0.5}], [(1, f"text {i}") for i in range(9)])
    answer = View().look(page=page)
    assert f"page {shown} of 2" in answer["status"]
    assert answer["page"] == (shown if page != shown else gr.skip())


def test_what_cannot_be_shown_is_said() -> None:
    view = View()
    write_run(FOLDER, [{"reward": 0.5}], [(1, "text")])
    assert view.look()["reward"]["visible"]
    (FOLDER / "trainer_log.jsonl").unlink()
    (FOLDER / "trainer_log.jsonl").mkdir()
    answer = view.look()
    assert "`trainer_log.jsonl` cannot be read: not an ordinary file." in answer["status"]
    assert "No run" not in answer["status"]
    assert not answer["reward"]["visible"]
    other = FOLDER.with_name("damaged")
    write_run(other, [{"reward": 0.5}], [(1, "text")])
    for name in ("trainer_log.jsonl", "completions.jsonl"):
        with (other / name).open("a") as file:
            file.write("torn {\n")
    status = view.look(other)["status"]
    assert "Damaged lines of `trainer_log.jsonl` that are left out: 1." in status
    assert "Damaged lines of `completions.jsonl` that are left out: 1." in status
    assert "Step 1 of 100" in status


def test_alarms_are_shown_with_their_remedy_the_newest_first() -> None:
    view = View()
    write_run(FOLDER, [{"reward": 0.5}])
    assert not view.look()["alarms"]["visible"]
    words = {"seen": "<b>Fell</b>.", "meaning": "Bad.", "remedy": "Lower it.", "action": "warn"}
    with (FOLDER / "alarms.jsonl").open("w") as file:
        for step, settings in ((3, {}), (7, {"learning_rate": 1e-6})):
            line = {"monitor": "entropy_collapse", "step": step, "onset": 1, **words, "settings": settings}
            file.write(json.dumps(line) + "\n")
        file.write("torn {\n")
    answer = view.look()
    shown = answer["alarms"]["value"]
    assert answer["alarms"]["visible"]
    assert shown.index(">7<") < shown.index(">3<")
    assert "Lower it.\nlearning_rate: 1e-06" in shown
    assert "&lt;b&gt;Fell&lt;/b&gt;" in shown
    assert "Damaged lines of `alarms.jsonl` that are left out: 1." in answer["status"]


def test_nothing_is_read_from_a_folder_that_is_not_the_persons(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write_run(outside, [{"reward": 0.5}], [(1, "secret")])
    answer = View().look(outside, is_own=False)
    assert "not below `saves`" in answer["status"]
    assert "Step" not in answer["status"]
    assert not answer["table"]["visible"]


@pytest.mark.parametrize(
    ("folder", "is_saved"),
    [
        ("", True),
        ("saves/Custom/lora/run", True),
        ("./saves/x", True),
        ("saves", False),
        ("saves/..", False),
        ("saves/Custom/../../elsewhere", False),
        ("saves/Custom/../Custom", False),
        ("../saves/x", False),
        ("elsewhere/run", False),
        ("/etc", False),
        ("savesx/run", False),
    ],
)
def test_which_folders_are_the_boards(folder: str, is_saved: bool) -> None:
    assert _is_saved(folder) == is_saved
    if folder.startswith("saves/C"):
        assert _is_saved(os.path.abspath(folder)) == (".." not in folder or not folder.endswith("elsewhere"))


def test_tables_show_texts_as_they_are() -> None:
    text = "<b>&amp;\n\n    indented\t" + "x" * 10_000 + "the end"
    html = table(["<i>"], [[text]], [1])
    assert "&lt;b&gt;&amp;amp;\n\n    indented\t" in html
    assert "the end" in html
    assert "<b>" not in html
    assert "&lt;i&gt;" in html
    assert literal("`a_b` *c* <d> 1") == "\\`a\\_b\\` \\*c\\* \\<d\\> 1"
