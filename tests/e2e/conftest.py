"""Whole runs through the host's `run_exp`, on the tiny model."""

import copy
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from grpo_stage.rollout.engines import vllm_process, vllm_server_command
from tests.host_processes import VLLM, HostProcesses


# vLLM writes zeros to all of its cache at each start: of a run with a tiny model, a fifth.
vllm_process._CPU_KV_CACHE_BYTES = vllm_server_command.CPU_KV_CACHE_BYTES = 1 << 26

INTERRUPTED_RUN = Path(__file__).with_name("interrupted_run.py")


class RewardServer:
    """The host's reward protocol, with a score that can be told from the text; `answer` overrides it.

    The next requests get the statuses in `failures`.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.texts: list[str] = []
        self.answer: Any = None
        self.failures: list[int] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler: BaseHTTPRequestHandler) -> None:
                request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                assert request["model"] == "model"
                if self.failures:
                    handler.send_error(self.failures.pop(0), explain="one moment")
                    return
                self.requests.append(request)
                self.texts += request["messages"]
                body = self.answer or {"scores": [float(len(text)) for text in request["messages"]]}
                handler.send_response(200)
                handler.end_headers()
                handler.wfile.write(json.dumps(body).encode())

            def log_message(handler: BaseHTTPRequestHandler, *args: Any) -> None: ...

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1/score/evaluation"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def reward_server_here() -> Iterator[RewardServer]:
    running = RewardServer()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with answers: ten to train on, and two sets of three and one for evaluation."""
    folder = tmp_path_factory.mktemp("data")
    columns = {"prompt": "question", "response": "answer"}
    info = {}
    for name, numbers in (("sums", range(10)), ("tens", range(20, 50, 10)), ("thousand", [1000])):
        rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in numbers]
        (folder / f"{name}.json").write_text(json.dumps(rows))
        info[name] = {"file_name": f"{name}.json", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="session")
def decided_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an output layer of its own and wide enough logits for LoRA to prefer some tokens."""
    folder = tmp_path_factory.mktemp("decided") / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = load_file(folder / "model.safetensors")
    shape = weights["model.embed_tokens.weight"].shape
    weights["lm_head.weight"] = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def toy_reward(decided_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A custom reward that half of the tokens get, and that one direction of the output layer teaches."""
    file = tmp_path_factory.mktemp("rewards") / "toy.py"
    # As text: importing torch would cost each run's worker process seconds.
    liked = load_file(decided_model_dir / "model.safetensors")["lm_head.weight"][:, 0] > 0
    file.write_text(
        f"LIKED = {''.join('01'[one] for one in liked.tolist())!r}\n\n\n"
        "def liked(completion_ids):\n"
        '    """The share of tokens whose output embedding is positive in its first dimension."""\n'
        "    return [sum(LIKED[token] == '1' for token in ids) / len(ids) for ids in completion_ids]\n"
    )
    return f"{file}:liked"


@pytest.fixture
def recipe(tiny_model_dir: Path, dataset_dir: Path, toy_reward: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A short run as a YAML file would give it; keyword arguments replace keys."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "stage": "grpo",
            "do_train": True,
            "model_name_or_path": str(tiny_model_dir),
            "finetuning_type": "lora",
            "lora_rank": 4,
            "lora_target": "all",
            "template": "smollm2",
            "dataset": "sums",
            "dataset_dir": str(dataset_dir),
            "cutoff_len": 64,
            "rollout_backend": "hf",
            "num_generations": 4,
            "max_new_tokens": 8,
            "reward_funcs": toy_reward,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "max_steps": 2,
            "save_strategy": "no",
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "report_to": "none",
            "disable_gradient_checkpointing": True,
            "dataloader_pin_memory": False,
            "seed": 7,
            **changes,
        }

    return make


@pytest.fixture(autouse=True)
def _imports_left_to_themselves_by_runs(_imports_left_to_themselves: Callable[[], None]) -> Iterator[None]:
    """The first run of a process imports as much as all files before."""
    yield
    _imports_left_to_themselves()


@pytest.fixture(autouse=True)
def host_templates() -> Iterator[None]:
    """The host writes a recipe's `default_system` into its table of templates, where the next run finds it."""
    from llamafactory.data.template import TEMPLATES

    before = copy.deepcopy(TEMPLATES)
    yield
    TEMPLATES.update(before)


@pytest.fixture
def interrupt(host_processes: HostProcesses) -> Callable[..., CompletedProcess[str]]:
    """A run in a process of its own that gets a signal at a point."""

    def run(arguments: dict[str, Any], sign: str, point: str, step: int, *overrides: str) -> CompletedProcess[str]:
        command = (str(INTERRUPTED_RUN), sign, point, str(step), recipe_file(arguments), *overrides)
        result = host_processes.run(*command, modules=modules_of(arguments))
        assert f"striking at {point} of step {step}" in result.stdout, result.stdout[-2000:] + result.stderr[-4000:]
        return result

    return run


@pytest.fixture
def train_in_ranks(host_processes: HostProcesses) -> Callable[..., None]:
    """A run as torchrun would start it, one process or several, with a thread each.

    A run of one process that is compared with one of two is such a process, too: rounding differs with the number of
    threads, and with what other tests have done to this process, and now and then that is another token.
    """
    from llamafactory import launcher

    def run(arguments: dict[str, Any], num_ranks: int = 2) -> None:
        command = (launcher.__file__, recipe_file(arguments))
        for result in host_processes.run_ranks(num_ranks, *command, modules=modules_of(arguments)):
            assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]

    return run


@pytest.fixture
def run_exp() -> Callable[[dict[str, Any]], None]:
    from llamafactory.train.tuner import run_exp

    return run_exp


def modules_of(arguments: dict[str, Any]) -> Sequence[str]:
    """What a recipe's run imports besides the host."""
    return VLLM if arguments["rollout_backend"] == "vllm" else ()


def recipe_file(arguments: dict[str, Any]) -> str:
    file = Path(arguments["output_dir"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(arguments))
    return str(file)


def trainer_log(output_dir: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(output_dir) / "trainer_log.jsonl").read_text().splitlines()]


def completions(output_dir: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(output_dir) / "completions.jsonl").read_text().splitlines()]
