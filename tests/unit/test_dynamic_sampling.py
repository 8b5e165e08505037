"""Dynamic sampling: which groups a batch is made of, and that none is lost, repeated, or taken for fresh."""

import dataclasses
import itertools
import json
import math
import os
import re
import signal
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_stage.monitors.canary import StaleRolloutError
from grpo_stage.rollout.filling import DynamicSampling
from grpo_stage.survival import checkpoints
from grpo_stage.survival.stop import StopRequested
from grpo_stage.types import FinishReason, Prompt, RolloutGroup, ScoredGroup, TrainingProgress
from grpo_stage.update.credit import has_reward_variance
from grpo_stage.update.reference import InitialWeightsReference

from .trainer_on_fakes import (
    FakeEngine,
    LengthRewards,
    collect,
    fake_completion,
    gradient_of,
    groups_of,
    make_trainer,
    outputs_of_two_ranks,
    relative,
    watch_steps,
)


class PickyRewards(LengthRewards):
    """Rewards that differ within the groups of the given prompts alone."""

    def __init__(self, teaching) -> None:
        super().__init__()
        self.teaching = set(teaching)
        self.seen = []

    def score(self, groups):
        self.seen.append(self.progress)
        return [[[float(i) if g.prompt.index in self.teaching else 1.0] for i in range(4)] for g in groups]


def make(tmp_path, teaching, *, num_prompts=12, training=None, **options):
    """A trainer that takes the prompts in order; those of `teaching` are worth training on."""
    options = {"dynamic_sampling": True, "rewards": PickyRewards(teaching), **options}
    trainer = make_trainer(tmp_path, num_prompts=num_prompts, training=training, **options)
    stream = trainer.collector.stream
    stream.shuffle = False
    stream._order = stream._permutation()
    return trainer


def watch_batches(trainer):
    """What each optimizer step trains on: (step, [(prompt, policy version), ...])."""
    batches = []

    def note(step):
        groups = [(group[0].prompt.index, group[0].policy_version) for group in groups_of(step)]
        batches.append((trainer.state.global_step, groups))

    watch_steps(trainer, note)
    return batches


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def metrics_of(trainer, name):
    return [
        line[f"dynamic_sampling/{name}"] for line in trainer.state.log_history if f"dynamic_sampling/{name}" in line
    ]


# What a batch is made of


def test_groups_that_teach_nothing_are_replaced_and_what_is_too_much_waits(tmp_path):
    """Two prompts a step. 0 teaches, 1 does not; of 2 and 3 one is too much, and opens the next batch."""
    trainer = make(tmp_path, teaching={0, 2, 3, 6, 7, 9, 10, 11}, log_completions=True)
    batches = watch_batches(trainer)
    trainer.train()

    assert trainer.engine.asked == [
        (0, [0, 1]),
        (0, [2, 3]),
        (1, [4, 5]),
        (1, [6, 7]),
        (2, [8, 9]),
        (3, [10, 11]),
    ]
    assert batches == [
        (0, [(0, 0), (2, 0)]),
        (1, [(3, 0), (6, 1)]),
        (2, [(7, 1), (9, 2)]),
        (3, [(10, 3), (11, 3)]),
    ]
    assert trainer.engine.synced == [0, 0, 1, 1, 2, 3], "before each rollout: the engine may have slept since"
    assert metrics_of(trainer, "num_rollouts") == [2, 2, 1, 1]
    assert metrics_of(trainer, "frac_dropped") == [0.25, 0.5, 0.5, 0]
    assert metrics_of(trainer, "num_kept") == [2, 2, 2, 2]
    assert metrics_of(trainer, "num_waiting") == [1, 1, 0, 0]
    assert metrics_of(trainer, "num_short_batches") == [0, 0, 0, 0]
    assert [line["frac_reward_zero_std"] for line in trainer.state.log_history if "loss" in line] == [
        0.25,
        0.5,
        0.5,
        0,
    ]

    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert Counter(line["prompt_index"] for line in lines) == dict.fromkeys(range(12), 4), "each once, dropped or not"
    assert [line["prompt_index"] for line in lines if line["step"] == 2][::4] == [3, 6, 4, 5]
    assert all((line["advantage"] == 0) == (line["prompt_index"] in (1, 4, 5, 8)) for line in lines)


def test_where_every_group_teaches_the_run_is_that_without(tmp_path):
    runs = [
        make(tmp_path / name, teaching=range(12), dynamic_sampling=name == "with", num_iterations=2, num_prompts=5)
        for name in ("with", "without")
    ]
    for run in runs:
        run.train()
    assert runs[0].engine.asked == runs[1].engine.asked
    assert runs[0].state.global_step == runs[1].state.global_step == 6
    assert torch.equal(weights_of(runs[0]), weights_of(runs[1]))
    logs = [[{k: v for k, v in line.items() if k in ("loss", "epoch")} for line in r.state.log_history] for r in runs]
    assert [line["loss"] for line in logs[0][:-1]] == [line["loss"] for line in logs[1][:-1]]
    assert logs[0][-1]["epoch"] == logs[1][-1]["epoch"] == 1


def test_the_bound_on_tries_ends_the_search_and_says_so(tmp_path, caplog):
    trainer = make(tmp_path, teaching={2, 9, 10, 11}, max_resample_times=1)
    batches = watch_batches(trainer)
    trainer.train()
    assert [asked for asked in trainer.engine.asked if asked[0] == 0] == [(0, [0, 1]), (0, [2, 3])]
    assert batches[:2] == [(0, [(2, 0)]), (1, [])], "what there is, and be it nothing"
    assert batches[2:] == [(2, [(9, 2), (10, 2)]), (3, [(11, 2)])]
    assert metrics_of(trainer, "num_short_batches") == [1, 1, 0, 1]
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert re.search(r"step 1 has 1 of 2 groups: in 2 rollouts \(`max_resample_times: 1`\)", said[0])
    assert "step 2 has 0 of 2 groups" in said[1]
    assert len(said) == 2, "the end of the prompts is no reason for a warning"


def test_a_batch_for_which_nothing_was_found_has_no_gradient(tmp_path):
    trainer = make(tmp_path, teaching={11}, max_resample_times=1, beta=0.1, reference=InitialWeightsReference)
    (step,) = collect(trainer)
    assert step.samples == ()
    loss = trainer.learner.learn(trainer.model, step, 0)
    assert loss == 0
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("options", [{}, {"dynamic_sampling": False, "mask_zero_std_groups": True}])
def test_a_step_without_groups_leaves_the_weights_whatever_the_optimizer_remembers(tmp_path, options):
    trainer = make(tmp_path, {0, 1}, num_prompts=6, max_resample_times=1, training={"weight_decay": 0.1}, **options)
    seen = []
    watch_steps(trainer, lambda step: seen.append(weights_of(trainer)))
    trainer.train()
    seen.append(weights_of(trainer))
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(seen)]
    assert moved == [True, False] if not options else [True, False, False]


def test_a_group_of_truncated_completions_alone_is_no_group_to_learn_from(tmp_path):
    """Where the loss leaves them out, a batch of such groups would be full and teach nothing."""
    trainer = make(tmp_path, range(12), mask_truncated_completions=True)
    generate = trainer.engine.generate

    def truncated(prompts, *args):
        return [
            group
            if group.prompt.index % 2
            else dataclasses.replace(
                group,
                completions=tuple(
                    dataclasses.replace(each, finish_reason=FinishReason.LENGTH) for each in group.completions
                ),
            )
            for group in generate(prompts, *args)
        ]

    trainer.engine.generate = truncated
    batches = watch_batches(trainer)
    trainer.train()
    assert sorted(index for _, groups in batches for index, _ in groups) == [1, 3, 5, 7, 9, 11]


def test_a_run_that_never_found_a_group_to_learn_from_is_no_success(tmp_path):
    trainer = make(tmp_path, teaching=())
    with pytest.raises(RuntimeError, match=r"In none of the 2 steps .*nothing was learned.*num_generations"):
        trainer.train()


class TwoRewards(LengthRewards):
    """Group i: the first function gives 0 or i / 10, the second 0 or 1 the other way round; prompt 0 is a tie."""

    names, weights = ("near", "far"), (1.0, 0.05)

    def score(self, groups):
        return [[[(i % 2) * g.prompt.index / 10, float(i % 2 == 0)] for i in range(4)] for g in groups]

    def total(self, rewards):
        return rewards[0] + 0.05 * rewards[1]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"filter_min_range": 0.2}, [3, 4, 5]),  # totals differ by |i / 10 - 0.05|
        ({"filter_metric": "near"}, [1, 2, 3, 4, 5]),
        ({"filter_metric": "near", "filter_min_range": 0.3}, [4, 5]),
        ({"filter_metric": "far", "filter_min_range": 0.9}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_batch_may_be_chosen_by_one_reward_and_by_a_least_range(tmp_path, options, kept):
    trainer = make(tmp_path, (), num_prompts=6, rewards=TwoRewards(), max_resample_times=9, **options)
    batches = watch_batches(trainer)
    trainer.train()
    assert [index for _, groups in batches for index, _ in groups] == kept


# Epochs are counted in prompts


def test_an_epoch_ends_with_its_prompts_and_is_evaluated_then(tmp_path):
    """Of five prompts a batch of two, a short one, and after it the next epoch."""
    training = {"num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "epoch"}
    trainer = make(tmp_path, teaching={1, 3, 4}, num_prompts=5, training=training, num_eval_prompts=1)
    batches = watch_batches(trainer)
    result = trainer.train()
    assert batches == [(0, [(1, 0), (3, 0)]), (1, [(4, 1)]), (2, [(1, 2), (3, 2)]), (3, [(4, 3)])]
    assert result.global_step == trainer.state.max_steps == 4, "six would be the most"
    evaluated = [(line["step"], line["epoch"]) for line in trainer.state.log_history if "eval_reward" in line]
    assert evaluated == [(2, 1.0), (4, 2.0)]
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    epochs = [line["epoch"] for line in trainer.state.log_history if "loss" in line]
    assert epochs == [pytest.approx(each) for each in (4 / 5, 1, 9 / 5, 2)]


def test_what_waits_at_the_end_of_an_epoch_is_its_last_batch(tmp_path):
    trainer = make(tmp_path, teaching={1, 2, 3}, num_prompts=4)
    batches = watch_batches(trainer)
    trainer.train()
    assert trainer.engine.asked == [(0, [0, 1]), (0, [2, 3])]
    assert batches == [(0, [(1, 0), (2, 0)]), (1, [(3, 0)])]


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_run_that_ends_with_its_prompts_says_so_evaluates_and_saves(tmp_path, caplog, strategy):
    training = {"save_strategy": strategy, "save_steps": 100, "eval_strategy": "steps", "eval_steps": 100}
    trainer = make(tmp_path, teaching=range(0, 12, 2), training=training, num_eval_prompts=1)
    caplog.set_level("INFO")
    result = trainer.train()
    assert result.global_step == 3
    assert "The prompts of all 1 epochs are used up: the run ends with step 3 of at most 6." in caplog.text
    assert [line["step"] for line in trainer.state.log_history if "eval_reward" in line] == [3]
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"] * (strategy == "steps")


def test_max_steps_takes_as_many_epochs_as_it_needs(tmp_path):
    trainer = make(tmp_path, teaching={0, 5}, num_prompts=6, training={"max_steps": 5})
    batches = watch_batches(trainer)
    result = trainer.train()
    assert result.global_step == trainer.state.max_steps == 5
    assert [groups for _, groups in batches] == [[(0, i), (5, i)] for i in range(5)]
    assert trainer.collector.stream.epoch == 4


def test_a_part_of_an_epoch_is_counted_in_prompts(tmp_path):
    trainer = make(tmp_path, teaching=range(0, 12, 2), training={"num_train_epochs": 1.5})
    batches = watch_batches(trainer)
    trainer.train()
    assert [groups for _, groups in batches[3:]] == [[(0, 3), (2, 3)], [(4, 4)]]
    assert sum(len(indices) for _, indices in trainer.engine.asked) == 18


@settings(deadline=None)
@given(data=st.data(), num_prompts=st.integers(1, 30), per_step=st.integers(1, 6), steps=st.integers(1, 3))
def test_no_group_is_lost_or_repeated_and_the_steps_of_an_epoch_are_within_their_bound(
    data, num_prompts, per_step, steps
):
    """Two ranks in turn, on the same decisions as one."""
    teaching = data.draw(st.lists(st.booleans(), min_size=num_prompts, max_size=num_prompts))
    has_signal = partial(has_reward_variance, weights=(1.0,))
    dynamic = DynamicSampling((), data.draw(st.integers(1, 3)), has_signal, rank=0, world_size=1)
    count, cursor, trained, num_steps = per_step * steps, 0, [], 0

    def roll_out():
        nonlocal cursor
        indices = list(range(num_prompts))[cursor : cursor + count]
        cursor += len(indices)
        return [scored_group(i, (0.0, 1.0) if teaching[i] else (1.0, 1.0)) for i in indices]

    while cursor < num_prompts or dynamic.num_waiting:
        waiting = dynamic.num_waiting
        filled = dynamic.fill(count, roll_out, lambda: cursor < num_prompts, old_logprobs)
        assert filled.num_kept == len(filled.groups) <= count
        assert filled.num_waiting == dynamic.num_waiting < count
        assert filled.num_sampled == filled.num_kept + filled.num_waiting + len(filled.dropped) - waiting
        stale = [each.old_logprobs is not None for each in filled.groups]
        assert stale == [True] * waiting + [False] * (filled.num_kept - waiting), "the oldest first, and all of them"
        trained += [each.group.prompt.index for each in filled.groups]
        num_steps += max(1, -(-filled.num_kept // per_step))
    assert trained == [i for i in range(num_prompts) if teaching[i]]
    assert num_steps <= -(-num_prompts // per_step)


def scored_group(index, rewards, version=0):
    return ScoredGroup(
        group=RolloutGroup(
            prompt=Prompt(index=index, token_ids=(index,), messages=(), reference=None),
            completions=tuple(fake_completion(10 * index + i) for i in range(len(rewards))),
            policy_version=version,
        ),
        rewards=tuple((reward,) for reward in rewards),
        total_rewards=tuple(rewards),
    )


def old_logprobs(groups):
    return [torch.zeros(len(c.token_ids)) for scored in groups for c in scored.group.completions]


def test_a_group_is_judged_by_the_totals_that_apply():
    def teaches(*totals):
        return has_reward_variance(scored_group(0, totals), weights=(1.0,))

    assert teaches(0.0, None, 1.0)
    assert teaches(1e-6, 1.1e-6)
    assert not teaches(1.0, None, 1.0)
    assert not teaches(1.0, None, None)
    assert not teaches(None, None)
    assert not teaches(0.3, 0.1 + 0.2)


def test_a_group_is_judged_among_completions_that_the_same_functions_applied_to():
    def teaches(rewards, weights):
        totals = [math.fsum(w * r for w, r in zip(weights, row, strict=True) if r is not None) for row in rewards]
        return has_reward_variance(dataclasses.replace(scored_group(0, totals), rewards=rewards), weights)

    timed_out = ((1.0, 1.0), (1.0, 1.0), (1.0, None))
    assert not teaches(timed_out, (1.0, 1.0)), "the sum over fewer functions is no lower reward"
    assert teaches((*timed_out, (0.0, None)), (1.0, 1.0))
    assert not teaches((*timed_out, (0.0, None)), (0.0, 1.0))


# Groups that waited are of an earlier policy


class TruthfulEngine(FakeEngine):
    """Its log-probabilities are those of the policy that it samples from; `lie` is added to the given versions'."""

    def __init__(self, lies=()):
        super().__init__()
        self.lies = lies

    def sync(self, policy, version):
        super().sync(policy, version)
        self.policy = policy

    def generate(self, prompts, sampling, step):
        lie = 1.0 if self.synced[-1] in self.lies else 0.0
        return [
            dataclasses.replace(
                group,
                completions=tuple(
                    dataclasses.replace(
                        c, sampling_logprobs=tuple(v + lie for v in logprobs(self.policy, group.prompt, c))
                    )
                    for c in group.completions
                ),
            )
            for group in super().generate(prompts, sampling, step)
        ]


@torch.no_grad()
def logprobs(policy, prompt, completion):
    ids = torch.tensor([prompt.token_ids + completion.token_ids])
    logits = policy(ids).logits[0, len(prompt.token_ids) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion.token_ids).unsqueeze(-1)).squeeze(-1).tolist()


def test_old_logprobs_are_those_of_the_policy_that_sampled(tmp_path):
    trainer = make(tmp_path, teaching={0, 2, 3, 5, 6, 7, 8}, engine=TruthfulEngine())
    seen = []
    watch_steps(trainer, seen.append)
    trainer.train()
    versions = [[group[0].policy_version for group in groups_of(step)] for step in seen]
    assert versions == [[0, 0], [0, 1], [2, 2], [3]]
    assert all(sample.old_logprobs is None for sample in seen[0].samples), "all are the present policy's, used once"
    for sample in seen[1].samples:
        own = torch.tensor(sample.completion.sampling_logprobs)  # the engine's, at the version that it sampled from
        assert torch.allclose(sample.old_logprobs, own, atol=1e-5)
    waited = groups_of(seen[1])[0]
    now = torch.cat([torch.tensor(logprobs(trainer.model, sample.prompt, sample.completion)) for sample in waited])
    then = torch.cat([sample.old_logprobs for sample in waited])
    assert not torch.allclose(then, now, atol=1e-3), "the policy has moved since"


def test_the_canary_looks_at_fresh_completions_alone(tmp_path):
    """In micro-batches of one completion, too, of which the first may be one that waited."""
    for budget in (10_000, 1):
        options = {"max_tokens_per_micro_batch": budget, "bound": 1e-4}
        sound = make(tmp_path, teaching={0, 2, 3, 5}, engine=TruthfulEngine(), **options)
        sound.train()
        assert metrics_of(sound, "num_waiting")[0] == 1
        with pytest.raises(StaleRolloutError, match="max_sampling_logprob_diff"):
            make(tmp_path, teaching={0, 2, 3, 5}, engine=TruthfulEngine(lies={1}), **options).train()


# Stops, resumes, ranks

RUN = {"num_iterations": 2, "steps_per_generation": 2}
TEACHING = {0, 1, 3, 4, 5, 8, 9, 10, 14, 15, 17, 18, 19, 20, 21, 22}
UNTIMED = re.compile(r"time|seconds?|per_second|runtime|train_loss|memory/|tflops|mfu")


def untimed(history):
    return [{key: value for key, value in line.items() if not UNTIMED.search(key)} for line in history]


def test_resumed_at_any_step_a_run_ends_at_the_same_weights(tmp_path):
    training = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 1.5, "per_device_train_batch_size": 3}
    training |= {"eval_strategy": "epoch"}
    whole = make(tmp_path / "whole", TEACHING, num_prompts=23, training=training, num_eval_prompts=1, **RUN)
    whole.train()
    num_steps = whole.state.global_step
    assert num_steps < whole.collector.steps_per_epoch * 1.5, "some groups were dropped"
    assert whole.rewards.seen[0] == TrainingProgress(
        global_step=0, max_steps=whole.collector.steps_per_epoch * 3 // 2, epoch=0.0
    )
    assert len({at.epoch for at in whole.rewards.seen}) > 3
    assert max(metrics_of(whole, "num_waiting")) > 0
    state = json.loads((tmp_path / "whole" / "checkpoint-1" / "grpo_rollout_0.json").read_text())
    assert state["filling"]["num_waiting"] == len(state["filling"]["waiting"]) > 0

    for step in range(1, num_steps):
        resumed = make(tmp_path / "resumed", TEACHING, num_prompts=23, training=training, num_eval_prompts=1, **RUN)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == num_steps
        assert torch.equal(weights_of(resumed), weights_of(whole)), step
        asked = [[call for call in run.engine.asked if call != (0, [0])] for run in (resumed, whole)]  # evaluation's
        assert asked[0] == [call for call in asked[1] if call[0] >= step]
        assert resumed.rewards.seen == [at for at in whole.rewards.seen if at.global_step >= step], "`trainer_state`"
        assert untimed(resumed.state.log_history) == untimed(whole.state.log_history), step


def test_a_run_that_ended_with_its_prompts_is_finished_and_may_be_extended(tmp_path):
    training = {"save_strategy": "steps", "save_steps": 1}
    teaching = range(0, 12, 2)
    whole = make(tmp_path / "whole", teaching, training=training | {"num_train_epochs": 2})
    whole.train()
    assert whole.state.global_step == 6

    once = make(tmp_path / "once", teaching, training=training)
    once.train()
    for part in (checkpoints.RESULTS, checkpoints.MODEL_CARD):
        checkpoints.mark_done(str(tmp_path / "once"), 3, part)
    last = str(tmp_path / "once" / "checkpoint-3")
    with pytest.raises(ValueError, match="is finished: it is at step 3 of 3"):
        make(tmp_path / "once", teaching, training=training).train(resume_from_checkpoint=last)
    extended = make(tmp_path / "once", teaching, training=training | {"num_train_epochs": 2})
    extended.train(resume_from_checkpoint=last)
    assert extended.state.global_step == 6
    assert torch.equal(weights_of(extended), weights_of(whole))


@pytest.mark.parametrize(("where", "nth"), [("rollout", 1), ("rollout", 3), ("reward", 3), ("reward", 4)])
def test_a_stop_in_a_later_rollout_of_a_batch_loses_nothing(tmp_path, where, nth):
    """The rollouts before it are done again, and what waited is there again."""
    training = {"per_device_train_batch_size": 3}
    whole = make(tmp_path / "whole", TEACHING, num_prompts=23, training=training, **RUN)
    whole.train()
    stopped = make(tmp_path / "stopped", TEACHING, num_prompts=23, training=training, **RUN)
    target = stopped.engine if where == "rollout" else stopped.rewards
    name = "generate" if where == "rollout" else "score"
    plain, calls = getattr(target, name), []

    def struck(*args):
        calls.append(args)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGTERM)
        result = plain(*args)
        stopped.engine.on_step()
        return result

    setattr(target, name, struck)
    with pytest.raises(StopRequested) as request:
        stopped.train()
    resumed = make(tmp_path / "stopped", TEACHING, num_prompts=23, training=training, **RUN)
    resumed.train(resume_from_checkpoint=request.value.checkpoint)
    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert resumed.state.global_step == whole.state.global_step


TAUGHT = [i for i in range(22) if i % 4]


def test_two_ranks_take_the_same_rollouts_and_share_what_is_kept(host_processes, tmp_path):
    """Of what one of them kept too much the other takes."""
    code = f"""
import json, os, torch
from pathlib import Path
from grpo_stage.distributed import all_gather
from tests.unit.test_dynamic_sampling import TAUGHT, make, metrics_of, watch_batches, weights_of, TruthfulEngine

trainer = make(
    Path({str(tmp_path)!r}, "two"), TAUGHT, num_prompts=22, engine=TruthfulEngine(), num_iterations=2,
    bound=1e-4, training={{"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}},
)
batches = watch_batches(trainer)
trainer.train()
resumed = make(
    Path({str(tmp_path)!r}, "two"), TAUGHT, num_prompts=22, engine=TruthfulEngine(), num_iterations=2,
    bound=1e-4, training={{"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}},
)
resumed.train(resume_from_checkpoint=str(Path({str(tmp_path)!r}, "two", "checkpoint-2")))
same = bool(torch.equal(weights_of(resumed), weights_of(trainer)))
print("result", json.dumps({{"batches": batches, "asked": trainer.engine.asked, "same": same,
    "kept": metrics_of(trainer, "num_kept"), "waiting": metrics_of(trainer, "num_waiting"),
    "dropped": metrics_of(trainer, "frac_dropped"), "weights": weights_of(trainer).tolist()[::1000]}}))
"""
    outputs = outputs_of_two_ranks(host_processes, code, tmp_path)
    two = [json.loads(output.split("result ")[1].splitlines()[0]) for output in outputs]

    one = make(
        tmp_path / "one", TAUGHT, num_prompts=22, engine=TruthfulEngine(), num_iterations=2,
        bound=1e-4, training={"per_device_train_batch_size": 4},
    )  # fmt: skip
    batches = watch_batches(one)
    one.train()
    assert [len(each["asked"]) for each in two] == [len(one.engine.asked)] * 2
    for (step, whole), (_, first), (_, second) in zip(batches, two[0]["batches"], two[1]["batches"], strict=True):
        assert [list(pair) for pair in whole[::2]] == first, step
        assert [list(pair) for pair in whole[1::2]] == second, step
    assert all(each["same"] for each in two), "resumed from a checkpoint with groups that waited on both"
    assert two[0]["kept"] == metrics_of(one, "num_kept")
    assert two[0]["waiting"] == metrics_of(one, "num_waiting")
    assert max(two[0]["waiting"]) >= 2
    assert two[0]["dropped"] == metrics_of(one, "frac_dropped")
    assert two[0]["weights"] == two[1]["weights"]
    reference = weights_of(one)[::1000]
    assert (torch.tensor(two[0]["weights"]) - reference).norm() <= 1e-3 * reference.norm()


# Groups that teach nothing, left out without being replaced


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_masked_groups_are_in_no_part_of_the_gradient_and_in_no_average(tmp_path, loss_type):
    """Away from the reference, the gradient is that of a batch without them; unmasked, the KL term pulls on them."""
    options = {"dynamic_sampling": False, "beta": 0.5, "reference": InitialWeightsReference, "loss_type": loss_type}
    training = {"per_device_train_batch_size": 4}
    gradients = {}
    for name, own in (
        ("masked", {"num_prompts": 4, "mask_zero_std_groups": True}),
        ("unmasked", {"num_prompts": 4}),
        ("alone", {"num_prompts": 2}),  # prompts 0 and 1
    ):
        trainer = make(tmp_path / name, teaching={0, 1}, training=training, **options, **own)
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        (data,) = collect(trainer)
        gradients[name] = gradient_of(trainer, data)
        assert trainer.tracker.take()["frac_reward_zero_std"] == (0.0 if name == "alone" else 0.5)
    assert relative(gradients["masked"], gradients["alone"]) < 1e-5
    assert relative(gradients["unmasked"], gradients["alone"]) > 0.1


def test_a_masked_run_takes_the_same_steps_and_one_without_anything_to_learn_is_no_success(tmp_path):
    """Steps of a rollout stay apart, and be one of them empty; one that is not is the first, for the canary."""
    options = {"dynamic_sampling": False, "mask_zero_std_groups": True, "steps_per_generation": 2, "num_iterations": 2}
    trainer = make(tmp_path / "some", teaching={0, 1, 6, 9}, **options)
    batches = watch_batches(trainer)
    trainer.train()
    assert [[index for index, _ in groups] for _, groups in batches] == [
        *([0, 1], [], [0, 1], []),
        *([6], [], [6], []),
        *([9], [], [9], []),
    ]
    with pytest.raises(RuntimeError, match=r"In none of the 12 steps .*nothing was learned"):
        make(tmp_path / "none", teaching=(), **options).train()


def test_a_truncated_completion_counts_in_its_group_and_in_no_average_of_the_loss(tmp_path):
    trainer = make(
        tmp_path,
        teaching=range(6),
        num_prompts=6,
        training={"per_device_train_batch_size": 6},
        mask_truncated_completions=True,
    )
    (step,) = collect(trainer)
    completions = [sample.completion for sample in step.samples]
    whole = [c for c in completions if c.finish_reason == "stop"]
    assert 0 < len(whole) < len(completions)
    totals = trainer.learner.gradient._totals_of_all_ranks(step.samples)
    assert (totals.num_completions, totals.num_tokens) == (len(whole), sum(len(c.token_ids) for c in whole))
    for group in groups_of(step):
        rewards = torch.arange(4.0, dtype=torch.float64)
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        advantages = torch.tensor([sample.advantage for sample in group], dtype=torch.float64)
        assert torch.allclose(advantages, expected)
