"""Python programs that use the host, each a fork of a process that has imported it: alone that takes seven seconds.

For tests of what a run does, and of how one ends. That `llamafactory-cli` and torchrun come to start one, and what
happens before and while the host is imported, is shown by tests that start those.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


RUN = ("llamafactory.train.tuner", "grpo_stage.workflow", "deepspeed", "peft.tuners.lora.bnb")
"""What every run imports: accelerate and PEFT the last two, where they are installed."""
VLLM = [
    *("vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.executor.uniproc_executor"),
    *("vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama"),
]


class HostProcesses:
    """Starts the process that forks with the first program, and again after one that had to be ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server: subprocess.Popen[str] | None = None

    def run(
        self, *command: str, modules: Sequence[str] = (), timeout: float = 300, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """What `subprocess.run` of this Python gives for a script and its arguments.

        Args:
            command: the script's path, and its arguments.
            modules: of the large ones that the script imports besides the host: `VLLM`.
            timeout: in seconds.
            environment: variables that it has besides.
        """
        return self._run(command, modules, [os.environ | environment], timeout)[0]

    def run_ranks(
        self, num_ranks: int, *command: str, modules: Sequence[str] = (), timeout: float = 500, **environment: str
    ) -> "list[subprocess.CompletedProcess[str]]":
        """The same in several processes, each with what torchrun tells a rank and with one thread."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "OMP_NUM_THREADS": "1"}
        size = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        ranks = [
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(self.error_file(rank))}
            for rank in range(num_ranks)
        ]
        for rank in range(num_ranks):
            self.error_file(rank).unlink(missing_ok=True)
        environments = [os.environ | environment | address | size | rank for rank in ranks]
        return self._run(command, modules, environments, timeout)

    def error_file(self, rank: int) -> Path:
        """Where torchrun would look for the error of a rank of `run_ranks`."""
        return self._folder / f"{rank}.error.json"

    def close(self) -> None:
        """End it, and what it has forked."""
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.communicate()
            self._server = None

    def _run(
        self, command: tuple[str, ...], modules: Sequence[str], environments: list[dict[str, str]], timeout: float
    ) -> "list[subprocess.CompletedProcess[str]]":
        if self._server is None:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            alone = os.environ | {"OMP_NUM_THREADS": "1"}  # a process with threads is not to be forked
            self._server = subprocess.Popen([sys.executable, __file__], env=alone, start_new_session=True, **pipes)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        outputs = [
            [str(self._folder / f"{rank}.{end}") for end in ("out", "err")] for rank in range(len(environments))
        ]
        request = {
            "command": command,
            "modules": modules,
            "folder": os.getcwd(),
            "processes": list(zip(environments, outputs, strict=True)),
        }
        print(json.dumps(request), file=self._server.stdin, flush=True)
        if not select.select([self._server.stdout], [], [], timeout)[0]:
            self.close()
            raise subprocess.TimeoutExpired(command, timeout, "".join(Path(file).read_text() for file in outputs[0]))
        return [
            subprocess.CompletedProcess(command, code, *(Path(file).read_text() for file in files))
            for code, files in zip(json.loads(self._server.stdout.readline()), outputs, strict=True)
        ]


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    gc.disable()
    os.environ |= {"DS_ACCELERATOR": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"}  # read by imports, here for all forks
    _import_model_classes()
    _import(*RUN)
    for line in sys.stdin:
        request = json.loads(line)
        _import(*request["modules"])
        if request["modules"] == VLLM:
            _shrink_vllm()
        others = set(os.listdir("/proc/self/task")) - {str(os.getpid())}
        names = {Path(f"/proc/self/task/{each}/comm").read_text().strip() for each in others}
        assert names <= {"jemalloc_bg_thd"}, f"a fork would be without the threads {names}"  # pyarrow's forks well
        children = []
        for environment, outputs in request["processes"]:
            children.append(os.fork())
            if children[-1] == 0:
                _become(request["command"], request["folder"], environment, outputs)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), file=answers, flush=True)


def _import(*modules: str) -> None:
    if not sys.modules.keys() >= set(modules):
        for module in modules:
            importlib.import_module(module)
        gc.freeze()


def _shrink_vllm() -> None:
    """vLLM writes zeros to all of its cache at each start."""
    from grpo_stage.rollout.engines import vllm_process

    vllm_process._CPU_KV_CACHE_BYTES = 1 << 26  # as in tests/e2e/conftest.py


def _import_model_classes() -> None:
    """Those that the host imports as it looks for the class of a model."""
    from transformers import AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForTextToWaveform

    for each in (AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForTextToWaveform):
        each._model_mapping.keys()


def _become(command: list[str], folder: str, environment: dict[str, str], outputs: list[str]) -> None:
    """Be the process of a program, to its ordinary end."""
    import torch

    gc.enable()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # an import has asked for it, and it is that of the environment
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # libgomp has read that of its own start
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = command
    sys.path[0] = os.path.dirname(command[0])
    runpy.run_path(command[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    _serve()
