"""What a run is refused for by its tokenizer, its prompts and the models' small files, before weights are loaded."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from peft import LoraConfig, PeftConfig
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..tied_weights import refuse_planned
from ..types import Prompt
from . import facade
from .adapters import items


if TYPE_CHECKING:
    from .parser import RunArguments


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
