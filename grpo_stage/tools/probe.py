"""Sample a recipe's prompts from its start model, and say whether GRPO can learn here.

How often the model is right, how that grows with more samples, which prompts are always right or always wrong, whether
`max_new_tokens` cuts answers, and what group size buys most, each with 95 % intervals. The recipe's engine, sampling
and rewards are used; nothing is trained. Exit code 3 says that a cold start, harder prompts or another setting is
needed.

    grpo-stage probe x.yaml -n 64 -k 16 --write filtered.jsonl --picture probe.png

`--write` keeps the rows of probed prompts that are right in 20 to 80 % of samples, as a dataset with the same columns.
"""

import argparse
import contextlib
import dataclasses
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from grpo_stage.survival.stop import ending_at_once
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
    from rich.progress import Progress

    from grpo_stage.forecast.contrast import Contrasts
    from grpo_stage.forecast.report import Estimate, ProbeReport
    from grpo_stage.host.run_arguments import RunArguments
    from grpo_stage.host.start import StartedPolicy
    from grpo_stage.rewards.suite import RewardSuite
    from grpo_stage.types import Prompt, ScoredGroup


NAME = "probe"
HELP = "sample from the start model: whether GRPO can learn here, and with what group size"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("-n", type=int, default=64, metavar="N", help="prompts, chosen by the seed (default: 64)")
    parser.add_argument("-k", type=int, default=16, metavar="K", help="samples of each prompt (default: 16)")
    parser.add_argument(
        "--right-at",
        type=float,
        metavar="REWARD",
        help="the total reward from which on a completion is right (default: `accuracy` or `exact_match` where the "
        "recipe has one, else the best total seen)",
    )
    parser.add_argument(
        "--gradient-prompts",
        type=int,
        default=8,
        metavar="N",
        help="prompts whose completions' gradients are measured for the group size; 0 leaves it out (default: 8)",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the rows worth training on: JSON lines")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw pass@k and the signal by group size")


def run(args: argparse.Namespace) -> int:
    for flag, value, least in (("-n", args.n, 1), ("-k", args.k, 2), ("--gradient-prompts", args.gradient_prompts, 0)):
        if value < least:
            raise ValueError(f"`{flag} {value}` must be at least {least}.")
    # Ctrl-C as an exception could be handled by a reward function.
    with quiet_host(), ending_at_once():
        configuration = read_recipe(args.config, args.overrides)
        with errors_explained(configuration):
            report, prompts = _probe(configuration, args)
    write_json(args.json, dataclasses.asdict(report))
    is_shown = str(args.json) != "-"
    if is_shown:
        _print(report)
    if args.write:
        words = _write(args.write, report, prompts)
        print(words, file=sys.stdout if is_shown else sys.stderr)
    if args.picture:
        _draw(args.picture, report)
    return ATTENTION if any(verdict.needs_attention for verdict in report.verdicts) else 0


def _probe(configuration: Mapping[str, Any], args: argparse.Namespace) -> "tuple[ProbeReport, list[Prompt]]":
    from grpo_stage.forecast.report import make_report
    from grpo_stage.host.inputs import load_inputs
    from grpo_stage.host.start import started_policy
    from grpo_stage.rewards.constant_answer import best_constant_answer
    from grpo_stage.rewards.loading import load_rewards

    arguments = parse_without_run(configuration, on_device=True)
    finetuning = arguments.finetuning
    if finetuning.vllm_tensor_parallel > 1:
        written = f"`vllm_tensor_parallel: {finetuning.vllm_tensor_parallel}`"
        print(f"A probe is one process and has an engine of its own: {written} counts as 1.")
        finetuning.vllm_tensor_parallel = 1
    rewards = load_rewards(
        cast(list[str], finetuning.reward_funcs),
        cast(list[float] | None, finetuning.reward_weights),
        cast(dict[str, Any] | None, finetuning.reward_kwargs),
        max_new_tokens=arguments.generating.max_new_tokens,
        timeout_s=finetuning.reward_timeout,
        fields=tuple(finetuning.reward_columns or ()),
        code_sandbox=finetuning.code_sandbox,
        announce=print,  # on stderr, as `run` has it
    )
    with contextlib.closing(rewards):
        arguments.data.eval_dataset = None
        inputs = load_inputs(arguments)
        train = inputs.prompts.train
        rewards.check(train)
        chosen = random.Random(arguments.training.seed).sample(range(len(train)), min(args.n, len(train)))
        prompts = [train[i] for i in sorted(chosen)]
        with started_policy(arguments, inputs, rewards, args.k) as policy, _progress() as progress:
            groups, seconds = _sample(
                policy, rewards, prompts, _prompts_at_once(arguments, args.k), progress, args.json
            )
            contrasts = _contrasts(arguments, policy, groups, args.gradient_prompts, progress)
            constant = best_constant_answer(rewards, train, inputs.tokenizer)
    report = make_report(
        groups,
        rewards.names,
        threshold=args.right_at,
        num_generations=finetuning.num_generations,
        max_new_tokens=arguments.generating.max_new_tokens,
        seconds=seconds,
        contrasts=contrasts,
        constant_answer=None if constant is None else (_constant_words(constant), constant.is_tempting),
        seed=arguments.training.seed,
    )
    return report, prompts


def _constant_words(constant: Any) -> str:
    if constant.warning:
        return constant.warning
    earns = "" if constant.share is None else f", and would earn {constant.share:.0%} of what the references earn"
    return f"The best one, {constant.answer!r:.80}, is that of {constant.frequency:.0%} of the prompts{earns}."


def _prompts_at_once(arguments: "RunArguments", k: int) -> int:
    """So many that as many completions are sampled at once as in a step of the recipe: its speed is what is told."""
    from grpo_stage.rollout.epochs import prompts_of_step

    return max(1, prompts_of_step(arguments.training) * arguments.finetuning.num_generations // k)


def _sample(
    policy: "StartedPolicy",
    rewards: "RewardSuite",
    prompts: "Sequence[Prompt]",
    prompts_at_once: int,
    progress: "Progress",
    json: Path | None,
) -> "tuple[list[ScoredGroup], float]":
    """The prompts' groups with their rewards, and the seconds that sampling took."""
    from grpo_stage.types import ScoredGroup

    groups, seconds = [], 0.0
    task = progress.add_task("sampling", total=len(prompts))
    for start in range(0, len(prompts), prompts_at_once):
        part = prompts[start : start + prompts_at_once]
        began = time.perf_counter()
        sampled = policy.engine.generate(part, policy.sampling, step=0)
        seconds += time.perf_counter() - began
        for group, scores in zip(sampled, rewards.score(sampled), strict=True):
            totals = tuple(rewards.total(row) for row in scores)
            groups.append(ScoredGroup(group=group, rewards=tuple(map(tuple, scores)), total_rewards=totals))
        progress.advance(task, len(part))
        if str(json) != "-":
            write_json(json, {"is_whole": False, "num_sampled": len(groups), "num_prompts": len(prompts)})
    return groups, seconds


def _contrasts(
    arguments: "RunArguments",
    policy: "StartedPolicy",
    groups: "Sequence[ScoredGroup]",
    num_prompts: int,
    progress: "Progress",
) -> "Contrasts | None":
    """Measured on the gradients of prompts of text whose completions earn different rewards."""
    import torch

    from grpo_stage.forecast.contrast import completion_sketch, contrasts
    from grpo_stage.host.precision import autocast_dtype

    mixed = [
        one
        for one in groups
        if len({total for total in one.total_rewards if total is not None}) > 1 and not one.group.prompt.images
    ]
    count = min(num_prompts, len(mixed))
    chosen = [mixed[i * len(mixed) // count] for i in range(count)]
    if count < 2:
        return None
    policy.engine.sleep()  # the gradients need the memory
    sketches: list[list[torch.Tensor]] = []
    rewards: list[list[float]] = []
    dtype = autocast_dtype(arguments)
    task = progress.add_task("gradients", total=sum(len(one.total_rewards) for one in chosen))
    with torch.autocast(arguments.training.device.type, dtype, enabled=dtype is not None):
        for one in chosen:
            sketches.append([])
            rewards.append([])
            for completion, total in zip(one.group.completions, one.total_rewards, strict=True):
                if total is not None:
                    of = (policy.model, one.group.prompt.token_ids, completion.token_ids)
                    sketches[-1].append(completion_sketch(*of, policy.engine.logprob_temperature))
                    rewards[-1].append(total)
                progress.advance(task)
    return contrasts(sketches, rewards)


@contextlib.contextmanager
def _progress() -> "Iterator[Progress]":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress


def _write(path: Path, report: "ProbeReport", prompts: "Sequence[Prompt]") -> str:
    """Write the rows of the prompts worth training on. Returns what was done, in words."""
    from grpo_stage.forecast.report import learnable

    kept = set(learnable(report))
    words = f"{len(kept)} of {len(prompts)} prompts are right in 20 to 80 % of their samples"
    if not kept:
        return f"{words}: {path} is not written. Probe more prompts (`-n`)."
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(dict(prompt.columns), ensure_ascii=False) for prompt in prompts if prompt.index in kept]
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return (
        f"{words}: their rows are in {path}, with the dataset's own columns. Give it an entry of its own in "
        f'dataset_info.json: the dataset\'s, with `"file_name": "{path.name}"`.'
    )


def _draw(path: Path, report: "ProbeReport") -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    _curve(left, list(report.pass_at_k), list(report.pass_at_k.values()), "C0", "-", "pass@k")
    left.set(title=f"{report.num_prompts} prompts x {report.num_samples} samples", xlabel="k", ylabel="pass@k")
    sizes = [one.size for one in report.sizes]
    _curve(right, sizes, [one.dead for one in report.sizes], "C3", "--", "dead groups")
    if report.choice is not None:
        signals = [one.signal for one in report.sizes if one.signal is not None]
        _curve(right, sizes, signals, "C2", "-", "signal, share of the best")
        right.axvspan(report.choice.low, report.choice.high, color="C2", alpha=0.07, label="best size, 95 %")
    right.axvline(report.num_generations, color="gray", lw=1, ls=":", label="the recipe's group size")
    right.set(title="Group size", xlabel="completions a prompt")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curve(axes: Any, xs: Sequence[int], estimates: "Sequence[Estimate]", color: str, dash: str, label: str) -> None:
    axes.plot(xs, [one.value for one in estimates], color=color, linestyle=dash, marker=".", label=label)
    lows, highs = [one.low for one in estimates], [one.high for one in estimates]
    axes.fill_between(xs, lows, highs, color=color, alpha=0.15, linewidth=0)


def _print(report: "ProbeReport") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)  # answers and prompts may hold brackets
    table = Table(show_header=False, title=f"{report.num_prompts} prompts x {report.num_samples} samples")
    table.add_row("right means", report.right)
    table.add_row("accuracy", _share(report.accuracy))
    table.add_row("pass@k", "  ".join(f"@{k} {one.value:.2f}" for k, one in report.pass_at_k.items()))
    table.add_row(
        "prompts",
        f"always right {report.always_right:.0%}, always wrong {report.always_wrong:.0%}, mixed {report.mixed:.0%}",
    )
    table.add_row(
        "total reward",
        "  ".join(
            f"{low:g}{'' if low == high else f' to {high:g}'}: {part:.0%}" for low, high, part in report.rewards
        ),
    )
    if report.no_reward:
        table.add_row("no reward", f"{report.no_reward:.0%} of the completions")
    table.add_row("length", f"mean {report.mean_length:.0f} tokens, {report.truncated:.0%} cut")
    table.add_row(
        "95 % end within",
        "cannot be told: fewer ended" if report.length_95 is None else f"{report.length_95} tokens",
    )
    table.add_row("speed", f"{report.tokens_per_second:.0f} completion tokens a second")
    if report.constant_answer:
        table.add_row("constant answer", report.constant_answer)
    console.print(table)
    if report.sizes:
        sizes = Table(title="Group size, at an equal number of completions")
        for name in ("G", "dead groups", "std of a group", "signal, share of the best"):
            sizes.add_column(name, justify="right")
        for one in report.sizes:
            mark = " (recipe)" if one.size == report.num_generations else ""
            signal = "not measured" if one.signal is None else _share(one.signal)
            std = f"{one.std.value:.3f} ({one.std.low:.3f} to {one.std.high:.3f})"
            sizes.add_row(f"{one.size}{mark}", _share(one.dead), std, signal)
        console.print(sizes)
    for verdict in report.verdicts:
        console.print(f"=> {verdict.text}", highlight=False)


def _share(estimate: "Estimate") -> str:
    return f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"
