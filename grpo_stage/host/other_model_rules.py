"""Rules on the reference model and the reward model, by keys and folders."""

from types import SimpleNamespace

from grpo_stage.algorithm.conditions import Rule
from grpo_stage.host.adapters import adapter_config, adapter_folder, is_adapter_on_hub, items
from grpo_stage.rewards.models.refusals import refuse_extras
from grpo_stage.rewards.options import REWARD_MODEL
from grpo_stage.rollout.engines.lora import asks_for_new_tokens


def _stands_on_another_base(v: SimpleNamespace) -> bool:
    """Whether the policy's base differs from the files of `model_name_or_path`."""
    adapters = items(v.adapter_name_or_path)
    is_merged = len(adapters) > 1 or (bool(adapters) and v.create_new_adapter)
    return is_merged or v.pissa_init or v.use_llama_pro or v.train_from_scratch or asks_for_new_tokens(v)


OTHER_MODEL_RULES = (
    Rule(
        lambda v: v.sync_ref_model and v.ref_model is not None and v.finetuning_type not in ("full", "freeze"),
        "`sync_ref_model: true` cannot go with `ref_model: {ref_model}` and `finetuning_type: {finetuning_type}`: an "
        "adapter's weights have no counterpart in another model to be mixed with. Leave `ref_model` out: the "
        "reference is then the policy as it starts, and moves.",
    ),
    Rule(
        lambda v: v.sync_ref_model and v.ref_model is not None and v.ref_model_quantization_bit is not None,
        "`sync_ref_model: true` cannot go with `ref_model_quantization_bit: {ref_model_quantization_bit}`: quantized "
        "weights cannot be mixed. Leave one of them out.",
    ),
    # A reward model
    Rule(
        lambda v: v.reward_model is None and REWARD_MODEL in items(v.reward_funcs),
        "`reward_funcs: {reward_funcs}` asks for a reward model, and none is given. Write `reward_model`: the folder "
        "that LLaMA-Factory's `stage: rm` wrote, or the address of a reward server.",
    ),
    Rule(
        lambda v: v.reward_model is not None and REWARD_MODEL not in items(v.reward_funcs),
        "`reward_model: {reward_model}` would have no effect with `reward_funcs: {reward_funcs}`, which does not name "
        "it. Write `reward_funcs: {reward_funcs},reward_model` (and a weight for it where there is `reward_weights`), "
        "or leave `reward_funcs` out to score with the model alone.",
    ),
    Rule(
        lambda v: v.reward_model is not None and v.reward_model_type == "lora" and v.finetuning_type != "lora",
        "`reward_model_type: lora` (the default) cannot go with `finetuning_type: {finetuning_type}`: the reward "
        "model's adapter stands on the policy's base, which that changes. Write `reward_model_type: full` with the "
        "reward model's base as `reward_model` and its adapter as `reward_model_adapters`.",
    ),
    Rule(
        lambda v: v.reward_model is not None and v.reward_model_type == "lora" and _stands_on_another_base(v),
        "`reward_model_type: lora` (the default) cannot go with `pissa_init`, `use_llama_pro`, `train_from_scratch`, "
        "new tokens, several adapters or `create_new_adapter`: the reward model's adapter stands on the policy's "
        "base, which that makes another one than it was trained on. Write `reward_model_type: full` with the reward "
        "model's base as `reward_model` and its adapter as `reward_model_adapters`.",
    ),
    Rule(
        lambda v: (
            v.reward_model is not None
            and v.reward_model_type == "api"
            and not str(v.reward_model).startswith(("http://", "https://"))
        ),
        "`reward_model: {reward_model}` with `reward_model_type: api` is no address: requests go there over HTTP. "
        "Write the whole address, for example `http://localhost:8000/v1/score/evaluation`.",
    ),
    Rule(
        lambda v: (
            v.reward_model is not None
            and v.reward_model_type != "api"
            and str(v.reward_model).startswith(("http://", "https://"))
        ),
        "`reward_model: {reward_model}` is an address, and `reward_model_type: {reward_model_type}` (lora by default) "
        "reads a folder. Write `reward_model_type: api`.",
    ),
)


def check_reward_adapter(values: SimpleNamespace) -> None:
    """Refuse a `reward_model` that should be an adapter and is none, or is no plain LoRA.

    Raises:
        ValueError: naming the folder, the reason and the remedy.
    """
    path = values.reward_model
    if path is None or values.reward_model_type != "lora":
        return
    config = adapter_config(path, None, "reward_model")
    if config is not None:
        refuse_extras(config, path)
    elif not is_adapter_on_hub(path):
        raise ValueError(
            f"`reward_model: {path}` with `reward_model_type: lora` (the default) is no adapter: there is no "
            f"adapter_config.json in {adapter_folder(path, None)}. Give the folder that LLaMA-Factory's `stage: rm` "
            "wrote with LoRA, or write `reward_model_type: full` for a whole model."
        )
