"""Refusals by the reference and the reward model, before one of them is loaded."""

from typing import Any

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from grpo_stage.host import facade
from grpo_stage.host.adapters import items
from grpo_stage.host.model_checks import num_embeddings
from grpo_stage.host.reward_models import server_scorer
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.rewards.models.refusals import refuse_head, refuse_other_base, warn_of_other_base


def check_other_models(arguments: RunArguments, template: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a reference or a reward model whose files show that it does not fit."""
    finetuning_args, model_args = arguments.finetuning, arguments.model
    if finetuning_args.ref_model is not None:
        _check_vocabulary("ref_model", finetuning_args.ref_model, model_args, template, tokenizer)
    path = finetuning_args.reward_model
    if path is None:
        return
    if finetuning_args.reward_model_type == "api":
        server_scorer(arguments, tokenizer).check()
        return
    key, holder, base = "reward_model", path, model_args
    hub = {"token": model_args.hf_hub_token, "cache_dir": model_args.cache_dir}
    if finetuning_args.reward_model_type == "lora":
        stands_on = PeftConfig.from_pretrained(path, **hub).base_model_name_or_path
        refuse_other_base(stands_on, path, model_args.model_name_or_path)
    else:
        _check_vocabulary("reward_model", path, model_args, template, tokenizer)
        base = facade.arguments_for(model_args, path)
        for adapter in items(finetuning_args.reward_model_adapters):
            key, holder = "reward_model_adapters", adapter  # the last adapter has the value head
            stands_on = PeftConfig.from_pretrained(adapter, **hub).base_model_name_or_path
            warn_of_other_base(stands_on, adapter, path)
    config = facade.load_config(base).get_text_config()
    hidden_size = getattr(config, "word_embed_proj_dim", config.hidden_size)  # OPT projects its last hidden states
    refuse_head(facade.load_valuehead_params(holder, model_args), key, holder, hidden_size)


def _check_vocabulary(key: str, path: str, model_args: Any, template: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    other = facade.arguments_for(model_args, path)
    own_tokenizer = facade.load_tokenizer(other)["tokenizer"]
    template.fix_special_tokens(own_tokenizer)  # as for the policy's tokenizer
    vocabulary = own_tokenizer.get_vocab()
    needed, size = len(tokenizer), num_embeddings(facade.load_config(other))
    if not model_args.resize_vocab:  # the policy itself may have no embedding for a template's stop words
        needed = min(needed, num_embeddings(facade.load_config(model_args)) or needed)
    differing = [
        token for token, index in tokenizer.get_vocab().items() if index < needed and vocabulary.get(token) != index
    ]
    if (size is not None and size < needed) or differing:
        raise ValueError(
            f"`{key}: {path}` has another vocabulary than the trained model ({size} embeddings for {needed} "
            f"tokens, {len(differing)} of another id or none{f', such as {differing[0]!r}' if differing else ''}), so "
            "that it would misread the policy's tokens. Name a model of the same family, with the policy's new "
            f"tokens where it has some, or leave `{key}` out."
        )
