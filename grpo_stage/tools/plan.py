"""Plan a run's memory before it: what each part takes on your devices, and what the same run would take with PPO.

Reads the model's config, no weights. Exit code 3 if the run does not fit; then it says what to change, cheapest first.

    grpo-stage plan grpo.yaml --device 24GB
    grpo-stage plan grpo.yaml --device 80GB --devices 4 finetuning_type=full

With `--layout` it also simulates steps on several devices, of which some may only sample: seconds and who waits.

    grpo-stage plan grpo.yaml --layout "train 8xH100 zero3; serve 4x2xH100" --lengths saves/run/completions.jsonl
"""

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpo_stage.tools.plan_layout import add_layout_arguments, check_layout_arguments, run_layout
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
    from grpo_stage.host.memory_plan import Device, MemoryPlan
    from grpo_stage.memory.remedies import Remedy


NAME = "plan"
HELP = "what a run holds in memory, part by part, and what to change if it does not fit"

GIB = float(2**30)
_UNITS = {"GB": GIB, "GIB": GIB, "MB": GIB / 1024, "MIB": GIB / 1024}
PRECISIONS = ("bf16", "fp16", "pure_bf16")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A remedy on top of those before it."""

    keys: Mapping[str, Any]
    cost: str
    saved: float
    """Bytes off the peak."""
    total: float
    """The peak that is left, bytes."""
    fits: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument(
        "--device",
        metavar="SIZE",
        help="memory of one device, such as 24GB, which is read as GiB as cards are sold (default: this machine's)",
    )
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="number of them (default: 1)")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="length of prompts (default: `cutoff_len`)")
    parser.add_argument(
        "--completion-tokens", type=int, metavar="N", help="length of completions (default: `max_new_tokens`)"
    )
    parser.add_argument(
        "--tflops", type=float, metavar="X", help="what one device computes, to estimate the time of an update"
    )
    add_layout_arguments(parser)


def run(args: argparse.Namespace) -> int:
    size = None if args.device is None else size_of(args.device)
    for name in ("devices", "prompt_tokens", "completion_tokens", "tflops"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"`--{name.replace('_', '-')} {value:g}` must be above 0.")
    check_layout_arguments(args)
    if args.layout is not None:
        return run_layout(args)
    with quiet_host():
        configuration = read_recipe(args.config, args.overrides)
        with errors_explained(configuration):
            lengths = {"prompt_length": args.prompt_tokens, "completion_length": args.completion_tokens}
            plan, steps = _planned(configuration, _device(configuration, size, args.devices), lengths)
    seconds = None if args.tflops is None else plan.update_flops / (args.tflops * 1e12)
    write_json(args.json, as_json(plan, steps, seconds))
    if str(args.json) != "-":
        show(plan, steps, seconds)
    return 0 if plan.fits else ATTENTION


def plan_here(configuration: Mapping[str, Any]) -> "tuple[MemoryPlan, list[Step]]":
    """The plan for one of this machine's devices, and what to change if it does not fit.

    Raises:
        ValueError: if the recipe is refused, or the model's activations cannot be forecast.
    """
    return _planned(configuration, _device(configuration, None, 1), {})


def _planned(
    configuration: Mapping[str, Any], device: "Device", lengths: Mapping[str, int | None]
) -> "tuple[MemoryPlan, list[Step]]":
    plan, values = _plan(configuration, device, lengths)
    return plan, [] if plan.fits else _steps(configuration, plan, values, lengths)


def size_of(text: str) -> float:
    """Bytes of `24GB`.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise ValueError(
            f"`--device {text}` is no size of a device's memory: it is a number above 0 and a unit, GB or MB. Write "
            "for example `--device 24GB`."
        )
    return float(match[1]) * _UNITS[match[2].upper()]


def _device(configuration: Mapping[str, Any], size: float | None, count: int) -> "Device":
    from grpo_stage.host.memory_plan import Device, this_device
    from grpo_stage.host.parser import typed

    uses_cpu = bool(typed(dict(configuration)).get("use_cpu"))
    if size is None:
        return dataclasses.replace(this_device(uses_cpu), count=count)
    return Device("cpu" if uses_cpu else "cuda", size, count)


def _plan(
    configuration: Mapping[str, Any], device: "Device", lengths: Mapping[str, int | None]
) -> "tuple[MemoryPlan, dict[str, Any]]":
    """The plan, and every key's value."""
    from grpo_stage.host.memory_plan import make_plan
    from grpo_stage.host.parser import typed

    written = typed(dict(configuration))
    precision = {key: bool(written.get(key)) for key in PRECISIONS}
    arguments = parse_without_run(configuration, on_device=False)
    plan = make_plan(
        arguments,
        precision,
        device,
        prompt_length=lengths.get("prompt_length"),
        completion_length=lengths.get("completion_length"),
    )
    return plan, {**vars(arguments.values()), **precision, "checkpointing_is_off": not plan.checkpointing}


def _steps(
    configuration: Mapping[str, Any], plan: "MemoryPlan", values: Mapping[str, Any], lengths: Mapping[str, int | None]
) -> list[Step]:
    """Remedies, each on top of those before, until the run fits or none is left; what saves nothing is left out."""
    from grpo_stage.memory.remedies import next_remedies

    steps: list[Step] = []
    changed = dict(configuration)
    tried: list[Remedy] = []
    while not plan.fits:
        remedy = next((each for each in next_remedies(values, plan.device.type) if each not in tried), None)
        if remedy is None:
            break
        tried.append(remedy)
        candidate = {**changed, **remedy.keys}
        better, of_better = _plan(candidate, plan.device, lengths)
        saved = plan.grpo.peak.total - better.grpo.peak.total
        if saved <= 0 and not (plan.problems and not better.problems):
            continue
        steps.append(
            Step(keys=remedy.keys, cost=remedy.cost, saved=saved, total=better.grpo.peak.total, fits=better.fits)
        )
        changed, plan, values = candidate, better, of_better
    return steps


def as_json(plan: "MemoryPlan", steps: Sequence[Step], seconds: float | None) -> dict[str, Any]:
    """The content of the `--json` file."""
    return {
        "fits": plan.fits,
        "device": dataclasses.asdict(plan.device),
        "usable_bytes": plan.limit,
        "num_parameters": plan.num_parameters,
        "num_trained": plan.num_trained,
        "gradient_checkpointing": plan.checkpointing,
        "micro_batch_tokens": plan.micro_batch_tokens,
        "micro_batch_bytes": {"kept": plan.kept.peak, "recomputed": plan.recomputed.peak},
        "update_flops": plan.update_flops,
        "update_s": seconds,
        "budgets": {
            budget.name: {
                "peak_bytes": budget.peak.total,
                "peak_phase": budget.peak.name,
                "phases": {phase.name: dict(phase.parts) for phase in budget.phases},
            }
            for budget in plan.budgets
        },
        "problems": list(plan.problems),
        "notes": list(plan.notes),
        "remedies": [{**dataclasses.asdict(step), "keys": dict(step.keys)} for step in steps],
    }


def show(plan: "MemoryPlan", steps: Sequence[Step], seconds: float | None) -> None:
    """Print the plan; `seconds` are those of an update's passes."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    device = plan.device
    console.print(
        f"{plan.num_parameters / 1e9:.3g}B parameters, {plan.num_trained / 1e6:,.4g}M trained; {device.count} x "
        f"{device.type} of {device.capacity / GIB:.1f} GiB. GiB on each device, at the moment when most is held:\n"
    )
    table = Table("part")
    for budget in plan.budgets:
        table.add_column(Text(f"{budget.name}\n({budget.peak.name})"), justify="right")
    names = list(dict.fromkeys(name for budget in plan.budgets for name in budget.peak.parts))
    for name in names:
        table.add_row(name, *(_gib(budget.peak.parts.get(name)) for budget in plan.budgets))
    table.add_section()
    table.add_row("total", *(_gib(budget.peak.total) for budget in plan.budgets))
    for budget in plan.budgets[1:]:
        share = 1 - plan.grpo.peak.total / budget.peak.total
        console_line = f"GRPO takes {100 * share:.0f} % less than {budget.name}."
        table.caption = f"{table.caption}\n{console_line}" if table.caption else console_line
    console.print(table)
    others = ", ".join(f"{phase.name} {_gib(phase.total)}" for phase in plan.grpo.phases)
    console.print(f"\nPhases of GRPO: {others} GiB.")
    console.print(
        f"A micro-batch of {plan.micro_batch_tokens} tokens: {_gib(plan.kept.peak)} GiB with its activations kept, "
        f"{_gib(plan.recomputed.peak)} with gradient checkpointing, which is {'on' if plan.checkpointing else 'off'}."
    )
    at_rate = "" if seconds is None else f": {seconds:.3g} s at that rate; sampling comes on top"
    console.print(
        f"An update's passes are {plan.update_flops / 1e12:.3g} TFLOP a device, in {plan.num_micro_batches} "
        f"micro-batches{at_rate}."
    )
    for note in (*plan.notes, *plan.problems):
        console.print(Text(f"Note: {note}"))
    verdict = "It fits" if plan.fits else "It does not fit"
    console.print(f"\n{verdict}: {_gib(plan.grpo.peak.total)} of {_gib(plan.limit)} GiB that can be filled.")
    for step in steps:
        keys = ", ".join(
            f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in step.keys.items()
        )
        end = "  <- fits" if step.fits else ""
        console.print(Text(f"  {keys}  saves {_gib(step.saved)}, leaves {_gib(step.total)} GiB ({step.cost}){end}"))
    if steps and not steps[-1].fits:
        console.print("  Nothing else in the recipe saves memory: take a larger device or a smaller model.")


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}"
