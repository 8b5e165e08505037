"""`grpo-stage plan`: the model as shapes is the one that the host loads, and what is reported."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_stage.host import facade
from grpo_stage.host.empty_model import empty_policy
from grpo_stage.host.memory_plan import Device, MemoryPlan, make_plan
from grpo_stage.host.parser import parse
from grpo_stage.layout.syntax import parse_layout
from grpo_stage.memory.parts import GIB
from grpo_stage.tools import cli


GPU = Device("cuda", 24 * GIB)


def plan_of(recipe: dict[str, Any], device: Device = GPU, precision: tuple[str, ...] = ("bf16",)) -> MemoryPlan:
    return make_plan(parse(recipe), dict.fromkeys(precision, True), device)


@pytest.mark.parametrize(
    "keys",
    [
        {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"},
        {"finetuning_type": "full"},
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    ],
    ids=lambda keys: keys["finetuning_type"],
)
def test_the_shapes_are_those_of_the_model_that_the_host_loads(recipe, keys):
    folder = recipe["model_name_or_path"]
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).to(torch.bfloat16).save_pretrained(folder)
    arguments = parse(recipe | keys)
    tokenizer: Any = SimpleNamespace(init_kwargs={}, padding_side="left")  # nothing is resized
    loaded = facade.load_model(tokenizer, arguments.model, arguments.finetuning, True)

    def shapes(model: Any) -> dict[str, tuple]:
        return {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}

    empty = empty_policy(arguments)
    assert shapes(empty) == shapes(loaded)
    assert {p.device.type for p in empty.parameters()} == {"meta"}


def test_weights_have_the_precision_that_the_host_gives_them(recipe):
    """In bf16 files: trained weights are raised to float32, and with `pure_bf16` they are not."""
    config = Path(recipe["model_name_or_path"], "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
    full = recipe | {"finetuning_type": "full"}
    mixed, pure = plan_of(full), plan_of(full, precision=("pure_bf16",))
    parts, of_pure = mixed.grpo.phases[2].parts, pure.grpo.phases[2].parts
    weights = 4.0 * mixed.num_parameters
    assert (parts["weights, trained"], parts["gradients"], parts["optimizer"]) == (weights, weights, 2 * weights)
    assert of_pure["weights, trained"] == of_pure["gradients"] == of_pure["optimizer"] / 2 == weights / 2
    lora = plan_of(recipe).grpo.phases[2].parts
    assert lora["weights, frozen"] == weights / 2
    assert lora["adapters"] == lora["gradients"] == lora["optimizer"] / 2


def test_what_is_there_only_where_the_recipe_asks_for_it(recipe):
    full = recipe | {"finetuning_type": "full"}
    without, with_it = plan_of(full).grpo.peak.parts, plan_of(full | {"beta": 0.1}).grpo.peak.parts
    assert "reference" not in without
    assert with_it["reference"] == with_it["weights, trained"], "a copy of what is trained"
    assert "reference" not in plan_of(recipe | {"beta": 0.1}).grpo.peak.parts, "the base, with the adapter off"
    alone, two = plan_of(full), plan_of(full, Device("cuda", 24 * GIB, 2))
    assert two.grpo.peak.total - alone.grpo.peak.total == without["weights, trained"], "buckets, not shards"
    assert [budget.name for budget in alone.budgets] == ["GRPO", "PPO, critic a model of its own"]
    adapter, own = plan_of(recipe).budgets[2], plan_of(recipe).budgets[1]
    base = own.peak.parts["critic: weights, frozen"]
    assert own.peak.total - adapter.peak.total == base, "on the policy's base"


def test_quantization_and_an_optimizer_that_is_not_known(recipe):
    arguments = parse(recipe)
    arguments.model.quantization_bit = 4  # the parser asks for bitsandbytes
    arguments.model.double_quantization = True
    arguments.finetuning.use_muon = True
    plan = make_plan(arguments, {"bf16": True}, GPU)
    assert plan.grpo.phases[1].parts["weights, frozen"] < plan_of(recipe).grpo.phases[1].parts["weights, frozen"]
    assert any("`use_muon: true`" in note and "AdamW's are counted" in note for note in plan.notes)


def test_processes_that_share_an_engine_hold_a_part_of_it(recipe):
    def weights(device: Device, **keys: Any) -> float:
        arguments = parse(recipe | {"rollout_backend": "vllm"} | keys)
        arguments.model.quantization_bit = 4 if device is GPU else None
        arguments.model.double_quantization = True
        return make_plan(arguments, {"bf16": True}, device).grpo.phases[0].parts["engine's weights"]

    cpu = Device("cpu", 24 * GIB)
    assert weights(cpu, vllm_tensor_parallel=2) == weights(cpu) / 2
    parameters = plan_of(recipe).num_parameters
    assert weights(GPU, vllm_tensor_parallel=2) == 2.0 * parameters / 2, "in 16 bits: no part is quantized"
    assert weights(GPU) < 2.0 * parameters
    arguments = parse(recipe | {"rollout_backend": "vllm"})
    arguments.model.quantization_bit = 4
    for text, size in (("colocate 1x2", 2), ("colocate 2x1", 1)):
        plan = make_plan(arguments, {"bf16": True}, GPU, layout=parse_layout(f"train 2xH100; {text}"))
        whole = plan.grpo.phases[0].parts["engine's weights"] * size
        assert whole == plan.cost.engine_weights
        assert (whole == 2.0 * parameters) == (size == 2), "the layout's engine, too"


# The command


@pytest.fixture
def run(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plan the recipe with further arguments: the exit code and the JSON."""
    monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", "WARNING")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(recipe | {"use_cpu": False, "bf16": True}))

    def plan(*arguments: str) -> tuple[int, dict[str, Any]]:
        code = cli.main(["plan", "x.yaml", *arguments, "--json", "plan.json"])
        return code, json.loads(Path("plan.json").read_text()) if code in (0, 3) else {}

    return plan


def test_a_run_that_fits(run, capsys):
    code, found = run("--device", "24GB", "--tflops", "100")
    assert (code, found["fits"], found["remedies"]) == (0, True, [])
    assert found["update_s"] == found["update_flops"] / 1e14
    shown = capsys.readouterr().out
    assert "It fits" in shown
    assert "GRPO takes" in shown


def test_a_run_that_does_not_fit_says_what_to_change(run, capsys):
    code, found = run("--device", "512MB", "finetuning_type=full", "max_new_tokens=400")
    assert (code, found["fits"]) == (3, False), "the CUDA context alone is that large"
    totals = [step["total"] for step in found["remedies"]]
    assert totals == sorted(totals, reverse=True)
    assert {"finetuning_type": "lora"} in [step["keys"] for step in found["remedies"]]
    assert "It does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--device", "24"], ["--devices", "0"], ["--tflops", "-1"]], ids=" ".join)
def test_arguments_that_make_no_sense_are_refused(run, arguments, capsys):
    assert run(*arguments)[0] == 1
    assert f"`{' '.join(arguments)}`" in capsys.readouterr().err


def test_torch_is_as_it_was() -> None:
    """Fake tensors and the `meta` device are left behind by nobody."""
    assert type(torch.zeros(1)) is torch.Tensor
    assert torch.zeros(1).device.type == "cpu"
