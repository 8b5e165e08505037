"""What the keys `reward_funcs`, `reward_weights`, `reward_kwargs` and `reward_columns` may say.

These are all the refusals that need nothing but the keys; `loading` has those that need the code of a function. Light,
since `grpo_stage.arguments` imports it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_stage.algorithm.refusals import apart
from grpo_stage.records.redaction import MASK, mask, strings_in
from grpo_stage.rewards.registry import BUILTIN_REWARDS


REWARD_MODEL = "reward_model"
"""The name in `reward_funcs` of the model that the key `reward_model` names."""
ENVIRONMENT = "environment"
"""The name of the reward that the key `environment` gives, at the end of a completion's turns."""
BATCH_ARGUMENTS = (
    *("prompts", "completions", "completion_ids", "messages", "references", "trainer_state"),
    *("final_turns", "environment_rewards"),
)
"""What every reward function can take, beside the columns of the dataset."""
REWARD_COLUMNS_EXAMPLE = '{"ground_truth": "reward_model.ground_truth"}'
LARGEST_WEIGHT = 1e9


def display_name(spec: str) -> str:
    """What metrics, tables and `reward_kwargs` call an item of `reward_funcs`: `fn` for `file.py:fn`."""
    return spec.rpartition(":")[2].strip()


def as_weight(item: Any) -> float:
    """An item of `reward_weights` as a number, or ValueError."""
    try:
        return float(item)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`reward_weights` holds {item!r}, which is not a number. Write one number for each reward function, "
            "separated by commas or as a YAML list."
        ) from error


def check_rewards(
    names: Sequence[str], weights: Sequence[float] | None, kwargs: Mapping[str, Any], columns: Mapping[str, Any]
) -> None:
    """Refuse what the four keys say, each by itself and together.

    Args:
        names: the items of `reward_funcs`.
        weights: `reward_weights`.
        kwargs: `reward_kwargs`.
        columns: `reward_columns`.

    Raises:
        ValueError: naming the key, its value, the rule and the remedy.
    """
    with apart():
        _check_names(names)
        with apart():
            _check_settings(kwargs, [display_name(name) for name in names])
        if weights is not None:
            _check_weights(weights, names)
    with apart():
        _check_columns(columns)


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise ValueError(
            "`reward_funcs` is missing: without a reward there is nothing to learn from. Name one or more of "
            f"{', '.join(BUILTIN_REWARDS)}, or a function of yours as `path/file.py:function`; or give a "
            "`reward_model`, or an `environment` that gives rewards."
        )
    if len(set(names)) < len(names):
        raise ValueError(
            f"`reward_funcs: {', '.join(names)}` names a function twice. Name each once, and give it more weight in "
            "`reward_weights`."
        )
    display_names = [display_name(name) for name in names]
    for name, spec in zip(display_names, names, strict=True):
        if display_names.count(name) > 1:
            raise ValueError(
                f"reward_funcs: two functions are called {name!r} ({spec!r} is one): metrics and reward_kwargs go by "
                "these names, so they must differ; rename one"
            )
        if name == REWARD_MODEL != spec.strip():
            raise ValueError(
                f"reward_funcs: {spec!r} would be called {REWARD_MODEL!r}, which is the name of the model that the "
                "key of that name gives; rename it"
            )


def _check_settings(kwargs: Mapping[str, Any], display_names: Sequence[str]) -> None:
    for name, settings in kwargs.items():
        if not isinstance(settings, dict):
            raise ValueError(
                f"`reward_kwargs` maps a function's name to its keyword arguments, but {name!r} has "
                f'{mask({name: settings})[name]!r}. Write for example {{"length": {{"max_length": 512}}}}.'
            )
    for name, settings in kwargs.items():
        if name not in display_names:
            raise ValueError(
                f"`reward_kwargs` names {name!r}, which is not in `reward_funcs`: there are {', '.join(display_names)}"
            )
        if MASK in strings_in(settings):
            raise ValueError(
                f"reward_kwargs[{name!r}] has `{MASK}` where a secret was taken out of the recipe. Write the value, "
                "or read it in the function from an environment variable, which no file holds (docs/security.md)"
            )
    if REWARD_MODEL in kwargs:
        raise ValueError(f"reward_kwargs of {REWARD_MODEL!r}: a model has no settings there: remove them")


def _check_weights(weights: Sequence[float], names: Sequence[str]) -> None:
    shown = ", ".join(map(str, weights))
    if len(weights) != len(names):
        raise ValueError(
            f"`reward_weights: {shown}` has {len(weights)} values for the {len(names)} functions of "
            f"`reward_funcs: {', '.join(names)}`. Give one weight for each, in the same order."
        )
    if not all(math.isfinite(weight) and abs(weight) <= LARGEST_WEIGHT for weight in weights):
        raise ValueError(
            f"`reward_weights: {shown}` must be finite and at most {LARGEST_WEIGHT:g} in magnitude, since rewards are "
            "multiplied by them. Write for example 0.5."
        )
    if not any(weights):
        raise ValueError(
            f"`reward_weights: {shown}`: every reward would be 0, and nothing would be learned. Give at least one "
            "function a weight other than 0."
        )


def _check_columns(columns: Mapping[str, Any]) -> None:
    for name, path in columns.items():
        if not isinstance(path, str) or not all(path.split(".")):
            raise ValueError(
                f"`reward_columns` maps an argument's name to the path of a field, but {name!r} has {path!r}. Write "
                f"for example {REWARD_COLUMNS_EXAMPLE}."
            )
        if name in BATCH_ARGUMENTS:
            raise ValueError(
                f"`reward_columns` sets {name!r}, an argument that every function can take. Choose another name"
                f"{', or write `reference_column: ' + path + '`' if name == 'references' else ''}."
            )


def check_filter(metric: str | None, names: Sequence[str]) -> None:
    """Refuse a `filter_metric` that is no reward function of the run.

    Raises:
        ValueError: naming those that there are.
    """
    known = [display_name(name) for name in names]
    if metric is not None and metric not in known:
        raise ValueError(
            f"`filter_metric: {metric}` is no function of `reward_funcs: {', '.join(names)}`. Name one of "
            f"{', '.join(known)}, or leave it out to go by the total reward."
        )
