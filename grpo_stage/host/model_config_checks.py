"""Checks of a model's config.json: its quantization, and its number of positions."""

from types import SimpleNamespace
from typing import Any

from grpo_stage.host.model_files import config_of
from grpo_stage.host.other_models import arguments_for
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.rollout.engines.table import ENGINES


def check_model_config(arguments: RunArguments) -> None:
    """Refuse a model with a quantization that the run does not support, or with too few positions for its texts.

    Raises:
        ValueError: naming the model, the reason and the remedy.
    """
    model, data, generating = arguments.model, arguments.data, arguments.generating
    config = config_of("model_name_or_path", model)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    tuning = arguments.finetuning.finetuning_type
    if method is not None and tuning not in ("lora", "oft"):
        raise ValueError(
            f"`finetuning_type: {tuning}` is not possible: `model_name_or_path: {model.model_name_or_path}` is "
            f"quantized with {method}, and quantized weights cannot be trained. Write `finetuning_type: lora`, or "
            "train the unquantized model."
        )
    limit = _positions(config)
    needed = data.cutoff_len + generating.max_new_tokens
    if limit is not None and needed > limit:
        raise ValueError(
            f"`max_new_tokens: {generating.max_new_tokens}` leaves no room: with `cutoff_len: {data.cutoff_len}` that "
            f"is up to {needed} tokens, and {model.model_name_or_path} knows {limit} positions. Lower `cutoff_len` "
            "(the room for a prompt) or `max_new_tokens` (the room for a completion), or extend the model with "
            "`rope_parameters` in its config.json."
        )
    facts = {
        "device_type": arguments.training.device.type,
        "model_quantization": method,
        "model_positions": limit,
        "is_tied": bool(getattr(config.get_text_config(), "tie_word_embeddings", False)),
        "model_heads": getattr(config.get_text_config(), "num_attention_heads", None),
        "model_kv_heads": getattr(config.get_text_config(), "num_key_value_heads", None),
    }
    values = SimpleNamespace(**vars(arguments.values()), **facts)
    ENGINES[arguments.finetuning.rollout_backend].refuse_unfit(values)


def check_reward_model_config(arguments: RunArguments) -> None:
    """Refuse a reward model with too few positions for the texts that it has to score.

    Raises:
        ValueError: naming the model, the reason and the remedy.
    """
    path = arguments.finetuning.reward_model
    if path is None or arguments.finetuning.reward_model_type != "full":  # `lora` has the policy's positions
        return
    prompt, completion = arguments.data.cutoff_len, arguments.generating.max_new_tokens
    limit = _positions(config_of("reward_model", arguments_for(arguments.model, path)))
    if limit is not None and prompt + completion > limit:
        raise ValueError(
            f"`reward_model: {path}` knows {limit} positions, and `cutoff_len: {prompt}` and `max_new_tokens: "
            f"{completion}` make texts of up to {prompt + completion} tokens: what comes after the last position that "
            "it was trained on would be scored at random. Lower one of them, or name a reward model for longer texts."
        )


def _positions(config: Any) -> int | None:
    """How many positions a model has, as far as its config says."""
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    if limit is not None and rope.get("factor") and rope.get("original_max_position_embeddings"):
        limit = max(limit, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return limit
