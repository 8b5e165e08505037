"""A user's functions in processes of their own: same scores, killed when they hang, there until the trainer is not."""

import asyncio
import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from grpo_stage.rewards.errors import RewardError, RewardTimeoutError
from grpo_stage.rewards.loading import load_rewards
from grpo_stage.rewards.suite import RewardSuite
from grpo_stage.rewards.workers.seeds import seed_generators
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup


HANGS = ("$9^{9^{9^{9}}}+x$", "$x+1$")  # endless in math-verify


def groups(*texts: str, reference: str = "7") -> list[RolloutGroup]:
    completions = tuple(
        Completion(token_ids=tuple(text.encode()), sampling_logprobs=(), finish_reason=FinishReason.STOP, text=text)
        for text in texts
    )
    prompt = Prompt(index=0, token_ids=(1,), messages=({"role": "user", "content": "How many?"},), reference=reference)
    return [RolloutGroup(prompt=prompt, completions=completions, policy_version=0)]


Load = Callable[..., RewardSuite]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Load functions out of a source text, written to the working directory; built-ins by `builtins`."""
    monkeypatch.chdir(tmp_path)
    suites = []

    def make(source: str, *names: str, timeout_s: float = 30.0, builtins: tuple[str, ...] = (), **kwargs: Any) -> Any:
        (tmp_path / "own.py").write_text(textwrap.dedent(source))
        specs = [*builtins, *(f"own.py:{name}" for name in names)]
        suites.append(
            load_rewards(specs, None, kwargs, max_new_tokens=10, timeout_s=timeout_s, dump_dir=str(tmp_path / "out"))
        )
        return suites[-1]

    yield make
    for suite in suites:
        suite.close()


def workers() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [process.pid for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_code_that_has_changed_since_the_start_does_not_run(load: Load) -> None:
    suite = load("def f(completions): return [1.0] * len(completions)", "f")
    Path("own.py").write_text("def f(completions): return [7.0] * len(completions)")
    with pytest.raises(RewardError, match=r"own\.py has changed since the run began"):
        suite.score(groups("a"))


# The same scores as in the trainer


def test_scores_are_those_of_a_call_in_this_process_bit_for_bit(load: Load) -> None:
    suite = load(
        """
        import math
        def f(completions, completion_ids, references):
            return [None if len(c) % 5 == 0 else math.sin(sum(ids)) / 3 + math.exp(-len(c) / float(r))
                    for c, ids, r in zip(completions, completion_ids, references)]
        class Here:
            def __call__(self, completions, completion_ids, references):
                return f(completions, completion_ids, references)
        here = Here()
        """,
        "f",
        "here",
    )
    texts = ["x" * n + chr(97 + n % 26) for n in range(200)]
    [scores] = suite.score(groups(*texts))
    assert any(score[0] is None for score in scores)
    assert [score[0] for score in scores] == [score[1] for score in scores]


def test_a_function_lives_in_one_process_and_an_object_in_this_one(load: Load) -> None:
    suite = load(
        """
        import os
        calls = 0
        def pid(completions):
            return [os.getpid()] * len(completions)
        def count(completions):
            global calls
            calls += 1
            return [calls] * len(completions)
        class Here:
            def __call__(self, completions):
                return [os.getpid()] * len(completions)
        here = Here()
        """,
        "pid",
        "count",
        "here",
    )
    first, second, third = (suite.score(groups("a"))[0][0] for _ in range(3))
    assert [first[1], second[1], third[1]] == [1, 2, 3]
    assert first[0] == second[0] == third[0] != os.getpid()
    assert first[2] == os.getpid()


def test_functions_are_at_it_at_the_same_time(load: Load) -> None:
    source = """
        import pathlib, time
        def meet(own, other):
            pathlib.Path(own).touch()
            while not pathlib.Path(other).exists():
                time.sleep(0.01)
        def one(completions):
            meet("one", "two")
            return [1.0]
        def two(completions):
            meet("two", "one")
            return [2.0]
        """
    assert load(source, "one", "two", timeout_s=20.0).score(groups("a")) == [[[1.0, 2.0]]]


def test_what_is_drawn_at_random_depends_on_the_completions_alone(load: Load) -> None:
    source = """
        import random
        import numpy
        def draw(completions):
            return [random.random() + numpy.random.random() for _ in completions]
        """
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    first = load(source, "draw")
    a, b, again = first.score(groups("a", "b")), first.score(groups("b", "a")), first.score(groups("a", "b"))
    assert a == again
    assert len({a[0][0][0], a[0][1][0], b[0][0][0], b[0][1][0]}) == 4
    assert load(source, "draw").score(groups("a", "b")) == a, "as after a resume"
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]


def test_the_seed_is_that_of_every_generator() -> None:
    import torch

    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            drawn = []
            for seed in (2**64 - 1, 5, 2**64 - 1):
                seed_generators(seed)
                drawn.append((random.random(), np.random.random(), torch.rand(()).item()))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    assert drawn[0] == drawn[2]
    assert all(a != b for a, b in zip(drawn[0], drawn[1], strict=True))


def test_the_environment_and_the_path_are_the_trainers(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    load("def f(completions): return [1]", "f").score(groups("a"))  # the fork server runs
    Path("beside").mkdir()
    Path("beside/helper_of_own.py").write_text("VALUE = 5\n")
    monkeypatch.setenv("OF_THIS_TEST", "3")
    monkeypatch.syspath_prepend(str(Path("beside").resolve()))
    suite = load(
        """
        import os
        def f(completions):
            import helper_of_own
            return [helper_of_own.VALUE + int(os.environ["OF_THIS_TEST"]) + len(os.listdir("beside/.."))]
        """,
        "f",
    )
    assert suite.score(groups("a")) == [[[8 + len(os.listdir())]]]


def test_a_function_may_have_children(load: Load) -> None:
    suite = load(
        """
        import multiprocessing, subprocess
        def pooled(completions):
            with multiprocessing.get_context("fork").Pool(2) as pool:
                return pool.map(len, completions)
        def run(completions):
            process = subprocess.Popen(["sleep", "60"])
            process.terminate()
            return [process.wait(5)] * len(completions)
        """,
        "pooled",
        "run",
    )
    assert suite.score(groups("a", "bb")) == [[[1.0, -15.0], [2.0, -15.0]]]


# Functions that never end


NAP = f"1000.{os.getpid()}"
LOOP = "while True: pass"  # on one line: it may be found at either
C_CODE = 're.match("(a+)+$", "a" * 60 + "b")'


@pytest.mark.parametrize(
    ("body", "frame"),
    [
        (LOOP, LOOP),
        (C_CODE, C_CODE),
        ("time.sleep(1000)", "time.sleep(1000)"),
        (
            "try:\n        time.sleep(1000)\n    except BaseException:\n        pass\n    time.sleep(1000)",
            "time.sleep(1000)",
        ),
        ("threading.Thread(target=time.sleep, args=(1000,)).start()\n    time.sleep(999)", "time.sleep(999)"),
        (f'subprocess.run(["sleep", "{NAP}"])', f'subprocess.run(["sleep", "{NAP}"])'),
    ],
    ids=["python", "c", "sleep", "catches-all", "thread", "child"],
)
def test_a_function_that_never_ends_is_ended(load: Load, body: str, frame: str) -> None:
    modules = "os, re, subprocess, threading, time"
    first = "if completions == ['first']: return [1]"
    source = f"import {modules}\ndef f(completions):\n    {first}\n    {body}\ndef g(completions): return [1]\n"
    suite = load(source, "f", "g", timeout_s=1.0)
    before = workers()
    has_loaded = False
    while not has_loaded:  # that counts towards the first call, and takes longer where others work
        with contextlib.suppress(RewardTimeoutError):
            has_loaded = suite.score(groups("first")) == [[[1.0, 1.0]]]
    started = time.monotonic()
    with pytest.raises(RewardTimeoutError) as caught:
        suite.score(groups("a"))
    assert 0.9 < time.monotonic() - started < 6
    message = str(caught.value)
    stacks = Path("out/stacks_reward_f.txt").resolve()
    for part in ("'f'", "longer than 1 s (`reward_timeout`)", f"own.py, in f: `{frame}`", str(stacks)):
        assert part in message
    assert f'{Path("own.py").resolve()}", line' in stacks.read_text()
    suite.close()
    assert workers() <= before
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", NAP]]


def test_loading_counts_towards_the_first_call(load: Load) -> None:
    source = """
        import multiprocessing, time
        if multiprocessing.parent_process() is not None:
            time.sleep(100)
        def f(completions): return [1]
        """
    with pytest.raises(RewardTimeoutError, match=r"line 4 of .*own\.py, in <module>: `time\.sleep\(100\)`"):
        load(source, "f", timeout_s=1.0).score(groups("a"))


def test_a_pattern_that_backtracks_for_ever_is_ended(load: Load) -> None:
    suite = load("", builtins=("regex",), timeout_s=1.0, regex={"pattern": "(a+)+$"})
    assert suite.score(groups("aaa", "b")) == [[[1.0], [0.0]]]
    with pytest.raises(RewardTimeoutError, match="'regex': took longer than 1 s"):
        suite.score(groups("a" * 60 + "!"))


def test_a_call_that_nobody_waited_for_is_not_taken_for_the_next(load: Load) -> None:
    source = """
        import time
        class Broken:
            def __call__(self, completions):
                if completions == ["a"]: raise ValueError
                return [0.0]
        broken = Broken()
        def slow(completions):
            if completions == ["a"]: time.sleep(100)
            return [float(ord(completions[0]))]
        """
    suite = load(source, "broken", "slow", timeout_s=10.0)
    started = time.monotonic()
    with pytest.raises(RewardError, match="ValueError"):
        suite.score(groups("a"))
    assert suite.score(groups("b")) == [[[0.0, 98.0]]]
    assert time.monotonic() - started < 8


# Functions that end their process


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("os._exit(3)", "its process died with exit code 3"),
        ("os._exit(0)", "its process died with exit code 0"),
        ("os.kill(os.getpid(), 9)", "ended by signal 9 (Killed), which is most often the system out of memory"),
        ("ctypes.string_at(0)", "ended by signal 11"),
        ("os.abort()", "ended by signal 6"),
        ("sys.exit(0)", "raised SystemExit"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("f(completions)", "RecursionError"),
        ("raise ValueError('x' * 10_000_000)", "raised ValueError"),
        ("return [threading.Lock()]", "returned <unlocked _thread.lock"),
    ],
    ids=lambda text: text[:20],
)
def test_a_function_that_dies_stops_the_run(load: Load, body: str, problem: str) -> None:
    suite = load(f"import ctypes, os, sys, threading\ndef f(completions):\n    {body}\n", "f")
    started = time.monotonic()
    with pytest.raises(RewardError) as caught:
        suite.score(groups("a"))
    assert time.monotonic() - started < 10
    assert not isinstance(caught.value, RewardTimeoutError)
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 20_000
    if "signal 11" in problem:
        assert 'own.py", line 3 in f' in str(caught.value), "where it crashed"


def test_a_file_that_loads_here_alone_is_an_error_with_its_traceback(load: Load) -> None:
    source = """
        import multiprocessing
        if multiprocessing.parent_process() is not None:
            1 / 0
        def f(completions): return [1]
        """
    with pytest.raises(RewardError, match=r"(?s)'f': could not be loaded.*ZeroDivisionError.*own\.py"):
        load(source, "f").score(groups("a"))


# Real processes: signals, deaths, and what is printed


SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from test_rewards_processes import groups, HANGS, load_rewards

for number in (signal.SIGINT, signal.SIGABRT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: None)
Path("own.py").write_text('''
import logging
def f(completions):
    print("printed by f", flush=False)
    logging.getLogger("mine").warning("logged by f")
    if completions[0] == "loop":
        while True: pass
    if completions[0] == "wide":
        print("w" * 1_000_000)
    return [float(len(c)) for c in completions]
''')
settings = {"regex": {"pattern": "(a+)+$"}, "accuracy": {"timeout": 600.0}}
suite = load_rewards(["accuracy", "regex", "own.py:f"], None, settings, max_new_tokens=9, timeout_s=600.0)

def score(*texts, **reference):
    print(json.dumps(suite.score(groups(*texts, **reference))), flush=True)

score("It is 6.", "It is 7.")
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], "subprocess.Popen[str]"]]:
    processes = []

    def started(script: str) -> "subprocess.Popen[str]":
        (tmp_path / "script.py").write_text(SCRIPT + script)
        command = [sys.executable, "script.py"]
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        environment = os.environ | {"PYTHONPATH": path}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": (tmp_path / "err.txt").open("w")}
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes))
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def read_until(process: "subprocess.Popen[str]", beginning: str) -> list[str]:
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    while not lines[-1].startswith(beginning):
        assert lines[-1], "the script ended"
        lines.append(process.stdout.readline())
    return lines


def descendants_deepest_first(pid: int) -> list[int]:
    children = psutil.Process(pid).children()
    return [found for child in children for found in (*descendants_deepest_first(child.pid), child.pid)]


def test_a_stop_reaches_all_processes_and_scoring_goes_on(start: Any, tmp_path: Path) -> None:
    process = start("sys.stdin.readline()\nscore('It is 5.', 'It is 7.')\nscore('wide')\n")
    scores = "[[[0.0, 0.0, 8.0], [1.0, 0.0, 8.0]]]\n"
    assert read_until(process, "[") == ["printed by f\n", scores]
    pids = descendants_deepest_first(process.pid)
    assert len(pids) >= 6, "fork server, resource tracker, two functions, two of math-verify's"
    for number in (signal.SIGABRT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for pid in (*pids, process.pid):  # as LLaMA Board does it
            os.kill(pid, number)
        time.sleep(0.2)
    assert set(wait_until_gone(pids, 0)) == set(pids)
    out, _ = process.communicate("\n", timeout=30)
    assert out == f"printed by f\n{scores}printed by f\n{'w' * 1_000_000}\n[[[0.0, 0.0, 4.0]]]\n"
    assert process.returncode == 0
    assert (tmp_path / "err.txt").read_text() == "logged by f\n" * 3
    assert wait_until_gone(pids, 10) == []


def test_nothing_is_left_of_a_killed_trainer(start: Any) -> None:
    process = start(f"score('loop', 'a' * 60 + '!', {HANGS[0]!r}, reference={HANGS[1]!r})\n")
    read_until(process, "[")
    read_until(process, "printed")
    time.sleep(1.0)
    pids = descendants_deepest_first(process.pid)
    busy = [pid for pid in pids if psutil.Process(pid).status() == psutil.STATUS_RUNNING]
    assert len(busy) >= 3, "Python, a pattern, and math-verify"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=15)
    assert wait_until_gone(pids, 10) == []


# Each leaves a program, or several, that only their place among the processes tells apart from any other.
LEAVES = {
    "child": 'subprocess.Popen(["sleep", NAP])',
    "grandchild": 'subprocess.Popen(["sh", "-c", f"sleep {NAP}; true"])',
    "session": 'subprocess.Popen(["sleep", NAP], start_new_session=True)',
    "pipeline": 'subprocess.Popen(f"sleep {NAP} | cat | sleep {NAP}", shell=True, start_new_session=True)',
    "daemon": 'subprocess.run(["sh", "-c", f"(setsid sleep {NAP} &) &"])',
    "without environment": 'subprocess.run(["sh", "-c", f"(setsid env -i sleep {NAP} &) &"])',
    "forked": "os.fork() or (os.setsid(), os.fork() and os._exit(0), os.execlp('sleep', 'sleep', NAP))",
    "deaf": 'subprocess.Popen(["sh", "-c", f"trap \'\' TERM INT HUP; sleep {NAP}; sleep {NAP}"])',
    "many": '[subprocess.Popen(["sleep", NAP], start_new_session=i % 2 == 0) for i in range(60)]',
}
LEAVING = f"""
    import os, subprocess, time
    def f(completions, nap):
        NAP = nap
        {"; ".join(LEAVES.values())}
        time.sleep(0.5)
        if completions == ["hang"]:
            time.sleep(1000)
        if completions == ["die"]:
            os.abort()
        return [1.0]
    """


def naps(nap: str) -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", nap]]


@pytest.mark.parametrize("how", ["plain", "hang", "die"])
def test_nothing_that_a_function_has_started_outlives_it(load: Load, how: str) -> None:
    nap = f"{2000 + len(how)}.{os.getpid()}"
    suite = load(LEAVING, "f", timeout_s=8.0, f={"nap": nap})
    if how == "plain":
        suite.score(groups(how))
        assert len(naps(nap)) >= 60 + len(LEAVES) - 1, "between two calls of the function they may be of use"
        suite.close()
    else:
        with pytest.raises(
            RewardTimeoutError if how == "hang" else RewardError, match=None if how == "hang" else "signal 6"
        ):
            suite.score(groups(how))
    assert naps(nap) == []


def test_nothing_that_a_function_has_started_outlives_a_killed_trainer(start: Any, tmp_path: Path) -> None:
    nap = f"2100.{os.getpid()}"
    (tmp_path / "leaving.py").write_text(textwrap.dedent(LEAVING))
    settings = {"f": {"nap": nap}}
    process = start(
        f"suite = load_rewards(['leaving.py:f'], None, {settings}, max_new_tokens=9, timeout_s=60.0)\n"
        "score('go')\nsys.stdin.readline()\n"
    )
    read_until(process, "[")
    read_until(process, "[")
    assert len(naps(nap)) >= 60
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=15)
    deadline = time.monotonic() + 10
    while naps(nap) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert naps(nap) == []


def test_an_interrupt_while_a_function_hangs_ends_the_trainer_at_once(start: Any, tmp_path: Path) -> None:
    process = start("signal.signal(signal.SIGINT, signal.default_int_handler)\nscore('loop')\n")
    read_until(process, "[")
    read_until(process, "printed")
    pids = descendants_deepest_first(process.pid)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=15)
    assert "KeyboardInterrupt" in (tmp_path / "err.txt").read_text()
    assert wait_until_gone(pids, 10) == []


# Async functions


def test_async_functions_wait_together_and_keep_what_belongs_to_their_loop(load: Load) -> None:
    """Two functions of eight completions, each of which waits for half a second: a second with start-up, not eight."""
    source = """
        import asyncio
        client, calls = None, 0
        async def ask(text):
            await asyncio.sleep(0.5)
            return float(len(text))
        async def judge(completions):
            global client, calls
            client, calls = client or asyncio.Lock(), calls + 1
            async with client:  # refused by another loop, once it was waited for
                asker = asyncio.ensure_future(client.acquire())
                await asyncio.sleep(0)
            await asker
            client.release()
            return await asyncio.gather(*map(ask, completions))
        async def critic(completions, weight=2.0):
            return [weight * score for score in await asyncio.gather(*map(ask, completions))]
        class Here:
            async def __call__(self, completions):
                return await asyncio.gather(*map(ask, completions))
        here = Here()
        """
    suite = load(source, "judge", "critic", "here", critic={"weight": 3.0})
    texts = ["x" * n for n in range(1, 9)]
    suite.score(groups(*texts))  # starts the processes
    started = time.monotonic()
    [scores] = suite.score(groups(*texts))
    assert time.monotonic() - started < 3.0
    assert scores == [[n, 3.0 * n, n] for n in map(float, range(1, 9))]

    async def cell() -> list[list[list[float]]]:  # a notebook's thread runs an event loop already
        return suite.score(groups(*texts))

    with ThreadPoolExecutor() as threads:  # this one may have a loop of the browser's tests
        assert threads.submit(asyncio.run, cell()).result() == [scores]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("await asyncio.sleep(0)\n    raise KeyError('lost')", r"raised KeyError .*(.|\n)*KeyError: 'lost'"),
        ("raise asyncio.CancelledError", "raised CancelledError"),
        ("return [1.0]", "returned 1 scores"),
        ("return 'good'", "returned str"),
        ("return [math.nan] * len(completions)", "returned nan"),
    ],
)
@pytest.mark.parametrize("place", ["worker", "here"])
def test_an_async_function_that_fails_is_named_as_any_other(load: Load, place: str, body: str, message: str) -> None:
    source = f"import asyncio, math\nasync def f(completions):\n    {body}\n"
    source += "class Here:\n    async def __call__(self, completions): return await f(completions)\nhere = Here()\n"
    name = "f" if place == "worker" else "here"
    with pytest.raises(RewardError, match=f"reward function '{name}': {message}"):
        load(source, name).score(groups("one", "two"))


@pytest.mark.parametrize(
    "wait", ["await asyncio.sleep(60)", "await asyncio.gather(asyncio.sleep(60))", "time.sleep(60)"]
)
def test_an_async_function_that_takes_too_long_is_ended_and_where_it_waits_is_named(
    load: Load, tmp_path: Path, wait: str
) -> None:
    source = f"""
        import asyncio, time
        async def ask():
            {wait}  # in ask
        async def f(completions):
            await ask()
            return [1.0] * len(completions)
        """
    suite = load(source, "f", timeout_s=3.0)
    with pytest.raises(RewardTimeoutError) as error:
        suite.score(groups("one"))
    assert "'f': took longer than 3 s (`reward_timeout`)" in str(error.value)
    assert f"It was at line 4 of {tmp_path / 'own.py'}, in ask: `{wait}  # in ask`" in str(error.value)
    stacks = (tmp_path / "out" / "stacks_reward_f.txt").read_text()
    assert "in f" in stacks
    assert not workers()
