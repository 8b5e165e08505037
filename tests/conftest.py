"""What every test shares: an environment without a hub, a tokenizer, and a model small enough for any test."""

import gc
import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from xdist.scheduler import LoadFileScheduling

from tests.host_processes import HostProcesses


# What is imported stays. Until all test files are there, nothing is collected. From then on no collection looks at it,
# which would take 0.3 s each time: vLLM's start asks for eight. (vLLM does the same, and undoes it at its end.)
_freeze = gc.freeze
gc.disable()
gc.freeze = gc.unfreeze = lambda: None

# Set before transformers, datasets or torch are imported, and inherited by the processes that tests start.
_HF_HOME = tempfile.TemporaryDirectory(prefix="grpo-stage-hf-")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HOME=_HF_HOME.name,
    HF_DATASETS_CACHE=os.path.join(_HF_HOME.name, "datasets"),
    TOKENIZERS_PARALLELISM="false",
)
for _signal, _handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(_signal) is signal.SIG_IGN:  # under nohup, and in a shell's background; tests send these
        signal.signal(_signal, _handler)
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))


@pytest.fixture(autouse=True)
def _one_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a `map` in several processes `datasets` puts a copy in its place, which others do not hold."""
    monkeypatch.setattr(os, "environ", os.environ)


@pytest.fixture(scope="session")
def missing_tool() -> Callable[[str], None]:
    """Leave a test out for want of something on this machine; a machine that checks changes must have it."""

    def leave_out(what: str) -> None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(what)

    return leave_out


class OneBrowser(LoadFileScheduling):
    """A process of `make test` gets the tests of a file together, which share what they start, and the browser's."""

    def _split_scope(self, nodeid: str) -> str:
        return "browser" if "/test_browser" in nodeid else super()._split_scope(nodeid)


_LONGEST_FIRST = ("/test_browser", "/e2e/", "/engines/", "/board/", "/host/", "/unit/")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where processes share the tests, the files that take minutes come first: the last ones have to end together."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: next(i for i, part in enumerate(_LONGEST_FIRST) if part in item.path.as_posix()))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _imports_left_to_themselves() -> Callable[[], None]:
    """To be called where nothing is alive that only a collection frees, since it would stay: between two files."""

    def leave() -> None:
        gc.collect()
        _freeze()

    leave()
    return leave


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneBrowser:
    return OneBrowser(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say at the end, in one line for each reason, what did not run."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped")
    )
    for reason, count in reasons.items():
        terminalreporter.write_line(f"Not run ({count}): {reason}", yellow=True)


@pytest.fixture(scope="session")
def host_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcesses]:
    processes = HostProcesses(tmp_path_factory.mktemp("processes"))
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def smollm2_tokenizer_dir(request: pytest.FixtureRequest) -> Path:
    """A folder with SmolLM2-135M-Instruct's tokenizer alone; kept in pytest's cache, since converting it takes 8 s."""
    from grpo_stage.tools import quickstart_model

    source = hashlib.sha256(Path(quickstart_model.__file__).read_bytes()).hexdigest()[:12]
    folder = Path(request.config.cache.mkdir("smollm2")) / source
    with FileLock(folder.with_suffix(".lock")):  # `make test` runs two processes of pytest
        if not folder.exists():
            tokenizer = quickstart_model.load_tokenizer()
            with quickstart_model.atomic_folder(folder) as unfinished:
                tokenizer.save_pretrained(unfinished)

    return folder


@pytest.fixture(scope="session")
def short_tokenizer_dir(smollm2_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's tokenizer without its rarer tokens: most of a tiny model's time would go into their logits.

    Its special tokens, its single bytes and then the results of its merges are numbered in this order, so that what
    stays keeps its number, and any text that the whole one encodes is encoded.
    """
    folder = shutil.copytree(smollm2_tokenizer_dir, tmp_path_factory.mktemp("short") / "tokenizer")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    whole, merges = content["model"]["vocab"], content["model"]["merges"]
    content["model"]["vocab"] = {token: index for token, index in whole.items() if index < 2048}
    content["model"]["merges"] = [pair for pair in merges if whole["".join(pair)] < 2048]
    file.write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(short_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialized two-layer Llama in float32 with SmolLM2's first tokens: an ordinary checkpoint."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(short_tokenizer_dir)
    special_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        dtype=torch.float32,
        **special_ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)

    model.generation_config = GenerationConfig(**special_ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
