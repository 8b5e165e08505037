"""A recipe that the parser accepts, on a model folder that holds nothing but a config."""

import json
from pathlib import Path
from typing import Any

import pytest
from llamafactory.hparams import parser as host_parser
from llamafactory.hparams.finetuning_args import FinetuningArguments

from grpo_stage.host.parser import GRPOFinetuningArguments


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
}
DATASETS = {
    "sums": {"file_name": "sums.json"},
    "gsm8k": {"file_name": "gsm8k.json"},
    "clips": {"file_name": "clips.json", "columns": {"prompt": "q", "response": "a", "videos": "videos"}},
    "pairs": {"file_name": "pairs.json", "ranking": True},
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The YAML of a run as a mapping. No test changes the process's own registration."""
    ours = [
        GRPOFinetuningArguments if cls in (FinetuningArguments, GRPOFinetuningArguments) else cls
        for cls in host_parser._TRAIN_ARGS
    ]
    monkeypatch.setattr(host_parser, "_TRAIN_ARGS", ours)
    # That of an earlier test for ZeRO is there until it is collected.
    monkeypatch.setattr("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", None)
    monkeypatch.chdir(tmp_path)
    for folder, name, content in (("model", "config.json", CONFIG), ("data", "dataset_info.json", DATASETS)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(json.dumps(content))
    return {
        "stage": "grpo",
        "do_train": True,
        "model_name_or_path": str(tmp_path / "model"),
        "template": "llama3",
        "dataset": "sums",
        "dataset_dir": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "finetuning_type": "lora",
        "cutoff_len": 64,
        "max_new_tokens": 32,
        "reward_funcs": "accuracy",
        "rollout_backend": "hf",
        "use_cpu": True,
        "report_to": "none",
    }


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder that LoRA training could have written, less its weights."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 48, "bias": "none"}))
    return folder
