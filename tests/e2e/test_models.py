"""What a run is refused for by its models' files, its tokenizer and its prompts, before weights are loaded."""

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM


@pytest.fixture
def before_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_stage.host import facade

    monkeypatch.setattr(facade, "load_model", lambda *_: pytest.fail("the model was loaded"))


def adapter_on(path: Path, target_modules: list[str]) -> str:
    """A folder that LoRA training could have written, less its weights."""
    LoraConfig(target_modules=target_modules, task_type="CAUSAL_LM").save_pretrained(path)
    return str(path)


@pytest.mark.usefixtures("before_the_model")
def test_lora_on_a_tied_output_layer_or_embedding_is_refused(
    recipe, run_exp, tiny_model_dir, decided_model_dir, tmp_path
):
    on_head = adapter_on(tmp_path / "head", ["q_proj", "lm_head"])
    plain = adapter_on(tmp_path / "plain", ["q_proj"])
    reference = {"beta": 0.1, "ref_model": str(tiny_model_dir), "ref_model_adapters": on_head}
    for keys, source in (
        ({"lora_target": "q_proj,lm_head"}, "lora_target: q_proj,lm_head"),
        ({"lora_target": "embed_tokens"}, "lora_target: embed_tokens"),
        ({"finetuning_type": "oft", "lora_target": "lm_head"}, "lora_target: lm_head"),
        ({"adapter_name_or_path": on_head}, f"adapter_name_or_path: {on_head}"),
        ({"adapter_name_or_path": on_head, "create_new_adapter": True}, f"adapter_name_or_path: {on_head}"),
        ({"adapter_name_or_path": f"{on_head},{plain}"}, f"adapter_name_or_path: {on_head}"),
        (reference, f"ref_model_adapters: {on_head}"),
    ):
        with pytest.raises(ValueError, match="share one weight") as error:
            run_exp(recipe(**keys))
        assert f"`{source}` is not possible" in str(error.value)
    for keys in (
        {"lora_target": "all"},
        {"lora_target": "q_proj,lm_head", "model_name_or_path": str(decided_model_dir)},  # weights of their own
        {"lora_target": "q_proj", "additional_target": "embed_tokens,lm_head"},
        {"adapter_name_or_path": plain},
        reference | {"ref_model_quantization_bit": 4},
    ):
        with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
            run_exp(recipe(**keys))


def test_what_no_config_told_of_is_refused_before_training(recipe, run_exp, monkeypatch):
    from grpo_stage import workflow

    monkeypatch.setattr(workflow, "refuse_tied_adapters", lambda _: None)
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


@pytest.mark.usefixtures("before_the_model")
def test_tokens_that_the_model_has_no_embedding_for_are_refused(recipe, run_exp, tiny_model_dir):
    ...
