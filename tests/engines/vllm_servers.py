"""Real vLLM servers for tests, as fast as a machine of two cores has them.

Importing vLLM takes most of a server's start, and a server does it in two processes. Here one process imports it once,
and each server, its engine's process included, is forked from there. What runs in it is vLLM's own server.

As a program: reads a line of JSON for each server that is to start, and writes its process id.
"""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path


START_S = 120.0


@dataclass
class ServerProcess:
    """One server. It leads a process group of its own, with its engine's process in it."""

    url: str
    pid: int
    log: Path

    def send(self, signum: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signum)

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return
            time.sleep(0.2)
        raise TimeoutError(f"{self.url} does not answer:\n{self.log.read_text()[-5000:]}")


@dataclass
class ServerFarm:
    """Starts servers; to be closed."""

    folder: Path
    started: list[ServerProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._mother = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], port: int) -> ServerProcess:
        """Begin to start a server.

        Args:
            arguments: those of `vllm serve`, the model first.
            environment: variables that the server has besides.
            port: where it listens.
        """
        log = self.folder / f"server-{len(self.started)}.log"
        order = {"arguments": [*arguments, "--port", str(port)], "environment": dict(environment), "log": str(log)}
        assert self._mother.stdin is not None
        assert self._mother.stdout is not None
        print(json.dumps(order), file=self._mother.stdin, flush=True)
        server = ServerProcess(f"http://127.0.0.1:{port}", int(self._mother.stdout.readline()), log)
        self.started.append(server)
        return server

    def close(self) -> None:
        for server in self.started:
            server.send(signal.SIGKILL)
        self._mother.kill()
        self._mother.wait()


def _serve(arguments: list[str]) -> None:
    import uvloop
    from vllm.entrypoints.openai.api_server import run_server
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    parsed = parser.parse_args(["--model", *arguments])
    validate_parsed_serve_args(parsed)
    uvloop.run(run_server(parsed))


def _fork_engines() -> None:
    """On a CPU vLLM spawns its engine's process, which imports everything once more."""
    context = multiprocessing.get_context("fork")
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and hasattr(module, "get_mp_context"):
            module.get_mp_context = lambda: context


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes to what it takes for the terminal
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no worker process below the engine's
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    # Everything that a server and its engine import, and no collection of garbage need look through.
    gc.disable()
    import gloo_transfer  # beside this file
    import vllm.entrypoints.openai.api_server
    import vllm.v1.engine.core
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401

    gc.freeze()
    gc.enable()
    _fork_engines()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the servers
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.environ.update(order["environment"])
            descriptor = os.open(order["log"], os.O_WRONLY | os.O_CREAT)
            for standard in (1, 2):
                os.dup2(descriptor, standard)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            try:
                if "GRPO_TEST_GLOO" in order["environment"]:
                    gloo_transfer.install()
                _serve(order["arguments"])
            finally:
                os._exit(1)
        print(pid, file=answers, flush=True)


if __name__ == "__main__":
    main()
