"""Runs whose models' weights are shared by two layers, lack a token of the template, or are a mixture's."""

import json
import logging

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from .conftest import trainer_log


def test_what_is_told_by_small_files_is_refused_before_the_model_is_loaded(recipe, run_exp, monkeypatch):
    from grpo_stage.host import facade

    monkeypatch.setattr(facade, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"`lora_target: q_proj,lm_head` is not possible.*share one weight"):
        run_exp(recipe(lora_target="q_proj,lm_head"))
    with pytest.raises(ValueError, match=r"`template: gemma`.*'<end_of_turn>'.*`resize_vocab: true`"):
        run_exp(recipe(template="gemma"))


def test_an_adapter_that_no_config_told_of_is_refused_before_training(recipe, run_exp, monkeypatch):
    from grpo_stage import workflow
    from grpo_stage.host import inputs

    monkeypatch.setattr(inputs, "refuse_tied_adapters", lambda _: None)
    monkeypatch.setattr(workflow, "GRPOTrainer", lambda **_: pytest.fail("it was to be trained"))
    with pytest.raises(ValueError, match=r"`lora_target: lm_head` is not possible.*share one weight"):
        run_exp(recipe(lora_target="lm_head"))


def test_tied_layers_trained_whole_are_exported_as_trained_with_the_config_that_is_asked_for(
    recipe, run_exp, tiny_model_dir, tmp_path, caplog
):
    from llamafactory.train.tuner import export_model

    keys = {"lora_target": "q_proj", "additional_target": "embed_tokens,lm_head", "learning_rate": 1e-2}
    with caplog.at_level(logging.WARNING):
        run_exp(recipe(**keys))
    assert '"tie_word_embeddings": false' in caplog.text
    output_dir, exported = recipe()["output_dir"], tmp_path / "exported"
    infer = {key: recipe()[key] for key in ("model_name_or_path", "template", "finetuning_type")}
    export_model({**infer, "adapter_name_or_path": output_dir, "export_dir": str(exported), "export_device": "cpu"})
    config = json.loads((exported / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    (exported / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    ids = torch.arange(100, 140).unsqueeze(0)
    with torch.no_grad():
        before = base(input_ids=ids).logits
        trained = PeftModel.from_pretrained(base, output_dir)(input_ids=ids).logits
        assert (trained - before).abs().max() > 0.01
        model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
        assert torch.allclose(model(input_ids=ids).logits, trained, atol=1e-4)


@pytest.fixture(scope="module")
def one_sided_mixture_dir(short_tokenizer_dir, tmp_path_factory):
    """Two layers of four experts, of which two get nearly all tokens; its config asks for transformers' own loss."""
    folder = tmp_path_factory.mktemp("tiny-mixture")
    tokenizer = AutoTokenizer.from_pretrained(short_tokenizer_dir)
    special_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, max_position_embeddings=512,
        output_router_logits=True, **special_ids,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.05
        for layer in model.model.layers:
            layer.mlp.gate.weight *= 10
            layer.mlp.gate.weight[:2] += 0.3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def highest_load(folder):
    """The share of the choices that the most popular expert gets, over the layers; even is 1/4."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chosen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, args, output: chosen.append(output[2].flatten()))
    with torch.no_grad():
        model(input_ids=torch.arange(100, 164).unsqueeze(0))
    return (torch.bincount(torch.cat(chosen), minlength=4) / len(torch.cat(chosen))).max().item()


def test_the_routers_loss_evens_the_load_of_a_mixture(recipe, run_exp, one_sided_mixture_dir, tmp_path):
    loads = {}
    for name, keys in (
        ("with", {"moe_aux_loss_coef": 1.0, "disable_gradient_checkpointing": False, "use_reentrant_gc": False}),
        ("hardly", {"moe_aux_loss_coef": 1e-9}),
        ("without", {"max_steps": 1}),
    ):
        folder = tmp_path / name
        run_exp(
            recipe(
                model_name_or_path=str(one_sided_mixture_dir),
                finetuning_type="full",
                max_tokens_per_micro_batch=200,
                output_dir=str(folder),
                **{"max_steps": 8, **keys},
            )
        )
        loads[name] = highest_load(folder), [line["aux_loss"] for line in trainer_log(folder) if "aux_loss" in line]
        assert json.loads((folder / "config.json").read_text())["output_router_logits"] is False
    (even, losses), (uneven, others), (_, none) = loads.values()
    assert len(losses) == len(others) == 8
    assert none == []
    assert losses[0] == pytest.approx(others[0], rel=1e-5)
    assert losses[-1] < others[-1] - 0.1
    assert even < uneven - 0.03


def test_a_loss_on_routers_of_a_dense_model_is_refused_before_the_model_is_loaded(recipe, run_exp, monkeypatch):
    from grpo_stage.host import facade

    monkeypatch.setattr(facade, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"`moe_aux_loss_coef: 0.001` is not possible.*no router.*Leave it out"):
        run_exp(recipe(moe_aux_loss_coef=0.001))
