"""Rollouts with vLLM in a process of its own: it samples while the trainer trains.

`vllm_worker` is what runs there: the same engine as in the trainer's process, so that the same requests have the same
answers to the bit. Adapters and weights go there as files, and completions come back as token ids.
"""

import contextlib
import dataclasses
import math
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from grpo_stage.rollout.engines import vllm_worker
from grpo_stage.rollout.engines.decoding import completion_text
from grpo_stage.rollout.engines.vllm_settings import VLLMSettings
from grpo_stage.rollout.engines.vllm_worker import GIVE_UP, Answer, Request, Sampled
from grpo_stage.rollout.engines.weights import PolicyWeights
from grpo_stage.survival.stop import STOP_SIGNALS
from grpo_stage.types import Prompt, RolloutGroup, SamplingSettings


_OF_TORCHRUN = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)
"""What says that a process is one of several: vLLM's is none of the trainer's."""
_POLL_S = 0.1
"""How long a stop may wait to be seen."""
_END_S = 5.0


class VLLMApart:
    """vLLM in a child process, behind the `AheadEngine` protocol; started by the constructor.

    Args:
        settings: what vLLM is started with.
        tokenizer: decodes completions.
        environment: variables of the child that differ from this process's.

    Raises:
        ValueError: for an option that would make rollouts wrong.
        RuntimeError: if vLLM does not start.
    """

    def __init__(
        self, settings: VLLMSettings, tokenizer: PreTrainedTokenizerBase, environment: Mapping[str, str]
    ) -> None:
        assert not settings.reads_text, "the tokenizer stays here"
        assert not settings.sleep_level, "an engine that samples while the trainer trains never sleeps"
        self._settings = settings
        self._tokenizer = tokenizer
        self.logprob_temperature = settings.logprob_temperature or math.nan
        self.on_step: Callable[[], None] = lambda: None
        self._submitted: tuple[Prompt, ...] | None = None
        self._num_unwanted = 0
        """Answers that are still to come and that nobody waits for."""
        self._process, self._connection = _start(environment)
        self._end = weakref.finalize(self, _end, self._process, self._connection)
        try:
            self._connection.send(settings)
            self._wait()
        except BaseException:
            self._end()
            raise

    def sync(self, policy: torch.nn.Module, version: int) -> None:
        with PolicyWeights(policy, is_adapter=self._settings.adapter).written() as weights:
            self._ask("load", weights, version)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> list[RolloutGroup]:
        answer = self._ask("generate", _bare(prompts), sampling, step, is_stoppable=True)
        return self._groups(prompts, answer.value)

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> None:
        self._begin("generate", _bare(prompts), sampling, step)
        self._submitted = tuple(prompts)

    def collect(self) -> tuple[list[RolloutGroup], float]:
        """See `AheadEngine.collect`. A stop is not seen here: the rollout is part of what the stopped run saves."""
        assert self._submitted is not None, "no rollout is under way"
        prompts, self._submitted = self._submitted, None
        answer = self._wait()
        return self._groups(prompts, answer.value), answer.seconds

    def discard(self) -> None:
        if self._submitted is not None:
            self._submitted = None
            self._give_up()

    def score(self, groups: Sequence[RolloutGroup]) -> list[torch.Tensor]:
        bare = [
            dataclasses.replace(group, prompt=prompt)
            for group, prompt in zip(groups, _bare([group.prompt for group in groups]), strict=True)
        ]
        return [torch.tensor(scores) for scores in self._ask("score", bare, is_stoppable=True).value]

    def sleep(self) -> None:
        """Nothing: vLLM has a device of its own, or works while the trainer does."""

    def close(self) -> None:
        self._end()

    def _ask(self, name: str, *arguments: Any, is_stoppable: bool = False) -> Answer:
        self._begin(name, *arguments)
        return self._wait(self.on_step if is_stoppable else lambda: None)

    def _begin(self, name: str, *arguments: Any) -> None:
        assert self._submitted is None, f"{name}() while a rollout is under way: collect or discard it first"
        while self._num_unwanted:
            self._received(lambda: None)
            self._num_unwanted -= 1
        try:
            self._connection.send(Request(name, arguments))
        except OSError as error:
            raise self._ended() from error

    def _wait(self, check: Callable[[], None] = lambda: None) -> Answer:
        """The answer to what was asked, with a `check` now and then that may raise."""
        try:
            answer = self._received(check)
        except BaseException:
            self._give_up()
            raise
        if answer.error is not None:
            raise (ValueError if answer.is_users else RuntimeError)(answer.error)
        return answer

    def _received(self, check: Callable[[], None]) -> Answer:
        while not self._connection.poll(_POLL_S):
            check()
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        assert isinstance(answer, Answer)
        return answer

    def _give_up(self) -> None:
        """Have the child stop what it does, and take no notice of its answer."""
        self._num_unwanted += 1
        with contextlib.suppress(OSError):  # it has ended: the next thing that is asked for says so
            self._connection.send(GIVE_UP)

    def _ended(self) -> RuntimeError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        return RuntimeError(
            f"vLLM's process has ended (exit code {self._process.returncode}) without the run's doing: what it wrote "
            "last is above; -9 is often a machine out of memory. Resume from the last checkpoint."
        )

    def _groups(self, prompts: Sequence[Prompt], answered: tuple[float, Sampled]) -> list[RolloutGroup]:
        self.logprob_temperature, sampled = answered
        return [
            RolloutGroup(
                prompt=prompt,
                completions=tuple(
                    dataclasses.replace(
                        each, text=completion_text(self._tokenizer, each.token_ids, each.finish_reason)
                    )
                    for each in completions
                ),
                policy_version=version,
            )
            for prompt, (version, completions) in zip(prompts, sampled, strict=True)
        ]


def device_environment(local_rank: int, num_local_ranks: int, num_devices: int, visible: str | None) -> dict[str, str]:
    """The variable that gives a rank's engine a GPU: one that no rank trains on if there are enough.

    Args:
        local_rank: the rank's place on its node.
        num_local_ranks: ranks of the node; rank i trains on GPU i.
        num_devices: GPUs that the ranks of the node see; with twice as many as ranks, rank i's engine gets GPU
            `num_local_ranks` + i, and otherwise it shares the rank's.
        visible: `CUDA_VISIBLE_DEVICES`, if it is set.
    """
    own = local_rank + num_local_ranks if num_devices >= 2 * num_local_ranks else local_rank
    names = visible.split(",") if visible else [str(i) for i in range(num_devices)]
    return {"CUDA_VISIBLE_DEVICES": names[own].strip()} if num_devices else {}


def _bare(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts without what rewards alone look at."""
    return [
        Prompt(index=each.index, token_ids=each.token_ids, messages=(), reference=None, room=each.room)
        for each in prompts
    ]


def _end(process: "subprocess.Popen[bytes]", connection: Connection) -> None:
    """At once: nothing of what vLLM does is needed any more."""
    connection.close()
    process.kill()
    process.wait()


def _start(environment: Mapping[str, str]) -> tuple["subprocess.Popen[bytes]", Connection]:
    ours, theirs = socket.socketpair()
    inherited = {key: value for key, value in os.environ.items() if key not in _OF_TORCHRUN}
    with theirs, _stops_blocked():
        process = subprocess.Popen(
            # Not with -m: what goes over the socket would be of classes in `__main__`.
            [sys.executable, "-c", f"from {vllm_worker.__name__} import main; main({theirs.fileno()})"],
            env={**inherited, **environment},
            pass_fds=[theirs.fileno()],
        )
    return process, Connection(ours.detach())


@contextlib.contextmanager
def _stops_blocked() -> Iterator[None]:
    """A process that is started in this block inherits the mask, and so is deaf to stops from its first moment on."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
