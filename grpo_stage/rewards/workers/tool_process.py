"""What a `ToolWorker` runs in its process: calls of tools, each in a process of its own that can be killed.

    trainer --- keeper --- the process of the tools, which has loaded their files once
                             |- a process for each call of a function: it ends with the call
                             |- a process for each episode's environment: it ends with the episode

So a call that hangs or crashes ends no other one, and a function finds its module as the file left it: nothing that an
earlier call has changed, whatever the order of the calls, which is what makes a resumed run go on alike.
"""

import inspect
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, Protocol

from grpo_stage.rewards.workers.event_loop import EventLoop
from grpo_stage.rewards.workers.function_process import let_children_be_terminated
from grpo_stage.rewards.workers.processes import become_keeper, set_death_signal
from grpo_stage.rewards.workers.seeds import seed_generators
from grpo_stage.survival.descendants import kill_descendants


RESET, REWARD = "reset", "get_reward"
"""The methods of an environment that are no tools."""
MOST_AT_ONCE = 16
"""Calls that run at the same time: most tools wait for something else than a processor."""
MOST_CHARACTERS = 1_000_000
"""Of a result: what is longer fits into no context, and would only fill memory and pipes."""


@dataclass(frozen=True, slots=True)
class Request:
    """A call."""

    episode: int
    name: str
    """A tool, or `RESET` or `REWARD` of the episode's environment. `RESET` makes the environment anew."""
    arguments: Mapping[str, Any]
    seed: int
    """Of the random generators, at the beginning of the call."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a call."""

    value: Any
    """The text for the model; of `RESET` a text or None; of `REWARD` whatever it returned, as plain Python values."""
    is_error: bool = False
    is_gone: bool = False
    """The episode's environment is not there: a call before took too long, or ended its process."""


class Loaded(Protocol):
    """The tools in their process."""

    @property
    def functions(self) -> Mapping[str, Callable[..., Any]]:
        """By name."""

    @property
    def environment(self) -> type | None: ...


def serve(
    connection: Connection,
    load: Callable[[], Loaded],
    timeout_s: float,
    patience_s: float,
    environment: Mapping[str, str],
    start_method: str | None,
) -> None:
    """The life of the process, from its start until the trainer closes the pipe.

    Args:
        connection: (requests by number, episodes that have ended) come in, or whether a reply is needed; to that the
            replies go out, by number. In their place a text says why there are none.
        load: returns the tools.
        timeout_s: seconds for one call.
        patience_s: seconds after which a call is slow.
        environment: the trainer's variables, since the fork server may have others.
        start_method: of the trainer's own processes.
    """
    become_keeper()
    multiprocessing.set_start_method(start_method, force=True)
    os.environ.update(environment)
    calls: _Calls | None = None
    while True:
        if calls is not None:
            calls.go_on_until(connection)
        try:
            message = connection.recv()
        except (EOFError, OSError):  # closed, or the trainer is gone
            return
        if calls is None:
            seed_generators(0)
            try:
                calls = _Calls(load(), timeout_s, patience_s)
            except Exception:  # a user's file may raise anything
                connection.send(f"The tools could not be loaded in their process.\n{traceback.format_exc()}")
                return
        if isinstance(message, bool):
            connection.send(calls.replies(message))
        else:
            requests, ended = message
            calls.end(ended)
            calls.add(requests)


@dataclass(slots=True)
class _Child:
    """A process for calls, and this end of its pipe."""

    pid: int
    connection: Connection

    def end(self, with_descendants: bool = False) -> int:
        """Kill it, and what it has started if that is asked for, which takes a while. Returns its status."""
        if with_descendants:
            kill_descendants(self.pid)
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.connection.close()
        return os.waitpid(self.pid, 0)[1]


@dataclass(slots=True)
class _Lane:
    """Calls that come one after another: those of an environment, or a single one of a function."""

    requests: "deque[tuple[int, Request]]"
    """Each with its number."""
    episode: int | None = None
    """Of the environment; None for a function."""
    child: _Child | None = None
    deadline: float = 0.0


@dataclass(slots=True)
class _Calls:
    """Runs calls in children, some at the same time."""

    loaded: Loaded
    timeout_s: float
    patience_s: float
    environments: dict[int, _Child] = field(default_factory=dict)
    """By episode."""
    _waiting: "deque[_Lane]" = field(default_factory=deque)
    _busy: dict[Connection, _Lane] = field(default_factory=dict)
    _replies: dict[int, Reply] = field(default_factory=dict)
    """Those that the trainer does not have yet."""

    def add(self, requests: Mapping[int, Request]) -> None:
        lanes: dict[Any, _Lane] = {}
        for number, request in requests.items():
            is_function = request.name in self.loaded.functions
            key = ("call", number) if is_function else request.episode
            lane = lanes.setdefault(key, _Lane(deque(), episode=None if is_function else request.episode))
            lane.requests.append((number, request))
        self._waiting.extend(lanes.values())
        self._start()

    def end(self, episodes: Collection[int]) -> None:
        """End the environments of these episodes, and what is under way in them."""
        for episode in episodes:
            if (child := self.environments.pop(episode, None)) is not None:
                self._busy.pop(child.connection, None)
                child.end()

    def go_on_until(self, connection: Connection) -> None:
        """Run what there is until something comes from there."""
        while connection not in self._step((connection,)):
            pass

    def replies(self, is_needed: bool) -> dict[int, Reply]:
        """Those that are there once all calls have ended or are slow.

        Args:
            is_needed: wait for one in any case, unless no call is under way.
        """
        while (
            self._waiting
            or any(map(self._is_quick, self._busy.values()))
            or (is_needed and self._busy and not self._replies)
        ):
            self._step(())
        replies, self._replies = self._replies, {}
        return replies

    def _slow_from(self, lane: _Lane) -> float:
        return lane.deadline - self.timeout_s + self.patience_s

    def _is_quick(self, lane: _Lane) -> bool:
        return time.monotonic() < self._slow_from(lane)

    def _step(self, others: tuple[Connection, ...]) -> Sequence[Any]:
        """Wait for a call to end or to become slow, or for one of `others`. Returns what is ready."""
        lanes = self._busy.values()
        ends = [self._slow_from(lane) if self._is_quick(lane) else lane.deadline for lane in lanes]
        ends = [min(end, lane.deadline) for end, lane in zip(ends, lanes, strict=True)]
        ready = wait([*self._busy, *others], max(0.0, min(ends) - time.monotonic()) if ends else None)
        now = time.monotonic()
        for connection, lane in list(self._busy.items()):
            is_late = connection not in ready
            if is_late and lane.deadline > now:
                continue
            del self._busy[connection]
            number, _ = lane.requests.popleft()
            self._replies[number] = self._ended(lane) if is_late else self._received(lane)
            if lane.episode is None and lane.child is not None:
                lane.child.end()
            if lane.requests:
                self._waiting.appendleft(lane)
        self._start()
        return ready

    def _start(self) -> None:
        """Begin with as many of the calls that wait as may run at the same time."""
        while self._waiting and len(self._busy) < MOST_AT_ONCE:
            lane = self._waiting.popleft()
            if (child := self._started(lane)) is None:
                self._replies |= {number: Reply(_GONE, is_error=True, is_gone=True) for number, _ in lane.requests}
            else:
                self._busy[child.connection] = lane

    def _started(self, lane: _Lane) -> _Child | None:
        """Have the lane's child begin with its next call; None if it has no child any more."""
        _, request = lane.requests[0]
        if lane.episode is None:
            lane.child = _fork(self.loaded.functions.get)
        elif request.name == RESET:
            self.end([lane.episode])
            assert self.loaded.environment is not None
            lane.child = self.environments[lane.episode] = _fork(_Instance(self.loaded.environment).method)
        else:
            lane.child = self.environments.get(lane.episode)
        if lane.child is None:
            return None
        lane.deadline = time.monotonic() + self.timeout_s
        try:
            lane.child.connection.send(request)
        except OSError:  # it has ended since its last call
            self._ended(lane)
            return None
        return lane.child

    def _received(self, lane: _Lane) -> Reply:
        assert lane.child is not None
        try:
            reply = lane.child.connection.recv()
        except (EOFError, OSError):
            return self._ended(lane, is_late=False)
        assert isinstance(reply, Reply)
        return reply

    def _ended(self, lane: _Lane, is_late: bool = True) -> Reply:
        """End the lane's child, and say why."""
        assert lane.child is not None
        status = lane.child.end(with_descendants=is_late)
        if lane.episode is not None:
            del self.environments[lane.episode]
        lane.child = None
        if is_late:
            return Reply(f"Error: it took longer than {self.timeout_s:g} s and was ended.", is_error=True)
        code = os.waitstatus_to_exitcode(status)
        how = f"with exit code {code}" if code >= 0 else f"by signal {-code}"
        return Reply(f"Error: its process ended {how}.", is_error=True)


_GONE = "Error: the environment has ended: an earlier call took too long, or ended its process."


class _Instance:
    """An environment that is made at its first call."""

    def __init__(self, environment: type) -> None:
        self._class = environment
        self._instance: Any = None

    def method(self, name: str) -> Callable[..., Any]:
        if self._instance is None:
            self._instance = self._class()
        return getattr(self._instance, name)


def _fork(find: Callable[[str], Callable[..., Any] | None]) -> _Child:
    """A child that answers the requests in its pipe, with the function that `find` has for a name."""
    ours, theirs = Pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            _live(theirs, find)
        finally:
            os._exit(1)
    theirs.close()
    return _Child(pid, ours)


def _live(connection: Connection, find: Callable[[str], Callable[..., Any] | None]) -> NoReturn:
    set_death_signal(signal.SIGKILL)
    let_children_be_terminated()
    loop = EventLoop()
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        reply = _answered(request, find, loop)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send(reply)


def _answered(request: Request, find: Callable[[str], Callable[..., Any] | None], loop: EventLoop) -> Reply:
    seed_generators(request.seed)
    try:
        function = find(request.name)
        assert function is not None
        value = function(**request.arguments)
        if inspect.isawaitable(value):
            value = loop.wait_for(value)
        if request.name == REWARD:
            return Reply(value.tolist() if hasattr(value, "tolist") else value)
        if request.name == RESET and value is None:
            return Reply(None)
        return Reply(as_text(value)[:MOST_CHARACTERS])
    except BaseException as error:  # a user's function may raise anything, and all of it is an answer to the model
        return Reply(f"Error: {type(error).__name__}: {error}"[:MOST_CHARACTERS], is_error=True)


def as_text(value: Any) -> str:
    """A result as the model reads it: a text as it is, all else as JSON where JSON has it, or as `str` writes it."""
    if isinstance(value, str):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)
