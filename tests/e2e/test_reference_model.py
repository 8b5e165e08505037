"""`ref_model` must speak the policy's tokens."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from grpo_stage import workflow
from grpo_stage.host import reference as builder


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
    make = builder.ModelReference
    monkeypatch.setattr(builder, "ModelReference", lambda model: references.append(model) or make(model))
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


def test_what_is_copied_from_the_policy_is_on_its_device(recipe, run_exp, monkeypatch):
    """The host loads onto a GPU only with `low_cpu_mem_usage`. A device without memory stands in for one."""
    make = workflow.reference_policy

    def made(arguments, model):
        devices = {tensor.device.type for tensor in make(arguments, model).state_dict().values()}
        pytest.fail(f"copied to {devices}")

    def elsewhere(training_args):
        assert training_args._setup_devices.type == "cpu"
        return torch.device("meta")

    monkeypatch.setattr(workflow, "reference_policy", made)
    monkeypatch.setattr(TrainingArguments, "device", property(elsewhere))
    with pytest.raises(pytest.fail.Exception, match=r"copied to \{'meta'\}"):
        run_exp(recipe(finetuning_type="full", beta=0.1, low_cpu_mem_usage=False))


@pytest.mark.parametrize("finetuning_type", ["full", "lora"])
def test_a_reference_of_the_same_weights_has_no_divergence(
    recipe, run_exp, decided_model_dir, tmp_path, finetuning_type
):
    """In mixed precision, from bf16 files: the host trains float32 copies of them, beside a reference in bf16."""
    folder = shutil.copytree(decided_model_dir, tmp_path / "half")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"float32"', '"bfloat16"'))
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    same = {"model_name_or_path": str(folder), "ref_model": str(folder), "finetuning_type": finetuning_type}
    run = recipe(beta=0.1, bf16=True, max_steps=2, **same)
    run_exp(run)
    lines = [json.loads(line) for line in (Path(run["output_dir"]) / "trainer_log.jsonl").read_text().splitlines()]
    assert lines[0]["kl"] == 0.0
    assert lines[1]["sampling/slope/start"] == pytest.approx(1, abs=0.5), "the canary's test in half precision"


@pytest.fixture(scope="module")
def adapter_dir(tiny_model_dir, tmp_path_factory):
    """An adapter that changes the model."""
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    policy = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    policy.save_pretrained(folder)
    return str(folder)


STARTS = {
    "a new adapter": {},
    "OFT": {"finetuning_type": "oft"},
    "PiSSA": {"pissa_init": True},
    "a continued adapter": {"adapter_name_or_path": "{adapter}"},
    "a new adapter on a merged one": {"adapter_name_or_path": "{adapter}", "create_new_adapter": True},
    "a new PiSSA adapter on a merged one": {
        "adapter_name_or_path": "{adapter}",
        "create_new_adapter": True,
        "pissa_init": True,
    },
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "full": {"finetuning_type": "full"},
}


@pytest.mark.parametrize("start", STARTS)
def test_the_reference_is_the_policy_as_it_starts(recipe, adapter_dir, start):
    from grpo_stage.host import facade, parser

    keys = {
        key: value.format(adapter=adapter_dir) if isinstance(value, str) else value
        for key, value in STARTS[start].items()
    }
    arguments = parser.parse(recipe(beta=0.1, **keys))
    tokenizer = facade.load_tokenizer(arguments.model)["tokenizer"]
    policy = facade.load_model(tokenizer, arguments.model, arguments.finetuning, True)
    reference = builder.reference_policy(arguments, policy)
    token_ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        started = policy(token_ids).logits
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.ones_like(p))
        trained = policy(token_ids).logits
        with reference.activate(policy) as held_to:
            of_reference = held_to(token_ids).logits
        assert torch.equal(policy(token_ids).logits, trained), "the policy is itself again"
    torch.testing.assert_close(of_reference, started, rtol=0, atol=1e-6)
    assert not torch.allclose(trained, started, atol=1e-3)
