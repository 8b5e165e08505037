"""Prompts -> completions -> rewards -> advantages -> the steps that train on them.

prompts due -> sync -> rollout -> canary -> rewards -> [batch full?] -> old / ref log-probs -> advantages -> steps
   ^------------------------------------------------------' no, with dynamic_sampling

With `rollout_ahead` the completions were begun in the step before, and after the canary the next ones are begun
(`rollout.ahead`).

P prompts    G completions a prompt
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments

from .algorithm.answer_balance import answer_weights
from .algorithm.catalog import ESTIMATORS
from .arguments import GRPOArguments
from .distributed import all_gather
from .monitors.canary import check_versions
from .monitors.monitor import Monitor
from .records.completions import CompletionsLog
from .records.metrics import record_rollout
from .rewards.answers.verdict import voted_answer
from .rewards.errors import NO_REWARD_REMEDY, UnrewardedError
from .rollout.ahead import DueRollout, RolloutAhead
from .rollout.curriculum import SCORE, Curriculum, levels_of
from .rollout.epochs import PromptStream, choose_epochs, steps_of_epoch
from .rollout.filling import choose_filling
from .rollout.queue import RolloutQueue
from .rollout.sampler import Sampler
from .types import Prompt, RolloutGroup, Sample, SamplingSettings, ScoredGroup, Step, TrainingProgress
from .update.batch import Row, rows_of
from .update.credit import Credit
from .update.logprobs import FrozenPass
from .update.objective import Objective
from .update.reference import ReferencePolicy


class Collector:
    """Collects rollouts into the queue of steps. All ranks call it together.

    Args:
        policy: the unwrapped model.
        args: Trainer's.
        grpo_args: the recipe.
        sampling: how completions are drawn.
        prompts: the dataset.
        prompts_per_step: over all ranks.
        shuffle: whether each epoch has an order of its own.
        sampler: samples and scores.
        frozen: log-probabilities without gradient.
        objective: computes what `kl_in_reward` takes off a reward.
        reference: the policy that the KL is relative to; None without a KL term.
        monitors: see each rollout.
    """

    def __init__(
        self,
        *,
        policy: nn.Module,
        args: TrainingArguments,
        grpo_args: GRPOArguments,
        sampling: SamplingSettings,
        prompts: Sequence[Prompt],
        prompts_per_step: int,
        shuffle: bool,
        sampler: Sampler,
        frozen: FrozenPass,
        objective: Objective,
        reference: ReferencePolicy | None,
        monitors: Iterable[Monitor],
    ) -> None:
        self.prompts_per_step = prompts_per_step
        self.steps_per_epoch = steps_of_epoch(len(prompts), prompts_per_step, grpo_args.num_iterations)
        """An upper bound with dynamic sampling."""
        threshold = grpo_args.curriculum_threshold
        levels = levels_of(prompts) if threshold > 0 else ()
        self.stream = PromptStream(len(prompts), args.seed, shuffle, args.process_index, args.world_size, levels)
        self.curriculum = (
            Curriculum(self.stream, threshold, sampler.rewards.names.index(SCORE)) if threshold > 0 else None
        )
        self.queue = RolloutQueue(prompts)
        self.completions_log = CompletionsLog(
            args.output_dir, sampler.rewards.names, grpo_args.num_completions_to_print, args.process_index == 0
        )
        self.num_tokens = 0
        """Prompt and completion tokens that were sampled so far, over all ranks."""
        self.num_rewarded = 0
        """Groups with a reward so far, over all ranks."""
        self._policy = policy
        self._grpo_args = grpo_args
        self._sampling = sampling
        self._prompts = prompts
        self._sampler = sampler
        self.rewards = sampler.rewards
        self._phases = sampler.phases
        self._tracker = sampler.phases.tracker
        self._frozen = frozen
        self._objective = objective
        self._reference = reference
        self._monitors = tuple(monitors)
        self._estimator = ESTIMATORS[grpo_args.advantage_estimator]
        self._credit = Credit(
            grpo_args.advantage_estimator,
            grpo_args.scale_rewards,
            sampler.rewards.weights,
            grpo_args.mask_truncated_completions,
            _prompt_weights(prompts, grpo_args.answer_balance) if grpo_args.answer_balance > 0 else None,
        )
        self.filling = choose_filling(grpo_args, args, prompts, sampler.rewards.names, self._credit.has_signal)
        self.epochs = choose_epochs(grpo_args, args, self.stream, self.steps_per_epoch, self._is_everything_used)
        self.ahead = RolloutAhead(sampler, sampling, prompts) if grpo_args.rollout_ahead else None

    def collect(self, state: TrainerState) -> None:
        """Sample, score and prepare one rollout: its optimizer steps join the queue in the order of use."""
        count = self.prompts_per_step * self._grpo_args.steps_per_generation
        if self.epochs.is_end(state.global_step):
            self.stream.begin_epoch_if_due()
        filled = self.filling.fill(
            count,
            partial(self._roll_out, count, state),
            lambda: self.epochs.may_roll_out,
            lambda groups: self._frozen.logprobs(self._policy, rows_of([each.group for each in groups])),
        )
        self.filling.report(filled, count, state.global_step + 1, self.epochs.may_roll_out, self._tracker)

        shares = self._shares_of_steps(filled.groups)
        makes_several_steps = len(shares) * self._grpo_args.num_iterations > 1  # all but the first are off-policy
        with self._phases.timed("logprobs"):
            shares = [self._with_old_logprobs(share, makes_several_steps) for share in shares]
            shares = self._with_ref_logprobs(shares)
            if self._estimator.is_of_tokens:
                shares = [self._with_tensors(share, "energies", self._frozen.energies) for share in shares]
        version = None if makes_several_steps else state.global_step
        samples = self._with_advantages([group for share in shares for group in share], version)
        if self._grpo_args.log_completions:
            dropped = map(self._credit.withhold, filled.dropped)
            self.completions_log.record(state.global_step + 1, [own for each in (*samples, *dropped) for own in each])

        remaining = iter(samples)
        steps = []
        for share in shares:
            of_groups = [(group, next(remaining)) for group in share]
            steps.append(tuple(sample for group, own in of_groups if self._is_kept(group) for sample in own))
        # Ahead: the engine may have been asked at another temperature since, and sampling is neutral.
        engine = self._sampler.engine
        temperature = engine.logprob_temperature if self.ahead is None else self._sampling.temperature
        for step in _with_fresh_first(steps, state.global_step) * self._grpo_args.num_iterations:
            self.queue.append(Step(samples=step, logprob_temperature=temperature))

    def check_rewarded(self, num_steps: int) -> None:
        """Raise UnrewardedError if no completion of the run's `num_steps` has a reward."""
        if self.num_rewarded == 0:
            raise UnrewardedError(
                f"No reward function applied to any completion of the {num_steps} steps "
                f"({', '.join(self.rewards.names)} always returned None), so that nothing was learned. "
                f"{NO_REWARD_REMEDY}"
            )

    def state_dict(self) -> dict[str, int]:
        """The counters, ready for JSON."""
        return {"num_tokens": self.num_tokens, "num_rewarded": self.num_rewarded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_tokens, self.num_rewarded = state["num_tokens"], state["num_rewarded"]

    def _is_everything_used(self) -> bool:
        """Whether all that was sampled is trained on."""
        return not self.queue and self.filling.num_waiting == 0

    def _roll_out(self, count: int, state: TrainerState) -> list[ScoredGroup]:
        """Sample and score this rank's share of the next `count` prompts."""
        if self.ahead is not None:
            return self._roll_out_ahead(self.ahead, count, state)
        version = state.global_step
        with self._phases.phase("sync"):
            self._sampler.sync(self._policy, version)
        indices = self.stream.take(count)
        with self._phases.phase("rollout") as clock:
            greedy = self._greedy([self._prompts[i] for i in indices], version)
            groups = self._sampler.generate(
                [self._prompts[i] for i in indices], self._sampling, step=version, version=version
            )
        with self._phases.phase("canary"):
            self._ask_monitors(groups, version)
            self._sampler.engine.sleep()
            self._tell_monitors(groups, version)
        return self._scored(groups, greedy, clock.seconds, state)

    def _roll_out_ahead(self, ahead: RolloutAhead, count: int, state: TrainerState) -> list[ScoredGroup]:
        """Score this rank's share of the rollout that was begun in the step before, and begin with the next one."""
        version = state.global_step
        if any(all_gather(ahead.is_under_way)):
            with self._phases.phase("rollout"):
                ahead.settle()
        with self._phases.phase("sync"):
            self._sampler.sync(self._policy, version)
        rollout = ahead.take() or DueRollout(self.stream.take(count))
        num_behind = 0 if rollout.groups is None else 1
        if any(all_gather(rollout.groups is None)):  # in the first step, and after the engine has failed
            with self._phases.phase("rollout") as clock:
                if rollout.groups is None:
                    prompts = [self._prompts[i] for i in rollout.indices]
                    rollout.groups = self._sampler.generate(prompts, self._sampling, step=version, version=version)
            rollout.seconds = rollout.seconds or clock.seconds
        groups = rollout.groups
        assert groups is not None
        check_versions(groups, version, num_behind)
        with self._phases.phase("canary"):
            self._ask_monitors(groups, version)
            if version + 1 < state.max_steps:
                ahead.submit(self.stream.take(count), step=version + 1)
            self._tell_monitors(groups, version)
        self._tracker.add("rollout_ahead/steps_behind", num_behind * len(groups), len(groups))
        self._tracker.add("rollout_ahead/engine_time", rollout.seconds)
        scored = self._scored(groups, [], rollout.seconds, state)
        if num_behind == 0 or self._grpo_args.rollout_correction != "none":
            return scored
        # Log-probabilities of the policy that sampled, by the engine: the trainer has that policy no longer.
        return [
            dataclasses.replace(
                each, old_logprobs=tuple(torch.tensor(own.sampling_logprobs) for own in each.group.completions)
            )
            for each in scored
        ]

    def _scored(
        self, groups: Sequence[RolloutGroup], greedy: Sequence[RolloutGroup], seconds: float, state: TrainerState
    ) -> list[ScoredGroup]:
        version = state.global_step
        with self._phases.timed("reward"):
            progress = TrainingProgress(global_step=version, max_steps=state.max_steps, epoch=float(state.epoch or 0))
            scored = self._sampler.score(groups, progress)
            if self._estimator.needs_greedy:
                scored = self._beside_greedy(scored, self._sampler.score(greedy, progress))
        self._record(scored, seconds)
        if self.curriculum is not None:
            self.curriculum.heed(scored, self._tracker)
        for monitor in self._monitors:
            monitor.after_scoring(scored, version, self._tracker)
        return scored

    def _greedy(self, prompts: Sequence[Prompt], version: int) -> list[RolloutGroup]:
        """The most probable completion of each prompt, for the estimator that compares with it."""
        if not self._estimator.needs_greedy:
            return []
        sampling = dataclasses.replace(self._sampling, temperature=0.0, num_generations=1)
        return self._sampler.generate(prompts, sampling, step=version, version=version)

    def _beside_greedy(self, scored: Sequence[ScoredGroup], greedy: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        totals = [each.total_rewards[0] for each in greedy if each.total_rewards[0] is not None]
        self._tracker.add("greedy_reward", sum(totals), len(totals))
        return [
            dataclasses.replace(own, greedy_rewards=other.rewards[0])
            for own, other in zip(scored, greedy, strict=True)
        ]

    def _ask_monitors(self, groups: Sequence[RolloutGroup], version: int) -> None:
        """What monitors do while the engine has the weights of `version` and nothing to do."""
        with self._phases.limited("canary", self._grpo_args.rollout_timeout, "rollout_timeout"):
            for monitor in self._monitors:
                monitor.before_sleep(self._sampler.engine, groups, version)

    def _tell_monitors(self, groups: Sequence[RolloutGroup], version: int) -> None:
        """What they do once it sleeps, or samples ahead."""
        for monitor in self._monitors:
            monitor.after_sleep(groups, version, self._tracker)

    def _record(self, scored: Sequence[ScoredGroup], seconds: float) -> None:
        record_rollout(self._tracker, scored, self.rewards.names, self.rewards.weights)
        for name, number in self.rewards.take_counters().items():
            self._tracker.count(f"rewards/{name}", number)
        own = (
            sum(completion.num_sampled for s in scored for completion in s.group.completions),
            sum(len(s.group.prompt.token_ids) * len(s.group.completions) for s in scored),
            sum(s.has_reward for s in scored),
        )
        tokens, prompt_tokens, num_rewarded = (sum(column) for column in zip(*all_gather(own), strict=True))
        self._tracker.add("rollout_tokens_per_second", tokens, seconds)
        self.num_tokens += tokens + prompt_tokens
        self.num_rewarded += num_rewarded

    def _shares_of_steps(self, groups: Sequence[ScoredGroup]) -> list[Sequence[ScoredGroup]]:
        """This rank's groups of each step. All ranks have the same number of steps; some may lack the last prompts."""
        size = self.prompts_per_step // self.stream.world_size
        shares = [groups[start : start + size] for start in range(0, len(groups), size)]
        num_steps = max(1, *all_gather(len(shares)))
        return shares + [()] * (num_steps - len(shares))

    def _is_kept(self, group: ScoredGroup) -> bool:
        return not self._grpo_args.mask_zero_std_groups or self._credit.has_signal(group)

    def _with_old_logprobs(self, share: Sequence[ScoredGroup], makes_several_steps: bool) -> Sequence[ScoredGroup]:
        """The share with the log-probabilities of the policies that sampled it.

        They are left out where the present policy sampled the share and no use of it needs them.
        """
        has_waited = any(group.old_logprobs is not None for group in share)
        if not (makes_several_steps or has_waited or self._grpo_args.kl_in_reward):
            self._frozen.logprobs(self._policy, ())  # other ranks may have some that waited
            return share
        return self._with_tensors(share, "old_logprobs", self._frozen.logprobs)

    def _with_ref_logprobs(self, shares: Sequence[Sequence[ScoredGroup]]) -> list[Sequence[ScoredGroup]]:
        if self._reference is None:
            return list(shares)
        with self._reference.activate(self._policy) as reference:
            return [
                self._with_tensors(share, "ref_logprobs", lambda _, rows: self._frozen.logprobs(reference, rows))
                for share in shares
            ]

    def _with_tensors(
        self,
        share: Sequence[ScoredGroup],
        name: str,
        compute: Callable[[nn.Module, Sequence[Row]], Sequence[torch.Tensor]],
    ) -> list[ScoredGroup]:
        """With `name` of each group that is kept and has none yet, as `compute` gives it under the policy."""
        lacks = [self._is_kept(group) and getattr(group, name) is None for group in share]
        rows = rows_of([group.group for group, is_lacking in zip(share, lacks, strict=True) if is_lacking])
        flat = iter(compute(self._policy, rows))
        result = []
        for group, is_lacking in zip(share, lacks, strict=True):
            values: Any = {name: tuple(next(flat) for _ in group.group.completions)} if is_lacking else {}
            result.append(dataclasses.replace(group, **values))
        return result

    def _with_advantages(self, groups: Sequence[ScoredGroup], version: int | None) -> list[tuple[Sample, ...]]:
        """The samples of each group. Statistics are taken over the whole batch, on all ranks.

        Args:
            groups: those of the whole batch, of this rank.
            version: the policy's, if they are trained on before it changes: those that it has sampled have a ratio
                of 1.
        """
        if not self._grpo_args.kl_in_reward:
            return self._credit.assign(groups)
        old, ref = (
            [tokens for group in groups for tokens in getattr(group, name) or ()]
            for name in ("old_logprobs", "ref_logprobs")
        )
        penalties = self._objective.reward_penalties(old, ref)
        groups = [
            dataclasses.replace(each, old_logprobs=None) if each.group.policy_version == version else each
            for each in groups
        ]
        return self._credit.assign(groups, penalties)


def _prompt_weights(prompts: Sequence[Prompt], exponent: float) -> list[float]:
    references = [prompt.reference or "" for prompt in prompts]  # `prepare` refuses prompts without one
    return answer_weights([voted_answer(each, is_reference=True) or each.strip() for each in references], exponent)


def _with_fresh_first(steps: Sequence[tuple[Sample, ...]], version: int) -> list[tuple[Sample, ...]]:
    """The steps, with the first one that has a fresh sample (of `version`) on any rank moved to the front.

    The canary checks the first step after a rollout, and needs fresh samples there. Without this the first step may
    be empty, or hold only groups that waited for it.
    """
    ranks = all_gather([any(sample.policy_version == version for sample in step) for step in steps])
    is_fresh = [any(of_step) for of_step in zip(*ranks, strict=True)]
    first = is_fresh.index(True) if True in is_fresh else 0
    return [steps[first], *steps[:first], *steps[first + 1 :]]
