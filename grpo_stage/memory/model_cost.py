"""A model as the costs of a step know it, from its shapes."""

from typing import Any

from grpo_stage.layout.costs import ModelCost
from grpo_stage.memory.engine import kv_bytes_per_token, kv_parts
from grpo_stage.memory.sizes import Sizes
from grpo_stage.update.model_flops import share_of_experts, token_flops


def model_cost(
    model: Any, config: Any, sizes: Sizes, itemsize: int, *, engine_weights: float, delivers_adapter: bool
) -> ModelCost:
    """Of a policy on any device, `meta` included.

    Args:
        model: with its adapter.
        config: the text model's.
        sizes: of its weights.
        itemsize: bytes of a weight in a pass.
        engine_weights: bytes of the engine's copy.
        delivers_adapter: whether a sync brings the engine an adapter alone.
    """
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name.split("."))
    share = share_of_experts(config)
    flops = token_flops(model)
    output = sum(p.numel() for p in model.get_output_embeddings().parameters())
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_trained = sum(each.numel for each in sizes.trainable)
    return ModelCost(
        num_layers=config.num_hidden_layers,
        engine_weights=engine_weights,
        engine_experts=engine_weights * experts / sizes.num_parameters,
        expert_share=share,
        kv=kv_bytes_per_token(config, itemsize, is_vllm=True),
        kv_parts=kv_parts(config),
        engine_flops=flops.forward + 2.0 * output,
        key_flops=4.0 * config.num_attention_heads * head_size * config.num_hidden_layers,
        token=flops,
        weights=sizes.frozen + float(itemsize * num_trained),
        gradients=sizes.gradients,
        sharded_gradients=float(itemsize * num_trained),
        delivered=sizes.adapters if delivers_adapter else float(itemsize * sizes.num_parameters),
        is_adapter=delivers_adapter,
    )
