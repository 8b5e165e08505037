"""How a run's weights are distributed over processes, as keys and environment say, and what does not fit that."""

import os
from types import MappingProxyType, SimpleNamespace
from typing import Any

from grpo_stage.algorithm.conditions import as_yaml
from grpo_stage.algorithm.refusals import apart
from grpo_stage.host.unsupported import Unsupported
from grpo_stage.host.zero import check_zero, zero_stage


REPLICATED, FSDP2, ZERO = "replicated", "FSDP2", "ZeRO-{stage}"
"""As `Strategy.name`."""
_ELEMENTWISE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Those that treat each number of a weight by itself, so that a shard of it is enough."""
_DDP = "Leave it out, or let every process have all weights (DDP: `llamafactory-cli train` without `deepspeed`)."

_NOT_AS_SHARDS = Unsupported(
    "quantization_bit",
    "quantized weights were not verified as shards",
    f"{_DDP} ZeRO-2 leaves them whole as well: write `deepspeed: examples/deepspeed/ds_z2_config.json`, and launch "
    "with `FORCE_TORCHRUN=1 llamafactory-cli train`.",
    harmless=(),
)
"""Where the weights themselves are divided."""
_NOT_SHARDED = (
    Unsupported(
        "ref_model_quantization_bit",
        "a quantized reference was not verified beside a model that they hold together",
        _DDP,
        harmless=(),
    ),
    Unsupported("fp16", "its loss scale was not verified with shards of gradients", "Write `bf16: true`."),
    Unsupported(
        "use_galore use_apollo use_adam_mini use_muon",
        "this optimizer needs whole weights, and a process has a shard of each",
        "Leave it out: `optim: adamw_torch` works.",
    ),
    Unsupported(
        "moe_aux_loss_coef",
        "a router's outputs were not verified with sharded layers",
        "Leave it out, or write 0.",
        harmless=(0,),
    ),
    Unsupported("save_on_each_node", "the first process alone collects the weights for a save"),
)
_NOT_UNDER_FSDP = MappingProxyType(
    {
        "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
        "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing",
    }
)
"""Switches of accelerate that are refused, and their names in its config file."""


def distribution(deepspeed: Any) -> str:
    """The distribution that the launcher asks for, or the key `deepspeed` with this value."""
    if deepspeed:
        return ZERO.format(stage=zero_stage(deepspeed))
    return FSDP2 if _is_on("ACCELERATE_USE_FSDP") else REPLICATED


def is_sharded(deepspeed: Any) -> bool:
    """Whether several processes will hold weights, gradients or the optimizer's states together.

    Stage 0 of ZeRO counts as well: DeepSpeed's engine handles it as it does the others.
    """
    return distribution(deepspeed) != REPLICATED


def check_distribution(values: SimpleNamespace) -> None:
    """Refuse distributions that this stage does not have, and keys that do not fit the one that is asked for.

    Raises:
        ValueError: naming the value, the rule, the reason and the remedy.
    """
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "ACCELERATE_USE_DEEPSPEED is set, as `accelerate launch` does for DeepSpeed: `stage: grpo` has its config "
            "from the recipe. Write `deepspeed: ds_z3_config.json` there, and launch with `FORCE_TORCHRUN=1 "
            "llamafactory-cli train`; or write `fsdp_version: 2` into the config file of `accelerate launch`."
        )
    if values.deepspeed and _is_on("ACCELERATE_USE_FSDP"):
        raise ValueError(
            "`deepspeed` is not possible under `accelerate launch` with FSDP: both would divide the weights. Leave it "
            "out, or launch with `FORCE_TORCHRUN=1 llamafactory-cli train`."
        )
    if values.deepspeed:
        check_zero(values)
    elif is_sharded(None):
        with apart():
            _check_fsdp(values)
    else:
        return
    kind = distribution(values.deepspeed)
    divides_weights = kind in (FSDP2, ZERO.format(stage=3))
    for entry in (*_NOT_SHARDED, *((_NOT_AS_SHARDS,) if divides_weights else ())):
        for key in entry.keys.split():
            with apart():
                if (value := getattr(values, key)) is not None and value not in (False, *entry.harmless):
                    raise ValueError(_refusal(kind, f"{key}: {as_yaml(value)}", entry.reason, entry.remedy))
    with apart():
        optim = str(getattr(values.optim, "value", values.optim))
        if optim not in _ELEMENTWISE_OPTIMIZERS:
            known = ", ".join(_ELEMENTWISE_OPTIMIZERS)
            raise ValueError(
                _refusal(
                    kind, f"optim: {optim}", "it was not verified with shards of weights", f"Write one of {known}."
                )
            )
    with apart():
        if values.reward_model is not None and values.reward_model_type != "api":
            reason = "a reward model in the trainer's process is not sharded, and one on the policy needs it whole"
            remedy = "Serve it and write `reward_model_type: api`, or leave it out."
            raise ValueError(_refusal(kind, f"reward_model_type: {values.reward_model_type}", reason, remedy))
    with apart():
        if values.finetuning_type == "oft":
            raise ValueError(
                _refusal(
                    kind, "finetuning_type: oft", "it was not verified with shards", "Write `finetuning_type: lora`."
                )
            )


def _check_fsdp(values: SimpleNamespace) -> None:
    """What `accelerate launch` has made of its config file."""
    where = "in the config file of `accelerate launch`"
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"`fsdp_version: {version}` {where} is not possible with `stage: grpo`: FSDP1 hides the parameters that "
            "this stage reads and restores, and accelerate is about to drop it. Write `fsdp_version: 2` there, and "
            "`fsdp_reshard_after_forward: true` in the place of `fsdp_sharding_strategy: FULL_SHARD`."
        )
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper()
    if policy != "TRANSFORMER_BASED_WRAP":
        raise ValueError(
            f"`fsdp_auto_wrap_policy: {policy}` {where} is not possible with `stage: grpo`: what is gathered together "
            "has to be a layer of the model; all at once is the whole model, and parts by size may cut off the output "
            "layer, which processes call a different number of times. Write `fsdp_auto_wrap_policy: "
            "TRANSFORMER_BASED_WRAP`, and leave `fsdp_transformer_layer_cls_to_wrap` out."
        )
    for variable, name in _NOT_UNDER_FSDP.items():
        if _is_on(variable):
            raise ValueError(
                f"`{name}: true` {where} is not possible with `stage: grpo`: it was not verified. Write `{name}: "
                "false`; the host's gradient checkpointing is on by default."
            )
    if os.environ.get("FSDP_IGNORED_MODULES"):
        raise ValueError(
            f"`fsdp_ignored_modules` {where} is not possible with `stage: grpo`: FSDP does not sum the gradients of "
            "what it ignores. Leave it out."
        )
    if values.save_only_model and "SHARDED" in os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT").upper():
        raise ValueError(
            f"`save_only_model: true` needs `fsdp_state_dict_type: FULL_STATE_DICT` {where}: transformers refuses it "
            "otherwise. Write that there, or leave `save_only_model` out."
        )
    is_rebuilt = values.train_from_scratch or values.resize_vocab or values.pissa_init or values.create_new_adapter
    if _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING") and values.rollout_backend != "hf" and is_rebuilt:
        raise ValueError(
            f"`fsdp_cpu_ram_efficient_loading: true` {where} leaves the weights with the first process until they are "
            f"sharded, and `rollout_backend: {values.rollout_backend}` has to start from weights that differ from the "
            "model's files (`train_from_scratch`, `resize_vocab`, `pissa_init` or `create_new_adapter`). Write "
            "`fsdp_cpu_ram_efficient_loading: false`."
        )


def _refusal(kind: str, setting: str, reason: str, remedy: str) -> str:
    return f"`{setting}` is not possible where processes hold the training together ({kind}): {reason}. {remedy}"


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")
