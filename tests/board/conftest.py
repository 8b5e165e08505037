"""LLaMA Board's train tab with the stage in it: in this process, or in a server that one real browser looks at."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import yaml
from gradio.context import LocalContext
from playwright.sync_api import Browser, Page, expect, sync_playwright

from grpo_stage.board import page_state
from grpo_stage.plugin import registration

from .browser import CHROMIUM, EVIL, PATIENCE_MS, open_board


CLI = Path(sys.executable).with_name("llamafactory-cli")

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
def turn_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Turn to the page of that name: what follows is an event of it."""
    monkeypatch.setattr(page_state, "_pages", OrderedDict())
    before = LocalContext.request.get(None)

    def turn(name: str) -> None:
        LocalContext.request.set(gr.Request(session_hash=name))

    yield turn
    LocalContext.request.set(before)


@pytest.fixture
def yaml_of(board: Board) -> Callable[..., dict[str, Any]]:
    """What the run gets: the file that the Board writes for a form, read as the run reads it."""
    from llamafactory.webui.runner import save_cmd

    from grpo_stage.host.configuration_file import read_command_line

    def read(**values: Any) -> dict[str, Any]:
        return read_command_line([save_cmd(board.arguments(**values))])  # type: ignore[return-value]

    return read


@pytest.fixture
def event_of(board: Board) -> Callable[[str], Callable[[dict[Any, Any]], Any]]:
    """The function that an event of the panel calls, by its name in `tab`."""
    block = board.manager.get_elem_by_id("train.grpo_tab")
    while block.parent is not None:
        block = block.parent

    def find(name: str) -> Callable[[dict[Any, Any]], Any]:
        return next(one.fn for one in block.fns.values() if getattr(one.fn, "__qualname__", "").endswith(f".{name}"))

    return find


@pytest.fixture(scope="session")
def workplace(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the Board is started: a dataset, a reward function, and a recipe."""
    folder = tmp_path_factory.mktemp("board")
    (folder / "data").mkdir()
    rows = [{"question": f"{EVIL} What is {i} + {i}?", "answer": str(2 * i)} for i in range(12)]
    (folder / "data" / "sums.json").write_text(json.dumps(rows))
    columns = {"prompt": "question", "response": "answer"}
    info = {"sums": {"file_name": "sums.json", "columns": columns}}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    (folder / "my rewards.py").write_text(
        "def even(completion_ids):\n    return [sum(t % 2 == 0 for t in c) / len(c) for c in completion_ids]\n\n\n"
        "def broken(completions):\n    return [1 / len(text) for text in completions]\n"
    )
    recipe = {
        **{"stage": "grpo", "do_train": True, "model_name_or_path": str(tiny_model_dir), "template": "smollm2"},
        **{"dataset": "sums", "dataset_dir": "data", "cutoff_len": 128, "finetuning_type": "lora", "lora_rank": 4},
        **{"rollout_backend": "hf", "num_generations": 4, "max_new_tokens": 8, "beta": 0.04, "learning_rate": 1e-3},
        **{"reward_funcs": "my rewards.py:even,accuracy", "reward_weights": "1,0.5", "log_completions": True},
        **{"per_device_train_batch_size": 2, "max_steps": 400, "save_steps": 10, "logging_steps": 1, "seed": 7},
        **{"output_dir": "saves/Custom/lora/seen", "use_cpu": True, "dataloader_pin_memory": False},
        **{"default_system": "Say 'it', \"briefly\", please.", "disable_gradient_checkpointing": True},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="session")
def board_url(workplace: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PATH": f"{CLI.parent}{os.pathsep}{os.environ['PATH']}",
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "BROWSER": "true",
    }
    log = workplace / "server.log"

    def start() -> "subprocess.Popen[bytes]":
        with log.open("wb") as output:
            return subprocess.Popen(
                [CLI, "webui"], cwd=workplace, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    server, num_starts = start(), 1
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while not _answers(url):
            if server.poll() is not None:  # Gradio gives up if it does not reach itself within three seconds
                assert num_starts < 3, log.read_text()
                server, num_starts = start(), num_starts + 1
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield url
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture(scope="session")
def chromium(missing_tool: Callable[[str], None]) -> Iterator[Browser]:
    if CHROMIUM is None:
        missing_tool("LLaMA Board in a browser needs Chromium: `apt-get install chromium`, and `make test` runs it.")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(chromium: Browser, board_url: str, workplace: Path) -> Iterator[Page]:
    """The Board as it opens the first time, with GRPO chosen; no answer of it may be an error."""
    (workplace / "llamaboard_cache" / "user_config.yaml").unlink(missing_ok=True)  # the model of another test
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE_MS)
    problems: list[str] = []
    page.on("response", lambda answer: problems.append(answer.url) if answer.status >= 500 else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    open_board(page, board_url)
    yield page
    page.close()
    assert problems == []


@pytest.fixture
def page(chromium: Browser, board_url: str, workplace: Path) -> Iterator[Page]:
    """A page of the test's own."""
    with opened(chromium, board_url, workplace) as own:
        yield own


@pytest.fixture(scope="module")
def shared_page(chromium: Browser, board_url: str, workplace: Path) -> Iterator[Page]:
    """A page for the tests of a file that leave nothing behind."""
    with opened(chromium, board_url, workplace) as shared:
        yield shared
