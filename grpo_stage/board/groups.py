"""Groups of completions as the run view shows them: cut where they are long, with thinking and tool turns apart."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grpo_stage.board.asked import number_or_none, whole_numbers
from grpo_stage.board.segments import segments
from grpo_stage.records.completion_groups import ORDERS, CompletionGroups, Filter, Group, Order
from grpo_stage.report.completions import words_changed


GROUPS_AT_ONCE = 4
_SEARCH_S = 1.0
"""A large file is searched in several answers, so that each comes soon."""
_NUM_BARS = 24
MAX_CHARACTERS = 3_000
"""Of a completion; the whole is shown on a click."""
MAX_PROMPT_CHARACTERS = 20_000
MAX_COMPARED_CHARACTERS = 4_000
NUM_TIMES = 8
"""Steps at which a prompt is shown beside each other."""


def groups_found(completions: CompletionGroups, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of completions: `step` (the newest by default), `all` steps, `order`, the filter, and where to go on."""
    steps = completions.steps
    if not steps:
        return {"groups": [], "next": None, "total": 0, "step": None, "bars": None}
    step = asked.get("step")
    wanted_step = steps[-1] if not isinstance(step, int) else max((s for s in steps if s <= step), default=steps[0])
    wanted = Filter(
        step=None if asked.get("all") else wanted_step,
        text=str(asked.get("text") or "")[:1000],
        lowest=number_or_none(asked.get("lowest")),
        highest=number_or_none(asked.get("highest")),
        is_truncated=bool(asked.get("is_truncated")),
    )
    order: Order = chosen if (chosen := asked.get("order")) in ORDERS else "sampled"
    (start,) = whole_numbers({"start": 0, **asked}, "start")
    found, following = completions.search(wanted, order, max(0, start), GROUPS_AT_ONCE, _SEARCH_S)
    groups = completions.ordered(wanted, order)
    return {
        "groups": [group_of(group, records, len(completions.of_prompt(group.prompt))) for group, records in found],
        "next": following,
        "total": len(groups),
        "step": wanted_step,
        "bars": _bars([reward for group in groups for reward in group.rewards]),
    }


def _bars(rewards: Sequence[float]) -> dict[str, Any] | None:
    """A histogram of rewards: each bar's middle and its number of completions."""
    if not rewards:
        return None
    values = np.asarray(rewards)
    if np.ptp(values) == 0:
        return {"x": [float(values[0])], "y": [len(values)], "width": 0.1}
    distinct = np.unique(values)
    if len(distinct) <= _NUM_BARS:  # few values, such as right and wrong: each has its bar
        width = float(np.diff(distinct).min()) * 0.8
        return {"x": distinct.tolist(), "y": [int((values == each).sum()) for each in distinct], "width": width}
    counts, edges = np.histogram(values, bins=_NUM_BARS)
    return {
        "x": ((edges[1:] + edges[:-1]) / 2).tolist(),
        "y": counts.tolist(),
        "width": float(edges[1] - edges[0]) * 0.95,
    }


def group_of(group: Group, records: Sequence[Mapping[str, Any]], num_steps: int) -> dict[str, Any]:
    """A group with its records (at least one); `num_steps` is at how many steps its prompt was sampled."""
    first = records[0]
    return {
        "step": group.step,
        "prompt": group.prompt,
        "num_steps": num_steps,
        "prompt_text": _clean(first.get("prompt") or "")[:MAX_PROMPT_CHARACTERS],
        "reference": _clean(first.get("reference") or "")[:MAX_PROMPT_CHARACTERS],
        "mean": group.mean,
        "completions": [_completion(record) for record in records],
    }


def _completion(record: Mapping[str, Any]) -> dict[str, Any]:
    text = _clean(record["completion"])
    return {
        "parts": _shortened(_parts(record)),
        "num_characters": len(text) if len(text) > MAX_CHARACTERS else None,
        "rewards": {str(name): _finite(value) for name, value in record["rewards"].items()},
        "reward": _finite(record["reward"]),
        "advantage": _finite(record.get("advantage")),
        "num_tokens": record.get("num_tokens"),
        "is_truncated": record.get("finish_reason") == "length",
        "version": record.get("policy_version"),
        "is_match": record["is_match"],
        "place": record["place"],
    }


def _parts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(kind, text) of what is shown apart; with tools turn by turn."""
    turns = record.get("turns")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns) or not turns:
        return segments(_clean(record["completion"]))
    parts: list[tuple[str, str]] = []
    for turn in turns:
        text = _clean(str(turn.get("text", "")))
        if turn.get("role") == "tool":
            parts.append(("tool", text))
        else:
            # In a format without tags a turn that calls tools is shown whole as a call.
            own = segments(text)
            calls = turn.get("num_calls") and not any(kind == "call" for kind, _ in own)
            parts += [("call" if calls and kind == "text" else kind, part) for kind, part in own]
    return parts


def _shortened(parts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The parts up to a number of characters."""
    shown, left = [], MAX_CHARACTERS
    for kind, text in parts:
        if left <= 0:
            break
        shown.append((kind, text[:left]))
        left -= len(text)
    return shown


def text_of(completions: CompletionGroups, step: int, prompt: int, place: int) -> dict[str, Any]:
    """A whole completion, by the place of its line in the file.

    Raises:
        ValueError: if it is not there.
        OSError: if the file can no longer be read.
    """
    group = completions.at(step, prompt)
    for record in completions.records(group) if group else ():
        if record["place"] == place:
            return {"parts": _parts(record)}
    raise ValueError(f"The completion of step {step} is no longer there: the file was replaced.")


def over_steps(completions: CompletionGroups, prompt: int) -> dict[str, Any]:
    """A prompt's completion nearest to the mean reward at each of several steps, and the words that changed.

    Raises:
        OSError: if the file can no longer be read.
    """
    groups = completions.of_prompt(prompt)
    if len(groups) > NUM_TIMES:
        groups = [groups[round(i * (len(groups) - 1) / (NUM_TIMES - 1))] for i in range(NUM_TIMES)]
    times: list[dict[str, Any]] = []
    before: str | None = None
    for group in groups:
        records = completions.records(group)
        if not records:
            continue
        mean = group.mean or 0.0
        nearest = min(records, key=lambda record: abs((record["reward"] or 0.0) - mean))
        text = _clean(nearest["completion"])[:MAX_COMPARED_CHARACTERS]
        changes = [("same", text)] if before is None else list(words_changed(before, text))
        times.append(
            {"step": group.step, "mean": group.mean, "reward": _finite(nearest["reward"]), "changes": changes}
        )
        before = text
    return {"times": times}


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _clean(text: str) -> str:
    # A half of a surrogate pair, which JSON can hold, has no UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")
