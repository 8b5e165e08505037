"""The process in which `grpo-stage profile` runs the steps that it measures: `profile_step RECIPE RESULT [--ppo]`.

A process of its own, so that nothing is in it but the run: peaks do not mix.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo_stage.survival.stop import ending_at_once
from grpo_stage.tools.recipe_file import quiet_host, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe, a JSON mapping, and write what its steps held."""
    parser = argparse.ArgumentParser(prog="grpo-stage profile")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--ppo", action="store_true")
    args = parser.parse_args(argv)
    with quiet_host(), ending_at_once():
        result = measure(json.loads(args.recipe.read_text(encoding="utf-8")), is_ppo=args.ppo)
    write_json(args.result, result)
    return 0


def measure(configuration: dict[str, Any], is_ppo: bool) -> dict[str, Any]:
    """Run a recipe in this process: what its steps held, ready for JSON."""
    from grpo_stage.host.parser import parse
    from grpo_stage.memory.measure import MeasuredTrainer, Meter
    from grpo_stage.memory.ppo import PPOTrainer
    from grpo_stage.plugin.registration import install
    from grpo_stage.workflow import run_grpo

    install()
    arguments = parse(configuration)
    trainers: list[MeasuredTrainer] = []
    meter = Meter(arguments.training.device.type)
    kind = PPOTrainer if is_ppo else MeasuredTrainer

    def make_trainer(**kwargs: Any) -> MeasuredTrainer:
        trainers.append(partial(kind, meter=meter)(**kwargs))
        return trainers[-1]

    run_grpo(arguments, lambda _: [], make_trainer)
    (trainer,) = trainers
    prompts, completions = zip(*trainer.lengths, strict=True)
    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    return {
        "device_type": arguments.training.device.type,
        "process_bytes": meter.process,
        "phases": meter.peaks,
        "parts": trainer.parts,
        "gradient_checkpointing": bool(base.is_gradient_checkpointing),
        "prompt_tokens": fmean(prompts),
        "completion_tokens": fmean(completions),
    }


if __name__ == "__main__":
    sys.exit(main())
