"""Processes that a reward function starts: they find what the function's file defines, and end with it."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo_stage.rewards.errors import RewardError
from grpo_stage.rewards.loading import load_rewards
from grpo_stage.rewards.suite import RewardSuite
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup


def groups(*texts: str) -> list[RolloutGroup]:
    completions = tuple(
        Completion(token_ids=tuple(text.encode()), sampling_logprobs=(), finish_reason=FinishReason.STOP, text=text)
        for text in texts
    )
    prompt = Prompt(index=0, token_ids=(1,), messages=({"role": "user", "content": "How many?"},), reference="7")
    return [RolloutGroup(prompt=prompt, completions=completions, policy_version=0)]


HELPER = """
import dataclasses
@dataclasses.dataclass
class Beside:
    text: str
def length(text):
    return float(len(text))
"""
# Each completion names a check, and its reward is the length of that name if it went well.
REWARDS = """
import asyncio, concurrent.futures, dataclasses, enum, multiprocessing, pickle, subprocess, sys, threading
import helper
from .helper import length

class Kind(enum.Enum):
    SHORT = 1
@dataclasses.dataclass
class Job:
    text: str
    kind: Kind
    class Inner:
        value = 1.0
def work(job):
    import helper
    assert type(job) is Job and job.kind is Kind.SHORT and Job.Inner.value == 1.0
    return dataclasses.replace(job, text=job.text + "!"), helper.Beside(job.text)
def unpacked(results):
    return [length(job.text[:-1]) for job, beside in results if type(job) is Job and beside.text + "!" == job.text]

def pool(text):
    context = multiprocessing.get_context(text.partition(" ")[0])
    with context.Pool(1) as made:
        return unpacked(made.map(work, [Job(text, Kind.SHORT)]))[0]
def executor(text):
    context = multiprocessing.get_context(text.partition(" ")[0])
    with concurrent.futures.ProcessPoolExecutor(1, context) as made:
        return unpacked(made.map(work, [Job(text, Kind.SHORT)]))[0]
def default_method(text):
    assert multiprocessing.get_start_method() == multiprocessing.get_all_start_methods()[0]
    return length(text)
def process(text):
    queue = multiprocessing.SimpleQueue()
    child = multiprocessing.Process(target=put, args=(queue, Job(text, Kind.SHORT)))
    child.start()
    job = queue.get()
    child.join()
    return length(job.text)
def put(queue, job):
    queue.put(job)
def any_interpreter(text):  # as joblib starts its processes
    code = f"import pickle, sys; sys.path[:0] = {sys.path!r}; print(len(pickle.load(sys.stdin.buffer)[1].text))"
    sent = pickle.dumps((work, Job(text, Kind.SHORT)))
    return float(subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True).stdout)
def thread(text):
    found = []
    asker = threading.Thread(target=lambda: found.append(length(text)))
    asker.start()
    asker.join()
    return found[0]
def event_loop(text):
    async def ask():
        with concurrent.futures.ProcessPoolExecutor(1) as made:
            return await asyncio.get_running_loop().run_in_executor(made, length, text)
    return asyncio.run(ask())
def by_kind(completions):
    return [globals()[name.partition(" ")[2] or name](name) for name in completions]
def in_the_trainer_too(completions):
    return by_kind(completions)
class Judge:
    def __call__(self, completions):
        return by_kind(completions)
judge = Judge()
"""
METHODS = ("fork", "spawn", "forkserver")
CHECKS = [
    "default_method",
    *(f"{method} {kind}" for method in METHODS for kind in ("pool", "executor")),
    *("process", "any_interpreter", "thread", "event_loop"),
]


def test_what_a_function_starts_finds_what_its_file_defines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's name is no identifier, and another of that name stands in another folder."""
    monkeypatch.chdir(tmp_path)
    for folder, source in (("one.d", REWARDS), ("two", "def by_other(completions): return [-1.0] * len(completions)")):
        Path(folder).mkdir()
        Path(folder, "my-v1.2-reward.py").write_text(source)
        Path(folder, "helper.py").write_text(HELPER)
    names = ["one.d/my-v1.2-reward.py:by_kind", "two/my-v1.2-reward.py:by_other", "one.d/my-v1.2-reward.py:judge"]
    suite = load_rewards(names, None, None, max_new_tokens=9, timeout_s=120.0)
    try:
        [scores] = suite.score(groups("fork pool"))
        assert scores == [[9.0, -1.0, 9.0]], "an object starts its processes from the trainer"
        suite = load_rewards(names[:1], None, None, max_new_tokens=9, timeout_s=120.0)
        [scores] = suite.score(groups(*CHECKS))
        assert dict(zip(CHECKS, scores, strict=True)) == {name: [float(len(name))] for name in CHECKS}
    finally:
        suite.close()


def test_a_module_of_the_working_directory_is_found_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("of_mine").mkdir()
    Path("of_mine/rewards.py").write_text(
        "import multiprocessing\ndef length(text): return float(len(text))\n"
        "def pooled(completions):\n    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        return pool.map(length, completions)\n"
    )
    suite = load_rewards(["of_mine.rewards:pooled"], None, None, max_new_tokens=9, timeout_s=60.0)
    try:
        assert suite.score(groups("a", "bb")) == [[[1.0], [2.0]]]
    finally:
        suite.close()


# What cannot work


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], RewardSuite]]:
    monkeypatch.chdir(tmp_path)
    suites = []

    def make(source: str) -> RewardSuite:
        (tmp_path / "own.py").write_text(textwrap.dedent(source))
        suites.append(load_rewards(["own.py:f"], None, None, max_new_tokens=10, timeout_s=60.0))
        return suites[-1]

    yield make
    for suite in suites:
        suite.close()


POOL = "import concurrent.futures, multiprocessing, os, threading\ndef f(completions):\n    "
LOST = "a process of its `multiprocessing.Pool` {}"
TOP_LEVEL = "defined at the top level of a module"


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ("multiprocessing.Pool(1).map(lambda text: 1.0, completions)", ["Can't pickle", TOP_LEVEL]),
        ("def g(text): return 1.0\n    multiprocessing.Pool(1).map(g, completions)", ["Can't pickle", TOP_LEVEL]),
        ("multiprocessing.Pool(1).map(len, [threading.Lock()])", ["cannot pickle", TOP_LEVEL]),
        (
            "with concurrent.futures.ProcessPoolExecutor(1) as p: return list(p.map(lambda c: 1.0, completions))",
            ["Can't pickle", TOP_LEVEL],
        ),
        (
            "with concurrent.futures.ProcessPoolExecutor(1) as p: return list(p.map(os._exit, [3]))",
            ["BrokenProcessPool", "the function had started died"],
        ),
        ("multiprocessing.Pool(1).map(os._exit, [3])", [LOST.format("died with exit code 3"), "would wait for ever"]),
        ("list(multiprocessing.Pool(1).imap(os._exit, [3]))", [LOST.format("died with exit code 3")]),
        (
            "pool = multiprocessing.Pool(2); jobs = [pool.apply_async(os._exit, [code]) for code in (3, 4)]\n"
            "    return [job.get() for job in jobs]",
            [LOST.format("died with exit code")],
        ),
        (
            "multiprocessing.Pool(1).map(os.abort.__class__ and eval, ['__import__(\"os\").abort()'])",
            [LOST.format("was ended by signal 6")],
        ),
        (
            "pool = multiprocessing.get_context('fork').Pool(1)\n    global g\n    def g(text): return 1.0\n"
            "    g.__qualname__ = 'g'\n    return pool.map(g, completions)",
            [LOST.format("died with exit code 1"), "could not import what it was sent", "by the time that the Pool"],
        ),
        (
            "multiprocessing.Pool(1).map(eval, ['__import__(\"multiprocessing\").Pool(1)'])",
            ["daemonic processes are not allowed to have children"],
        ),
    ],
)
def test_what_cannot_work_is_said_at_once(load: Callable[[str], RewardSuite], body: str, messages: list[str]) -> None:
    suite = load(POOL + body)
    started = time.monotonic()
    with pytest.raises(RewardError) as caught:
        suite.score(groups("a"))
    assert time.monotonic() - started < 30
    for message in messages:
        assert message in str(caught.value)


def test_a_function_may_end_its_own_pools(load: Callable[[str], RewardSuite]) -> None:
    suite = load("""
        import multiprocessing
        def f(completions):
            for _ in range(3):
                with multiprocessing.Pool(2, maxtasksperchild=1) as pool:  # left by `terminate`, with signal 15
                    scores = pool.map(len, completions, chunksize=1)
            return scores
        """)
    assert suite.score(groups("a", "bb", "ccc")) == [[[1.0], [2.0], [3.0]]]
    assert suite.score(groups("dddd")) == [[[4.0]]]


def test_a_child_that_is_terminated_while_it_is_forked_ends() -> None:
    code = """
import os, signal
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
from grpo_stage.rewards.workers.function_process import let_children_be_terminated
let_children_be_terminated()
if (child := os.fork()) == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
os.kill(os.getpid(), signal.SIGTERM)  # the worker itself goes on
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_function_may_lose_processes_that_it_waits_for_with_a_limit(load: Callable[[str], RewardSuite]) -> None:
    """As functions do that run the code of a completion."""
    suite = load("""
        import multiprocessing, time
        pool = None
        def run(code):
            exec(code)
            return 1.0
        def f(completions):
            global pool
            pool = pool or multiprocessing.Pool(2)
            scores = []
            for job in [pool.apply_async(run, [code]) for code in completions]:
                try:
                    scores.append(job.get(timeout=1.5))
                except multiprocessing.TimeoutError:
                    scores.append(0.0)
            return [score + len(pool.map(run, ["time.sleep(0.5)"])) for score in scores]
        """)
    codes = ["x = 1", "import os; os._exit(1)", "import os; os.kill(os.getpid(), 9)"]
    for _ in range(2):
        assert suite.score(groups(*codes)) == [[[2.0], [1.0], [1.0]]]


# They end with the trainer


SCRIPT = """
import sys
from pathlib import Path
from test_rewards_children import groups, load_rewards
Path("own.py").write_text('''
import multiprocessing, os
def f(completions):
    pools = [multiprocessing.get_context(method).Pool(1) for method in ("fork", "spawn")]
    print("pids", os.getpid(), *(pool.apply(os.getpid) for pool in pools), flush=True)
    while True: pass
''')
load_rewards(["own.py:f"], None, None, max_new_tokens=9, timeout_s=600.0).score(groups("a"))
"""


def test_nothing_is_left_of_pools_when_the_trainer_is_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command: Any = [sys.executable, "script.py"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()[1:]]
        assert len(pids) == 3
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive == []


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
