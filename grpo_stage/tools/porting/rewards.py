"""Reward functions of other systems by their names: which built-in function of ours each one is, if any."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from grpo_stage.tools.porting.port import Fate, Port


@dataclass(frozen=True, slots=True)
class Same:
    """Our function for a function of theirs."""

    ours: str
    settings: Mapping[str, str] = field(default_factory=dict)
    """The settings of ours by the keys of the file that hold them."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    changes_learning: bool = False


_NEEDS_SANDBOX = "it runs code in a sandbox service, and this stage has no such reward"
_ANSWERS = "which answers count as right differs: `grpo-stage try-rewards` shows it on your data"
_LENGTH = "theirs counts characters, ours tokens: set `max_length` (max_new_tokens if it is left out)"

_COSINE = {"min_value_wrong": 0.0, "max_value_wrong": -0.5, "min_value_correct": 0.5, "max_value_correct": 1.0}
"""The defaults of Open-R1's script."""

OPEN_R1: Mapping[str, Same | str] = MappingProxyType(
    {
        "accuracy": Same("accuracy", note=f"{_ANSWERS}; theirs gives 1 where the reference cannot be read"),
        "format": Same("format", note="theirs also wants line breaks inside of the tags"),
        "tag_count": Same("tag_count", note="theirs also wants line breaks around the tags"),
        "cosine": Same(
            "length",
            {f"cosine_{name}": name for name in _COSINE},
            _COSINE,
            note=_LENGTH,
            changes_learning=True,
        ),
        "repetition_penalty": Same(
            "repetition",
            {"repetition_n_grams": "ngram_size", "repetition_max_penalty": "max_penalty"},
            note="n-grams of tokens here, of words there",
        ),
        "soft_overlong_punishment": Same(
            "overlong", {"max_completion_len": "max_length", "soft_punish_cache": "cache_length"}
        ),
        "reasoning_steps": "it counts words such as `First,`: write a function of your own, or leave it out",
        "length": "Kimi's length reward compares the lengths of a batch; our `length` is the cosine of Open-R1",
        "code": _NEEDS_SANDBOX,
        "binary_code": _NEEDS_SANDBOX,
        "ioi_code": _NEEDS_SANDBOX,
        "cf_code": _NEEDS_SANDBOX,
        "code_format": "write `regex` with the form that you want in `reward_kwargs`",
    }
)
TRL: Mapping[str, Same | str] = MappingProxyType(
    {
        "accuracy_reward": Same("accuracy", note=f"{_ANSWERS}; theirs leaves out what cannot be read"),
        "think_format_reward": Same(
            "regex", fixed={"pattern": "(?s)^<think>(?!.*<think>)(.*?)</think>.*$"}, note="the same pattern"
        ),
        "get_soft_overlong_punishment": Same("overlong", fixed={"max_length": 1280, "cache_length": 256}),
    }
)
VERL: Mapping[str, Same | str] = MappingProxyType(
    {"accuracy": Same("accuracy", note="verl and EasyR1 choose or load a function of their own")}
)
SWIFT: Mapping[str, Same | str] = MappingProxyType(
    {
        "accuracy": Same("accuracy", note=_ANSWERS),
        "format": Same("format"),
        "cosine": Same(
            "length",
            {
                "cosine_min_len_value_wrong": "min_value_wrong",
                "cosine_max_len_value_wrong": "max_value_wrong",
                "cosine_min_len_value_correct": "max_value_correct",
                "cosine_max_len_value_correct": "min_value_correct",
                "cosine_max_len": "max_length",
            },
            {"min_value_wrong": -0.5, "max_value_wrong": 0.0, "min_value_correct": 0.5, "max_value_correct": 1.0},
        ),
        "repetition": Same(
            "repetition",
            {"repetition_n_grams": "ngram_size", "repetition_max_penalty": "max_penalty"},
            note="n-grams of tokens here, of words there",
        ),
        "soft_overlong": Same("overlong", {"soft_max_length": "max_length", "soft_cache_length": "cache_length"}),
        "react_format": "it is the form of an agent's calls, which this stage does not have",
        "toolbench": "it scores calls of tools in ms-swift's own form; with `tools` they are run (docs/tools.md)",
    }
)


def port_rewards(
    port: Port,
    names: Sequence[str],
    weights: Sequence[float] | None,
    table: Mapping[str, Same | str],
    path_of: Callable[[str], str | None],
) -> None:
    """Write `reward_funcs`, `reward_weights` and `reward_kwargs` for the functions of a file.

    Args:
        port: where they are written; its keys are `reward_funcs` and `reward_weights`.
        names: of the functions.
        weights: one for each, or None.
        table: what each name is here, or why it is left.
        path_of: the name of a function of the user's in our form; None if it is no such function.
    """
    kept: list[str] = []
    kept_weights: list[float] = []
    settings: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    changes = False
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"`reward_weights` has {len(weights)} values for {len(names)} reward functions ({', '.join(names)}). Give "
            "one for each."
        )
    for i, name in enumerate(names):
        same = table.get(name) or path_of(name)
        if isinstance(same, Same):
            kept.append(same.ours)
            given = {ours: port.get(theirs) for theirs, ours in same.settings.items() if port.has(theirs)}
            if values := {**same.fixed, **given}:
                settings[same.ours] = values
            notes += [f"{name} is `{same.ours}`" + (f" ({same.note})" if same.note else "")]
            changes |= same.changes_learning
            for theirs in same.settings:
                port.put(theirs, {}, Fate.RENAMED, f"a setting of `{same.ours}` in `reward_kwargs`")
        elif same is not None and name not in table:
            kept.append(same)
            notes.append(f"{name} is `{same}`, whose arguments have to be ours (docs/rewards.md)")
        else:
            notes.append(f"{name} is left: {same or 'no function of that name is known here'}")
            changes = True
            continue
        kept_weights.append(1.0 if weights is None else float(weights[i]))
    if not kept:
        port.leave("reward_funcs reward_weights", "; ".join(notes), True)
        return
    ours: dict[str, Any] = {"reward_funcs": ",".join(kept)}
    if weights is not None:
        ours["reward_weights"] = ",".join(f"{weight:g}" for weight in kept_weights)
    if settings:
        ours["reward_kwargs"] = settings
    fate = Fate.COMPUTED if port.has("reward_funcs") else Fate.DEFAULT
    port.put("reward_funcs", ours, fate, "; ".join(notes), changes)
    port.put("reward_weights", {}, Fate.TAKEN, "for the functions that are taken")
