"""`vllm_server_transfer: nccl` with gloo in the place of NCCL: vLLM's own code receives, and servers fail.

Whole servers of vLLM's that take weights this way are in tests/e2e/test_vllm_servers.py.
"""

import builtins
import contextlib
import dataclasses
import inspect
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from grpo_stage.rollout.engines import vllm_server_rules, vllm_server_transfer
from grpo_stage.rollout.engines.vllm_server import VLLMServers
from grpo_stage.rollout.engines.vllm_server_fleet import Patience
from grpo_stage.rollout.engines.vllm_server_transfer import NCCLCommunicator, WeightTransfer, packed
from grpo_stage.rollout.engines.weights import PolicyWeights, checkpoint_weights
from grpo_stage.types import EngineLostError

from . import gloo_transfer
from .fake_server import TRANSFER_ROUTES, FakeServer, end_of
from .gloo_transfer import GlooCommunicator
from .test_vllm_server_faults import MODEL, PROMPTS, answers, check, recipe, wanted


BROKEN_OFF = (
    "A transfer of weights to it was broken off, and vLLM can begin no other in the same process. Start it anew"
)
CPU = torch.device("cpu")
LIMIT_S = 2.0


@pytest.fixture(scope="module", autouse=True)
def gloo() -> Iterator[None]:
    with gloo_transfer.installed():
        yield


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(checkpoint)


class Run:
    """An engine that sends to fake servers, what it has warned of, and the ends of its links here."""

    def __init__(self, tokenizer, num_servers=2, ping=30.0) -> None:
        self.servers = [
            FakeServer(MODEL, is_dev=True, has_lora=False, takes_transfers=True) for _ in range(num_servers)
        ]
        self.warnings: list[str] = []
        self.links: list[GlooCommunicator] = []
        self.engine = VLLMServers(
            [server.url for server in self.servers],
            wanted(adapter=False, over_nccl=True),
            tokenizer,
            folder="/nowhere",
            limit_s=30.0,
            warn=self.warnings.append,
            transfer=WeightTransfer(CPU, self._connect, LIMIT_S),
            patience=Patience(ping_every=0.05, ping=ping, rejoin=ping),
        )

    def _connect(self, device: torch.device) -> GlooCommunicator:
        self.links.append(GlooCommunicator())
        return self.links[-1]

    def end(self) -> None:
        end_of(self.engine, self.servers)


@pytest.fixture
def start(tokenizer, monkeypatch) -> Iterator:
    monkeypatch.setattr(vllm_server_transfer, "BYTES_OF_A_PART", 100_000)
    runs: list[Run] = []

    def begin(*args, **kwargs) -> Run:
        runs.append(Run(tokenizer, *args, **kwargs))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


@pytest.fixture(scope="module")
def undisturbed(policy, tokenizer) -> Iterator:
    run = Run(tokenizer, 1)

    def sampled(sampling):
        run.engine.sync(policy, 1)
        return run.engine.generate(PROMPTS, sampling, 1)

    yield sampled
    run.end()


def posted(server: FakeServer) -> list[str]:
    return [path for path, _ in server.log if path != "/inference/v1/generate"]


def test_all_weights_arrive_in_parts(start, policy, sampling):
    run = start()
    run.engine.sync(policy, 1)
    expected = dict(checkpoint_weights(policy))
    begin, end = ["/pause?mode=abort"], ["/finish_weight_update", "/reset_prefix_cache", "/resume"]
    num_parts = sum(path == "/update_weights" for path in posted(run.servers[0]))
    assert num_parts > 1
    for server in run.servers:
        assert server.held.keys() == expected.keys()
        assert all(torch.equal(server.held[name], tensor) for name, tensor in expected.items())
        parts = ["/start_weight_update", *["/update_weights"] * num_parts]
        assert posted(server) == [*begin, "/init_weight_transfer_engine", *parts, *end]
        server.log.clear()
    run.engine.sync(policy, 2)
    assert all(posted(server) == [*begin, *parts, *end] for server in run.servers), "the group is kept"
    assert {group.policy_version for group in run.engine.generate(PROMPTS, sampling, 2)} == {2}
    run.engine.close()
    assert [link.aborted for link in run.links] == [True, True]
    assert run.warnings == []


def test_numbers_of_every_size_are_read_where_they_lie():
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    tensors = {
        "a": torch.randn(3).bfloat16(),
        "b": torch.randn(2, 3),
        "c": torch.tensor(7, dtype=torch.int8),
        "d": torch.randn(4, 2).t(),
        "e": torch.tensor(1.5, dtype=torch.float64),
    }
    part = packed(tensors, CPU)
    read = NCCLWeightTransferUpdateInfo(**part.description)
    assert read.packed
    assert read.packed_buffer_size_bytes == part.block.nbytes == sum(t.nbytes for t in tensors.values())
    sizes = [tensors[name].nbytes for name in read.names]
    dtypes = [getattr(torch, name) for name in read.dtype_names]
    found = dict(unpack_tensor(part.block, read.names, read.shapes, dtypes, sizes))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(tensor.shape), tensor)
    scalar = torch.nn.Parameter(torch.zeros(()))
    default_weight_loader(scalar, found["e"])
    assert scalar == 1.5


def broken_by(fault, server: FakeServer, route: str = "/update_weights", at: int = 2) -> None:
    """Have a server fail at the `at`-th request of a route."""
    seen = []

    def before(path, body):
        if path == route:
            seen.append(path)
            if len(seen) == at:
                fault()

    server.before = before


@pytest.mark.parametrize("fault", ["kill", "stop", "hang", "error"])
@pytest.mark.parametrize("route", ["/init_weight_transfer_engine", "/update_weights"])
def test_a_server_that_fails_in_a_transfer_takes_no_other_along(start, policy, sampling, undisturbed, fault, route):
    run = start(ping=1.0 if fault == "stop" else 30.0)
    broken = run.servers[1]

    def fail():
        if fault == "kill":
            broken.kill()
        elif fault == "stop":
            broken.freeze()
        elif fault == "hang":  # it is well, by what it says
            time.sleep(LIMIT_S + 2)
        else:
            raise_in_worker()

    def raise_in_worker():
        broken._transfer = lambda route, body: (500, {"error": {"message": "out of memory"}})

    broken_by(fail, broken, route, at=1 if route == "/init_weight_transfer_engine" else 2)
    started = time.monotonic()
    run.engine.sync(policy, 1)
    assert time.monotonic() - started < LIMIT_S + 3
    (warning,) = run.warnings
    assert broken.url in warning
    assert "is out" in warning
    what = "take a part of the weights" if route == "/update_weights" else "join the trainer at 127.0.0.1:"
    if fault == "hang":
        assert f"it did not {what}" in warning
        assert f"within {LIMIT_S:g} s" in warning
    if fault == "error":
        assert "out of memory" in warning
    assert sorted(link.aborted for link in run.links) == [False, True]
    groups = run.engine.generate(PROMPTS, sampling, 1)
    assert answers(groups) == answers(undisturbed(sampling))
    assert broken.num_generated == 0


def test_a_broken_transfer_is_not_begun_again_in_the_same_process(start, policy):
    """vLLM counts the parts of a layer, and would take those of two transfers for one."""
    run = start()
    broken = run.servers[1]

    def break_off():
        broken_by(lambda: setattr(broken, "_transfer", lambda route, body: (500, {"error": "no"})), broken)

    for num_starts in (1, 2):  # each of which is told of once
        break_off()
        run.engine.sync(policy, 1)
        del broken._transfer
        broken.log.clear()
        run.engine.sync(policy, 2)
        run.engine.sync(policy, 3)
        assert posted(broken) == []
        assert len(run.warnings) == num_starts
        assert f"{broken.url} is out: HTTP 500: no. " in run.warnings[-1]
        assert f". {BROKEN_OFF}" in run.warnings[-1]
        assert "once it answers" not in run.warnings[-1]
        broken.kill()
        broken.start()
    broken.before = lambda path, body: None
    run.engine.sync(policy, 4)
    assert "is back" in run.warnings[-1]
    assert broken.held.keys() == run.servers[0].held.keys()
    assert len(run.links) == 4
    broken.kill()
    run.engine.sync(policy, 5)
    assert "It takes part again once it answers" in run.warnings[-1], "no transfer was under way"
    assert len(run.warnings) == 4


def failing_tensors(policy, error: BaseException, at: int = 3) -> Iterator:
    for i, each in enumerate(checkpoint_weights(policy)):
        if i == at:
            raise error
        yield each


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("of the trainer"), KeyboardInterrupt()])
def test_what_the_trainer_breaks_off_is_told_of_and_not_begun_again(start, policy, monkeypatch, error):
    run = start()
    run.engine.sync(policy, 1)
    with monkeypatch.context() as patched:
        patched.setattr(PolicyWeights, "tensors", lambda weights: failing_tensors(policy, error))
        with pytest.raises(type(error)):
            run.engine.sync(policy, 2)
    assert any(path == "/update_weights" for path, _ in run.servers[0].log)
    assert [link.aborted for link in run.links] == [True, True]
    assert len(run.warnings) == 2, "one a server"
    for server, warning in zip(run.servers, run.warnings, strict=True):
        assert f"{server.url} is out: the trainer broke the delivery off" in warning
        assert BROKEN_OFF in warning
        assert "that are left" not in warning
        assert server.received is not None, "its update is open"
        server.log.clear()
    with pytest.raises(EngineLostError, match="None of the 2 vLLM servers"):
        run.engine.sync(policy, 3)
    assert [posted(server) for server in run.servers] == [[], []]
    assert len(run.warnings) == 2
    run.servers[0].kill()
    run.servers[0].start()
    run.engine.sync(policy, 4)
    assert "is back" in run.warnings[-1]
    assert len(run.warnings) == 3


def test_a_server_that_refuses_leaves_no_other_in_an_update_that_nobody_knows_of(start, policy):
    run = start()
    refusing = run.servers[1]
    broken_by(lambda: setattr(refusing, "_transfer", lambda route, body: (400, {"error": "no"})), refusing)
    with pytest.raises(RuntimeError, match="refuses what the run asks for"):
        run.engine.sync(policy, 1)
    assert [BROKEN_OFF in warning for warning in run.warnings] == [True, True]
    assert run.servers[0].url in run.warnings[0]


def test_the_trainer_imports_nothing_while_a_server_waits_for_it(start, policy, monkeypatch):
    """Importing vLLM takes a quarter of a minute, and more from a slow disk."""
    imported = set()
    import_ = builtins.__import__

    def slow(name, *args, **kwargs):
        is_trainer = threading.current_thread().name in ("MainThread", "vllm-servers", "vllm-transfer")
        if is_trainer and name.startswith("vllm.") and name not in imported:
            imported.add(name)
            time.sleep(LIMIT_S + 0.5)
        return import_(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", slow)
    run = start(1)
    while_connecting = set(imported)
    assert while_connecting
    run.engine.sync(policy, 1)
    assert imported == while_connecting
    assert run.warnings == []


def test_vllm_is_imported_with_the_transfer_whole():
    """All that `NCCLCommunicator` asks for, in a process that has not got it."""
    code = """if True:
        import sys, torch
        from grpo_stage.rollout.engines.vllm_server_transfer import WeightTransfer
        assert not any(name.startswith("vllm.") for name in sys.modules)
        WeightTransfer(torch.device("cpu"))
        before = set(sys.modules)
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup
        assert set(sys.modules) == before, set(sys.modules) - before
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_two_parts_and_a_tensor_are_there_at_a_time(start, monkeypatch):
    size = vllm_server_transfer.BYTES_OF_A_PART
    sizes = [40_000, 70_000, 20_000, 10_000, 500_000, 30_000, 90_000, 90_000, 150_000, 160_000, 8_000]
    run = start(1)
    alive: dict[int, int] = {}
    peaks: list[int] = []

    def tracked(tensor):
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor))
        peaks.append(sum(alive.values()))
        return tensor

    def tracked_part(tensors, device):
        part = packed(tensors, device)
        tracked(part.block)
        return part

    def tensors():
        for i, each in enumerate(sizes):
            yield f"w{i}", tracked(torch.full((each // 4,), float(i)))

    monkeypatch.setattr(vllm_server_transfer, "packed", tracked_part)
    run.engine._send(tensors(), run.engine._transfer)
    assert {name: (tensor.nbytes, tensor[0].item()) for name, tensor in run.servers[0].held.items()} == {
        f"w{i}": (each, float(i)) for i, each in enumerate(sizes)
    }
    sent = [body["update_info"] for path, body in run.servers[0].log if path == "/update_weights"]
    parts = [["w0"], ["w1", "w2", "w3"], ["w4"], ["w5"], ["w6"], ["w7"], ["w8"], ["w9"], ["w10"]]
    assert [sorted(each["names"]) for each in sent] == parts
    assert [each["packed_buffer_size_bytes"] for each in sent if len(each["names"]) > 1] == [size]
    # The two of the largest tensor, and the one that comes after it.
    assert max(peaks) == 2 * 500_000 + 30_000
    assert alive == {}


def test_a_server_that_was_started_anew_unnoticed_gets_a_new_group(start, policy):
    run = start()
    run.engine.sync(policy, 1)
    run.servers[1].kill()
    run.servers[1].start()
    run.engine.sync(policy, 2)
    assert run.warnings == []
    assert run.servers[1].weights == run.servers[0].weights
    assert [link.aborted for link in run.links].count(True) == 1
    assert len(run.links) == 3


@pytest.mark.parametrize(
    ("answer", "raised"),
    [((500, {}), (EngineLostError, "None of the 1 vLLM servers")), ((400, {}), (RuntimeError, "refuses what"))],
)
def test_weights_are_gathered_to_the_end_whatever_becomes_of_the_servers(start, policy, answer, raised):
    """Other processes gather them with this one."""
    run = start(1)
    run.servers[0]._transfer = lambda route, body: answer
    given = []

    def tensors():
        for each in checkpoint_weights(policy):
            given.append(each[0])
            yield each

    with pytest.raises(raised[0], match=raised[1]):
        run.engine._send(tensors(), run.engine._transfer)
    assert len(given) == len(dict(checkpoint_weights(policy)))


def test_a_link_that_fails_on_this_side_takes_its_server_out(start, policy, monkeypatch):
    run = start()

    def broadcast(self, block):
        raise RuntimeError("NCCL error: unhandled system error")

    connect = run._connect
    monkeypatch.setattr(run.engine._transfer, "_connect", lambda device: failing(connect(device)))

    def failing(link):
        if len(run.links) == 2:
            link.broadcast = broadcast.__get__(link)
        return link

    run.engine.sync(policy, 1)
    (warning,) = run.warnings
    assert "it did not take a part of the weights: NCCL error: unhandled system error" in warning
    assert [server.weights == "files" for server in run.servers].count(True) == 1


def test_a_server_without_the_flag_is_refused():
    server = FakeServer(MODEL, is_dev=True, has_lora=False)
    keys = recipe(server, finetuning_type="full", vllm_server_transfer="nccl")
    try:
        with pytest.raises(ValueError, match=r"not started for `vllm_server_transfer: nccl`.*weight-transfer-config"):
            check(keys)
        server.takes_transfers = True
        check(keys)
    finally:
        server.kill()


def test_a_trainer_without_vllm_is_refused(monkeypatch):
    of_model = {"model_quantization": None, "is_tied": True, "model_positions": None, "device_type": "cuda"}
    of_run = {"finetuning_type": "full", "vllm_server_transfer": "nccl", "vllm_config": None}
    keys = recipe(rollout_backend="vllm_server", **of_run, **of_model)
    vllm_server_rules.refuse_unfit(keys)
    monkeypatch.setattr(vllm_server_rules, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"`vllm_server_transfer: nccl` is not possible.*not installed.*files`"):
        vllm_server_rules.refuse_unfit(keys)


class NCCL:
    """What of vLLM's communicator is used, on a device whose work never ends, or ends at once."""

    ends = True
    disabled = False
    calls: list

    def __init__(self, group, device) -> None:
        self.comm = "comm"
        self.nccl = SimpleNamespace(ncclCommAbort=lambda comm: self.calls.append(("abort", comm)))

    def broadcast(self, tensor, src, stream) -> None:
        self.calls.append(("broadcast", src, stream))


@pytest.fixture
def nccl(monkeypatch) -> type[NCCL]:
    from vllm.distributed.device_communicators import pynccl

    own = type("OfTest", (NCCL,), {"calls": []})
    event = SimpleNamespace(record=lambda stream: own.calls.append(("record", stream)), query=lambda: own.ends)
    monkeypatch.setattr(pynccl, "PyNcclCommunicator", own)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "side")
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    return own


def test_what_is_sent_goes_over_a_stream_of_its_own_and_is_waited_for(nccl):
    communicator = NCCLCommunicator(CPU)
    communicator.abort()  # before there is anything to abort
    communicator = NCCLCommunicator(CPU)
    communicator.join("group")
    communicator.broadcast(torch.zeros(1))
    assert nccl.calls == [("broadcast", 0, "side"), ("record", "side")]


def test_an_abort_ends_what_nccl_waits_for(nccl):
    nccl.ends = False
    communicator = NCCLCommunicator(CPU)
    communicator.join("group")
    with gloo_transfer.in_background(communicator.broadcast, torch.zeros(1)) as sending:
        time.sleep(0.05)
        assert not sending.done()
        communicator.abort()
        with pytest.raises(RuntimeError, match="given up"):
            sending.result(timeout=5)
    time.sleep(0.05)
    assert ("abort", "comm") in nccl.calls


def test_a_communicator_that_would_send_nothing_is_refused(nccl):
    nccl.disabled = True
    with pytest.raises(ValueError, match="finds no NCCL"):
        NCCLCommunicator(CPU).join("group")


def test_vllm_has_what_is_called():
    """vLLM 0.23's own code, by name and by signature: what no CPU runs."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.distributed.weight_transfer import nccl_engine
    from vllm.entrypoints.serve.dev.rlhf.api_router import router
    from vllm.v1.worker.gpu_worker import Worker

    fields = [each.name for each in dataclasses.fields(nccl_engine.NCCLWeightTransferInitInfo)]
    assert fields == ["master_address", "master_port", "rank_offset", "world_size"]
    posts = {route.path for route in router.routes if "POST" in route.methods}
    assert {*TRANSFER_ROUTES, "/pause", "/resume"} <= posts
    assert "/get_world_size" in {route.path for route in router.routes if "GET" in route.methods}
    inspect.signature(StatelessProcessGroup.create).bind("a", 1, 0, 2, store_timeout=1, listen_socket=None)
    own = gloo_transfer.REPLACED["PyNcclCommunicator"]
    inspect.signature(own.__init__).bind(None, "group", "device")
    inspect.signature(own.broadcast).bind(None, "tensor", src=0, stream=None)
    source = inspect.getsource(own.__init__)
    assert source.index("self.comm:") < source.index("self.all_reduce("), "it can be aborted in its first operation"
    assert "self.disabled = True" in source
    assert list(inspect.signature(NCCLLibrary.ncclCommAbort).parameters) == ["self", "comm"]
    for phase in ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"):
        assert callable(getattr(Worker, phase))
