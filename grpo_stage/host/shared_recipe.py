"""A recipe to share: a folder of a YAML file, its provenance, its reward code and its datasets' descriptions.

    recipe.yaml              runs in this folder with `llamafactory-cli train recipe.yaml`
    provenance.json          versions, hashes of model, dataset and code, results reached
    rewards/                 the files of the reward functions
    data/dataset_info.json   the descriptions of the datasets; local data files go beside it

No path of the machine that it was made on, no token and no key is in any of them.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from llamafactory.data.parser import DATA_CONFIG

from grpo_stage.host.adapters import items, may_be_hub_id
from grpo_stage.host.provenance import model_files
from grpo_stage.host.recipe_code import CODE_KEYS
from grpo_stage.host.recipe_sections import recipe_text
from grpo_stage.host.recipe_text import read_recipe
from grpo_stage.records.redaction import MASK, mask, mask_text
from grpo_stage.records.run_files import MetricCurves
from grpo_stage.records.run_record import read_run_record


RECIPE, PROVENANCE = "recipe.yaml", "provenance.json"
CODE_FOLDER, DATA_FOLDER = "rewards", "data"
MODEL_KEYS = (
    *("model_name_or_path", "adapter_name_or_path", "ref_model", "ref_model_adapters"),
    *("reward_model", "reward_model_adapters"),
)
# Places of this machine alone, and keys that upload.
_DROPPED = (
    *("cache_dir", "logging_dir", "media_dir", "tokenized_path", "resume_from_checkpoint", "overwrite_output_dir"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "export_dir", "ray_init_kwargs", "resume_with_changes"),
    *("hf_hub_token", "ms_hub_token", "om_hub_token", "hub_token", "swanlab_api_key", "swanlab_lark_webhook_url"),
    *("swanlab_lark_secret", "overwrite_cache"),
)
_PATH = re.compile(
    r"(?:(?<![\w.:/$}<])~?/(?:[\w.@+-]+/)+|(?<!\w)[A-Za-z]:[/\\](?:[\w.@+-]+[/\\])+)(?P<last>[\w.@+-]*)"
)
"""A path from the root, a home or a drive, of two parts or more."""
_METRICS = ("reward", "eval_reward", "completions/mean_length", "entropy", "kl")


@dataclass(frozen=True, slots=True)
class SharedRecipe:
    """A recipe that came from elsewhere, with what its folder says of it."""

    folder: Path
    recipe: Mapping[str, Any]
    provenance: Mapping[str, Any]
    """Empty for a YAML file alone."""

    @property
    def code(self) -> Mapping[str, str]:
        """The hashes of the files of the reward functions, by their path in the folder."""
        return self.provenance.get("reward_code", {})

    def refuse_changed(self) -> None:
        """Refuse files of reward functions that are not those that were exported.

        Raises:
            ValueError: naming the file and both hashes.
        """
        for name, expected in self.code.items():
            path = self.folder / name
            if not path.resolve().is_relative_to(self.folder.resolve()):
                raise ValueError(f"{PROVENANCE} names the file {name}, which is outside of {self.folder}.")
            if not path.is_file():
                raise ValueError(f"{path} is missing: the recipe came with it. Copy the whole folder again.")
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != expected:
                raise ValueError(
                    f"{path} is not the file that was exported: its sha256 is {found[:12]}, and {PROVENANCE} says "
                    f"{expected[:12]}. Get the folder again from where it came, or export your own run."
                )

    def placed(self) -> dict[str, Any]:
        """The keys that name files of the folder, with their absolute paths."""
        placed: dict[str, Any] = {}
        if self.recipe.get("dataset_dir") == DATA_FOLDER and (self.folder / DATA_FOLDER).is_dir():
            placed["dataset_dir"] = str((self.folder / DATA_FOLDER).resolve())
        for key in CODE_KEYS:
            names = [name.strip() for name in items(self.recipe.get(key))]
            if any(name.rpartition(":")[0] in self.code for name in names):
                found = [
                    str((self.folder / name).resolve()) if name.rpartition(":")[0] in self.code else name
                    for name in names
                ]
                placed[key] = found[0] if key == "environment" else found
        return placed


def read_shared(path: Path) -> SharedRecipe:
    """The recipe of a folder that `export` wrote, of an output folder, or of a YAML file alone.

    Raises:
        ValueError: if there is none, or it is damaged.
    """
    if path.is_dir() and not (path / RECIPE).is_file():
        record = read_run_record(path)
        return SharedRecipe(
            Path(record.get("folder", ".")), record["recipe"], {"versions": record.get("versions", {})}
        )
    file = path / RECIPE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} does not exist. Name a recipe's YAML file, or the folder that holds {RECIPE}.")
    beside = file.with_name(PROVENANCE)
    provenance: Any = {}
    if file.name == RECIPE and beside.is_file():
        try:
            provenance = json.loads(beside.read_text(encoding="utf-8"))
            well_formed = isinstance(provenance, dict) and all(
                isinstance(name, str) and isinstance(value, str)
                for name, value in provenance.get("reward_code", {}).items()
            )
        except (ValueError, AttributeError):
            well_formed = False
        if not well_formed:
            raise ValueError(f"{beside} is damaged. Get the folder again from where it came.")
    return SharedRecipe(file.parent, read_recipe(str(file)), provenance)


def export(run: Path, folder: Path) -> list[str]:
    """Write the recipe of a run into a new folder.

    Returns:
        What its user has to know: what was taken out, and what does not come along.

    Raises:
        ValueError: if the folder is not empty, or a file of reward code has changed since the run, or holds a secret.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`--output {folder}` is there already. Name a new folder.")
    record = read_run_record(run)
    code, specs, notes = _code_of(record)
    written: dict[str, Any] = {}
    for key in CODE_KEYS if specs else ():
        names = [specs.get(name.strip(), name) for name in items(record["recipe"].get(key))]
        if names or key == "reward_funcs":
            written[key] = names[0] if key == "environment" else names
    recipe, removed = without_private(record["recipe"] | written)
    notes += removed
    descriptions = _descriptions(record)
    place = recipe.get("dataset_dir")
    if isinstance(place, Mapping) or place == "ONLINE" or str(place).startswith("REMOTE:"):
        descriptions = {}
    else:
        recipe["dataset_dir"] = DATA_FOLDER
    provenance = {
        "versions": record.get("versions", {}),
        "models": _models(record),
        "datasets": {name: entry["files"] for name, entry in record.get("datasets", {}).items()},
        "rows": record.get("rows"),
        "reward_code": {name: hashlib.sha256(content).hexdigest() for name, content in code.items()},
        "results": results_of(run),
    }
    # Written last, and only if all of it could be made.
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in code.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    if descriptions:
        (folder / DATA_FOLDER).mkdir(exist_ok=True)
        _write_json(folder / DATA_FOLDER / DATA_CONFIG, without_private(descriptions)[0])
        if files := [file for entry in record["datasets"].values() for file in entry["files"]]:
            notes.append(f"the data does not come along: put {', '.join(files)} into {DATA_FOLDER}/")
    _write_json(folder / PROVENANCE, provenance)
    (folder / RECIPE).write_text(recipe_text(recipe, _head(provenance)), encoding="utf-8")
    return notes


def without_private(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The keys that can be shared, and what was changed in the others.

    Paths become their last part, secrets `***`; keys that only name places of a machine, or upload, are left out.
    """
    kept: dict[str, Any] = {}
    notes: list[str] = []
    for key, value in recipe.items():
        if key in _DROPPED:
            continue
        if key == "reward_model" and recipe.get("reward_model_type") == "api":
            kept[key] = MASK
        elif key in MODEL_KEYS and isinstance(value, str):
            kept[key] = ",".join(part if may_be_hub_id(part) else PurePath(part).name for part in items(value))
        elif key == "output_dir":
            kept[key] = f"saves/{PurePath(str(value)).name}"
        else:
            kept[key] = mask(_without_paths(value), key)
        if kept[key] != value and key != "output_dir":
            notes.append(f"`{key}` held a path or a secret of your machine: it is `{kept[key]}` now")
    return kept, notes


def results_of(run: Path) -> dict[str, Any]:
    """The steps that a run did, and the first, last and best value of the metrics that say how it went."""
    curves = MetricCurves(run)
    curves.update()
    results: dict[str, Any] = {}
    for name, points in curves.matching(_METRICS).items():
        values = [value for _, value in points]
        results[name] = {"first": values[0], "last": values[-1], "highest": max(values)}
        results["steps"] = max(results.get("steps", 0), points[-1][0])
    return results


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return _PATH.sub(lambda found: found["last"] or "folder", value) if isinstance(value, str) else value


def _code_of(record: Mapping[str, Any]) -> tuple[dict[str, bytes], dict[str, str], list[str]]:
    """The files of reward code by their new names, the functions by their old ones, and notes."""
    files: dict[str, bytes] = {}
    sources: dict[str, str] = {}
    specs: dict[str, str] = {}
    notes: list[str] = []
    for code in record.get("reward_code", []):
        path, function = Path(code["file"]), code["spec"].rpartition(":")[2]
        if code["is_installed"]:
            notes.append(f"`{code['spec']}` is of an installed package, which has to be installed there as well")
            continue
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != code["sha256"]:
            raise ValueError(
                f"{path} is not what the run used (sha256 {code['sha256'][:12]}): it has changed since, or is gone. "
                "Bring that file back, or run again and export that run."
            )
        text = content.decode("utf-8", errors="replace")
        if mask_text(text) != text:
            line = next(n for n, each in enumerate(text.splitlines(), 1) if mask_text(each) != each)
            raise ValueError(
                f"{path}, line {line}, holds what looks like a secret, and the file would be shared. Read it from an "
                "environment variable instead (docs/security.md), and run again."
            )
        name = f"{CODE_FOLDER}/{path.name}"
        if sources.setdefault(name, str(path)) != str(path):
            name = f"{CODE_FOLDER}/{path.parent.name}_{path.name}"
            sources[name] = str(path)
        if _PATH.search(text):
            notes.append(f"{name} holds what looks like a path of your machine: read it before you share it")
        files[name] = content
        specs[code["spec"]] = f"{name}:{function}"
    return files, specs, notes


def _models(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    recipe, home = record["recipe"], Path(record.get("folder", "."))
    found: dict[str, dict[str, str]] = {}
    for key in MODEL_KEYS:
        for part in items(recipe.get(key)):
            if key == "reward_model" and recipe.get("reward_model_type") == "api":
                continue
            local = home / Path(part)
            name = part if may_be_hub_id(part) and not local.exists() else PurePath(part).name
            found[f"{key}: {name}"] = model_files(str(local) if local.exists() else part)
    return found


def _descriptions(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry["description"] for name, entry in record.get("datasets", {}).items() if entry["description"]}


def _head(provenance: Mapping[str, Any]) -> str:
    """The comment that the file opens with."""
    lines = ["# A recipe of `stage: grpo`. grpo-stage recipe show FOLDER | grpo-stage recipe run FOLDER"]
    lines.append("# " + ", ".join(f"{name} {number}" for name, number in provenance["versions"].items()))
    results = provenance["results"]
    if "reward" in results:
        reward = results["reward"]
        lines.append(f"# reward {reward['first']:.3g} -> {reward['last']:.3g} in {results['steps']} steps")
    return "\n".join(lines)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
