"""LLaMA Board's train tab with the stage in it, in this process and without a browser."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from grpo_stage.host import registration


REPOSITORY = Path(__file__).resolve().parents[2]


class Board:
    """The elements of the Board, and what a page would send for them."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.runner = engine.runner
        self.manager = engine.manager

    def data(self, **values: Any) -> dict[Any, Any]:
        """A page's values: those that elements start with, and these by id, with `__` for the dot."""
        start = {
            "top__lang": "en",
            "top__model_name": "Custom",
            "top__model_path": "model",
            "top__checkpoint_path": [],
            "train__training_stage": "GRPO",
            "train__dataset": ["addition"],
            "train__dataset_dir": str(REPOSITORY / "yaml_examples" / "data"),
            "train__output_dir": "run",
            "train__grpo_reward_funcs": ["accuracy"],
            "train__config_path": "saved.yaml",
        }
        data = {element: getattr(element, "value", None) for element in self.manager.get_elem_list()}
        for name, value in (start | values).items():
            data[self.manager.get_elem_by_id(name.replace("__", "."))] = value
        return data

    def by_id(self, values: dict[Any, Any]) -> dict[str, Any]:
        return {self.manager.get_id_by_elem(element): value for element, value in values.items()}

    def arguments(self, **values: Any) -> dict[str, Any]:
        return self.runner._parse_train_args(self.data(**values))


@pytest.fixture(scope="session")
def board() -> Board:
    registration.install()
    from llamafactory.webui import engine, interface
    from llamafactory.webui.components import create_top

    with gr.Blocks():
        board_engine = engine.Engine(demo_mode=True)
        board_engine.runner.demo_mode = False
        board_engine.manager.add_elems("top", create_top())
        board_engine.manager.add_elems("train", interface.create_train_tab(board_engine))
    return Board(board_engine)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Board keeps its files in the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def yaml_of(board: Board) -> Callable[..., dict[str, Any]]:
    """What the run gets: the file that the Board writes for a form, read as the run reads it."""
    from llamafactory.webui.runner import save_cmd

    from grpo_stage.host.registration import read_command_line

    def read(**values: Any) -> dict[str, Any]:
        return read_command_line([save_cmd(board.arguments(**values))])  # type: ignore[return-value]

    return read
