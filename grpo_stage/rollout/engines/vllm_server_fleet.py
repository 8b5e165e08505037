"""The servers of a run together: who is there, what each holds, and which request goes to whom.

A server is *up* from the delivery that it has taken until it fails, and otherwise *out*. A failing one is named in a
warning, its requests go to the others with the same seeds, and it takes no part until a later delivery finds it well
again. So no request reaches a server that holds another version than the one that is asked for.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from grpo_stage.rollout.engines.vllm_server_client import RefusedError, ServerClient, TokenAnswer, UnreachableError
from grpo_stage.types import EngineLostError


MOST_IN_FLIGHT = 256
"""Requests that one server gets at once: vLLM's own number of concurrent sequences. What is left goes to whichever
server has room first."""
_TRIES = 3
"""How often a server that says that it is well may fail one request."""
_PAUSE_S = 0.5
"""Before it is asked again, doubled each time."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a server may be silent, seconds."""

    ping_every: float = 2.0
    ping: float = 30.0
    """Without an answer for so long, while it has something to do, it counts as dead. A busy server answers, since its
    HTTP process is none of those that compute."""
    rejoin: float = 3.0
    """The same for a server that is out, at each delivery."""


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample, or to score."""

    token_ids: tuple[int, ...]
    sampling: Mapping[str, Any]
    """vLLM's `SamplingParams`, seed included."""


@dataclass(frozen=True, slots=True)
class Held:
    """The version that a server has taken."""

    name: str
    """What it is asked by. That of an adapter is new for each version, so that a server that lacks it says so."""
    instance: str | None = None
    """The start of the engine that holds it, where the name is the model's for every version."""


@dataclass(slots=True, eq=False)
class Server:
    """What is known of one server."""

    client: ServerClient
    held: Held | None = None
    """None before the first delivery, and while it is out."""
    is_out: bool = False
    """Whether it has failed and not come back."""
    told: str | None = None
    """Why it is out, as it was warned of last; None once it was found well again."""
    tasks: set["asyncio.Task[Any]"] = field(default_factory=set)
    """What is asked of it now."""

    @property
    def is_up(self) -> bool:
        return self.held is not None

    @property
    def url(self) -> str:
        return self.client.url


Give = Callable[[ServerClient], Awaitable[Held]]
"""Hands a version to a server, and says what the server then holds."""
Greet = Callable[[ServerClient], Awaitable[object]]
"""Asks a server that was out whether the run can still use it. Raises ValueError if not."""


class Fleet:
    """All servers. Its coroutines run in one event loop, one at a time.

    Args:
        clients: one a server.
        patience: when a server counts as dead.
        warn: told of each server that fails, or comes back.
        remedy: what has to be done to a server that fails, by its address; None if it need only answer again.
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        patience: Patience,
        warn: Callable[[str], object],
        remedy: Callable[[str], str | None] = lambda url: None,
    ) -> None:
        self.servers = [Server(client) for client in clients]
        self._patience = patience
        self._warn = warn
        self._remedy = remedy

    @property
    def up(self) -> list[Server]:
        return [server for server in self.servers if server.is_up]

    async def answer(self, requests: Sequence[Request], most: int = MOST_IN_FLIGHT) -> list[TokenAnswer]:
        """The answers, in order. Each request goes to the server with the fewest under way, which has at most `most`.

        Raises:
            EngineLostError: if no server is left.
            RuntimeError: if a server refuses a request.
        """
        answers: dict[int, TokenAnswer] = {}
        waiting = deque(range(len(requests)))
        async with self._watching():
            while waiting:
                by = await self._answer(requests, most, waiting, answers)
                for server in set(by.values()):
                    if not await self._is_same(server):
                        waiting.extend(index for index, answerer in by.items() if answerer is server)
        return [answers[index] for index in range(len(requests))]

    async def _answer(
        self, requests: Sequence[Request], most: int, waiting: deque[int], answers: dict[int, TokenAnswer]
    ) -> dict[int, Server]:
        """Fill in the answers to the requests at `waiting`, and return who has given each of them."""
        by: dict[int, Server] = {}
        asked: dict[asyncio.Task[TokenAnswer], tuple[int, Server]] = {}
        try:
            while waiting or asked:
                while waiting:
                    server = min(self._left(), key=lambda each: len(each.tasks))
                    if len(server.tasks) >= most:
                        break
                    index = waiting.popleft()
                    asked[self._begin(server, self._asked(server, requests[index]))] = index, server
                done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index, server = asked.pop(task)
                    answer = self._result(server, task)
                    if answer is None:
                        waiting.appendleft(index)
                    else:
                        answers[index], by[index] = answer, server
        finally:
            await _cancel(asked)
        return by

    async def answer_each(
        self, requests: Sequence[Request], most: int = MOST_IN_FLIGHT
    ) -> dict[str, list[TokenAnswer]]:
        """The answers of every server that is up to all requests, by its address; it has at most `most` at once.

        Raises:
            EngineLostError, RuntimeError: as `answer`.
        """

        async def all_of(server: Server) -> list[TokenAnswer]:
            room = asyncio.Semaphore(most)

            async def one(request: Request) -> TokenAnswer:
                async with room:
                    return await self._asked(server, request)

            asked = [asyncio.ensure_future(one(request)) for request in requests]
            try:
                return list(await asyncio.gather(*asked))
            finally:
                await _cancel(asked)

        answers: dict[str, list[TokenAnswer]] = {}
        async with self._watching():
            tasks = {server: self._begin(server, all_of(server)) for server in self._left()}
            try:
                await asyncio.wait(tasks.values())
                for server, task in tasks.items():
                    own = self._result(server, task)
                    if own is not None and await self._is_same(server):
                        answers[server.url] = own
            finally:
                await _cancel(tasks.values())
            self._left()
        return answers

    async def deliver(self, give: Give, greet: Greet) -> None:
        """Have every server take a version, those included that were out and answer again.

        Raises:
            EngineLostError: if no server has taken it.
            RuntimeError, ValueError: if a server that was up refuses it.
        """
        self.hold(await self.each(await self.willing(greet), give))

    async def willing(self, greet: Greet) -> list[Server]:
        """The servers that a version goes to: those that have not failed, and those that are back."""

        async def greeted(client: ServerClient) -> ServerClient:
            await client.ping(self._patience.rejoin)
            await greet(client)
            return client

        back = await self.each([server for server in self.servers if server.is_out], greeted)
        for server in back:
            server.told = None
        return [server for server in self.servers if not server.is_out or server in back]

    async def each(self, servers: Iterable[Server], do: Callable[[ServerClient], Awaitable[T]]) -> dict[Server, T]:
        """What comes of a part of a delivery, which all do at the same time; those that fail are left out.

        Raises:
            RuntimeError, ValueError: if a server that was up refuses it.
        """
        found: dict[Server, T] = {}
        async with self._watching():
            tasks = {server: self._begin(server, do(server.client)) for server in servers}
            try:
                if tasks:
                    await asyncio.wait(tasks.values())
                for server, task in tasks.items():
                    error = None if task.cancelled() else task.exception()
                    if server.is_out and isinstance(error, RefusedError | ValueError):
                        if server.told != str(error):
                            server.told = str(error)
                            self._warn(f"The vLLM server {server.url} answers again and stays out: {error}")
                    elif (result := self._result(server, task)) is not None:
                        found[server] = result
            finally:
                await _cancel(tasks.values())
        return found

    def hold(self, held: Mapping[Server, Held]) -> None:
        """Note what the servers have taken.

        Raises:
            EngineLostError: if no server has taken it.
        """
        for server in self.servers:
            if server in held:
                if server.is_out:
                    self._warn(f"The vLLM server {server.url} is back, and holds the present version.")
                server.held, server.is_out = held[server], False
        self._left()

    def lose(self, urls: Collection[str], reason: str) -> None:
        """Take the servers at `urls` out together."""
        lost = [server for server in self.servers if server.url in urls]
        for server in lost:
            server.held = None  # so that none is named as one that is left
        for server in lost:
            self._lose(server, reason)

    @property
    def holdings(self) -> list[Held | None]:
        """What each server holds."""
        return [server.held for server in self.servers]

    def adopt(self, holdings: Sequence[Held | None]) -> None:
        """Take over what another rank has delivered."""
        for server, held in zip(self.servers, holdings, strict=True):
            server.held, server.is_out = held, held is None
        self._left()

    def _lose(self, server: Server, reason: str) -> None:
        """Take a server out until a later delivery."""
        if not server.is_out or server.told is None:
            remedy = self._remedy(server.url)
            server.held, server.is_out, server.told = None, True, remedy or reason
            left = len(self.up)
            others = f"Its prompts go to the {left} that are left, with the same seeds. " if left else ""
            again = remedy or "It takes part again once it answers and has taken a version."
            self._warn(f"The vLLM server {server.url} is out: {reason}. {others}{again}")
        for task in server.tasks:
            task.cancel()

    async def _is_same(self, server: Server) -> bool:
        """Whether a server is still the one that took the version, after it has answered."""
        held = server.held
        if held is None or held.instance is None:
            return held is not None
        try:
            instance = (await server.client.configuration()).get("instance_id")
        except (UnreachableError, RefusedError) as error:
            self._lose(server, str(error))
            return False
        if instance != held.instance:
            self._lose(server, "it was started anew since it took the version, and what it answered is thrown away")
        return instance == held.instance

    def _left(self) -> list[Server]:
        if not self.up:
            raise EngineLostError(
                f"None of the {len(self.servers)} vLLM servers answers any more "
                f"({', '.join(server.url for server in self.servers)}); the warnings above say since when and why. "
                "Start them again as `grpo-stage serve` says, and resume the run."
            )
        return self.up

    def _begin(self, server: Server, work: Any) -> "asyncio.Task[Any]":
        task = asyncio.ensure_future(work)
        server.tasks.add(task)
        task.add_done_callback(server.tasks.discard)
        return task

    async def _asked(self, server: Server, request: Request) -> TokenAnswer:
        """One server's answer; a failure of one that says that it is well is not its end."""
        assert server.held is not None, "only servers that are up are asked"
        name = server.held.name
        for i in range(_TRIES):
            try:
                answer = await server.client.generate(name, request.token_ids, request.sampling)
                if answer.finish_reason not in ("stop", "length"):
                    raise UnreachableError(f"it broke a completion off ({answer.finish_reason})")
                return answer
            except RefusedError as error:
                if error.status == 404:
                    raise UnreachableError(f"it no longer knows {name}, as after a restart") from error
                raise
            except UnreachableError:
                await server.client.ping(self._patience.ping)  # if this fails, that is why the server is out
                if i + 1 == _TRIES:
                    raise
                await asyncio.sleep(_PAUSE_S * 2**i)
        raise AssertionError("every try returns or raises")

    def _result(self, server: Server, task: "asyncio.Task[T]") -> T | None:
        """What came of a task; None if the server is out."""
        if task.cancelled():
            return None
        error = task.exception()
        if error is None:
            return task.result()
        if isinstance(error, UnreachableError):
            self._lose(server, str(error))
            return None
        if isinstance(error, RefusedError):
            raise RuntimeError(f"The vLLM server {server.url} refuses what the run asks for: {error}") from error
        raise error

    @contextlib.asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        """Take out each server that is silent for too long while the block runs."""
        watches = [asyncio.ensure_future(self._watch(server)) for server in self.servers]
        try:
            yield
        finally:
            await _cancel(watches)

    async def _watch(self, server: Server) -> None:
        while True:
            await asyncio.sleep(self._patience.ping_every)
            if not server.tasks:
                continue
            try:
                await server.client.ping(self._patience.rejoin if server.is_out else self._patience.ping)
            except (UnreachableError, RefusedError) as error:
                self._lose(server, str(error))


async def _cancel(tasks: Any) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
