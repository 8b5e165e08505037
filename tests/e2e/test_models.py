"""Runs whose models' weights are shared by two layers, or lack a token of the template."""

import json
import logging

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


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
