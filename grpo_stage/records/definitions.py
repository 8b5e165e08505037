"""What each metric means: the one place. docs/metrics.md holds the same tables, and `make docs` writes them.

A name may have a part in braces (`rewards/{function}/mean`), which stands for a name that the run chooses.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


_AS_IN_TRAINING = "as in training"


@dataclass(frozen=True, slots=True)
class Definition:
    """A row of the tables."""

    names: tuple[str, ...]
    text: str
    """Markdown."""


TRAINING: tuple[Definition, ...] = (
    Definition(
        ("reward",),
        "mean over completions of the weighted sum of the reward functions that applied",
    ),
    Definition(
        ("reward_std",),
        "mean over groups of the sample standard deviation of the totals",
    ),
    Definition(
        ("frac_reward_zero_std",),
        "share of groups in which no two completions that the same functions applied to have different totals"
        " ([what counts as equal](algorithm.md#advantages-advantage_estimator)): their advantages are 0, "
        "except under `reinforce_plus_plus`, `gdpo` and `kl_in_reward`",
    ),
    Definition(
        ("frac_reward_none",),
        "share of groups without a reward: no function applied to any of their completions. They count in "
        "`frac_reward_zero_std` as well. A step that has only such groups logs no `reward`",
    ),
    Definition(
        ("dynamic_sampling/num_rollouts",),
        "rollouts that a batch took; this and the next ones only with `dynamic_sampling`",
    ),
    Definition(
        ("dynamic_sampling/frac_dropped",),
        "share of the sampled groups that were left out of the batches: their totals are all equal, or "
        "`mask_truncated_completions` leaves none of their completions",
    ),
    Definition(
        ("dynamic_sampling/num_kept",),
        "groups of a batch, over all processes; a full one has the prompts of a step x `steps_per_generation`",
    ),
    Definition(
        ("dynamic_sampling/num_waiting",),
        "surplus groups, which wait for the next batch, over all processes",
    ),
    Definition(
        ("dynamic_sampling/num_short_batches",),
        "batches that were not full, since the last line",
    ),
    Definition(
        ("rewards/{function}/mean",),
        "mean over the completions that the function applied to",
    ),
    Definition(
        ("rewards/{function}/std",),
        "sample standard deviation over the completions that the function applied to, of one rollout over all"
        " processes and groups (as in TRL); mean over the rollouts since the last line",
    ),
    Definition(
        ("rewards/{function}/frac_not_applicable",),
        "share of completions for which it returned None",
    ),
    Definition(
        ("rewards/{function}/timeouts",),
        "completions that `accuracy` or `length` could not decide within `timeout` of its `reward_kwargs` "
        "(they count as not applicable), or whose program met a time limit of `code` (it fails the test); over all "
        "processes since the last line, absent where there were none",
    ),
    Definition(
        ("completions/mean_length", "completions/min_length", "completions/max_length"),
        "tokens of a completion, its end token included; with tools those that the model wrote",
    ),
    Definition(
        (
            "completions/mean_terminated_length",
            "completions/min_terminated_length",
            "completions/max_terminated_length",
        ),
        "the same over those that ended by themselves",
    ),
    Definition(
        ("completions/clipped_ratio",),
        "share that reached `max_new_tokens`, or had no room left for the results of its tools",
    ),
    Definition(
        ("curriculum/level",),
        "with `curriculum_threshold`: the level, from 0, whose prompts come first, mean over the rollouts",
    ),
    Definition(
        ("completions/mean_turns",),
        "turns of the model in a completion; this and the next ones only with `tools` or `environment`",
    ),
    Definition(
        ("tools/call_frequency",),
        "calls that were answered, mean over completions",
    ),
    Definition(
        ("tools/failure_frequency",),
        "share of these calls whose answer is the text of an error: an unknown tool, arguments that are no JSON "
        "object, an exception, a call that took longer than `tool_timeout`",
    ),
    Definition(
        ("tools/cut_frequency",),
        "share of the turns of tools in which results were [cut](tools.md#room)",
    ),
    Definition(
        ("tools/unanswered_frac",),
        "share of completions that end with a call: `max_turns` or the room was used up",
    ),
    Definition(
        (
            "completions/frac_groups_all_right",
            "completions/frac_groups_all_wrong",
        ),
        "share of groups whose totals are all equal and lie in the upper quarter, or in the lower quarter, of "
        "the range of totals that the run has seen, 0 included; so they are defined for rewards of any scale. "
        "While every total was 0 such groups are all wrong",
    ),
    Definition(
        ("completions/same_answer_frac",),
        "probability that a completion of one prompt and one of another prompt of the rollout give the same "
        "[final answer](rewards.md#accuracy) (Simpson's index), over all pairs of prompts of all processes; "
        "only prompts whose reference states an answer",
    ),
    Definition(
        ("completions/same_reference_frac",),
        "the same for the references: what `same_answer_frac` is when all answers are right",
    ),
    Definition(
        ("completions/repeated_frac",),
        "share of the sequences of 12 tokens that occurred before in the same completion; mean over the "
        "completions of 23 tokens or more",
    ),
    Definition(
        ("completions/looped_frac",),
        "share of completions that were cut at `max_new_tokens` while their end repeated one sequence of up "
        "to 64 tokens: at least four times, over at least 16 tokens",
    ),
    Definition(
        ("completions/mixed_language_frac",),
        "share of completions with words in a script that neither their prompt nor their reference has ([how "
        "it is told](monitors.md#language-mixing))",
    ),
    Definition(
        ("completions/shared_text_reward_frac",),
        "of all that a rollout's completions earned, counted from its lowest total, the share of texts that "
        "were given word for word to at least a quarter of its prompts; only rollouts of four prompts or more",
    ),
    Definition(
        ("completions/shared_reference_frac",),
        "share of prompts whose reference is that of at least a quarter of the rollout's prompts",
    ),
    Definition(
        ("completions/length_reward_correlation",),
        "correlation (Pearson) of total reward and tokens within a group; mean over the groups in which both differ",
    ),
    Definition(
        ("entropy",),
        "mean over tokens of the policy's entropy at the sampling temperature, in nats ([which "
        "tokens](#over-which-tokens))",
    ),
    Definition(
        ("kl",),
        "mean over tokens of the k3 estimate of KL(policy, reference), in nats, whatever `kl_estimator` is; "
        "only with `beta` > 0",
    ),
    Definition(
        ("beta",),
        "weight of the KL in the step; only with `kl_target`",
    ),
    Definition(
        ("entropy_coef",),
        "coefficient of the entropy bonus in the step; only with `entropy_target`",
    ),
    Definition(
        ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/delta_mean", "clip_ratio/region_mean"),
        "share of tokens whose gradient is cut by the lower bound, by the upper bound, by `delta` (if set), "
        "by any of them; 0 on-policy. `cispo`: the share of weights at the bound, as `high_mean`; `sapo`: 0",
    ),
    Definition(
        ("rollout_correction/weight_mean", "rollout_correction/bounded_frac"),
        "mean over tokens of the weight after truncation or masking; share of tokens whose weight is at a "
        "bound or masked; only with `rollout_correction`",
    ),
    Definition(
        ("off_policy_masked_frac",),
        "share of completions left out by `off_policy_mask_threshold`",
    ),
    Definition(
        ("token_selection/learned_frac", "token_selection/held_frac"),
        "share of tokens in the policy's loss; share of tokens held to their old log-probability; only with "
        "`top_entropy_quantile` below 1 or `covariance_control`",
    ),
    Definition(
        (
            "sampling/importance_sampling_ratio/mean",
            "sampling/importance_sampling_ratio/min",
            "sampling/importance_sampling_ratio/max",
        ),
        "the weight pi_old / pi_sampling before any bound, as `rollout_correction` takes it (of tokens or "
        "completions), over the tokens of the step",
    ),
    Definition(
        ("rollout_rejection/rejected_frac",),
        "share of the step's completions that `rollout_rejection` left out of the loss",
    ),
    Definition(
        ("rollout_ahead/steps_behind",),
        "updates between the policy that sampled the step's completions and the one that learns from them, mean over "
        "groups: 1, and 0 in the first step; only with `rollout_ahead`",
    ),
    Definition(
        ("rollout_ahead/engine_time",),
        "seconds that the engine took for the step's completions, while the step before trained; what the step waited "
        "for them is `time/rollout`. Only with `rollout_ahead`",
    ),
    Definition(
        ("greedy_reward",),
        "mean total reward of the prompts' most probable completions; only with `remax`",
    ),
    Definition(
        ("aux_loss",),
        "the routers' loss over the step, without its coefficient; `num_experts_per_tok` for an even load; "
        "mean over steps weighted by tokens; only with `moe_aux_loss_coef` "
        "([definition](algorithm.md#mixtures-of-experts-moe_aux_loss_coef))",
    ),
    Definition(
        ("gate_mean",),
        "mean over tokens of what the gate of `vespo` leaves of the gradient, 1 on-policy",
    ),
    Definition(
        ("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"),
        "absolute difference between the engine's and the trainer's log-probability of the sampled tokens, on"
        " the first micro-batch of a fresh rollout: the canary. With `rollout_ahead` the first rollout alone is fresh:"
        " in float32 the engine scores the beginnings of two completions after each sync instead",
    ),
    Definition(
        ("sampling/slope/start", "sampling/slope_error/start"),
        "how far the engine has followed the policy since the start (1 for a sound engine), and the standard "
        "error of that; see below. Only in half precision, and in float32 that is rounded",
    ),
    Definition(
        ("sampling/slope/previous", "sampling/slope_error/previous"),
        "the same from each sync to the next, added up over all syncs of the run",
    ),
    Definition(
        ("loss",),
        "the step's loss over all processes; near 0 on-policy, with `moe_aux_loss_coef` near that x `aux_loss`",
    ),
    Definition(
        ("grad_norm",),
        "norm of the gradient before clipping",
    ),
    Definition(
        ("alarms/{monitor}",),
        "alarms of a [monitor](monitors.md) since the last line: in the line after the one that they are about",
    ),
    Definition(
        ("num_tokens",),
        "prompt and completion tokens since the run's start, a prompt counted once for each completion",
    ),
    Definition(
        ("rollout_tokens_per_second",),
        "sampled tokens of all processes over the seconds of the rollout, calls of tools included; with "
        "`rollout_ahead` over those that the engine took",
    ),
    Definition(
        ("update_tokens_per_second",),
        "tokens of the step's completions over all processes, each with its prompt, over the seconds of the update",
    ),
    Definition(
        ("update_tflops",),
        "10^12 FLOP/s of the update on a device: the [model FLOPs](#model-flops) of the tokens that are "
        "trained on over the seconds of the update, mean over processes",
    ),
    Definition(
        ("update_mfu",),
        "model FLOPs utilization: `update_tflops` over what the device can do at most in half precision; only "
        "for bf16 and fp16, on the GPUs whose peak is known (A100, H100, H200, B200, L40S)",
    ),
    Definition(
        ("packing_ratio",),
        "the same tokens of the completions that are trained on, over the tokens that go through the model: "
        "above 1 where completions share a prompt, below 1 where rows are padded",
    ),
    Definition(
        (
            "memory/sync",
            "memory/rollout",
            "memory/canary",
            "memory/reward",
            "memory/logprobs",
            "memory/update",
        ),
        "GiB, the highest of all processes: on a GPU the most that was allocated during the phase; without "
        "one what the process holds at its end",
    ),
    Definition(
        ("time/sync", "time/rollout", "time/canary", "time/reward", "time/logprobs"),
        "seconds of each rollout for: delivering the weights; sampling; the canary's scores, and putting the engine to"
        " sleep; scoring; old and reference log-probabilities",
    ),
    Definition(
        ("time/update", "step_time"),
        "seconds of the forward and backward passes; of the step until the optimizer, rollout included",
    ),
)
"""Metrics of training."""

EVALUATION: tuple[Definition, ...] = (
    Definition(
        ("eval_reward",),
        "mean over completions of the weighted sum of the reward functions that applied",
    ),
    Definition(
        ("eval_rewards/{function}/mean@{n}",),
        "mean over the completions that the function applied to",
    ),
    Definition(
        ("eval_rewards/{function}/pass@{k}",),
        "mean over prompts of the probability that at least one of k completions passes: 1 - C(n - c, k) / "
        "C(n, k) with c of the n passing (Chen et al. 2021, arXiv:2107.03374); k = 1, 2, 4, ... and n",
    ),
    Definition(
        ("eval_rewards/{function}/maj@{n}",),
        "mean over prompts of whether the most frequent answer passes: the mean over the answers where "
        "several are equally frequent, and the share that passes where completions of one answer differ in "
        "passing",
    ),
    Definition(
        ("eval_rewards/{function}/frac_not_applicable", "eval_rewards/{function}/timeouts"),
        "as in training",
    ),
    Definition(
        ("eval_completions/...",),
        "as in training",
    ),
    Definition(
        ("eval_{dataset}_reward", "eval_{dataset}_rewards/{function}/..."),
        "the same over the prompts of one dataset; with several in `eval_dataset`",
    ),
)
"""Metrics of an evaluation."""

TABLES: Mapping[str, Sequence[Definition]] = {"training": TRAINING, "evaluation": EVALUATION}
"""By the name of their place in docs/metrics.md."""


@functools.lru_cache(maxsize=4096)
def row_of(metric: str) -> Definition | None:
    """The row of a metric by its name in the log; None where it has none.

    A metric of an evaluation that has no row of its own is defined as the one of training.
    """
    for definition in (*EVALUATION, *TRAINING):
        if definition.text != _AS_IN_TRAINING and any(_pattern(name).fullmatch(metric) for name in definition.names):
            return definition
    return row_of(metric.removeprefix("eval_")) if metric.startswith("eval_") else None


def definition_of(metric: str) -> str:
    """The definition of a metric by its name in the log, as Markdown; empty where it has none."""
    row = row_of(metric)
    return "" if row is None else row.text


def with_tables(page: str) -> str:
    """docs/metrics.md with its tables written anew, each between its two comments."""
    for name, definitions in TABLES.items():
        rows = [f"| {', '.join(f'`{n}`' for n in each.names)} | {each.text} |" for each in definitions]
        table = "\n".join(["| name | definition |", "|---|---|", *rows])
        begin, end = f"<!-- {name}: from records/definitions.py by `make docs` -->", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"The page has no place for the table of {name}: between `{begin}` and `{end}`.")
        page = f"{before}{begin}\n{table}\n{end}{after}"
    return page


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(name)))
