"""run_grpo(): the composition root. Reads like the host's run_dpo."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftConfig, load_peft_weights
from transformers import PreTrainedTokenizerBase, TrainerCallback

from .distributed import all_gather
from .host import facade
from .host.adapters import items
from .host.datasets import load_prompts
from .host.model_checks import (
    adapter_source,
    num_embeddings,
    refuse_tied_adapters,
    refuse_unknown_tokens,
    refuse_unloadable,
)
from .host.recipe import check_same_training, recipe_of, training_record
from .host.tied_weights import layers_parted, refuse_built
from .monitors.canary import DEFAULT_BOUNDS, TIGHT_BOUND
from .records.redaction import errors_masked
from .rewards.models.reward_model import (
    AdapterOnPolicy,
    ModelReward,
    ValueHeadScorer,
    refuse_head,
    refuse_other_base,
    warn_of_other_base,
)
from .rewards.models.server import ServerScorer
from .rewards.registry import load_rewards
from .rollout.engines.hf import HFEngine
from .rollout.engines.weights import servable_config, write_base
from .survival import checkpoints
from .trainer import GRPOTrainer, prompts_of_step, steps_of_epoch, steps_of_run
from .types import RolloutEngine, SamplingSettings
from .update.logprobs import AdapterOffReference, InitialWeightsReference, ModelReference, ReferencePolicy


if TYPE_CHECKING:
    from .host.run_arguments import RunArguments


logger = facade.get_logger(__name__)

_NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

PLOTTED_METRICS = ("loss", "reward", "completions/mean_length", "entropy", "kl", "eval_reward")


def run_grpo(arguments: "RunArguments", callbacks: list[TrainerCallback]) -> None:
    """Train with GRPO as the arguments say, and save what the host's chat and export load.

    Raises:
        ValueError: for what can only be told from the data or the model's files, before the weights are loaded.
    """
    with errors_masked(*(vars(part) for part in (arguments.model, arguments.training, arguments.finetuning))):
        _run_grpo(arguments, callbacks)


def _run_grpo(arguments: "RunArguments", callbacks: list[TrainerCallback]) -> None:
    model_args, data_args, training_args = arguments.model, arguments.data, arguments.training
    finetuning_args = arguments.finetuning
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
    tokenizer_module = facade.load_tokenizer(model_args)
    tokenizer = tokenizer_module["tokenizer"]
    template = facade.get_template_and_fix_tokenizer(tokenizer, data_args)
    refuse_unloadable(arguments)
    refuse_tied_adapters(arguments)
    _check_other_models(arguments, template, tokenizer)
    prompts = load_prompts(
        template, tokenizer, tokenizer_module["processor"], model_args, data_args, training_args, finetuning_args
    )
    is_scored_on_policy = finetuning_args.reward_model is not None and finetuning_args.reward_model_type == "lora"
    refuse_unknown_tokens(
        arguments,
        tokenizer,
        [*prompts.train, *prompts.evaluation],
        facade.closing_tokens(template, tokenizer) if is_scored_on_policy else (),
    )
    rewards.check(prompts.train)
    rewards.check(prompts.evaluation)
    record = training_record(prompts.train, prompts.evaluation, data_args.eval_dataset, rewards.code)
    if training_args.resume_from_checkpoint:
        checkpoint = Path(training_args.resume_from_checkpoint)
        check_same_training(checkpoint, record, finetuning_args.resume_with_changes)
        steps_per_epoch = steps_of_epoch(
            len(prompts.train), prompts_of_step(training_args), finetuning_args.num_iterations
        )
        num_steps = steps_of_run(training_args, steps_per_epoch)
        checkpoints.is_over(checkpoint, training_args.output_dir, num_steps, training_args.do_eval)

    # What is copied from it from here on, such as a reference of its initial weights, is on the same device.
    model = _placed(facade.load_model(tokenizer, model_args, finetuning_args, training_args.do_train), arguments)
    refuse_built(model, adapter_source(arguments))
    _warn_of_parted_layers(model)
    _warn_of_slow_precision(model)
    sampling = sampling_settings(arguments, model, template, tokenizer)
    reference = _reference_policy(arguments, model)
    if finetuning_args.reward_model is not None:
        rewards.model = _reward_model(arguments, model, template, tokenizer)
    engine = _rollout_engine(arguments, model, tokenizer, sampling)
    bound = finetuning_args.max_sampling_logprob_diff or _canary_bound(arguments, model)
    try:
        trainer = GRPOTrainer(
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
            recipe={"recipe": recipe, **record},
            shuffle=not finetuning_args.disable_shuffling,
            optimizer_factory=partial(facade.create_custom_optimizer, finetuning_args=finetuning_args),
            prepare_scheduler=facade.create_custom_scheduler,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        if tokenizer_module["processor"] is not None:
            trainer.add_callback(facade.SaveProcessorCallback(tokenizer_module["processor"]))
        _run(trainer, arguments)
    finally:
        engine.close()
        rewards.close()


def _run(trainer: GRPOTrainer, arguments: "RunArguments") -> None:
    training_args = arguments.training
    with trainer.stop.listening():
        metrics = None
        if training_args.do_train:
            most = "at most " if trainer.dynamic is not None else ""
            logger.info_rank0(
                f"GRPO: {trainer.prompts_per_step} prompts x {trainer.sampling.num_generations} completions an "
                f"optimizer step, {most}{trainer.steps_per_epoch} steps an epoch. A loss near 0 is expected: "
                "on-policy, the advantages of a group cancel out in the loss, though not in its gradient. `reward` is "
                "the curve to watch."
            )
            metrics = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint).metrics
        with trainer.stoppable():
            _end(trainer, arguments, metrics)


def _end(trainer: GRPOTrainer, arguments: "RunArguments", train_metrics: dict[str, float] | None) -> None:
    """Save and evaluate what was trained; of a run that was interrupted in its end, only what is left of that."""
    parts: dict[str, Callable[[], None]] = {}
    if train_metrics is not None:
        parts[checkpoints.RESULTS] = partial(_save_results, trainer, train_metrics, arguments.finetuning.plot_loss)
    if arguments.training.do_eval:
        parts[checkpoints.EVALUATION] = partial(_evaluate, trainer)
    if train_metrics is not None:
        parts[checkpoints.MODEL_CARD] = partial(_describe, trainer, arguments)
    output_dir, step = trainer.args.output_dir, trainer.state.global_step
    done = checkpoints.parts_done(output_dir, step)
    for name, do in parts.items():
        trainer.stop.check_together()
        if name in done:
            continue
        do()
        if train_metrics is not None and trainer.args.should_save:
            with _words_for_failure(trainer):
                checkpoints.mark_done(output_dir, step, name)
    trainer.delete_all_but_best()


def _evaluate(trainer: GRPOTrainer) -> None:
    metrics = trainer.evaluate()
    with _words_for_failure(trainer):
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


def _describe(trainer: GRPOTrainer, arguments: "RunArguments") -> None:
    with _words_for_failure(trainer):
        facade.create_modelcard_and_push(
            trainer, arguments.model, arguments.data, arguments.training, arguments.finetuning
        )


def _save_results(trainer: GRPOTrainer, metrics: dict[str, float], plots: bool) -> None:
    with _words_for_failure(trainer):
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
        if trainer.is_world_process_zero() and plots:
            logged = {key for entry in trainer.state.log_history for key in entry}
            facade.plot_loss(trainer.args.output_dir, keys=[key for key in PLOTTED_METRICS if key in logged])


@contextlib.contextmanager
def _words_for_failure(trainer: GRPOTrainer) -> Iterator[None]:
    """In this block files are written at the end of a run: a full disk is to be named, and what is done is kept.

    Raises:
        RuntimeError: naming what failed, and how the run goes on.
    """
    try:
        yield
    except Exception as error:  # a full disk is an OSError, and another type in safetensors
        checkpoint = trainer.save_progress() if trainer.args.world_size == 1 else None
        raise RuntimeError(
            f"Training is done, and what is written at its end to {trainer.args.output_dir} failed: {error!r}. Free "
            "space on the disk, or mend what is named there, and go on with "
            f"`resume_from_checkpoint: {checkpoint or '<the last checkpoint>'}`: only what is left will be done."
        ) from error


def sampling_settings(
    arguments: "RunArguments", model: Any, template: Any, tokenizer: PreTrainedTokenizerBase
) -> SamplingSettings:
    generating = arguments.generating
    return SamplingSettings(
        num_generations=arguments.finetuning.num_generations,
        max_new_tokens=generating.max_new_tokens,
        temperature=generating.temperature,
        top_p=generating.top_p,
        top_k=max(generating.top_k, 0),
        repetition_penalty=generating.repetition_penalty,
        stop_token_ids=stop_token_ids(model, template, tokenizer),
        seed=arguments.training.seed,
    )


def stop_token_ids(model: Any, template: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a completion: the model's own EOS ids, the tokenizer's, and the template's stop words.

    The id of a stop word that the tokenizer lacks is that of its unknown token, which ends nothing. GPT-2 and its
    like have one token for unknown and EOS: as EOS it ends a completion.
    """
    configured = model.generation_config.eos_token_id
    own = configured if isinstance(configured, list) else [configured]
    known_words = [
        token_id
        for word, token_id in zip(
            template.stop_words, tokenizer.convert_tokens_to_ids(template.stop_words), strict=True
        )
        if token_id != tokenizer.unk_token_id or word == tokenizer.unk_token
    ]
    return tuple(sorted({*own, tokenizer.eos_token_id, *known_words} - {None}))


def _reference_policy(arguments: "RunArguments", model: Any) -> ReferencePolicy | None:
    """What the KL term holds the policy to: the policy as it is before the first step, or `ref_model`."""
    finetuning_args = arguments.finetuning
    if finetuning_args.beta == 0.0:
        return None
    if finetuning_args.ref_model is not None:
        model_args = facade.arguments_for(arguments.model, finetuning_args.ref_model)
        other = ModelReference(_placed(facade.create_ref_model(model_args, finetuning_args), arguments))
        other.match_precision(model)
        if finetuning_args.sync_ref_model:
            other.check_alike(model)
        return other
    if finetuning_args.sync_ref_model:
        return InitialWeightsReference(model)
    starts_at_base = arguments.model.adapter_name_or_path is None or finetuning_args.create_new_adapter
    if finetuning_args.finetuning_type in ("lora", "oft") and starts_at_base and not finetuning_args.pissa_init:
        return AdapterOffReference()
    return InitialWeightsReference(model)


def _placed(model: Any, arguments: "RunArguments") -> Any:
    """The host loads onto the device only with `low_cpu_mem_usage`, or quantized; Trainer comes later."""
    if getattr(model, "quantization_method", None) is not None:
        return model
    return model.to(arguments.training.device)


def _check_other_models(arguments: "RunArguments", template: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """What can be told of a reference and of a reward model before one is loaded."""
    finetuning_args, model_args = arguments.finetuning, arguments.model
    if finetuning_args.ref_model is not None:
        _check_vocabulary("ref_model", finetuning_args.ref_model, model_args, template, tokenizer)
    path = finetuning_args.reward_model
    if path is None:
        return
    if finetuning_args.reward_model_type == "api":
        _server_scorer(arguments, tokenizer).check()
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
            key, holder = "reward_model_adapters", adapter  # the last one has the head
            stands_on = PeftConfig.from_pretrained(adapter, **hub).base_model_name_or_path
            warn_of_other_base(stands_on, adapter, path)
    config = facade.load_config(base).get_text_config()
    hidden_size = getattr(config, "word_embed_proj_dim", config.hidden_size)  # OPT's last layer projects
    refuse_head(facade.load_valuehead_params(holder, model_args), key, holder, hidden_size)


def _check_vocabulary(key: str, path: str, model_args: Any, template: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    other = facade.arguments_for(model_args, path)
    own_tokenizer = facade.load_tokenizer(other)["tokenizer"]
    template.fix_special_tokens(own_tokenizer)  # as it did with the policy's
    vocabulary = own_tokenizer.get_vocab()
    needed, size = len(tokenizer), num_embeddings(facade.load_config(other))
    if not model_args.resize_vocab:  # a template's stop words may be beyond what the policy itself can read
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


def _server_scorer(arguments: "RunArguments", tokenizer: PreTrainedTokenizerBase) -> ServerScorer:
    finetuning_args = arguments.finetuning
    return ServerScorer(finetuning_args.reward_model, tokenizer, finetuning_args.reward_timeout)


def server_reward(arguments: "RunArguments", template: Any, tokenizer: PreTrainedTokenizerBase) -> ModelReward:
    """A reward model of `reward_model_type: api`.

    Raises:
        ValueError: if the server does not answer.
    """
    score = _server_scorer(arguments, tokenizer)
    score.check()
    return _model_reward(arguments, score, template, tokenizer)


def _reward_model(
    arguments: "RunArguments", model: Any, template: Any, tokenizer: PreTrainedTokenizerBase
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
        return _model_reward(arguments, _server_scorer(arguments, tokenizer), template, tokenizer)
    if finetuning_args.reward_model_type == "lora":
        hub = {"token": model_args.hf_hub_token, "cache_dir": model_args.cache_dir}
        adapter = AdapterOnPolicy(
            model, PeftConfig.from_pretrained(path, **hub), load_peft_weights(path, device="cpu", **hub), path
        )
        score = ValueHeadScorer(adapter.activate, facade.load_valuehead_params(path, model_args), autocast)
    else:
        own = facade.create_reward_model(model, facade.arguments_for(model_args, path), finetuning_args)
        backbone = _placed(own.pretrained_model, arguments)
        head = {f"v_head.{name}": value for name, value in own.v_head.state_dict().items()}
        score = ValueHeadScorer(lambda: contextlib.nullcontext(backbone), head, autocast)
    return _model_reward(arguments, score, template, tokenizer)


def _model_reward(
    arguments: "RunArguments",
    score: Callable[[Sequence[tuple[int, ...]]], list[float]],
    template: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> ModelReward:
    closing = facade.closing_tokens(template, tokenizer)
    return ModelReward(score, arguments.finetuning.max_tokens_per_micro_batch, closing)


def _rollout_engine(
    arguments: "RunArguments", model: Any, tokenizer: PreTrainedTokenizerBase, sampling: SamplingSettings
) -> RolloutEngine:
    model_args = arguments.model
    if arguments.finetuning.rollout_backend == "hf":
        return HFEngine(tokenizer, autocast_dtype=autocast_dtype(arguments))
    from .rollout.engines.vllm import VLLMEngine

    on_cpu = arguments.training.device.type == "cpu"
    sleep_level = arguments.finetuning.vllm_sleep
    if on_cpu and sleep_level:
        logger.warning_rank0(f"`vllm_sleep: {sleep_level}` has no effect on a CPU: vLLM frees memory of GPUs alone.")
        sleep_level = 0
    is_lora = arguments.finetuning.finetuning_type == "lora"
    dtype = torch.float32 if on_cpu else _compute_dtype(arguments, model)
    if is_lora and dtype == torch.float32 and not on_cpu:
        raise ValueError(
            "The run computes in float32, and vLLM's kernels for a LoRA adapter on a GPU know half precision alone. "
            "Write `bf16: true`, or use `rollout_backend: hf` or `finetuning_type: full`."
        )
    max_lora_rank = _max_lora_rank(arguments, servable_config(model).r) if is_lora else 0
    with _model_for_vllm(arguments, model) as (path, quantization):
        logger.info_rank0(f"Starting vLLM with {path}.")
        started = time.perf_counter()
        engine = VLLMEngine(
            model_name_or_path=path,
            tokenizer=tokenizer,
            adapter=is_lora,
            max_model_len=model_args.vllm_maxlen,
            max_lora_rank=max_lora_rank,
            gpu_memory_utilization=model_args.vllm_gpu_util,
            enforce_eager=model_args.vllm_enforce_eager,
            dtype=str(dtype).removeprefix("torch."),
            logprob_temperature=None if sampling.is_neutral else 1.0,
            sleep_level=sleep_level,
            quantization=quantization,
            model_revision=model_args.model_revision,
            trust_remote_code=model_args.trust_remote_code,
            hf_token=model_args.hf_hub_token,
            download_dir=model_args.cache_dir,
            seed=arguments.training.seed,
            options=model_args.vllm_config,
        )
        logger.info_rank0(f"vLLM started in {time.perf_counter() - started:.1f} s.")
    return engine


def _max_lora_rank(arguments: "RunArguments", rank: int) -> int:
    """The highest rank that vLLM makes room for; that of an adapter from a hub is known since it was loaded."""
    if "vllm_max_lora_rank" not in arguments.given:
        return rank
    own = arguments.model.vllm_max_lora_rank
    if own < rank:
        raise ValueError(
            f"`vllm_max_lora_rank: {own}` is below the rank of the adapter that is trained, {rank}. Leave it out to "
            "have the rank rounded up."
        )
    return own


@contextlib.contextmanager
def _model_for_vllm(arguments: "RunArguments", model: Any) -> Iterator[tuple[str, str | None]]:
    """What vLLM starts from, and what it quantises that with: the user's files where they hold the trainer's model.

    Otherwise the trainer's is written out, once a node, and deleted as soon as every engine has started.
    """
    training_args, path = arguments.training, arguments.model.model_name_or_path
    changes = _changes_to_the_files(arguments, model)
    if arguments.finetuning.vllm_base == "auto":
        if not changes:
            yield path, None
            return
        if (
            changes == ["quantized"]
            and training_args.device.type == "cuda"
            and _vllm_quantizes_alike(arguments, model)
        ):
            yield path, "bitsandbytes"
            return
    is_writer = training_args.local_process_index == 0
    with tempfile.TemporaryDirectory(prefix="grpo-stage-base-") if is_writer else contextlib.nullcontext() as own:
        if own is not None:
            logger.info_rank0(
                f"Writing the trainer's model ({', '.join(changes) or '`vllm_base: trainer`'}) to {own} for vLLM to "
                "start from; it is deleted afterwards."
            )
            write_base(model, Path(own))
        folders = all_gather(own)  # which waits for the writers
        folder = folders[training_args.process_index - training_args.local_process_index]
        assert folder is not None
        yield folder, None
        all_gather(None)  # nobody reads it any more


def _changes_to_the_files(arguments: "RunArguments", model: Any) -> list[str]:
    """What the host did to the model after, or while, reading `model_name_or_path`."""
    model_args = arguments.model
    adapters = model_args.adapter_name_or_path or []
    changes = {
        "quantized": getattr(model, "quantization_method", None) is not None,
        "with merged adapters": len(adapters) > 1 or (adapters and arguments.finetuning.create_new_adapter),
        # PiSSA and its like take the adapter's first value out of the base.
        "less the adapter's initial value": any(
            isinstance(config.init_lora_weights, str) for config in getattr(model, "peft_config", {}).values()
        ),
        "with a resized vocabulary": model_args.resize_vocab,
        "with new weights": model_args.train_from_scratch,
    }
    return [change for change, is_made in changes.items() if is_made]


def _vllm_quantizes_alike(arguments: "RunArguments", model: Any) -> bool:
    """vLLM's bitsandbytes knows 4 bits of one kind: `nf4` with double quantization, in blocks of the usual size.

    It quantizes what the files hold, and the host what that is in the precision of training; and it quantizes a
    mixture's experts, which transformers leaves as they are.
    """
    quantization, files = model.config.quantization_config, facade.load_config(arguments.model)
    text_config = files.get_text_config()
    if any(getattr(text_config, key, None) for key in _NUMBERS_OF_EXPERTS):
        return False
    if not (
        quantization.load_in_4bit
        and quantization.bnb_4bit_quant_type == "nf4"
        and quantization.bnb_4bit_use_double_quant
    ):
        return False
    if getattr(files, "quantization_config", None) is not None:  # vLLM reads no other storage
        return quantization.bnb_4bit_quant_storage == torch.uint8
    return text_config.dtype == arguments.model.compute_dtype


def autocast_dtype(arguments: "RunArguments") -> torch.dtype | None:
    """The precision of mixed-precision passes; None where the model computes in its own."""
    if arguments.training.bf16:
        return torch.bfloat16
    return torch.float16 if arguments.training.fp16 else None


def _compute_dtype(arguments: "RunArguments", model: Any) -> torch.dtype:
    return autocast_dtype(arguments) or model.get_input_embeddings().weight.dtype


def _canary_bound(arguments: "RunArguments", model: Any) -> float:
    """That of half precision where float32 is rounded too: activations of 8 bits, tf32, vLLM's attention on a GPU."""
    on_gpu = model.device.type == "cuda"
    in_tf32 = on_gpu and (arguments.training.tf32 or arguments.finetuning.rollout_backend == "vllm")
    rounds = in_tf32 or getattr(model, "is_loaded_in_8bit", False)
    return DEFAULT_BOUNDS[torch.bfloat16 if rounds else _compute_dtype(arguments, model)]


def _warn_of_parted_layers(model: Any) -> None:
    """The host's export leaves `tie_word_embeddings` in the config of a model whose two weights now differ."""
    if layers := layers_parted(model):
        logger.warning_rank0(
            f"{' and '.join(layers)} share one weight in the model's files, and here each is trained with its own. "
            "transformers 5 reads such a model as it is once it is exported, but vLLM and transformers 4 read one "
            'weight for both, which is another policy: write `"tie_word_embeddings": false` into the config.json of '
            "the exported model."
        )


def _warn_of_slow_precision(model: Any) -> None:
    dtype = model.get_input_embeddings().weight.dtype
    if model.device.type == "cpu" and dtype != torch.float32:
        logger.warning_rank0(
            f"The model is in {dtype} and trains on a CPU, where most processors compute that 8 to 25 times slower "
            "than float32. Save it in float32 first: "
            "`AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).save_pretrained(new_path)`."
        )
