"""Refusals by the tokenizer, the prompts and the models' small files, before weights are loaded."""

import re
from collections.abc import Iterable

from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations.integration_utils import get_available_reporting_integrations

from grpo_stage.host import facade
from grpo_stage.host.adapter_fit import AdapterOnModel, refuse_misfit
from grpo_stage.host.adapters import items
from grpo_stage.host.coercion import did_you_mean
from grpo_stage.host.model_files import refuse_incomplete, skeleton
from grpo_stage.host.optimizer_checks import refuse_optimizer
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.host.tied_weights import refuse_planned
from grpo_stage.types import Prompt
from grpo_stage.update.routing import no_router, routers_of


logger = facade.get_logger(__name__)

_NEVER_LISTED = ("azure_ml", "flyte")
"""What transformers reports to and does not always list among what is installed."""


def refuse_unloadable(arguments: RunArguments) -> None:
    """Refuse packages, schedules, layers, losses and adapters that would fail once the model is loaded.

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
    if own.moe_aux_loss_coef and (model is None or not routers_of(model)):
        raise ValueError(no_router(own.moe_aux_loss_coef, f"`model_name_or_path: {own.model_name_or_path}`"))
    if model is not None:
        _refuse_unknown_layers(arguments, model)
    is_resized = own.resize_vocab or bool(own.add_tokens or own.add_special_tokens)
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
                refuse_misfit(AdapterOnModel(key, adapter, subfolder, base_key, base), other, is_resized)


def _refuse_unknown_layers(arguments: RunArguments, model: nn.Module) -> None:
    finetuning = arguments.finetuning
    # Layers without a weight only contain other layers: PEFT adapts none of them, and trains some whole.
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
    """The names that `freeze_trainable_modules` and `freeze_extra_modules` may contain, as the host finds them."""
    in_blocks: set[str] = set()
    others: set[str] = set()
    for name, _ in model.named_parameters():
        if (block := re.search(r"\.[01]\.(\w+)", name)) is not None:
            in_blocks.add(block[1])
        if re.search(r"\.\d+\.", name) is None:
            others.add(name.split(".")[-2])
    return in_blocks, others


def _check_layers(key: str, names: Iterable[str], layers: Iterable[str]) -> None:
    """Refuse names without a layer: PEFT ignores such a name silently if another name has layers."""
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
    """Whether the words differ by one letter that is added, missing or changed, or by two neighbors exchanged."""
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


def adapter_source(arguments: RunArguments) -> str:
    """The key and value that the trained adapter's layers come from."""
    adapters = items(arguments.model.adapter_name_or_path)
    if adapters and not arguments.finetuning.create_new_adapter:
        return f"`adapter_name_or_path: {adapters[-1]}`"
    return f"`lora_target: {','.join(arguments.finetuning.lora_target)}`"


def refuse_tied_adapters(arguments: RunArguments) -> None:
    """Refuse adapters on a weight that two layers of their model share, as far as config files show it.

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
    if finetuning.ref_model_quantization_bit is None:  # a quantized model keeps its adapter beside it, unmerged
        adapters += [
            ("ref_model_adapters", path, finetuning.ref_model, {}) for path in items(finetuning.ref_model_adapters)
        ]
    # Not adapters of a reward model: its score is read before the output layer.
    for key, path, base, where in adapters:
        adapter = PeftConfig.from_pretrained(path, **hub, **where)
        refuse_planned(adapter, facade.load_config(facade.arguments_for(model, base)), f"`{key}: {path}`")


def num_embeddings(config: PretrainedConfig) -> int | None:
    """How many embeddings a model has by its config; its tokenizer may know fewer tokens, or more."""
    return getattr(config.get_text_config(), "vocab_size", None)


def refuse_unknown_tokens(
    arguments: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    closing: Iterable[int] = (),
) -> None:
    """Refuse tokens without an embedding: the model would fail at the first of them, in the middle of a step.

    Args:
        arguments: those of the run.
        tokenizer: the tokenizer, extended by the template.
        prompts: all prompts of the run.
        closing: the tokens after an answer, for a reward model on the policy's base, and those of a tool's result.

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
