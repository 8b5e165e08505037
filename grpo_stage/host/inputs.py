"""What a run reads before its model: rewards, tokenizer, template and prompts, each with its checks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from grpo_stage.algorithm.refusals import apart, has_refused, stop_if_refused
from grpo_stage.host import facade
from grpo_stage.host.datasets import PromptData, load_prompts
from grpo_stage.host.distribution import distribution
from grpo_stage.host.images import image_reader
from grpo_stage.host.model_checks import refuse_tied_adapters, refuse_unknown_tokens, refuse_unloadable
from grpo_stage.host.other_model_checks import check_other_models
from grpo_stage.host.recipe import check_resume, recipe_of, training_record
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.host.tool_use import ToolUse, load_tool_use
from grpo_stage.rewards.loading import load_rewards
from grpo_stage.rewards.suite import RewardSuite
from grpo_stage.rollout.engines.table import ENGINES
from grpo_stage.types import ImageReader, Prompt


logger = facade.get_logger(__name__)


@dataclass(frozen=True)
class RunInputs:
    """Everything that a run needs beside its models."""

    tokenizer: PreTrainedTokenizerBase
    processor: Any
    """None for a text-only model."""
    template: Any
    prompts: PromptData
    tool_use: ToolUse | None = None
    """Its `worker` is to be closed."""
    images: ImageReader | None = None
    """None if no prompt has any."""


@dataclass(frozen=True)
class Preparation:
    """All that a run has once everything is checked that can be checked without weights."""

    inputs: RunInputs
    rewards: RewardSuite
    """Without its reward model, which may stand on the policy. To be closed."""
    state: Mapping[str, Any]
    """The record of recipe, rows and reward code in every checkpoint."""


def prepare(arguments: RunArguments) -> Preparation:
    """Everything that comes before the weights; `grpo-stage check` does the same and stops there.

    Raises:
        ValueError: for errors that the rewards, the data, the models' files or a checkpoint show.
    """
    training_args, finetuning_args = arguments.training, arguments.finetuning
    recipe = recipe_of(arguments)  # before the host's loaders change the arguments
    are_files_sound = not has_refused()
    with apart():
        if are_files_sound:
            ENGINES[finetuning_args.rollout_backend].check_service(
                arguments.values(), training_args.process_index == 0
            )
    with apart():
        rewards = load_rewards(
            cast(list[str], finetuning_args.reward_funcs),
            cast(list[float] | None, finetuning_args.reward_weights),
            cast(dict[str, Any] | None, finetuning_args.reward_kwargs),
            max_new_tokens=arguments.generating.max_new_tokens,
            timeout_s=finetuning_args.reward_timeout,
            dump_dir=training_args.output_dir,
            fields=tuple(finetuning_args.reward_columns or ()),
            code_sandbox=finetuning_args.code_sandbox,
            announce=logger.info_rank0,
        )
    with apart():
        if are_files_sound:
            inputs = load_inputs(arguments)
    stop_if_refused()
    prompts = inputs.prompts
    with apart():
        refuse_idle_processes(len(prompts.train), training_args.world_size)
    with apart():
        rewards.check(prompts.train)
    with apart():
        rewards.check(prompts.evaluation)
    with apart():
        if finetuning_args.answer_balance > 0:
            _refuse_unanswered(prompts.train, finetuning_args.answer_balance)
    code = rewards.code | dict(inputs.tool_use.tools.code if inputs.tool_use is not None else {})
    record = training_record(prompts.train, prompts.evaluation, arguments.data.eval_dataset, code)
    with apart():
        if training_args.resume_from_checkpoint:
            check_resume(arguments, record, len(prompts.train))
    return Preparation(
        inputs, rewards, {"recipe": recipe, "distribution": distribution(training_args.deepspeed), **record}
    )


def refuse_idle_processes(num_prompts: int, num_processes: int) -> None:
    """Refuse a run in which a process would never have a prompt."""
    if num_prompts < num_processes:
        raise ValueError(
            f"{num_processes} processes train on {num_prompts} prompt{'s' if num_prompts > 1 else ''}: a prompt is "
            f"sampled by one process, so that {num_processes - num_prompts} of them would never have anything to do. "
            f"Start at most {num_prompts} (`NPROC_PER_NODE`, or `num_processes` of `accelerate launch`), or give "
            "`dataset` more rows (`max_samples` and `val_size` take some away)."
        )


def _refuse_unanswered(prompts: Sequence[Prompt], answer_balance: float) -> None:
    missing = [prompt.index for prompt in prompts if not (prompt.reference or "").strip()]
    if missing:
        raise ValueError(
            f"`answer_balance: {answer_balance}` weighs prompts by their reference answers, which {len(missing)} of "
            f"{len(prompts)} prompts lack (the first at index {missing[0]}). Give each row a last assistant turn, "
            "name the column that holds the answer with `reference_column`, or leave `answer_balance` out."
        )


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
    tool_use = load_tool_use(arguments, template, tokenizer)
    prompts = load_prompts(
        template,
        tokenizer,
        processor,
        arguments.model,
        arguments.data,
        arguments.training,
        arguments.finetuning,
        tool_use,
    )
    every_prompt = [*prompts.train, *prompts.evaluation]
    images = image_reader(arguments, template, tokenizer, processor, every_prompt, has_tools=tool_use is not None)
    finetuning_args = arguments.finetuning
    is_scored_on_policy = finetuning_args.reward_model is not None and finetuning_args.reward_model_type == "lora"
    refuse_unknown_tokens(
        arguments,
        tokenizer,
        every_prompt,
        (
            *(facade.closing_tokens(template, tokenizer) if is_scored_on_policy else ()),
            *(tool_use.turns.example if tool_use is not None else ()),
        ),
    )
    return RunInputs(tokenizer, processor, template, prompts, tool_use, images)
