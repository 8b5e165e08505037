"""The reward model of a run, for each `reward_model_type`."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, load_peft_weights
from transformers import PreTrainedTokenizerBase

from grpo_stage.host import facade
from grpo_stage.host.policy import to_device
from grpo_stage.host.precision import autocast_dtype
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.rewards.models.adapter_on_policy import AdapterOnPolicy
from grpo_stage.rewards.models.reward_model import ModelReward
from grpo_stage.rewards.models.server import ServerScorer
from grpo_stage.rewards.models.value_head import ValueHeadScorer


def load_reward_model(
    arguments: RunArguments, model: Any, template: Any, tokenizer: PreTrainedTokenizerBase
) -> ModelReward:
    finetuning_args, model_args = arguments.finetuning, arguments.model
    path = finetuning_args.reward_model
    autocast = partial(
        torch.autocast,
        arguments.training.device.type,
        autocast_dtype(arguments),
        enabled=autocast_dtype(arguments) is not None,
    )
    if finetuning_args.reward_model_type == "api":
        return _model_reward(arguments, server_scorer(arguments, tokenizer), template, tokenizer)
    if finetuning_args.reward_model_type == "lora":
        hub = {"token": model_args.hf_hub_token, "cache_dir": model_args.cache_dir}
        adapter = AdapterOnPolicy(
            model, PeftConfig.from_pretrained(path, **hub), load_peft_weights(path, device="cpu", **hub), path
        )
        score = ValueHeadScorer(adapter.activate, facade.load_valuehead_params(path, model_args), autocast)
    else:
        own = facade.create_reward_model(model, facade.arguments_for(model_args, path), finetuning_args)
        backbone = to_device(own.pretrained_model, arguments)
        head = {f"v_head.{name}": value for name, value in own.v_head.state_dict().items()}
        score = ValueHeadScorer(lambda: contextlib.nullcontext(backbone), head, autocast)
    return _model_reward(arguments, score, template, tokenizer)


def server_reward(arguments: RunArguments, template: Any, tokenizer: PreTrainedTokenizerBase) -> ModelReward:
    """A reward model of `reward_model_type: api`.

    Raises:
        ValueError: if the server does not answer.
    """
    score = server_scorer(arguments, tokenizer)
    score.check()
    return _model_reward(arguments, score, template, tokenizer)


def server_scorer(arguments: RunArguments, tokenizer: PreTrainedTokenizerBase) -> ServerScorer:
    finetuning_args = arguments.finetuning
    return ServerScorer(finetuning_args.reward_model, tokenizer, finetuning_args.reward_timeout)


def _model_reward(
    arguments: RunArguments,
    score: Callable[[Sequence[tuple[int, ...]]], list[float]],
    template: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> ModelReward:
    closing = facade.closing_tokens(template, tokenizer)
    return ModelReward(score, arguments.finetuning.max_tokens_per_micro_batch, closing)
