"""The load of a router's experts, which an auxiliary loss keeps even.

The loss is a product of two means over the tokens of a step, of which one alone passes a gradient. So a first pass
counts the loads over all micro-batches and ranks (`expert_loads`), and the losses of the second
(`load_balancing_losses`) add up to the step's, however it is split.

    N tokens of one layer or several    E experts
"""

import torch


def routing_probabilities(router_outputs: torch.Tensor) -> torch.Tensor:
    r"""The router's probabilities, from what its module gives first.

    .. math:: softmax(x) \text{, or } x \text{ where its rows are probabilities already}

    transformers 5 gives probabilities for Mixtral, Qwen3-MoE, OLMoE and others, of which its own
    `load_balancing_loss_func` takes the softmax once more, and logits for gpt-oss; version 4 gives logits.

    Args:
        router_outputs: [N, E].

    Returns:
        [N, E] float32, or float64 where the outputs are.
    """
    x = router_outputs if router_outputs.dtype == torch.float64 else router_outputs.float()
    sums_to_one = (x.sum(dim=-1) - 1).abs() < 1e-2  # [N], whatever precision the outputs are rounded to
    return x if (x >= 0).all() and sums_to_one.all() else x.softmax(dim=-1)


def expert_loads(router_outputs: torch.Tensor, counts: torch.Tensor, top_k: int) -> torch.Tensor:
    r"""How many tokens each expert gets.

    .. math:: \sum_n c_n [e \in topk(x_n)]

    Switch Transformer (arXiv:2101.03961, equation 5), for `top_k` experts a token as in transformers.

    Args:
        router_outputs: [N, E], probabilities or logits.
        counts: [N], how often each token counts: 0 for padding.
        top_k: experts a token.

    Returns:
        [E] in float64, where counts are exact; to be summed over layers, micro-batches and ranks.
    """
    chosen = router_outputs.topk(top_k, dim=-1).indices  # [N, top_k]
    is_chosen = torch.zeros_like(router_outputs, dtype=torch.float64).scatter(-1, chosen, 1.0)  # [N, E]
    return (counts.double().unsqueeze(-1) * is_chosen).sum(dim=0)


def load_balancing_losses(router_outputs: torch.Tensor, load_fracs: torch.Tensor) -> torch.Tensor:
    r"""The auxiliary loss of each token in each layer; the mean over both is the step's.

    .. math:: E \sum_e f_e\, p_e(x_n),\quad f_e = \frac{1}{N} \sum_n [e \in topk(x_n)]

    Switch Transformer (arXiv:2101.03961, equations 4 to 6) and transformers' `load_balancing_loss_func`, whose tokens
    of all layers are one batch: it is `top_k` for an even load. TRL 1.x takes the mean over the micro-batches of
    transformers' loss over prompts and completions, which depends on the split.

    Args:
        router_outputs: [N, E], with gradient.
        load_fracs: [E], `expert_loads` over the whole step divided by the number of tokens times layers, without
            gradient. They sum to `top_k`.

    Returns:
        [N]; the weight of each is 1 / (tokens of the step x layers), and 0 where the mask is.
    """
    probabilities = routing_probabilities(router_outputs)  # [N, E]
    return load_fracs.numel() * (probabilities * load_fracs.to(probabilities)).sum(dim=-1)
