"""What a run is refused for by its tokenizer, its prompts and the models' small files, before weights are loaded."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations.integration_utils import get_available_reporting_integrations

from grpo_stage.host import facade
from grpo_stage.host.adapters import adapter_config, adapter_folder, items
from grpo_stage.host.coercion import did_you_mean
from grpo_stage.host.model_files import refuse_incomplete, skeleton
from grpo_stage.host.optimizer_checks import refuse_optimizer
from grpo_stage.host.tied_weights import refuse_planned
from grpo_stage.rewards.models.reward_model import may_be_same_model
from grpo_stage.types import Prompt


if TYPE_CHECKING:
    from grpo_stage.host.run_arguments import RunArguments


logger = facade.get_logger(__name__)

_NEVER_LISTED = ("azure_ml", "flyte")
"""What transformers reports to and does not always list among what is installed."""
_LORA_WEIGHT = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")


def refuse_unloadable(arguments: "RunArguments") -> None:
    """Refuse what would otherwise fail once the model is loaded: packages, schedules, layers, adapters.

    Raises:
        ValueError: naming the key, its value, the reason and the remedy.
    """
    refuse_optimizer(arguments.training)
    for name in arguments.training.report_to or ():
        if name not in (*get_available_reporting_integrations(), *_NEVER_LISTED):
            raise ValueError(
                f"`report_to: {name}` is not possible: its package is not installed. Install it (`pip install "
                f"{name}`), or write `report_to: none`."
            )
    finetuning, own = arguments.finetuning, arguments.model
    refuse_incomplete("model_name_or_path", own.model_name_or_path, needs_weights=not own.train_from_scratch)
    if finetuning.ref_model is not None:
        refuse_incomplete("ref_model", finetuning.ref_model, needs_weights=True)
    if finetuning.reward_model is not None and finetuning.reward_model_type == "full":
        refuse_incomplete("reward_model", finetuning.reward_model, needs_weights=True)
    model = skeleton(facade.load_config(own))
    if model is not None:
        _refuse_unknown_layers(arguments, model)
    for key, adapters, base_key, base in (
        ("adapter_name_or_path", own.adapter_name_or_path, "model_name_or_path", own.model_name_or_path),
        ("ref_model_adapters", finetuning.ref_model_adapters, "ref_model", finetuning.ref_model),
        ("reward_model_adapters", finetuning.reward_model_adapters, "reward_model", finetuning.reward_model),
    ):
        for adapter in items(adapters):
            other = (
                model
                if base == own.model_name_or_path
                else skeleton(facade.load_config(facade.arguments_for(own, base)))
            )
            if other is not None:
                subfolder = own.adapter_folder if key == "adapter_name_or_path" else None
                shown = f"`{key}: {adapter}`", f"`{base_key}: {base}`"
                is_resized = own.resize_vocab or bool(own.add_tokens or own.add_special_tokens)
                _refuse_misfit(adapter, subfolder, base, other, *shown, is_resized)


def _refuse_unknown_layers(arguments: "RunArguments", model: nn.Module) -> None:
    finetuning = arguments.finetuning
    # Those without a weight of their own only hold others: PEFT adapts none, and trains some whole.
    layers = [name for name, layer in model.named_modules() if "weight" in layer._parameters]
    if finetuning.finetuning_type == "freeze":
        in_blocks, others = _layers_of_parameters(model)
        _check_layers("freeze_trainable_modules", finetuning.freeze_trainable_modules, in_blocks)
        _check_layers("freeze_extra_modules", finetuning.freeze_extra_modules or (), others)
    elif finetuning.finetuning_type in ("lora", "oft"):
        is_new = not arguments.model.adapter_name_or_path or finetuning.create_new_adapter
        key = "lora_target" if finetuning.finetuning_type == "lora" else "oft_target"
        if is_new:
            targets = getattr(finetuning, key)
            if "all" in targets and len(targets) > 1:  # the host finds all layers for `all` alone
                raise ValueError(
                    f"`{key}: {','.join(targets)}` has `all` beside other names, and no layer is called so: only the "
                    f"others would be trained. Write `{key}: all`, or leave `all` out."
                )
            _check_layers(key, targets, layers)
            modules = [name for name, _ in model.named_modules() if name]
            _check_layers("additional_target", finetuning.additional_target or (), modules)


def _layers_of_parameters(model: nn.Module) -> tuple[set[str], set[str]]:
    """The names that `freeze_trainable_modules` and `freeze_extra_modules` may have, as the host finds them."""
    in_blocks: set[str] = set()
    others: set[str] = set()
    for name, _ in model.named_parameters():
        if (block := re.search(r"\.[01]\.(\w+)", name)) is not None:
            in_blocks.add(block[1])
        if re.search(r"\.\d+\.", name) is None:
            others.add(name.split(".")[-2])
    return in_blocks, others


def _check_layers(key: str, names: Iterable[str], layers: Iterable[str]) -> None:
    """PEFT leaves out, without a word, a name that no layer has where another name has some."""
    names, layers = list(names), list(layers)
    last_names = sorted({name for layer in layers if not (name := layer.rpartition(".")[2]).isdecimal()})
    known = [name for name in names if name == "all" or any(_ends_with(layer, name) for layer in layers)]
    for name in names:
        if name in known:
            continue
        problem = f"`{key}: {','.join(names)}`: the model has no layer `{name}`"
        slips = [other for other in last_names if other not in names and _is_one_slip(name, other)]
        if slips or not known or key.startswith("freeze"):
            near = did_you_mean(name, slips or last_names)
            or_all = ", or write `all`" if key.endswith(("_target", "_modules")) and "additional" not in key else ""
            raise ValueError(f"{problem}. {near}Name one or more of {', '.join(last_names)}{or_all}.")
        logger.warning_rank0(f"{problem}, and the run trains the others. It has {', '.join(last_names)}.")


def _is_one_slip(written: str, meant: str) -> bool:
    """One letter too many, too few or another, or two neighbors exchanged."""
    if len(written) == len(meant):
        wrong = [place for place, (a, b) in enumerate(zip(written, meant, strict=True)) if a != b]
        swapped = len(wrong) == 2 and wrong[1] == wrong[0] + 1
        return len(wrong) == 1 or (swapped and sorted(written) == sorted(meant))
    shorter, longer = sorted((written, meant), key=len)
    return len(longer) == len(shorter) + 1 and any(
        longer[:place] + longer[place + 1 :] == shorter for place in range(len(longer))
    )


def _ends_with(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _refuse_misfit(
    adapter: str,
    subfolder: str | None,
    base: str,
    model: nn.Module,
    adapter_shown: str,
    base_shown: str,
    is_resized: bool,
) -> None:
    """Refuse an adapter that was trained on a model of other layers, and warn of one that names another model.

    Args:
        adapter: its folder. What is on a hub is not looked at.
        subfolder: where it is in that folder.
        base: the model that it is put on.
        model: that model; its weights may be on the meta device.
        adapter_shown: the key and value that name the adapter.
        base_shown: those of the model.
        is_resized: the run adds tokens, so that the output layer of the model that is loaded may have more rows.

    Raises:
        ValueError: naming the adapter, the layer, both shapes, and the remedy.
    """
    config = adapter_config(adapter, subfolder)
    if config is None:
        return
    folder = adapter_folder(adapter, subfolder)
    if not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise ValueError(
            f"{adapter_shown} has no weights: there is no {SAFETENSORS_WEIGHTS_NAME} in {folder}. Give the folder "
            "that LoRA training wrote (its `output_dir`)."
        )
    trained_on = config.get("base_model_name_or_path")
    shapes = _lora_shapes(folder / SAFETENSORS_WEIGHTS_NAME, adapter_shown)
    modules = dict(model.named_modules())
    is_named = bool(trained_on) and may_be_same_model(trained_on, base)
    remedy = (
        "It was trained on a model of that name, whose layers another version of transformers may call otherwise. "
        "Install the version that trained it, or name another adapter."
        if is_named
        else f"It was trained on {trained_on or 'a model that it does not name'} (`base_model_name_or_path` of its "
        f"adapter_config.json). Name that model in place of {base_shown}, or another adapter."
    )
    missing = []
    for (layer, part), shape in shapes.items():
        module = modules.get(layer)
        if not isinstance(module, nn.Linear):
            missing += [layer] if module is None else []
            continue
        found, expected = (shape[1], module.in_features) if part == "A" else (shape[0], module.out_features)
        if found != expected and not (is_resized and part == "B" and layer.endswith("lm_head")):
            raise ValueError(
                f"{adapter_shown} does not fit {base_shown}: its {layer} has {found} "
                f"{'inputs' if part == 'A' else 'outputs'}, and the model's {expected}. {remedy}"
            )
    if missing and len(missing) == len(shapes):
        raise ValueError(
            f"{adapter_shown} does not fit {base_shown}, which has none of its layers, such as {missing[0]}. {remedy}"
        )
    if missing:
        logger.warning_rank0(
            f"{adapter_shown} has {len(missing)} weights of layers that {base_shown} does not have, such as "
            f"{missing[0]}: they are left out. {remedy}"
        )
    elif not may_be_same_model(trained_on, base) and "reward_model" not in base_shown:  # of which the workflow warns
        logger.warning_rank0(
            f"{adapter_shown} was trained on {trained_on} (`base_model_name_or_path` of its adapter_config.json), and "
            f"is put on {base_shown}: unless they are the same model in two places, it is noise there. Name the model "
            "that it was trained on."
        )


def _lora_shapes(file: Path, shown: str) -> Mapping[tuple[str, str], list[int]]:
    """By layer and matrix, the shape: from the file's header alone."""
    if not file.is_file():
        return {}
    try:
        with safe_open(file, framework="pt") as weights:
            named = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(
            f"{shown} is damaged: {file} cannot be read ({error}). Copy it anew, or name another adapter."
        ) from error
    found = ((_LORA_WEIGHT.fullmatch(name), shape) for name, shape in named.items())
    return {(match["layer"], match["part"]): shape for match, shape in found if match is not None}


def adapter_source(arguments: "RunArguments") -> str:
    """The key and value that the trained adapter's layers come from."""
    adapters = items(arguments.model.adapter_name_or_path)
    if adapters and not arguments.finetuning.create_new_adapter:
        return f"`adapter_name_or_path: {adapters[-1]}`"
    return f"`lora_target: {','.join(arguments.finetuning.lora_target)}`"


def refuse_tied_adapters(arguments: "RunArguments") -> None:
    """Refuse adapters on a weight that two layers of their model share, as far as config files tell of it.

    Raises:
        ValueError: naming the adapter, the layers, the reason and the remedy.
    """
    model, finetuning = arguments.model, arguments.finetuning
    hub = {"token": model.hf_hub_token, "cache_dir": model.cache_dir}
    own = {"subfolder": model.adapter_folder, "revision": model.model_revision}
    is_new = not model.adapter_name_or_path or finetuning.create_new_adapter
    if finetuning.finetuning_type in ("lora", "oft") and is_new and not finetuning.use_llama_pro:  # in blocks alone
        new = LoraConfig(target_modules=finetuning.lora_target, modules_to_save=finetuning.additional_target)
        refuse_planned(new, facade.load_config(model), adapter_source(arguments))
    adapters = [
        ("adapter_name_or_path", path, model.model_name_or_path, own) for path in items(model.adapter_name_or_path)
    ]
    if finetuning.ref_model_quantization_bit is None:  # which keeps its adapter beside it
        adapters += [
            ("ref_model_adapters", path, finetuning.ref_model, {}) for path in items(finetuning.ref_model_adapters)
        ]
    # Not those of a reward model: its score is read before the output layer.
    for key, path, base, where in adapters:
        adapter = PeftConfig.from_pretrained(path, **hub, **where)
        refuse_planned(adapter, facade.load_config(facade.arguments_for(model, base)), f"`{key}: {path}`")


def num_embeddings(config: PretrainedConfig) -> int | None:
    """How many tokens a model has an embedding for, as its config says: its tokenizer may know fewer, or more."""
    return getattr(config.get_text_config(), "vocab_size", None)


def refuse_unknown_tokens(
    arguments: "RunArguments",
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    closing: Iterable[int] = (),
) -> None:
    """Refuse tokens that the model has no embedding for: it would stop at the first of them, in the middle of a step.

    Args:
        arguments: the run's.
        tokenizer: as the template has extended it.
        prompts: all that the run samples from.
        closing: what is written behind an answer for a reward model on the policy's base.

    Raises:
        ValueError: naming the tokens, the model's number of embeddings, and the remedy.
    """
    model = arguments.model
    size = num_embeddings(facade.load_config(model))
    if size is None or model.resize_vocab:
        return
    highest = {
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        *closing,
        *(max(prompt.token_ids) for prompt in prompts),
    }
    unknown = sorted(token_id for token_id in highest if token_id is not None and token_id >= size)
    if unknown:
        tokens = ", ".join(f"{tokenizer.convert_ids_to_tokens(token_id)!r} ({token_id})" for token_id in unknown[:5])
        raise ValueError(
            f"`template: {arguments.data.template}` with the tokenizer of `model_name_or_path: "
            f"{model.model_name_or_path}` makes tokens that the model has no embedding for: {tokens}, and there are "
            f"{size} embeddings. The run would end with an IndexError at the first of them. Write `resize_vocab: "
            "true`, which adds embeddings that are then trained, or name the template that the model was trained with."
        )
