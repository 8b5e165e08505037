"""A model's config and layers, from its folder or hub repository, before its weights are loaded."""

import os
import re
from fnmatch import fnmatch
from pathlib import Path

import torch
from llamafactory.hparams.model_args import ModelArguments
from llamafactory.model.loader import load_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from grpo_stage.host.adapters import may_be_hub_id
from grpo_stage.host.zero import undivided


def config_of(key: str, model_args: ModelArguments) -> PretrainedConfig:
    """The config of the model that `key` names.

    Raises:
        ValueError: if there is no config, naming the key, the path, the reason and the remedy.
    """
    path = model_args.model_name_or_path
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"`{key}: {path}` is an adapter and no model: it has an adapter_config.json and no config.json. Name "
                f"the model that it stands on, and write `{_ADAPTER_KEYS[key]}: {path}`."
            )
        raise ValueError(
            f"`{key}: {path}` is a folder without a config.json, the file that says what a model is. Give the folder "
            "that holds the model's files."
        )
    if folder.is_file():
        raise ValueError(f"`{key}: {path}` is a file. Give the folder that holds the model's files.")
    is_name = "/" not in path and not path.startswith(("~", "."))  # such as gpt2: a hub name without an owner
    if not folder.exists() and not is_name and not may_be_hub_id(path):
        home = " `~` stands for no folder here: write the whole path." if path.startswith("~") else ""
        raise ValueError(
            f"`{key}: {path}` does not exist (looked for from {os.getcwd()}), and is no hub id (`owner/name`).{home} "
            "Give the path of the model's folder, or its hub id."
        )
    try:
        return load_config(model_args)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split(". ")[0].split())
        where = "its config.json cannot be read" if folder.exists() else "it is no folder here, and no hub gives it"
        said = f"{error} {error.__cause__ or ''}"
        if "trust_remote_code" in said:
            where = "it brings code of its own"
            remedy = "Write `trust_remote_code: true` if you have read that code."
        elif re.search(r"\b(?:gated|restricted|40[13])\b", said):
            where = "the hub does not give it to everyone"
            remedy = "Ask for access on its page, and write `hf_hub_token`, or set HF_TOKEN."
        elif folder.exists():
            remedy = "Give a folder whose config.json has a `model_type` that the installed transformers knows."
        else:
            remedy = "Mend the name, write a folder's path, or download the model first where there is no network."
            if folder.parent.is_dir() and "/" in path:
                remedy = f"The folder {folder.parent} is here, and has no {folder.name}. {remedy}"
        raise ValueError(f"`{key}: {path}` is not possible: {where} ({reason}). {remedy}") from error


def refuse_incomplete(key: str, path: str, needs_weights: bool) -> None:
    """Refuse a folder without the files of a tokenizer, or of weights.

    Without tokenizer files transformers makes a tokenizer of a few tokens, and encodes every prompt as unknown tokens.

    Raises:
        ValueError: naming the key, the path, what is missing and the remedy.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    names = [file.name for file in folder.iterdir()]
    for what, patterns in (("tokenizer", _TOKENIZER_FILES), *((("weight", _WEIGHT_FILES),) if needs_weights else ())):
        if not any(fnmatch(name, pattern) for name in names for pattern in patterns):
            raise ValueError(
                f"`{key}: {path}` has no {what} file (such as {patterns[0]}). Copy it from the model that this one "
                "was made of, or give the folder that holds all of the model."
            )


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer*", "tokenization*", "vocab*", "*.model", "*.tiktoken", "tekken*")
_WEIGHT_FILES = ("model.safetensors", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
_ADAPTER_KEYS = {
    "model_name_or_path": "adapter_name_or_path",
    "ref_model": "ref_model_adapters",
    "reward_model": "reward_model_adapters",
}


def skeleton(config: PretrainedConfig) -> nn.Module | None:
    """The model without weights, as the host would load it; None if transformers does not know its class."""
    for loader in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in loader._model_mapping:
            with undivided(), torch.device("meta"):
                return loader.from_config(config)
    return None
