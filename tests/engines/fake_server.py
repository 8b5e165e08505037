"""A server that answers as `vllm serve` does, and fails in the ways that a test asks for."""

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


TRANSFER_ROUTES = (
    *("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"),
)


@dataclass
class FakeServer:
    """What it answers depends on the seed, the prompt and the weights that it holds, as a real one's does."""

    model: str
    version: str = "0.23.0"
    max_model_len: int = 512
    max_lora_rank: int = 16
    mode: str = "processed_logprobs"
    takes_adapters: bool = True
    """VLLM_ALLOW_RUNTIME_LORA_UPDATING."""
    has_lora: bool = True
    """--enable-lora."""
    is_dev: bool = False
    """VLLM_SERVER_DEV_MODE."""
    takes_transfers: bool = False
    """--weight-transfer-config. vLLM's own code receives weights then, with `gloo_transfer` installed in it."""
    api_key: str | None = None
    before: Callable[[str, Any], None] = lambda path, body: None
    """Called with each request before it is answered."""
    adapters: dict[str, str] = field(default_factory=dict)
    """By name, the digest of what was loaded."""
    weights: str = "files"
    starts: int = 0
    log: list[tuple[str, Any]] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def num_generated(self) -> int:
        return sum(path == "/inference/v1/generate" for path, _ in self.log)

    def start(self) -> None:
        """As a new process would: nothing of what was delivered is there."""
        self.adapters, self.weights, self.starts = {}, "files", self.starts + 1
        self.received: dict[str, torch.Tensor] | None = None
        self._receiver: Any = None
        self._connections: list[socket.socket] = []
        self._handler = type("Handler", (_Handler,), {"fake": self, "is_dead": False})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def kill(self) -> None:
        """As kill -9 does: connections break, and new ones are refused."""
        self._handler.is_dead = True
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
                connection.close()

    def freeze(self) -> None:
        """As SIGSTOP does: connections are taken, and nothing is answered."""
        self.may_answer.clear()

    def thaw(self) -> None:
        self.may_answer.set()

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        route = path.partition("?")[0]
        if method == "GET" and route in ("/health", "/version", "/v1/models", "/server_info"):
            return self._get(route)
        if route in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and self.takes_adapters:
            return (405, {"detail": "Method Not Allowed"}) if method == "GET" else self._adapter(route, body)
        if route in ("/collective_rpc", "/reset_prefix_cache", "/pause", "/resume") and self.is_dev:
            if method == "GET":
                return 405, {"detail": "Method Not Allowed"}
            if route == "/collective_rpc":
                self.weights = _digest(Path(body["kwargs"]["weights_path"]))
            return 200, {}
        if route == "/get_world_size" and self.is_dev:
            return 200, {"world_size": 1}
        if method == "POST" and route in TRANSFER_ROUTES and self.is_dev:
            return self._transfer(route, body)
        if method == "POST" and route == "/inference/v1/generate":
            return self._generate(body)
        return 404, {"detail": "Not Found"}

    def _get(self, route: str) -> tuple[int, Any]:
        if route == "/version":
            return 200, {"version": self.version}
        if route == "/v1/models":
            base = {"id": self.model, "root": self.model, "max_model_len": self.max_model_len}
            return 200, {"data": [base, *({"id": name, "root": "/there"} for name in self.adapters)]}
        if route == "/server_info":
            lora = {"max_loras": 1} if self.has_lora else None
            transfer = {"backend": "nccl"} if self.takes_transfers else None
            configuration = {
                "instance_id": f"start-{self.starts}",
                "lora_config": lora,
                "weight_transfer_config": transfer,
            }
            return (200, {"vllm_config": configuration}) if self.is_dev else (404, {"detail": "Not Found"})
        return 200, {}

    def _transfer(self, route: str, body: Any) -> tuple[int, Any]:
        """As vLLM's worker does it."""
        if route == "/init_weight_transfer_engine":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

            alone = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
            self._receiver = NCCLWeightTransferEngine(None, alone, None)
            self._receiver.init_transfer_engine(self._receiver.parse_init_info(body["init_info"]))
        elif route == "/start_weight_update":
            if body != {"is_checkpoint_format": True} or self.received is not None:
                return _error(500, "start_weight_update called while a weight update is already active")
            self.received = {}
        elif self.received is None or self._receiver is None:
            return _error(500, "start_weight_update must be called before")
        elif route == "/update_weights":
            update = self._receiver.parse_update_info(body["update_info"])
            try:
                self._receiver.receive_weights(update, load_weights=lambda weights: self.received.update(weights))
            except RuntimeError as error:  # the other end is gone
                return _error(500, str(error))
        else:
            data = b"".join(name.encode() + t.numpy().tobytes() for name, t in self.received.items())
            self.held, self.received = self.received, None
            self.weights = hashlib.sha256(data).hexdigest()[:8]
        return 200, {"message": "done"}

    def _adapter(self, route: str, body: Any) -> tuple[int, Any]:
        name = body["lora_name"]
        if route == "/v1/unload_lora_adapter":
            return (200, "gone") if self.adapters.pop(name, None) else _error(404, f"{name} cannot be found")
        if name in self.adapters:
            return _error(400, "has already been loaded")
        if not self.has_lora:
            return _error(500, "LoRA is not enabled. Use --enable-lora to enable LoRA.")
        folder = Path(body["lora_path"])
        if not (folder / "adapter_config.json").exists():
            return _error(404, f"Loading lora {name} failed: No adapter found for {folder}")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            return _error(500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}.")
        if not (folder / "adapter_model.safetensors").exists():
            return _error(500, f"{folder} doesn't contain tensors")
        self.adapters[name] = _digest(folder)
        return 200, "loaded"

    def _generate(self, body: Any) -> tuple[int, Any]:
        name, prompt, sampling = body["model"], body["token_ids"], body["sampling_params"]
        if name != self.model and name not in self.adapters:
            return _error(404, f"The model `{name}` does not exist.")
        weights = self.adapters.get(name, self.weights)

        def drawn(*of: Any) -> int:
            return int.from_bytes(hashlib.sha256(repr((weights, *of)).encode()).digest()[:4], "big")

        def raw(context: Any, token: int) -> float:
            return -1.0 - drawn("logprob", tuple(context), token) % 1000 / 1000

        tokens = [10 + drawn(sampling.get("seed"), tuple(prompt), i) % 200 for i in range(sampling["max_tokens"])]
        logprobs = [raw([*prompt, *tokens[:i]], token) for i, token in enumerate(tokens)]
        if sampling.get("top_k") == 1 and self.mode == "processed_logprobs":
            logprobs = [0.0] * len(tokens)
        if self.mode == "raw_logits":
            logprobs = [9.0] * len(tokens)
        scored = None
        if sampling.get("prompt_logprobs") is not None:
            scored = [None, *({str(t): {"logprob": raw(prompt[:i], t)}} for i, t in list(enumerate(prompt))[1:])]
        content = {
            "content": [{"token": f"token_id:{t}", "logprob": p} for t, p in zip(tokens, logprobs, strict=True)]
        }
        choice = {"token_ids": tokens, "finish_reason": "length", "logprobs": content}
        return 200, {"choices": [choice], "prompt_logprobs": scored}


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    is_dead: bool
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._do("GET")

    def do_POST(self) -> None:
        self._do("POST")

    def _do(self, method: str) -> None:
        fake = self.fake
        fake._connections.append(self.connection)
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else None
        if method == "POST":
            fake.log.append((self.path, body))
        fake.before(self.path, body)
        fake.may_answer.wait(30)
        if fake.api_key is not None and self.headers.get("Authorization") != f"Bearer {fake.api_key}":
            status, answer = 401, {"error": "Unauthorized"}
        else:
            status, answer = fake.answer(method, self.path, body)
        if self.is_dead:
            self.close_connection = True
            return
        text = json.dumps(answer).encode()
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def handle(self) -> None:
        with suppress(OSError):
            super().handle()


def _digest(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "code": status}}


def end_of(engine: Any, servers: Sequence[FakeServer]) -> None:
    """Close the engine, which frozen servers would keep waiting, and end them."""
    for server in servers:
        server.thaw()
    engine.close()
    for server in servers:
        with suppress(OSError):
            server.kill()
