"""The parser of a GRPO run, for our keys and the host's together.

Flags become the same mapping as a YAML file, so there is one route: keys, types, refusals, the stage's defaults, and
then the host's own parser.
"""

import copy
import dataclasses
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType, SimpleNamespace
from typing import Any, get_type_hints

from llamafactory.extras.misc import is_env_enabled
from llamafactory.hparams import parser as host
from llamafactory.hparams.data_args import DataArguments
from llamafactory.hparams.finetuning_args import FinetuningArguments
from llamafactory.hparams.generating_args import GeneratingArguments
from llamafactory.hparams.model_args import ModelArguments
from llamafactory.hparams.training_args import TrainingArguments

from grpo_stage.algorithm.combinations import ONLY_WITH
from grpo_stage.algorithm.conditions import applies
from grpo_stage.algorithm.refusals import apart, stop_if_refused
from grpo_stage.arguments import GRPOArguments, grpo_field_names
from grpo_stage.host.adapters import items, lora_rank
from grpo_stage.host.checks import refuse_impossible, refuse_unfit
from grpo_stage.host.coercion import as_hinted
from grpo_stage.host.configuration_file import RawArguments, stage_of
from grpo_stage.host.generated_datasets import PREFIX
from grpo_stage.host.keys import as_written, known_keys, quoted, read
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.plugin.finetuning_args import GRPOFinetuningArguments
from grpo_stage.records.redaction import errors_masked
from grpo_stage.rewards.options import REWARD_MODEL
from grpo_stage.rewards.user_code import GAME
from grpo_stage.rollout.engines.vllm_options import rank_with_room


ARGUMENT_CLASSES = (ModelArguments, DataArguments, TrainingArguments, GRPOFinetuningArguments, GeneratingArguments)

# Defaults for keys that the user did not write. The host's sampling defaults draw from another distribution than the
# policy, and its logging interval of 500 steps would hide the run.
STAGE_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "logging_steps": 1}
)
DEFAULT_VLLM_GPU_UTIL = 0.3
DERIVED_KEYS = ("vllm_maxlen", "vllm_gpu_util", "vllm_max_lora_rank")
"""Keys that the stage derives from others unless they are written; the host's defaults for them do not count."""


def refuse_grpo_keys(raw: RawArguments) -> None:
    """Refuse a key of this stage in another stage's run, where it would have no effect.

    Raises:
        ValueError: naming the keys.
    """
    keys = sorted(grpo_field_names() & as_written(raw).keys())
    if keys:
        stage = stage_of(raw) or FinetuningArguments.__dataclass_fields__["stage"].default
        raise ValueError(
            f"{quoted(keys)}: only `stage: grpo` knows {'this key' if len(keys) == 1 else 'these keys'}, and the run "
            f"has `stage: {stage}`. Write `stage: grpo`, or leave them out."
        )


def parse(raw: RawArguments) -> RunArguments:
    """Parse the arguments of a GRPO run, from a YAML mapping or from command-line flags.

    Raises:
        ValueError: for every error that shows before a model is loaded.
    """
    if isinstance(raw, list) and {"-h", "--help"} & set(raw):
        host.get_train_args(raw)  # prints the help and exits
    with errors_masked(read(raw)):
        return _parse(raw)


def _parse(raw: RawArguments) -> RunArguments:
    written = check(raw)
    with apart():
        if written.get("model_name_or_path") is None:
            raise ValueError(
                "`model_name_or_path` is missing: it is the model that is trained. Give the path of its folder, or "
                "its hub id (`owner/name`)."
            )
    stop_if_refused()
    given = frozenset(key for key, value in written.items() if value is not None)
    model, data, training, finetuning, generating = host.get_train_args({**STAGE_DEFAULTS, **written})
    kept = copy.deepcopy({key: written[key] for key in written if key in given})
    arguments = RunArguments(model, data, training, finetuning, generating, given, kept)
    assert isinstance(arguments.finetuning, GRPOFinetuningArguments), "grpo_stage.plugin.registration is not installed"
    _derive(arguments)
    refuse_unfit(arguments)
    return arguments


def check(raw: RawArguments) -> dict[str, Any]:
    """The keys that were written, their values in their types. This is `parse` up to the host's own parser.

    Raises:
        ValueError: for errors that the keys alone or small local files show.
    """
    written = typed(raw)
    if written.get("dataset") is None and str(written.get("environment")).startswith(GAME):
        written["dataset"] = written["environment"]  # a game has its own prompts
    if written.get("reward_funcs") is None and written.get("reward_model") is not None:
        written["reward_funcs"] = REWARD_MODEL  # the only reward
    elif written.get("reward_funcs") is None and written.get("environment") is not None:
        written["reward_funcs"] = "environment"
    elif written.get("reward_funcs") is None and all(
        name.startswith(PREFIX) for name in items(written.get("dataset")) or [""]
    ):
        written["reward_funcs"] = "reasoning_gym"
    with apart():
        if not written.get("output_dir", True):  # if it is left out, transformers has a default
            raise ValueError(
                f"`output_dir: {written['output_dir'] or 'null'}` names no folder: checkpoints, logs and the trained "
                "model go there. Write for example `output_dir: saves/my-run`."
            )
    values = {**effective_defaults(), **dict.fromkeys(DERIVED_KEYS), **written}
    given = frozenset(key for key, value in written.items() if value is not None)
    with apart():
        GRPOArguments(**{key: value for key, value in values.items() if key in grpo_field_names()}).validate(given)
    with apart():
        refuse_impossible(SimpleNamespace(**values), given)
    return written


def typed(raw: RawArguments) -> dict[str, Any]:
    """The keys that were written, their values in their types.

    Raises:
        ValueError: for an unknown key, and for a value of another type.
    """
    hints = _hints()
    written = known_keys(read(raw), hints, allow_others=is_env_enabled("ALLOW_EXTRA_ARGS"))
    converted: dict[str, Any] = {}
    for key, value in written.items():
        with apart():
            converted[key] = as_hinted(key, value, hints[key])
    stop_if_refused()  # the checks that follow take values of the right type
    return converted


def _derive(arguments: RunArguments) -> None:
    """Set the keys that follow from others, unless the user wrote them."""
    model, training, generating = arguments.model, arguments.training, arguments.generating
    if arguments.finetuning.completion_limit == "turn":
        generating.max_new_tokens *= arguments.finetuning.max_turns  # from here on that of a whole completion
    total_length = arguments.data.cutoff_len + generating.max_new_tokens
    model.model_max_length = total_length  # the host's value is `cutoff_len`; it drives rope scaling
    generating.top_k = max(generating.top_k, 0)  # -1 keeps all tokens as well
    training.include_num_input_tokens_seen = "no"  # Trainer would count slots; the stage counts tokens itself
    if "vllm_maxlen" not in arguments.given:
        model.vllm_maxlen = total_length
    if "vllm_gpu_util" not in arguments.given:
        model.vllm_gpu_util = DEFAULT_VLLM_GPU_UTIL
    values = arguments.values()
    is_served = applies(ONLY_WITH["vllm_max_lora_rank"], vars(values)) and values.vllm_lora == "native"
    if "vllm_max_lora_rank" not in arguments.given and is_served:
        model.vllm_max_lora_rank = rank_with_room(lora_rank(values))


@cache
def _hints() -> Mapping[str, Any]:
    """The type of every key that may be written."""
    hints: dict[str, Any] = {}
    for cls in ARGUMENT_CLASSES:
        resolved = get_type_hints(cls)
        hints.update({spec.name: resolved[spec.name] for spec in dataclasses.fields(cls) if spec.init})
    return hints


@cache
def _specs() -> tuple[dataclasses.Field[Any], ...]:
    return tuple(spec for cls in ARGUMENT_CLASSES for spec in dataclasses.fields(cls) if spec.init)


def known_key_names() -> frozenset[str]:
    """The keys that a recipe may have: those of the host and of this stage."""
    return frozenset(_hints())


def effective_defaults() -> dict[str, Any]:
    """The values of keys that are not written, except keys that are derived from others."""
    host_defaults = {
        spec.name: spec.default_factory() if callable(spec.default_factory) else spec.default for spec in _specs()
    }
    return {**host_defaults, **STAGE_DEFAULTS}
