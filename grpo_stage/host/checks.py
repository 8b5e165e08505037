"""Refusals before a model is loaded: all tables of rules, and checks that read files.

`refuse_impossible` checks the keys alone, before the host parses them. `refuse_unfit` checks the parsed arguments, and
reads the model's config and a checkpoint's state file.
"""

import json
import math
from collections.abc import Collection
from types import MappingProxyType, SimpleNamespace
from typing import Any

from llamafactory.data.template import TEMPLATES
from llamafactory.data.tool_utils import TOOLS
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import trainer_log_levels

from grpo_stage.algorithm.conditions import as_yaml, refuse_broken
from grpo_stage.algorithm.refusals import apart
from grpo_stage.arguments import actions_of_alarms
from grpo_stage.host.adapters import adapter_config, adapter_folder, is_adapter_on_hub, items, lora_rank
from grpo_stage.host.advice import warn
from grpo_stage.host.bounds import refuse_out_of_bounds
from grpo_stage.host.coercion import did_you_mean
from grpo_stage.host.dataset_files import check_descriptions
from grpo_stage.host.distribution import check_distribution
from grpo_stage.host.evaluation_rules import EVALUATION_RULES, check_best_metric
from grpo_stage.host.generated_datasets import check_tasks, is_generated
from grpo_stage.host.idle_keys import IDLE_KEYS
from grpo_stage.host.model_config_checks import check_model_config, check_reward_model_config
from grpo_stage.host.model_files import config_of
from grpo_stage.host.other_model_rules import OTHER_MODEL_RULES, check_reward_adapter
from grpo_stage.host.other_models import arguments_for
from grpo_stage.host.output_folder import check_output_folder, check_resume
from grpo_stage.host.precision import check_launchers_precision
from grpo_stage.host.rules import RULES
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.host.unsupported import UNSUPPORTED
from grpo_stage.host.zero import refuse_mismatches
from grpo_stage.monitors.table import WATCHES
from grpo_stage.rollout.engines.table import ENGINES


_KNOWN_NAMES = MappingProxyType(
    {
        "template": TEMPLATES,
        "tool_format": TOOLS,
        "log_level": trainer_log_levels,
        "log_level_replica": trainer_log_levels,
        "ddp_backend": ("nccl", "gloo", "mpi", "ccl", "xccl", "hccl", "cncl", "mccl"),
    }
)


def refuse_impossible(values: SimpleNamespace, given: Collection[str]) -> None:
    """Refuse errors that the keys and small local files show.

    Args:
        values: every key of the host and of this stage, defaults included, as written: lists may be comma-separated
            text. A `vllm_*` key that the user did not write is None.
        given: the keys that the user wrote.

    Raises:
        ValueError: naming the value, the rule, the reason and the remedy.
    """
    for entry in UNSUPPORTED:
        for key in entry.keys.split():
            with apart():
                if key in given and (value := getattr(values, key)) not in entry.harmless:
                    raise ValueError(
                        f"`{key}: {as_yaml(value)}` is not possible with `stage: grpo`: {entry.reason}. {entry.remedy}"
                    )

    refuse_out_of_bounds(vars(values))
    refuse_broken((*RULES, *IDLE_KEYS, *OTHER_MODEL_RULES, *EVALUATION_RULES), values)
    engine = ENGINES[values.rollout_backend]
    refuse_broken(engine.rules, SimpleNamespace(**vars(values), adapter_rank=lora_rank(values)))

    for check in (check_distribution, check_launchers_precision):
        with apart():
            check(values)

    adapters = items(values.adapter_name_or_path)
    for i, adapter in enumerate(adapters):
        with apart():
            # The host trains the last adapter and merges the others into the model.
            is_trained = i == len(adapters) - 1 and not values.create_new_adapter
            config = _checked_adapter(adapter, values.adapter_folder)
            if is_trained and config is not None:
                engine.refuse_adapter(adapter, config, values)
    for check in (check_reward_adapter, _check_names, _check_monitors, _check_mixing, _check_datasets):
        with apart():
            check(values)
    check_best_metric(values)


def refuse_unfit(arguments: RunArguments) -> None:
    """Refuse errors that only the parsed arguments show, and warn of what is allowed but slow or biased.

    Raises:
        ValueError: naming the value, the rule, the reason and the remedy.
    """
    with apart():
        check_model_config(arguments)
    with apart():
        check_reward_model_config(arguments)
    with apart():
        if arguments.training.deepspeed:
            refuse_mismatches(arguments.training.deepspeed, arguments.training.hf_deepspeed_config.mismatches)
    with apart():
        if arguments.finetuning.ref_model is not None:
            config_of("ref_model", arguments_for(arguments.model, arguments.finetuning.ref_model))
    with apart():
        if arguments.training.should_save:  # other nodes may not see its disk
            check_output_folder(arguments.training.output_dir)
        check_resume(arguments)
    warn(arguments)


def _checked_adapter(adapter: str, subfolder: str | None) -> dict[str, Any] | None:
    """The content of its adapter_config.json; None for an adapter on a hub."""
    config = adapter_config(adapter, subfolder)
    if config is None and not is_adapter_on_hub(adapter):
        raise ValueError(
            f"`adapter_name_or_path: {adapter}` is no adapter: there is no adapter_config.json in "
            f"{adapter_folder(adapter, subfolder)}. Give the folder that LoRA training wrote (its `output_dir`); a "
            "whole model goes into `model_name_or_path`."
        )
    return config


def _check_names(values: SimpleNamespace) -> None:
    """Check names that the host or transformers look up only after the model is loaded, or refuse without a remedy."""
    for key, known in _KNOWN_NAMES.items():
        name = getattr(values, key)
        if name is not None and name not in known:
            raise ValueError(
                f"`{key}: {name}` is not known. {did_you_mean(name, known)}Name one of {', '.join(sorted(known))}."
            )
    names = [values.report_to] if isinstance(values.report_to, str) else list(values.report_to or ())
    if names in (["none"], ["all"]):
        return
    for name in names:
        if not isinstance(name, str) or name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"`report_to: {name}` is not known. {did_you_mean(name, [*INTEGRATION_TO_CALLBACK, 'none'])}Write "
                f"`none` or `all`, or one or a YAML list of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
            )


def _check_datasets(values: SimpleNamespace) -> None:
    keys = [(key, name) for key in ("dataset", "eval_dataset") for name in items(getattr(values, key))]
    kwargs = values.dataset_kwargs or {}
    if isinstance(kwargs, str):
        try:
            kwargs = json.loads(kwargs)
        except json.JSONDecodeError:
            return  # refused by `GRPOArguments`
    check_tasks(keys, kwargs, values.environment, values.curriculum_threshold > 0)
    described = [(key, name) for key, name in keys if not is_generated(name)]
    if described or not keys:
        check_descriptions(described, values.dataset_dir)


def _check_monitors(values: SimpleNamespace) -> None:
    actions = actions_of_alarms(values.on_alarm)
    for name, action in actions.items() if isinstance(actions, dict) else ():
        if name not in WATCHES:
            raise ValueError(
                f"`on_alarm` names the monitor `{name}`, which is not known. {did_you_mean(name, WATCHES)}Name some "
                f"of {', '.join(sorted(WATCHES))}, or write one word for all, such as `on_alarm: warn`."
            )
        if action == "recover" and not WATCHES[name].has_remedy:
            raise ValueError(
                f"`on_alarm` has `{name}: recover`, and no key of a recipe mends what that monitor finds: going back "
                f"would only repeat it. Write `{name}: stop` or `warn`."
            )


def _check_mixing(values: SimpleNamespace) -> None:
    probabilities = items(values.interleave_probs)
    if not probabilities:
        return
    shown = f"`interleave_probs: {','.join(map(str, probabilities))}`"
    if values.mix_strategy == "concat":
        raise ValueError(
            f"{shown} has no effect with `mix_strategy: concat` (the default). Write `mix_strategy: "
            "interleave_under`, or leave `interleave_probs` out."
        )
    try:
        numbers = [float(probability) for probability in probabilities]
    except ValueError as error:
        raise ValueError(f"{shown} must be numbers, one for each dataset. Write for example `0.5,0.5`.") from error
    if not all(number >= 0 for number in numbers) or not math.isclose(sum(numbers), 1, abs_tol=1e-6):
        raise ValueError(f"{shown} must be probabilities that sum to 1. Write for example `0.5,0.5` for two datasets.")
    for key in ("dataset", "eval_dataset"):
        names = items(getattr(values, key))
        if names and len(names) != len(numbers):
            raise ValueError(
                f"{shown} has {len(numbers)} values for the {len(names)} datasets of `{key}: {','.join(names)}`. Give "
                "one for each, in the same order."
            )
