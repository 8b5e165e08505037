"""Measure what real steps of a run hold in memory, phase by phase, and with --ppo what PPO with a critic would.

Runs two steps of the recipe (the first has no optimizer states yet) in a process of its own, saves nothing, and shows
the measured peak beside the plan's. Exit code 3 if they differ by more than 15 %.

    grpo-stage profile grpo.yaml
    grpo-stage profile grpo.yaml --ppo rollout_backend=hf
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_stage.tools.recipe_file import (
    ATTENTION,
    add_recipe_arguments,
    errors_explained,
    parse_without_run,
    quiet_host,
    read_recipe,
    write_json,
)


if TYPE_CHECKING:
    from grpo_stage.memory.parts import Budget


NAME = "profile"
HELP = "run two steps and measure what they hold in memory, beside the plan and beside PPO"

GIB = float(2**30)
TOLERANCE = 0.15
"""Of the total that the run adds to its process; past it the plan is said to be off."""
STEPS = 2
# Every completion takes part in the update, whatever its reward, in GRPO as in PPO.
FOR_A_MEASUREMENT = {
    "max_steps": STEPS,
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "plot_loss": False,
    "log_completions": False,
    "overwrite_output_dir": True,
    "resume_from_checkpoint": None,
    "disable_zero_advantage_skipping": True,
}
# Freed memory goes back to the system at once, so that the resident size is that of what is alive.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one process held."""

    name: str
    phases: Mapping[str, float]
    """Peak of each, the process left out, bytes."""
    parts: Mapping[str, float]
    """Tensors that were counted, bytes."""
    process: float
    """Interpreter, libraries and dataset, bytes."""
    planned: float
    """The plan's peak for these lengths, the process left out, bytes."""
    gradient_checkpointing: bool
    prompt_tokens: float
    completion_tokens: float

    @property
    def peak(self) -> float:
        return max(self.phases.values())

    @property
    def error(self) -> float:
        """Of the plan, as a share of what was measured."""
        return self.planned / self.peak - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--ppo", action="store_true", help="measure PPO with a critic, a second model, as well")
    parser.add_argument(
        "--keep-freed",
        action="store_true",
        help="on a CPU, let the C library keep what is freed, as it does in a run; the plan does not count that",
    )


def run(args: argparse.Namespace) -> int:
    with quiet_host():
        configuration = read_recipe(args.config, args.overrides)
        with errors_explained(configuration):
            parse_without_run(configuration, on_device=True)  # errors of the recipe come before a process starts
            names = ["GRPO", *(["PPO"] if args.ppo else [])]
            results = [measure(configuration, name, args.keep_freed) for name in names]
    write_json(args.json, [{**dataclasses.asdict(each), "peak": each.peak, "error": each.error} for each in results])
    if str(args.json) != "-":
        _print(results)
    return ATTENTION if any(abs(each.error) > TOLERANCE for each in results) else 0


def measure(configuration: Mapping[str, Any], name: str, keeps_freed: bool) -> Measured:
    with tempfile.TemporaryDirectory(prefix="grpo-stage-profile-") as folder:
        recipe, result = Path(folder, "recipe.json"), Path(folder, "result.json")
        values = {**configuration, **FOR_A_MEASUREMENT, "output_dir": str(Path(folder, "output"))}
        recipe.write_text(json.dumps(values), encoding="utf-8")
        command = [sys.executable, "-m", "grpo_stage.tools.profile_step", str(recipe), str(result)]
        environment = os.environ | ({} if keeps_freed else MALLOC)
        ended = subprocess.run([*command, *(["--ppo"] if name == "PPO" else [])], env=environment, stdout=sys.stderr)
        if ended.returncode != 0:
            raise ValueError(
                f"The measured run of {name} ended with exit code {ended.returncode}; its messages are above. Mend "
                "what they name, or run `grpo-stage plan`, which needs no run."
            )
        found = json.loads(result.read_text(encoding="utf-8"))
    return compared(configuration, name, found)


def compared(configuration: Mapping[str, Any], name: str, found: Mapping[str, Any]) -> Measured:
    """What `profile_step` found, beside the plan for the same lengths.

    Args:
        configuration: the recipe.
        name: GRPO or PPO.
        found: the result of the measured process.
    """
    start = found["process_bytes"]
    return Measured(
        name=name,
        phases={phase: float(max(0, peak - start)) for phase, peak in found["phases"].items()},
        parts=found["parts"],
        process=start,
        planned=_planned(configuration, found, is_ppo=name == "PPO"),
        gradient_checkpointing=found["gradient_checkpointing"],
        prompt_tokens=found["prompt_tokens"],
        completion_tokens=found["completion_tokens"],
    )


def _planned(configuration: Mapping[str, Any], found: Mapping[str, Any], is_ppo: bool) -> float:
    """The plan's peak for the measured lengths, without the process."""
    from grpo_stage.host.memory_plan import make_plan, this_device
    from grpo_stage.host.parser import typed
    from grpo_stage.tools.plan import PRECISIONS

    values = {**configuration, "disable_gradient_checkpointing": not found["gradient_checkpointing"]}
    plan = make_plan(
        parse_without_run(values, on_device=False),
        {key: bool(typed(values).get(key)) for key in PRECISIONS},
        this_device(found["device_type"] == "cpu"),
        prompt_length=round(found["prompt_tokens"]),
        completion_length=round(found["completion_tokens"]),
    )
    budget: Budget = plan.budgets[1] if is_ppo else plan.grpo
    return budget.peak.total - budget.peak.parts["process"]


def _print(results: Sequence[Measured]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    first = results[0]
    console.print(
        f"Two steps, prompts of {first.prompt_tokens:.0f} and completions of {first.completion_tokens:.0f} tokens in "
        f"the mean. GiB above the {first.process / GIB:.2f} of Python, its libraries and the dataset:\n"
    )
    table = Table("peak of a phase")
    for each in results:
        table.add_column(each.name, justify="right")
    for phase in dict.fromkeys(name for each in results for name in each.phases):
        table.add_row(phase, *(_gib(each.phases.get(phase)) for each in results))
    table.add_section()
    table.add_row("peak", *(_gib(each.peak) for each in results))
    table.add_row("planned", *(f"{_gib(each.planned)} ({100 * each.error:+.0f} %)" for each in results))
    console.print(table)
    table = Table("tensors that were counted")
    for each in results:
        table.add_column(each.name, justify="right")
    for part in dict.fromkeys(name for each in results for name in each.parts):
        table.add_row(part, *(_gib(each.parts.get(part)) for each in results))
    console.print(table)
    if len(results) > 1:
        share = 1 - results[0].peak / results[1].peak
        console.print(f"GRPO took {100 * share:.0f} % less than PPO with a critic of the policy's size.")


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:.3f}"
