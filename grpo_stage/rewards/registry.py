"""The built-in rewards by name, and what each needs. A new one is its function and a row of this table.

`grpo_stage.arguments` reads the names, so that the module of a function is imported when the function is asked for.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class BuiltinReward:
    """One row of the table."""

    place: str
    """Of the factory: a module of `grpo_stage.rewards.builtin` and a name in it."""
    asks_checker: bool = False
    """It asks the `AnswerChecker`, which has processes of its own."""
    may_never_end: bool = False
    """It runs in a process of its own, which can be ended."""
    runs_programs: bool = False
    """It runs programs of completions, for which there has to be a sandbox."""

    @property
    def factory(self) -> Callable[..., Callable[..., Any]]:
        """Called with a `RewardContext` and the settings out of `reward_kwargs`, it returns the reward function."""
        module, name = self.place.split(".")
        return getattr(import_module(f"grpo_stage.rewards.builtin.{module}"), name)


BUILTIN_REWARDS: Mapping[str, BuiltinReward] = MappingProxyType(
    {
        "accuracy": BuiltinReward("correctness.accuracy", asks_checker=True),
        "exact_match": BuiltinReward("correctness.exact_match"),
        "format": BuiltinReward("structure.think_answer_format"),
        "tag_count": BuiltinReward("structure.tag_count"),
        "code": BuiltinReward("code.code", runs_programs=True),
        "length": BuiltinReward("shaping.length", asks_checker=True),
        "overlong": BuiltinReward("shaping.overlong"),
        "repetition": BuiltinReward("shaping.repetition"),
        "regex": BuiltinReward("structure.regex", may_never_end=True),  # a pattern can backtrack for hours
        "environment": BuiltinReward("environment.environment"),
        "reasoning_gym": BuiltinReward("reasoning.reasoning_gym", may_never_end=True),
    }
)


def run_programs(names: Iterable[str]) -> bool:
    """Whether one of the display names `names` runs programs of completions."""
    return any(name in BUILTIN_REWARDS and BUILTIN_REWARDS[name].runs_programs for name in names)


def names_that_ask_checker(names: Collection[str]) -> list[str]:
    """Those of the display names `names` that ask the `AnswerChecker`."""
    return [name for name in names if name in BUILTIN_REWARDS and BUILTIN_REWARDS[name].asks_checker]
