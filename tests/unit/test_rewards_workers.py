"""math-verify in processes: right answers, time limits, deaths, and nothing left behind."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo_stage.rewards.errors import RewardError, RewardTimeoutError
from grpo_stage.rewards.loading import load_rewards
from grpo_stage.rewards.workers.answer_checker import AnswerChecker
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup

from .processes import wait_until_gone


# An integer of hundreds of millions of digits, computed in C code that no Python signal handler interrupts.
HANGS = ("$9^{9^{9^{9}}}+x$", "$x+1$")


@pytest.fixture(scope="module")
def checker() -> Iterator[AnswerChecker]:
    checker = AnswerChecker(timeout_s=60.0)
    yield checker
    checker.close()


def children() -> list[int]:
    """Process ids of the workers: the children of this process's fork server that multiprocessing knows."""
    import multiprocessing

    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def groups(*texts: str, reference: str = "7") -> list[RolloutGroup]:
    completions = tuple(
        Completion(token_ids=(1,), sampling_logprobs=(0.0,), finish_reason=FinishReason.STOP, text=text)
        for text in texts
    )
    prompt = Prompt(index=0, token_ids=(1,), messages=({"role": "user", "content": "How many?"},), reference=reference)
    return [RolloutGroup(prompt=prompt, completions=completions, policy_version=0)]


def test_verdicts_come_back_in_order(checker: AnswerChecker) -> None:
    pairs = [(f"It is ${n} + x$.", f"$x + {7 * (n % 2)}$") for n in range(16)]
    assert checker.check(pairs, 60.0) == [n == 7 * (n % 2) for n in range(16)]


def test_equal_pairs_are_decided_once(checker: AnswerChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = checker._ready_pool()
    scheduled = []
    schedule = pool.schedule

    def recorded(*args: Any, **kwargs: Any) -> Any:
        scheduled.append(kwargs["args"])
        return schedule(*args, **kwargs)

    monkeypatch.setattr(pool, "schedule", recorded)
    pairs = [("It is $1+x$.", "$x+1$"), ("It is $x$.", "$x+1$"), ("It is $1+x$.", "$x+1$")] * 3
    assert checker.check(pairs, 60.0) == [True, False, True] * 3
    assert checker.check(pairs, 60.0) == [True, False, True] * 3
    assert scheduled == pairs[:2]
    assert checker.check(pairs, 30.0) == [True, False, True] * 3
    assert len(scheduled) == 4, "a verdict under one limit says nothing about another"


def test_only_formulas_need_a_worker() -> None:
    checker = AnswerChecker(timeout_s=5.0)
    pairs = [(r"so \boxed{72}", "#### 72"), ("It is 71.", "72"), ("Paris.", "paris"), ("(A)", "B"), ("10:45", "10:30")]
    assert checker.check(pairs, 5.0) == [True, False, True, False, False]
    assert checker._pool is None


def test_a_time_out_is_none_counted_and_logged_and_the_others_are_scored(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"accuracy": {"timeout": 2}, "length": {"timeout": 2}}
    suite = load_rewards(["accuracy", "length"], None, settings, max_new_tokens=10, timeout_s=60.0)
    try:
        with caplog.at_level(logging.WARNING):
            scores = suite.score(groups("It is $1+x$", HANGS[0], "It is $x+2$", reference=HANGS[1]))
        assert [scored[0] for scored in scores[0]] == [1.0, None, 0.0]
        assert scores[0][1] == [None, None]
        assert suite.total(scores[0][1]) is None
        assert suite.counters == {"accuracy/timeouts": 1, "length/timeouts": 1}
        assert suite.take_counters() == {"accuracy/timeouts": 1, "length/timeouts": 1}
        assert suite.take_counters() == {}
        [record] = [record for record in caplog.records if "math-verify took longer" in record.message]
        assert "longer than 2 s" in record.message
        assert HANGS[0] in record.message
        # The worker was replaced.
        assert suite.score(groups("It is 7.", "It is 8."))[0][0][0] == 1.0
        assert suite.counters == {"accuracy/timeouts": 1, "length/timeouts": 1}
    finally:
        suite.close()


def test_a_worker_that_dies_stops_the_run() -> None:
    settings = {"accuracy": {"timeout": 60}}
    suite = load_rewards(["accuracy"], None, settings, max_new_tokens=10, timeout_s=60.0)
    before = set(children())
    assert suite.score(groups("It is $y$", reference="$x$"))[0][0] == [0.0]
    pool = set(children()) - before

    def kill_the_busy_one() -> None:
        deadline = time.monotonic() + 50.0
        busy: list[int] = []
        while not busy and time.monotonic() < deadline:
            time.sleep(0.5)
            # More than a worker needs to start.
            busy = [pid for pid in pool if psutil.Process(pid).cpu_times().user > 2]
        os.kill(busy[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_the_busy_one)
    killer.start()
    try:
        with pytest.raises(RewardError, match=f"'accuracy'.*died with exit code -{signal.SIGKILL.value}") as caught:
            suite.score(groups("It is $x$", HANGS[0], reference=HANGS[1]))
        assert caught.value.completion == HANGS[0]
        assert caught.value.prompt == "How many?"
    finally:
        killer.join()
        suite.close()


def test_all_completions_together_have_a_limit_too() -> None:
    settings = {"accuracy": {"timeout": 60}}
    suite = load_rewards(["accuracy"], None, settings, max_new_tokens=10, timeout_s=60.0)
    try:
        suite.score(groups("It is $y$", "It is $z$", reference="$x$"))  # the workers have started
        suite._context.checker.timeout_s = 1.0
        started = time.monotonic()
        with pytest.raises(RewardTimeoutError, match=r"math-verify had not decided 1.*`timeout` .*60 s") as caught:
            suite.score(groups("It is $x$", HANGS[0], reference=HANGS[1]))
        assert time.monotonic() - started < 6
        assert caught.value.completion == HANGS[0]
    finally:
        suite.close()


def test_close_ends_the_workers_and_may_be_called_twice() -> None:
    before = set(children())
    checker = AnswerChecker(timeout_s=60.0)
    assert checker.check([("It is $x$.", "$y$")], 60.0) == [False]
    started = set(children()) - before
    assert len(started) >= 2
    checker.close()
    checker.close()
    assert not started & set(children())


SCRIPT = """
import sys
print("main script", flush=True)
from grpo_stage.rewards.workers.answer_checker import AnswerChecker
checker = AnswerChecker(timeout_s=60.0)
print(checker.check([("$1+x$", "$x+1$"), ("$x$", "$x+1$")], 60.0), flush=True)
import multiprocessing
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
print(sorted({"math_verify", "sympy", "torch"} & sys.modules.keys()), flush=True)
"""


def test_a_script_without_a_main_guard_runs_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(SCRIPT)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    main, verdicts, pids, modules = result.stdout.splitlines()
    assert (main, verdicts, modules) == ("main script", "[True, False]", "[]")
    assert len(pids.split()) >= 2
    assert wait_until_gone([int(pid) for pid in pids.split()], seconds=10) == []


@pytest.mark.parametrize(("others", "expected"), [("", 0.0), (",accuracy", 1.0)])
def test_the_packages_for_formulas_are_loaded_for_rewards_that_compare_them(
    others: str, expected: float, tmp_path: Path
) -> None:
    """They cost 0.7 s of processor time in each run."""
    (tmp_path / "mine.py").write_text(
        "import sys\n\ndef score(completions):\n    return [float('sympy' in sys.modules)] * len(completions)\n"
    )
    script = (
        "from grpo_stage.rewards.loading import load_rewards\n"
        "from tests.unit.test_rewards_workers import groups\n"
        f"suite = load_rewards('mine.py:score{others}'.split(','), None, None, max_new_tokens=8, timeout_s=60)\n"
        "print(suite.score(groups('5', reference='5'))[0][0][0])\n"
        "suite.close()\n"
    )
    words, env = [sys.executable, "-c", script], os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=env)
    assert result.stdout == f"{expected}\n", result.stderr
