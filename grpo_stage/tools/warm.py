"""`python -m grpo_stage.tools.warm`: a process that forks into commands of `grpo-stage`, seconds faster than a start.

It has imported what LLaMA-Factory imports, but not LLaMA-Factory: that asks CUDA for its devices, which a fork of the
process that has asked cannot use. Requests come through the socket that is its standard input: each is three
descriptors, of a file with the request, of one for the command's standard error, and of a socket that gets its process
id. It ends with the socket of its standard input.
"""

import gc
import importlib
import json
import os
import signal
import socket
import sys
from typing import Any, NoReturn

from grpo_stage._autoload import without_collection
from grpo_stage.tools import cli


MODULES = (
    *("torch", "torchaudio", "torchvision", "transformers.trainer", "accelerate", "datasets", "peft", "trl"),
    *("av", "matplotlib.pyplot", "omegaconf", "torch._dynamo"),
)
"""No one of them may ask for a device."""
ENVIRONMENT = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # where flash-attn is installed, transformers asks whether there is a device
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # a fork has none of the threads, but may have their locks
}
"""Of this process while it imports; a command has the environment of its request."""


def main() -> None:
    requests = socket.socket(fileno=0)
    for signum in (signal.SIGINT, signal.SIGCHLD):  # Ctrl-C is for the Board; the forks are nobody's children
        signal.signal(signum, signal.SIG_IGN)
    os.environ.update(ENVIRONMENT)
    without_collection(lambda: [importlib.import_module(name) for name in MODULES])
    gc.freeze()  # what a collection would touch could no longer be shared with the forks
    while True:
        _, descriptors, *_ = socket.recv_fds(requests, 1, 3)
        if not descriptors:
            return
        if os.fork() == 0:
            _become(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _become(request: int, errors: int, channel: int) -> NoReturn:
    """Be the process of a command, to its ordinary end."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor, place in ((nothing, 0), (nothing, 1), (errors, 2)):
        os.dup2(descriptor, place)
    with socket.socket(fileno=channel) as answer:
        answer.send(str(os.getpid()).encode())
    with open(request, encoding="utf-8") as file:
        command: dict[str, Any] = json.load(file)
    os.chdir(command["folder"])
    os.environ.clear()
    os.environ.update(command["environment"])
    import torch  # it is there already

    if torch.cuda._is_in_bad_fork():  # a package has asked for a device all the same
        os.execv(sys.executable, [sys.executable, "-m", cli.__name__, *command["words"]])
    sys.argv = ["grpo-stage", *command["words"]]
    sys.exit(cli.main(command["words"]))


if __name__ == "__main__":
    main()
