"""Completions of several turns: the policy writes, tools answer, the policy goes on.

    round 1   engine.generate(prompts)                                 -> a first turn of each of P x G completions
    round 2   of those that ask for tools: run these, append the results | engine.generate(all that has been written)
    ...       until none asks any more, or it has no turn or no room left

`Episodes` stands between the sampler and any engine, and is an engine itself. A round is one call of the engine for
all completions whose tools have answered: each is a prompt of its own then, whose tokens are everything so far. A tool
that takes long keeps none but its own completion waiting, which joins a later round. Tokens go in as they came out:
what the policy wrote is never encoded again, and results are encoded once.

P prompts    G completions a prompt
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol

import torch

from grpo_stage.rewards.user_tools import row_seed
from grpo_stage.rewards.workers.tool_process import RESET, REWARD, Reply, Request
from grpo_stage.rewards.workers.tool_worker import ToolError
from grpo_stage.rollout.engines.seeds import sample_seed
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutEngine, RolloutGroup, SamplingSettings, Turn


logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call as the policy wrote it."""

    name: str
    arguments: str
    """JSON, of any type."""


class TurnFormat(Protocol):
    """How a chat template writes calls and their results."""

    def text(self, token_ids: Sequence[int], finish_reason: FinishReason) -> str:
        """What was written, without the token that ended it."""

    def calls(self, token_ids: Sequence[int]) -> Sequence[ToolCall]:
        """The calls in a turn that has ended by itself; empty where it asks for none."""

    def results(self, last_token: int, results: Sequence[str], most_tokens: int) -> tuple[tuple[int, ...], str] | None:
        """The tokens that follow a turn and tell its results, up to where the policy writes again.

        Args:
            last_token: the one that ended the turn.
            results: one for each call.
            most_tokens: longer results are cut to it.

        Returns:
            The tokens, and the results as they are told. None if not even empty results have room.
        """


class ToolRunner(Protocol):
    """Runs calls; `rewards.workers.tool_worker.ToolWorker`."""

    check: Callable[[], None]

    def run(self, requests: Sequence[Request]) -> list[Reply]:
        """The replies, in order."""

    def begin(self, requests: Sequence[Request]) -> list[int]:
        """Have these calls run, and return their numbers."""

    def replies(self, is_needed: bool) -> dict[int, Reply]:
        """The new ones, by number, once all calls have ended or are slow; at least one if it is needed."""

    def end(self, episodes: Sequence[int]) -> None:
        """The environments of these episodes are not needed any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeSettings:
    """What a completion of several turns may be."""

    tools: tuple[str, ...]
    """The names of the tools."""
    max_turns: int
    """Turns of the policy."""
    max_turn_tokens: int
    """Tokens of a turn; `SamplingSettings.max_new_tokens` is the room for all turns and their results together."""
    has_environment: bool = False
    has_reward: bool = False
    """Its environment has a reward."""


@dataclass(slots=True)
class _Episode:
    """A completion that grows."""

    number: int
    prompt: Prompt
    sample: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    calls: Sequence[ToolCall] = ()
    """Those that the last turn asks for."""
    replies: dict[int, Reply] = field(default_factory=dict)
    """To these, by their places, as they come."""
    finish_reason: FinishReason = FinishReason.STOP
    reward: float | None = None
    is_over: bool = False

    @property
    def num_sampled_turns(self) -> int:
        return sum(turn.is_sampled for turn in self.turns)

    def seed(self, sampling: SamplingSettings, step: int, place: int = 0) -> int:
        """Of the turn that comes next, and of its calls by their places."""
        return sample_seed(sampling.seed, step, sample_seed(self.prompt.index, self.sample, len(self.turns), place), 0)


class _Asking:
    """Episodes whose tools have not all answered."""

    def __init__(self, runner: ToolRunner) -> None:
        self._runner = runner
        self._episodes: dict[int, _Episode] = {}
        self._calls: dict[int, tuple[_Episode, int]] = {}
        """An episode and a place among its calls, by the runner's number."""

    def __bool__(self) -> bool:
        return bool(self._episodes)

    def add(self, asked: Iterable[tuple[_Episode, Sequence[Request | str]]]) -> None:
        """Have the calls of these episodes run; what is no request is the error that answers it."""
        requests, places = [], []
        for episode, calls in asked:
            self._episodes[episode.number] = episode
            episode.replies = {
                place: Reply(call, is_error=True) for place, call in enumerate(calls) if isinstance(call, str)
            }
            for place, call in enumerate(calls):
                if isinstance(call, Request):
                    requests.append(call)
                    places.append((episode, place))
        if requests:
            self._calls |= zip(self._runner.begin(requests), places, strict=True)

    def answered(self) -> list[_Episode]:
        """Those whose calls are all answered, in order. It waits for all but slow calls: the engine's rounding depends
        on what it computes together, so that a run with quick tools has the same rounds each time."""
        if self._calls:
            for number, reply in self._runner.replies(is_needed=not self._answered()).items():
                if number in self._calls:  # and not of a rollout that an error has ended
                    episode, place = self._calls.pop(number)
                    episode.replies[place] = reply
        answered = self._answered()
        for episode in answered:
            del self._episodes[episode.number]
        return answered

    def _answered(self) -> list[_Episode]:
        return [each for _, each in sorted(self._episodes.items()) if len(each.replies) == len(each.calls)]


class Episodes:
    """An engine whose completions call tools, around one whose completions have a single turn.

    Args:
        engine: samples the turns. It is closed with this one.
        turns: the template's format.
        runner: runs the calls. It is closed by its owner.
        settings: what a completion may be.
    """

    def __init__(
        self, engine: RolloutEngine, turns: TurnFormat, runner: ToolRunner, settings: EpisodeSettings
    ) -> None:
        self.engine = engine
        self._format = turns
        self._runner = runner
        self._settings = settings
        self._has_told_cut = False

    @property
    def logprob_temperature(self) -> float:
        return self.engine.logprob_temperature

    @property
    def on_step(self) -> Callable[[], None]:
        return self.engine.on_step

    @on_step.setter
    def on_step(self, check: Callable[[], None]) -> None:
        self.engine.on_step = self._runner.check = check

    def sync(self, policy: torch.nn.Module, version: int) -> None:
        self.engine.sync(policy, version)

    def score(self, groups: Sequence[RolloutGroup]) -> list[torch.Tensor]:
        return self.engine.score(groups)

    def sleep(self) -> None:
        self.engine.sleep()

    def close(self) -> None:
        self.engine.close()

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`. The first turns are those that the engine itself would sample.

        Raises:
            ToolError: if an environment cannot be reset, or gives no reward.
        """
        numbers = count()
        by_prompt = [
            [_Episode(next(numbers), prompt, sample) for sample in range(sampling.num_generations)]
            for prompt in prompts
        ]
        episodes = [episode for of_prompt in by_prompt for episode in of_prompt]
        try:
            if self._settings.has_environment:
                self._reset(episodes)
            versions = self._play(prompts, episodes, sampling, step)
            if self._settings.has_reward:
                self._ask_rewards(episodes, sampling, step)
        finally:
            if self._settings.has_environment:
                self._runner.end([episode.number for episode in episodes])
        return [
            RolloutGroup(
                prompt=prompt,
                completions=tuple(self._completion(episode) for episode in of_prompt),
                policy_version=versions[0],
            )
            for prompt, of_prompt in zip(prompts, by_prompt, strict=True)
        ]

    def _play(
        self, prompts: Sequence[Prompt], episodes: Sequence[_Episode], sampling: SamplingSettings, step: int
    ) -> list[int]:
        """Sample turns until no episode asks for more. Returns the versions that sampled them, which are one."""
        first = replace(sampling, max_new_tokens=min(self._settings.max_turn_tokens, sampling.max_new_tokens))
        groups = self.engine.generate(prompts, first, step)
        versions = {group.policy_version for group in groups}
        written: Iterator[Completion] = (each for group in groups for each in group.completions)
        going_on, asking = list(episodes), _Asking(self._runner)
        while True:
            for episode, completion in zip(going_on, written, strict=True):
                self._add(episode, completion, sampling.max_new_tokens)
            asking.add(
                (episode, [self._as_request(episode, place, sampling, step) for place in range(len(episode.calls))])
                for episode in going_on
                if episode.calls and episode.num_sampled_turns < self._settings.max_turns
            )
            going_on = []
            while asking and not going_on:
                for episode in asking.answered():
                    self._append(episode, sampling.max_new_tokens)
                    if not episode.is_over:
                        going_on.append(episode)
            if not going_on:
                break
            requests = [self._request(episode, sampling, step) for episode in going_on]
            longest = max(request.room or 0 for request in requests)
            groups = self.engine.generate(requests, replace(sampling, num_generations=1, max_new_tokens=longest), step)
            versions |= {group.policy_version for group in groups}
            written = iter([group.completions[0] for group in groups])
        assert len(versions) <= 1, "the engine has one policy from sync to sync"
        return list(versions)

    def _request(self, episode: _Episode, sampling: SamplingSettings, step: int) -> Prompt:
        """What the engine is asked to go on with. Its index is its own: seeds come from there."""
        room = min(self._settings.max_turn_tokens, sampling.max_new_tokens - len(episode.token_ids))
        return Prompt(
            index=episode.seed(sampling, step),
            token_ids=(*episode.prompt.token_ids, *episode.token_ids),
            messages=(),
            reference=None,
            room=room,
        )

    def _add(self, episode: _Episode, completion: Completion, max_tokens: int) -> None:
        """Append a turn of the policy."""
        room = min(self._settings.max_turn_tokens, max_tokens - len(episode.token_ids))
        token_ids, logprobs = completion.token_ids[:room], completion.sampling_logprobs[:room]
        has_ended = completion.finish_reason is FinishReason.STOP and len(token_ids) == len(completion.token_ids)
        episode.finish_reason = FinishReason.STOP if has_ended else FinishReason.LENGTH
        episode.calls = self._format.calls(token_ids) if has_ended else ()
        episode.token_ids += token_ids
        episode.logprobs += logprobs
        text = self._format.text(token_ids, episode.finish_reason)
        episode.turns.append(Turn(num_tokens=len(token_ids), text=text, is_sampled=True, num_calls=len(episode.calls)))

    def _as_request(self, episode: _Episode, place: int, sampling: SamplingSettings, step: int) -> Request | str:
        """A call for the runner, or the error that answers it."""
        call, seed = episode.calls[place], episode.seed(sampling, step, place + 1)
        if call.name not in self._settings.tools:
            return f"Error: there is no tool {call.name!r}; there are {', '.join(self._settings.tools)}."
        try:
            arguments: Any = json.loads(call.arguments)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            return f"Error: the arguments of {call.name!r} must be a JSON object."
        return Request(episode.number, call.name, arguments, seed)

    def _append(self, episode: _Episode, max_tokens: int) -> None:
        """Append the results of its calls. They take half of the room that is left at most: the policy needs the other
        one to go on. Where they have no room, the episode is over."""
        replies = [episode.replies[place] for place in range(len(episode.calls))]
        results = [str(reply.value) for reply in replies]
        most = (max_tokens - len(episode.token_ids)) // 2
        told = self._format.results(episode.token_ids[-1], results, most)
        if told is None:
            episode.is_over, episode.finish_reason = True, FinishReason.LENGTH
            return
        token_ids, text = told
        is_cut = any(result not in text for result in results)
        if is_cut and not self._has_told_cut:
            self._has_told_cut = True
            logger.warning(
                "The results of a tool were longer than half of the room that a completion had left, and were cut to "
                f"{len(token_ids)} tokens; `tools/cut_frequency` counts such. Raise `max_new_tokens`, or have the "
                "tool return less."
            )
        episode.token_ids += token_ids
        episode.logprobs += [0.0] * len(token_ids)
        episode.turns.append(
            Turn(
                num_tokens=len(token_ids),
                text=text,
                is_sampled=False,
                num_calls=len(replies),
                num_errors=sum(reply.is_error for reply in replies),
                is_cut=is_cut,
            )
        )

    def _reset(self, episodes: Sequence[_Episode]) -> None:
        """Make an environment for each episode. All of a prompt begin alike, with what the prompt tells of them."""
        requests = [reset_request(episode.number, episode.prompt.columns) for episode in episodes]
        for episode, reply in zip(episodes, self._runner.run(requests), strict=True):
            if reply.is_error:
                raise ToolError(f"`reset` of the environment failed for prompt {episode.prompt.index}: {reply.value}")
            if not episode.prompt.text.endswith(reply.value or ""):
                raise ToolError(
                    f"`reset` of the environment returned another text for prompt {episode.prompt.index} than at the "
                    f"start of the run: {reply.value!r:.300}. The completions of a prompt begin alike: what it "
                    "returns may depend on the row, and on the global generators of `random` and numpy, which are "
                    "seeded by the row, and on nothing else."
                )

    def _ask_rewards(self, episodes: Sequence[_Episode], sampling: SamplingSettings, step: int) -> None:
        requests = [Request(episode.number, REWARD, {}, episode.seed(sampling, step)) for episode in episodes]
        for episode, reply in zip(episodes, self._runner.run(requests), strict=True):
            if reply.is_gone:  # it was ended for its last call: no reward applies
                continue
            value = reply.value
            if reply.is_error or not isinstance(value, bool | int | float | None):
                raise ToolError(
                    f"`get_reward` of the environment must return a number or None, and for prompt "
                    f"{episode.prompt.index} there was {value!r:.300}"
                )
            episode.reward = None if value is None else float(value)

    def _completion(self, episode: _Episode) -> Completion:
        return Completion(
            token_ids=tuple(episode.token_ids),
            sampling_logprobs=tuple(episode.logprobs),
            finish_reason=episode.finish_reason,
            text=self._format.text(episode.token_ids, episode.finish_reason),
            turns=tuple(episode.turns),
            environment_reward=episode.reward,
        )


def reset_request(episode: int, columns: Mapping[str, Any]) -> Request:
    """The call that begins an episode of a row, with the row's own seed."""
    seed = row_seed(json.dumps(columns, sort_keys=True, default=str))
    return Request(episode, RESET, columns, seed)
