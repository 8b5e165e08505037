"""How the trainer's weights leave the trainer: an adapter as its files, a model as the checkpoint that it would be."""

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from grpo_stage.rollout.engines.lora import LORA_EXTRAS, lora_extras
from grpo_stage.update import sharding


ADAPTER = "default"
"""The one adapter that the host trains."""

BYTES_OF_A_PART = 2**30
"""Of whole weights that are written for another process: a part is in memory at a time."""
_QUANTIZED_PARAMETERS = ("Params4bit", "Int8Params")
"""Of bitsandbytes, by name: it is imported only where it is used."""


class Weights(Protocol):
    """What a policy is delivered as: its adapter, or all that a checkpoint of it would hold."""

    @property
    def adapted(self) -> Sequence[str]:
        """The modules that the adapter changes, as `adapted_modules` names them; none for whole weights."""

    def adapter(self) -> contextlib.AbstractContextManager[Path]:
        """A folder with the adapter's files, for the block."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole weights, under a checkpoint's names."""


class PolicyWeights:
    """Those of a policy in this process.

    Args:
        policy: it is only read.
        is_adapter: whether its adapter alone is delivered.

    Raises:
        ValueError: if the policy has an adapter that can be neither served nor merged, or has none to serve.
    """

    def __init__(self, policy: torch.nn.Module, *, is_adapter: bool) -> None:
        if is_adapter or isinstance(policy, PeftModel):
            servable_config(policy, is_merged=not is_adapter)
        self._policy = policy
        self.adapted: Sequence[str] = adapted_modules(policy) if is_adapter else ()

    @contextlib.contextmanager
    def adapter(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="grpo-stage-adapter-") as folder:
            write_adapter(self._policy, Path(folder))
            yield Path(folder)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Without files; in memory twice are those that an adapter changes, which is merged in.

        Where several processes hold the weights together, a layer at a time is whole in each of them.
        """
        yield from checkpoint_weights(self._policy, is_merged=isinstance(self._policy, PeftModel))

    @contextlib.contextmanager
    def written(self) -> "Iterator[WrittenWeights]":
        """The same in files, for another process; deleted after the block."""
        if self.adapted:
            with self.adapter() as folder:
                yield WrittenWeights(folder, self.adapted)
            return
        with tempfile.TemporaryDirectory(prefix="grpo-stage-weights-") as name:
            self.write(Path(name))
            yield WrittenWeights(Path(name), ())

    def write(self, folder: Path) -> None:
        """The same into a folder that stays."""
        if self.adapted:
            write_adapter(self._policy, folder)
            return
        for number, tensors in enumerate(in_parts(self.tensors(), BYTES_OF_A_PART)):
            save_torch_state_dict(tensors, folder, filename_pattern=f"{number:05}{{suffix}}.safetensors")

    def accompany(self) -> None:
        """What a process does while another one writes weights that they hold together."""
        if not sharding.is_sharded(self._policy):
            return
        if self.adapted:
            with self.adapter():
                return
        for _ in self.tensors():
            pass


@dataclass(frozen=True, slots=True)
class WrittenWeights:
    """Those that another process has written."""

    folder: Path
    adapted: Sequence[str]

    @contextlib.contextmanager
    def adapter(self) -> Iterator[Path]:
        yield self.folder

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                    yield name, tensors.get_tensor(name)


def in_parts(tensors: Iterator[tuple[str, torch.Tensor]], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors in order, up to `size` bytes together, or one tensor that is larger."""
    part: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if part and tensor.nbytes + sum(each.nbytes for each in part.values()) > size:
            yield part
            part = {}
        part[name] = tensor
    if part:
        yield part


def write_adapter(policy: torch.nn.Module, folder: Path) -> None:
    """Write the policy's adapter as `adapter_model.safetensors` and `adapter_config.json`; the policy is only read.

    Raises:
        ValueError: if the policy has no adapter, or one that vLLM would serve as something else.
    """
    config = servable_config(policy)
    assert isinstance(policy, PeftModel)
    # Named parameters rather than a state dict: that of a quantized base would bring its quantization states along.
    sharding.rest(policy)
    tensors = get_peft_model_state_dict(
        policy, state_dict=dict(policy.named_parameters()), adapter_name=ADAPTER, save_embedding_layers=False
    )
    save_file(
        {name: sharding.whole(tensor).to("cpu").contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    config.save_pretrained(str(folder))


def servable_config(policy: torch.nn.Module, *, is_merged: bool = False) -> LoraConfig:
    """The configuration of the policy's adapter, checked against what vLLM serves, or what can be merged for it.

    vLLM refuses some of these by itself, but rank and alpha patterns it ignores: every module would then be scaled
    with the adapter's own alpha / rank, and completions would come from another policy.

    Raises:
        ValueError: naming each thing that vLLM cannot serve.
    """
    if not isinstance(policy, PeftModel):
        raise ValueError(
            f"The policy is a {type(policy).__name__} without an adapter, and vLLM takes its weights as a LoRA "
            "adapter here: use `finetuning_type: lora`, or `rollout_backend: hf`."
        )
    config = policy.peft_config.get(ADAPTER)
    if config is None or not isinstance(config, LoraConfig):
        kinds = ", ".join(f"{name} ({each.peft_type})" for name, each in policy.peft_config.items())
        raise ValueError(
            f"vLLM serves one LoRA adapter named `{ADAPTER}`, and the policy has: {kinds}. "
            "Use `finetuning_type: lora`, or `rollout_backend: hf`."
        )
    extras = lora_extras({key: getattr(config, key, None) for key in LORA_EXTRAS}, is_merged=is_merged)
    if extras:
        refused = [LORA_EXTRAS[key].format(value) for key, value in extras.items()]
        problem = "This adapter cannot be merged for vLLM" if is_merged else "vLLM cannot serve this adapter"
        raise ValueError(f"{problem}: {'; '.join(refused)}. Train a plain LoRA, or use `rollout_backend: hf`.")
    return config


def adapted_modules(policy: torch.nn.Module) -> list[str]:
    """The names, in the base model, of the modules that the policy's adapter changes."""
    return [
        name
        for name, module in _base_model(policy).named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in {*module.lora_A, *module.lora_embedding_A}
    ]


def checkpoint_weights(policy: torch.nn.Module, *, is_merged: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's weights, without its adapter, as the files of its model would hold them.

    That is: under a checkpoint's names, which transformers changes when it loads one; each tied weight once; and
    dequantized. They share the policy's memory where nothing had to be computed, and nothing is sharded.

    Args:
        policy: the model; it is only read. Where several processes hold its weights together, each makes this call
            and takes all that it gives: a layer is gathered when its first weight is asked for.
        is_merged: with the adapter merged into the weights that it changes.
    """
    saved = list(_base_model(policy).state_dict())
    for block in sharding.blocks(policy):
        with block.gathered():
            tensors = _weights_of_block(policy, block, saved, is_merged=is_merged)
            for name, tensor in tensors.items():
                # Who takes it may use it once the block's memory is taken back.
                yield name, tensor.clone() if block.is_sharded else tensor


def _weights_of_block(
    policy: torch.nn.Module, block: sharding.Block, saved: Sequence[str], *, is_merged: bool
) -> dict[str, torch.Tensor]:
    model = _base_model(policy)
    owned = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if m in block.modules}
    # `saved` knows what is saved at all, and holds quantization states, which are neither of the two above.
    tensors = {name: owned[name].detach() for name in saved if name in owned and name.rpartition(".")[0] in modules}
    for name, module in modules.items():
        weight = module._parameters.get("weight")  # not the attribute: an adapted layer shows its base's
        if type(weight).__name__ in _QUANTIZED_PARAMETERS:
            # Not on the device: it would hold the whole model a second time, and larger.
            tensors[f"{name}.weight"] = dequantize_bnb_weight(weight, getattr(module, "state", None)).detach().cpu()
    if is_merged:
        for name in adapted_modules(policy):
            if (key := f"{name}.base_layer.weight") not in tensors:
                continue
            tensors[key] = _merged(model.get_submodule(name), tensors[key])
    if isinstance(policy, PeftModel):
        prefix = policy.base_model.prefix  # PEFT's own test of what belongs to an adapter
        tensors = {name.replace(".base_layer.", "."): t for name, t in tensors.items() if prefix not in name}
    return revert_weight_conversion(_unquantized_view(model), remove_tied_weights_from_state_dict(tensors, model))


@torch.no_grad()
def _merged(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """A layer's weight with its adapter in it, as PEFT merges one, in memory of its own and off the device."""
    own = weight.to(layer.lora_A[ADAPTER].weight.device, copy=True) if ADAPTER in layer.lora_A else weight.clone()
    if ADAPTER in layer.lora_variant:  # DoRA
        merged = layer.lora_variant[ADAPTER].merge_safe(layer, ADAPTER, own)
    else:
        merged = own + layer.get_delta_weight(ADAPTER)  # in the more precise of both
    return merged.to(weight.dtype).cpu()


def write_base(policy: torch.nn.Module, folder: Path) -> None:
    """Write the model under the policy's adapter, as it is in memory, for an engine to start from.

    Merged adapters, a residual, new embeddings: whatever the trainer made of the files is in it, and no quantization.
    There is no tokenizer in the folder.
    """
    model = _base_model(policy)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if model._auto_class is not None:  # the code of a model that transformers does not have
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    save_torch_state_dict(dict(checkpoint_weights(policy)), folder)


def _base_model(policy: torch.nn.Module) -> PreTrainedModel:
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def _unquantized_view(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, less what was done to read quantized files: that cannot be reverted, and need not be."""
    conversions = getattr(model, "_weight_conversions", None) or []
    kept = [
        conversion
        for conversion in conversions
        if not any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))
    ]
    if len(kept) == len(conversions):
        return model
    view = copy.copy(model)
    view._weight_conversions = kept
    return view
