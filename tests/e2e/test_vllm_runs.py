"""Runs with the real vLLM: quiet when the policy arrives, stopped when it does not, whatever is tuned."""

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from grpo_stage.host import checks, engine, parser
from grpo_stage.monitors.canary import StaleRolloutError
from grpo_stage.rollout.engines import vllm_start, weights

from .conftest import completions, trainer_log


UPDATES = 3


@pytest.fixture(scope="session")
def adapters(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two LoRA adapters of the tiny model, trained far."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config)
        folders.append(str(tmp_path_factory.mktemp(f"adapter-{seed}")))
        policy.save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="session")
def parity(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward that knows no vocabulary: the share of even token ids."""
    file = tmp_path_factory.mktemp("rewards") / "parity.py"
    file.write_text(
        "def even(completion_ids):\n    return [1 - sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]\n"
    )
    return f"{file}:even"


METHODS = {
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "full, resized": {"finetuning_type": "full", "add_tokens": "<one>,<two>", "resize_vocab": True},
    "LLaMA-Pro": {"use_llama_pro": True, "freeze_trainable_layers": 1, "vllm_base": "trainer"},
    "QLoRA, 4 bits": {"quantization_bit": 4},
    "several adapters": {"adapter_name_or_path": "{0},{1}"},
    "PiSSA": {"pissa_init": True},
    "DoRA, merged": {"vllm_lora": "merged", "use_dora": True},
    "QLoRA, 4 bits, merged": {"vllm_lora": "merged", "quantization_bit": 4},
}


@pytest.fixture
def tuned(recipe, adapters, parity):
    """The recipe of a method, with updates that move the policy far each time."""

    def make(method):
        keys = {k: v.format(*adapters) if isinstance(v, str) else v for k, v in METHODS[method].items()}
        run = {"rollout_backend": "vllm", "reward_funcs": parity, "learning_rate": 2e-2, "max_steps": UPDATES + 1}
        return recipe(**run | keys)

    return make


@pytest.mark.parametrize("method", METHODS)
def test_the_canary_is_quiet_until_an_update_is_not_delivered(method, tuned, run_exp, monkeypatch):
    from grpo_stage.rollout.engines.vllm import VLLMEngine

    sync = VLLMEngine.sync

    def sync_until_then(engine, policy, version):
        if version < UPDATES:
            sync(engine, policy, version)
        else:  # the engine keeps what it has, and is told that it is new
            engine._versions = dict.fromkeys(engine._versions, version)

    monkeypatch.setattr(VLLMEngine, "sync", sync_until_then)
    arguments = tuned(method)
    with pytest.raises(StaleRolloutError, match="max_sampling_logprob_diff"):
        run_exp(arguments)
    log = trainer_log(arguments["output_dir"])
    assert [line["current_steps"] for line in log] == list(range(1, UPDATES + 1))
    assert all(line["sampling/sampling_logp_difference/mean"] < 1e-4 for line in log)


@pytest.mark.parametrize("method", ["QLoRA, 4 bits", "PiSSA"])
def test_a_base_from_the_files_stops_the_run(method, tuned, run_exp, monkeypatch):
    """Where the trainer's is another: what would happen without `changes_to_files`."""
    monkeypatch.setattr(engine, "changes_to_files", lambda arguments, model: ())
    with pytest.raises(StaleRolloutError, match="max_sampling_logprob_diff"):
        run_exp(tuned(method))


def test_an_adapter_that_is_in_the_base_too_stops_the_run(tuned, run_exp, monkeypatch):
    def write_merged(policy, folder):
        policy = copy.deepcopy(policy)
        policy.merge_adapter()
        write_base(policy, folder)

    write_base = vllm_start.write_base
    monkeypatch.setattr(vllm_start, "write_base", write_merged)
    with pytest.raises(StaleRolloutError, match="max_sampling_logprob_diff"):
        run_exp(tuned("several adapters"))


class Started(Exception):
    pass


@pytest.fixture
def started_with(run_exp, monkeypatch):
    """What a run would start vLLM with."""
    from grpo_stage.rollout.engines.vllm import VLLMEngine

    started = {}

    def start(engine, settings, tokenizer, images):
        started.update(dataclasses.asdict(settings))
        raise Started

    def settings(arguments):
        monkeypatch.setattr(VLLMEngine, "__init__", start)
        with pytest.raises(Started):
            run_exp(arguments)
        return started

    return settings


def test_sleeping_on_a_cpu_is_said_to_do_nothing(recipe, started_with, monkeypatch):
    said = []
    monkeypatch.setattr(engine.logger, "warning_rank0", said.append)
    assert started_with(recipe(rollout_backend="vllm", vllm_sleep=1))["sleep_level"] == 0
    assert [message for message in said if "`vllm_sleep: 1` has no effect on a CPU" in message]


def test_the_rank_of_an_adapter_is_known_once_it_is_loaded(recipe, started_with, run_exp, adapters, monkeypatch):
    """That of an adapter on a hub cannot be told from the keys, where `lora_rank` says nothing of it."""
    monkeypatch.setattr(parser, "lora_rank", lambda values: values.lora_rank)
    monkeypatch.setattr(checks, "lora_rank", lambda values: values.lora_rank)
    hub = {"rollout_backend": "vllm", "adapter_name_or_path": adapters[0], "lora_rank": 1}
    assert started_with(recipe(**hub))["max_lora_rank"] == 4
    assert started_with(recipe(**hub, vllm_max_lora_rank=64))["max_lora_rank"] == 64
    with pytest.raises(ValueError, match=r"vllm_max_lora_rank: 1.*below the rank.*4"):
        run_exp(recipe(**hub, vllm_max_lora_rank=1))


def test_an_engine_serves_an_adapter_or_takes_all_weights(recipe, started_with):
    native = started_with(recipe(rollout_backend="vllm")).copy()
    merged = started_with(recipe(rollout_backend="vllm", vllm_lora="merged", vllm_sleep=0))
    assert (native["adapter"], merged["adapter"], merged["max_lora_rank"]) == (True, False, 0)


@pytest.mark.parametrize(
    ("vllm_lora", "extra", "said"),
    [
        ("native", {"rank_pattern": {"q_proj": 4}}, "vLLM cannot serve this adapter: a rank of its own"),
        ("merged", {"bias": "lora_only"}, "cannot be merged for vLLM: bias: lora_only"),
    ],
)
def test_an_adapter_that_vllm_does_not_serve_is_refused_before_anything_is_written(
    vllm_lora, extra, said, recipe, run_exp, adapters, monkeypatch, tmp_path
):
    """That of an adapter on a hub is known when it was loaded, and no earlier."""
    folder = shutil.copytree(adapters[0], tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | extra))
    monkeypatch.setattr(checks, "_checked_adapter", lambda *args: None)
    monkeypatch.setattr(vllm_start, "write_base", None)
    own = {"vllm_base": "trainer", "vllm_lora": vllm_lora, "adapter_name_or_path": str(folder)}
    with pytest.raises(ValueError, match=said):
        run_exp(recipe(rollout_backend="vllm", **own))


def test_vllm_reads_the_hub_as_the_trainer_does(recipe, started_with, tmp_path):
    settings = started_with(recipe(rollout_backend="vllm", hf_hub_token="secret", cache_dir=str(tmp_path / "hub")))
    assert (settings["hf_token"], settings["download_dir"]) == ("secret", str(tmp_path / "hub"))


def test_the_canary_is_quiet_over_updates_with_a_large_learning_rate(recipe, run_exp):
    arguments = recipe(
        rollout_backend="vllm", learning_rate=2e-2, max_steps=4, log_completions=True, num_iterations=2, beta=0.01
    )
    run_exp(arguments)
    lines = [line for line in trainer_log(arguments["output_dir"]) if "loss" in line]
    assert len(lines) == 4
    assert lines[-1]["kl"] > 1e-2, "the policy has moved far from where it started"
    fresh = [line for line in lines if "sampling/sampling_logp_difference/mean" in line]
    assert [line["current_steps"] for line in fresh] == [1, 3], "each rollout is checked at its first use"
    assert all(line["sampling/sampling_logp_difference/mean"] < 1e-4 for line in fresh)
    assert {row["policy_version"] for row in completions(arguments["output_dir"])} == {0, 2}


def test_an_adapter_that_arrives_damaged_stops_the_run(recipe, run_exp, monkeypatch):
    write_adapter = weights.write_adapter

    def write_halved(policy, folder):
        write_adapter(policy, folder)
        from safetensors.torch import load_file, save_file

        file = folder / "adapter_model.safetensors"
        save_file({name: tensor / 2 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})

    monkeypatch.setattr(weights, "write_adapter", write_halved)
    with pytest.raises(StaleRolloutError, match="max_sampling_logprob_diff"):
        run_exp(recipe(rollout_backend="vllm", learning_rate=2e-2, max_steps=4))


@pytest.mark.parametrize(
    "cut",
    [
        {"rollout_backend": "vllm", "temperature": 0.8, "top_p": 0.9, "min_p": 0.001},
        {"rollout_backend": "hf", "temperature": 0.8, "top_p": 0.9, "min_p": 0.001},
        {"rollout_backend": "vllm", "structured_outputs": {"regex": "[0-9]{1,3} is it"}},
    ],
    ids=["vllm", "hf", "structured"],
)
def test_sampling_that_cuts_the_distribution_is_compared_before_the_cut(recipe, run_exp, cut):
    arguments = recipe(learning_rate=1e-2, max_steps=2, log_completions=True, **cut)
    run_exp(arguments)
    for line in trainer_log(arguments["output_dir"])[:2]:
        assert line["sampling/sampling_logp_difference/mean"] < 1e-4
    if "structured_outputs" in cut:
        for line in completions(arguments["output_dir"]):
            assert re.fullmatch("[0-9]{1,3} is it", line["completion"]) or line["finish_reason"] == "length"
