"""Rules of evaluations: what needs evaluation prompts, and what compares evaluations of a run."""

import difflib
from types import SimpleNamespace
from typing import Any

from grpo_stage.algorithm.conditions import Rule
from grpo_stage.host.adapters import items
from grpo_stage.records.evaluation import rewarding_metrics


def _wants_best(v: SimpleNamespace) -> bool:
    """Whether the run compares its evaluations."""
    keys = ("load_best_model_at_end", "early_stopping_steps", "metric_for_best_model")
    return any(getattr(v, key) for key in keys) or v.save_strategy == "best"


def _evaluates(v: SimpleNamespace) -> bool:
    return v.eval_strategy != "no" or v.eval_on_start or v.do_eval


EVALUATION_RULES = (
    Rule(
        lambda v: _evaluates(v) and not v.val_size and not v.eval_dataset,
        "`eval_strategy: {eval_strategy}` (`eval_on_start: {eval_on_start}`, `do_eval: {do_eval}`) has no prompts to "
        "evaluate on. Name one or more datasets in `eval_dataset`, or hold out some of `dataset` with `val_size`.",
    ),
    Rule(
        lambda v: not _evaluates(v) and not (v.eval_num_generations is None and v.eval_temperature is None),
        "`eval_num_generations: {eval_num_generations}` and `eval_temperature: {eval_temperature}` have no effect in "
        "a run that never evaluates. Write `eval_strategy: steps` and `eval_steps`, or leave them out.",
    ),
    Rule(
        lambda v: bool(v.val_size and v.eval_dataset),
        "`val_size: {val_size}` cannot go with `eval_dataset: {eval_dataset}`: the one holds out rows of `dataset`, "
        "the other names rows of its own. Leave one of them out.",
    ),
    Rule(
        lambda v: isinstance(v.val_size, float) and v.val_size == 1,
        "`val_size: {val_size}` would hold out all rows, and leave none to train on. Write `val_size: 1` for one row, "
        "or a share below 1 such as `val_size: 0.1`.",
    ),
    Rule(
        lambda v: v.eval_temperature == 0 and v.eval_num_generations != 1,
        "`eval_temperature: 0` cannot go with `eval_num_generations: {eval_num_generations}` (null is "
        "`num_generations: {num_generations}`): at temperature 0 all completions of a prompt are equal. Write "
        "`eval_num_generations: 1`, or an `eval_temperature` above 0.",
    ),
    Rule(
        lambda v: v.eval_strategy == "no" and _wants_best(v),
        "`load_best_model_at_end`, `early_stopping_steps`, `save_strategy: best` and `metric_for_best_model` compare "
        "evaluations, and with `eval_strategy: no` there are none to compare. Write `eval_strategy: steps` and "
        "`eval_steps`, or leave them out.",
    ),
    Rule(
        lambda v: not _evaluates(v) and bool(v.val_size),
        "`val_size: {val_size}` holds rows out in a run that never evaluates: they are neither trained on nor looked "
        "at. Write `eval_strategy: steps` and `eval_steps`, or leave it out.",
    ),
    Rule(
        lambda v: not _evaluates(v) and bool(v.eval_dataset),
        "`eval_dataset: {eval_dataset}` has no effect in a run that never evaluates. Write `eval_strategy: steps` and "
        "`eval_steps`, or leave it out.",
    ),
    Rule(
        lambda v: (
            v.load_best_model_at_end
            and (v.eval_strategy, v.save_strategy) == ("steps", "steps")
            and (v.eval_steps or v.logging_steps) != v.save_steps
        ),
        "`load_best_model_at_end: true` needs a checkpoint of every step that is evaluated, or the best one may have "
        "none and another is loaded: `eval_steps: {eval_steps}` (null is `logging_steps: {logging_steps}`) and "
        "`save_steps: {save_steps}` must be equal. Make them so, or write `save_strategy: best`, which saves whenever "
        "an evaluation is the best so far.",
    ),
    Rule(
        lambda v: _wants_best(v) and v.greater_is_better is False,
        "`greater_is_better: false` would choose the worst model: `metric_for_best_model` names a reward here, and "
        "more of it is better. Leave it out.",
    ),
)


def check_best_metric(values: SimpleNamespace) -> None:
    """Refuse a `metric_for_best_model` that is no reward of this run's evaluations.

    Raises:
        ValueError: naming the metric, and those that exist.
    """
    if not _wants_best(values):
        return
    metric = values.metric_for_best_model
    functions = [name.rpartition(":")[2].strip() for name in items(values.reward_funcs)]
    size = values.eval_num_generations or values.num_generations
    logged = rewarding_metrics(functions, size, items(values.eval_dataset))
    if metric is None:
        raise ValueError(
            "`metric_for_best_model` is missing: `load_best_model_at_end`, `early_stopping_steps` and `save_strategy: "
            "best` go by it. Write `metric_for_best_model: eval_reward`."
        )
    if f"eval_{metric.removeprefix('eval_')}" not in logged:
        near = difflib.get_close_matches(metric, logged, n=1)
        raise ValueError(
            f"`metric_for_best_model: {metric}` is no reward that evaluations log with `reward_funcs: "
            f"{', '.join(functions)}` and {size} completions a prompt (`eval_num_generations`, or else "
            f"`num_generations`). {f'Did you mean `{near[0]}`? ' if near else ''}There are: {', '.join(logged)}."
        )
    for function, weight in zip(functions, items(values.reward_weights), strict=False):
        if f"rewards/{function}/" in metric and _is_negative(weight):
            raise ValueError(
                f"`metric_for_best_model: {metric}` would keep the model with the most of `{function}`, which is "
                f"punished: its weight in `reward_weights` is {weight}. Write `metric_for_best_model: eval_reward`."
            )


def _is_negative(weight: Any) -> bool:
    try:
        return float(weight) < 0
    except (TypeError, ValueError):
        return False  # not a number: another check refuses it
