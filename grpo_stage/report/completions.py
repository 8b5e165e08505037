"""The completions of a run that a page shows, chosen from a file of any size.

The file is read once for its figures, of which about 50 bytes a completion stay in memory, and the chosen lines are
read again by their place in it.
"""

import difflib
import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grpo_stage.records.completions import COMPLETIONS_FILE
from grpo_stage.records.redaction import mask_text
from grpo_stage.report.lines import record_of, records_of


NUM_PROMPTS, NUM_TIMES = 5, 5
"""Prompts whose completions are followed, and at how many steps."""
NUM_BEST = 5
NUM_FREQUENT = 5
NUM_GROUP_STEPS, NUM_GROUPS = 6, 8
"""Steps whose groups are shown, and groups of each."""
MAX_GROUP_SIZE = 64
MAX_CHARACTERS = 2_500
"""Of a text; a longer one keeps its beginning and its end."""
LAST_SHARE = 0.1
"""Best, worst and most frequent completions are those of this last part of the steps."""
_MAX_STEP = 10**18
_MARGIN = 2_000
"""A secret that the cut goes through is masked if it is not longer."""
_LONG_SECRET = "PRIVATE KEY-----"
"""Is in the only secrets that may be longer."""
_HAN = r"\u2e80-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_HAN}]|[^\W{_HAN}]+\s*|[^\w\s]\s*|\s+")
"""A word with the space after it, or a sign; Chinese and Japanese do not put spaces between words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A completion on the page."""

    step: int
    prompt: str
    reference: str
    completion: str
    reward: float | None
    rewards: Mapping[str, float | None]
    advantage: float | None
    num_tokens: int | None
    is_truncated: bool
    changes: Sequence[tuple[str, str]] = ()
    """(`same`, `new` or `gone`, words): the difference from the completion shown before it."""
    group_mean: float | None = None
    """Mean reward of the prompt's completions at this step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The rewards of a prompt's completions at one step, as they were sampled."""

    prompt: str
    rewards: Sequence[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frequent:
    """A text that many completions are."""

    completion: str
    share: float
    num_prompts: int
    mean_reward: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """What a page shows of a run's completions."""

    num: int = 0
    num_damaged: int = 0
    last_steps: tuple[int, int] = (0, 0)
    """The first and the last of the steps that `best`, `worst` and `frequent` are from."""
    over_time: Sequence[Sequence[Shown]] = ()
    """Of each prompt, at several steps."""
    best: Sequence[Shown] = ()
    worst: Sequence[Shown] = ()
    frequent: Sequence[Frequent] = ()
    groups: Sequence[tuple[int, Sequence[Group]]] = ()
    """By step."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class _Figures:
    """A row for each completion."""

    places: array = field(default_factory=lambda: array("q"))
    steps: array = field(default_factory=lambda: array("q"))
    prompts: array = field(default_factory=lambda: array("q"))
    rewards: array = field(default_factory=lambda: array("d"))
    """NaN where no function applied."""
    texts: array = field(default_factory=lambda: array("q"))
    """A hash of the completion."""
    num_damaged: int = 0


def completions_of(folder: Path, secrets: frozenset[str] = frozenset()) -> Completions:
    """What a page shows of the completions in a run's folder; nothing if it holds none.

    Args:
        folder: the run's.
        secrets: masked in every text.
    """
    path = folder / COMPLETIONS_FILE
    figures = _figures(path)
    if not figures.steps:
        return Completions(num_damaged=figures.num_damaged)
    rows = _Rows(figures)
    with path.open("rb") as file:

        def read(row: int) -> Mapping[str, Any]:
            file.seek(int(rows.places[row]))
            return record_of(file.readline()) or {}

        def show(row: int, **more: Any) -> Shown:
            return _shown(read(row), secrets, **more)

        first, last = rows.last_steps()
        late = np.flatnonzero(rows.steps >= first)
        return Completions(
            num=len(rows.steps),
            num_damaged=figures.num_damaged,
            last_steps=(first, last),
            over_time=[list(_followed(rows, prompt, read, secrets)) for prompt in rows.most_sampled()],
            best=[show(row) for row in rows.ranked(late, best=True)],
            worst=[show(row) for row in rows.ranked(late, best=False)],
            frequent=[
                Frequent(completion=_cut(str(read(row).get("completion")), secrets), **facts)
                for row, facts in rows.most_frequent(late)
            ],
            groups=[
                (
                    step,
                    [
                        Group(prompt=_cut(str(read(members[0]).get("prompt") or ""), secrets, 300), rewards=rewards)
                        for members, rewards in groups
                    ],
                )
                for step, groups in rows.groups()
            ],
        )


def _figures(path: Path) -> _Figures:
    figures = _Figures()
    numbers: dict[Any, int] = {}
    for place, record in records_of(path):
        if record is None or not _is_sound(record):
            figures.num_damaged += 1
            continue
        prompt = record.get("prompt_index")
        reward = record.get("reward")
        # Datasets may have the same row twice: the index tells them apart, and earlier versions did not write it.
        key = prompt if isinstance(prompt, int) else hash(record.get("prompt"))
        figures.places.append(place)
        figures.steps.append(record["step"])
        figures.prompts.append(numbers.setdefault(key, len(numbers)))
        figures.rewards.append(math.nan if reward is None else reward)
        figures.texts.append(hash(record["completion"]))
    return figures


def _is_sound(record: Mapping[str, Any]) -> bool:
    step, rewards = record.get("step"), record.get("rewards", {})
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < _MAX_STEP:
        return False
    if not isinstance(record.get("completion"), str) or not isinstance(rewards, dict):
        return False
    numbers = [record.get("reward"), record.get("advantage"), *rewards.values()]
    return all(value is None or _is_number(value) for value in numbers)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53)


class _Rows:
    """The figures as columns [N], and what is chosen by them."""

    def __init__(self, figures: _Figures) -> None:
        self.places = np.frombuffer(figures.places, dtype=np.int64)
        self.steps = np.frombuffer(figures.steps, dtype=np.int64)
        self.rewards = np.frombuffer(figures.rewards, dtype=np.float64)
        self._prompts = np.frombuffer(figures.prompts, dtype=np.int64)
        self._texts = np.frombuffer(figures.texts, dtype=np.int64)

    def last_steps(self) -> tuple[int, int]:
        steps = np.unique(self.steps)
        count = max(1, round(len(steps) * LAST_SHARE))
        return int(steps[-count]), int(steps[-1])

    def most_sampled(self) -> list[int]:
        """The prompts that were sampled at the most steps (two at least); of equals those whose rewards changed."""
        steps, number = np.unique(self.steps, return_inverse=True)
        num_prompts = int(self._prompts.max()) + 1
        pairs = np.unique(self._prompts * len(steps) + number)
        num_steps = np.bincount(pairs // len(steps), minlength=num_prompts)
        known = np.isfinite(self.rewards)
        weights, counts = (
            np.bincount(self._prompts[known], minlength=num_prompts, weights=values)
            for values in (self.rewards[known], None)
        )
        mean = weights / np.maximum(counts, 1)
        square = np.bincount(self._prompts[known], minlength=num_prompts, weights=self.rewards[known] ** 2)
        variance = square / np.maximum(counts, 1) - mean**2
        order = np.lexsort((-variance, -num_steps))
        return [int(prompt) for prompt in order[:NUM_PROMPTS] if num_steps[prompt] > 1]

    def of_prompt(self, prompt: int) -> Iterator[tuple[int, np.ndarray]]:
        """(step, rows) at evenly chosen steps at which the prompt was sampled."""
        rows = np.flatnonzero(self._prompts == prompt)
        for step in _evenly(np.unique(self.steps[rows]), NUM_TIMES):
            yield int(step), rows[self.steps[rows] == step]

    def ranked(self, among: np.ndarray, best: bool) -> list[int]:
        """The rows of the highest or lowest rewards, each of another prompt; of equals the latest."""
        among = among[np.isfinite(self.rewards[among])]
        sign = -1 if best else 1
        order = among[np.lexsort((-among, sign * self.rewards[among]))]
        _, first = np.unique(self._prompts[order], return_index=True)
        return [int(row) for row in order[np.sort(first)][:NUM_BEST]]

    def most_frequent(self, among: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        """(a row, facts) of the texts that are most completions, with one that occurs once left out."""
        _, first, inverse, counts = np.unique(
            self._texts[among], return_index=True, return_inverse=True, return_counts=True
        )
        for text in np.argsort(-counts, kind="stable")[:NUM_FREQUENT]:
            if counts[text] < 2:
                return
            rows = among[inverse == text]
            rewards = self.rewards[rows][np.isfinite(self.rewards[rows])]
            yield (
                int(among[first[text]]),
                {
                    "share": float(counts[text] / len(among)),
                    "num_prompts": len(np.unique(self._prompts[rows])),
                    "mean_reward": float(rewards.mean()) if len(rewards) else None,
                },
            )

    def groups(self) -> Iterator[tuple[int, list[tuple[list[int], list[float | None]]]]]:
        """(step, groups as (rows, rewards)) at evenly chosen steps."""
        for step in _evenly(np.unique(self.steps), NUM_GROUP_STEPS):
            rows = np.flatnonzero(self.steps == step)
            prompts, first = np.unique(self._prompts[rows], return_index=True)
            groups = []
            for prompt in prompts[np.argsort(first)][:NUM_GROUPS]:
                members = rows[self._prompts[rows] == prompt][:MAX_GROUP_SIZE]
                groups.append(([int(row) for row in members], [_finite(value) for value in self.rewards[members]]))
            yield int(step), groups


def _followed(rows: _Rows, prompt: int, read: Any, secrets: frozenset[str]) -> Iterator[Shown]:
    """The completion nearest to the group's mean reward at each of several steps, and what changed."""
    before: str | None = None
    for _, members in rows.of_prompt(prompt):
        rewards = rows.rewards[members]
        known = rewards[np.isfinite(rewards)]
        mean = float(known.mean()) if len(known) else None
        distance = np.where(np.isfinite(rewards), np.abs(rewards - (mean or 0.0)), np.inf)
        record = read(int(members[int(np.argmin(distance))]))
        text = _cut(str(record.get("completion")), secrets)
        changes = () if before is None else tuple(words_changed(before, text))
        yield _shown(record, secrets, changes=changes, group_mean=mean)
        before = text


def _shown(record: Mapping[str, Any], secrets: frozenset[str], **more: Any) -> Shown:
    num_tokens = record.get("num_tokens")
    return Shown(
        step=record["step"],
        prompt=_cut(str(record.get("prompt") or ""), secrets, 600),
        reference=_cut(str(record.get("reference") or ""), secrets, 300),
        completion=_cut(record["completion"], secrets),
        reward=_finite(record.get("reward")),
        rewards={str(name)[:80]: _finite(value) for name, value in list(record.get("rewards", {}).items())[:20]},
        advantage=_finite(record.get("advantage")),
        num_tokens=num_tokens if isinstance(num_tokens, int) else None,
        is_truncated=record.get("finish_reason") == "length",
        **more,
    )


def _finite(value: Any) -> float | None:
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None


def _cut(text: str, secrets: frozenset[str], limit: int = MAX_CHARACTERS) -> str:
    """The text with secrets masked, without its middle where it is long."""
    half, cut = limit // 2, len(text) - limit
    if cut > 2 * _MARGIN and _LONG_SECRET not in text:  # what is left out need not be searched
        begin, end = _clean(text[: half + _MARGIN], secrets), _clean(text[-half - _MARGIN :], secrets)
        return f"{begin[:half]}{_gap(cut)}{end[-half:]}"
    text = _clean(text, secrets)
    return text if len(text) <= limit else f"{text[:half]}{_gap(len(text) - limit)}{text[-half:]}"


def _clean(text: str, secrets: frozenset[str]) -> str:
    # A half of a surrogate pair, which JSON can hold, has no UTF-8.
    return mask_text(text.encode("utf-8", "replace").decode("utf-8"), secrets)


def _gap(num_characters: int) -> str:
    return f" [... {num_characters:,} characters ...] "


def words_changed(before: str, after: str) -> Iterator[tuple[str, str]]:
    """The words of both texts, as (`same`, `gone` or `new`, text)."""
    old, new = (_WORD.findall(text) for text in (before, after))
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new).get_opcodes():
        if kind == "equal":
            yield "same", "".join(new[k:m])
            continue
        if j > i:
            yield "gone", "".join(old[i:j])
        if m > k:
            yield "new", "".join(new[k:m])


def _evenly(values: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the values, the first and the last among them."""
    if len(values) <= count:
        return values
    return values[np.linspace(0, len(values) - 1, count).round().astype(int)]
