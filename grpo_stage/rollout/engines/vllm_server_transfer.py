"""Whole weights to vLLM servers by vLLM's own weight transfer: part by part over NCCL, with no file in between.

vLLM has four phases: a server joins a group with the trainer, begins an update, takes any number of parts, and ends
the update. Each server has a group of its own here, its workers and this process, so that one that fails takes no
other along.

NCCL itself waits for ever. So what it does is done in threads that nobody waits for longer than `limit_s`, and the
communicator of a server that has not done its own share by then is aborted.
"""

import asyncio
import concurrent.futures
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch

from grpo_stage.rollout.engines.vllm_server_client import ServerClient, UnreachableError
from grpo_stage.rollout.engines.weights import in_parts


BYTES_OF_A_PART = 2**28
"""Of tensors that are sent as one; a larger tensor is a part by itself."""
LIMIT_S = 60.0
"""How long a server may take to join, or over one part: a slow network carries this many bytes in seconds."""
_POLL_S = 0.001
_START_ANEW = (
    "A transfer of weights to it was broken off, and vLLM can begin no other in the same process. Start it anew, as "
    "`grpo-stage serve` says: it takes part again, in this run or in another, after that."
)


class NCCLCommunicator:
    """vLLM's own communicator, with an end to its waiting: `abort` ends what another thread waits for, at any time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own: Any = None
        self._is_aborted = False

    def join(self, group: Any) -> None:
        """Meet a server's workers.

        Args:
            group: vLLM's `StatelessProcessGroup`, with this process as rank 0.
        """
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream()  # what is stuck there keeps nothing else waiting
            with torch.cuda.stream(self._stream):
                # It waits in its own construction, and has to be known here by then to be aborted.
                self._own = PyNcclCommunicator.__new__(PyNcclCommunicator)
                PyNcclCommunicator.__init__(self._own, group, self._device)
        if self._own.disabled:  # it would send nothing, and say nothing of it
            raise ValueError(
                "`vllm_server_transfer: nccl` is not possible: vLLM finds no NCCL in the trainer's environment, or "
                "VLLM_DISABLE_PYNCCL is set. Install vLLM for CUDA there, or write `vllm_server_transfer: files`."
            )

    def broadcast(self, block: torch.Tensor) -> None:
        """Send bytes, and return once they are sent."""
        with torch.cuda.device(self._device):
            self._own.broadcast(block, src=0, stream=self._stream)
            sent = torch.cuda.Event()
            sent.record(self._stream)
            while not sent.query():
                if self._is_aborted:
                    raise RuntimeError("the transfer was given up")
                time.sleep(_POLL_S)

    def abort(self) -> None:
        """Give up for good."""
        self._is_aborted = True
        if (comm := getattr(self._own, "comm", None)) is not None:
            threading.Thread(target=self._own.nccl.ncclCommAbort, args=(comm,), daemon=True).start()


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors one after the other in a block of memory."""

    block: torch.Tensor
    """Bytes."""
    description: Mapping[str, Any]
    """What vLLM is told of them: its `NCCLWeightTransferUpdateInfo`."""


def packed(tensors: Mapping[str, torch.Tensor], device: torch.device) -> Part:
    """The tensors as one part on `device`."""
    # vLLM reads each where it lies, which takes a position that the size of its numbers divides.
    ordered = sorted(tensors.items(), key=lambda each: -each[1].element_size())
    block = torch.empty(sum(tensor.nbytes for _, tensor in ordered), dtype=torch.uint8, device=device)
    start = 0
    for _, tensor in ordered:
        block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        start += tensor.nbytes
    if block.is_cuda:
        torch.cuda.current_stream().synchronize()  # it is sent from another stream
    description = {
        "names": [name for name, _ in ordered],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in ordered],
        "shapes": [list(tensor.shape) or [1] for _, tensor in ordered],  # vLLM cannot read one without a dimension
        "packed": True,
        "packed_buffer_size_bytes": block.nbytes,  # so that vLLM has it come as one
    }
    return Part(block, description)


@dataclass(frozen=True, slots=True)
class _Link:
    """A group with the workers of one start of a server."""

    instance: str
    communicator: NCCLCommunicator


class WeightTransfer:
    """The transfers of a run. Its coroutines run in one event loop.

    Args:
        device: where parts are put together, and sent from.
        connect: makes the communicator of a server.
        limit_s: how long a server may take to join, or over one part.
    """

    def __init__(
        self,
        device: torch.device,
        connect: Callable[[torch.device], NCCLCommunicator] = NCCLCommunicator,
        limit_s: float = LIMIT_S,
    ) -> None:
        # What is imported while servers wait to be joined would count as theirs: it takes many seconds.
        from vllm.distributed.device_communicators import pynccl  # noqa: F401
        from vllm.distributed.utils import StatelessProcessGroup  # noqa: F401

        self._device = device
        self._connect = connect
        self._limit_s = limit_s
        self._links: dict[str, _Link] = {}
        self._begun: dict[str, str] = {}
        """By address, the start of each server that a transfer has begun to, and not ended."""

    def parts(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[Part]:
        """The weights, a part at a time. On the device are two parts and a tensor at most, if each is let go."""
        for each in in_parts(tensors, BYTES_OF_A_PART):
            part = packed(each, self._device)
            yield part
            del part

    async def welcome(self, client: ServerClient) -> None:
        """Have a server that was out answer requests again.

        Raises:
            ValueError: if it cannot take weights any more. Of a layer that has come in part, vLLM would take the same
                part for the rest, and its workers may wait for ever for what was not sent.
        """
        if self._begun.get(client.url) == await _instance(client):
            raise ValueError(_START_ANEW)
        self._begun.pop(client.url, None)
        await client.resume()

    def remedy(self, url: str) -> str | None:
        """What has to be done to a server that fails now; None if it need only answer again."""
        return _START_ANEW if url in self._begun else None

    def give_up(self) -> list[str]:
        """End what was begun. Returns the servers that can take weights no more."""
        for url in self._begun:
            self._forget(url)
        return list(self._begun)

    async def begin(self, client: ServerClient) -> str:
        """Have a server expect parts; it answers no requests until `end`. Returns which start of it that is."""
        await client.pause()
        instance = await _instance(client)
        self._begun[client.url] = instance
        async with self._unbroken(client.url):
            link = self._links.get(client.url)
            if link is None or link.instance != instance:  # it was started anew
                self._forget(client.url)
                self._links[client.url] = link = _Link(instance, self._connect(self._device))
                await self._join(client, link.communicator)
            await client.start_weight_update()
        return instance

    async def send(self, client: ServerClient, part: Part) -> str:
        """Have a server take a part. Returns which start of it that is."""
        link = self._links[client.url]
        blocks = [part.block]  # a thread lives a little longer than its work, and is not to keep it for so long
        async with self._unbroken(client.url):
            taking = client.update_weights(part.description)
            await self._both(taking, lambda: link.communicator.broadcast(blocks.pop()), "take a part of the weights")
        return link.instance

    async def end(self, client: ServerClient) -> str:
        """Have a server answer from what it has taken. Returns which start of it that is."""
        instance = self._links[client.url].instance
        async with self._unbroken(client.url):
            await client.finish_weight_update()
        del self._begun[client.url]
        await client.reset_prefix_cache()
        await client.resume()
        return instance

    def close(self) -> None:
        for url in list(self._links):
            self._forget(url)

    async def _join(self, client: ServerClient, communicator: NCCLCommunicator) -> None:
        size = 1 + await client.world_size()
        try:
            listening = _listening(client.url)
        except OSError as error:
            raise UnreachableError(f"no address of this machine that it could reach was found: {error}") from error
        address, port = listening.getsockname()

        def meet() -> None:
            from vllm.distributed.utils import StatelessProcessGroup

            communicator.join(
                StatelessProcessGroup.create(
                    address, port, 0, size, store_timeout=int(self._limit_s) + 1, listen_socket=listening
                )
            )

        where = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": size}
        await self._both(client.init_weight_transfer_engine(where), meet, f"join the trainer at {address}:{port}")

    async def _both(self, asked: Coroutine[Any, Any, None], own: Callable[[], None], what: str) -> None:
        """What a server and this process do together."""
        tasks = [asyncio.ensure_future(asked), _in_thread(own)]
        try:
            done, waiting = await asyncio.wait(tasks, timeout=self._limit_s, return_when=asyncio.FIRST_EXCEPTION)
            for task in sorted(done, key=tasks.index):  # the server's own words first
                task.result()
            if waiting:
                raise UnreachableError(f"it did not {what} within {self._limit_s:g} s")
        except (RuntimeError, OSError) as error:
            raise UnreachableError(f"it did not {what}: {error}") from error
        finally:
            for task in tasks:
                if not task.cancel() and not task.cancelled():
                    task.exception()  # one of two that failed together is raised above, and asyncio logs the other

    @contextlib.asynccontextmanager
    async def _unbroken(self, url: str) -> AsyncIterator[None]:
        """The block's failure is the end of the link."""
        try:
            yield
        except BaseException:
            self._forget(url)
            raise

    def _forget(self, url: str) -> None:
        if (link := self._links.pop(url, None)) is not None:
            link.communicator.abort()


async def _instance(client: ServerClient) -> str:
    return str((await client.configuration())["instance_id"])


def _listening(url: str) -> socket.socket:
    """A socket at the address of this machine that the server sees."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect((parts.hostname, parts.port or 80))
        address = probe.getsockname()[0]
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.bind((address, 0))
    listening.listen()
    return listening


def _in_thread(work: Callable[[], None]) -> "asyncio.Future[None]":
    """In one that the end of the program does not wait for."""
    done: concurrent.futures.Future[None] = concurrent.futures.Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised where it is awaited
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="vllm-transfer", daemon=True).start()
    return asyncio.wrap_future(done)
