"""`moe_aux_loss_coef`: the load of a mixture's experts, kept even over the step by a loss on its routers.

R rows of N tokens, as a layout places a micro-batch    E experts
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from grpo_stage.algorithm.routing import expert_loads, load_balancing_losses
from grpo_stage.distributed import all_gather
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.types import ModelInputs, Sample, TokenBatch
from grpo_stage.update.logprobs import FrozenPass


ROUTERS = frozenset(
    {
        "FlexOlmoTopKRouter",
        "GptOssTopKRouter",
        "MiniMaxTopKRouter",
        "MixtralTopKRouter",
        "OlmoeTopKRouter",
        "Qwen2MoeTopKRouter",
        "Qwen3MoeTopKRouter",
        "Qwen3NextTopKRouter",
        "Qwen3VLMoeTextTopKRouter",
        "Qwen3_5MoeTopKRouter",
    }
)
"""The classes of transformers whose first output, [R x N, E], the `top_k` experts of a token are the highest of, as
its softmax or before that. Other routers choose by sigmoids, groups or learned biases, and were not verified."""


def routers_of(model: nn.Module) -> list[nn.Module]:
    """The routers that this stage knows, of a model with weights or without."""
    return [module for module in model.modules() if type(module).__name__ in ROUTERS]


def no_router(coefficient: float, model: str) -> str:
    """The refusal of a model that has none of them."""
    known = ", ".join(sorted(name.removesuffix("TopKRouter").removesuffix("Text") for name in ROUTERS))
    return (
        f"`moe_aux_loss_coef: {coefficient:g}` is not possible with {model}: the loss keeps the load of a mixture's "
        f"experts even, and the model has no router that this stage knows ({known}). Leave it out, or name a mixture "
        "of experts of one of these."
    )


class RouterLoss:
    """The auxiliary loss of a step: `load_balancing_losses` over the tokens of all layers, micro-batches and ranks.

    The tokens are those of the completions that the loss uses and of their prompts, a prompt counted once for each
    completion, that predict another token: all but the last one of a completion. Padding is none.

    Args:
        model: the policy, not wrapped; its routers are watched from now on.
        coefficient: the loss's weight in the step's loss.

    Raises:
        ValueError: if the model has no router that this stage knows.
    """

    def __init__(self, model: nn.Module, coefficient: float) -> None:
        routers: list[Any] = routers_of(model)
        if not routers:
            raise ValueError(no_router(coefficient, f"a {type(model).__name__}"))
        self._coefficient = coefficient
        self._top_k = int(routers[0].top_k)
        self._outputs: list[torch.Tensor] | None = None
        self._load_fracs = torch.zeros(0)  # [E], of the present step
        self._num_tokens = 0.0  # of the present step, in all layers
        for router in routers:
            router.register_forward_hook(self._note)

    def _note(self, router: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
        # Gradient checkpointing computes a layer once more in the backward pass, outside of any block.
        if self._outputs is not None:
            self._outputs.append(output[0])

    @contextmanager
    def recording(self) -> Iterator[list[torch.Tensor]]:
        """In this block what the routers give, [R x N, E] for each layer, is added to the list."""
        outputs: list[torch.Tensor] = []
        self._outputs = outputs
        try:
            yield outputs
        finally:
            self._outputs = None

    def look_at_step(self, policy: nn.Module, frozen: FrozenPass, samples: Sequence[Sample]) -> None:
        """Count the loads of a step before its first micro-batch, in a pass without gradient. Every rank calls this.

        Args:
            policy: not wrapped.
            frozen: the pass.
            samples: this rank's share of the step, as its terms have marked it.
        """

        def loads(batch: TokenBatch) -> torch.Tensor:
            with self.recording() as outputs:
                frozen.forward.statistics(policy, batch, 1.0)
            counts = batch.inputs.counts.flatten()
            layers = [expert_loads(each, counts, self._top_k) for each in _checked(outputs, counts)]
            return torch.stack(layers).sum(dim=0)  # [E]

        own = frozen.sum(policy, [sample for sample in samples if sample.is_used], loads)
        of_ranks = [each for each in all_gather(own) if each is not None]
        if not of_ranks:  # the loss uses no completion
            return
        total = torch.stack(of_ranks).sum(dim=0)  # [E]
        self._num_tokens = float(total.sum()) / self._top_k  # a token of a layer is the load of `top_k` experts
        self._load_fracs = total / self._num_tokens

    def of_micro_batch(
        self, outputs: Sequence[torch.Tensor], inputs: ModelInputs, metrics: MetricTracker
    ) -> torch.Tensor:
        """The micro-batch's share of the coefficient times the loss of the step.

        Args:
            outputs: of the routers in the micro-batch's pass, with gradient.
            inputs: of completions that the loss uses.
            metrics: gets `aux_loss`, without the coefficient.
        """
        counts = inputs.counts.flatten()  # [R x N]
        layers = _checked(outputs, counts)
        if not counts.any():  # a dummy's
            return torch.zeros((), device=counts.device)
        losses = [(load_balancing_losses(each, self._load_fracs) * counts).sum() for each in layers]
        loss = torch.stack(losses).sum()
        metrics.add("aux_loss", loss.detach(), counts.sum() * len(layers))
        return self._coefficient * loss / self._num_tokens


def _checked(outputs: Sequence[torch.Tensor], counts: torch.Tensor) -> list[torch.Tensor]:
    """[R x N, E] of each layer."""
    if not outputs or any(each.numel() != counts.numel() * each.size(-1) for each in outputs):
        raise RuntimeError(
            "`moe_aux_loss_coef` is not possible with this model: its routers are not asked for each token of the "
            "batch, as where a kernel replaces the layer that they are in. Leave it out, or leave out what replaces "
            "layers."
        )
    return [each.flatten(0, -2) for each in outputs]
