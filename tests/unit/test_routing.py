"""The router's auxiliary loss in the trainer: from the modules of real architectures to the gradient of a step."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_stage.algorithm.routing import routing_probabilities
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.types import Sample, Step
from grpo_stage.update.batch import PaddedLayout
from grpo_stage.update.routing import ROUTERS, RouterLoss, routers_of

from .trainer_on_fakes import collect, gradient_of, make_trainer, relative


COEFFICIENT, TOP_K = 0.5, 2
SHAPE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "initializer_range": 0.3, "pad_token_id": 0,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["full_attention", "full_attention"],
}  # fmt: skip
ARCHITECTURES = {
    "flex_olmo": "FlexOlmoTopKRouter",
    "gpt_oss": "GptOssTopKRouter",
    "minimax": "MiniMaxTopKRouter",
    "mixtral": "MixtralTopKRouter",
    "olmoe": "OlmoeTopKRouter",
    "qwen2_moe": "Qwen2MoeTopKRouter",
    "qwen3_moe": "Qwen3MoeTopKRouter",
    "qwen3_next": "Qwen3NextTopKRouter",
    "qwen3_5_moe_text": "Qwen3_5MoeTopKRouter",
}


def a_mixture(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, num_experts=4, num_local_experts=4, **SHAPE)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


class Choices:
    """What the routers of a model choose from: the softmax of their weights times what goes into them."""

    def __init__(self, model: nn.Module) -> None:
        self.probabilities: list[torch.Tensor] = []
        for router in model.modules():
            if type(router).__name__.endswith("TopKRouter"):
                router.register_forward_pre_hook(self._note)

    def _note(self, router: Any, args: Any) -> None:
        hidden = args[0].reshape(-1, args[0].size(-1))
        logits = functional.linear(hidden, router.weight, getattr(router, "bias", None))
        self.probabilities.append(logits.float().softmax(dim=-1))


def expected_loss(model: nn.Module, samples: list[Sample]) -> torch.Tensor:
    """Each sequence on its own, unpadded, without the token that predicts no other; Switch Transformer's equations
    over the tokens of all layers."""
    choices = Choices(model)
    for sample in samples:
        model(input_ids=torch.tensor([sample.prompt.token_ids + sample.completion.token_ids]), use_cache=False)
    rows = torch.cat([each[:-1] for each in choices.probabilities])  # [N, E]
    loads = torch.zeros(rows.size(1))
    for row in rows.tolist():
        for expert in sorted(range(len(row)), key=row.__getitem__)[-TOP_K:]:
            loads[expert] += 1 / len(rows)
    return rows.size(1) * (loads * rows.mean(dim=0)).sum()


def gradient_of_expected(model: nn.Module, samples: list[Sample]) -> torch.Tensor:
    model.zero_grad()
    expected_loss(model, samples).backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_a_router_gives_is_what_it_chooses_from(model_type):
    model = a_mixture(model_type)
    routers = routers_of(model)
    assert {type(router).__name__ for router in routers} == {ARCHITECTURES[model_type]}
    assert len(routers) == 2
    loss, choices = RouterLoss(model, COEFFICIENT), Choices(model)
    with loss.recording() as outputs:
        model(input_ids=torch.arange(1, 13).view(2, 6), use_cache=False)
    model(input_ids=torch.arange(1, 4).view(1, 3), use_cache=False)
    assert len(outputs) == 2
    for ours, theirs in zip(outputs, choices.probabilities[:2], strict=True):
        torch.testing.assert_close(routing_probabilities(ours), theirs)
        assert ours.requires_grad


def test_every_known_router_is_tried():
    # Qwen3-VL's is a copy of Qwen3's in a model with images.
    assert set(ARCHITECTURES.values()) | {"Qwen3VLMoeTextTopKRouter"} == ROUTERS


@pytest.mark.parametrize("options", [{}, {"mask_truncated_completions": True}], ids=str)
def test_value_and_gradient_are_those_of_the_whole_batch(tmp_path, options):
    with_loss, without = (
        make_trainer(tmp_path, router_aux_loss_coef=coefficient, **options) for coefficient in (COEFFICIENT, 0.0)
    )
    step = collect(with_loss)[0]
    used = [sample for sample in step.samples if sample.is_used]
    assert (len(used) < len(step.samples)) == bool(options)
    theirs = COEFFICIENT * gradient_of_expected(without.model, used)
    with_loss.learner.budget.max_tokens = without.learner.budget.max_tokens = 30
    ours = gradient_of(with_loss, step) - gradient_of(without, step)
    assert theirs.norm() > 1e-2
    assert relative(ours, theirs) < 1e-4
    logged = with_loss.tracker.take()
    expected = expected_loss(without.model, used).item()
    assert logged["aux_loss"] == pytest.approx(expected, rel=1e-5)
    plain = without.tracker.take()
    assert logged["loss"] - plain["loss"] == pytest.approx(COEFFICIENT * expected, rel=1e-4)
    assert "aux_loss" not in plain


def reversed_order(step: Step) -> Step:
    return dataclasses.replace(step, samples=step.samples[::-1])


@pytest.mark.parametrize("options", [{}, {"covariance_control": "clip_cov", "covariance_frac": 0.2}], ids=str)
def test_it_does_not_depend_on_the_split_or_the_order(tmp_path, options):
    trainer = make_trainer(
        tmp_path, router_aux_loss_coef=COEFFICIENT, mask_truncated_completions=True, clip_cov_min=0.1, **options
    )
    step = collect(trainer)[0]
    trainer.learner.budget.max_tokens = 10_000
    whole = gradient_of(trainer, step)
    value = trainer.tracker.take()["aux_loss"]
    for budget, same in itertools.product((10_000, 1, 23), (step, reversed_order(step))):
        trainer.learner.budget.max_tokens = budget
        assert relative(gradient_of(trainer, same), whole) < 1e-5
        assert trainer.tracker.take()["aux_loss"] == pytest.approx(value, rel=1e-6)


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def with_lora(model: Any) -> Any:
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["gate"]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return adapted


@pytest.mark.parametrize("prepare", [lambda model: model, with_lora], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(tmp_path, prepare):
    plain, saving = (
        make_trainer(tmp_path, router_aux_loss_coef=COEFFICIENT, change_model=change)
        for change in (prepare, lambda model: checkpointed(prepare(model)))
    )
    step = collect(plain)[0]
    gradients = []
    for trainer in (plain, saving):
        trainer.learner.budget.max_tokens = 40
        trainer.learner.learn(trainer.model, step, 0)
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_under_lora_the_adapter_learns_it_and_the_router_where_it_is_trained(tmp_path):
    with_loss, without = (
        make_trainer(tmp_path, router_aux_loss_coef=coefficient, change_model=with_lora)
        for coefficient in (COEFFICIENT, 0.0)
    )
    step = collect(with_loss)[0]
    names = [name for name, p in with_loss.model.named_parameters() if p.requires_grad]
    assert any("gate" in name for name in names)
    for trainer in (with_loss, without):
        trainer.learner.learn(trainer.model, step, 0)
    without_loss = {name: p.grad.clone() for name, p in without.model.named_parameters() if p.requires_grad}
    without.model.zero_grad()
    (COEFFICIENT * expected_loss(without.model, list(step.samples))).backward()
    for name, p in with_loss.model.named_parameters():
        if p.requires_grad:
            theirs = without.model.get_parameter(name).grad
            assert theirs is not None, name
            torch.testing.assert_close(p.grad - without_loss[name], theirs, rtol=1e-3, atol=1e-6)


def test_a_dummy_micro_batch_and_a_step_of_no_tokens_add_nothing(tmp_path):
    trainer = make_trainer(tmp_path, router_aux_loss_coef=COEFFICIENT)
    loss = trainer.learner.gradient.router_loss
    step = collect(trainer)[0]
    batch = PaddedLayout(0, torch.device("cpu")).dummy()
    for samples in (step.samples, ()):
        loss.look_at_step(trainer.model, trainer.learner.frozen, samples)
        metrics = MetricTracker()
        with loss.recording() as outputs:
            trainer.model(input_ids=batch.inputs.input_ids, attention_mask=batch.inputs.attention_mask)
        assert loss.of_micro_batch(outputs, batch.inputs, metrics).item() == 0
        assert metrics.take() == {}


def test_without_a_coefficient_no_router_is_watched(tmp_path):
    trainer = make_trainer(tmp_path, router_aux_loss_coef=0.0)
    assert trainer.learner.gradient.router_loss is None
    assert not any(router._forward_hooks for router in routers_of(trainer.model))


def test_a_model_without_a_router_is_refused(tmp_path):
    dense = make_trainer(tmp_path).model
    with pytest.raises(ValueError, match=r"`moe_aux_loss_coef: 0.5`.*LlamaForCausalLM.*Leave it out"):
        RouterLoss(dense, 0.5)


def test_routers_that_are_passed_by_are_no_reason_to_go_on_without_the_loss(tmp_path):
    """As where a kernel computes the whole layer."""
    trainer = make_trainer(tmp_path, router_aux_loss_coef=COEFFICIENT)
    step = collect(trainer)[0]
    for router in routers_of(trainer.model):
        router._forward_hooks.clear()
    with pytest.raises(RuntimeError, match="`moe_aux_loss_coef`"):
        trainer.learner.learn(trainer.model, step, 0)


def test_training_evens_the_load(tmp_path):
    """Of a router that sends all tokens to two of its experts."""

    def one_sided(model: Any) -> Any:
        with torch.no_grad():
            model.model.embed_tokens.weight += 0.5
            for router in routers_of(model):
                router.weight[:2] += 0.1
        return model

    values = {}
    for coefficient in (1.0, 1e-9):
        trainer = make_trainer(
            tmp_path / str(coefficient),
            router_aux_loss_coef=coefficient,
            change_model=one_sided,
            training={"max_steps": 12},
        )
        trainer.train()
        logged = [line["aux_loss"] for line in trainer.state.log_history if "aux_loss" in line]
        assert len(logged) == 12
        values[coefficient] = logged
    assert values[1.0][0] == pytest.approx(values[1e-9][0], rel=1e-6)
    assert values[1.0][-1] < values[1e-9][-1] - 0.5
