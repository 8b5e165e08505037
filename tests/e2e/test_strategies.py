"""Two processes that hold the weights together train as one process does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from llamafactory import launcher
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo_stage.survival import checkpoints

from .conftest import completions, modules_of, recipe_file, trainer_log
from .test_two_processes import untimed


SCRIPT, ZERO_LAUNCHER = (Path(__file__).with_name(name) for name in ("strategy_ranks.py", "zero_launcher.py"))
FSDP2 = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_offload_params": False,
    },
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "machine_rank": 0,
    "use_cpu": True,
}
"""A config file of `accelerate launch`, as docs/devices.md has it, for CPUs."""


ON_CPU = {"DS_ACCELERATOR": "cpu"}
WHOLE_WEIGHTS = {"lora, 4 bits"}
"""Cases that are refused where weights are divided."""


def zero(stage: int) -> dict[str, Any]:
    """The host's config for DeepSpeed: `ds_z<stage>_config.json`."""
    divided = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
    }
    if stage == 3:
        names = ("prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        divided |= {f"stage3_{name}": value for name, value in zip(names, ("auto", "auto", 1e9, 1e9), strict=True)}
        divided |= {"sub_group_size": 1e9, "reduce_bucket_size": "auto"}
    else:
        divided |= dict.fromkeys(("allgather_partitions", "reduce_scatter", "round_robin_gradients"), True)
        divided |= dict.fromkeys(("allgather_bucket_size", "reduce_bucket_size"), 5e8)
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {
        **dict.fromkeys((*batches, "gradient_clipping"), "auto"),
        "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "zero_optimization": divided,
    }


def offloaded(stage: int) -> dict[str, Any]:
    """The same with `offload`, and PyTorch's optimizer in the place of one that DeepSpeed would compile."""
    names = ("offload_optimizer", "offload_param")[: 2 if stage == 3 else 1]
    places = {name: {"device": "cpu", "pin_memory": False} for name in names}
    config = zero(stage)
    return {**config, "zero_force_ds_cpu_optimizer": False, "zero_optimization": config["zero_optimization"] | places}


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory) -> dict[str, str]:
    """What `accelerate launch` tells its processes."""
    file = tmp_path_factory.mktemp("launch") / "fsdp2.yaml"
    file.write_text(yaml.safe_dump(FSDP2))
    parsed = launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    arguments, *_ = _validate_launch_command(parsed)
    return {k: v for k, v in prepare_multi_gpu_env(arguments).items() if k.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.fixture(scope="module")
def steps_of(host_processes, tmp_path_factory) -> Callable[..., list[dict[str, Any]]]:
    """What `strategy_ranks.py` writes."""

    def run(environment: dict[str, str], num_ranks: int, *configs: dict[str, Any]) -> list[dict[str, Any]]:
        file = tmp_path_factory.mktemp("steps") / "steps.pt"
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            for result in host_processes.run_ranks(num_ranks, str(SCRIPT), str(file), *map(json.dumps, configs)):
                assert result.returncode == 0, result.stderr[-8000:]
        return torch.load(file)

    return run


@pytest.fixture(scope="module")
def one(steps_of) -> dict[str, Any]:
    return steps_of({}, 1)[0]


def test_fsdp2_updates_as_one_process_does(fsdp2, steps_of, one):
    (two,) = steps_of(fsdp2, 2)
    assert two["updates"].keys() == one["updates"].keys() - WHOLE_WEIGHTS
    check_updates(two, one)


def test_zero_updates_as_one_process_does(steps_of, one):
    stages = [0, 2, 3]
    results = steps_of(ON_CPU, 2, *map(zero, stages), *(offloaded(stage) for stage in (2, 3)))
    for stage, two in zip(stages, results, strict=False):
        assert two["updates"].keys() == one["updates"].keys() - (WHOLE_WEIGHTS if stage == 3 else set())
    for two in results:
        check_updates(two, one)


def check_updates(two: dict[str, Any], one: dict[str, Any]) -> None:
    """The same gradient, clipped alike; the same weights for the engine, and never all of them at once."""
    for case, (update, its_norm) in two["updates"].items():
        expected, norm = one["updates"][case]
        assert update.keys() == expected.keys()
        ours, theirs = (torch.cat([each[name].flatten() for name in expected]) for each in (update, expected))
        assert theirs.norm() > 1, case
        difference = (ours - theirs).norm() / theirs.norm()
        print(f"{case}: {difference:.1e}")  # the table of docs/devices.md: pytest -s
        assert difference < 1e-5, case
        assert its_norm == pytest.approx(norm, rel=1e-5), case
    for case, delivered in two["deliveries"].items():
        expected = one["deliveries"][case]
        assert delivered["weights"].keys() == expected["weights"].keys()
        assert all(torch.equal(tensor, expected["weights"][name]) for name, tensor in delivered["weights"].items())
        size = sum(tensor.nbytes for tensor in expected["weights"].values())
        assert delivered["whole at once"] < size / 3, "two layers, embeddings, and this process's halves"


LORA_RUN: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_samples": 9,
    "max_steps": -1,
    "num_train_epochs": 1,
    "beta": 0.05,
    "sync_ref_model": True,
    "ref_model_sync_steps": 1,
    "dynamic_sampling": True,
    "eval_dataset": "tens,thousand",
    "eval_strategy": "epoch",
    "save_strategy": "steps",
    "save_steps": 1,
    "log_completions": True,
}


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    (file,) = Path(folder).glob("*.safetensors")
    return load_file(file)


def relative(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    a, b = (torch.cat([each[name].flatten() for name in sorted(theirs)]) for each in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


def resumed(run: dict[str, Any], step: int, folder: Path) -> dict[str, Any]:
    """The recipe of a run that goes on from a copy of a checkpoint of `run`."""
    output_dir = folder / "resumed"
    shutil.copytree(Path(run["output_dir"]) / f"checkpoint-{step}", output_dir / f"checkpoint-{step}")
    return {**run, "output_dir": str(output_dir), "resume_from_checkpoint": str(output_dir / f"checkpoint-{step}")}


FULL_RUN: dict[str, Any] = {
    **{key: value for key, value in LORA_RUN.items() if "ref" not in key and key != "dynamic_sampling"},
    "finetuning_type": "full",
    "rollout_backend": "vllm",
    "num_iterations": 2,
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "eval_reward",
}
LORA_KEYS = ("lora_rank", "lora_target")


@pytest.fixture(scope="module")
def runs_of_one(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """The recipes of the runs of one process that others are compared with, once they have run, by their settings."""
    return {}


@pytest.fixture
def alone(recipe, train_in_ranks, runs_of_one, tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """The recipe of a run of one process: of `lora` or `full`."""

    def run(kind: str) -> dict[str, Any]:
        if kind not in runs_of_one:
            folder = tmp_path_factory.mktemp(kind) / "one"
            settings = {"lora": LORA_RUN, "full": FULL_RUN}[kind] | {"per_device_train_batch_size": 4}
            one = recipe(output_dir=str(folder), **settings)
            if kind == "full":
                one = {key: value for key, value in one.items() if key not in LORA_KEYS}
            train_in_ranks(one, num_ranks=1)
            runs_of_one[kind] = one
        return runs_of_one[kind]

    return run


def shared_by_two(one: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """The recipe of a run of one process for two."""
    return {**one, "output_dir": str(output_dir), "per_device_train_batch_size": 2}


def check_trained_alike(two: dict[str, Any], one: dict[str, Any]) -> None:
    def sampled(arguments: dict[str, Any]) -> list[Any]:
        return sorted((c["step"], c["prompt_index"], c["completion"]) for c in completions(arguments["output_dir"]))

    assert sampled(two) == sampled(one)
    assert relative(weights(two["output_dir"]), weights(one["output_dir"])) < 1e-4
    for ours, theirs in zip(*(trainer_log(run["output_dir"]) for run in (two, one)), strict=True):
        for name in theirs.keys() & {"loss", "reward", "kl", "grad_norm", "entropy", "eval_reward"}:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-6), name


def check_equal_weights(again: dict[str, Any], run: dict[str, Any]) -> None:
    ours, theirs = weights(again["output_dir"]), weights(run["output_dir"])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def check_refuses(resumed_run: dict[str, Any], host_processes: Any, layout: str) -> None:
    """A checkpoint of two processes with another layout."""
    for result in host_processes.run_ranks(2, launcher.__file__, recipe_file(resumed_run)):
        assert result.returncode != 0
        assert f"saved by 2 processes with {layout}" in result.stderr
        assert "this run has 2 processes with the whole weights in each" in result.stderr


def test_an_adapter_trains_under_fsdp2_and_goes_on_exactly(alone, train_in_ranks, fsdp2, monkeypatch, tmp_path):
    one = alone("lora")
    for name, value in fsdp2.items():
        monkeypatch.setenv(name, value)
    two = shared_by_two(one, tmp_path / "two")
    train_in_ranks(two)
    check_trained_alike(two, one)

    checkpoint = Path(two["output_dir"]) / "checkpoint-1"
    parts = {f"grpo_{part}_{rank}.pt" for part in ("shard", "reference") for rank in (0, 1)}
    assert parts <= checkpoints.read_state(checkpoint)["files"].keys()
    again = resumed(two, 1, tmp_path)
    train_in_ranks(again)
    check_equal_weights(again, two)
    assert [line for line in untimed(two) if line["current_steps"] > 1] == untimed(again)


def test_full_tuning_under_fsdp2_leaves_an_ordinary_checkpoint(
    alone, train_in_ranks, host_processes, fsdp2, monkeypatch, tmp_path
):
    """With vLLM shared out to both."""
    one = alone("full")
    two = shared_by_two(one, tmp_path / "two") | {"vllm_tensor_parallel": 2}
    for name, value in fsdp2.items():
        monkeypatch.setenv(name, value)
    train_in_ranks(two)
    check_trained_alike(two, one)
    config = json.loads((Path(two["output_dir"]) / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    AutoModelForCausalLM.from_pretrained(two["output_dir"])

    again = resumed(two, 3, tmp_path)
    train_in_ranks(again)
    check_equal_weights(again, two)

    for name in fsdp2:
        monkeypatch.delenv(name)
    check_refuses(resumed(two, 3, tmp_path / "other"), host_processes, "the weights sharded by FSDP2")


@pytest.fixture
def train_under_zero(host_processes, monkeypatch) -> Callable[[dict[str, Any]], None]:
    for name, value in ON_CPU.items():
        monkeypatch.setenv(name, value)

    def run(arguments: dict[str, Any]) -> None:
        modules = modules_of(arguments)
        for result in host_processes.run_ranks(2, str(ZERO_LAUNCHER), recipe_file(arguments), modules=modules):
            assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]

    return run


def under_zero(one: dict[str, Any], stage: int, folder: Path) -> dict[str, Any]:
    file = folder / f"ds_z{stage}_config.json"
    file.write_text(json.dumps(zero(stage)))
    two = shared_by_two(one, folder / "two")
    return {key: value for key, value in two.items() if key != "use_cpu"} | {"deepspeed": str(file)}


@pytest.mark.parametrize(("kind", "stage"), [("lora", 3), ("full", 2)])
def test_runs_under_zero_train_as_one_process_and_go_on_exactly(
    alone, train_under_zero, host_processes, tmp_path, kind, stage
):
    one = alone(kind)
    two = under_zero(one, stage, tmp_path)
    train_under_zero(two)
    check_trained_alike(two, one)

    checkpoint = Path(two["output_dir"]) / "checkpoint-1"
    assert {"grpo_zero_0.pt", "grpo_zero_1.pt"} <= checkpoints.read_state(checkpoint)["files"].keys()
    again = resumed(two, 1, tmp_path)
    train_under_zero(again)
    check_equal_weights(again, two)
    assert [line for line in untimed(two) if line["current_steps"] > 1] == untimed(again)

    if stage == 3:
        other = {key: value for key, value in resumed(two, 1, tmp_path / "other").items() if key != "deepspeed"}
        check_refuses(other | {"use_cpu": True}, host_processes, "the weights sharded by ZeRO-3")
