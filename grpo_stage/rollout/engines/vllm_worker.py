"""vLLM in a process of its own, seen from that process: it does one thing after another that the trainer asks for.

The trainer's side is `vllm_apart`. Between the two is a socket: to each thing that the trainer asks for it gets one
answer.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from grpo_stage.rollout.engines.vllm_settings import VLLMSettings
from grpo_stage.rollout.engines.weights import WrittenWeights
from grpo_stage.survival.stop import STOP_SIGNALS
from grpo_stage.types import Completion, Prompt, RolloutGroup, SamplingSettings


@dataclass(frozen=True, slots=True)
class Request:
    """One thing that the trainer asks for: a method of `Worker`."""

    name: str
    arguments: tuple[Any, ...] = ()


GIVE_UP = Request("give up")
"""What the trainer writes while it waits for an answer that it no longer wants."""


class GivenUp(BaseException):
    """The trainer does not want the answer any more. Not an Exception, so that no code of vLLM's handles it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one thing that the trainer has asked for."""

    value: Any = None
    seconds: float = 0.0
    error: str | None = None
    """The error and where it was raised; None where there was none."""
    is_users: bool = False
    """Whether the error is a ValueError: a user's mistake."""


Sampled = list[tuple[int, tuple[Completion, ...]]]
"""For each prompt the version that answered, and its completions, without their texts."""


class Worker:
    """What the trainer may ask for."""

    def __init__(self, settings: VLLMSettings, connection: Connection) -> None:
        from grpo_stage.rollout.engines.vllm import VLLMEngine

        self._connection = connection
        self._engine = VLLMEngine(settings, tokenizer=None)
        self._engine.on_step = self._check

    def load(self, weights: WrittenWeights, version: int) -> None:
        self._engine.load(weights, version)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> tuple[float, Sampled]:
        """The temperature of the log-probabilities, and what was sampled."""
        groups = self._engine.generate(prompts, sampling, step)
        return self._engine.logprob_temperature, [(group.policy_version, group.completions) for group in groups]

    def score(self, groups: Sequence[RolloutGroup]) -> list[list[float]]:
        return [scores.tolist() for scores in self._engine.score(groups)]

    def _check(self) -> None:
        """At each of vLLM's steps: does the trainer still want the answer, and is it there at all?"""
        if not self._connection.poll():
            return
        try:
            message = self._connection.recv()
        except EOFError:
            os._exit(1)
        assert message == GIVE_UP, "the trainer asks for one thing at a time"
        raise GivenUp


def serve(connection: Connection) -> None:
    """Answer until the trainer closes the socket, or ends."""
    settings = connection.recv()
    worker: Worker | None = None
    asked = Request("start")
    while True:
        if asked != GIVE_UP:  # which comes too late here: the answer has been written
            started = time.perf_counter()
            try:
                if worker is None:
                    worker, value = Worker(settings, connection), None
                else:
                    value = getattr(worker, asked.name)(*asked.arguments)
                answer = Answer(value, time.perf_counter() - started)
            except GivenUp:
                answer = Answer()
            except Exception as error:
                text = "".join(traceback.format_exception(error))
                answer = Answer(error=f"{error}\n\nIn vLLM's process:\n{text}", is_users=isinstance(error, ValueError))
            connection.send(answer)
        try:
            asked = connection.recv()
        except EOFError:
            return


def main(descriptor: int) -> NoReturn:
    """Serve on a socket that this process has inherited, and end."""
    # A stop reaches this process, too (Ctrl-C the whole group, LLaMA Board every descendant). The trainer finishes
    # its step and saves the rollout that is under way, for which it needs this process; it ends as its end closes.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        serve(Connection(descriptor))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # vLLM's own threads may not end
