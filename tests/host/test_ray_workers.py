"""Ray as the host starts it for `USE_RAY=1`, with Ray itself left out: what it is asked for, and how a run ends.

Runs with Ray are in docs/devices.md.
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
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
    """A cluster of one machine with 40 CPUs and no GPU."""
    module: Any = ModuleType("ray")
    module.__spec__ = ModuleSpec("ray", None)
    module.is_initialized = lambda: True
    module.machines = [{"CPU": 40.0, "memory": 1.0}]
    module.nodes = lambda: [{"Alive": True, "Resources": each} for each in module.machines]
    exceptions: Any = ModuleType("ray.exceptions")
    exceptions.RayActorError = RayActorError
    monkeypatch.setitem(sys.modules, "ray", module)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)
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


def test_a_stop_before_training_has_the_exit_code_of_its_signal(ray: Any, launch: Callable[..., int]) -> None:
    """Ray's worker then ends at once, without the stage."""

    def run() -> None:
        raise RayActorError("the worker is gone")

    with pytest.raises(RayActorError):
        launch(1, num_devices=40, run=run)

    def run_and_stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        run()

    def fail_after_a_stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise LookupError("of a reward")

    worker = SimpleNamespace(send_signal=lambda signum: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stop, "_ray_trainers", lambda: [worker])
        stop.end_at_once()
        try:
            with pytest.raises(SystemExit) as ended:
                launch(1, num_devices=40, run=run_and_stop)
            assert ended.value.code == 143
            with pytest.raises(LookupError):
                launch(1, num_devices=40, run=fail_after_a_stop)
        finally:
            stop.leave()
