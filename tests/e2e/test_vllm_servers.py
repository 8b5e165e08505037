"""`rollout_backend: vllm_server` with real servers on the CPU, started once: what they sample, runs that lose them.

Every fault that needs no real server is in tests/engines/test_vllm_server_faults.py.
"""

import contextlib
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_stage.rollout.engines import vllm_server, vllm_server_transfer
from grpo_stage.rollout.engines.vllm import VLLMEngine
from grpo_stage.rollout.engines.vllm_requests import sampling_arguments
from grpo_stage.rollout.engines.vllm_server import VLLMServers
from grpo_stage.rollout.engines.vllm_server_check import wanted_of
from grpo_stage.rollout.engines.vllm_server_client import ServerClient
from grpo_stage.rollout.engines.vllm_server_fleet import Patience
from grpo_stage.rollout.engines.vllm_server_transfer import WeightTransfer
from grpo_stage.tools import serve
from grpo_stage.types import Prompt, RolloutGroup, SamplingSettings
from tests.engines.conftest import logprob_difference, policy_logprobs, randomize_adapter, vllm_settings
from tests.engines.gloo_transfer import GlooCommunicator
from tests.engines.vllm_servers import ServerFarm, ServerProcess

from .conftest import completions, trainer_log
from .test_two_processes import FSDP2


PROMPTS = [
    Prompt(index=i, token_ids=tuple(range(20 + i, 20 + i + length)), messages=(), reference=None)
    for i, length in enumerate((5, 40, 3, 17))
]
SAMPLING = SamplingSettings(num_generations=3, max_new_tokens=12, temperature=0.7, stop_token_ids=(2, 7), seed=42)
PATIENCE = Patience(ping_every=0.2, ping=6.0, rejoin=6.0)
NATS = 1e-4


NUM_FOR_ADAPTERS, NUM_SERVERS = 2, 4


class Cluster:
    """Two servers for adapters and two for whole weights, each started as `grpo-stage serve` says.

    Those for whole weights take them by vLLM's weight transfer as well, with gloo in the place of NCCL.
    """

    def __init__(self, farm: ServerFarm, recipe: dict[str, Any]) -> None:
        self._farm = farm
        self._recipe = recipe
        self._commands: dict[int, Any] = {}
        self.ports = [_free_port() for _ in range(NUM_SERVERS)]
        self.servers: list[ServerProcess] = [self._started(i) for i in range(NUM_SERVERS)]
        for server in self.servers:
            server.wait()

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers[:NUM_FOR_ADAPTERS]]

    @property
    def whole_urls(self) -> list[str]:
        return [server.url for server in self.servers[NUM_FOR_ADAPTERS:]]

    def recipe(self, i: int) -> dict[str, Any]:
        tuning = {"finetuning_type": "full"} if i >= NUM_FOR_ADAPTERS else {}
        return self._recipe | {"vllm_server_urls": f"http://127.0.0.1:{self.ports[i]}", **tuning}

    def restart(self, i: int) -> None:
        self.servers[i].send(signal.SIGKILL)
        self.servers[i] = self._started(i)

    def _started(self, i: int) -> ServerProcess:
        if i not in self._commands:  # parsing a recipe while a run is under way would reset accelerate's state
            self._commands[i] = serve._command(self.recipe(i), "127.0.0.1", self.ports[i])
        command = self._commands[i]
        model = command.arguments.index(self._recipe["model_name_or_path"])
        arguments, environment = list(command.arguments[model:]), dict(command.environment)
        if i >= NUM_FOR_ADAPTERS:  # `vllm_server_transfer: nccl` is refused on a CPU
            arguments += ["--weight-transfer-config", '{"backend": "nccl"}']
            environment["GRPO_TEST_GLOO"] = "1"
        return self._farm.start(arguments, environment, self.ports[i])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(
    decided_model_dir: Path, dataset_dir: Path, toy_reward: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("servers")
    recipe = {
        "stage": "grpo",
        "do_train": True,
        "model_name_or_path": str(decided_model_dir),
        "finetuning_type": "lora",
        "lora_rank": 4,
        "template": "smollm2",
        "dataset": "sums",
        "dataset_dir": str(dataset_dir),
        "cutoff_len": 64,
        "max_new_tokens": 64,
        "reward_funcs": toy_reward,
        "rollout_backend": "vllm_server",
        "output_dir": str(folder / "out"),
        "use_cpu": True,
    }
    farm = ServerFarm(folder)
    try:
        yield Cluster(farm, recipe)
    finally:
        farm.close()
        for server in farm.started:
            print(f"{server.log}:\n{server.log.read_text()[-3000:]}")  # shown where a test fails


@pytest.fixture(scope="module")
def tokenizer(decided_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(decided_model_dir)


def over_gloo() -> WeightTransfer:
    return WeightTransfer(torch.device("cpu"), lambda device: GlooCommunicator())


def connect(
    cluster: Cluster, tokenizer: Any, urls: list[str], i: int = 0, transfer: WeightTransfer | None = None
) -> VLLMServers:
    from grpo_stage.host.parser import parse

    return VLLMServers(
        urls,
        wanted_of(parse(cluster.recipe(i)).values()),
        tokenizer,
        folder="/nowhere",
        limit_s=120.0,
        warn=lambda text: pytest.fail(text),
        scores_alone=True,
        transfer=transfer,
        patience=PATIENCE,
    )


@pytest.fixture(scope="module")
def policy(decided_model_dir: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(decided_model_dir)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    policy = get_peft_model(model, config)
    randomize_adapter(policy, 1)
    return policy


def sampled(groups: list[RolloutGroup]) -> list[tuple[int, ...]]:
    return [each.token_ids for group in groups for each in group.completions]


def test_servers_sample_what_the_engine_in_this_process_does(cluster, tokenizer, policy, decided_model_dir):
    """One server or two: the same tokens, and log-probabilities of the same policy."""
    engine = VLLMEngine(vllm_settings(decided_model_dir, max_model_len=256), tokenizer)
    with contextlib.closing(engine):
        engine.sync(policy, 1)
        own = engine.generate(PROMPTS, SAMPLING, 1)
        scores = engine.score(own)
    for urls in (cluster.urls[:1], cluster.urls):
        with contextlib.closing(connect(cluster, tokenizer, urls)) as servers:
            servers.sync(policy, 1)
            groups = servers.generate(PROMPTS, SAMPLING, 1)
            assert sampled(groups) == sampled(own)
            assert [[each.finish_reason for each in g.completions] for g in groups] == [
                [each.finish_reason for each in g.completions] for g in own
            ]
            assert logprob_difference(policy, groups, SAMPLING.temperature) < NATS
            for group, of_engine in zip(groups, own, strict=True):
                for each, other in zip(group.completions, of_engine.completions, strict=True):
                    assert each.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=NATS)
            by_server = servers.score_each(groups)
            assert list(by_server) == urls
            for answers in (servers.score(groups), *by_server.values()):
                for answer, expected in zip(answers, scores, strict=True):
                    torch.testing.assert_close(answer, expected, atol=NATS, rtol=0)


def test_every_replica_follows_the_adapter(cluster, tokenizer, policy):
    with contextlib.closing(connect(cluster, tokenizer, cluster.urls)) as servers:
        for version in (2, 3, 4):
            randomize_adapter(policy, version)
            servers.sync(policy, version)
            groups = servers.generate(PROMPTS, SAMPLING, version)
            expected = [each for group in groups for each in policy_logprobs(policy, group, 1.0)]
            for answers in servers.score_each(groups).values():
                assert (torch.cat(answers) - torch.cat(expected)).abs().mean() < NATS


@pytest.mark.parametrize("transfer", [None, over_gloo()], ids=["files", "transfer"])
def test_whole_weights_arrive(cluster, tokenizer, decided_model_dir, transfer, monkeypatch):
    monkeypatch.setattr(vllm_server_transfer, "BYTES_OF_A_PART", 50_000)  # of which there are several
    policy = AutoModelForCausalLM.from_pretrained(decided_model_dir)
    generator = torch.Generator().manual_seed(5)
    with contextlib.closing(connect(cluster, tokenizer, cluster.whole_urls, 2, transfer)) as servers:
        for version in (1, 2):
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
            servers.sync(policy, version)
            # The same prompts: a prefix cache that was not emptied would answer for the version before.
            groups = servers.generate(PROMPTS, SAMPLING, 1)
            assert logprob_difference(policy, groups, SAMPLING.temperature) < NATS
            expected = torch.cat([each for group in groups for each in policy_logprobs(policy, group, 1.0)])
            for answers in servers.score_each(groups).values():
                assert (torch.cat(answers) - expected).abs().mean() < NATS


def test_vllm_reads_what_it_is_asked_for(cluster):
    import dataclasses

    from vllm.entrypoints.serve.disagg.protocol import GenerateRequest

    asked = dataclasses.replace(SAMPLING, top_k=5, min_p=0.1, structured_outputs={"regex": "[0-9]+"})
    request = GenerateRequest(token_ids=[1], sampling_params=sampling_arguments(PROMPTS[0], asked, 2**62 + 1))
    read = request.sampling_params
    assert (read.seed, read.max_tokens, read.top_k, read.min_p) == (2**62 + 1, 12, 5, 0.1)
    assert read.structured_outputs.regex == "[0-9]+"


@pytest.fixture
def settings(cluster: Cluster, decided_model_dir: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(decided_model_dir),
        "rollout_backend": "vllm_server",
        "vllm_server_urls": ",".join(cluster.urls),
        "learning_rate": 2e-2,
        "max_steps": 5,
        "log_completions": True,
    }


def adapter_of(recipe: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(recipe["output_dir"]) / "adapter_model.safetensors")


def assert_same_run(recipe: dict[str, Any], other: dict[str, Any], atol: float = 0.0) -> None:
    for ours, theirs in zip(completions(recipe["output_dir"]), completions(other["output_dir"]), strict=True):
        assert ours["completion"] == theirs["completion"]
    one, two = adapter_of(recipe), adapter_of(other)
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=atol) for name in one)


def test_a_run_that_loses_servers_learns_what_the_undisturbed_one_does(
    cluster, settings, recipe, run_exp, tmp_path, monkeypatch, caplog
):
    """kill -9 in the middle of a rollout, a restart, and SIGSTOP in the middle of another."""
    monkeypatch.setattr(vllm_server, "Patience", lambda: PATIENCE)
    whole = recipe(output_dir=str(tmp_path / "whole"), **settings)
    run_exp(whole)
    log = [line for line in trainer_log(whole["output_dir"]) if "loss" in line]
    assert all(0.99 < line["sampling/slope/start"] < 1.01 for line in log[1:])
    assert not list(Path(whole["output_dir"]).glob("_served_weights*"))

    sync, generate = VLLMServers.sync, ServerClient.generate
    step, asked = [0], [0]

    def synced(self: VLLMServers, policy: Any, version: int) -> None:
        if version == 3:
            cluster.servers[1].wait()
        if version == 4:
            cluster.servers[0].send(signal.SIGCONT)
        step[0], asked[0] = version, 0
        sync(self, policy, version)

    async def generated(self: ServerClient, *args: Any) -> Any:
        asked[0] += 1
        if (step[0], asked[0]) == (1, 3):
            cluster.restart(1)
        if (step[0], asked[0]) == (3, 3):
            cluster.servers[0].send(signal.SIGSTOP)
        return await generate(self, *args)

    monkeypatch.setattr(VLLMServers, "sync", synced)
    monkeypatch.setattr(ServerClient, "generate", generated)
    warnings: list[str] = []
    started = vllm_server.connect

    def connected(request: Any) -> VLLMServers:
        engine = started(request)
        engine._fleet._warn = warnings.append
        return engine

    monkeypatch.setattr(vllm_server, "connect", connected)
    disturbed = recipe(output_dir=str(tmp_path / "disturbed"), **settings)
    run_exp(disturbed)
    assert_same_run(disturbed, whole)
    first, second = cluster.urls
    assert [(first in text, second in text, "is back" in text) for text in warnings] == [
        *((False, True, False), (False, True, True)),
        *((True, False, False), (True, False, True)),
    ]
    assert "no answer to /health" in warnings[2]


def test_a_run_that_loses_servers_in_a_transfer_learns_what_the_undisturbed_one_does_by_files(
    cluster, settings, recipe, run_exp, tmp_path, monkeypatch
):
    """kill -9 between two parts of the weights, a restart, and SIGSTOP between two parts of a later version."""
    monkeypatch.setattr(vllm_server, "Patience", lambda: PATIENCE)
    monkeypatch.setattr(vllm_server_transfer, "BYTES_OF_A_PART", 50_000)
    first, second = cluster.whole_urls
    changes = {"finetuning_type": "full", "vllm_server_urls": f"{first},{second}", "learning_rate": 1e-3}

    def run(name: str) -> dict[str, Any]:
        own = recipe(output_dir=str(tmp_path / name), **settings | changes | {"max_steps": 4})
        for key in ("lora_rank", "lora_target"):
            del own[key]
        run_exp(own)
        log = [line for line in trainer_log(own["output_dir"]) if "loss" in line]
        assert all(0.99 < line["sampling/slope/start"] < 1.01 for line in log[1:])
        return own

    whole = run("whole")
    started, update, sync = vllm_server.connect, ServerClient.update_weights, VLLMServers.sync
    warnings: list[str] = []
    version, parts = [0], dict.fromkeys(cluster.whole_urls, 0)

    def connected(request: Any) -> VLLMServers:
        engine = started(request)
        engine._transfer = over_gloo()
        engine._fleet._warn = warnings.append
        return engine

    def synced(self: VLLMServers, policy: Any, of: int) -> None:
        if of == 2:
            cluster.servers[3].wait()
        version[0] = of
        parts.update(dict.fromkeys(parts, 0))
        sync(self, policy, of)

    async def updated(self: ServerClient, *args: Any) -> None:
        parts[self.url] += 1
        if parts[self.url] == 2:
            if (version[0], self.url) == (1, second):
                cluster.restart(3)
            if (version[0], self.url) == (3, first):
                cluster.servers[2].send(signal.SIGSTOP)
        await update(self, *args)

    monkeypatch.setattr(vllm_server, "connect", connected)
    monkeypatch.setattr(VLLMServers, "sync", synced)
    monkeypatch.setattr(ServerClient, "update_weights", updated)
    disturbed = run("disturbed")
    cluster.restart(2)  # what stands between two parts cannot be used any more
    for ours, theirs in zip(completions(disturbed["output_dir"]), completions(whole["output_dir"]), strict=True):
        assert ours["completion"] == theirs["completion"]
    one, two = (load_file(Path(each["output_dir"]) / "model.safetensors") for each in (disturbed, whole))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [(first in text, second in text, "is back" in text) for text in warnings] == [
        (False, True, False),
        (False, True, True),
        (True, False, False),
    ]
    assert "no answer to /health" in warnings[2]
    cluster.servers[2].wait()


def test_a_run_ahead_goes_on_exactly(cluster, settings, recipe, run_exp, tmp_path):
    settings = settings | {"rollout_ahead": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = recipe(output_dir=str(tmp_path / "whole"), **settings)
    run_exp(whole)
    behind = {(row["step"] - 1, row["policy_version"]) for row in completions(whole["output_dir"])}
    assert behind == {(0, 0), (1, 0), (2, 1), (3, 2)}
    resumed = recipe(output_dir=str(tmp_path / "resumed"), **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    (tmp_path / "resumed" / "grpo_finished.json").unlink()
    run_exp(resumed | {"resume_from_checkpoint": str(tmp_path / "resumed" / "checkpoint-2")})
    # The ratio has the servers' log-probabilities in it, which differ by what else is in their batch.
    assert_same_run(resumed, whole, atol=1e-4)


def test_servers_follow_a_policy_that_two_processes_hold_together(
    cluster, settings, recipe, train_in_ranks, monkeypatch, tmp_path
):
    """FSDP2, as `accelerate launch` asks for it: the first process delivers what both hold, and both sample."""
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    changes = {"vllm_server_urls": cluster.servers[2].url, "finetuning_type": "full", "max_steps": 3}
    run = recipe(output_dir=str(tmp_path / "out"), **settings | {"learning_rate": 1e-3} | changes)
    for key in ("lora_rank", "lora_target"):
        del run[key]
    train_in_ranks(run)
    assert len({row["prompt_index"] for row in completions(run["output_dir"])}) == 10, "both have sampled"
    log = [line for line in trainer_log(run["output_dir"]) if "loss" in line]
    assert all(line["sampling/sampling_logp_difference/mean"] < NATS for line in log)
    assert all(0.99 < line["sampling/slope/start"] < 1.01 for line in log[1:])


def test_without_servers_the_run_ends_with_a_checkpoint(cluster, settings, recipe, run_exp, tmp_path, monkeypatch):
    """The last test: the servers are gone afterwards."""
    monkeypatch.setattr(vllm_server, "Patience", lambda: PATIENCE)
    generate: Callable[..., Any] = ServerClient.generate
    asked = [0]

    async def generated(self: ServerClient, *args: Any) -> Any:
        asked[0] += 1
        if asked[0] == 30:  # in the third rollout
            for server in cluster.servers[:2]:
                server.send(signal.SIGKILL)
        return await generate(self, *args)

    monkeypatch.setattr(ServerClient, "generate", generated)
    ended = recipe(output_dir=str(tmp_path / "ended"), **settings)
    with pytest.raises(RuntimeError, match="None of the 2 vLLM servers answers any more") as error:
        run_exp(ended)
    (note,) = error.value.__notes__
    checkpoint = Path(note.split()[-1].rstrip("."))
    assert checkpoint.is_dir()
    assert (checkpoint / "adapter_model.safetensors").exists()
    time.sleep(0.1)
    with pytest.raises(ValueError, match="cannot be used"):
        run_exp(recipe(output_dir=str(tmp_path / "again"), **settings))
