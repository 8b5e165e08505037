"""Remedies as YAML keys. A remedy that the run's own keys forbid is left out: what an alarm proposes can be run."""

from collections.abc import Mapping
from typing import Any

from grpo_stage.arguments import GRPOArguments, grpo_field_names


RATE_DIVISOR = 3
"""A rate that breaks a run is usually several times too high; recovery may divide again."""
ANCHOR_FACTOR = 5
"""Of 0.04, 0.12 and 0.2 the last was the first to hold a run to a part of what its broken reward took from it."""
FIRST_BETA = 0.04
"""DeepSeekMath's."""


def lower_rate(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The learning rate divided by `RATE_DIVISOR`; nothing where the run's is not known."""
    rate = settings.get("learning_rate")
    return {"learning_rate": float(f"{rate / RATE_DIVISOR:.2g}")} if rate else {}


def stronger_anchor(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`ANCHOR_FACTOR` times the weight of the KL to the reference, or DeepSeekMath's where there is none."""
    beta = settings.get("beta") or 0.0
    return legal(settings, {"beta": round(beta * ANCHOR_FACTOR, 6) if beta else FIRST_BETA})


def kept_entropy(settings: Mapping[str, Any], nats: float) -> dict[str, Any]:
    """A target for the entropy, or `clip_cov` where the run has a target or cannot have one; nothing if neither."""
    target = {"entropy_target": float(f"{nats:.2g}")} if settings.get("entropy_target") is None else {}
    if target and (found := legal(settings, target)):
        return found
    if settings.get("covariance_control", "none") == "none":
        return legal(settings, {"covariance_control": "clip_cov"})
    return {}


def balanced_answers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Prompts of frequent answers weigh less, or as much as any answer's where that was not enough."""
    now = settings.get("answer_balance") or 0.0
    return legal(settings, {"answer_balance": 0.5 if now < 0.5 else 1.0}) if now < 1 else {}


def legal(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes`, or nothing where a key of the stage contradicts the run's other keys."""
    names = grpo_field_names()
    keys = {name: settings[name] for name in names if name in settings} | dict(changes)
    keys.setdefault("reward_funcs", "accuracy")
    try:
        GRPOArguments(**keys).validate(given=[*changes])
    except ValueError:
        return {}
    return dict(changes)
