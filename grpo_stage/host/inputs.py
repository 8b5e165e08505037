"""What a run reads before its model: the tokenizer, the template and the prompts, each with its checks."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_stage.host import facade
from grpo_stage.host.datasets import PromptData, load_prompts
from grpo_stage.host.model_checks import refuse_tied_adapters, refuse_unknown_tokens, refuse_unloadable
from grpo_stage.host.other_model_checks import check_other_models
from grpo_stage.host.run_arguments import RunArguments


@dataclass(frozen=True)
class RunInputs:
    """Everything that a run needs beside its models."""

    tokenizer: PreTrainedTokenizerBase
    processor: Any
    """None for a text-only model."""
    template: Any
    prompts: PromptData


def load_inputs(arguments: RunArguments) -> RunInputs:
    """Read the inputs, and refuse those that would fail once a model is loaded.

    Raises:
        ValueError: for errors that only the data or the models' files show.
    """
    module = facade.load_tokenizer(arguments.model)
    tokenizer, processor = module["tokenizer"], module["processor"]
    template = facade.get_template_and_fix_tokenizer(tokenizer, arguments.data)
    refuse_unloadable(arguments)
    refuse_tied_adapters(arguments)
    check_other_models(arguments, template, tokenizer)
    prompts = load_prompts(
        template, tokenizer, processor, arguments.model, arguments.data, arguments.training, arguments.finetuning
    )
    finetuning_args = arguments.finetuning
    is_scored_on_policy = finetuning_args.reward_model is not None and finetuning_args.reward_model_type == "lora"
    refuse_unknown_tokens(
        arguments,
        tokenizer,
        [*prompts.train, *prompts.evaluation],
        facade.closing_tokens(template, tokenizer) if is_scored_on_policy else (),
    )
    return RunInputs(tokenizer, processor, template, prompts)
