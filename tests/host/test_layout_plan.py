"""`grpo-stage plan --layout`, and the recipes of yaml_examples/scaling with the layouts and commands they name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_stage.host.memory_plan import Device, make_plan
from grpo_stage.host.parser import parse
from grpo_stage.layout.syntax import parse_layout
from grpo_stage.memory.parts import GIB
from grpo_stage.tools import cli
from grpo_stage.tools.plan_layout import plan_layout
from grpo_stage.tools.recipe_file import parse_without_run


SCALING = Path(__file__).resolve().parents[2] / "yaml_examples" / "scaling"
RECIPES = sorted(SCALING.glob("*.yaml"))
OF_SEVERAL = {"rollout_backend": "vllm_server", "vllm_server_urls": "http://a:8000", "deepspeed": "none.json"}


@pytest.fixture
def gpu_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """For GPUs, with keys of runs on several devices, whose packages and servers are not here."""
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_new_tokens": 16}
    return recipe | OF_SEVERAL | sizes | {"use_cpu": False, "bf16": True, "finetuning_type": "full"}


def test_the_command(gpu_recipe, tmp_path, capsys):
    Path("x.yaml").write_text(yaml.safe_dump(gpu_recipe))
    Path("lengths.jsonl").write_text('{"num_tokens": 4}\n{"num_tokens": 8}\n')
    arguments = ["--lengths", "lengths.jsonl", "--prompts", "800", "--json", "plan.json"]
    assert cli.main(["plan", "x.yaml", "--layout", "train 4xH100 fsdp; serve 2xH100", *arguments]) == 0
    found = json.loads(Path("plan.json").read_text())
    parts = found["rank"]["phases"]["optimizer"]
    one = {key: value for key, value in gpu_recipe.items() if key not in OF_SEVERAL}
    whole = make_plan(parse(one | {"use_cpu": True, "bf16": False}), {"bf16": True}, Device("cuda", 80 * GIB))
    alone = whole.grpo.phases[2].parts
    assert [parts[name] for name in ("weights, trained", "optimizer", "gradients")] == [
        alone[name] / 4 for name in ("weights, trained", "optimizer", "gradients")
    ]
    assert "engine's weights" not in found["rank"]["phases"]["rollout"], "servers have it"
    assert found["server_bytes"]["weights"] == found["sync_bytes"] == 2 * whole.num_parameters
    assert found["server_bytes"]["weights"] + found["server_bytes"]["KV cache"] == pytest.approx(0.9 * 80 * GIB)
    step = found["step"]
    assert step["step"] == pytest.approx(step["rollout"] + step["update"] + step["sync"])
    assert set(step["idle"]) == {"train", "serve"}
    num_prompts = 4 * 3 * 2
    assert step["num_prompts"] == num_prompts
    assert num_prompts * 8 * 4 < step["num_tokens"] < num_prompts * 8 * 8
    assert found["hours_per_epoch"] == pytest.approx(800 / num_prompts * step["step"] / 3600)
    shown = capsys.readouterr().out
    assert "hours an epoch" in shown
    assert "It fits" in shown


def test_an_engine_without_room_is_said(gpu_recipe, monkeypatch):
    keys = gpu_recipe | {"rollout_backend": "vllm", "vllm_gpu_util": 1e-7}
    plan = plan_layout(keys, parse_layout("train 2xH100 fsdp; colocate 1x2"), completion_length=8)
    assert not plan.fits
    assert plan.outcome is None
    assert "has room for" in plan.problem


def test_a_device_of_an_engine_holds_one_head_of_keys_and_values_at_least(gpu_recipe):
    """The model has two: further devices hold copies."""
    keys = gpu_recipe | {"rollout_backend": "vllm", "vllm_gpu_util": 1e-7}  # the cache is that of one completion
    alone, two, four = (
        plan_layout(keys, parse_layout(f"train 4xH100; colocate {text}"), completion_length=8)
        .memory.grpo.phases[0]
        .parts["KV cache"]
        for text in ("4x1", "2x2", "1x4")
    )
    assert (two, four) == (alone / 2, alone / 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lengths", "x.jsonl"], "`--lengths` would have no effect without `--layout`"),
        (["--prompts", "3"], "`--prompts` would have no effect without `--layout`"),
        (["--layout", "train 1xH100", "--device", "80GB"], "cannot go with `--layout`"),
        (["--layout", "train 1xH100", "--prompts", "0"], "must be at least 1"),
        (["--layout", "train 1xH100", "--lengths", "x", "--completion-tokens", "3"], "Leave one out"),
        (["--layout", "train 1xB52"], "no card that is known"),
    ],
)
def test_options_that_do_not_go_together(arguments, words, capsys):
    assert cli.main(["plan", "x.yaml", *arguments]) not in (0, 3)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rollout_backend": "hf"}, "`rollout_backend: hf`"),
        ({"rollout_backend": "vllm_server"}, "Add a part `serve`"),
        ({"rollout_backend": "vllm", "use_cpu": True}, "`use_cpu: true` cannot go"),
        (
            {"rollout_backend": "vllm", "vllm_tensor_parallel": 2},
            "`vllm_tensor_parallel: 2` .* engines of 1. Add `colocate NUMBERx2`.*`vllm_tensor_parallel=1`",
        ),
    ],
)
def test_recipes_that_a_layout_cannot_have(gpu_recipe, keys, words):
    with pytest.raises(ValueError, match=words):
        plan_layout(gpu_recipe | keys, parse_layout("train 2xH100"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_its_layout_and_its_commands_agree(path, recipe):
    text = path.read_text(encoding="utf-8")
    keys, head = yaml.safe_load(text), text.partition("\n### ")[0]
    plan = re.search(r'grpo-stage plan (\S+) --layout "(.*)"', head)
    assert plan is not None
    name = f"yaml_examples/scaling/{path.name}"
    assert plan[1] == name
    layout = parse_layout(plan[2])
    assert set(re.findall(r"yaml_examples/scaling/\w+\.yaml", head)) == {name}
    assert f"llamafactory-cli train {name}" in head or f"-m llamafactory.launcher {name}" in head
    assert (layout.sharding == "fsdp") == ("--config_file yaml_examples/scaling/fsdp2.json" in head)
    if layout.sharding == "fsdp":
        assert f"--num_processes {layout.num_trainers} " in head
        machines = re.search(r"--num_machines (\d+)", head)
        assert int(machines[1] if machines else 1) == -(-layout.num_trainers // 8)
    if layout.is_colocated:
        assert "grpo-stage serve" not in head
    else:
        assert keys["rollout_backend"] == "vllm_server"
        assert len(keys["vllm_server_urls"].split(",")) == layout.num_engines == head.count("grpo-stage serve")
        assert keys.get("vllm_config", {}).get("tensor_parallel_size", 1) == layout.engine_size
    counted = re.search(r"# counted in prompts: (\d+) a step, (\d+) completions", text)
    assert counted is not None
    prompts = layout.num_trainers * keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"]
    assert [int(number) for number in counted.groups()] == [prompts, prompts * keys["num_generations"]]
    here = {key: recipe[key] for key in ("model_name_or_path", "dataset", "dataset_dir")}
    of_servers = {"vllm_server_urls", "vllm_config"}
    rest = {key: value for key, value in keys.items() if key not in of_servers} | {"rollout_backend": "vllm"}
    config = Path(recipe["model_name_or_path"], "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096}))
    parsed = parse_without_run(rest | here, on_device=False)
    assert parsed.generating.max_new_tokens == keys["max_new_tokens"]
    assert parsed.data.template == keys["template"]


def test_the_launch_file_is_one_that_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(SCALING / "fsdp2.json"))
    assert str(config.distributed_type).endswith("FSDP")
    assert config.fsdp_config["fsdp_version"] == 2
