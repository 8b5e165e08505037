"""The DeepSpeed config that `deepspeed` names, and what is refused in it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers.integrations import deepspeed as integration

from grpo_stage.algorithm.refusals import apart
from grpo_stage.arguments import actions_of_alarms
from grpo_stage.host.adapters import items


_FIELDS = """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer fp16 bf16 zero_optimization steps_per_print
    wall_clock_breakdown
"""
_ZERO_FIELDS = """
    stage allgather_partitions allgather_bucket_size overlap_comm reduce_scatter reduce_bucket_size
    contiguous_gradients round_robin_gradients sub_group_size stage3_prefetch_bucket_size
    stage3_param_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance
    stage3_gather_16bit_weights_on_model_save offload_optimizer offload_param
"""
"""Those of the host's own files, and a few that change nothing that is trained."""
_OFFLOADED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
_HOST_FILES = "the host's `examples/deepspeed/ds_z2_config.json`"


def zero_stage(deepspeed: Any) -> int:
    """The stage of ZeRO in a config that `check_zero` accepts: 0 to 3.

    Args:
        deepspeed: the key's value: a file, or its content.
    """
    return int(_config(deepspeed)["zero_optimization"]["stage"])


def check_zero(values: SimpleNamespace) -> None:
    """Refuse a config that this stage or this machine cannot run, and keys that do not fit it.

    Raises:
        ValueError: naming the value, the rule, the reason and the remedy.
    """
    shown = _shown(values.deepspeed)
    config = _config(values.deepspeed)
    with apart():
        if find_spec("deepspeed") is None:
            raise ValueError(
                f"{shown} needs the package deepspeed, which is not installed. Install it (`pip install "
                "deepspeed`), or leave `deepspeed` out: FSDP2 (`accelerate launch`, docs/devices.md) shards "
                "what ZeRO-3 shards, with PyTorch alone."
            )
    with apart():
        if values.use_cpu:
            raise ValueError(
                f"`use_cpu: true` is not possible with {shown}: transformers then leaves DeepSpeed without a "
                "connection between the processes while the model is loaded. Leave `use_cpu` out: DeepSpeed computes "
                "on the CPU where there is no GPU, or where the environment says `DS_ACCELERATOR=cpu`."
            )
    with apart():
        _check_fields(shown, config)
    with apart():
        _check_offload(shown, config, values)
    with apart():
        if values.pure_bf16:
            raise ValueError(
                f"`pure_bf16: true` is not possible with {shown}: DeepSpeed keeps float32 copies of what is trained, "
                "and computes in bf16 if it is told to. Write `bf16: true` instead."
            )
    with apart():
        if values.max_grad_norm > 0 and "gradient_clipping" not in config:
            raise ValueError(
                f"{shown} has no `gradient_clipping`, so that DeepSpeed would not clip to `max_grad_norm: "
                f'{values.max_grad_norm:g}`. Write `"gradient_clipping": "auto"` into it, or `max_grad_norm: 0`.'
            )
    with apart():
        if values.save_only_model and values.load_best_model_at_end:
            raise ValueError(
                "`save_only_model: true` is not possible with `load_best_model_at_end: true` and DeepSpeed: "
                "transformers refuses it. Leave one of them out."
            )
    with apart():
        actions = actions_of_alarms(values.on_alarm)
        if "recover" in (actions.values() if isinstance(actions, dict) else [actions]):
            raise ValueError(
                f"`on_alarm` has `recover`, which is not possible with {shown}: going back makes another engine in "
                "the same process, which was not verified with DeepSpeed. Write `stop` or `warn` in its place."
            )
    with apart():
        if zero_stage(config) == 3 and len(items(values.adapter_name_or_path)) > 1:
            raise ValueError(
                f"`adapter_name_or_path: {','.join(items(values.adapter_name_or_path))}` is not possible with "
                f"{shown}: the host merges all adapters but the last into the model, which it cannot while ZeRO-3 "
                "divides it. Merge them first (`llamafactory-cli export`), or use ZeRO-2."
            )


def refuse_mismatches(deepspeed: Any, mismatches: list[str]) -> None:
    """Refuse a config that says otherwise than the recipe; transformers would do so once the model is loaded.

    Args:
        deepspeed: the key's value.
        mismatches: as `HfTrainerDeepSpeedConfig` notes them.
    """
    if mismatches:
        differing = "; ".join(each.removeprefix("- ") for each in mismatches)
        raise ValueError(
            f"{_shown(deepspeed)} differs from the recipe: {differing} (ds: the file, hf: the recipe). Write "
            '`"auto"` into the file in those places, and the recipe decides.'
        )


@contextmanager
def undivided() -> Iterator[None]:
    """In this block transformers makes models whole, where it would make them with their weights divided (ZeRO-3)."""
    kept = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = kept


def _check_fields(shown: str, config: Mapping[str, Any]) -> None:
    zero = config["zero_optimization"]
    for name, reason in (("optimizer", "`optim` and `learning_rate`"), ("scheduler", "`lr_scheduler_type`")):
        if name in config:
            raise ValueError(
                f"{shown} has a section `{name}`: it would replace what the recipe says with {reason}. Delete it from "
                "the file."
            )
    unknown = sorted(config.keys() - set(_FIELDS.split()))
    unknown += [f"zero_optimization.{each}" for each in sorted(zero.keys() - set(_ZERO_FIELDS.split()))]
    if unknown:
        raise ValueError(
            f"{shown} has {', '.join(f'`{each}`' for each in unknown)}, which was not verified with `stage: grpo`. "
            f"Delete it, or start from {_HOST_FILES}."
        )


def _check_offload(shown: str, config: Mapping[str, Any], values: SimpleNamespace) -> None:
    zero = config["zero_optimization"]
    devices = {name: (zero.get(name) or {}).get("device", "none") for name in ("offload_optimizer", "offload_param")}
    for name, device in devices.items():
        if device not in ("none", "cpu"):
            raise ValueError(
                f"{shown} has `{name}` to `{device}`, which was not verified with `stage: grpo`. Write `cpu`."
            )
    names = [name for name, device in devices.items() if device == "cpu"]
    if not names:
        return
    if not torch.cuda.is_available():
        raise ValueError(
            f"{shown} has `{names[0]}`, and this machine has no GPU: everything is in main memory already, and "
            "DeepSpeed would compile an optimizer for it. Name a file without `offload`, as ds_z2_config.json."
        )
    optim = str(getattr(values.optim, "value", values.optim))
    if devices["offload_optimizer"] == "cpu" and optim not in _OFFLOADED_OPTIMIZERS:
        raise ValueError(
            f"`optim: {optim}` is not possible with {shown}: DeepSpeed has no such optimizer on the CPU. Write "
            "`optim: adamw_torch`."
        )


def _config(deepspeed: Any) -> dict[str, Any]:
    """The content; a config of other shape than DeepSpeed's is refused."""
    config = deepspeed
    if not isinstance(config, dict):
        if not Path(deepspeed).is_file():
            raise ValueError(
                f"{_shown(deepspeed)} names no file. Give the path of a DeepSpeed config, such as {_HOST_FILES}."
            )
        try:
            config = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{_shown(deepspeed)} is not JSON: {error}. Start from {_HOST_FILES}.") from error
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        raise ValueError(
            f"{_shown(deepspeed)} has no `zero_optimization` with a `stage` from 0 to 3, which says what is "
            f"divided. Start from {_HOST_FILES}."
        )
    return config


def _shown(deepspeed: Any) -> str:
    return "`deepspeed: {...}`" if isinstance(deepspeed, dict) else f"`deepspeed: {deepspeed}`"
