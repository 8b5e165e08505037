"""Programs against their tests: one by one in sandboxes, several at a time."""

import os
import queue
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from grpo_stage.rewards.code import harness
from grpo_stage.rewards.code.cases import AssertionTests, CallTests, InputTests, Tests, asked_names
from grpo_stage.rewards.code.comparison import same_output, same_value
from grpo_stage.rewards.code.sandbox import SLACK_S, Limits, Session, first_slot
from grpo_stage.rewards.workers.processes import STOP_SIGNALS


@dataclass(frozen=True, slots=True)
class Grade:
    """What became of a program."""

    num_passed: int
    num_tests: int
    died_of: frozenset[str] = frozenset()
    """Why it gave no answer to some tests: `harness.TIMEOUT`, `OUTPUT`, `ENDED`."""

    @property
    def has_passed(self) -> bool:
        return self.num_passed == self.num_tests

    @property
    def share(self) -> float:
        return self.num_passed / self.num_tests


@dataclass(frozen=True, slots=True, kw_only=True)
class Grading:
    """How programs are graded."""

    sandbox: str
    """`sandbox.BWRAP` or `sandbox.NO_SANDBOX`."""
    limits: Limits
    program_timeout_s: float
    """Seconds of the clock for all the tests of a program."""
    stops_at_failure: bool
    """Leave out the tests after the first that fails."""

    def grade(self, source: str, tests: Tests, slot: int, deadline: float) -> Grade:
        """Run a program against its tests.

        Args:
            source: Python code.
            tests: one at least.
            slot: a number that no other program has at the same time.
            deadline: of the whole batch, by `time.monotonic`.

        Raises:
            SandboxError: if no sandbox could be started.
            TimeoutError: at the deadline.
        """
        if "\0" in source:
            return Grade(0, len(tests))
        end = time.monotonic() + self.program_timeout_s
        reasons: set[str] = set()
        num_passed = 0
        with closing(Session(self.sandbox, slot, self.limits, source=source)) as session:
            program = _Program(session, min(end, deadline), self.limits, reasons)
            for has_passed in self._verdicts(program, tests, slot):
                num_passed += has_passed
                if self.stops_at_failure and not has_passed:
                    break
        if time.monotonic() > deadline:
            raise TimeoutError
        return Grade(num_passed, len(tests), frozenset(reasons))

    def _verdicts(self, program: "_Program", tests: Tests, slot: int) -> Iterator[bool]:
        match tests:
            case InputTests():
                for text, expected in zip(tests.inputs, tests.outputs, strict=True):
                    reply = program.ask({"stdin": text})
                    yield reply.get("code") == 0 and same_output(str(reply.get("stdout")), expected)
            case CallTests():
                for arguments, expected in zip(tests.arguments, tests.values, strict=True):
                    reply = program.ask({"call": [tests.function, [harness.encode(one) for one in arguments], {}]})
                    yield "value" in reply and same_value(reply["value"], expected)
            case AssertionTests():
                defined = program.ask({"names": None}).get("names")
                if isinstance(defined, list):
                    yield from self._assertions(program, asked_names(defined, tests), tests, slot)

    def _assertions(
        self, program: "_Program", names: Sequence[str], tests: AssertionTests, slot: int
    ) -> Iterator[bool]:
        """The tests run in a sandbox of their own, and ask the program through this process."""
        said = {"names": names, "setup": tests.setup, "sources": tests.sources}
        with closing(Session(self.sandbox, slot, self.limits, tests=said)) as judge:
            message = judge.read(program.end)
            while "died" not in message:
                if "call" in message:
                    message = judge.ask(program.ask({"call": message["call"]}), program.end)
                else:
                    yield message.get("passed") is True
                    message = judge.read(program.end)


@dataclass(slots=True)
class _Program:
    """A program in its sandbox."""

    session: Session
    end: float
    limits: Limits
    reasons: set[str]

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer; once a sandbox is lost, the same for all requests."""
        reply = self.session.ask(request, min(self.end, time.monotonic() + self.limits.wall_s + SLACK_S))
        if "died" in reply:
            self.reasons.add(str(reply["died"]))
        return reply


class Graders:
    """Threads that grade programs, each with a sandbox of its own at a time. They start with the first batch."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()

    def grade(self, grading: Grading, programs: Sequence[tuple[str, Tests]], timeout_s: float) -> list[Grade]:
        """Grade programs, each different one once.

        Raises:
            SandboxError: if no sandbox could be started.
            TimeoutError: if all together took longer than `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        threads = self._ready_threads()

        def graded(program: tuple[str, Tests]) -> Grade:
            if time.monotonic() > deadline:
                raise TimeoutError
            slot = self._slots.get()
            try:
                return grading.grade(*program, slot, deadline)
            finally:
                self._slots.put(slot)

        futures = [threads.submit(graded, program) for program in programs]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """End the threads. May be called twice."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads, self._slots = None, queue.SimpleQueue()

    @staticmethod
    def slots() -> range:
        """The numbers of this process's sandboxes: as many as it has cores."""
        processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        first = first_slot()
        return range(first, first + max(1, len(os.sched_getaffinity(0)) // processes_here))

    def _ready_threads(self) -> ThreadPoolExecutor:
        if self._threads is None:
            for slot in self.slots():
                self._slots.put(slot)
            self._threads = ThreadPoolExecutor(len(self.slots()), "grade", initializer=_block_stop_signals)
        return self._threads


def _block_stop_signals() -> None:
    """A program that is being graded shall not end as the user stops the run: sandboxes inherit the mask."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
