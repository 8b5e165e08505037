"""Warnings of settings that are allowed and seldom meant: the run goes on."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.trainer_utils import SchedulerType

from grpo_stage.algorithm.catalog import OFF_POLICY_KEYS, learns_one_behind
from grpo_stage.host.learning_rates import rate_instead
from grpo_stage.host.log import get_logger


if TYPE_CHECKING:
    from grpo_stage.host.run_arguments import RunArguments


logger = get_logger(__name__)

_MAY_NAME_CODE = (
    *("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"),
    *("generation_config.json", "video_preprocessor_config.json"),
)
"""Files of a model whose `auto_map` may name code of its repository."""


def warn(arguments: "RunArguments") -> None:
    """Warn of what is slow, biased or without effect, and name foreign code that runs here."""
    generating, training = arguments.generating, arguments.training
    neutral = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "min_p": 0.0, "structured_outputs": None}
    sampling = vars(generating) | {key: getattr(arguments.finetuning, key) for key in ("min_p", "structured_outputs")}
    skewed = [f"`{key}: {sampling[key]}`" for key, value in neutral.items() if sampling[key] != value]
    if skewed:
        logger.warning_rank0(
            f"{', '.join(skewed)}: completions are sampled from another distribution than the policy that is trained "
            "on them, which biases every gradient. Leave these keys out unless you mean it."
        )
    finetuning = arguments.finetuning
    if arguments.model.trust_remote_code:
        others = (finetuning.ref_model, finetuning.reward_model if finetuning.reward_model_type == "full" else None)
        for model in dict.fromkeys(filter(None, (arguments.model.model_name_or_path, *others))):
            _say_remote_code(model)
    uses = finetuning.num_iterations * finetuning.steps_per_generation
    # With dynamic sampling groups may wait for a later step.
    is_off_policy = uses > 1 or finetuning.dynamic_sampling or learns_one_behind(finetuning)
    if not is_off_policy and (idle := sorted(arguments.given & OFF_POLICY_KEYS)):
        logger.warning_rank0(
            f"{', '.join(f'`{key}: {getattr(finetuning, key)}`' for key in idle)}: without effect, since this run "
            "trains on each rollout once. The policy is then the one that sampled: every ratio is 1, and nothing is "
            "clipped. Write for example `steps_per_generation: 4` or `num_iterations: 2` if you mean to clip."
        )
    schedule = SchedulerType(training.lr_scheduler_type).value
    if finetuning.dynamic_sampling and training.max_steps <= 0 and not schedule.startswith("constant"):
        logger.warning_rank0(
            f"`lr_scheduler_type: {schedule}` with `dynamic_sampling: true`: the schedule is laid out for the most "
            "steps that there can be, and an epoch has fewer if groups are left out, so that the run may end far up "
            "on it. Write `max_steps`, or `lr_scheduler_type: constant_with_warmup`."
        )
    loss_type = finetuning.as_written.get("loss_type", finetuning.loss_type)
    if finetuning.importance_sampling_level != "token" and is_off_policy and "epsilon" not in arguments.given:
        logger.warning_rank0(
            f"`epsilon: {finetuning.epsilon}` by default, with the ratio of the whole completion (`loss_type: "
            f"{loss_type}`), which moves far less than a token's: hardly anything will be clipped. GSPO's "
            "paper has `epsilon: 3.0e-4` and `epsilon_high: 4.0e-4`."
        )
    rate, method, model = training.learning_rate, finetuning.finetuning_type, arguments.model.model_name_or_path
    usual = rate_instead(rate, method, model, finetuning.lora_alpha) if "adam" in training.optim else None
    if usual is not None:
        logger.warning_rank0(
            f"`learning_rate: {rate:g}` is {rate / float(usual):,.0f} times what such a model is usually trained with "
            f"(`finetuning_type: {method}`): it breaks in the first steps. Write `learning_rate: {usual}` unless you "
            "mean it."
        )
    if training.device.type == "cpu" and (training.bf16 or training.fp16 or arguments.finetuning.pure_bf16):
        logger.warning_rank0(
            "`bf16: true` or `fp16: true` on a CPU: most processors compute these 8 to 25 times slower than float32. "
            "Leave the key out."
        )


def _say_remote_code(model: str) -> None:
    said = "`trust_remote_code: true`: Python code from the repository of the model"
    leave = "Leave the key out unless you have read that code."
    if not os.path.isdir(model):
        logger.warning_rank0(f"{said} {model} runs in this process with all your rights, if there is any. {leave}")
        return
    configs = [Path(model, name) for name in _MAY_NAME_CODE]
    if any("auto_map" in file.read_text(encoding="utf-8", errors="replace") for file in configs if file.is_file()):
        files = ", ".join(sorted(file.name for file in Path(model).glob("*.py"))) or "another repository's files"
        logger.warning_rank0(f"{said} runs in this process with all your rights: {files} of {model}. {leave}")
    else:
        logger.info_rank0(f"{said} may run. The folder {model} names none, so that none of it does.")
