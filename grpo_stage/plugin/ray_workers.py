"""The host's Ray workers: what Ray is asked for, and how the process that has started it learns of their end.

The host asks for 10 CPUs for each device of the cluster, and Ray waits for as many without a word: for ever on
machines that have fewer. Where there are no GPUs each CPU is a device, so that no machine has as many.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import wrapt

from grpo_stage.host.configuration_file import STAGE, stage_of
from grpo_stage.survival.stop import hand_on_stops


_CPUS = 10  # of `get_placement_group` and `get_ray_remote_config_for_worker`


@dataclass(frozen=True, slots=True)
class _Launch:
    num_workers: int
    asked: list[int] = field(default_factory=list)
    """The signals that were handed on to the workers."""

    def hand_on(self, signum: int) -> None:
        """Have the workers stop. In a thread, since a handler has interrupted what it would wait for."""
        self.asked.append(signum)
        threading.Thread(target=_stop_workers, args=(signum,), daemon=True).start()


_launch: ContextVar[_Launch] = ContextVar("_launch")


class RunEnded(Exception):
    """A worker's run was ended on purpose. Ray brings it to the process that has started Ray; no `SystemExit`."""

    def __init__(self, exit_code: Any) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def is_in_one() -> bool:
    """Whether this process is a worker that the host has started, and not one of a program that itself uses Ray."""
    from llamafactory.extras.misc import is_env_enabled

    ray = sys.modules.get("ray")
    return is_env_enabled("USE_RAY") and ray is not None and bool(ray.is_initialized())


def end(exit_code: Any) -> None:
    """Leave a worker whose run has ended, on purpose where there is an exit code.

    Raises:
        RunEnded: on the first rank, which has something to do after the others: Ray ends these at the first error.
    """
    if exit_code is not None and os.environ["RANK"] == "0":
        raise RunEnded(exit_code)


@wrapt.decorator
def launching(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    """The host's `_ray_training_function(ray_args, config)`."""
    if stage_of(kwargs["config"]["args"]) != STAGE:
        return wrapped(*args, **kwargs)
    if find_spec("ray") is None:
        raise ValueError(
            '`USE_RAY=1` is not possible: Ray is not installed. Install it (`pip install "ray[default]"`), or unset '
            "USE_RAY: without it `llamafactory-cli train` starts a process for each device of this machine."
        )
    from ray.exceptions import RayActorError

    launch = _Launch(args[0].ray_num_workers)
    token = _launch.set(launch)
    try:
        return wrapped(*args, **kwargs)
    except RunEnded as ended:
        raise SystemExit(128 + launch.asked[0] if launch.asked else ended.exit_code) from None
    except RayActorError as error:
        if not launch.asked:
            raise
        # A worker that does not train yet ends at once; another one may have been ended while it saved.
        print(f"A worker ended after the stop. {error}", file=sys.stderr)
        raise SystemExit(128 + launch.asked[0]) from None
    finally:
        _launch.reset(token)


@wrapt.decorator
def placing(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    """The host's `get_placement_group(num_devices)`, called once Ray runs."""
    launch = _launch.get(None)
    if launch is None:  # another stage
        return wrapped(*args, **kwargs)
    hand_on_stops(launch.hand_on)  # after Ray's start, which sets handlers of its own
    return wrapped(_num_places(launch.num_workers, *args))


def _stop_workers(signum: int) -> None:
    """Have the workers stop; where there are none yet, or they cannot be reached, end this process."""
    try:
        are_told = _terminate_workers()
    except Exception:  # whatever Ray fails with: nobody waits for this thread, and the stop has to end the run
        traceback.print_exc()
        are_told = False
    if not are_told:
        os._exit(128 + signum)  # and Ray ends what it has started


def _terminate_workers() -> bool:
    """Send SIGTERM to the workers, wherever Ray runs them; False if there are none."""
    import ray
    from ray._private.state import actors  # the public `list_actors` needs the dashboard, which a cluster may lack
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own = {"JobID": ray.get_runtime_context().get_job_id(), "ActorClassName": "Worker", "State": "ALIVE"}
    pids: dict[str, list[int]] = {}
    for actor in actors().values():
        if own.items() <= actor.items():
            pids.setdefault(actor["Address"]["NodeID"], []).append(actor["Pid"])
    # All of a machine at once: the first one has the others stop as well, and a later signal finds a run at its end.
    terminate = ray.remote(num_cpus=0)(_terminate)
    places = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in pids}
    ray.get([terminate.options(scheduling_strategy=places[node]).remote(each) for node, each in pids.items()])
    return bool(pids)


def _terminate(pids: list[int]) -> None:
    """End workers of this machine."""
    for pid in pids:
        with suppress(ProcessLookupError):  # it has ended by now
            os.kill(pid, signal.SIGTERM)


def _num_places(num_workers: int, num_devices: int) -> int:
    """For how many workers the host asks Ray.

    Raises:
        ValueError: if Ray would wait for ever.
    """
    import ray
    from llamafactory.extras.misc import get_device_name

    device = get_device_name().upper()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    possible = sum(int(min(node.get("CPU", 0) // _CPUS, node.get(device, 0))) for node in nodes)
    wanted = num_workers if device == "CPU" else num_devices
    if possible < wanted:
        each = f"worker (`ray_num_workers: {num_workers}`)" if device == "CPU" else f"{device} of the cluster"
        cpus, needed = sum(int(node.get("CPU", 0)) for node in nodes), _CPUS * wanted
        raise ValueError(
            f"Ray counts {cpus} CPUs, and LLaMA-Factory asks it for {_CPUS} for each {each}, on its machine: {needed} "
            f"in all. Ray would wait for them for ever. Write `ray_init_kwargs: {{num_cpus: {needed}}}`; where Ray "
            f"runs already, start it with `ray start --num-cpus` and {_CPUS} for each worker of a machine. Ray only "
            "counts with them: a worker uses the CPUs that there are."
        )
    return wanted
