"""The examples in a reduced size: each as it is, but for the model, the data, the lengths and the engine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_stage.host.recipe_text import read_recipe
from grpo_stage.host.shared_recipe import export

from .conftest import trainer_log


EXAMPLES = Path(__file__).resolve().parents[2] / "yaml_examples"
# What a run here cannot have, or takes from the fixture `recipe`.
REPLACED = (
    *("model_name_or_path", "template", "dataset", "dataset_dir", "cutoff_len", "max_new_tokens", "output_dir"),
    *("rollout_backend", "vllm_gpu_util", "preprocessing_num_workers", "overwrite_cache", "bf16", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "plot_loss", "num_train_epochs"),
    *("lr_scheduler_type", "warmup_steps", "save_steps", "save_strategy", "reward_kwargs", "report_to", "val_size"),
)


def example(name: str) -> dict[str, Any]:
    keys = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
    return {key: value for key, value in keys.items() if key not in REPLACED}


@pytest.mark.parametrize("name", ["r1_zero_grpo", "evaluation_grpo", "dynamic_sampling_grpo"])
def test_two_steps(recipe: Callable[..., dict[str, Any]], run_exp: Any, toy_reward: str, name: str) -> None:
    keys = example(name)
    # The tiny model is never right: a reward that tells its completions apart stands in for the first.
    keys["reward_funcs"] = [toy_reward, *keys["reward_funcs"].split(",")[1:]]
    sizes: dict[str, Any] = {"cutoff_len": 256}  # room for `default_system`
    if "filter_metric" in keys:
        sizes["filter_metric"] = "liked"
    if "eval_strategy" in keys:
        sizes |= {"val_size": 2, "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    arguments = recipe(**keys | sizes)
    run_exp(arguments)
    lines = trainer_log(arguments["output_dir"])
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 2
    assert all(line["grad_norm"] > 0 for line in steps)
    if "eval_strategy" in keys:
        assert [line["current_steps"] for line in lines if "eval_reward" in line][:2] == [0, 1]


def test_cold_start_and_the_recipe_of_its_run(
    recipe: Callable[..., dict[str, Any]], run_exp: Any, toy_reward: str, tmp_path: Path
) -> None:
    shared = recipe()
    sft = {key: shared[key] for key in ("model_name_or_path", "template", "dataset", "dataset_dir", "use_cpu")}
    adapter = tmp_path / "sft"
    # A rate that changes the policy by far more than rounding.
    more = {"output_dir": str(adapter), "max_steps": 2, "learning_rate": 3e-2, "report_to": "none", "cutoff_len": 64}
    run_exp(example("cold_start_1_sft") | sft | more | {"save_strategy": "no", "plot_loss": False})
    keys = example("cold_start_2_grpo") | {"adapter_name_or_path": str(adapter), "reward_weights": None}
    arguments = recipe(**keys | {"reward_funcs": toy_reward, "lora_rank": 16, "learning_rate": 1e-2})
    run_exp(arguments)
    first, second = [line for line in trainer_log(arguments["output_dir"]) if "loss" in line]
    # The reference is the policy at the start, the first file's adapter included.
    assert abs(first["kl"]) < 1e-6
    assert second["kl"] > 1e-4

    folder = tmp_path / "shared"
    export(Path(arguments["output_dir"]), folder)
    exported = read_recipe(str(folder / "recipe.yaml"))
    assert exported["adapter_name_or_path"] == "sft"
    assert exported["reward_funcs"] == ["rewards/toy.py:liked"]
    same = ("beta", "learning_rate", "num_generations", "max_new_tokens", "max_steps", "lora_rank", "seed")
    assert {key: exported[key] for key in same} == {key: arguments[key] for key in same}
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["rows"] == 10
    assert provenance["datasets"]["sums"]["sums.json"].startswith("sha256:")
    of_adapter = provenance["models"]["adapter_name_or_path: sft"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(of_adapter)
    assert provenance["results"]["steps"] == 2
    assert str(tmp_path) not in "".join(file.read_text() for file in folder.rglob("*.*") if file.is_file())
