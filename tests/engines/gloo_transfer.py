"""vLLM's weight transfer on a CPU, with gloo in the place of NCCL at both ends, and everything else vLLM's own."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch


_FOR_EVER = timedelta(hours=1)
"""As NCCL waits."""


class GlooCommunicator:
    """In the place of both `PyNcclCommunicator` and `NCCLCommunicator`."""

    def __init__(self, group: Any = None, device: Any = None) -> None:
        self.aborted = False
        if group is not None:  # vLLM's worker joins at once
            self.join(group)

    def join(self, group: Any) -> None:
        self._group = torch.distributed.ProcessGroupGloo(group.store, group.rank, group.world_size, _FOR_EVER)

    def broadcast(self, block: torch.Tensor, src: int = 0, stream: Any = None) -> None:
        options = torch.distributed.BroadcastOptions()
        options.rootRank = src
        self._group.broadcast([block], options).wait()

    def abort(self) -> None:
        self.aborted = True


class _Stream:
    def synchronize(self) -> None:
        """There is none."""


class CPUTorch:
    """torch with what vLLM's NCCL engine asks CUDA for; for its modules' `torch`."""

    cuda = SimpleNamespace(Stream=_Stream, stream=contextlib.nullcontext, current_stream=_Stream)
    accelerator = SimpleNamespace(current_device_index=lambda: 0)

    @staticmethod
    def empty(*args: Any, device: str | None = None, **kwargs: Any) -> torch.Tensor:
        return torch.empty(*args, **kwargs, device="cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


REPLACED: dict[str, Any] = {}
"""vLLM's own, by name, while it is replaced."""


def install() -> None:
    """Have a server of this process, and of those that it forks, take weights over gloo."""
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

    REPLACED["PyNcclCommunicator"] = pynccl.PyNcclCommunicator
    pynccl.PyNcclCommunicator = GlooCommunicator
    nccl_engine.torch = packed_tensor.torch = CPUTorch()


@contextlib.contextmanager
def installed() -> Iterator[None]:
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

    install()
    try:
        yield
    finally:
        pynccl.PyNcclCommunicator = REPLACED.pop("PyNcclCommunicator")
        nccl_engine.torch = packed_tensor.torch = torch


@contextlib.contextmanager
def in_background(work: Callable[..., None], *args: Any) -> "Iterator[Future[None]]":
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(work, *args)
