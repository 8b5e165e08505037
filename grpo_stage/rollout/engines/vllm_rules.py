"""What a run with vLLM, in its own process or as servers, is refused for, told without importing vLLM."""

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from grpo_stage.algorithm.conditions import Rule, as_yaml, refuse_broken
from grpo_stage.rollout.engines.lora import asks_for_new_tokens, continues_adapter, lora_extras
from grpo_stage.rollout.engines.vllm_options import LORA_RANKS, refuse_options


USE_HF = "Write `rollout_backend: hf`, which samples with the trained model itself"
USE_MERGED = "Write `vllm_lora: merged`, which gives vLLM the weights with the adapter in them"


def vllm_rule(broken: Callable[[SimpleNamespace], bool], what: str, reason: str, remedy: str = USE_HF) -> Rule:
    """A rule of an engine that is vLLM, whose message names `rollout_backend`."""
    return Rule(broken, f"{what} with `rollout_backend: {{rollout_backend}}`: {reason}. {remedy}.")


RANK_RULES = (
    vllm_rule(
        lambda v: v.adapter_rank > LORA_RANKS[-1],
        "`lora_rank: {adapter_rank}` is not possible",
        f"vLLM serves ranks up to {LORA_RANKS[-1]}",
        f"{USE_MERGED}. Or lower `lora_rank`",
    ),
    vllm_rule(
        lambda v: v.vllm_max_lora_rank is not None and v.vllm_max_lora_rank not in LORA_RANKS,
        "`vllm_max_lora_rank: {vllm_max_lora_rank}` is not possible",
        f"vLLM takes one of {', '.join(map(str, LORA_RANKS))}",
        "Leave it out to have `lora_rank` rounded up",
    ),
    vllm_rule(
        lambda v: v.vllm_max_lora_rank is not None and v.vllm_max_lora_rank < v.adapter_rank,
        "`vllm_max_lora_rank: {vllm_max_lora_rank}` is not possible",
        "it is below the rank of the adapter that is trained, {adapter_rank} (`lora_rank`, or that of "
        "`adapter_name_or_path`)",
        "Leave it out to have the rank rounded up",
    ),
)
"""Asked again once the adapter is loaded: the rank of one on a hub (`adapter_rank`) is not known before."""

SHARED_RULES = (
    vllm_rule(
        lambda v: v.finetuning_type == "oft",
        "`finetuning_type: oft` is not possible",
        "vLLM serves LoRA adapters only",
        f"{USE_HF}, or `finetuning_type: lora`",
    ),
    vllm_rule(
        lambda v: v.use_dora and v.vllm_lora == "native",
        "`use_dora: true` is not possible",
        "vLLM does not serve DoRA",
        f"{USE_MERGED}. Or write `rollout_backend: hf`",
    ),
    vllm_rule(
        lambda v: v.vllm_lora == "merged" and v.finetuning_type != "lora",
        "`vllm_lora: merged` is not possible",
        "`finetuning_type: {finetuning_type}` trains no LoRA adapter, so that it would have no effect",
        "Leave it out",
    ),
    vllm_rule(
        lambda v: v.vllm_lora == "merged" and v.vllm_max_lora_rank is not None,
        "`vllm_max_lora_rank: {vllm_max_lora_rank}` is not possible with `vllm_lora: merged`",
        "vLLM then holds no adapter, so that it would have no effect",
        "Leave it out",
    ),
    vllm_rule(
        lambda v: bool(v.additional_target),
        "`additional_target: {additional_target}` is not possible",
        "vLLM serves no modules beside the LoRA layers",
    ),
    vllm_rule(
        lambda v: v.vllm_max_lora_rank is not None and v.finetuning_type in ("full", "freeze"),
        "`vllm_max_lora_rank: {vllm_max_lora_rank}` is not possible",
        "`finetuning_type: {finetuning_type}` trains no adapter, so that it would have no effect",
        "Leave it out",
    ),
    *(
        Rule(lambda v, rule=rule: v.vllm_lora == "native" and rule.broken(v), rule.message)  # type: ignore[misc]
        for rule in RANK_RULES
    ),
    vllm_rule(
        lambda v: (
            v.vllm_maxlen is not None
            and v.vllm_maxlen < v.cutoff_len + v.max_new_tokens * (v.max_turns if v.completion_limit == "turn" else 1)
        ),
        "`vllm_maxlen: {vllm_maxlen}` is not possible",
        "it leaves no room for `cutoff_len: {cutoff_len}` and `max_new_tokens: {max_new_tokens}` together",
        "Leave it out to have the engine as long as both, or lower one of them",
    ),
    vllm_rule(
        lambda v: v.vllm_gpu_util is not None and not 0 < v.vllm_gpu_util <= 1,
        "`vllm_gpu_util: {vllm_gpu_util}` is not possible",
        "it is the fraction of the device's memory that the engine takes",
        "Write a number above 0 and at most 1, or leave it out for 0.3",
    ),
    vllm_rule(
        lambda v: v.vllm_config is not None and _as_mapping(v.vllm_config) is None,
        "`vllm_config: {vllm_config}` is not possible",
        "the engine's options are a mapping",
        'Write a YAML mapping, or one as JSON: `{{"max_num_seqs": 64}}`',
    ),
    vllm_rule(
        lambda v: v.structured_outputs is not None and not _is_form(_as_mapping(v.structured_outputs)),
        "`structured_outputs: {structured_outputs}` is not possible",
        "completions are held to one form: `regex` (a text), `choice` (a list of texts), `json` (a schema) or "
        "`grammar` (a text)",
        'Write for example `structured_outputs: {{"regex": "[0-9]+"}}`, or leave it out',
    ),
)
"""Of vLLM wherever it runs."""

VLLM_RULES = (
    Rule(
        lambda v: find_spec("vllm") is None,
        "`rollout_backend: vllm`, which is the default, needs vLLM, and vLLM is not installed. Install it with "
        '`pip install "grpo-stage[vllm]"` (without a GPU: the extra `cpu`), or write `rollout_backend: hf`, which '
        "needs nothing but is slower.",
    ),
    vllm_rule(
        lambda v: v.quantization_bit is not None and v.quantization_method != "bnb",
        "`quantization_method: {quantization_method}` is not possible",
        "the engine starts from dequantized weights, and only bitsandbytes' are known how to dequantize",
        f"{USE_HF}, or leave `quantization_method` out for bitsandbytes",
    ),
    vllm_rule(
        lambda v: v.finetuning_type == "lora" and asks_for_new_tokens(v) and not continues_adapter(v),
        "`resize_vocab`, `add_tokens`, `add_special_tokens` and `new_special_tokens_config` are not possible with "
        "`finetuning_type: lora`",
        "LLaMA-Factory then trains the embeddings whole beside the LoRA layers, and vLLM serves no such modules",
        f"{USE_HF}, or train with `finetuning_type: full` or `freeze`, or save the resized model first",
    ),
    vllm_rule(
        lambda v: v.vllm_sleep == 2 and v.finetuning_type == "lora" and v.vllm_lora == "native",
        "`vllm_sleep: 2` is not possible with `finetuning_type: lora`",
        "the engine would forget the model under the adapter, and the adapter alone is delivered to it again",
        "Write `vllm_sleep: 1`, which keeps that model in main memory, or `vllm_lora: merged`, which delivers all "
        "weights",
    ),
    *SHARED_RULES,
)
"""Of `rollout_backend: vllm`."""

POSITION_RULES = (
    Rule(
        lambda v: v.model_positions is not None and v.vllm_maxlen + bool(v.structured_outputs) > v.model_positions,
        "`vllm_maxlen: {vllm_maxlen}` is not possible: {model_name_or_path} knows {model_positions} positions. Leave "
        "it out for the {model_max_length} that `cutoff_len` and `max_new_tokens` make.",
    ),
)

_MODEL_RULES = (
    *POSITION_RULES,
    vllm_rule(
        lambda v: v.model_heads is not None and v.model_heads % v.vllm_tensor_parallel != 0,
        "`vllm_tensor_parallel: {vllm_tensor_parallel}` is not possible",
        "each process holds as many heads of the attention as the others, and {model_name_or_path} has {model_heads}",
        "Write a number that divides {model_heads}, or leave it out",
    ),
    vllm_rule(
        lambda v: (
            v.model_kv_heads is not None
            and v.model_kv_heads % v.vllm_tensor_parallel != 0
            and v.vllm_tensor_parallel % v.model_kv_heads != 0
        ),
        "`vllm_tensor_parallel: {vllm_tensor_parallel}` is not possible",
        "{model_name_or_path} has {model_kv_heads} heads of keys and values, which cannot be shared out alike",
        "Write a number that divides {model_kv_heads} or is a multiple of it, or leave it out",
    ),
    Rule(
        lambda v: v.model_quantization not in (None, "bitsandbytes"),
        "`model_name_or_path: {model_name_or_path}` is quantized with {model_quantization}, which is not possible "
        "with `rollout_backend: vllm`: the engine starts from dequantized weights, and only bitsandbytes' are known "
        f"how to dequantize. {USE_HF}, or train the unquantized model with `quantization_bit: 4`.",
    ),
)


def refuse_unfit(v: SimpleNamespace) -> None:
    """Refuse what takes the parsed keys and the model's config to tell.

    Raises:
        ValueError: naming the value, the reason and the remedy.
    """
    if v.vllm_config:
        refuse_options(v.vllm_config, on_cpu=v.device_type == "cpu")
    if v.structured_outputs:
        refuse_unreadable_form(v.structured_outputs)
    refuse_broken(_MODEL_RULES, v)


def refuse_ranks(tensor_parallel: int, num_local_ranks: int) -> None:
    """Refuse processes that cannot share engines as `vllm_tensor_parallel` says.

    Args:
        tensor_parallel: the key.
        num_local_ranks: how many processes train on this machine.

    Raises:
        ValueError: naming both, the reason and the remedy.
    """
    if num_local_ranks % tensor_parallel:
        processes = "1 process" if num_local_ranks == 1 else f"{num_local_ranks} processes"
        raise ValueError(
            f"`vllm_tensor_parallel: {tensor_parallel}` is not possible with {processes} on this machine: "
            f"{tensor_parallel} processes of a machine share an engine, and each needs its share of one. Start a "
            f"multiple of {tensor_parallel} processes on each machine (`NPROC_PER_NODE`, or `num_processes` of "
            "`accelerate launch`), or leave it out."
        )


def refuse_adapter(path: str, config: Mapping[str, Any], v: SimpleNamespace) -> None:
    """Refuse to train an adapter that vLLM does not serve and that cannot be merged, by its adapter_config.json.

    Raises:
        ValueError: naming the adapter, what it has, and the remedy.
    """
    if extras := lora_extras(config, is_merged=v.vllm_lora == "merged"):
        shown = ", ".join(f"`{key}: {as_yaml(value)}`" for key, value in extras.items())
        remedy = USE_HF if lora_extras(config, is_merged=True) else f"{USE_MERGED}. Or write `rollout_backend: hf`"
        raise ValueError(
            f"`adapter_name_or_path: {path}` is not possible with `rollout_backend: {v.rollout_backend}`: its "
            f"adapter_config.json has {shown}, which vLLM does not serve. {remedy}."
        )


def refuse_unreadable_form(form: Mapping[str, Any]) -> None:
    """By the library that vLLM reads it with."""
    import xgrammar

    ((kind, value),) = form.items()
    read: dict[str, Callable[[Any], object]] = {
        "regex": xgrammar.Grammar.from_regex,
        "json": xgrammar.Grammar.from_json_schema,
        "grammar": xgrammar.Grammar.from_ebnf,
    }
    try:
        if kind in read:
            read[kind](value)
    except Exception as error:  # of the library's own types
        raise ValueError(
            f"`structured_outputs: {as_yaml(form)}` cannot be read as {kind}: {error}. Mend it, or leave it out."
        ) from error


def _is_form(form: dict[str, Any] | None) -> bool:
    if form is None or len(form) != 1:
        return False
    ((kind, value),) = form.items()
    if kind == "choice":
        return isinstance(value, list) and bool(value) and all(isinstance(each, str) and each for each in value)
    return bool(value) and isinstance(value, {"regex": str, "grammar": str, "json": str | dict}.get(kind, ()))


def _as_mapping(value: Any) -> dict[str, Any] | None:
    """A mapping, or one as JSON; None where it is neither."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    return value if isinstance(value, dict) else None
