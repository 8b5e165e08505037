"""vLLM in a process of its own: what it samples, and what becomes of a request that nobody waits for."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from grpo_stage.rollout.engines.vllm_apart import VLLMApart
from grpo_stage.rollout.engines.vllm_settings import VLLMSettings
from grpo_stage.rollout.engines.weights import PolicyWeights, checkpoint_weights
from grpo_stage.types import AheadEngine, Prompt

from .conftest import LORA_RANK, MAX_MODEL_LEN, SOUND, logprob_difference, policy_logprobs


PROMPTS = [
    Prompt(index=i, token_ids=(i + 3, 9, 11), messages=({"role": "user", "content": "?"},), reference=None)
    for i in range(4)
]


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[VLLMApart]:
    settings = VLLMSettings(
        model_name_or_path=str(checkpoint),
        adapter=True,
        max_model_len=MAX_MODEL_LEN,
        max_lora_rank=LORA_RANK,
        gpu_memory_utilization=0.5,
        enforce_eager=False,
        dtype="auto",
        logprob_temperature=None,
    )
    apart = VLLMApart(settings, tokenizer, {})
    yield apart
    apart.close()


def test_it_samples_from_the_version_that_it_was_given_while_its_caller_goes_on(engine, make_policy, sampling):
    assert isinstance(engine, AheadEngine)
    first, second = make_policy(1), make_policy(2)
    engine.sync(first, 1)
    now = engine.generate(PROMPTS, sampling, step=5)
    assert engine.logprob_temperature == sampling.temperature
    assert [group.prompt for group in now] == PROMPTS
    assert {group.policy_version for group in now} == {1}
    assert now[0].completions[0].text.startswith("w"), "texts are made here"
    assert logprob_difference(first, now, sampling.temperature) < SOUND

    engine.sync(first, 1)
    engine.submit(PROMPTS, sampling, step=5)
    with pytest.raises(AssertionError, match="under way"):
        engine.sync(second, 2)
    later, seconds = engine.collect()
    assert later == now, "to the bit, texts included"
    assert seconds > 0

    engine.sync(second, 2)
    for scores, expected in zip(engine.score(now), policy_logprobs_of(second, now), strict=True):
        assert torch.allclose(scores, expected, atol=1e-4)


def policy_logprobs_of(policy, groups):
    return [logprobs for group in groups for logprobs in policy_logprobs(policy, group, 1.0)]


def test_what_nobody_waits_for_is_given_up_and_leaves_nothing(engine, make_policy, sampling):
    policy = make_policy(3)
    engine.sync(policy, 3)
    expected = engine.generate(PROMPTS, sampling, step=6)

    engine.sync(policy, 3)
    engine.submit(PROMPTS, sampling, step=7)
    engine.discard()
    engine.sync(policy, 3)
    assert engine.generate(PROMPTS, sampling, step=6) == expected

    def stop() -> None:
        raise KeyboardInterrupt

    engine.on_step = stop
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, sampling, step=8)
    engine.on_step = lambda: None
    engine.sync(policy, 3)
    assert engine.generate(PROMPTS, sampling, step=6) == expected


def test_its_own_errors_come_here_and_it_goes_on(engine, make_policy, sampling):
    engine.sync(make_policy(1), 4)
    too_long = Prompt(index=0, token_ids=(9,) * MAX_MODEL_LEN, messages=(), reference=None)
    with pytest.raises(ValueError, match="passes the engine's 512"):
        engine.generate([too_long], sampling, step=0)
    assert len(engine.generate(PROMPTS, sampling, step=0)) == len(PROMPTS)


def test_a_stop_of_the_whole_group_spares_it_and_its_end_is_said(engine, make_policy, sampling):
    """The last test of the file: the engine is gone afterwards."""
    engine.sync(make_policy(1), 5)
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGABRT, signal.SIGHUP):
        os.kill(engine._process.pid, each)
    assert len(engine.generate(PROMPTS, sampling, step=0)) == len(PROMPTS)
    engine.submit(PROMPTS, sampling, step=1)
    engine._process.kill()
    with pytest.raises(RuntimeError, match=r"has ended \(exit code -9\)"):
        engine.collect()
    with pytest.raises(RuntimeError, match="has ended"):
        engine.sync(make_policy(1), 6)


@pytest.mark.parametrize("kind", ["a whole model", "an adapter, merged"])
def test_whole_weights_arrive_as_they_are(checkpoint, make_policy, kind):
    policy = make_policy(1) if kind == "an adapter, merged" else AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = checkpoint_weights(policy, is_merged=kind == "an adapter, merged")
    with PolicyWeights(policy, is_adapter=False).written() as written:
        arrived = dict(written.tensors())
        assert written.adapted == ()
    assert not written.folder.exists()
    assert arrived.keys() == expected.keys()
    assert all(torch.equal(arrived[name], tensor) for name, tensor in expected.items())
