"""`python -m grpo_stage.tools.warm`: a process that forks into commands of `grpo-stage`, seconds faster than a start.

It has imported what LLaMA-Factory imports, but not LLaMA-Factory: that asks CUDA for its devices, which a fork of the
process that has asked cannot use. Requests come as messages of the socket that is its standard input: the words of a
command, with a file for its standard error and a socket that gets its process id. It ends with that socket.
"""

import gc
import importlib
import json
import os
import signal
import socket
import sys
from typing import NoReturn

from grpo_stage._autoload import without_collection
from grpo_stage.tools import cli


MODULES = (
    *("torch", "torchaudio", "torchvision", "transformers.trainer", "accelerate", "datasets", "peft", "trl"),
    *("av", "matplotlib.pyplot", "omegaconf", "torch._dynamo"),
)
"""No one of them may ask for a device."""
MAX_REQUEST_BYTES = 100_000


def main() -> None:
    requests = socket.socket(fileno=0)
    for signum in (signal.SIGINT, signal.SIGCHLD):  # Ctrl-C is for the Board; the forks are nobody's children
        signal.signal(signum, signal.SIG_IGN)
    without_collection(lambda: [importlib.import_module(name) for name in MODULES])
    gc.freeze()  # what a collection would touch could no longer be shared with the forks
    while True:
        request, descriptors, *_ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 2)
        if not request:
            return
        if os.fork() == 0:
            _become(json.loads(request), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _become(words: list[str], errors: int, channel: int) -> NoReturn:
    """Be the process of a command, to its ordinary end."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor, place in ((nothing, 0), (nothing, 1), (errors, 2)):
        os.dup2(descriptor, place)
    with socket.socket(fileno=channel) as answer:
        answer.send(str(os.getpid()).encode())
    sys.argv = ["grpo-stage", *words]
    sys.exit(cli.main(words))


if __name__ == "__main__":
    main()
