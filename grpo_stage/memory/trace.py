"""A micro-batch's forward and backward pass without any memory: tensors of shapes alone, and what would be held.

The model's own code runs, with its adapters, its precision and the stage's attention and output layer; PyTorch's fake
tensors have a shape and no content. So what a layer keeps for its backward pass is not a formula that has to be
maintained, it is what the layer does.
"""

import copy
import weakref
from collections import defaultdict
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_stage.types import Completion, FinishReason, ModelInputs, Prompt
from grpo_stage.update.attention import attention_of
from grpo_stage.update.batch import PaddedLayout, Row, SharedPromptLayout
from grpo_stage.update.dropout import disable_dropout
from grpo_stage.update.head import MAX_LOGITS, OutputLayer, statistics_of_logits


FEW_LAYERS = 3
"""A model of more layers is traced with a few of each kind, and the rest is drawn out as a straight line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Bytes that one micro-batch holds beside weights, gradients that exist before it, and optimizer states.

    Each field is a straight line in the number of layers; which of the first three is the largest may change with it.
    """

    forward: float
    """The most at one time in the layers' forward pass, with its temporary copies."""
    of_head: float
    """The same in both passes of the output layer."""
    backward: float
    """The same in the layers' backward pass."""
    kept: float
    """What the forward pass leaves for the backward pass."""
    flops: float
    """Of forward and backward pass, those of gradient checkpointing included."""

    @property
    def peak(self) -> float:
        """The most at one time."""
        return max(self.forward, self.of_head, self.backward)

    @property
    def head(self) -> float:
        """The part of `peak` that is there because of the output layer."""
        return self.peak - max(self.forward, self.backward)

    def with_layers(self, count: int, whole: "Trace", without_one: "Trace") -> "Trace":
        """This with `count` more layers, each of which adds what tells `whole` from `without_one`."""
        values = {
            name: getattr(self, name) + count * (getattr(whole, name) - getattr(without_one, name))
            for name in self.__slots__
        }
        return Trace(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The completions of one optimizer step on one device, and how they go through the model."""

    num_prompts: int
    group_size: int
    prompt_length: int
    completion_length: int
    max_tokens: int
    """Of a micro-batch: `max_tokens_per_micro_batch`."""
    device_type: str
    """`cpu` or `cuda`: the layout and the output layer's chunks differ."""
    shares_prompts: bool = True
    chunks_logits: bool = True

    def micro_batches(self) -> list[list[Row]]:
        """The rows of each, the largest first."""
        prompts = [
            Prompt(index=i, token_ids=(i,) * self.prompt_length, messages=(), reference=None)
            for i in range(self.num_prompts)
        ]
        completion = Completion(
            token_ids=(0,) * self.completion_length,
            sampling_logprobs=(0.0,) * self.completion_length,
            finish_reason=FinishReason.LENGTH,
            text="",
        )
        rows = [Row(prompt, completion) for prompt in prompts for _ in range(self.group_size)]
        layout = (SharedPromptLayout if self.shares_prompts else PaddedLayout)(0, torch.device(self.device_type))
        return [[rows[i] for i in chunk] for chunk in layout.split(rows, self.max_tokens)]

    def inputs(self, rows: Sequence[Row]) -> ModelInputs:
        """A micro-batch as the model gets it."""
        return (SharedPromptLayout if self.shares_prompts else PaddedLayout)(0, torch.device("cpu")).inputs(rows)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made in its block and are alive, and the block's FLOPs.

    Args:
        known: tensors that are not counted, nor are views of them: weights.
    """

    def __init__(self, known: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._sizes = {each.untyped_storage()._cdata: 0 for each in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            outputs = self._experts(func, *args, **(kwargs or {}))
        else:
            outputs = func(*args, **(kwargs or {}))
            if (count := flop_registry.get(func._overloadpacket)) is not None:
                self.flops += count(*args, **(kwargs or {}), out_val=outputs)
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return outputs

    def _experts(self, func: Any, rows: torch.Tensor, weights: torch.Tensor, *others: Any, **options: Any) -> Any:
        """The product of a mixture's experts, of which PyTorch counts no FLOPs.

        It exists in float32, and its rule for shapes knows bfloat16 alone.
        """
        self.flops += 2 * rows.numel() * weights.shape[-1]  # [S, K] @ [E, K, N], or [K, S] @ [S, N] for a gradient
        if rows.dtype == torch.float32:
            return func(rows.bfloat16(), weights.bfloat16(), *others, **options).float()
        return func(rows, weights, *others, **options)

    def _note(self, storage: Any) -> None:
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def trace(
    model: Any,
    load: Load,
    autocast: torch.dtype | None,
    *,
    checkpointing: bool,
    gives_values: bool = False,
) -> Trace:
    """What the largest micro-batch of a step holds.

    Args:
        model: the policy, or a critic, on the `meta` device, with gradient checkpointing prepared.
        load: the step.
        autocast: the precision of mixed-precision passes, or None.
        checkpointing: whether activations are computed twice.
        gives_values: whether the model is a critic, which gives one number a token and no logits.

    Raises:
        ValueError: if the model's code needs the content of a tensor.
    """
    rows, *others = load.micro_batches()
    kinds = layers_by_kind(model)
    few = {kind: min(len(layers), FEW_LAYERS) for kind, layers in kinds.items()}

    def run(counts: dict[Hashable, int]) -> Trace:
        kept = {layer for kind, layers in kinds.items() for layer in layers[: counts[kind]]}
        small = _copy_with(model, kept)
        with FakeTensorMode():
            _make_fake(small)
            inputs = load.inputs(rows)
            _prepare(small, checkpointing, has_gradients=bool(others))
            return _run(small, inputs, load, len(rows) * load.completion_length, autocast, gives_values)

    base = total = run(few)
    for kind, layers in kinds.items():
        if len(layers) > few[kind]:
            total = total.with_layers(len(layers) - few[kind], base, run({**few, kind: few[kind] - 1}))
    return total


def layers_by_kind(model: nn.Module) -> dict[Hashable, list[nn.Module]]:
    """The layers that gradient checkpointing knows, by their shapes, precisions, and way to attend."""
    kinds: dict[Hashable, list[nn.Module]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(isinstance(each, GradientCheckpointingLayer) for each in module):
            for layer in module:
                shapes = tuple((key, p.shape, p.dtype, p.requires_grad) for key, p in layer.named_parameters())
                kinds[name, shapes, getattr(layer, "attention_type", None)].append(layer)
    return kinds


def _copy_with(model: nn.Module, kept: set[nn.Module]) -> Any:
    """A copy of the model with those layers alone."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    whole = [(module, module._modules) for module in lists]
    try:
        for module in lists:
            if any(isinstance(each, GradientCheckpointingLayer) for each in module):
                module._modules = {str(i): each for i, each in enumerate(each for each in module if each in kept)}
        return copy.deepcopy(model)
    finally:
        for module, layers in whole:
            module._modules = layers


def _make_fake(model: nn.Module) -> None:
    """Give it fake tensors of the CPU for weights and buffers; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        tensors: Any
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                tensors[name] = made[id(tensor)]


def _prepare(model: Any, checkpointing: bool, has_gradients: bool) -> None:
    """As in a training step: no dropout, and from the second micro-batch on, gradients that are there."""
    disable_dropout(model.train())
    config = (model.get_base_model() if isinstance(model, PeftModel) else model).config
    for part in (config, config.get_text_config()):
        part._experts_implementation = "grouped_mm"  # the others choose by content
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = checkpointing
    if has_gradients:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)


def _run(
    model: Any, inputs: ModelInputs, load: Load, num_targets: int, autocast: torch.dtype | None, gives_values: bool
) -> Trace:
    weights = [*model.parameters(), *model.buffers()]
    gradients = [p.grad for p in weights if p.grad is not None]
    live = LiveBytes([*weights, *gradients])
    mixed = nullcontext() if autocast is None else torch.autocast("cpu", autocast, cache_enabled=False)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        with attention_of(base, inputs.shared_prompts), live:
            with mixed:
                hidden = base.base_model(
                    input_ids=inputs.input_ids,
                    attention_mask=inputs.attention_mask,
                    position_ids=inputs.position_ids,
                    use_cache=False,
                    **({} if inputs.shared_prompts is None else {"shared_prompts": inputs.shared_prompts}),
                ).last_hidden_state.flatten(0, 1)  # [N, hidden]
            forward, kept = live.peak, live.now
            live.peak = live.now
            states = hidden.detach()[inputs.predictors[:num_targets]].requires_grad_()
            _loss(base, states, load, mixed, gives_values).backward()
            of_head = live.peak
            slope = torch.zeros_like(hidden)
            slope[inputs.predictors[:num_targets]] = states.grad
            del states
            live.peak = live.now
            hidden.backward(slope)
            backward = live.peak
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"The activations of {type(base).__name__} cannot be forecast: its code looks at the content of tensors "
            f"({error}), and there are none before a run. `grpo-stage profile` measures a step instead."
        ) from error
    return Trace(forward=forward, of_head=of_head, backward=backward, kept=kept, flops=live.flops)


def _loss(base: Any, states: torch.Tensor, load: Load, mixed: Any, gives_values: bool) -> torch.Tensor:
    """A number that depends on all log-probabilities, or on all values, of the completions' tokens."""
    with mixed:
        if gives_values:
            return base.get_output_embeddings()(states).float().sum()
        targets = torch.zeros(len(states), dtype=torch.long)
        head = OutputLayer.of(base)
        assert head is not None, f"{type(base).__name__} has no output layer"
        if load.chunks_logits:
            return head.statistics(states, targets, 1.0, MAX_LOGITS[load.device_type]).logprobs.sum()
        return statistics_of_logits(head(states), targets, 1.0).logprobs.sum()
