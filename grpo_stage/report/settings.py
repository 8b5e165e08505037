"""The settings and versions of a run, from whatever its folder holds of them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grpo_stage.records.redaction import mask, secrets_in
from grpo_stage.records.run_record import RUN_FILE
from grpo_stage.report.lines import read_object
from grpo_stage.survival.checkpoints import STATE_FILE


BOARD_FILE = "training_args.yaml"
"""Written by LLaMA Board beside the runs it starts."""
MODEL_CARD = "README.md"
_MAX_BYTES = 2**20
_CARD_LINE = re.compile(r"- ([\w .-]+): (.+)")
_ADAPTER_KEYS = {
    "base_model_name_or_path": "model_name_or_path",
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
}
"""PEFT's names, and ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is known of a run's settings."""

    values: Mapping[str, Any]
    """By key, secrets masked."""
    sources: tuple[str, ...]
    """The files that they come from, the most trusted first."""
    versions: Mapping[str, str]
    """Of packages, and hashes of reward code, by name."""
    rows: Mapping[str, Any]
    """The record of the training rows in the checkpoint; empty where there is none."""
    secrets: frozenset[str]
    """What must be masked in every text of the run."""


def settings_of(folder: Path, checkpoint: Path | None) -> Settings:
    """The settings of the run in `folder`, whose newest checkpoint is `checkpoint`."""
    state = read_object(checkpoint / STATE_FILE) if checkpoint else {}
    record = read_object(folder / RUN_FILE)
    card = _read_text(folder / MODEL_CARD)
    places = [folder, *([checkpoint] if checkpoint else [])]
    adapter = next(filter(None, (read_object(place / "adapter_config.json") for place in places)), {})
    parts = {
        f"{checkpoint.name}/{STATE_FILE}" if checkpoint else "": _mapping(state.get("recipe")),
        RUN_FILE: _mapping(record.get("recipe")),
        BOARD_FILE: _read_yaml(folder / BOARD_FILE),
        "adapter_config.json": {ours: adapter[name] for name, ours in _ADAPTER_KEYS.items() if name in adapter},
        f"{MODEL_CARD} (LLaMA-Factory's names)": _listed(card, "Training hyperparameters"),
    }
    values: dict[str, Any] = {}
    for part in parts.values():
        values |= {key: value for key, value in part.items() if key not in values}
    model = next(filter(None, (read_object(place / "config.json") for place in places)), {})
    versions: dict[str, str] = {
        **_hashes(record),
        **{f"reward {name}": str(code)[:40] for name, code in _mapping(state.get("reward_code")).items()},
        **_listed(card, "Framework versions"),
        **({"PEFT": str(adapter["peft_version"])} if "peft_version" in adapter else {}),
        **({"Transformers": str(model["transformers_version"])} if "transformers_version" in model else {}),
    }
    # Under the names that the other files have for the same packages.
    versions = {
        name: value for name, value in versions.items() if name.lower() not in _mapping(record.get("versions"))
    }
    versions |= {name: str(value) for name, value in _mapping(record.get("versions")).items()}
    return Settings(
        values=mask(values),
        sources=tuple(name for name, part in parts.items() if part),
        versions=dict(sorted(versions.items())),
        rows=_mapping(state.get("rows")) or ({"num": record["rows"]} if isinstance(record.get("rows"), int) else {}),
        secrets=frozenset(secrets_in(values)),
    )


def _hashes(record: Mapping[str, Any]) -> dict[str, str]:
    """Of the files of datasets and reward functions."""
    datasets = {
        f"data {name}: {file}": str(content)
        for name, dataset in _mapping(record.get("datasets")).items()
        for file, content in _mapping(_mapping(dataset).get("files")).items()
    }
    code = record.get("reward_code")
    described = [each for each in code if isinstance(each, Mapping)] if isinstance(code, list) else []
    return datasets | {f"reward {each.get('spec')}": str(each.get("sha256")) for each in described}


def shown(value: Any) -> str:
    """A value as YAML would have it on one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 300 else f"{text[:280]} [...]"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _read_text(path: Path) -> str:
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        return _mapping(yaml.safe_load(_read_text(path)))
    except yaml.YAMLError:
        return {}


def _listed(card: str, heading: str) -> dict[str, Any]:
    """The `- name: value` lines below a heading of the model card."""
    _, _, rest = card.partition(f"### {heading}\n")
    section = rest.partition("\n#")[0]
    lines = [line.removeprefix("- ").partition(" ") for line in section.splitlines() if line.startswith("- ")]
    pairs = {name: value for name, _, value in lines if not name.endswith(":")}  # `- PEFT 0.18.1`
    named = {found[1]: found[2] for line in section.splitlines() if (found := _CARD_LINE.fullmatch(line.strip()))}
    return pairs | named
