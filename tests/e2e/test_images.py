"""Whole runs on prompts with images."""

import json

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from tests.image_models import save

from .conftest import completions, trainer_log


@pytest.fixture(scope="module")
def image_keys(tmp_path_factory):
    """The model and the data of a run."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(6):
        image = Image.new("RGB", (56, 28 + 28 * (i % 2)), "black")
        ImageDraw.Draw(image).rectangle((4, 4, 8 + 6 * i, 20), fill="white")
        image.save(folder / f"{i}.png")
        rows.append({"q": "<image>How wide?", "a": str(i), "image": f"{i}.png"})
    (folder / "wide.json").write_text(json.dumps(rows))
    columns = {"prompt": "q", "response": "a", "images": "image"}
    (folder / "dataset_info.json").write_text(json.dumps({"wide": {"file_name": "wide.json", "columns": columns}}))
    return {
        "model_name_or_path": str(save("qwen2_vl", folder / "model")),
        "template": "qwen2_vl",
        "dataset_dir": str(folder),
        "dataset": "wide",
        "reward_funcs": "rewards.py:short",
        "rollout_backend": "hf",
    }


@pytest.fixture
def short_reward(tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text(
        "def short(completion_ids, image):\n"
        "    assert all(name.endswith('.png') for name in image)\n"
        "    return [float(len(ids) % 3) + ids[0] / 1000 for ids in completion_ids]\n"
    )
    monkeypatch.chdir(tmp_path)


def test_full_tuning_resumes_exactly_and_trains_what_is_not_frozen(
    recipe, run_exp, image_keys, short_reward, tmp_path
):
    keys = image_keys | {
        "finetuning_type": "full", "freeze_vision_tower": True, "freeze_multi_modal_projector": False,
        "max_steps": 3, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3, "log_completions": True,
        "val_size": 2, "eval_strategy": "steps", "eval_steps": 3, "dynamic_sampling": True, "beta": 0.1,
        "disable_gradient_checkpointing": False,
    }  # fmt: skip
    folders = whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_exp(recipe(**keys, output_dir=str(whole)))
    resumed.mkdir()
    (whole / "checkpoint-2").rename(resumed / "checkpoint-2")
    run_exp(recipe(**keys, output_dir=str(resumed), resume_from_checkpoint=str(resumed / "checkpoint-2")))
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    before = load_file(f"{image_keys['model_name_or_path']}/model.safetensors")
    changed = {name for name in first if not torch.equal(first[name], before[name])}
    assert not any("visual.blocks" in name or "patch_embed" in name for name in changed)
    assert any("visual.merger" in name for name in changed)
    assert any("visual" not in name for name in changed)
    differences = [line.get("sampling/sampling_logp_difference/mean", 0.0) for line in trainer_log(whole)]
    assert 0 < max(differences) < 2e-5
    assert any("eval_reward" in line for line in trainer_log(whole))
    names = {image.rpartition("/")[2] for line in completions(whole) for image in line["images"]}
    assert names <= {f"{i}.png" for i in range(6)}


def test_vllm_gets_the_same_images_and_lora_trains_the_language_part(recipe, run_exp, image_keys, short_reward):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    keys = {
        "rollout_backend": "vllm", "finetuning_type": "lora", "max_steps": 3, "beta": 0.1, "num_iterations": 2,
        "learning_rate": 1e-2, "per_device_train_batch_size": 4,
    }  # fmt: skip
    run_exp(recipe(**image_keys | keys))
    output_dir = recipe()["output_dir"]
    adapter = load_file(f"{output_dir}/adapter_model.safetensors")
    assert adapter
    assert not any("visual" in name for name in adapter)
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
    differences = [line.get("sampling/sampling_logp_difference/mean", 0.0) for line in trainer_log(output_dir)]
    assert 0 < max(differences) < 5e-5
