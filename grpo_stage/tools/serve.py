"""Print the command that starts a vLLM server for a recipe of `rollout_backend: vllm_server`; with --run, start it.

One command serves every machine and every port: each server of `vllm_server_urls` is started with it.

    grpo-stage serve grpo.yaml
    grpo-stage serve grpo.yaml --port 8001 --run
"""

import argparse
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

from grpo_stage.tools.recipe_file import (
    add_recipe_arguments,
    errors_explained,
    parse_without_run,
    quiet_host,
    read_recipe,
    write_json,
)


if TYPE_CHECKING:
    from grpo_stage.rollout.engines.vllm_server_command import ServeCommand

NAME = "serve"
HELP = "the command, and the environment, of a vLLM server for a recipe; `--run` starts it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--port", type=int, default=8000, help="where the server listens (default: 8000)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address that it listens at (default: 127.0.0.1, for runs on this machine alone)",
    )
    # `run` is the function of every subcommand.
    parser.add_argument("--run", dest="starts", action="store_true", help="start it, in the place of this process")


def run(args: argparse.Namespace) -> int:
    if not 0 < args.port < 65536:
        raise ValueError(f"`--port {args.port}` is no port. Write a number from 1 to 65535.")
    own_environment = dict(os.environ)  # before the host sees one device alone
    with quiet_host():
        configuration = read_recipe(args.config, args.overrides)
        with errors_explained(configuration):
            command = _command(configuration, args.host, args.port)
            from grpo_stage.rollout.engines.vllm_server_command import problem_here

            problem = problem_here()
    write_json(args.json, {"environment": dict(command.environment), "arguments": list(command.arguments)})
    if args.starts:
        if problem is not None:
            raise ValueError(problem)
        arguments = list(command.arguments)
        if arguments[0] == "python":
            arguments[0] = sys.executable
        sys.stdout.flush()
        os.execvpe(arguments[0], arguments, {**own_environment, **command.environment})
    if str(args.json) != "-":
        print(as_shell(command))
        if problem is not None:
            print(f"grpo-stage: {problem}", file=sys.stderr)
    return 0


def as_shell(command: "ServeCommand") -> str:
    """The command for a shell, one flag a line."""
    lines = [" ".join(f"{name}={shlex.quote(value)}" for name, value in command.environment.items())]
    for word in command.arguments:
        if word.startswith("--") or len(lines) == 1:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n  ".join(lines)


def _command(configuration: dict[str, Any], host: str, port: int) -> "ServeCommand":
    from grpo_stage.rollout.engines.vllm_server_command import is_cpu_package_here, serve_command

    arguments = parse_without_run(configuration, on_device=True)
    keys = arguments.values()
    if keys.rollout_backend != "vllm_server":
        raise ValueError(
            f"`rollout_backend: {keys.rollout_backend}` asks no server. Write `rollout_backend: vllm_server` and "
            f"`vllm_server_urls: http://localhost:{port}` to have completions sampled by one."
        )
    return serve_command(
        keys,
        arguments.given,
        host=host,
        port=port,
        on_cpu=arguments.training.device.type == "cpu",
        is_cpu_package=is_cpu_package_here(),
    )
