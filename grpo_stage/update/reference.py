"""The reference policy, from which the KL term measures the policy's distance."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from grpo_stage.arguments import GRPOArguments
from grpo_stage.update import sharding


_PEFT_PARTS = re.compile(r"\.base_layer|\.modules_to_save\.default")
"""What PEFT adds to the names of weights, including those of layers that are trained whole."""


class ReferencePolicy(Protocol):
    """The policy at the start of the run, or another model."""

    def activate(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        """Yield the reference; after the block `policy` (unwrapped) is as it was."""


class ShardableReference(ReferencePolicy, Protocol):
    """A reference for a policy whose weights several processes hold together."""

    def distribute(self, policy: nn.Module, distribute: Callable[[nn.Module], nn.Module]) -> None:
        """Called once the processes hold the policy's weights together, and before the first step.

        Args:
            policy: as it is at the start of the run; each process has its shards.
            distribute: does to another model what was done to the policy.
        """


class MovingReference(ReferencePolicy, Protocol):
    """A reference that can follow the policy (`sync_ref_model`)."""

    def mix(self, policy: nn.Module, alpha: float) -> None:
        """Set each weight to alpha x that of `policy` (unwrapped) + (1 - alpha) x the present one."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights that `mix` changes."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` gave."""


class ReferenceSync(TrainerCallback):
    """Moves the reference toward the policy (`sync_ref_model`), at the end of a step."""

    def __init__(
        self, reference: MovingReference, grpo_args: GRPOArguments, unwrap: Callable[[Any], nn.Module]
    ) -> None:
        self._reference, self._unwrap = reference, unwrap
        self._alpha, self._every = grpo_args.ref_model_mixup_alpha, grpo_args.ref_model_sync_steps

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self._reference.mix(self._unwrap(model), self._alpha)


class AdapterOffReference:
    """The base model: right for a new adapter, which at the start of the run changes nothing."""

    @contextmanager
    def activate(self, policy: Any) -> Iterator[nn.Module]:
        with policy.disable_adapter():
            yield policy

    def distribute(self, policy: nn.Module, distribute: Callable[[nn.Module], nn.Module]) -> None:
        """It has no weights of its own."""


class InitialWeightsReference:
    """The trainable weights as they were at the start, swapped in for the reference pass.

    Right wherever the initial policy is not "adapter off": a continued adapter (the initial policy is the SFT model),
    PiSSA (the base is only a residual), freeze and full tuning. It costs a copy of the trainable weights alone.
    """

    def __init__(self, policy: nn.Module) -> None:
        self._initial = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def mix(self, policy: nn.Module, alpha: float) -> None:
        _mix(self._initial, dict(policy.named_parameters()), alpha)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._initial

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        _mix(self._initial, state, 1.0)

    @contextmanager
    def activate(self, policy: nn.Module) -> Iterator[nn.Module]:
        parameters = dict(policy.named_parameters())
        trained = {name: parameters[name].data for name in self._initial}
        try:
            for name, initial in self._initial.items():
                parameters[name].data = initial
            yield policy
        finally:
            for name, data in trained.items():
                parameters[name].data = data


class InitialShardsReference:
    """The same, where several processes hold the weights together: each keeps its shards, from `distribute` on."""

    def __init__(self) -> None:
        self._initial: dict[str, torch.Tensor] = {}

    def distribute(self, policy: nn.Module, distribute: Callable[[nn.Module], nn.Module]) -> None:
        self._initial = {name: shard.clone() for name, shard in sharding.shards(policy).items()}

    @torch.no_grad()
    def mix(self, policy: nn.Module, alpha: float) -> None:
        _mix(self._initial, sharding.shards(policy), alpha)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._initial

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        _mix(self._initial, state, 1.0)

    @contextmanager
    def activate(self, policy: nn.Module) -> Iterator[nn.Module]:
        self._swap(policy)
        try:
            yield policy
        finally:
            self._swap(policy)

    @torch.no_grad()
    def _swap(self, policy: nn.Module) -> None:
        """Exchange the contents, a weight at a time: what gathers a shard holds its memory, not the parameter."""
        for name, shard in sharding.shards(policy).items():
            initial = self._initial[name]
            kept = shard.clone()
            shard.copy_(initial)
            initial.copy_(kept)


class ModelReference:
    """Another model (`ref_model`)."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model.eval()

    def distribute(self, policy: nn.Module, distribute: Callable[[nn.Module], nn.Module]) -> None:
        self._model = distribute(self._model)

    def match_precision(self, policy: Any) -> None:
        """Raise each weight's precision to that of the policy's weight of the same name, if that is higher.

        The host keeps trained weights in float32. Mixed precision rounds differently with bf16 weights, so the KL of
        identical weights would not be 0.
        """
        base = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        theirs = {_PEFT_PARTS.sub("", name): p.dtype for name, p in base.named_parameters()}
        for name, p in self._model.named_parameters():
            if p.is_floating_point() and theirs.get(name) == torch.float32:
                p.data = p.data.float()

    def check_alike(self, policy: nn.Module) -> None:
        """Raise ValueError unless `policy` has a weight of the same name and shape for each of the reference's."""
        theirs = {name: p.shape for name, p in policy.named_parameters()}
        unlike = [name for name, p in self._model.named_parameters() if theirs.get(name) != p.shape]
        if unlike:
            raise ValueError(
                f"`sync_ref_model: true` mixes the policy's weights into `ref_model`, and {len(unlike)} weights of it "
                f"are of another name or shape ({unlike[0]}). Name a model of the same size, or leave `ref_model` "
                "out: the reference is then the policy as it starts."
            )

    @torch.no_grad()
    def mix(self, policy: nn.Module, alpha: float) -> None:
        _mix(self.state_dict(), sharding.shards(policy, trained=False), alpha)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return sharding.shards(self._model, trained=False)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        _mix(self.state_dict(), state, 1.0)

    @contextmanager
    def activate(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield self._model


def _mix(old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor], alpha: float) -> None:
    """Move `old` toward `new` in place; in float32, so that rounding does not swallow a small alpha."""
    for name, tensor in old.items():
        target = new[name].to(tensor.device, torch.float32)
        tensor.copy_(target if alpha == 1.0 else tensor.float().lerp(target, alpha))
