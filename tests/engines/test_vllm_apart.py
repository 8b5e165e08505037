"""The two ends of vLLM in a process of its own, with a vLLM that is none, in a thread: what is asked and answered.

With the real one: tests/e2e/test_rollout_ahead.py.
"""

import socket
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_stage.rollout.engines import vllm, vllm_apart, vllm_worker
from grpo_stage.rollout.engines.vllm_apart import VLLMApart
from grpo_stage.rollout.engines.weights import PolicyWeights, checkpoint_weights
from grpo_stage.types import AheadEngine, Completion, FinishReason, Prompt, RolloutGroup

from .conftest import vllm_settings


PROMPTS = [Prompt(index=i, token_ids=(i + 3, 9), messages=({"role": "user"},), reference="r") for i in range(3)]


class Vllm:
    """Answers with the step as the only token, once it may; notes what it was asked for."""

    def __init__(self, settings, tokenizer):
        assert tokenizer is None
        self.logprob_temperature = float("nan")
        self.log = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.is_asked = threading.Event()
        Vllm.running = self

    def load(self, weights, version):
        with weights.adapter() as folder:
            self.log.append((version, sorted(file.name for file in folder.iterdir()), len(weights.adapted)))
        self.version = version

    def generate(self, prompts, sampling, step):
        self.is_asked.set()
        self.log.append(f"begin {step}")
        if step < 0:
            raise ValueError("a user's mistake")
        while not self.may_answer.wait(0.005):
            self.on_step()
        self.log.append(f"end {step}")
        self.logprob_temperature = sampling.temperature
        completion = Completion(
            token_ids=(step,), sampling_logprobs=(-0.1,), finish_reason=FinishReason.LENGTH, text=""
        )
        assert all(prompt.messages == () and prompt.reference is None for prompt in prompts), "only tokens travel"
        return [
            RolloutGroup(
                prompt=prompt, completions=(completion,) * sampling.num_generations, policy_version=self.version
            )
            for prompt in prompts
        ]

    def score(self, groups):
        return [torch.tensor([float(each.token_ids[0])]) for group in groups for each in group.completions]


@pytest.fixture
def apart(monkeypatch, checkpoint, tokenizer) -> Iterator[VLLMApart]:
    ours, theirs = (Connection(each.detach()) for each in socket.socketpair())
    process = SimpleNamespace(kill=lambda: None, wait=lambda timeout=None: 0, returncode=0)
    monkeypatch.setattr(vllm, "VLLMEngine", Vllm)
    monkeypatch.setattr(vllm_apart, "_start", lambda environment: (process, ours))
    thread = threading.Thread(target=vllm_worker.serve, args=(theirs,), daemon=True)
    thread.start()
    engine = VLLMApart(vllm_settings(checkpoint), tokenizer, {})
    yield engine
    Vllm.running.may_answer.set()
    engine.close()
    thread.join(10)
    assert not thread.is_alive(), "it ends with its trainer"


def test_what_is_sampled_comes_back_with_its_prompt_text_and_version(apart, make_policy, sampling):
    assert isinstance(apart, AheadEngine)
    apart.sync(make_policy(1), 4)
    groups = apart.generate(PROMPTS, sampling, step=20)
    assert [group.prompt for group in groups] == PROMPTS
    assert {group.policy_version for group in groups} == {4}
    assert {each.text for group in groups for each in group.completions} == {"w20"}
    assert apart.logprob_temperature == sampling.temperature
    assert [scores.tolist() for scores in apart.score(groups)] == [[20.0]] * 9
    (version, files, num_adapted), *_ = Vllm.running.log
    assert (version, files) == (4, ["adapter_config.json", "adapter_model.safetensors"])
    assert num_adapted == 14


def test_the_caller_goes_on_until_it_collects(apart, make_policy, sampling):
    apart.sync(make_policy(1), 4)
    Vllm.running.may_answer.clear()
    apart.submit(PROMPTS, sampling, step=21)
    assert Vllm.running.is_asked.wait(10)
    with pytest.raises(AssertionError, match="under way"):
        apart.sync(make_policy(1), 5)
    Vllm.running.may_answer.set()
    groups, seconds = apart.collect()
    assert {each.text for group in groups for each in group.completions} == {"w21"}
    assert seconds > 0


def test_what_nobody_waits_for_is_given_up(apart, make_policy, sampling):
    policy = make_policy(1)
    apart.sync(policy, 4)
    Vllm.running.may_answer.clear()
    apart.submit(PROMPTS, sampling, step=21)
    assert Vllm.running.is_asked.wait(10)
    apart.discard()
    apart.sync(policy, 5)

    def stop() -> None:
        raise KeyboardInterrupt

    apart.on_step = stop
    with pytest.raises(KeyboardInterrupt):
        apart.generate(PROMPTS, sampling, step=22)
    apart.on_step = lambda: None
    apart.sync(policy, 6)
    Vllm.running.may_answer.set()
    apart.submit(PROMPTS, sampling, step=23)
    apart.collect()
    assert not {"end 21", "end 22"} & set(map(str, Vllm.running.log))
    apart.submit(PROMPTS, sampling, step=24)  # given up when it has been answered already
    while "end 24" not in Vllm.running.log:
        pass
    apart.discard()
    (group, *_) = apart.generate(PROMPTS, sampling, step=25)
    assert group.completions[0].text == "w25"
    assert group.policy_version == 6


def test_its_errors_come_here_and_it_goes_on(apart, make_policy, sampling):
    apart.sync(make_policy(1), 4)
    with pytest.raises(ValueError, match=r"a user's mistake\n\nIn vLLM's process:\nTraceback"):
        apart.generate(PROMPTS, sampling, step=-1)
    assert len(apart.generate(PROMPTS, sampling, step=1)) == 3


@pytest.mark.parametrize("kind", ["a whole model", "an adapter, merged"])
def test_whole_weights_arrive_as_they_are(checkpoint: Path, make_policy, kind):
    is_merged = kind == "an adapter, merged"
    policy = make_policy(1) if is_merged else AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = dict(checkpoint_weights(policy, is_merged=is_merged))
    with PolicyWeights(policy, is_adapter=False).written() as written:
        arrived = dict(written.tensors())
        assert written.adapted == ()
    assert not written.folder.exists()
    assert arrived.keys() == expected.keys()
    assert all(torch.equal(arrived[name], tensor) for name, tensor in expected.items())
