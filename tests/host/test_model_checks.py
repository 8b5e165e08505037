"""What is refused by the models' small files, the tokenizer and the prompts: no weights are there to load."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig

from grpo_stage.host.model_checks import refuse_tied_adapters, refuse_unknown_tokens
from grpo_stage.host.parser import parse
from grpo_stage.types import Prompt


@pytest.fixture
def tied(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe, with a model whose embedding is its output layer too."""
    file = Path(recipe["model_name_or_path"], "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    return recipe


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, str]:
    """Folders that LoRA training could have written, less their weights."""
    folders = {"head": ["q_proj", "lm_head"], "plain": ["q_proj"]}
    for name, targets in folders.items():
        LoraConfig(target_modules=targets, task_type="CAUSAL_LM").save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in folders}


REFERENCE = {"beta": 0.1, "ref_model": "{model}", "ref_model_adapters": "{head}"}


def filled(keys: dict[str, Any], **names: str) -> dict[str, Any]:
    return {key: value.format(**names) if isinstance(value, str) else value for key, value in keys.items()}


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_target": "q_proj,lm_head"},
        {"lora_target": "embed_tokens"},
        {"lora_target": "lm_head", "finetuning_type": "oft"},
        {"adapter_name_or_path": "{head}"},
        {"adapter_name_or_path": "{head}", "create_new_adapter": True},
        REFERENCE,
    ],
    ids=str,
)
def test_an_adapter_on_a_weight_that_two_layers_share(tied, adapters, keys):
    keys = filled(keys, model=tied["model_name_or_path"], **adapters)
    source = next(
        f"`{key}: {keys[key]}` is"
        for key in ("ref_model_adapters", "adapter_name_or_path", "lora_target")
        if key in keys
    )
    with pytest.raises(ValueError, match="share one weight") as error:
        refuse_tied_adapters(parse(tied | keys))
    assert str(error.value).startswith(source)


def test_the_last_of_several_adapters_is_not_the_only_one_that_counts(tied, adapters):
    several = f"{adapters['head']},{adapters['plain']}"
    with pytest.raises(ValueError, match=f"adapter_name_or_path: {adapters['head']}` is"):
        refuse_tied_adapters(parse(tied | {"adapter_name_or_path": several}))


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_target": "all"},
        {"lora_target": "q_proj", "additional_target": "embed_tokens,lm_head"},
        {"adapter_name_or_path": "{plain}"},
        {"finetuning_type": "full"},
        # only in the blocks that are added
        {"lora_target": "q_proj,lm_head", "use_llama_pro": True},
        # beside the quantized model, not merged into it
        REFERENCE | {"ref_model_quantization_bit": 4},
    ],
    ids=str,
)
def test_adapters_on_other_weights(tied, adapters, keys):
    refuse_tied_adapters(parse(tied | filled(keys, model=tied["model_name_or_path"], **adapters)))


def test_layers_with_weights_of_their_own(recipe, adapters):
    refuse_tied_adapters(parse(recipe | {"adapter_name_or_path": adapters["head"]}))


# Tokens


def prompt(*token_ids: int) -> Prompt:
    return Prompt(index=0, token_ids=token_ids, messages=(), reference=None)


def tokenizer(eos: int | None = 2, pad: int | None = None) -> Any:
    return SimpleNamespace(eos_token_id=eos, pad_token_id=pad, convert_ids_to_tokens="<{}>".format)


@pytest.mark.parametrize(
    ("tokens", "prompts", "closing", "named"),
    [
        (tokenizer(), [prompt(1, 2), prompt(3, 64, 5)], [], "'<64>' (64)"),
        (tokenizer(eos=65), [prompt(1)], [], "'<65>' (65)"),
        (tokenizer(pad=66), [prompt(1)], [], "'<66>' (66)"),
        (tokenizer(), [prompt(1)], [2, 67], "'<67>' (67)"),
    ],
    ids=["prompt", "end", "padding", "closing"],
)
def test_a_token_that_the_model_has_no_embedding_for(recipe, tokens, prompts, closing, named):
    arguments = parse(recipe)
    with pytest.raises(ValueError, match=r"`template: llama3`.*64 embeddings.*`resize_vocab: true`") as error:
        refuse_unknown_tokens(arguments, tokens, prompts, closing)
    assert named in str(error.value)
    arguments.model.resize_vocab = True
    refuse_unknown_tokens(arguments, tokens, prompts, closing)


def test_tokens_that_it_has_an_embedding_for(recipe):
    """The last of them too; what else the tokenizer knows is never read."""
    refuse_unknown_tokens(parse(recipe), tokenizer(eos=63), [prompt(1, 63)], [62])
