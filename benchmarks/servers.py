"""A step with one vLLM server, with two, and with one and `rollout_ahead: 1`, in one run of this program.

    python benchmarks/servers.py MODEL [--steps 6] [--rounds 2] [--arms one two ahead] [key=value ...]

MODEL is that of `grpo-stage quickstart-model`, or any folder; the recipe is the quick start's with longer rollouts.
Both servers run from the beginning to the end, as `grpo-stage serve` starts them, each with one thread, as the trainer
has. A round runs the arms one after the other, so that what else the machine does falls on all. On two cores two
servers sample on all of them, and with `rollout_ahead` one server and the trainer have one each.

Printed are medians over the steps after the second, of all rounds. They mean something on an idle machine alone: its
load is printed.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rollout_ahead import FIGURES, ROOT, SETTLING, SHAPE, run

from grpo_stage.tools import serve


sys.path.insert(0, str(ROOT))
from tests.engines.vllm_servers import ServerFarm


ARMS: dict[str, tuple[int, dict[str, Any]]] = {"one": (1, {}), "two": (2, {}), "ahead": (1, {"rollout_ahead": 1})}
"""Servers, and keys."""


def started(farm: ServerFarm, keys: dict[str, Any]) -> list[str]:
    """The addresses of two servers that are ready."""
    recipe = yaml.safe_load((ROOT / "yaml_examples/quickstart.yaml").read_text(encoding="utf-8")) | keys
    servers = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        command = serve._command(recipe | {"vllm_server_urls": f"http://127.0.0.1:{port}"}, "127.0.0.1", port)
        model = command.arguments.index(str(recipe["model_name_or_path"]))
        environment = {**command.environment, "OMP_NUM_THREADS": "1"}
        servers.append(farm.start(command.arguments[model:], environment, port))
    for server in servers:
        server.wait()
    return [server.url for server in servers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args, words = parser.parse_known_args()
    own = dict(word.split("=", 1) for word in words)
    keys = {
        "model_name_or_path": args.model,
        "max_steps": args.steps,
        "rollout_backend": "vllm_server",
        **SHAPE,
        **own,
    }
    logs: dict[str, list[dict[str, float]]] = {arm: [] for arm in args.arms}
    with tempfile.TemporaryDirectory() as folder:
        farm = ServerFarm(Path(folder))
        try:
            os.chdir(ROOT)
            urls = started(farm, keys)
            for number in range(args.rounds):
                for arm in args.arms:
                    count, changes = ARMS[arm]
                    log = run(1, {**keys, "vllm_server_urls": ",".join(urls[:count]), **changes})
                    assert len(log) > SETTLING, f"{arm}: {len(log)} steps, and more than {SETTLING} are needed"
                    logs[arm] += log[SETTLING:]
                    times = [round(line["step_time"], 2) for line in log]
                    print(f"round {number}, {arm}: {times}, load {os.getloadavg()[0]:.1f}", flush=True)
        finally:
            farm.close()
    result = {
        arm: {name: median(values) for name in FIGURES if (values := [line[name] for line in log if name in line])}
        for arm, log in logs.items()
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
