"""What the files of a run show before a model is loaded: datasets, models, adapters, the output folder."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import PretrainedConfig

from grpo_stage.host import adapter_fit, adapters, dataset_files, model_checks, model_files, output_folder
from grpo_stage.host.dataset_files import check_files, defect_of
from grpo_stage.host.datasets import _check_split
from grpo_stage.host.model_checks import refuse_unloadable
from grpo_stage.host.parser import parse


def refusal(function: Any, *args: Any) -> str:
    with pytest.raises(ValueError, match="`") as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# Datasets


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"sums": {"file_name": "sums.json",}}', ["`dataset_dir: ", "line 1, column 36", "Mend"]),
        (b"", ["line 1, column 1", "Mend"]),
        ('{"sums": {}}'.encode("utf-16"), ["not in UTF-8", "Save it as UTF-8"]),
        (b"[1]", ["holds a list", "Write for example"]),
        (b'{"sums": "sums.json"}', ["`dataset: sums`", "text", '{"file_name": "sums.jsonl"}']),
        (b'{"sums": {"columns": {}}}', ["`dataset: sums`", "has columns", "hf_hub_url", "Write for example"]),
        (b'{"sums": {"file_name": "a", "formatting": "alpacca"}}', ["alpacca", "Did you mean `alpaca`?"]),
    ],
)
def test_a_broken_description(recipe, content, said):
    Path(recipe["dataset_dir"], "dataset_info.json").write_bytes(content)
    message = refusal(parse, recipe)
    assert [part for part in ("dataset_info.json", *said) if part not in message] == []


ROW = '{"instruction": "a", "output": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("sums.jsonl", f'{ROW}\n{{"instruction": "a"\n{ROW}', "line 2, column"),
        ("sums.json", f'[{ROW},\n{{"instruction" "a"}}]', "line 2, column 16"),
        ("sums.jsonl", f'{ROW}\n\n["a"]', "line 3 is a list, and a row is a mapping"),
        ("sums.json", f"[{ROW}, 3]", "row 2 is a number"),
        (
            "sums.jsonl",
            f'{ROW}\n{{"output": null}}\n{{"output": 3}}',
            "line 3 has a number in the column `output`, and",
        ),
        ("sums.jsonl", f"{ROW}\n\xe4", "line 2 is not in UTF-8"),
        ("sums.jsonl", f"{ROW}\n{ROW} and", "line 2, column 37 is no valid JSON"),
        ("sums.jsonl", '{\n"a": "b"\n}\n\n{\n"a": 3\n}', "line 5 has a number in the column `a`, and line 1 has text"),
    ],
)
def test_a_broken_row_is_named_with_its_line(recipe, name, content, said):
    folder = Path(recipe["dataset_dir"])
    (folder / "dataset_info.json").write_text(json.dumps({"sums": {"file_name": name}}))
    (folder / name).write_bytes(content.encode("latin-1"))
    message = defect_of("eval_dataset", "sums", str(folder))
    assert message is not None
    assert message.startswith("`eval_dataset: sums` cannot be read: ")
    assert f"{name}, {said}" in message
    assert "Mend" in message


@pytest.mark.parametrize(
    "content",
    [
        f"{ROW}\n{ROW}",
        f"[{ROW}]",
        ROW + ROW,
        f"{ROW} {ROW}\n",
        '{\n"a": 1\n}\n{"a": 2}',
        '{"a": 1}\n{"a": 1.5}\n{"a": null}',
        "\ufeff" + ROW,
    ],
)
def test_a_whole_file_has_no_defect(recipe, content):
    folder = Path(recipe["dataset_dir"])
    (folder / "sums.json").write_text(content)
    assert defect_of("dataset", "sums", str(folder)) is None
    check_files([("dataset", "sums")], str(folder))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.json", None, ["gone.json", "not there", "Mend its `file_name`"]),
        ("sums.xyz", ROW, ["sums.xyz", ".xyz", "arrow, csv, json", "Convert"]),
        ("sums.json", "", ["has no rows", "is empty", "Fill it"]),
        ("sums.json", "[\n]\n", ["has no rows"]),
        ("sums.jsonl", "\n\n", ["has no rows"]),
    ],
)
def test_a_file_that_gives_no_rows(recipe, name, content, said):
    folder = Path(recipe["dataset_dir"])
    (folder / "dataset_info.json").write_text(json.dumps({"sums": {"file_name": name}}))
    if content is not None:
        (folder / name).write_text(content)
    message = refusal(check_files, [("dataset", "sums")], str(folder))
    assert [part for part in ("`dataset: sums`", *said) if part not in message] == []


def test_a_folder_with_two_endings_of_one_kind(recipe):
    folder = Path(recipe["dataset_dir"])
    (folder / "dataset_info.json").write_text(json.dumps({"sums": {"file_name": "rows"}}))
    (folder / "rows").mkdir()
    for name in ("a.json", "b.jsonl"):
        (folder / "rows" / name).write_text(ROW)
    check_files([("dataset", "sums")], str(folder))
    (folder / "rows" / "c.csv").write_text("instruction,output\n")
    assert ".csv, .json, .jsonl" in refusal(check_files, [("dataset", "sums")], str(folder))


@pytest.mark.parametrize(
    ("val_size", "fits"), [(1, True), (11, True), (12, False), (500, False), (0.9, True), (0.95, False)]
)
def test_a_split_that_leaves_no_rows(val_size, fits):
    if fits:
        _check_split(range(12), val_size)
        return
    message = refusal(_check_split, range(12), val_size)
    assert [part for part in (f"val_size: {val_size}", "12", "none would be left") if part not in message] == []


# Models


@pytest.mark.parametrize("key", ["model_name_or_path", "ref_model", "reward_model"])
def test_a_path_that_is_no_model(recipe, adapter, tmp_path, key):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    (tmp_path / "saves").mkdir()
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote" / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}'
    )
    (tmp_path / "unheard").mkdir()
    (tmp_path / "unheard" / "config.json").write_text('{"model_type": "llamma"}')
    recipe |= {
        "model_name_or_path": {},
        "ref_model": {"beta": 0.1},
        "reward_model": {"reward_model_type": "full", "reward_funcs": "accuracy,reward_model"},
    }[key]
    for path, said in (
        ("/nowhere/model", ["does not exist", "Give the path"]),
        ("saves/my/model", ["does not exist", "hub id"]),
        ("~/model", ["does not exist", "write the whole path"]),
        ("modell", ["no folder here", "no hub gives it", "Mend the name"]),
        ("saves/model", ["no hub gives it", "The folder saves is here, and has no model", "Mend the name"]),
        ("remote", ["brings code of its own", "Write `trust_remote_code: true` if you have read that code"]),
        ("empty", ["without a config.json", "Give the folder"]),
        ("damaged", ["config.json cannot be read", "Give a folder"]),
        ("unheard", ["llamma", "Give a folder"]),
        (str(adapter), ["is an adapter", "adapters: " if key != "model_name_or_path" else "adapter_name_or_path: "]),
        ("data/dataset_info.json", ["is a file", "Give the folder"]),
    ):
        message = refusal(parse, recipe | {key: path})
        assert [part for part in (f"`{key}: {path}`", *said) if part not in message] == [], message


@pytest.mark.parametrize(
    "answer", ["You are trying to access a gated repo", "401 Client Error", "Access to model a/b is restricted"]
)
def test_a_model_that_a_hub_keeps_back(recipe, monkeypatch, answer):
    def fail(model_args: Any) -> None:
        raise OSError(answer)

    monkeypatch.setattr(model_files, "load_config", fail)
    message = refusal(model_files.config_of, "ref_model", SimpleNamespace(model_name_or_path="owner/name"))
    assert [
        part for part in ("`ref_model: owner/name`", answer, "`hf_hub_token`", "HF_TOKEN") if part not in message
    ] == []


def test_a_folder_that_is_called_like_an_owner_hides_no_hub(recipe, tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    monkeypatch.setattr(model_files, "load_config", lambda model_args: "a config")
    assert model_files.config_of("ref_model", SimpleNamespace(model_name_or_path="owner/name")) == "a config"
    monkeypatch.setattr(adapters, "cached_file", lambda name, file: f"cache/{file}")
    assert adapters.is_adapter_on_hub("owner/name")


@pytest.fixture
def whole(recipe) -> dict[str, Any]:
    """The recipe, on a folder that has a file of each kind."""
    for name in ("tokenizer.json", "model.safetensors"):
        Path(recipe["model_name_or_path"], name).touch()
    return recipe


@pytest.mark.parametrize("key", ["model_name_or_path", "ref_model", "reward_model"])
@pytest.mark.parametrize("missing", ["tokenizer.json", "model.safetensors"])
def test_a_model_that_lacks_files(whole, tmp_path, key, missing):
    """Without a tokenizer transformers makes one that knows no word."""
    folder = shutil.copytree(whole["model_name_or_path"], tmp_path / "incomplete")
    (folder / missing).unlink()
    more = {
        "model_name_or_path": {},
        "ref_model": {"beta": 0.1},
        "reward_model": {"reward_model_type": "full", "reward_funcs": "reward_model"},
    }[key]
    message = refusal(refuse_unloadable, parse(whole | more | {key: str(folder)}))
    assert f"`{key}: {folder}` has no {'tokenizer' if 'token' in missing else 'weight'} file" in message
    assert "Copy it" in message


# Layers and adapters


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    messages: list[str] = []
    for module in (model_checks, adapter_fit):
        monkeypatch.setattr(module.logger, "warning_rank0", messages.append)
    return messages


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_target": "nothere"}, ["`lora_target: nothere`", "q_proj", "write `all`"]),
        ({"lora_target": "q_prj"}, ["`lora_target: q_prj`", "Did you mean `q_proj`?"]),
        ({"lora_target": "q_proj,v_prj"}, ["no layer `v_prj`", "Did you mean `v_proj`?"]),
        ({"lora_target": "v_proj,q_porj"}, ["no layer `q_porj`", "Did you mean `q_proj`?"]),
        (
            {"lora_target": "all,q_proj"},
            ["`lora_target: all,q_proj`", "beside other", "Write `lora_target: all`"],
        ),
        ({"finetuning_type": "oft", "oft_target": "q_proj,all"}, ["`oft_target: q_proj,all`", "leave `all` out"]),
        ({"lora_target": "mlp"}, ["`lora_target: mlp`", "down_proj"]),
        ({"additional_target": "lm_heads"}, ["`additional_target: lm_heads`", "Did you mean `lm_head`?"]),
        (
            {"finetuning_type": "freeze", "freeze_trainable_modules": "atn"},
            ["`freeze_trainable_modules: atn`", "mlp", "self_attn"],
        ),
        (
            {"finetuning_type": "freeze", "freeze_extra_modules": "head"},
            ["`freeze_extra_modules: head`", "lm_head"],
        ),
        ({"optim": "adamw_apex_fused"}, ["optim: adamw_apex_fused", "optim: adamw_torch"]),
        ({"optim_args": "nonsense"}, ["optim_args: nonsense", "name=value"]),
        (
            {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"cycles": 2}},
            ["lr_scheduler_kwargs: {'cycles': 2}", "num_cycles"],
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, ["lr_scheduler_type: cosine_with_min_lr", "min_lr"]),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"num_cycles": 2}},
            ["lr_scheduler_kwargs: {'num_cycles': 2}", "no effect", "lr_scheduler_type: constant"],
        ),
        (
            {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"num_cycles": 2}},
            ["no effect", "lr_scheduler_type: constant_with_warmup"],
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-3}, "learning_rate": 1e-5},
            ["lr_scheduler_kwargs: {'lr_end': 0.001}", "lr_end"],
        ),
        (
            {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": 1e-3},
                "learning_rate": 1e-5,
            },
            ["`min_lr` above `learning_rate: 1e-05`", "Write one below it"],
        ),
        ({"report_to": "dvclive"}, ["report_to: dvclive", "not installed", "report_to: none"]),
    ],
    ids=str,
)
def test_what_would_fail_once_the_model_is_loaded(whole, changes, said):
    arguments = parse(whole | changes)
    message = refusal(refuse_unloadable, arguments)
    assert [part for part in said if part not in message] == [], message


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_target": "all"},
        {"lora_target": "q_proj,self_attn.v_proj", "additional_target": "embed_tokens"},
        {"finetuning_type": "full", "lora_target": "nothere"},
        {"finetuning_type": "freeze", "freeze_trainable_modules": "mlp,self_attn", "freeze_extra_modules": "lm_head"},
        {"finetuning_type": "oft"},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"optim": "adafactor", "optim_args": "scale_parameter=False"},
        {"optim": "galore_adamw"},
    ],
    ids=str,
)
def test_what_can_be_loaded(whole, warned, changes):
    refuse_unloadable(parse(whole | changes))
    assert warned == []


MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_loss_on_the_routers_of_a_mixture(whole, model_type):
    _write_config(whole, {"model_type": model_type, "num_key_value_heads": 2, **MIXTURE})
    refuse_unloadable(parse(whole | {"moe_aux_loss_coef": 0.001, "use_reentrant_gc": False}))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "qwen3_moe", **MIXTURE, "mlp_only_layers": [0, 1]},
        {"model_type": "granitemoe", **MIXTURE},
        {"model_type": "of_its_own_code", "architectures": ["Own"]},
    ],
    ids=["dense", "no layer is a mixture", "a router that was not verified", "code of its own"],
)
def test_a_loss_on_routers_that_the_model_has_not(whole, monkeypatch, config):
    arguments = parse(whole | {"moe_aux_loss_coef": 0.001, "use_reentrant_gc": False})
    _write_config(whole, config)
    if config.get("model_type") == "of_its_own_code":
        monkeypatch.setattr(model_checks.facade, "load_config", lambda model_args: PretrainedConfig())
    message = refusal(refuse_unloadable, arguments)
    assert f"`moe_aux_loss_coef: 0.001` is not possible with `model_name_or_path: {whole['model_name_or_path']}`" in (
        message
    )
    assert "no router that this stage knows" in message
    assert "Mixtral" in message
    assert "Leave it out" in message


def _write_config(recipe: dict[str, Any], changes: dict[str, Any]) -> None:
    file = Path(recipe["model_name_or_path"], "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("others", ["query_key_value", "gate_up_proj", "qkv_proj", "out_proj", "x_proj"])
def test_a_layer_of_other_models_is_left_out_with_a_warning(whole, warned, others):
    """A list for several models names what this one does not have, however near it is to what it has."""
    refuse_unloadable(
        parse(whole | {"lora_target": f"q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,{others}"})
    )
    assert len(warned) == 1
    assert f"no layer `{others}`" in warned[0]


def lora(folder: Path, base: str, layers: dict[str, tuple[int, int]]) -> Path:
    """An adapter of rank 4 on layers of these inputs and outputs."""
    folder.mkdir()
    LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path=base).save_pretrained(folder)
    weights = {}
    for layer, (inputs, outputs) in layers.items():
        weights[f"base_model.model.{layer}.lora_A.weight"] = torch.zeros(4, inputs)
        weights[f"base_model.model.{layer}.lora_B.weight"] = torch.zeros(outputs, 4)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


ATTENTION = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({ATTENTION: (32, 16)}, f"its {ATTENTION} has 32 inputs, and the model's 16"),
        ({ATTENTION: (16, 32)}, f"its {ATTENTION} has 32 outputs, and the model's 16"),
        ({"transformer.h.0.attn.c_attn": (16, 16)}, "has none of its layers, such as transformer.h.0.attn.c_attn"),
    ],
)
def test_an_adapter_of_another_model(whole, tmp_path, layers, said):
    folder = lora(tmp_path / "lora", "another/base", layers)
    message = refusal(refuse_unloadable, parse(whole | {"adapter_name_or_path": str(folder)}))
    for part in (
        f"`adapter_name_or_path: {folder}`",
        whole["model_name_or_path"],
        said,
        "another/base",
        "Name that model in place of `model_name_or_path: ",
    ):
        assert part in message


def test_an_adapter_of_a_model_beside_the_policy(whole, tmp_path):
    folder = lora(tmp_path / "lora", "another/base", {ATTENTION: (32, 16)})
    shutil.copytree(whole["model_name_or_path"], tmp_path / "beside")
    for key, more in (
        ("ref_model", {"beta": 0.1}),
        ("reward_model", {"reward_model_type": "full", "reward_funcs": "reward_model"}),
    ):
        own = {key: str(tmp_path / "beside"), f"{key}_adapters": str(folder)}
        message = refusal(refuse_unloadable, parse(whole | more | own))
        assert f"`{key}_adapters: {folder}` does not fit `{key}: {tmp_path / 'beside'}`: its {ATTENTION}" in message


def test_an_adapter_of_the_same_model_whose_layers_are_called_otherwise(whole, tmp_path):
    folder = lora(tmp_path / "lora", whole["model_name_or_path"], {"model.decoder.0.q_proj": (16, 16)})
    message = refusal(refuse_unloadable, parse(whole | {"adapter_name_or_path": str(folder)}))
    assert "another version of transformers" in message
    assert "Name that model" not in message


def test_an_adapter_on_an_output_layer_with_added_tokens(whole, tmp_path):
    folder = lora(tmp_path / "lora", whole["model_name_or_path"], {"lm_head": (16, 1000)})
    own = whole | {"adapter_name_or_path": str(folder)}
    assert "its lm_head has 1000 outputs" in refusal(refuse_unloadable, parse(own))
    refuse_unloadable(parse(own | {"resize_vocab": True, "create_new_adapter": True}))


def test_an_adapter_that_fits(whole, tmp_path, warned):
    folder = lora(tmp_path / "lora", whole["model_name_or_path"], {ATTENTION: (16, 16)})
    refuse_unloadable(parse(whole | {"adapter_name_or_path": str(folder)}))
    moved = tmp_path / "moved"
    shutil.copytree(whole["model_name_or_path"], moved)
    refuse_unloadable(parse(whole | {"adapter_name_or_path": "owner/lora"}))
    assert warned == []
    refuse_unloadable(parse(whole | {"adapter_name_or_path": str(folder), "model_name_or_path": str(moved)}))
    assert len(warned) == 1
    assert f"was trained on {whole['model_name_or_path']}" in warned[0]
    assert "the same model in two places" in warned[0]


def test_an_adapter_with_layers_that_the_model_lacks_in_part(whole, tmp_path, warned):
    folder = lora(tmp_path / "lora", "a/b", {ATTENTION: (16, 16), ATTENTION.replace("0", "7"): (16, 16)})
    refuse_unloadable(parse(whole | {"adapter_name_or_path": str(folder)}))
    assert len(warned) == 1
    assert "2 weights of layers" in warned[0]


def test_a_damaged_adapter(whole, tmp_path):
    folder = lora(tmp_path / "lora", "a/b", {ATTENTION: (16, 16)})
    own = whole | {"adapter_name_or_path": str(folder)}
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    assert "is damaged" in refusal(refuse_unloadable, parse(own))
    file.unlink()
    assert "has no weights" in refusal(refuse_unloadable, parse(own))
    (folder / "adapter_config.json").write_text("{")
    message = refusal(parse, own)
    assert "adapter_config.json is damaged" in message
    assert "Copy it anew" in message


# The output folder


def test_an_output_folder_that_cannot_be(whole, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "is a file. Name a folder" in refusal(parse, whole | {"output_dir": "file"})
    assert f"is below {tmp_path / 'file'}, which is a file" in refusal(parse, whole | {"output_dir": "file/a/b"})
    before = sorted(tmp_path.rglob("*"))
    parse(whole | {"output_dir": "a/new/folder"})
    assert sorted(tmp_path.rglob("*")) == before

    def fail(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output_folder.tempfile, "TemporaryDirectory", fail)
    message = refusal(parse, whole)
    assert f"`output_dir: {whole['output_dir']}` cannot be written to: Permission denied" in message


def test_a_file_that_is_too_large_to_look_through_is_not(recipe, monkeypatch):
    folder = Path(recipe["dataset_dir"])
    (folder / "dataset_info.json").write_text(json.dumps({"sums": {"file_name": "sums.jsonl"}}))
    (folder / "sums.jsonl").write_text("[" * 100)
    assert defect_of("dataset", "sums", str(folder)) is not None
    monkeypatch.setattr(dataset_files, "_LARGE", 99)
    assert defect_of("dataset", "sums", str(folder)) is None


def test_nothing_is_asked_of_datasets_that_are_described_elsewhere():
    for place in ("ONLINE", "REMOTE:a/b", {"sums": {"file_name": "gone.json"}}):
        check_files([("dataset", "sums")], place)
        assert dataset_files.defect_of("dataset", "sums", place) is None
