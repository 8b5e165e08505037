"""The trainer with a fake engine: which prompts, when, and what gradient."""

import copy
import dataclasses
import json
import re
from collections import Counter

import pytest
import torch

from grpo_stage.monitors import table, unrewarded
from grpo_stage.monitors.canary import StaleRolloutError
from grpo_stage.monitors.monitor import Monitor
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.rewards.errors import UnrewardedError
from grpo_stage.survival.checkpoints import STATE_FILE
from grpo_stage.types import TrainingProgress
from grpo_stage.update.batch import PaddedLayout, SharedPromptLayout
from grpo_stage.update.model_flops import flops_of_update
from grpo_stage.update.reference import InitialWeightsReference, ModelReference

from .trainer_on_fakes import (
    FakeEngine,
    LengthRewards,
    ScoringEngine,
    collect,
    gradient_of,
    groups_of,
    make_trainer,
    relative,
)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("mask_truncated_completions", [False, True])
def test_gradient_does_not_depend_on_the_micro_batch_split(tmp_path, loss_type, mask_truncated_completions):
    options = {"loss_type": loss_type, "mask_truncated_completions": mask_truncated_completions, "beta": 0.1}
    trainer = make_trainer(tmp_path, num_iterations=2, reference=InitialWeightsReference, **options)
    data = collect(trainer)[1]  # the second use: ratios differ from 1 once the weights have moved
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    gradients = []
    for budget in (10_000, 1, 23):
        trainer.learner.budget.max_tokens = budget
        gradients.append(gradient_of(trainer, data))
    assert gradients[0].norm() > 1e-3
    assert relative(gradients[1], gradients[0]) < 1e-5
    assert relative(gradients[2], gradients[0]) < 1e-5


def test_per_device_batch_and_accumulation_are_the_same_thing(tmp_path):
    whole = make_trainer(tmp_path, training={"per_device_train_batch_size": 4})
    accumulated = make_trainer(tmp_path, training={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    assert whole.collector.prompts_per_step == accumulated.collector.prompts_per_step == 4
    first, second = collect(whole)[0], collect(accumulated)[0]
    assert [s.completion for s in first.samples] == [s.completion for s in second.samples]
    assert [s.advantage for s in first.samples] == [s.advantage for s in second.samples]
    assert torch.equal(gradient_of(whole, first), gradient_of(accumulated, second))


def test_on_policy_gradient_is_reinforce(tmp_path):
    """At ratio 1 the surrogate's gradient is that of -advantage x log-probability, averaged over all tokens (dapo)."""
    trainer = make_trainer(tmp_path)
    data = collect(trainer)[0]
    gradient = gradient_of(trainer, data)

    trainer.model.zero_grad()
    num_tokens = sum(len(sample.completion.token_ids) for sample in data.samples)
    for group in groups_of(data):
        rewards = torch.tensor([sample.total_reward for sample in group], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for sample, advantage in zip(group, advantages.tolist(), strict=True):
            prompt_ids, token_ids = sample.prompt.token_ids, sample.completion.token_ids
            logits = trainer.model(torch.tensor([prompt_ids + token_ids])).logits[0]
            logprobs = torch.log_softmax(logits, dim=-1)
            for t, token in enumerate(token_ids):
                (-advantage * logprobs[len(prompt_ids) + t - 1, token] / num_tokens).backward(retain_graph=True)
    reinforce = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert relative(gradient, reinforce) < 1e-5


def test_old_logprobs_at_the_first_use_change_nothing(tmp_path):
    trainer = make_trainer(tmp_path, num_iterations=2)
    data = collect(trainer)[0]
    assert all(sample.old_logprobs is not None for sample in data.samples)
    with_old = gradient_of(trainer, data)
    samples = tuple(dataclasses.replace(sample, old_logprobs=None) for sample in data.samples)
    without = gradient_of(trainer, dataclasses.replace(data, samples=samples))
    assert relative(with_old, without) < 1e-5


def test_equal_rewards_give_exactly_no_gradient(tmp_path):
    trainer = make_trainer(
        tmp_path, rewards=type("Same", (LengthRewards,), {"score": lambda _, groups: [[[0.1]] * 4 for _ in groups]})()
    )
    assert (gradient_of(trainer, collect(trainer)[0]) == 0).all()


def test_kl_is_zero_at_the_start_and_pulls_back_later(tmp_path):
    trainer = make_trainer(
        tmp_path,
        beta=0.5,
        reference=InitialWeightsReference,
        rewards=type("Same", (LengthRewards,), {"score": lambda _, groups: [[[0.1]] * 4 for _ in groups]})(),
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert gradient_of(trainer, collect(trainer)[0]).abs().max() < 1e-6
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    gradient = gradient_of(trainer, collect(trainer)[0])
    away = torch.cat([(p - start[name]).flatten() for name, p in trainer.model.named_parameters()])
    assert torch.dot(gradient, away) > 0, "a gradient step leads back to the reference"
    assert trainer.tracker.take()["kl"] > 0


@pytest.mark.parametrize(
    ("num_iterations", "steps_per_generation", "accumulation", "expected_steps"),
    [(1, 1, 1, 3), (2, 1, 1, 6), (1, 2, 1, 3), (3, 2, 1, 9), (1, 1, 2, 2), (2, 4, 1, 6)],
)
def test_every_prompt_is_rolled_out_once_an_epoch(
    tmp_path, num_iterations, steps_per_generation, accumulation, expected_steps
):
    trainer = make_trainer(
        tmp_path,
        num_iterations=num_iterations,
        steps_per_generation=steps_per_generation,
        training={"num_train_epochs": 2, "gradient_accumulation_steps": accumulation},
    )
    result = trainer.train()
    assert result.global_step == 2 * expected_steps
    assert Counter(i for _, indices in trainer.engine.asked for i in indices) == dict.fromkeys(range(5), 2)
    assert len(trainer.collector.queue) == 0
    in_first_epoch = [i for step, indices in trainer.engine.asked if step < expected_steps for i in indices]
    assert sorted(in_first_epoch) == list(range(5))


@pytest.mark.parametrize("stop_at", [1, 2, 4, 5, 7])
def test_resume_continues_the_same_prompts_and_ends_at_the_same_weights(tmp_path, stop_at):
    """Stopped between two uses of a rollout, at an epoch's end, or in the second epoch."""
    settings = {"num_iterations": 2, "steps_per_generation": 2}
    run = {"save_strategy": "steps", "save_steps": stop_at, "num_train_epochs": 2}
    whole = make_trainer(tmp_path / "whole", training=run, **settings)
    whole.train()

    resumed = make_trainer(tmp_path / "resumed", training=run, **settings)
    checkpoint = tmp_path / "whole" / f"checkpoint-{stop_at}"
    assert json.loads((checkpoint / STATE_FILE).read_text())["recipe_hash"] == "x"
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert resumed.state.global_step == whole.state.global_step == 12
    assert resumed.engine.asked == [call for call in whole.engine.asked if call[0] >= stop_at]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_group_of_another_policy_version_stops_the_run(tmp_path):
    with pytest.raises(StaleRolloutError, match="policy version -1, but the trainer is at version 0"):
        make_trainer(tmp_path, engine=FakeEngine(version_offset=-1)).train()


def test_engine_logprobs_far_from_the_trainers_stop_the_run(tmp_path):
    with pytest.raises(StaleRolloutError, match="max_sampling_logprob_diff"):
        make_trainer(tmp_path, bound=0.05).train()


def test_the_slope_of_a_sound_engine_is_logged_and_goes_on_from_a_checkpoint(tmp_path):
    run = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(tmp_path / "whole", engine=ScoringEngine(), tests_slope=True, training=run)
    whole.train()
    names = {f"sampling/{figure}/{probe}" for figure in ("slope", "slope_error") for probe in ("start", "previous")}
    logged = [{name: line[name] for name in names & line.keys()} for line in whole.state.log_history if "loss" in line]
    assert logged[0] == {}, "nothing has moved"
    assert all(line.keys() == names for line in logged[1:])
    for line in logged[1:]:
        assert line["sampling/slope/start"] == pytest.approx(1, abs=1e-3)
        assert line["sampling/slope/previous"] == pytest.approx(1, abs=1e-3)

    resumed = make_trainer(tmp_path / "resumed", engine=ScoringEngine(), tests_slope=True, training=run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    of_resumed = [line for line in resumed.state.log_history if "loss" in line]
    assert [{name: line[name] for name in names} for line in of_resumed[4:]] == logged[4:]


@pytest.mark.parametrize("backlog", [1, 100])
def test_an_engine_that_does_not_follow_the_policy_stops_the_run(tmp_path, backlog):
    """Its log-probabilities are within any bound, and it says that it is at the right version."""
    run = {"per_device_train_batch_size": 10, "max_steps": 8}
    trainer = make_trainer(tmp_path, engine=ScoringEngine(backlog), tests_slope=True, num_prompts=20, training=run)
    with pytest.raises(StaleRolloutError, match="does not follow the policy"):
        trainer.train()
    assert 1 <= trainer.state.global_step <= 6


class Witness(Monitor):
    """Notes how it is called, from the beginning of the run on."""

    def __init__(self):
        self.calls = []

    def before_sleep(self, engine, groups, version):
        assert engine.is_awake
        self.calls.append(["before_sleep", version, len(groups)])

    def after_sleep(self, groups, version, metrics):
        metrics.add("witness", version)
        self.calls.append(["after_sleep", version, len(groups)])

    def after_scoring(self, groups, version, metrics):
        assert all(each.has_reward for each in groups)
        self.calls.append(["after_scoring", version, len(groups)])

    def after_step(self, metrics):
        self.calls.append(["after_step", metrics.own_mean("entropy") > 0])

    def state_dict(self):
        return {"calls": self.calls.copy()}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_a_row_of_the_table_makes_a_monitor(tmp_path, monkeypatch):
    """Its hooks are called, what it measures is logged, and its state is in checkpoints: nothing else names it."""
    witness = Witness()
    monkeypatch.setattr(table, "MONITORS", {"witness": lambda request: witness, "no use": lambda request: None})
    run = {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, engine=ScoringEngine(), training=run)
    trainer.train()
    rollouts = [(0, 2), (1, 2), (2, 1)]
    hooks = ("before_sleep", "after_sleep", "after_scoring")
    expected = [[*([hook, *rollout] for hook in hooks), ["after_step", True]] for rollout in rollouts]
    assert witness.calls == [call for of_step in expected for call in of_step]
    assert [line["witness"] for line in trainer.state.log_history if "loss" in line] == [0, 1, 2]
    witness.calls = []
    make_trainer(tmp_path, engine=ScoringEngine(), training=run).train(str(tmp_path / "checkpoint-1"))
    assert witness.calls == [call for of_step in expected for call in of_step]


class SparseRewards(LengthRewards):
    """Apply to the prompts of the given indices alone."""

    def __init__(self, applies) -> None:
        super().__init__()
        self.applies = set(applies)

    def score(self, groups):
        rewards = super().score(groups)
        return [
            of_group if group.prompt.index in self.applies else [[None]] * len(of_group)
            for group, of_group in zip(groups, rewards, strict=True)
        ]


def test_rewards_that_never_apply_are_no_success(tmp_path, caplog):
    with pytest.raises(
        UnrewardedError, match=r"any completion of the 3 steps \(even always returned None\).*try-rewards"
    ):
        make_trainer(tmp_path, rewards=LengthRewards(none=True)).train()
    said = [record.getMessage() for record in caplog.records if "No reward function applied" in record.getMessage()]
    assert [re.findall(r"of the (\d) prompts .* step (\d)", message) for message in said] == [
        [("2", "1")], [("2", "2")], [("1", "3")]
    ]  # fmt: skip


def test_groups_without_a_reward_are_dead_and_counted(tmp_path, caplog):
    """Of five prompts in steps of two; the run goes on, and a step without any reward moves no weight."""
    trainer = make_trainer(tmp_path, rewards=SparseRewards({1, 4}), shuffle=False, log_completions=True)
    seen, learn = [], trainer.learner.learn

    def watched(*args):
        loss = learn(*args)
        seen.append(all((p.grad is None or (p.grad == 0).all()) for p in trainer.model.parameters()))
        return loss

    trainer.learner.learn = watched
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["frac_reward_none"] for line in lines] == [0.5, 1.0, 0.0]
    assert [line["frac_reward_zero_std"] for line in lines] == [0.5, 1.0, 0.0]
    assert ["reward" in line for line in lines] == [True, False, True]
    assert seen == [False, True, False]
    assert sum("No reward function applied" in record.getMessage() for record in caplog.records) == 1
    assert lines[1]["loss"] == 0


@pytest.mark.parametrize(
    ("options", "resumed_at", "message"),
    [
        ({}, 4, "the 5 prompts that were sampled for step 6, nor of the 15 before them"),
        ({"dynamic_sampling": True}, 2, "the 5 prompts that were sampled for step 3, nor of the 15 before them"),
        (
            {"num_iterations": 2, "steps_per_generation": 2},
            10,
            "the 10 prompts that were sampled for step 17, nor of the 30 before them",
        ),
    ],
)
def test_a_row_of_prompts_without_a_reward_ends_the_run_whether_it_was_resumed_or_not(
    tmp_path, monkeypatch, options, resumed_at, message
):
    """Steps of 5 prompts, of which the first 10 have a reward. What was trained until then is kept."""
    monkeypatch.setattr(unrewarded, "UNREWARDED_PROMPTS", 20)
    monkeypatch.setattr(unrewarded, "UNREWARDED_ROLLOUTS", 4)
    training = {"per_device_train_batch_size": 5, "save_strategy": "steps", "save_steps": 2}
    options = {
        "num_prompts": 50, "rewards": SparseRewards(range(10)), "shuffle": False, "training": training, **options
    }  # fmt: skip
    whole = make_trainer(tmp_path / "whole", **options)
    with pytest.raises(UnrewardedError, match=message) as stopped:
        whole.train()
    saved = tmp_path / "whole" / f"checkpoint-{whole.state.global_step}"
    assert stopped.value.__notes__ == [f"What was trained until then is in {saved}."]
    resumed = make_trainer(tmp_path / "resumed", **options)
    with pytest.raises(UnrewardedError, match=message):
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{resumed_at}"))


def test_ranks_count_rewards_together(tmp_path, monkeypatch, caplog):
    """What another rank has rewarded is rewarded, and all of them end the run in the same rollout."""
    trainer = make_trainer(tmp_path, rewards=LengthRewards(none=True))
    collector, sampler = trainer.collector, trainer.collector._sampler
    sampler.sync(trainer.model, 0)
    prompts, sampling = trainer.train_dataset[:2], collector._sampling
    groups = sampler.score(sampler.generate(prompts, sampling, 0, 0), TrainingProgress())
    monitor = unrewarded.UnrewardedRollouts(("even",), limit=15, rank=0)
    for others, expected in (((0, 3), 5), ((0, 3), 10), ((1, 3), 0), ((0, 3), 5), ((0, 3), 10)):
        monkeypatch.setattr(unrewarded, "all_gather", lambda own, others=others: [own, others])
        monitor.after_scoring(groups, 0, MetricTracker())
        assert monitor.state_dict() == expected
    assert sum("of the 5 prompts" in record.getMessage() for record in caplog.records) == 4
    with pytest.raises(UnrewardedError, match=r"the 5 prompts .* nor of the 10 before them"):
        monitor.after_scoring(groups, 0, MetricTracker())


def test_an_evaluation_that_no_function_applies_to_says_so_and_ends_nothing(tmp_path, caplog):
    trainer = make_trainer(
        tmp_path,
        rewards=SparseRewards({1, 2, 3, 4}),
        num_eval_prompts=1,
        training={
            "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "metric_for_best_model": "eval_reward",
        },
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.best_metric is None
    assert not any("eval_reward" in line for line in trainer.state.log_history)
    assert "of the 1 evaluation prompts (even all returned None), so the evaluation says nothing" in caplog.text


def test_the_second_step_of_a_generation_learns_by_the_policy_that_sampled(tmp_path):
    """Its ratio is to the policy before the first step, whose update has moved it: it is used once, and not fresh."""
    trainer = make_trainer(tmp_path, num_prompts=4, steps_per_generation=2)
    first, second = collect(trainer)
    samples = first.samples + second.samples
    own = trainer.learner.frozen.logprobs(trainer.model, samples)
    assert [len(tokens) for tokens in own] == [len(sample.completion.token_ids) for sample in samples]
    for sample, expected in zip(samples, own, strict=True):
        torch.testing.assert_close(sample.old_logprobs, expected)
    assert {sample.policy_version for sample in second.samples} == {0}, "and its step is number 1"


def test_metrics_are_logged_under_their_names(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.1, reference=InitialWeightsReference, log_completions=True)
    trainer.train()
    first = trainer.state.log_history[0]
    assert {
        "loss", "grad_norm", "reward", "reward_std", "frac_reward_zero_std", "rewards/even/mean", "rewards/even/std",
        "completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio",
        "completions/mean_terminated_length", "entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean",
        "clip_ratio/region_mean", "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
        "num_tokens", "rollout_tokens_per_second", "step_time", "time/sync", "time/rollout", "time/reward",
        "time/logprobs", "time/update", "memory/update", "completions/frac_groups_all_right",
        "completions/mixed_language_frac", "completions/looped_frac",
    } <= first.keys()  # fmt: skip

    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(lines) == 5 * 4
    of_first_step = [line for line in lines if line["step"] == 1]
    assert first["reward"] == pytest.approx(sum(line["reward"] for line in of_first_step) / 8)
    assert first["completions/mean_length"] == pytest.approx(sum(line["num_tokens"] for line in of_first_step) / 8)
    assert first["completions/clipped_ratio"] == sum(line["finish_reason"] == "length" for line in of_first_step) / 8
    assert [line["advantage"] for line in of_first_step] != [0.0] * 8


def test_the_update_logs_the_tokens_it_trains_on_and_how_they_are_packed(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    step = collect(trainer)[0]
    length = sum(len(each.prompt.token_ids) + len(each.completion.token_ids) for each in step.samples)
    trainer.learner.learn(trainer.model, step, 0)
    means = trainer.tracker.state_dict()["means"]
    assert means["update_tokens_per_second"] == (length, means["time/update"][0])
    fed = trainer.learner.forward.layout.num_tokens(step.samples)
    assert all(sample.teaches for sample in step.samples)
    assert means["packing_ratio"] == (length, fed)
    assert length > fed, "completions share their prompts"
    tflop = flops_of_update(trainer.model, step.samples) / 1e12
    assert means["update_tflops"] == (tflop, means["time/update"][0])
    assert "update_mfu" not in means, "a CPU has no peak that is known"


@pytest.mark.parametrize("precision", ["float32", "pure_bf16", "autocast"])
def test_the_update_logs_its_share_of_the_devices_peak_in_half_precision(tmp_path, precision, monkeypatch):
    monkeypatch.setattr("grpo_stage.learner.peak_flops", lambda device: 2e9)
    trainer = make_trainer(
        tmp_path,
        training={"bf16": precision == "autocast"},
        change_model=lambda model: model.bfloat16() if precision == "pure_bf16" else model,
    )
    step = collect(trainer)[0]
    dead = dataclasses.replace(step.samples[0], advantage=0.0)
    trainer.learner.learn(trainer.model, dataclasses.replace(step, samples=(dead, *step.samples[1:])), 0)
    means = trainer.tracker.state_dict()["means"]
    tflop, seconds = means["update_tflops"]
    assert tflop == flops_of_update(trainer.model, step.samples[1:]) / 1e12, "of what goes through the model"
    assert means.get("update_mfu") == (None if precision == "float32" else (tflop, pytest.approx(seconds * 0.002)))


def test_no_copy_of_a_weight_waits_for_a_second_use_in_a_pass(tmp_path):
    """Autocast keeps them for the pass: with full tuning as much memory as all weights in half precision."""
    trainer, kept = make_trainer(tmp_path, training={"bf16": True, "max_steps": 1}), []
    trainer.model.model.norm.register_forward_hook(lambda *_: kept.append(torch.is_autocast_cache_enabled()))
    trainer.train()
    assert torch.is_autocast_cache_enabled()
    assert set(kept) == {False}


def test_a_reference_of_another_kind_is_compared_as_well(tmp_path):
    """What is exact for the policy need not be for `ref_model`."""

    def reference(policy):
        other = copy.deepcopy(policy)
        layer = other.model.layers[0].mlp
        own = layer.forward
        layer.forward = lambda x: own(x + 0.5 * x.roll(1, dims=1))  # looks at the neighbor in the stream
        return ModelReference(other)

    trainer = make_trainer(tmp_path, beta=0.1, reference=reference)
    trainer.learner.prepare(trainer.model, trainer.reference, trainer.train_dataset)
    assert isinstance(trainer.learner.forward.layout, PaddedLayout)
    trainer.learner.forward.layout = shared = SharedPromptLayout(0, torch.device("cpu"))
    trainer.learner.prepare(trainer.model, None, trainer.train_dataset)
    assert trainer.learner.forward.layout is shared
