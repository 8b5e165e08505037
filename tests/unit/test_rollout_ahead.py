"""`rollout_ahead`: what is sampled when, from which weights, what is learned from it, and how such a run goes on."""

import dataclasses
import json
import os
import re
import signal

import pytest
import torch

from grpo_stage.arguments import GRPOArguments
from grpo_stage.monitors.canary import StaleRolloutError
from grpo_stage.rollout.engines.vllm_apart import device_environment
from grpo_stage.survival.stop import StopRequested
from grpo_stage.survival.watchdog import HangError
from grpo_stage.update.reference import InitialWeightsReference

from .test_survival import strike, untimed
from .trainer_on_fakes import (
    FakeEngine,
    LengthRewards,
    ScoringEngine,
    gradient_of,
    make_trainer,
    outputs_of_two_ranks,
    relative,
    watch_steps,
)


class Ahead:
    """For a fake engine: it answers when it is asked to collect."""

    under_way = error = None

    def sync(self, policy, version):
        assert self.under_way is None
        super().sync(policy, version)

    def submit(self, prompts, sampling, step):
        assert self.under_way is None
        self.under_way = prompts, sampling, step

    def collect(self):
        request, self.under_way = self.under_way, None
        if self.error is not None:
            raise self.error
        return self.generate(*request), 1.5

    def discard(self):
        self.under_way = None


class PlainAheadEngine(Ahead, FakeEngine):
    def score(self, groups):
        raise NotImplementedError


class AheadEngine(Ahead, ScoringEngine):
    """Its log-probabilities are those of the weights that it was given at the last sync."""

    def __init__(self, backlog=0, num_behind=0) -> None:
        super().__init__(backlog)
        self.num_behind = num_behind
        self.events = []

    def submit(self, prompts, sampling, step):
        self.events.append(("submit", step))
        super().submit(prompts, sampling, step)

    def generate(self, prompts, sampling, step):
        assert self.under_way is None
        self.events.append(("generate", step))
        groups = super().generate(prompts, sampling, step)
        scores = iter(self.score(groups))
        return [
            dataclasses.replace(
                group,
                policy_version=group.policy_version - (self.num_behind if step > 1 else 0),
                completions=tuple(
                    dataclasses.replace(each, sampling_logprobs=tuple(next(scores).tolist()))
                    for each in group.completions
                ),
            )
            for group in groups
        ]


def make(tmp_path, engine=None, training=None, rollout_ahead=1, **options):
    training = {"num_train_epochs": 2, **(training or {})}
    return make_trainer(
        tmp_path, engine=engine or AheadEngine(), training=training, rollout_ahead=rollout_ahead, **options
    )


def versions_of_steps(trainer):
    """Filled as the run goes on: of each step the versions that its samples come from."""
    seen = []
    watch_steps(trainer, lambda step: seen.append(sorted({sample.policy_version for sample in step.samples})))
    return seen


def test_each_step_but_the_first_trains_on_what_the_policy_before_has_sampled(tmp_path):
    runs = {ahead: make(tmp_path / str(ahead), rollout_ahead=ahead) for ahead in (0, 1)}
    seen = {0: [], 1: []}
    for ahead, trainer in runs.items():
        events = trainer.engine.events
        watch_steps(
            trainer,
            lambda step, seen=seen[ahead], events=events: (
                seen.append({sample.policy_version for sample in step.samples}),
                events.append("learn"),
            ),
        )
        trainer.train()
    assert seen[0] == [{0}, {1}, {2}, {3}, {4}, {5}]
    assert seen[1] == [{0}, {0}, {1}, {2}, {3}, {4}]
    assert runs[0].engine.asked == runs[1].engine.asked, "the same prompts in the same order, with the same seeds"
    # One is always under way while the policy learns, and none is sampled that no step would train on.
    assert runs[1].engine.events == [
        *(("generate", 0), ("submit", 1), "learn"),
        *(each for k in range(1, 5) for each in (("generate", k), ("submit", k + 1), "learn")),
        *(("generate", 5), "learn"),
    ]
    lines = [line for line in runs[1].state.log_history if "loss" in line]
    assert [line["rollout_ahead/steps_behind"] for line in lines] == [0, 1, 1, 1, 1, 1]
    assert [line["rollout_ahead/engine_time"] for line in lines][1:] == [1.5] * 5


def second_step(tmp_path, **options):
    """The trainer before its second step, with a policy that one update has moved, and that step."""
    trainer = make(tmp_path, **options)
    trainer.state.max_steps = 9
    trainer.collector.collect(trainer.state)
    trainer.collector.queue.drop_first()
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    trainer.state.global_step = 1
    trainer.collector.collect(trainer.state)
    return trainer, trainer.collector.queue.first()


def by_hand(trainer, step, weight):
    """The gradient of -weight(pi / mu, A) A log pi, summed over tokens and divided by their number."""
    trainer.model.zero_grad()
    num_tokens = sum(len(sample.completion.token_ids) for sample in step.samples)
    weights = []
    for sample in step.samples:
        prompt_ids, token_ids = sample.prompt.token_ids, sample.completion.token_ids
        logprobs = torch.log_softmax(trainer.model(torch.tensor([prompt_ids + token_ids])).logits[0], dim=-1)
        for t, token in enumerate(token_ids):
            logprob = logprobs[len(prompt_ids) + t - 1, token]
            ratio = (logprob.detach() - sample.completion.sampling_logprobs[t]).exp().item()
            weights.append(weight(ratio, sample.advantage))
            (-weights[-1] * sample.advantage * logprob / num_tokens).backward(retain_graph=True)
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()]), weights


def clipped(ratio, advantage):
    """What PPO's clip at 0.2 leaves of the ratio to the policy that sampled (arXiv:1707.06347, equation 7)."""
    return 0.0 if (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8) else ratio


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({}, clipped),
        # Decoupled (arXiv:2110.00641): the clip is about the present policy, and so at 1; the weight is truncated.
        ({"rollout_correction": "token", "rollout_correction_max": 1.1}, lambda ratio, _: min(ratio, 1.1)),
        ({"loss_type": "gpg", "rollout_correction": "token"}, lambda ratio, _: min(ratio, 2.0)),
    ],
)
def test_the_gradient_is_weighed_from_the_policy_that_sampled_to_the_present_one(tmp_path, options, weight):
    trainer, step = second_step(tmp_path, **options)
    assert {sample.policy_version for sample in step.samples} == {0}
    gradient = gradient_of(trainer, step)
    expected, weights = by_hand(trainer, step, weight)
    assert max(weights) > 1.05
    assert min(weights) < 0.95
    assert relative(gradient, expected) < 1e-4


def test_a_kl_in_the_reward_is_that_of_the_policy_that_sampled(tmp_path):
    options = {"beta": 0.5, "kl_in_reward": True, "kl_estimator": "k1", "scale_rewards": "none"}
    _, step = second_step(tmp_path, reference=InitialWeightsReference, **options)
    # It was the reference itself, so that there is no penalty, and the ratio stays that to it.
    for sample in step.samples:
        assert torch.equal(sample.old_logprobs, torch.tensor(sample.completion.sampling_logprobs))
    rewards = torch.tensor([sample.total_reward for sample in step.samples]).view(2, 4)
    advantages = torch.tensor([sample.advantage for sample in step.samples]).view(2, 4)
    assert torch.allclose(advantages, rewards - rewards.mean(dim=1, keepdim=True), atol=1e-5)


def interrupt_collecting(trainer, at_step):
    """A stop while the rollout of a step is waited for: it is part of what is saved."""
    collect = trainer.engine.collect

    def interrupted():
        if trainer.state.global_step == at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return collect()

    trainer.engine.collect = interrupted


RUN = {"num_train_epochs": 1.5, "eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.parametrize(("where", "at_step"), [("rollout", 1), ("reward", 2), ("update", 2)])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path, where, at_step):
    def make_here(name):
        return make(tmp_path / name, training=RUN, num_eval_prompts=2, tests_slope=True, max_tokens_per_micro_batch=10)

    whole, stopped = make_here("whole"), make_here("stopped")
    whole.train()
    if where == "rollout":
        interrupt_collecting(stopped, at_step)
    else:
        strike(stopped, where, at_step)
    with pytest.raises(StopRequested) as request:
        stopped.train()
    assert request.value.checkpoint == str(tmp_path / "stopped" / f"checkpoint-{at_step}")
    resumed = make_here("stopped")
    resumed.train(resume_from_checkpoint=request.value.checkpoint)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    mine, reference = untimed(resumed.state.log_history), untimed(whole.state.log_history)
    for line in (*mine, *reference):
        line.pop("train_loss", None)
        line.pop("rollout_ahead/engine_time", None)
    assert mine == reference
    assert any("sampling/slope/previous" in line for line in mine)


def hang_at_step_2(trainer):
    """The engine does not answer with the rollout that is due at the third step."""
    watch_steps(
        trainer,
        lambda step: setattr(
            trainer.engine, "error", HangError("too long") if trainer.state.global_step == 1 else None
        ),
    )


@pytest.mark.parametrize("where", ["before a save", "in the step"])
def test_a_rollout_that_is_lost_is_sampled_anew_from_the_present_policy(tmp_path, where):
    saves = {"save_strategy": "steps", "save_steps": 2} if where == "before a save" else {}
    stopped, seen = make(tmp_path, training=saves), []
    hang_at_step_2(stopped)
    if saves:  # the run goes on
        stopped.train()
    else:
        with pytest.raises(HangError, match="too long"):
            stopped.train()
    resumed = make(tmp_path)
    watch_steps(resumed, seen.append)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [{sample.policy_version for sample in step.samples} for step in seen] == [{2}, {2}, {3}, {4}]
    whole = make(tmp_path / "whole")
    whole.train()
    assert resumed.engine.asked == whole.engine.asked[2:], "no prompt is left out"
    if saves:
        for ours, theirs in zip(stopped.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_two_ranks_each_have_an_engine_that_samples_ahead(host_processes, tmp_path):
    """One of them has no prompt in the last step of an epoch; and both go on from what theirs had sampled."""
    code = f"""
import json, torch
from pathlib import Path
from tests.unit.test_rollout_ahead import AheadEngine, make, versions_of_steps

SETTINGS = {{"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2}}
folder = Path({str(tmp_path)!r})
trainer = make(folder, AheadEngine(), SETTINGS)
versions = versions_of_steps(trainer)
trainer.train()
resumed = make(folder, AheadEngine(), SETTINGS)
resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
weights = [torch.cat([p.detach().flatten() for p in each.model.parameters()]) for each in (trainer, resumed)]
print("result", json.dumps({{"asked": trainer.engine.asked, "versions": versions,
    "same": torch.equal(*weights), "sum": weights[0].double().sum().item()}}))
"""
    two = [
        json.loads(output.split("result ")[1].splitlines()[0])
        for output in outputs_of_two_ranks(host_processes, code, tmp_path)
    ]
    one = make(tmp_path / "one")
    one.train()
    for (step, whole), (_, first), (_, second) in zip(one.engine.asked, two[0]["asked"], two[1]["asked"], strict=True):
        assert (first, second) == (whole[::2], whole[1::2]), step
    assert two[0]["versions"] == [[0], [0], [1], [2], [3], [4]]
    assert two[1]["versions"] == [[0], [0], [], [2], [3], []]
    assert all(each["same"] for each in two)
    assert two[0]["sum"] == two[1]["sum"]


def test_completions_that_are_older_than_one_update_end_the_run(tmp_path):
    with pytest.raises(StaleRolloutError, match="version -1, but the trainer is at version 2, and they have to come"):
        make(tmp_path, engine=AheadEngine(num_behind=2)).train()


@pytest.mark.parametrize(
    ("canary", "message"),
    [
        ({"tests_slope": True}, "does not follow the policy"),
        ({"bound": 2e-4}, "differ by .* nats on average"),
    ],
)
def test_an_engine_that_did_not_get_the_update_ends_the_run(tmp_path, canary, message):
    """Completions of the version before say nothing of the present one: the engine is asked after each sync."""
    sound = make(tmp_path / "sound", **canary)
    sound.train()
    assert any("sampling/slope/previous" in line for line in sound.state.log_history) == ("tests_slope" in canary)
    with pytest.raises(StaleRolloutError, match=message) as error:
        make(tmp_path / "stale", engine=AheadEngine(backlog=1), **canary).train()
    assert "tests_slope" in canary or error.traceback[-2].path.name == "canary.py", "found after the sync"


def test_what_an_earlier_trainer_has_left_under_way_is_given_up(tmp_path):
    """As in a recovery, whose attempts share the engine."""
    engine = AheadEngine()
    first = make(tmp_path, engine=engine, rewards=LengthRewards())
    first.state.max_steps = 9
    first.collector.collect(first.state)
    assert engine.under_way is not None
    make(tmp_path, engine=engine)
    assert engine.under_way is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dynamic_sampling": True}, ["dynamic_sampling: true", "mask_zero_std_groups"]),
        ({"steps_per_generation": 2}, ["steps_per_generation: 2", "further behind"]),
        ({"num_iterations": 2}, ["num_iterations: 2", "further behind"]),
        ({"vllm_sleep": 1}, ["vllm_sleep: 1", "awake"]),
        ({"advantage_estimator": "remax"}, ["advantage_estimator: remax", "another policy"]),
        ({"rollout_rejection": "geometric"}, ["rollout_rejection: geometric", "rollout_correction: token"]),
        ({"loss_type": "gpg"}, ["loss_type: gpg", "rollout_correction: token"]),
        ({"rollout_backend": "hf"}, ["rollout_backend: hf", "no effect"]),
        ({"rollout_ahead": 2}, ["rollout_ahead: 2", "at most 1"]),
    ],
)
def test_what_it_cannot_go_with_is_refused(options, words):
    with pytest.raises(ValueError, match="rollout_ahead: ") as refusal:
        GRPOArguments(**{"rollout_ahead": 1, "reward_funcs": "accuracy", **options}).validate()
    for word in words:
        assert word in str(refusal.value)


def test_what_the_correction_makes_possible_is_not_refused():
    for options in (
        {"rollout_correction": "token", "rollout_rejection": "geometric"},
        {"rollout_correction": "sequence", "loss_type": "gpg"},
        {"covariance_control": "kl_cov"},
        {"advantage_estimator": "optimal_token_baseline"},
        {},
    ):
        GRPOArguments(rollout_ahead=1, reward_funcs="accuracy", **options).validate()
    with pytest.raises(ValueError, match=re.escape("`covariance_control: kl_cov` has no effect")):
        GRPOArguments(
            rollout_ahead=1, reward_funcs="accuracy", covariance_control="kl_cov", rollout_correction="token"
        ).validate()


def test_an_engine_gets_a_gpu_that_no_rank_trains_on_where_there_is_one():
    def device(*place):
        return device_environment(*place)["CUDA_VISIBLE_DEVICES"]

    assert [device(rank, 4, 8, None) for rank in range(4)] == ["4", "5", "6", "7"]
    assert device(0, 1, 2, "3, 5") == "5"
    assert [device(rank, 2, 2, None) for rank in range(2)] == ["0", "1"], "shared with the rank"
    assert device_environment(0, 1, 0, None) == {}
