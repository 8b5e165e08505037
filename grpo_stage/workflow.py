"""run_grpo(): the composition root. Reads like the host's run_dpo."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from transformers import TrainerCallback

from .host import facade
from .host.engine import start_engine
from .host.inputs import load_inputs
from .host.policy import load_policy
from .host.precision import canary_bound
from .host.recipe import check_resume, recipe_of, training_record
from .host.reference import reference_policy
from .host.reward_models import load_reward_model
from .host.run_arguments import RunArguments
from .host.run_end import finish
from .host.sampling import sampling_settings
from .monitors.canary import TIGHT_BOUND
from .records.redaction import errors_masked
from .rewards.loading import load_rewards
from .trainer import GRPOTrainer


logger = facade.get_logger(__name__)


def run_grpo(
    arguments: RunArguments,
    callbacks: list[TrainerCallback],
    make_trainer: Callable[..., GRPOTrainer] = GRPOTrainer,
) -> None:
    """Train with GRPO as the arguments say, and save what the host's chat and export load.

    Args:
        arguments: the recipe.
        callbacks: Trainer's.
        make_trainer: takes what `GRPOTrainer` takes; a measurement has a trainer of its own.

    Raises:
        ValueError: if the data or the model's files show an error; raised before the weights are loaded.
    """
    with errors_masked(*(vars(part) for part in (arguments.model, arguments.training, arguments.finetuning))):
        _run_grpo(arguments, callbacks, make_trainer)


def _run_grpo(
    arguments: RunArguments, callbacks: list[TrainerCallback], make_trainer: Callable[..., GRPOTrainer]
) -> None:
    training_args, finetuning_args = arguments.training, arguments.finetuning
    recipe = recipe_of(arguments)  # before the host's loaders change the arguments
    rewards = load_rewards(
        cast(list[str], finetuning_args.reward_funcs),
        cast(list[float] | None, finetuning_args.reward_weights),
        cast(dict[str, Any] | None, finetuning_args.reward_kwargs),
        max_new_tokens=arguments.generating.max_new_tokens,
        timeout_s=finetuning_args.reward_timeout,
        dump_dir=training_args.output_dir,
        fields=tuple(finetuning_args.reward_columns or ()),
        announce=logger.info_rank0,
    )
    inputs = load_inputs(arguments)
    tokenizer, template, prompts = inputs.tokenizer, inputs.template, inputs.prompts
    rewards.check(prompts.train)
    rewards.check(prompts.evaluation)
    record = training_record(prompts.train, prompts.evaluation, arguments.data.eval_dataset, rewards.code)
    if training_args.resume_from_checkpoint:
        check_resume(arguments, record, len(prompts.train))

    model = load_policy(arguments, tokenizer)
    sampling = sampling_settings(arguments, model, template, tokenizer)
    reference = reference_policy(arguments, model)
    if finetuning_args.reward_model is not None:
        rewards.model = load_reward_model(arguments, model, template, tokenizer)
    engine = start_engine(arguments, model, tokenizer, sampling)
    bound = finetuning_args.max_sampling_logprob_diff or canary_bound(arguments, model)
    try:
        trainer = make_trainer(
            model=model,
            args=training_args,
            grpo_args=finetuning_args,
            sampling=sampling,
            prompts=prompts.train,
            eval_prompts=prompts.evaluation,
            engine=engine,
            rewards=rewards,
            reference=reference,
            max_sampling_logprob_diff=bound,
            tests_slope=bound > TIGHT_BOUND,
            checkpoints_if_needed="disable_gradient_checkpointing" not in arguments.given,
            router_aux_loss_coef=arguments.model.moe_aux_loss_coef or 0.0,
            recipe={"recipe": recipe, **record},
            shuffle=not finetuning_args.disable_shuffling,
            optimizer_factory=partial(facade.create_custom_optimizer, finetuning_args=finetuning_args),
            prepare_scheduler=facade.create_custom_scheduler,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        if inputs.processor is not None:
            trainer.add_callback(facade.SaveProcessorCallback(inputs.processor))
        _run(trainer, arguments)
    finally:
        engine.close()
        rewards.close()


def _run(trainer: GRPOTrainer, arguments: RunArguments) -> None:
    training_args = arguments.training
    with trainer.stop.listening():
        metrics = None
        if training_args.do_train:
            most = "at most " if arguments.finetuning.dynamic_sampling else ""
            logger.info_rank0(
                f"GRPO: {trainer.collector.prompts_per_step} prompts x {arguments.finetuning.num_generations} "
                f"completions an optimizer step, {most}{trainer.collector.steps_per_epoch} steps an epoch. A loss "
                "near 0 is expected: on-policy, the advantages of a group cancel out in the loss, though not in its "
                "gradient. `reward` is the curve to watch."
            )
            metrics = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint).metrics
        with trainer.stoppable():
            finish(trainer, arguments, metrics)
