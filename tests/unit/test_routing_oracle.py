"""The router's auxiliary loss as loops over numbers, beside transformers' own, and over any split of a step.

Switch Transformer  arXiv:2101.03961, equations 4 to 6
"""

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from grpo_stage.algorithm import routing


E, K = 5, 2


def softmax(row: list[float]) -> list[float]:
    powers = np.exp(np.array(row) - max(row))
    return (powers / powers.sum()).tolist()


def oracle(logits: list[list[float]], top_k: int) -> float:
    """Of all tokens of all layers, one row each."""
    rows = [softmax(row) for row in logits]
    loads, chances = [0.0] * len(rows[0]), [0.0] * len(rows[0])
    for row in rows:
        for expert in sorted(range(len(row)), key=lambda e: row[e])[-top_k:]:
            loads[expert] += 1 / len(rows)
        for expert, probability in enumerate(row):
            chances[expert] += probability / len(rows)
    return len(loads) * sum(f * p for f, p in zip(loads, chances, strict=True))


def package(layers: list[torch.Tensor], mask: torch.Tensor, parts: list[list[int]], top_k: int) -> tuple[float, Any]:
    """`layers` [B, L, E] each, `mask` [B, L]; `parts` lists the rows of each micro-batch."""
    leaves = [layer.detach().requires_grad_() for layer in layers]
    loads, count = torch.zeros(E, dtype=torch.float64), 0.0
    for rows in parts:  # a first pass over the step, without gradient
        for leaf in leaves:
            own = routing.expert_loads(leaf[rows].flatten(0, 1), mask[rows].flatten(), top_k)
            loads, count = loads + own, count + mask[rows].sum().item()
    value = 0.0
    for rows in parts:
        for leaf in leaves:
            terms = routing.load_balancing_losses(leaf[rows].flatten(0, 1), loads / count)
            part = (terms * mask[rows].flatten()).sum() / count
            part.backward()
            value += part.item()
    return value, [leaf.grad for leaf in leaves]


def a_step(seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(6, 4, E, dtype=torch.float64, generator=generator) for _ in range(3)]
    mask = (torch.arange(4) < torch.tensor([4, 2, 3, 1, 4, 2]).unsqueeze(1)).double()
    return layers, mask


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_loss_is_the_papers(top_k: int) -> None:
    layers, mask = a_step()
    kept = [layer[mask.bool()].tolist() for layer in layers]
    expected = oracle([row for layer in kept for row in layer], top_k)
    for parts in ([[0, 1, 2, 3, 4, 5]], [[3, 0], [5], [1, 2, 4]], [[row] for row in range(6)]):
        assert package(layers, mask, parts, top_k)[0] == pytest.approx(expected, rel=1e-12)


def test_value_and_gradient_are_transformers() -> None:
    layers, mask = a_step(1)
    leaves = [layer.detach().requires_grad_() for layer in layers]
    theirs = load_balancing_loss_func(tuple(leaf.flatten(0, 1) for leaf in leaves), E, K, mask)
    theirs.backward()
    value, gradient = package(layers, mask, [[4, 1], [0, 2, 3, 5]], K)
    assert value == pytest.approx(theirs.item(), rel=1e-6)  # it counts in float32
    for own, leaf in zip(gradient, leaves, strict=True):
        torch.testing.assert_close(own, leaf.grad, rtol=1e-6, atol=1e-9)


def test_the_mean_over_micro_batches_is_another_number() -> None:
    # What a term must not do: add up the loss of each micro-batch, a product of two means.
    layers, mask = a_step(2)
    value, _ = package(layers, mask, [list(range(6))], K)
    halves = [
        package([layer[rows] for layer in layers], mask[rows], [[0, 1, 2]], K)[0] for rows in ([0, 1, 2], [3, 4, 5])
    ]
    assert abs(np.mean(halves) - value) > 1e-3


def test_loads_by_hand() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0], [0.0, 1.0, 5.0, 1.5, 0.0], [9.0, 8.0, 0.0, 0.0, 0.0]])
    assert routing.expert_loads(logits, torch.tensor([1.0, 1.0, 0.0]), 2).tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert routing.expert_loads(logits, torch.tensor([0.0, 0.0, 1.0]), 2).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert routing.expert_loads(logits, torch.tensor([4.0, 1.0, 1.0]), 2).tolist() == [5.0, 5.0, 1.0, 1.0, 0.0]


def test_an_even_load_has_the_lowest_loss_for_an_even_router() -> None:
    # E x sum of 1/E x K/E over E experts: K.
    terms = routing.load_balancing_losses(torch.zeros(4, E), torch.full((E,), K / E))
    torch.testing.assert_close(terms, torch.full((4,), float(K)))


def test_probabilities_are_not_taken_for_logits() -> None:
    # transformers 5 records probabilities for Mixtral and Qwen3-MoE, and logits for gpt-oss.
    logits = torch.randn(7, E, generator=torch.Generator().manual_seed(0))
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(routing.routing_probabilities(logits), probabilities)
    torch.testing.assert_close(routing.routing_probabilities(probabilities), probabilities)
    assert torch.equal(*(routing.expert_loads(each, torch.ones(7), K) for each in (logits, probabilities)))
    loads = torch.rand(E, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        routing.load_balancing_losses(probabilities, loads), routing.load_balancing_losses(logits, loads)
    )
    # In half precision, too.
    rounded = probabilities.bfloat16()
    torch.testing.assert_close(routing.routing_probabilities(rounded), rounded.float())


@pytest.mark.parametrize(
    ("rows", "are_probabilities"),
    [
        ([[0.25, 0.75], [0.0, 1.0]], True),
        ([[0.25, 0.751], [0.5, 0.5]], True),
        ([[0.25, 0.75], [0.4, 0.5]], False),
        ([[0.25, 0.765], [0.5, 0.5]], False),
        ([[0.25, 0.735], [0.5, 0.5]], False),
        ([[-1.0, 2.0], [0.5, 0.5]], False),
        ([[0.0, 0.0]], False),
    ],
    ids=str,
)
def test_probabilities_are_rows_of_shares_that_sum_to_one(rows: list[list[float]], are_probabilities: bool) -> None:
    x = torch.tensor(rows)
    assert torch.equal(routing.routing_probabilities(x), x if are_probabilities else x.softmax(-1))


def test_no_token_is_no_load() -> None:
    assert routing.expert_loads(torch.zeros(2, E), torch.zeros(2), K).tolist() == [0.0] * E
