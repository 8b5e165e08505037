"""`grpo-stage plan --layout`: the memory of each rank and server, and seconds of a step by simulation."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_stage.tools.recipe_file import (
    ATTENTION,
    errors_explained,
    parse_without_run,
    quiet_host,
    read_recipe,
    write_json,
)


if TYPE_CHECKING:
    from grpo_stage.host.memory_plan import MemoryPlan
    from grpo_stage.layout.simulation import Outcome
    from grpo_stage.layout.syntax import Layout


GIB = float(2**30)
SERVER_SHARE = 0.9
"""Of a server's cards, what weights and cache take: vLLM's own default of `--gpu-memory-utilization`."""
OF_SEVERAL_DEVICES = ("deepspeed", "fsdp", "fsdp_config", "vllm_server_urls")
"""Keys that the layout stands for: they need packages or servers that a plan does without."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayoutPlan:
    """What is known of a recipe on a layout."""

    layout: "Layout"
    memory: "MemoryPlan"
    """Of a rank that trains."""
    server: Mapping[str, float]
    """Bytes of a card that only samples, by part; empty without one."""
    outcome: "Outcome | None"
    """None if an engine has no room."""
    problem: str
    """Why there is no outcome."""
    hours: float | None
    """For every prompt once; None if it is not known how many there are."""

    @property
    def fits(self) -> bool:
        return self.memory.fits and not self.problem


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layout",
        metavar="TEXT",
        help='devices that train and devices that sample, such as "train 8xH100 zero3; serve 4x2xH100": simulate '
        "steps on them",
    )
    parser.add_argument(
        "--lengths",
        type=Path,
        metavar="FILE",
        help="with --layout: a run's completions.jsonl, whose lengths are drawn (default: evenly from 1 to "
        "`max_new_tokens`, or all of --completion-tokens)",
    )
    parser.add_argument("--prompts", type=int, metavar="N", help="with --layout: how many prompts the dataset has")


def check_layout_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together."""
    if args.layout is None:
        wrong = next((name for name in ("lengths", "prompts") if getattr(args, name) is not None), None)
        if wrong is not None:
            raise ValueError(f"`--{wrong}` would have no effect without `--layout`. Add that, or leave it out.")
        return
    if args.device is not None or args.devices != 1:
        raise ValueError(
            "`--device` and `--devices` cannot go with `--layout`, which names the cards. Leave both out."
        )
    if args.prompts is not None and args.prompts < 1:
        raise ValueError(f"`--prompts {args.prompts}` must be at least 1.")
    if args.lengths is not None and args.completion_tokens is not None:
        raise ValueError("`--lengths` and `--completion-tokens` both say how long completions are. Leave one out.")


def run_layout(args: argparse.Namespace) -> int:
    """The command with `--layout`."""
    from grpo_stage.layout.syntax import parse_layout

    layout = parse_layout(args.layout)
    with quiet_host():
        configuration = read_recipe(args.config, args.overrides)
        with errors_explained(configuration):
            plan = plan_layout(
                configuration,
                layout,
                prompt_length=args.prompt_tokens,
                completion_length=args.completion_tokens,
                lengths=args.lengths,
                num_prompts=args.prompts,
                flops=None if args.tflops is None else args.tflops * 1e12,
            )
    write_json(args.json, as_json(plan))
    if str(args.json) != "-":
        show(plan)
    return 0 if plan.fits else ATTENTION


def plan_layout(
    configuration: Mapping[str, Any],
    layout: "Layout",
    *,
    prompt_length: int | None = None,
    completion_length: int | None = None,
    lengths: Path | None = None,
    num_prompts: int | None = None,
    flops: float | None = None,
) -> LayoutPlan:
    """Plan a recipe's memory on a layout and simulate its steps.

    Args:
        configuration: the recipe.
        layout: the cards.
        prompt_length: in tokens; None is `cutoff_len`.
        completion_length: of all completions; None draws them.
        lengths: a file of completions to draw from; None draws evenly up to `max_new_tokens`.
        num_prompts: of the dataset; None is `max_samples`, if that is set.
        flops: what a card computes a second in the update; None is a share of its data sheet's.

    Raises:
        ValueError: if the recipe is refused, or cannot go with the layout.
    """
    from grpo_stage.host.memory_plan import Device, make_plan
    from grpo_stage.host.parser import typed
    from grpo_stage.layout.costs import Rates, Work
    from grpo_stage.layout.simulation import NoRoomError, fixed, of_file, simulate, uniform
    from grpo_stage.rollout.engines.vllm_server_fleet import MOST_IN_FLIGHT

    backend = configuration.get("rollout_backend")
    _check_backend(backend, layout)
    here = {key: value for key, value in configuration.items() if key not in OF_SEVERAL_DEVICES}
    if backend == "vllm_server":
        here |= {"rollout_backend": "vllm", "vllm_config": None}  # options of a server, such as its number of cards
    written = typed(here)
    if written.get("use_cpu"):
        raise ValueError("`use_cpu: true` cannot go with `--layout`, which names GPUs. Leave it out.")
    arguments = parse_without_run(here, on_device=False)
    size = arguments.finetuning.vllm_tensor_parallel
    if layout.is_colocated and size not in (1, layout.engine_size):
        raise ValueError(
            f"`vllm_tensor_parallel: {size}` shares an engine out to {size} cards, and `--layout` has engines of "
            f"{layout.engine_size}. Add `colocate NUMBERx{size}` to the layout, or "
            f"`vllm_tensor_parallel={layout.engine_size}` to the command."
        )
    memory = make_plan(
        arguments,
        {key: bool(written.get(key)) for key in ("bf16", "fp16", "pure_bf16")},
        Device("cuda", layout.card.memory, layout.num_trainers),
        prompt_length=prompt_length,
        completion_length=completion_length,
        layout=layout,
    )
    finetuning, training = arguments.finetuning, arguments.training
    rollouts, iterations = finetuning.steps_per_generation, finetuning.num_iterations
    work = Work(
        num_prompts=training.per_device_train_batch_size * training.gradient_accumulation_steps * rollouts,
        group_size=finetuning.num_generations,
        prompt_length=prompt_length or arguments.data.cutoff_len,
        num_optimizer_steps=rollouts,
        num_iterations=iterations,
        num_scorings=(finetuning.beta != 0) + (rollouts * iterations > 1),
        max_tokens=finetuning.max_tokens_per_micro_batch,
        checkpointing=memory.checkpointing,
        shares_prompts=not finetuning.disable_prompt_sharing,
        runs_ahead=bool(finetuning.rollout_ahead),
        **({} if layout.is_colocated else {"max_in_flight": MOST_IN_FLIGHT}),
    )
    if lengths is not None:
        draw = of_file(lengths)
    elif completion_length is not None:
        draw = fixed(completion_length)
    else:
        draw = uniform(arguments.generating.max_new_tokens)
    rates = Rates() if flops is None else dataclasses.replace(Rates(), update=flops / layout.card.flops)
    share = arguments.model.vllm_gpu_util if layout.is_colocated else SERVER_SHARE
    engine_memory = share * layout.engine_card.memory
    outcome, problem = None, ""
    try:
        outcome = simulate(layout, memory.cost, work, engine_memory, draw, rates=rates)
    except NoRoomError as error:
        problem = str(error)
    num_prompts = num_prompts or arguments.data.max_samples
    return LayoutPlan(
        layout=layout,
        memory=memory,
        server=_server(layout, memory, engine_memory),
        outcome=outcome,
        problem=problem,
        hours=None if outcome is None or num_prompts is None else outcome.hours(num_prompts),
    )


def _check_backend(backend: Any, layout: "Layout") -> None:
    if backend == "hf":
        raise ValueError(
            "`--layout` knows vLLM's engine and not `rollout_backend: hf`, which is no choice for several devices. "
            "Write `rollout_backend: vllm`."
        )
    if backend == "vllm_server" and layout.is_colocated:
        raise ValueError(
            "`rollout_backend: vllm_server` samples on servers, and `--layout` has none. Add a part `serve`, such as "
            f"`serve 2x{layout.card.name}`."
        )


def _server(layout: "Layout", memory: "MemoryPlan", engine_memory: float) -> dict[str, float]:
    if layout.is_colocated:
        return {}
    weights = memory.cost.engine_weights / layout.engine_size
    return {"weights": weights, "KV cache": max(0.0, engine_memory - weights)}


def as_json(plan: LayoutPlan) -> dict[str, Any]:
    """The content of the `--json` file."""
    layout, memory = plan.layout, plan.memory
    outcome = None if plan.outcome is None else dataclasses.asdict(plan.outcome)
    return {
        "fits": plan.fits,
        "layout": {
            **dataclasses.asdict(layout),
            "card": layout.card.name,
            "engine_card": layout.engine_card.name,
        },
        "rank": {
            "usable_bytes": memory.limit,
            "peak_bytes": memory.grpo.peak.total,
            "peak_phase": memory.grpo.peak.name,
            "phases": {phase.name: dict(phase.parts) for phase in memory.grpo.phases},
        },
        "server_bytes": dict(plan.server),
        "sync_bytes": memory.cost.delivered,
        "step": outcome,
        "tokens_per_s": None if plan.outcome is None else plan.outcome.tokens_per_s,
        "hours_per_epoch": plan.hours,
        "problems": [*memory.problems, *filter(None, [plan.problem])],
        "notes": list(memory.notes),
    }


def show(plan: LayoutPlan) -> None:
    """Print the plan."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    layout, memory, outcome = plan.layout, plan.memory, plan.outcome
    divided = "nothing divided" if layout.sharding == "none" else layout.sharding
    where = " on the same cards" if layout.is_colocated else ""
    console.print(
        f"{memory.num_parameters / 1e9:.3g}B parameters, {memory.num_trained / 1e6:,.4g}M trained; "
        f"{layout.num_trainers} x {layout.card.name} train ({divided}), {layout.num_engines} engine(s) of "
        f"{layout.engine_size} x {layout.engine_card.name} sample{where}; {layout.num_nodes} node(s).\n"
    )
    peak = memory.grpo.peak
    table = Table("part", title="GiB on each card", title_justify="left")
    table.add_column(Text(f"train\n({peak.name})"), justify="right")
    if plan.server:
        table.add_column("serve", justify="right")
    for name in dict.fromkeys([*peak.parts, *plan.server]):
        row = [_gib(peak.parts.get(name)), _gib(plan.server.get(name))]
        table.add_row(name, *row[: len(table.columns) - 1])
    table.add_section()
    table.add_row("total", *[_gib(peak.total), _gib(sum(plan.server.values()))][: len(table.columns) - 1])
    console.print(table)
    if outcome is not None:
        _show_step(plan, outcome, console)
    for note in (*memory.notes, *memory.problems, *filter(None, [plan.problem])):
        console.print(Text(f"Note: {note}"))
    verdict = "It fits" if plan.fits else "It does not fit"
    console.print(f"\n{verdict}: {_gib(peak.total)} of {_gib(memory.limit)} GiB of a card that trains.")


def _show_step(plan: LayoutPlan, outcome: "Outcome", console: Any) -> None:
    from rich.table import Table

    table = Table("a step, by simulation", "s", title_justify="left")
    for name, seconds in (
        ("rollout", outcome.rollout),
        ("  of it with few completions still running", outcome.tail),
        ("update", outcome.update),
        ("  of it communication", outcome.communication),
        (f"sync of {plan.memory.cost.delivered / 1e9:.3g} GB", outcome.sync),
        ("whole step", outcome.step),
    ):
        table.add_row(name, f"{seconds:.3g}")
    console.print(table)
    idle = ", ".join(f"{name} {100 * share:.0f} %" for name, share in outcome.idle.items())
    per_card = outcome.tokens_per_s / outcome.num_cards
    console.print(
        f"{outcome.num_prompts} prompts and {outcome.num_tokens:,.0f} sampled tokens a step: "
        f"{outcome.tokens_per_s:,.0f} tokens a second, {per_card:,.0f} for each card. Cards idle: {idle}. "
        f"Bottleneck: {outcome.bottleneck}."
    )
    if plan.hours is not None:
        console.print(f"{plan.hours:.3g} hours an epoch.")
    console.print(
        "Seconds are of a model with stated rates, not measured; docs/scaling.md has them beside measurements.",
    )


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}"
