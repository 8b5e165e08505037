"""A step with one vLLM server, with two, and with one and `rollout_ahead: 1`, beside vLLM in the trainer's process.

    python benchmarks/servers.py MODEL [--steps 8] [--rounds 1] [--arms own one two ahead] [key=value ...]

MODEL is that of `grpo-stage quickstart-model`, or any folder; the recipe is the quick start's with longer rollouts.
Servers are started as `grpo-stage serve` says and run from the beginning to the end, each with one thread, as the
trainer. A round runs the arms one after the other, so that what else the machine does falls on all.

Printed are medians over the steps after the second, of all rounds: of the log's figures, and of the processor seconds
of the trainer and of all servers together (`cpu/...`), to which what else the machine does adds little.
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
from tests.engines.vllm_servers import ServerFarm, ServerProcess


ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    "own": (0, {}),
    "one": (1, {}),
    "two": (2, {}),
    "ahead": (1, {"rollout_ahead": 1}),
}
"""Servers, and keys."""


def started(farm: ServerFarm, keys: dict[str, Any]) -> list[ServerProcess]:
    """Two servers that are ready."""
    recipe = yaml.safe_load((ROOT / "yaml_examples/quickstart.yaml").read_text(encoding="utf-8")) | keys
    servers = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        asked = {"rollout_backend": "vllm_server", "vllm_server_urls": f"http://127.0.0.1:{port}"}
        command = serve._command(recipe | asked, "127.0.0.1", port)
        model = command.arguments.index(str(recipe["model_name_or_path"]))
        environment = {**command.environment, "OMP_NUM_THREADS": "1"}
        servers.append(farm.start(command.arguments[model:], environment, port))
    for server in servers:
        server.wait()
    return servers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args, words = parser.parse_known_args()
    keys = {"model_name_or_path": args.model, "max_steps": args.steps, **SHAPE}
    keys |= dict(word.split("=", 1) for word in words)
    logs: dict[str, list[dict[str, float]]] = {arm: [] for arm in args.arms}
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        farm = ServerFarm(Path(folder))
        try:
            servers = started(farm, keys)
            for number in range(args.rounds):
                for arm in args.arms:
                    count, changes = ARMS[arm]
                    if count:
                        urls = ",".join(server.url for server in servers[:count])
                        changes = changes | {"rollout_backend": "vllm_server", "vllm_server_urls": urls}
                    log = run(1, keys | changes, [server.pid for server in servers[:count]])
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
