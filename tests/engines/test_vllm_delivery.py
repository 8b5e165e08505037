"""The adapter that vLLM samples from is the policy's, whatever it was before; and what goes wrong shows.

Faults are injected where they would happen, and found as the canary finds them: by the mean difference between the
engine's log-probabilities and transformers' own. Sound deliveries stay below SOUND, every fault is above FAULTY.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from grpo_stage.rollout.engines import weights
from grpo_stage.rollout.engines.vllm import VLLMEngine
from grpo_stage.rollout.engines.vllm_delivery import unserved_modules
from grpo_stage.rollout.engines.weights import write_adapter
from grpo_stage.types import Prompt, RolloutGroup, SamplingSettings

from .conftest import FAULTY, MAX_MODEL_LEN, SOUND, logprob_difference, randomize_adapter, vllm_engine


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[VLLMEngine]:
    engine = vllm_engine(checkpoint, tokenizer)
    yield engine
    engine.close()


@pytest.fixture
def policy(make_policy: Callable[..., PeftModel]) -> PeftModel:
    return make_policy()


@pytest.fixture
def measure(
    engine: VLLMEngine, policy: PeftModel, prompts: list[Prompt], sampling: SamplingSettings
) -> Callable[[], float]:
    def measure() -> float:
        return logprob_difference(policy, engine.generate(prompts, sampling, step=1), sampling.temperature)

    return measure


Corrupt = Callable[[Path], None]


@pytest.fixture
def deliver(engine: VLLMEngine, policy: PeftModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[Corrupt], None]:
    """Sync with something done to the adapter's files on their way."""

    def deliver(corrupt: Corrupt) -> None:
        def write(policy: PeftModel, folder: Path) -> None:
            write_adapter(policy, folder)
            corrupt(folder)

        monkeypatch.setattr(weights, "write_adapter", write)
        engine.sync(policy, version=1)

    return deliver


def edit_tensors(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Corrupt:
    def corrupt(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file)

    return corrupt


def test_three_versions_far_apart_are_each_delivered(
    engine: VLLMEngine, policy: PeftModel, measure: Callable[[], float]
) -> None:
    """With the same prompts each time, one of them nine cache blocks long."""
    for version in (3, 4, 9):
        randomize_adapter(policy, seed=version)
        engine.sync(policy, version)
        difference = measure()
        print(f"sound, version {version}: {difference:.2e}")
        assert difference < SOUND


def test_an_update_that_was_not_delivered(engine: VLLMEngine, policy: PeftModel, measure: Callable[[], float]) -> None:
    engine.sync(policy, version=1)
    randomize_adapter(policy, seed=5)
    assert measure() > FAULTY


def test_the_base_model_answering(deliver: Callable[[Corrupt], None], measure: Callable[[], float]) -> None:
    deliver(edit_tensors(lambda name, tensor: tensor * ("lora_B" not in name)))
    assert measure() > FAULTY


def test_wrong_scaling(deliver: Callable[[Corrupt], None], measure: Callable[[], float]) -> None:
    def halve_alpha(folder: Path) -> None:
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] / 2}))

    deliver(halve_alpha)
    assert measure() > FAULTY


def test_delivered_twice(deliver: Callable[[Corrupt], None], measure: Callable[[], float]) -> None:
    deliver(edit_tensors(lambda name, tensor: tensor * (2 if "lora_B" in name else 1)))
    assert measure() > FAULTY


def test_one_module_lost(deliver: Callable[[Corrupt], None], measure: Callable[[], float]) -> None:
    deliver(edit_tensors(lambda name, tensor: tensor * (not ("lora_B" in name and "layers.1.mlp.down_proj" in name))))
    assert measure() > FAULTY


@pytest.mark.parametrize(
    ("renamed", "named"),
    [
        (("model.layers", "model.text_model.layers"), "model.text_model.layers.0.mlp.down_proj, .* and 11 more"),
        (("layers.1.self_attn.k_proj", "layers.7.self_attn.k_proj"), r"to model\.layers\.7\.self_attn\.k_proj:"),
    ],
    ids=["every module", "one of a fused layer"],
)
def test_modules_that_vllm_does_not_find_are_named(
    renamed: tuple[str, str], named: str, deliver: Callable[[Corrupt], None]
) -> None:
    """It compares the last part of a name alone, and the base would answer there."""

    def rename(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({name.replace(*renamed): tensor for name, tensor in load_file(file).items()}, file)

    with pytest.raises(RuntimeError, match=f"adapter of version 1 .*{named}"):
        deliver(rename)


def test_modules_that_are_not_in_the_file_are_named(deliver: Callable[[Corrupt], None]) -> None:
    def leave_out(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor for name, tensor in load_file(file).items() if "0.self_attn.q_proj" not in name}, file)

    with pytest.raises(RuntimeError, match=r"does not apply it to model\.layers\.0\.self_attn\.q_proj:"):
        deliver(leave_out)


def test_a_vllm_that_does_not_show_its_adapter_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"model_executor.*Install vllm 0\.23\.0"):
        unserved_modules(SimpleNamespace(llm_engine=SimpleNamespace()), adapter_id=1, adapted=["lm_head"])


def test_the_temperature_not_applied(
    engine: VLLMEngine, policy: PeftModel, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    engine.sync(policy, version=1)
    groups = engine.generate(prompts, sampling, step=1)
    assert logprob_difference(policy, groups, sampling.temperature) < SOUND
    assert logprob_difference(policy, groups, 1.0) > FAULTY


def test_a_stale_prefix_cache(
    engine: VLLMEngine,
    policy: PeftModel,
    prompts: list[Prompt],
    sampling: SamplingSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM keys the cache by the adapter's name: with one name for all versions, old keys answer the long prompt.

    A new name each time and an empty cache each time: either is enough.
    """
    long = [prompt for prompt in prompts if len(prompt.token_ids) > 256]

    def difference() -> float:
        return logprob_difference(policy, engine.generate(long, sampling, step=1), sampling.temperature)

    reset = engine._llm.reset_prefix_cache
    monkeypatch.setattr(engine, "_adapter_name", lambda adapter_id: "policy")
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
    engine.sync(policy, version=1)
    difference()
    randomize_adapter(policy, seed=6)
    engine.sync(policy, version=2)
    assert difference() > FAULTY
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", reset)
    engine.sync(policy, version=3)
    assert difference() < SOUND


def test_a_prefix_cache_that_was_not_emptied_is_an_error(
    engine: VLLMEngine,
    policy: PeftModel,
    prompts: list[Prompt],
    sampling: SamplingSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="prefix cache for version 2"):
        engine.sync(policy, version=2)
    with pytest.raises(RuntimeError, match="before sync"):
        engine.generate(prompts, sampling, step=1)


def test_rank_stabilized_scaling_is_delivered(
    engine: VLLMEngine,
    make_policy: Callable[..., PeftModel],
    prompts: list[Prompt],
    sampling: SamplingSettings,
) -> None:
    """With one part of a fused layer alone."""
    policy = make_policy(use_rslora=True, r=2, target_modules=["q_proj", "down_proj"])
    engine.sync(policy, version=1)
    assert logprob_difference(policy, engine.generate(prompts, sampling, step=1), sampling.temperature) < SOUND


def test_completions_of_another_adapter_are_refused(
    engine: VLLMEngine,
    policy: PeftModel,
    prompts: list[Prompt],
    sampling: SamplingSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.sync(policy, version=1)
    generate = engine._llm.generate
    with monkeypatch.context() as patch:
        patch.setattr(
            engine._llm, "generate", lambda *args, **kwargs: generate(*args, **kwargs | {"lora_request": None})
        )
        with pytest.raises(RuntimeError, match="cannot be said to come from one policy"):
            engine.generate(prompts, sampling, step=1)
    with monkeypatch.context() as patch:
        patch.setattr(engine._llm.llm_engine, "list_loras", lambda: {99})
        with pytest.raises(RuntimeError, match="cannot be said to come from one policy"):
            engine.generate(prompts, sampling, step=1)


def test_an_adapter_that_did_not_arrive_is_an_error_and_leaves_no_old_one(
    engine: VLLMEngine,
    policy: PeftModel,
    prompts: list[Prompt],
    sampling: SamplingSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.sync(policy, version=1)
    with monkeypatch.context() as patch:
        patch.setattr(engine._llm.llm_engine, "add_lora", lambda request: True)
        with pytest.raises(RuntimeError, match="weights of version 2"):
            engine.sync(policy, version=2)
    with pytest.raises(RuntimeError, match="before sync"):
        engine.generate(prompts, sampling, step=1)


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "additional_target"),
        ({"rank_pattern": {"q_proj": 2}}, "rank of its own"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha of its own"),
        ({"r": 64}, "rank 64 is greater than max_lora_rank 8"),
    ],
)
def test_an_adapter_that_vllm_cannot_serve_is_refused_with_the_reason(
    engine: VLLMEngine, make_policy: Callable[..., PeftModel], lora: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        engine.sync(make_policy(**lora), version=1)


def test_a_policy_without_an_adapter_is_refused(engine: VLLMEngine, policy: PeftModel) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM without an adapter"):
        engine.sync(policy.get_base_model(), version=1)


def test_the_same_requests_are_bit_equal(
    engine: VLLMEngine, policy: PeftModel, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    def rollout() -> list[RolloutGroup]:
        engine.sync(policy, version=1)
        return engine.generate(prompts, sampling, step=1)

    assert rollout() == rollout()


def test_nothing_of_an_adapter_stays_on_disk(
    engine: VLLMEngine,
    policy: PeftModel,
    prompts: list[Prompt],
    sampling: SamplingSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine.sync(policy, version=1)
    assert list(tmp_path.iterdir()) == []
    engine.generate(prompts, sampling, step=1)


def test_an_adapter_is_written_as_peft_reads_it(
    policy: PeftModel, make_policy: Callable[..., PeftModel], tmp_path: Path
) -> None:
    write_adapter(policy, tmp_path)
    base = copy.deepcopy(make_policy(seed=8).unload())
    read = PeftModel.from_pretrained(base, tmp_path)
    ids = torch.arange(8, 40)[None]
    assert torch.equal(read(input_ids=ids).logits, policy(input_ids=ids).logits)


def test_a_prompt_that_leaves_no_room_is_refused(
    engine: VLLMEngine, policy: PeftModel, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    engine.sync(policy, version=1)
    with pytest.raises(ValueError, match=f"Prompt 11 has 300 tokens.*max_new_tokens 213.*{MAX_MODEL_LEN}"):
        engine.generate(prompts, replace(sampling, max_new_tokens=MAX_MODEL_LEN - 300 + 1), step=1)


def test_a_cut_distribution_needs_the_policys_own_logprobs(
    engine: VLLMEngine, policy: PeftModel, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    engine.sync(policy, version=1)
    with pytest.raises(ValueError, match=r"logprob_temperature=1\.0"):
        engine.generate(prompts, replace(sampling, top_k=3), step=1)


def test_options_that_would_make_rollouts_wrong_are_refused(
    checkpoint: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="`logprobs_mode` cannot be set in `vllm_config`"):
        vllm_engine(checkpoint, tokenizer, options={"block_size": 32, "logprobs_mode": "raw_logits"})
    with pytest.raises(AssertionError, match="rank is 513"):
        vllm_engine(checkpoint, tokenizer, max_lora_rank=513)
    with pytest.raises(AssertionError, match="sleep level 2"):
        vllm_engine(checkpoint, tokenizer, sleep_level=2)
