"""What a rank holds when weights, gradients and optimizer states are divided over ranks: ZeRO-2, ZeRO-3, FSDP."""

from collections.abc import Mapping
from typing import Any

from grpo_stage.memory.parts import Budget, phase
from grpo_stage.memory.sizes import Sizes
from grpo_stage.memory.trace import layers_by_kind


_WEIGHTS = ("weights, trained", "adapters")
_BUCKET = 5e8
"""Elements of each of ZeRO-2's two buckets, of gradients and of gathered weights, in LLaMA-Factory's `ds_z2` files."""


def sharded(budget: Budget, sharding: str, num_ranks: int, sizes: Sizes, itemsize: int, gathered: float) -> Budget:
    """A budget of one rank of `num_ranks`.

    Args:
        budget: without sharding.
        sharding: `zero2`, `zero3` or `fsdp`.
        num_ranks: that divide.
        sizes: of the policy.
        itemsize: bytes of a weight in a pass.
        gathered: bytes that ZeRO-3 and FSDP put together at a time (`gathered_bytes`).
    """
    num_trained = sum(each.numel for each in sizes.trainable)

    def of_zero2(parts: Mapping[str, float]) -> dict[str, float]:
        """Every rank has the weights of the passes; the weights that the optimizer changes are with its states."""
        held = dict(parts)
        trained = sum(held.get(name, 0.0) for name in _WEIGHTS)
        in_passes = min(1.0, itemsize * num_trained / trained) if trained else 1.0
        for name in _WEIGHTS:
            held[name] = held.get(name, 0.0) * in_passes
        own = trained if in_passes < 1 else 0.0
        held["optimizer"] = (held.get("optimizer", 0.0) + own) / num_ranks
        held["gradients"] = held.get("gradients", 0.0) / num_ranks
        held["gradient buckets"] = 2 * itemsize * min(_BUCKET, num_trained)
        return held

    def of_zero3(parts: Mapping[str, float]) -> dict[str, float]:
        held = dict(parts)
        for name in ("weights, frozen", *_WEIGHTS, "optimizer", "gradients", "reference"):
            held[name] = held.get(name, 0.0) / num_ranks
        held.pop("gradient buckets", None)
        return {**held, "gathered layers": gathered}

    divide = of_zero2 if sharding == "zero2" else of_zero3
    return Budget(budget.name, tuple(phase(each.name, divide(each.parts)) for each in budget.phases))


def gathered_bytes(model: Any, itemsize: int) -> float:
    """Two layers, the one that computes and the one that is fetched for it, with embeddings and output layer."""
    layers = [layer for each in layers_by_kind(model).values() for layer in each]
    sizes = sorted((sum(p.numel() for p in layer.parameters()) for layer in layers), reverse=True)
    outside = sum(p.numel() for p in model.parameters()) - sum(sizes)
    return float(itemsize * (outside + sum(sizes[:2])))
