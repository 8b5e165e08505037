"""`ref_model` must speak the policy's tokens."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from grpo_stage import workflow


def test_a_reference_of_another_vocabulary_is_refused(recipe, run_exp, tiny_model_dir, tmp_path, monkeypatch):
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (other / file).unlink()
    vocabulary = {"<unk>": 0, "a": 1, " the": 2, "Ġthe": 3}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, "<unk>"))).save_pretrained(other)
    from grpo_stage.host import facade

    monkeypatch.setattr(facade, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"ref_model: .*another vocabulary"):
        run_exp(recipe(ref_model=str(other), beta=0.1))
    with pytest.raises(ValueError, match=r"ref_model: .*another vocabulary.*'<a>'"):
        run_exp(recipe(ref_model=str(tiny_model_dir), beta=0.1, add_tokens="<a>"))


def test_a_policy_from_scratch_leaves_the_reference_its_weights(recipe, run_exp, tiny_model_dir, monkeypatch):
    references = []
    make = workflow.ModelReference
    monkeypatch.setattr(workflow, "ModelReference", lambda model: references.append(model) or make(model))
    run_exp(recipe(ref_model=str(tiny_model_dir), beta=0.1, train_from_scratch=True, max_steps=1))
    (reference,) = references
    files = load_file(tiny_model_dir / "model.safetensors")
    assert all(torch.equal(tensor, files[name]) for name, tensor in reference.named_parameters())


def test_its_tokenizer_is_read_with_the_runs_access_to_hubs(recipe, run_exp, tiny_model_dir, tmp_path, monkeypatch):
    from grpo_stage.host import facade

    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    asked = {}
    load = facade.load_tokenizer

    def loaded(model_args):
        asked[model_args.model_name_or_path] = (model_args.trust_remote_code, model_args.hf_hub_token)
        return load(model_args)

    monkeypatch.setattr(facade, "load_tokenizer", loaded)
    monkeypatch.setattr(facade, "load_model", lambda *_: pytest.fail("as far as to the model"))
    with pytest.raises(pytest.fail.Exception, match="as far as to the model"):
        run_exp(recipe(ref_model=str(other), beta=0.1, trust_remote_code=True, hf_hub_token="secret"))
    assert asked[str(other)] == (True, "secret")
