"""What every rollout engine promises (`grpo_stage.types.RolloutEngine`), asked of each of them alike."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from grpo_stage.rollout.engines.hf import HFEngine, _prefilled
from grpo_stage.rollout.engines.vllm import VLLMEngine
from grpo_stage.types import FinishReason, Prompt, RolloutEngine, RolloutGroup, SamplingSettings

from .conftest import MAX_MODEL_LEN, STOPS, logprob_difference, policy_logprobs, vllm_engine


@pytest.fixture(scope="module", params=["hf", "vllm"])
def unsynced(
    request: pytest.FixtureRequest, checkpoint: Path, tokenizer: PreTrainedTokenizerFast
) -> Iterator[RolloutEngine]:
    engine = HFEngine(tokenizer) if request.param == "hf" else vllm_engine(checkpoint, tokenizer)
    yield engine
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="before sync"):
        engine.generate([], SamplingSettings(num_generations=2, max_new_tokens=1, temperature=1.0), step=0)


@pytest.fixture(scope="module")
def policy(make_policy: Callable[..., PeftModel]) -> PeftModel:
    return make_policy()


@pytest.fixture(scope="module")
def engine(unsynced: RolloutEngine, policy: PeftModel) -> RolloutEngine:
    with pytest.raises(RuntimeError, match="before sync"):
        unsynced.generate([], SamplingSettings(num_generations=2, max_new_tokens=1, temperature=1.0), step=0)
    with pytest.raises(RuntimeError, match="before sync"):
        unsynced.score([])
    unsynced.sync(policy, version=7)
    return unsynced


def tokens(groups: list[RolloutGroup]) -> dict[int, list[tuple[int, ...]]]:
    return {group.prompt.index: [completion.token_ids for completion in group.completions] for group in groups}


def _seed_all() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def test_is_a_rollout_engine(engine: RolloutEngine) -> None:
    assert isinstance(engine, RolloutEngine)


def test_answers_in_order_with_the_asked_number_of_completions(
    engine: RolloutEngine, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    groups = engine.generate(prompts[::-1], sampling, step=1)
    assert [group.prompt for group in groups] == prompts[::-1]
    assert [len(group.completions) for group in groups] == [3] * len(prompts)
    assert {group.policy_version for group in groups} == {7}
    for group in groups:
        for completion in group.completions:
            assert 1 <= len(completion.token_ids) <= sampling.max_new_tokens
            assert len(completion.sampling_logprobs) == len(completion.token_ids)
            assert all(logprob <= 0 for logprob in completion.sampling_logprobs)


def test_every_stop_token_ends_a_completion_and_belongs_to_it(
    engine: RolloutEngine, prompts: list[Prompt], sampling: SamplingSettings, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Some forty stop tokens, so that most completions meet one; the checkpoint's own end token, 5, is none."""
    stops = (*range(20, 60), 2)
    sampling = replace(sampling, num_generations=16, max_new_tokens=40, stop_token_ids=stops)
    completions = [c for group in engine.generate(prompts, sampling, step=2) for c in group.completions]
    stopped = [c for c in completions if c.finish_reason is FinishReason.STOP]
    assert len({c.token_ids[-1] for c in stopped}) > 5
    for completion in completions:
        assert not set(completion.token_ids[:-1]) & set(stops)
        assert (completion.token_ids[-1] in stops) == (completion.finish_reason is FinishReason.STOP)
        if completion.finish_reason is FinishReason.LENGTH:
            assert len(completion.token_ids) == sampling.max_new_tokens
        ended = completion.finish_reason is FinishReason.STOP
        words = tokenizer.convert_ids_to_tokens(completion.token_ids[:-1] if ended else completion.token_ids)
        assert completion.text.split() == words, "special tokens included, without the end token"
    assert any("<bos>" in c.text or "<pad>" in c.text for c in completions)


def test_without_stop_tokens_every_completion_runs_to_the_limit(
    engine: RolloutEngine, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    sampling = replace(sampling, num_generations=24, max_new_tokens=24, stop_token_ids=())
    completions = [c for group in engine.generate(prompts, sampling, step=2) for c in group.completions]
    assert {(len(c.token_ids), c.finish_reason) for c in completions} == {(24, FinishReason.LENGTH)}
    assert any(5 in c.token_ids for c in completions), "the checkpoint's own end token was never sampled"


def test_a_stop_token_at_the_limit_is_a_stop(
    engine: RolloutEngine, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    one = replace(sampling, num_generations=8, max_new_tokens=1, stop_token_ids=tuple(range(128)))
    for group in engine.generate(prompts, one, step=2):
        for completion in group.completions:
            expected = FinishReason.STOP if completion.token_ids[0] < 128 else FinishReason.LENGTH
            assert completion.finish_reason is expected


def test_seeds_reproduce_and_do_not_depend_on_the_other_prompts(
    engine: RolloutEngine, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    together = tokens(engine.generate(prompts, sampling, step=3))
    assert tokens(engine.generate(prompts, sampling, step=3)) == together
    for prompt in prompts:
        assert tokens(engine.generate([prompt], sampling, step=3)) == {prompt.index: together[prompt.index]}
    fewer = engine.generate(prompts, replace(sampling, num_generations=2), step=3)
    assert tokens(fewer) == {index: completions[:2] for index, completions in together.items()}


def test_samples_steps_prompts_and_runs_differ(
    engine: RolloutEngine, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    here = tokens(engine.generate(prompts[:1], sampling, step=3))[10]
    assert len(set(here)) == sampling.num_generations
    assert tokens(engine.generate(prompts[:1], sampling, step=4))[10] != here
    assert tokens(engine.generate(prompts[:1], replace(sampling, seed=43), step=3))[10] != here
    assert tokens(engine.generate([replace(prompts[0], index=11)], sampling, step=3))[11] != here


def test_logprobs_are_the_policys_at_the_sampling_temperature(
    engine: RolloutEngine, policy: PeftModel, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    for temperature in (0.7, 1.0, 1.3):
        groups = engine.generate(prompts, replace(sampling, temperature=temperature), step=5)
        assert engine.logprob_temperature == temperature
        assert logprob_difference(policy, groups, temperature) < 1e-4


def test_draws_from_the_distribution_it_reports(
    engine: RolloutEngine, policy: PeftModel, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    """First tokens of 2,000 completions against the policy's probabilities: as far apart as chance would have it."""
    draws = 2000
    one = replace(sampling, num_generations=draws, max_new_tokens=1)
    (group,) = engine.generate(prompts[:1], one, step=6)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in group.completions]), minlength=256)
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([prompts[0].token_ids])).logits[0, -1]
    expected = torch.softmax(logits.double() / one.temperature, dim=-1)
    by_chance = (2 * expected * (1 - expected) / (torch.pi * draws)).sqrt().sum() / 2
    assert (counts / draws - expected).abs().sum() / 2 < 1.3 * by_chance


def test_generate_and_sync_touch_neither_random_states_nor_the_policys_modes(
    engine: RolloutEngine, policy: PeftModel, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    policy.get_submodule("base_model.model.model.layers.1").eval()
    modes = [module.training for module in policy.modules()]
    assert True in modes
    assert False in modes
    base = policy.get_base_model()
    generation_config, before = base.generation_config, base.generation_config.to_dict()
    weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    _seed_all()
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    _seed_all()
    engine.sync(policy, version=7)
    engine.generate(prompts, sampling, step=7)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert [module.training for module in policy.modules()] == modes
    assert base.generation_config is generation_config
    assert base.generation_config.to_dict() == before
    assert torch.is_grad_enabled()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in policy.state_dict().items())
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in policy.named_parameters())
    policy.train()


def test_new_weights_and_their_version_are_used_after_sync(
    engine: RolloutEngine,
    make_policy: Callable[..., PeftModel],
    policy: PeftModel,
    prompts: list[Prompt],
    sampling: SamplingSettings,
) -> None:
    other = make_policy(seed=2)
    old = engine.generate(prompts, sampling, step=8)
    engine.sync(other, version=8)
    new = engine.generate(prompts, sampling, step=8)
    engine.sync(policy, version=9)
    back = engine.generate(prompts, sampling, step=8)
    assert [{g.policy_version for g in groups} for groups in (old, new, back)] == [{7}, {8}, {9}]
    assert tokens(new) != tokens(old)
    assert tokens(back) == tokens(old)
    engine.sync(policy, version=7)


def test_stops_are_those_of_the_call(engine: RolloutEngine, prompts: list[Prompt], sampling: SamplingSettings) -> None:
    assert sampling.stop_token_ids == STOPS
    for group in engine.generate(prompts, replace(sampling, num_generations=64), step=9):
        ends = {c.token_ids[-1] for c in group.completions if c.finish_reason is FinishReason.STOP}
        assert ends <= set(STOPS)


def test_no_prompts_no_groups_and_no_scores(engine: RolloutEngine, sampling: SamplingSettings) -> None:
    assert engine.generate([], sampling, step=10) == []
    assert engine.score([]) == []


def test_a_conversation_that_has_used_its_room_fits(engine: RolloutEngine, sampling: SamplingSettings) -> None:
    """Each goes on for as many tokens as it has left, in one call with others (`rollout.episodes`)."""
    long = Prompt(
        index=0, token_ids=tuple(3 + i % 200 for i in range(MAX_MODEL_LEN - 3)), messages=(), reference=None, room=3
    )
    short = replace(long, index=1, token_ids=long.token_ids[:9], room=11)
    settings = replace(sampling, num_generations=1, max_new_tokens=20, stop_token_ids=())
    groups = engine.generate([long, short], settings, step=0)
    for group, room in zip(groups, (3, 11), strict=True):
        (completion,) = group.completions
        assert room <= len(completion.token_ids) <= 20  # what is beyond the room is cut by whoever asked
        if isinstance(engine, VLLMEngine):
            assert len(completion.token_ids) == room


def test_what_is_raised_between_two_steps_ends_the_rollout_and_leaves_nothing_of_it(
    engine: RolloutEngine, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    class Stopped(Exception):
        pass

    def stop_at_third() -> None:
        steps.append(1)
        if len(steps) == 3:
            raise Stopped

    steps: list[int] = []
    sampling = replace(sampling, stop_token_ids=())
    expected = tokens(engine.generate(prompts, sampling, step=11))
    engine.on_step = stop_at_third
    try:
        with pytest.raises(Stopped):
            engine.generate(prompts, sampling, step=11)
    finally:
        engine.on_step = lambda: None
    assert len(steps) == 3
    assert tokens(engine.generate(prompts, sampling, step=11)) == expected


def test_a_temperature_of_zero_takes_the_most_probable_token(
    engine: RolloutEngine, policy: PeftModel, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    """With the policy's own log-probabilities, since those at temperature 0 say nothing."""
    groups = engine.generate(prompts, replace(sampling, num_generations=1, temperature=0.0), step=12)
    assert engine.logprob_temperature == 1.0
    assert logprob_difference(policy, groups, 1.0) < 1e-4
    for group in groups:
        (completion,) = group.completions
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([group.prompt.token_ids])).logits[0, -1]
        assert completion.token_ids[0] == logits.argmax()


def test_sleeping_until_the_next_sync_changes_nothing(
    engine: RolloutEngine, policy: PeftModel, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    expected = tokens(engine.generate(prompts, sampling, step=13))
    engine.sleep()
    engine.sync(policy, version=7)
    assert tokens(engine.generate(prompts, sampling, step=13)) == expected


def test_scores_are_the_policys_at_temperature_1_and_change_nothing(
    engine: RolloutEngine, policy: PeftModel, prompts: list[Prompt], sampling: SamplingSettings
) -> None:
    groups = engine.generate(prompts, sampling, step=6)
    _seed_all()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    scores = engine.score(groups)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    expected = [each for group in groups for each in policy_logprobs(policy, group, 1.0)]
    for ours, theirs in zip(scores, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert tokens(engine.generate(prompts, sampling, step=6)) == tokens(groups)


def test_a_model_that_shifts_positions_by_what_it_saw_last_is_not_prefilled(tiny_model_dir):
    """Qwen2.5-VL and Qwen3-VL add the `rope_deltas` of the previous call, of another batch, to a filled cache's."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    prompts = [Prompt(index=0, token_ids=(5, 6, 7), messages=(), reference=None)] * 2
    assert _prefilled(model, prompts).get_seq_length() == 2
    model.base_model.rope_deltas = None
    assert _prefilled(model, prompts) is None
