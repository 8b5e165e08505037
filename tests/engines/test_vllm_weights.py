"""Whole weights in place of an adapter: what vLLM samples from is the policy's, tied output layer or not.

Faults are found as the canary finds them, as in test_vllm_delivery.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo_stage.rollout.engines import vllm_process
from grpo_stage.rollout.engines.vllm import VLLMEngine
from grpo_stage.rollout.engines.vllm_delivery import _ReloadReport
from grpo_stage.types import Prompt, SamplingSettings

from .conftest import FAULTY, SOUND, logprob_difference, randomize_adapter, vllm_engine


Measure = Callable[[], float]


@pytest.fixture(scope="module", params=["untied", "tied"])
def start(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the engine starts from: the base, or one whose output layer is its embeddings."""
    if request.param == "untied":
        return checkpoint
    folder = tmp_path_factory.mktemp("tied")
    config = LlamaConfig.from_pretrained(checkpoint, tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(start: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[VLLMEngine]:
    engine = vllm_engine(start, tokenizer, adapter=False)
    yield engine
    engine.close()


@pytest.fixture
def policy(start: Path) -> LlamaForCausalLM:
    policy = LlamaForCausalLM.from_pretrained(start).train()
    update(policy, seed=1)
    return policy


def update(policy: torch.nn.Module, seed: int) -> None:
    """Every weight far from where it was, as a long training could leave it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.fixture
def measure(
    engine: VLLMEngine, policy: LlamaForCausalLM, prompts: list[Prompt], sampling: SamplingSettings
) -> Measure:
    def measure() -> float:
        return logprob_difference(policy, engine.generate(prompts, sampling, step=1), sampling.temperature)

    return measure


def test_five_versions_far_apart_are_each_delivered(
    engine: VLLMEngine, policy: LlamaForCausalLM, measure: Measure, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    for version in range(3, 8):
        update(policy, seed=version)
        engine.sync(policy, version)
        assert measure() < SOUND
        assert {group.policy_version for group in engine.generate(prompts, sampling, step=1)} == {version}


def test_one_weight_of_each_kind_is_delivered(engine: VLLMEngine, policy: LlamaForCausalLM, measure: Measure) -> None:
    """Alone, so that no other hides it: vLLM fuses some, packs some, and shares the tied one."""
    for name in ("embed_tokens", "q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "model.norm", "lm_head"):
        matching = [parameter for own, parameter in policy.named_parameters() if name in own]
        with torch.no_grad():
            for parameter in matching:
                parameter.mul_(1.3)
        engine.sync(policy, version=1)
        assert measure() < SOUND, name


def test_an_update_that_was_not_delivered(engine: VLLMEngine, policy: LlamaForCausalLM, measure: Measure) -> None:
    """vLLM has copied the weights: the policy's next update does not reach it by itself."""
    engine.sync(policy, version=1)
    update(policy, seed=5)
    assert measure() > FAULTY


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("layers.1.mlp.down_proj", r"'model\.layers\.1\.mlp\.down_proj\.weight'"),
        ("layers.0.self_attn.k_proj", "a weight of a QKVParallelLinear"),
        ("model.norm", r"'model\.norm\.weight'"),
    ],
)
def test_a_weight_lost_on_the_way_is_named(
    lost: str, named: str, engine: VLLMEngine, policy: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would go on with the old one, or with whatever is in memory for a part of a fused one."""
    rpc = engine._llm.collective_rpc

    def lossy(method: str, kwargs: dict[str, Any]) -> Any:
        weights = ((name, tensor) for name, tensor in kwargs["weights_iterator"] if lost not in name)
        return rpc(method, kwargs={"weights_iterator": weights})

    loggers = [logging.getLogger(name) for name in _ReloadReport._LOGGERS]
    before = [(logger.level, list(logger.filters)) for logger in loggers]
    monkeypatch.setattr(engine._llm, "collective_rpc", lossy)
    with pytest.raises(RuntimeError, match=f"weights of version 2: .*{named}"):
        engine.sync(policy, version=2)
    assert [(logger.level, list(logger.filters)) for logger in loggers] == before


def test_a_vllm_whose_log_is_silent_is_an_error(engine: VLLMEngine, policy: LlamaForCausalLM) -> None:
    """Nothing would be heard of a lost weight either."""
    logging.disable()
    try:
        with pytest.raises(RuntimeError, match="weights of version 2: no layer"):
            engine.sync(policy, version=2)
    finally:
        logging.disable(logging.NOTSET)


def test_the_old_packed_output_layer(
    engine: VLLMEngine,
    policy: LlamaForCausalLM,
    measure: Measure,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's reload alone leaves it where it is tied: why `pack_tied_weights_on_cpu` is there."""
    engine.sync(policy, version=1)
    update(policy, seed=6)
    monkeypatch.setattr(vllm_process, "pack_tied_weights_on_cpu", lambda llm: None)
    engine.sync(policy, version=2)
    assert (measure() > FAULTY) == policy.config.tie_word_embeddings


def test_a_stale_prefix_cache(
    engine: VLLMEngine,
    policy: LlamaForCausalLM,
    measure: Measure,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.sync(policy, version=1)
    assert measure() < SOUND
    update(policy, seed=6)
    with monkeypatch.context() as patch:
        patch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
        engine.sync(policy, version=2)
        assert measure() > FAULTY
    engine.sync(policy, version=3)
    assert measure() < SOUND


@pytest.mark.parametrize("fault", ["reload skipped", "reload failed", "cache not reset"])
def test_a_delivery_that_failed_is_an_error_and_leaves_no_version(
    fault: str,
    engine: VLLMEngine,
    policy: LlamaForCausalLM,
    prompts: list[Prompt],
    sampling: SamplingSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the weights of version 2 do not fit")

    engine.sync(policy, version=1)
    with monkeypatch.context() as patch:
        if fault == "cache not reset":
            patch.setattr(engine._llm, "reset_prefix_cache", lambda: False)
        else:
            patch.setattr(engine._llm, "collective_rpc", fail if fault == "reload failed" else lambda *_, **__: [None])
        with pytest.raises(RuntimeError, match="version 2"):
            engine.sync(policy, version=2)
    with pytest.raises(RuntimeError, match="before sync"):
        engine.generate(prompts, sampling, step=1)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_is_delivered_in_the_weights(
    use_dora: bool, engine: VLLMEngine, policy: LlamaForCausalLM, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    """Within the bound of one that is served as an adapter, and anew at each version."""
    adapted = get_peft_model(policy, LoraConfig(r=4, target_modules="all-linear", use_dora=use_dora))
    for version in (1, 2):
        randomize_adapter(adapted, seed=version, scale=0.1)
        engine.sync(adapted, version)
        groups = engine.generate(prompts, sampling, step=version)
        assert logprob_difference(adapted, groups, sampling.temperature) < SOUND
        with adapted.disable_adapter():
            assert logprob_difference(adapted, groups, sampling.temperature) > FAULTY


def test_an_adapter_that_cannot_be_merged_is_refused(engine: VLLMEngine, policy: LlamaForCausalLM) -> None:
    """It would be lost in part, or whole."""
    for config, said in (
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules saved whole"),
        (OFTConfig(target_modules=["q_proj"], oft_block_size=4), "OFT"),
    ):
        with pytest.raises(ValueError, match=said):
            engine.sync(get_peft_model(copy.deepcopy(policy), config), version=1)


def test_the_same_requests_are_bit_equal_after_any_other(
    engine: VLLMEngine, policy: LlamaForCausalLM, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    """What an exact resume needs: nothing of an earlier rollout is left."""
    engine.sync(policy, version=1)
    first = engine.generate(prompts, sampling, step=1)
    engine.generate(prompts, replace(sampling, num_generations=1), step=2)
    engine.sync(policy, version=1)
    assert engine.generate(prompts, sampling, step=1) == first
