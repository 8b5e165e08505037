"""The canary's test for half precision: does the engine's policy move as the trainer's does?"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from peft import PeftModel

from grpo_stage.monitors.canary import StaleRolloutError, beginnings
from grpo_stage.monitors.monitor import Monitor, MonitorRequest, Scores
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.rollout.serialization import group_state, load_group, load_tensors, tensors_state
from grpo_stage.types import Prompt, ReplicatedEngine, RolloutEngine, RolloutGroup


_START_SEQUENCES, _PREVIOUS_SEQUENCES = 16, 8
Answers = Mapping[str, Scores]
"""The scores of each replica of an engine, by its name."""
_ONLY = ""
"""The name of an engine that has no replicas."""

_TOKENS_A_BLOCK = 8
"""Rounding errors of neighboring tokens may depend on each other; errors of different blocks count as independent."""

_MARGIN, _LEAST_ERROR = 0.1, 0.01
"""What a slope may be off for other reasons than noise: another rounding of the adapter, or noise that is not of quite
equal size in two versions. Such a bias does not shrink as a standard error does over a long run."""

_FALSE_ALARMS = 1e-7
"""The probability of an alarm in a sound run, at each test of a slope."""

_NUM_SCORES = 4
"""Calls of `SlopeTest.score` for a version, with nothing to score or not: a pass may need all ranks."""
_MEMORY_SYNCS = 16


@dataclass(slots=True)
class Slope:
    """How much of the policy's change the engine has followed, over tokens that both have scored.

    Let b be the trainer's log-probability of a token under an earlier version, p that under the present version, and
    e the engine's. The slope is that of e - b on p - b through the origin:

        slope = sum (p - b)(e - b) / sum (p - b)^2

    It is 1 for a sound engine, 0 for one that answers with the earlier version, 0.5 for one with half of the change,
    and 2 for one with twice the change.

    The error is the standard error that allows for any dependence within a cluster (the sandwich estimator). It is
    about noise / sqrt(sum (p - b)^2): while it is large, it is too early to tell. A cluster is a block of neighboring
    tokens of all completions of a prompt, since these often begin in the same way. If few clusters hold most of the
    sum, only these count: `num_clusters` is the effective number, sum(xx)^2 / sum(xx^2).

    **Noise in p draws the slope toward 0.5.** A pass in half precision has an error n, and p - b contains n_p - n_b.
    If the errors have equal size and an update makes them independent, sum (p - b)(e - p) is -sum n_p^2 on average.
    Hence

        1 - slope  =  sum n_p^2 / sum (p - b)^2  <=  min(1/2, 2 residual / sum (p - b)^2)

    for a sound engine: never below 0.5, however large the noise is. (The residual of the regression holds at least
    half of sum n_p^2.) The slope of an engine that answers with the earlier version is as far above 0, and never
    above 0.5. So the lower bound of `is_sound` is 0.5 if the noise is large and goes to 1 if it is small, each less a
    margin.
    """

    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0
    """sum (e - b)^2."""
    square_xx: float = 0.0
    """The sum of xx^2 over clusters; the next two are sums over clusters as well."""
    product: float = 0.0
    square_xy: float = 0.0

    def add(self, before: Scores, policy: Scores, engine: Scores) -> None:
        """Add the completions of one prompt: the b, p and e of each, [T] in nats.

        Tokens without a finite log-probability of the trainer are left out: the loss deals with them.
        """
        clusters: dict[int, list[float]] = {}
        for b, p, e in zip(before, policy, engine, strict=True):
            x, y = p.double() - b.double(), e.double() - b.double()
            if not x.isfinite().all():
                continue
            self.yy += y.square().sum().item()
            blocks = zip(x.split(_TOKENS_A_BLOCK), y.split(_TOKENS_A_BLOCK), strict=True)
            for i, (block_x, block_y) in enumerate(blocks):
                cluster = clusters.setdefault(i, [0.0, 0.0])
                cluster[0] += block_x.square().sum().item()
                cluster[1] += (block_x * block_y).sum().item()
        for xx, xy in clusters.values():
            self.xx += xx
            self.xy += xy
            self.square_xx += xx * xx
            self.product += xx * xy
            self.square_xy += xy * xy

    def forget(self, factor: float) -> None:
        """Multiply the weight of everything that was added so far by `factor`."""
        for name in ("xx", "xy", "yy"):
            setattr(self, name, getattr(self, name) * factor)
        for name in ("square_xx", "product", "square_xy"):
            setattr(self, name, getattr(self, name) * factor * factor)

    @property
    def num_clusters(self) -> float:
        return self.xx**2 / self.square_xx if self.square_xx > 0 else 0.0

    @property
    def is_defined(self) -> bool:
        """Whether there is more than one cluster whose tokens have changed."""
        return self.num_clusters > 1.5

    @property
    def value(self) -> float:
        return self.xy / self.xx

    @property
    def error(self) -> float:
        scores = self.square_xy - 2 * self.value * self.product + self.value**2 * self.square_xx
        n = self.num_clusters
        return math.sqrt(max(scores, 0.0) * n / (n - 1)) / self.xx

    @property
    def is_sound(self) -> bool:
        """False if noise alone would give such a slope at most once in 10 million tests."""
        from scipy.special import stdtrit

        quantile = -float(stdtrit(self.num_clusters - 1, _FALSE_ALARMS))  # Student's t
        noise = quantile * max(self.error, _LEAST_ERROR) + _MARGIN
        residual = self.yy - self.value * self.xy
        return max(0.5, 1 - 2 * residual / self.xx) - noise <= self.value <= 1 + noise


@dataclass(frozen=True, slots=True)
class _Probe:
    """Tokens that engine and trainer score, and the trainer's earlier scores of them."""

    groups: tuple[RolloutGroup, ...]
    before: Scores

    def add_to(self, slopes: Sequence[Slope], policy: Iterator[torch.Tensor], engine: Iterator[torch.Tensor]) -> None:
        """Add the probe's tokens to the slopes; takes the scores of its completions from both iterators."""
        before = iter(self.before)
        for group in self.groups:
            count = len(group.completions)
            of_prompt = [list(islice(scores, count)) for scores in (before, policy, engine)]
            for slope in slopes:
                slope.add(*of_prompt)


@dataclass(slots=True, kw_only=True)
class SlopeTest(Monitor):
    """Whether the engine follows the policy, sync by sync: two slopes at each new version.

    *start*: a fixed probe, tokens of the first rollout. Its b comes from the model with the adapter off (LoRA), or
    from the version of the first rollout (other tuning). It finds weights that never arrive, arrive scaled, or arrive
    twice.

    *previous*: a probe from the previous rollout. Its b comes from the version that sampled it. It finds an engine
    that is one sync behind. If updates are small, one sync says little, so evidence adds up: over the whole run, and
    over the last syncs, for a fault that begins late. If updates are large, the present sync alone is enough.

    Of an engine with several replicas each is tested by itself: one that is wrong would be lost in the mean.

    The engine answers (`ask`) while it is awake, and the trainer (`check`) once the engine has given up its memory.
    """

    backend: str
    """The engine's name, for the message."""
    score: Callable[[Sequence[RolloutGroup]], Scores]
    """The trainer's log-probabilities at temperature 1."""
    adapter_off: Callable[[], AbstractContextManager[Any]] | None
    """In this context `score` is that of the model without its adapter; None if there is no adapter."""
    prompts: Sequence[Prompt]
    """The dataset."""
    _start: _Probe | None = None
    _previous: _Probe | None = None
    _since_previous: dict[str, tuple[Slope, Slope]] = field(default_factory=dict)
    """Of each replica, over all syncs and over the last ones."""
    _version: int = -1
    _answers: Answers = field(default_factory=dict)
    """Between `before_sleep` and `after_sleep`."""

    @classmethod
    def of(cls, request: MonitorRequest) -> "SlopeTest | None":
        if not request.tests_slope:
            return None
        return cls(
            backend=request.grpo_args.rollout_backend,
            score=request.score,
            adapter_off=request.policy.disable_adapter if isinstance(request.policy, PeftModel) else None,
            prompts=request.prompts,
        )

    def before_sleep(self, engine: RolloutEngine, groups: Sequence[RolloutGroup], version: int) -> None:
        self._answers = self.ask(engine, groups, version)

    def after_sleep(self, groups: Sequence[RolloutGroup], version: int, metrics: MetricTracker) -> None:
        for name, value in self.check(self._answers, groups, version).items():
            metrics.add(name, value)

    def ask(self, engine: RolloutEngine, groups: Sequence[RolloutGroup], version: int) -> Answers:
        """Each replica's scores of the probes, for `check`; none where there is nothing to compare.

        Args:
            engine: the engine, with the weights of `version`.
            groups: the groups that it has just sampled.
            version: the policy's version.
        """
        if self._start is None and (chosen := beginnings(groups, _START_SEQUENCES)):
            self._start = _Probe(chosen, ())
        is_due = self._start is not None and version != self._version
        if isinstance(engine, ReplicatedEngine):
            return engine.score_each(self._probes) if is_due else {}
        answers = engine.score(self._probes if is_due else ())  # other ranks of the same engine may have something
        return {_ONLY: answers} if is_due else {}

    def check(self, answers: Answers, groups: Sequence[RolloutGroup], version: int) -> dict[str, float]:
        """Compare the engine's answers with the trainer's, and prepare the next comparison.

        Args:
            answers: the result of `ask`.
            groups: the same as in `ask`.
            version: the same as in `ask`.

        Returns:
            The slopes and their standard errors, by metric name; those that are not defined yet are left out. Of
            several replicas, those of the one that is furthest from 1.

        Raises:
            StaleRolloutError: if a slope is not sound.
        """
        if self._start is None or not answers:
            for _ in range(_NUM_SCORES):
                self.score(())  # other ranks may have something to compare
            return {}
        self._version = version
        chosen = beginnings(groups, _PREVIOUS_SEQUENCES)
        probes = [probe.groups if probe else () for probe in (self._start, self._previous)]
        # Each by itself, as its earlier scores were: in another batch the same tokens round differently.
        scores = [score for each in (*probes, chosen) for score in self.score(each)]
        # Not in `ask`: the engine may need its memory until it sleeps.
        with (self.adapter_off or nullcontext)():
            before = self.score(() if self._start.before else self._start.groups)
        if not self._start.before:
            self._start = _Probe(self._start.groups, before)
        from_start, of_syncs = [], []
        for replica, answered in answers.items():
            slopes = self._since_previous.setdefault(replica, (Slope(), Slope()))
            slopes[1].forget(1 - 1 / _MEMORY_SYNCS)
            policy, engine = iter(scores), iter(answered)
            start, this_sync = Slope(), Slope()
            self._start.add_to([start], policy, engine)
            if self._previous is not None:
                self._previous.add_to([*slopes, this_sync], policy, engine)
            origin = "the model without its adapter" if self.adapter_off else "the first rollout"
            for slope, since in ((start, origin), *((each, "the sync before") for each in (*slopes, this_sync))):
                self._judge(slope, replica, since, version)
            from_start.append(start)
            of_syncs.append(slopes[0])
        if chosen:
            self._previous = _Probe(chosen, scores[sum(len(group.completions) for group in self._probes) :])
        shown: dict[str, float] = {}
        for name, slopes_of in (("start", from_start), ("previous", of_syncs)):
            if defined := [slope for slope in slopes_of if slope.is_defined]:
                worst = max(defined, key=lambda slope: abs(slope.value - 1))
                shown |= {f"sampling/slope/{name}": worst.value, f"sampling/slope_error/{name}": worst.error}
        return shown

    def state_dict(self) -> dict[str, Any]:
        """For JSON, exact; `load_state_dict` reads it."""
        return {
            "probes": [
                probe and [[group_state(group) for group in probe.groups], tensors_state(probe.before)]
                for probe in (self._start, self._previous)
            ],
            "since_previous": {
                replica: [dataclasses.asdict(slope) for slope in slopes]
                for replica, slopes in self._since_previous.items()
            },
            "version": self._version,
            "backend": self.backend,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state, unless it belongs to another engine."""
        if state["backend"] != self.backend:
            return
        self._start, self._previous = (probe and self._load_probe(*probe) for probe in state["probes"])
        self._since_previous = {
            replica: (Slope(**whole_run), Slope(**last_syncs))
            for replica, (whole_run, last_syncs) in state["since_previous"].items()
        }
        self._version = state["version"]

    def _load_probe(self, groups: Sequence[dict[str, Any]], before: list[list[float]]) -> _Probe:
        return _Probe(tuple(load_group(group, self.prompts) for group in groups), load_tensors(before) or ())

    @property
    def _probes(self) -> list[RolloutGroup]:
        return [group for probe in (self._start, self._previous) if probe for group in probe.groups]

    def _judge(self, slope: Slope, replica: str, start: str, version: int) -> None:
        if not slope.is_defined or slope.is_sound:
            return
        where = f" at {replica}" if replica else ""
        raise StaleRolloutError(
            f"The {self.backend} engine{where} does not follow the policy: at step {version} its log-probabilities of "
            f"tokens that both score differ from those of {start} by {slope.value:.2f} +- {slope.error:.2f} of what "
            "the trainer's do. 1 is sound, 0 means that the engine answers as then, 0.5 with half of what was trained "
            "since, 2 with twice that. The completions come from another policy than the one that is trained, so the "
            "run is stopped. Try `rollout_backend: hf`; if that is quiet, report the model and the vLLM version."
        )
