"""Gradient checkpointing is left off where the activations fit into memory, and comes back where they do not."""

import logging
from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_stage.update import activations
from grpo_stage.update.activations import keep_activations_if_they_fit
from grpo_stage.update.attention import attention_of
from grpo_stage.update.batch import PaddedLayout, SharedPromptLayout
from grpo_stage.update.logprobs import Forward
from grpo_stage.update.token_budget import OutOfMemory, PolicyBudget

from .test_shared_prompts import SIZES, adapted, make_rows


ROWS = make_rows([(9, [12, 5]), (14, [12, 5])])
LAYOUTS = [PaddedLayout(0, torch.device("cpu")), SharedPromptLayout(0, torch.device("cpu"))]


def make_model() -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: adapted(model, target_modules="all-linear")])
@pytest.mark.parametrize(("free", "is_on"), [(1e12, False), (1e3, True)])
def test_checkpointing_is_off_just_where_a_micro_batch_fits(wrap, free, is_on, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(activations, "_free_bytes", lambda device: free)
    model = wrap(make_model())
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    switch_on = keep_activations_if_they_fit(Forward(LAYOUTS[1]), model, ROWS, 4096, nullcontext)
    assert base.is_gradient_checkpointing == is_on
    assert f"Gradient checkpointing is {'on' if is_on else 'off'}" in caplog.text
    if is_on:
        assert switch_on is None
    else:
        switch_on()
        assert base.is_gradient_checkpointing


def test_a_model_without_checkpointing_stays_as_it_is(monkeypatch):
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert keep_activations_if_they_fit(Forward(LAYOUTS[1]), model, ROWS, 4096, nullcontext) is None
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
def test_what_is_forecast_from_a_few_tokens_is_what_many_keep(layout):
    """Against the graph of a real batch, counted by tensors that only the graph holds."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    rows = make_rows([(40, [60, 50, 70]), (30, [100, 20])])
    forward = Forward(layout)
    forecast = activations._kept_bytes(forward, model, ROWS, layout.num_tokens(rows), nullcontext)
    sizes = {}
    batch = layout.tokens(rows)
    weights = {p.data_ptr() for p in model.parameters()}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
    with attention_of(model, batch.inputs.shared_prompts), hooks:
        statistics = forward.statistics(model, batch, 1.0)
    assert statistics.logprobs.requires_grad
    assert forecast == pytest.approx(sum(sizes.values()), rel=0.25)


def test_memory_that_runs_out_brings_checkpointing_back_before_micro_batches_shrink():
    budget, calls = PolicyBudget(4096, 0), []
    budget.relief = lambda: calls.append(1)
    failure = OutOfMemory(RuntimeError("CUDA out of memory."))
    budget.give_way(8, 8192, failure)
    assert (calls, budget.max_tokens) == ([], 2048), "a pass without gradient keeps no activations"
    budget.give_way(1, 700, failure, keeps_activations=True)
    assert (calls, budget.max_tokens) == ([1], 2048)
    budget.give_way(8, 2000, failure, keeps_activations=True)
    assert (calls, budget.max_tokens) == ([1], 1000)
    with pytest.raises(RuntimeError, match="nothing left to split"):
        budget.give_way(1, 700, failure)


def test_where_a_pass_cannot_be_made_again_memory_that_runs_out_ends_the_run():
    def run() -> None:
        raise RuntimeError("CUDA out of memory.")

    with pytest.raises(RuntimeError, match=r"rank 3, .* 4096 tokens.*`max_tokens_per_micro_batch: 2048`"):
        PolicyBudget(4096, 3, can_repeat=False).attempt(run)
    assert isinstance(PolicyBudget(4096, 3).attempt(run), OutOfMemory)
