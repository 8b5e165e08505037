"""Ray as the host starts it for `USE_RAY=1`, with Ray itself left out: what it is asked for, and how a run ends.

Runs with Ray are in docs/devices.md.
"""

import importlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from grpo_stage.plugin import ray_workers, registration
from grpo_stage.survival import stop


class RayActorError(Exception):
    pass


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cluster of one machine with 40 CPUs and no GPU; it does at once what it is asked for."""
    module: Any = ModuleType("ray")
    module.__spec__ = ModuleSpec("ray", None)
    module.machines = [{"CPU": 40.0, "memory": 1.0}]
    module.workers = {}
    module.ran_at = []
    module.is_initialized = lambda: True
    module.nodes = lambda: [{"Alive": True, "Resources": each} for each in module.machines]
    module.get_runtime_context = lambda: SimpleNamespace(get_job_id=lambda: "01")

    class Task:
        def __init__(self, function: Any) -> None:
            self.function = function

        def options(self, scheduling_strategy: Any) -> "Task":
            module.ran_at.append(scheduling_strategy)
            return self

        def remote(self, *args: Any) -> Any:
            return self.function(*args)

    module.remote = lambda num_cpus: Task
    module.get = list

    parts = {
        "exceptions": {"RayActorError": RayActorError},
        "util": {},
        "_private": {},
        "_private.state": {"actors": lambda: module.workers},
        "util.scheduling_strategies": {"NodeAffinitySchedulingStrategy": lambda node, soft: (node, soft)},
    }
    monkeypatch.setitem(sys.modules, "ray", module)
    for name, content in parts.items():
        part = ModuleType(f"ray.{name}")
        vars(part).update(content)
        monkeypatch.setitem(sys.modules, f"ray.{name}", part)
    return module


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Launches workers on devices of a kind as the host does; for how many it asks Ray. Then the run is `run`."""
    monkeypatch.setenv("USE_RAY", "1")
    tuner = importlib.import_module("llamafactory.train.tuner")
    registration.uninstall()
    asked_for: list[int] = []

    def start(ray_args: Any, config: Any) -> None:
        tuner.get_placement_group(ray_args.num_devices)
        ray_args.run()

    monkeypatch.setattr(tuner, "_ray_training_function", start)
    monkeypatch.setattr(tuner, "get_placement_group", asked_for.append)
    registration.install()

    def launch(
        num_workers: int, num_devices: int, device: str = "cpu", stage: str = "grpo", run: Any = lambda: None
    ) -> int:
        monkeypatch.setattr("llamafactory.extras.misc.get_device_name", lambda: device)
        arguments = SimpleNamespace(ray_num_workers=num_workers, num_devices=num_devices, run=run)
        tuner._ray_training_function(arguments, config={"args": {"stage": stage}, "callbacks": []})
        return asked_for.pop()

    yield launch
    registration.uninstall()
    monkeypatch.undo()
    registration.install()


def test_ray_is_asked_for_what_a_machine_may_have(ray: Any, launch: Callable[..., int]) -> None:
    """Without GPUs not for 10 CPUs for each of its CPUs; with GPUs for what the host asks it for."""
    assert launch(4, num_devices=40) == 4
    ray.machines = [{"CPU": 25.0, "GPU": 2.0}, {"CPU": 64.0, "GPU": 2.0}]
    assert launch(1, num_devices=4, device="gpu") == 4
    assert launch(1, num_devices=40, stage="sft") == 40


@pytest.mark.parametrize(
    ("machines", "arguments", "said"),
    [
        ([{"CPU": 39.0}], (4, 39), "Ray counts 39 CPUs, .*`ray_num_workers: 4`.*`ray_init_kwargs: {num_cpus: 40}`"),
        ([{"CPU": 15.0}, {"CPU": 25.0}], (4, 40), "Ray counts 40 CPUs, .* 10 for each worker"),
        ([{"CPU": 64.0, "GPU": 8.0}], (2, 8, "gpu"), "10 for each GPU of the cluster.*: 80 in all.*num_cpus: 80"),
    ],
)
def test_more_cpus_than_ray_counts_are_refused(
    ray: Any, launch: Callable[..., int], machines: list[Any], arguments: Any, said: str
) -> None:
    """Ray would wait for them for ever, without a word."""
    ray.machines = machines
    with pytest.raises(ValueError, match=said):
        launch(*arguments)


def test_ray_that_is_not_installed_is_refused(launch: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'`USE_RAY=1` is not possible.*pip install "ray'):
        launch(1, num_devices=1)


@pytest.mark.parametrize(("rank", "is_told"), [("0", True), ("1", False)])
def test_a_worker_whose_run_was_stopped_tells_it_once(
    ray: Any, rank: str, is_told: bool, launch: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first, which writes the end of the run's records: the others would be ended at the error of one of them."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("grpo_stage.host.parser.parse", lambda raw: raw)

    def stopped(*args: Any) -> None:
        raise SystemExit(143)

    monkeypatch.setattr("grpo_stage.plugin.launch.run", stopped)
    tuner = importlib.import_module("llamafactory.train.tuner")

    def run() -> None:
        tuner.Worker._training_function(None, {"args": {"stage": "grpo"}, "callbacks": []})

    if not is_told:
        launch(2, num_devices=40, run=run)
        return
    with pytest.raises(SystemExit) as ended:
        launch(2, num_devices=40, run=run)
    assert ended.value.code == 143


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Stops this process as Ctrl-C would, once it is launching; returns when workers have been told."""
    threads: list[threading.Thread] = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (threads.append(thread), start(thread)))
    stop.end_at_once()

    def act() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        threads.pop().join()

    yield act
    stop.leave()


def actor(node: str, pid: int) -> dict[str, Any]:
    """A worker as Ray's table of actors has it."""
    return {"JobID": "01", "ActorClassName": "Worker", "State": "ALIVE", "Address": {"NodeID": node}, "Pid": pid}


def test_a_stop_reaches_every_worker_where_it_runs(
    ray: Any, launch: Callable[..., int], stopped: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has ended by then, too."""
    told: list[tuple[int, int]] = []

    def tell(pid: int, signum: int) -> None:
        told.append((pid, signum))
        if pid == 8:
            raise ProcessLookupError

    kill, own = os.kill, os.getpid()
    monkeypatch.setattr(os, "kill", lambda pid, signum: (kill if pid == own else tell)(pid, signum))
    others = {"JobID": "02"}, {"ActorClassName": "Sampler"}, {"State": "DEAD"}
    workers = [
        *(actor(node, pid) for node, pid in (("a", 7), ("b", 8), ("a", 9))),
        *(actor("c", 6) | o for o in others),
    ]
    ray.workers = dict(enumerate(workers))
    launch(3, num_devices=40, run=stopped)
    assert told == [(7, signal.SIGTERM), (9, signal.SIGTERM), (8, signal.SIGTERM)]
    assert ray.ran_at == [("a", False), ("b", False)]


@pytest.mark.parametrize("lacks", ["workers", "get"])
def test_a_stop_that_reaches_no_worker_ends_the_run(
    ray: Any, lacks: str, launch: Callable[..., int], stopped: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since there are none yet, or Ray fails."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(ray, lacks, [])
    launch(2, num_devices=40, run=stopped)
    assert codes == [130]


def test_a_worker_that_a_stop_has_ended_before_training_is_no_failure(
    ray: Any, launch: Callable[..., int], stopped: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray's worker then ends at once, without the stage. Other errors, and without a stop, are what they are."""

    def fail(error: Exception, is_stopped: bool) -> None:
        if is_stopped:
            ray.workers = {0: actor("a", _no_process())}
            stopped()
        raise error

    for error, is_stopped in ((RayActorError("gone"), False), (LookupError("of a reward"), True)):
        with pytest.raises(type(error)):
            launch(1, num_devices=40, run=partial(fail, error, is_stopped))
    # Ray's own handler of a signal that comes late leaves with 1.
    for error in (RayActorError("gone"), ray_workers.RunEnded(1)):
        with pytest.raises(SystemExit) as ended:
            launch(1, num_devices=40, run=partial(fail, error, True))
        assert ended.value.code == 130
        # It may be another error: of a worker that was killed for its memory while it saved.
        assert ("A worker ended after the stop. gone" in capsys.readouterr().err) == isinstance(error, RayActorError)


def test_a_program_that_uses_ray_itself_is_no_worker(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no RANK, and its run ends like any other."""
    monkeypatch.delenv("USE_RAY", raising=False)
    assert not ray_workers.is_in_one()
    monkeypatch.setenv("USE_RAY", "1")
    assert ray_workers.is_in_one()


def _no_process() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid
