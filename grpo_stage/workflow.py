"""run_grpo(): the composition root. Reads like the host's run_dpo."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import TrainerCallback

from .host import facade
from .host.engine import check_ranks, start_engine
from .host.inputs import Preparation, prepare
from .host.policy import load_policy
from .host.precision import canary_bound
from .host.provenance import run_record
from .host.recovery import Recoveries, possible
from .host.reference import reference_policy
from .host.reward_models import load_reward_model
from .host.run_arguments import RunArguments
from .host.run_end import finish
from .host.sampling import sampling_settings
from .monitors.alarms import RecoveryRequested
from .monitors.canary import TIGHT_BOUND
from .records.activity import Activity
from .records.redaction import errors_masked
from .records.run_record import write_run_record
from .trainer import GRPOTrainer
from .types import ReplicatedEngine, RolloutEngine


logger = facade.get_logger(__name__)


def run_grpo(
    arguments: RunArguments,
    callbacks_of: Callable[[RunArguments], list[TrainerCallback]],
    make_trainer: Callable[..., GRPOTrainer] | None = None,
) -> None:
    """Train with GRPO as the arguments say, and save what the host's chat and export load.

    Args:
        arguments: the recipe's.
        callbacks_of: makes the callbacks of an attempt: a run that recovers from a fault has several.
        make_trainer: takes what `GRPOTrainer` takes and stands in for it: a measurement has a trainer of its own.

    Raises:
        ValueError: if the data or the model's files show an error; raised before the weights are loaded.
    """
    activity = Activity(arguments.training.output_dir if arguments.training.should_save else None)
    secretive = [vars(part) for part in (arguments.model, arguments.training, arguments.finetuning)]
    with activity.until_its_end(), errors_masked(*secretive):
        _run_grpo(arguments, callbacks_of, make_trainer or GRPOTrainer, activity)


def _run_grpo(
    arguments: RunArguments,
    callbacks_of: Callable[[RunArguments], list[TrainerCallback]],
    make_trainer: Callable[..., GRPOTrainer],
    activity: Activity,
) -> None:
    check_ranks(arguments)
    activity.begin("data")
    prepared = prepare(arguments)
    if arguments.training.should_save:
        write_run_record(arguments.training.output_dir, run_record(arguments, prepared.state["rows"]))
    with contextlib.ExitStack() as resources:
        resources.callback(prepared.rewards.close)
        if prepared.inputs.tool_use is not None:
            resources.callback(prepared.inputs.tool_use.worker.close)
        run = _Run(prepared, callbacks_of, make_trainer, resources, activity)
        recoveries = Recoveries.of(arguments)
        while (request := run.attempt(recoveries.apply(arguments), recoveries)) is not None:
            recoveries.add(request)


@dataclass
class _Run:
    """What the attempts of a run share; there is one, unless an alarm makes the run go back (`on_alarm: recover`)."""

    prepared: Preparation
    callbacks_of: Callable[[RunArguments], list[TrainerCallback]]
    make_trainer: Callable[..., GRPOTrainer]
    resources: contextlib.ExitStack
    activity: Activity
    engine: RolloutEngine | None = None

    def attempt(self, arguments: RunArguments, recoveries: Recoveries) -> RecoveryRequested | None:
        """Train to the end, from the start or from a checkpoint. Returns the alarms that ask to go back, if any.

        Args:
            arguments: the recipe's, with the remedies of earlier attempts.
            recoveries: after which this attempt comes.
        """
        training_args, finetuning_args = arguments.training, arguments.finetuning
        inputs, rewards = self.prepared.inputs, self.prepared.rewards
        tokenizer, template, prompts = inputs.tokenizer, inputs.template, inputs.prompts
        self.activity.begin("model")
        model = load_policy(arguments, tokenizer)
        sampling = sampling_settings(arguments, model, template, tokenizer, inputs.images)
        self.activity.begin("reference")
        reference = reference_policy(arguments, model)
        if finetuning_args.reward_model is not None:
            self.activity.begin("reward_model")
            rewards.model = load_reward_model(arguments, model, template, tokenizer)
        if self.engine is None:
            self.activity.begin("engine")
            self.engine = start_engine(arguments, model, sampling, inputs)
            self.resources.callback(self.engine.close)
        bound = finetuning_args.max_sampling_logprob_diff or canary_bound(arguments, model)
        trainer = self.make_trainer(
            model=model,
            args=training_args,
            grpo_args=finetuning_args,
            sampling=sampling,
            prompts=prompts.train,
            eval_prompts=prompts.evaluation,
            engine=self.engine,
            rewards=rewards,
            reference=reference,
            max_sampling_logprob_diff=bound,
            # The mean over what several servers sample hides one that is wrong.
            tests_slope=bound > TIGHT_BOUND or isinstance(self.engine, ReplicatedEngine),
            settings=vars(arguments.values()),
            possible_settings=partial(possible, arguments),
            may_recover=recoveries.is_allowed,
            num_prompts_to_skip=recoveries.num_prompts_to_skip,
            checkpoints_if_needed="disable_gradient_checkpointing" not in arguments.given,
            router_aux_loss_coef=arguments.model.moe_aux_loss_coef or 0.0,
            recipe=self.prepared.state,
            shuffle=not finetuning_args.disable_shuffling,
            optimizer_factory=partial(facade.create_custom_optimizer, finetuning_args=finetuning_args),
            prepare_scheduler=facade.create_custom_scheduler,
            processing_class=tokenizer,
            callbacks=self.callbacks_of(arguments),
            activity=self.activity,
            images=inputs.images,
        )
        if inputs.processor is not None:
            trainer.add_callback(facade.SaveProcessorCallback(inputs.processor))
        try:
            _run(trainer, arguments)
        except RecoveryRequested as request:
            return request.with_traceback(None)  # which would keep the model
        return None


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
            trainer.activity.begin("training")
            metrics = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint).metrics
        trainer.activity.begin("saving")
        with trainer.stoppable():
            finish(trainer, arguments, metrics)
