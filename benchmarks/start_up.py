"""What a run's first step waits for: seconds of each part of a start, by the clock and of the processor.

    python benchmarks/start_up.py yaml_examples/quickstart.yaml [key=value ...]

The recipe runs for one step (`max_steps: 1`), as `python -m grpo_stage train` would run it. Imports come first here,
so that they are no part of what imports them. A part with a colon is in one without.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import psutil


seconds: dict[str, list[float]] = {"python": [time.time() - psutil.Process().create_time(), time.process_time()]}
"""By the clock, and of all threads of this process: what other processes do adds little to the second."""


def timed(owner: Any, name: str, part: str) -> None:
    """Have calls of `owner.name` counted as `part`."""
    inner = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        return measured(part, lambda: inner(*args, **kwargs))

    setattr(owner, name, run)


def measured(part: str, run: Callable[[], Any]) -> Any:
    started = now()
    try:
        return run()
    finally:
        add(part, started)


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def add(part: str, started: tuple[float, float]) -> None:
    before = seconds.get(part, [0.0, 0.0])
    seconds[part] = [total + end - start for total, end, start in zip(before, now(), started, strict=True)]


def main() -> None:
    begun = now()
    measured("import torch", lambda: import_module("torch"))
    measured("import transformers and PEFT", lambda: [import_module("transformers").Trainer, import_module("peft")])
    measured("import LLaMA-Factory", lambda: import_module("llamafactory.train.tuner"))
    launch = measured("import the stage", lambda: import_module("grpo_stage.plugin.launch"))
    from grpo_stage import workflow
    from grpo_stage.collector import Collector
    from grpo_stage.learner import Learner
    from grpo_stage.plugin.registration import install, run_cli
    from grpo_stage.rollout.engines import vllm_process
    from grpo_stage.rollout.sampler import Sampler
    from grpo_stage.trainer import GRPOTrainer

    for name in ("load_rewards", "load_inputs", "load_policy", "start_engine", "GRPOTrainer", "finish"):
        timed(workflow, name, name)
    timed(vllm_process, "start", "start_engine: vLLM")
    timed(Learner, "prepare", "comparison of shared prompts with plain rows, and memory")
    timed(Sampler, "sync", "first step: sync")
    timed(Sampler, "generate", "first step: rollout")
    timed(Collector, "collect", "first step: rollout, rewards, log-probabilities")
    timed(Learner, "learn", "first step: update")
    timed(GRPOTrainer, "train", "train")
    of_run = launch.run_grpo

    def run_grpo(*args: Any) -> None:
        add("parse and check", parsing)
        of_run(*args)

    launch.run_grpo = run_grpo
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["llamafactory-cli", "train", *sys.argv[1:], "max_steps=1", f"output_dir={folder}"]
        install()
        parsing = now()
        try:
            run_cli()
        finally:  # a step that taught nothing ends the run with an error
            add("all but python", begun)
            for part, (clock, processor) in seconds.items():
                print(f"{clock:7.2f} {processor:7.2f}  {part}")


if __name__ == "__main__":
    main()
