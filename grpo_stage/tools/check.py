"""Check a recipe before a run: everything that a run checks before it loads weights, and what it will do, in words.

Says all problems of the recipe at once. Where there is none, it shows the first prompts as the model will read them,
with their references; the batch's arithmetic; the keys that are written and those left at their defaults; and what one
constant answer to every prompt would earn. With `--all` it also does what `try-rewards` and `plan` do. Loads no
weights and writes nothing but the file of `--json`, with more in it as each part is done.

Exit codes: 0, the run would start; 3, it would, and something was found; 1, it would be refused, with the reasons.

    grpo-stage check yaml_examples/quickstart.yaml
"""

import argparse
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_stage.records.redaction import mask_text, secrets_in
from grpo_stage.survival.stop import ending_at_once
from grpo_stage.tools import plan, try_rewards
from grpo_stage.tools.problems import Checked, find_problems
from grpo_stage.tools.recipe_file import (
    ATTENTION,
    WITHOUT_DEVICE,
    add_recipe_arguments,
    errors_explained,
    mistake_in,
    quiet_host,
    read_recipe,
    write_json,
)


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grpo_stage.host.run_arguments import RunArguments
    from grpo_stage.rewards.constant_answer import ConstantAnswer
    from grpo_stage.types import Prompt


NAME = "check"
HELP = "check a recipe as a run does before it loads weights, and say what the run will do"

NUM_ROWS_TRIED = 4
KEYS_THAT_MATTER: Mapping[str, str] = {
    "model": "model_name_or_path adapter_name_or_path template finetuning_type lora_rank lora_target quantization_bit "
    "ref_model",
    "data": "dataset eval_dataset val_size max_samples cutoff_len reference_column curriculum_threshold",
    "rollout": "rollout_backend vllm_server_urls num_generations max_new_tokens temperature top_p top_k "
    "steps_per_generation num_iterations dynamic_sampling",
    "tools": "tools environment max_turns completion_limit tool_timeout",
    "rewards": "reward_funcs reward_weights reward_model",
    "objective": "loss_type advantage_estimator scale_rewards epsilon beta mask_truncated_completions entropy_target",
    "training": "per_device_train_batch_size gradient_accumulation_steps learning_rate lr_scheduler_type "
    "warmup_ratio warmup_steps num_train_epochs max_steps max_grad_norm seed bf16",
    "output": "output_dir save_strategy save_steps save_total_limit eval_strategy report_to resume_from_checkpoint",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """What the batch keys come to. A step is an optimizer step."""

    num_devices: int
    prompts_per_step: int
    completions_per_step: int
    prompts_per_rollout: int
    uses_of_rollout: int
    """Steps that one rollout serves, times the passes over it."""
    sampled_tokens_per_step: int
    """At most."""
    num_prompts: int
    mean_prompt_tokens: float
    max_prompt_tokens: int
    steps_per_epoch: int
    num_steps: int
    num_epochs: float
    is_upper_bound: bool
    """Whether the numbers of steps are the most that there can be (dynamic sampling)."""

    def sentences(self, num_generations: int, max_new_tokens: int) -> list[str]:
        most = "at most " if self.is_upper_bound else ""
        each_use = (
            "is trained on once"
            if self.uses_of_rollout == 1
            else f"of {self.prompts_per_rollout:,} prompts serves {self.uses_of_rollout} steps"
        )
        return [
            f"A step: {self.prompts_per_step:,} prompts x {num_generations} completions = "
            f"{self.completions_per_step:,} completions of at most {max_new_tokens:,} tokens, so at most "
            f"{self.sampled_tokens_per_step:,} sampled tokens (on {_devices(self.num_devices)}; n devices take n "
            "times as many).",
            f"A rollout {each_use}.",
            f"The data: {self.num_prompts:,} prompts of {self.mean_prompt_tokens:.0f} tokens in the mean, "
            f"{self.max_prompt_tokens:,} at most.",
            f"The run: {most}{self.steps_per_epoch:,} steps an epoch, {most}{self.num_steps:,} steps in all, "
            f"{most}{self.num_epochs:.3g} epochs.",
        ]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShownPrompt:
    text: str
    """As the model reads it, special tokens included."""
    token_ids: Sequence[int]
    reference: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """The content of the `--json` file."""

    prompts: Sequence[ShownPrompt]
    arithmetic: Arithmetic
    in_words: Sequence[str]
    written: Mapping[str, Mapping[str, Any]]
    """Keys of the recipe by group."""
    defaults: Mapping[str, Mapping[str, Any]]
    """Keys that matter, are not written and have a value, by group."""
    constant_answer: "ConstantAnswer | None"
    findings: Sequence[str]
    """What needs a person before the run."""
    warnings: Sequence[str]
    """What a run warns of at its start."""
    problems: Sequence[str] = ()
    """None here; in a file without the rest stand the problems of a recipe that is refused, each with its keys."""
    rewards: Mapping[str, Any] | None = None
    """As `try-rewards` writes them, or an `error`."""
    memory: Mapping[str, Any] | None = None
    """As `plan` writes it, or an `error`."""
    is_whole: bool = True
    """Whether nothing is to come."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="prompts to show (default: 2)")
    parser.add_argument("--all", action="store_true", help="also try the rewards, and plan the memory of this device")
    parser.add_argument(
        "--without-device",
        action="store_true",
        help="read a recipe for a GPU on a machine without one: device and precision are not checked",
    )


def run(args: argparse.Namespace) -> int:
    if args.rows < 0:
        raise ValueError(f"`--rows {args.rows}` must not be below 0.")
    with quiet_host(), ending_at_once():
        configuration = read_recipe(args.config, args.overrides)
        with errors_explained(configuration), _warnings_kept() as warnings:
            values = {**configuration, **(WITHOUT_DEVICE if args.without_device else {})}
            problems, checked = find_problems(values)
            if checked is None:
                write_json(args.json, {"problems": [dataclasses.asdict(one) for one in problems]})
                raise ValueError(_listed([one.text for one in problems]))
            result = _check(checked, configuration.keys(), args.rows, warnings)
            checked_alone = result
            parts: list[Callable[[], None]] = [lambda: _print(str(args.config), checked_alone)]
            if args.all:
                result, others = _with_the_rest(result, configuration, args.json)
                parts += others
    write_json(args.json, dataclasses.asdict(result))
    if str(args.json) != "-":
        for part in parts:
            part()
    needs_person = result.findings or (result.memory or {}).get("fits") is False or _has_errors(result)
    return ATTENTION if needs_person or (result.rewards or {}).get("findings") else 0


def _listed(texts: Sequence[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    lines = (f"{number}. {text}" for number, text in enumerate(texts, start=1))
    return "\n".join([f"{len(texts)} problems:", *lines])


def _has_errors(result: CheckResult) -> bool:
    return any("error" in (part or {}) for part in (result.rewards, result.memory))


def _with_the_rest(
    result: CheckResult, configuration: Mapping[str, Any], json: Path | None
) -> tuple[CheckResult, list[Callable[[], None]]]:
    """The result with what `try-rewards` and `plan` find, and what prints these.

    A part that fails says why, and the other is done.
    """
    shows: list[Callable[[], None]] = []

    def rewards() -> dict[str, Any]:
        tried = try_rewards.try_recipe(configuration, NUM_ROWS_TRIED, samples=False)
        shows.append(lambda: try_rewards.show(tried))
        return dataclasses.asdict(tried)

    def memory() -> dict[str, Any]:
        planned = plan.plan_here(configuration)
        shows.append(lambda: plan.show(*planned, None))
        return plan.as_json(*planned, None)

    parts: tuple[tuple[str, Callable[[], dict[str, Any]]], ...] = (("rewards", rewards), ("memory", memory))
    for name, part in parts:
        if str(json) != "-":
            write_json(json, dataclasses.asdict(dataclasses.replace(result, is_whole=False)))
        try:
            found = part()
        except Exception as error:
            text = mistake_in(error, configuration)
            if text is None:
                raise
            found = {"error": mask_text(text, secrets_in(dict(configuration)))}
            shows.append(lambda name=name, said=found["error"]: print(f"{name}: {said}"))  # type: ignore[misc]
        changes: dict[str, Any] = {name: found}
        result = dataclasses.replace(result, **changes)
    return result, shows


def _check(checked: Checked, written: Any, num_rows: int, warnings: Sequence[str]) -> CheckResult:
    from grpo_stage.rewards.constant_answer import best_constant_answer
    from grpo_stage.rewards.options import REWARD_MODEL
    from grpo_stage.types import TrainingProgress

    arguments, prepared = checked.arguments, checked.preparation
    groups = _grouped(checked.values, written)
    with contextlib.closing(prepared.rewards):
        tokenizer, prompts = prepared.inputs.tokenizer, prepared.inputs.prompts.train
        constant = None
        if REWARD_MODEL not in prepared.rewards.names:
            prepared.rewards.progress = TrainingProgress(max_steps=max(1, arguments.training.max_steps))
            constant = best_constant_answer(prepared.rewards, prompts, tokenizer)
    arithmetic = arithmetic_of(arguments, prompts)
    return CheckResult(
        prompts=[_shown(prompt, tokenizer) for prompt in prompts[:num_rows]],
        arithmetic=arithmetic,
        in_words=arithmetic.sentences(arguments.finetuning.num_generations, arguments.generating.max_new_tokens),
        written=groups[0],
        defaults=groups[1],
        constant_answer=constant,
        findings=[constant.warning] if constant and constant.warning else [],
        warnings=list(warnings),
    )


def arithmetic_of(arguments: "RunArguments", prompts: "Sequence[Prompt]") -> Arithmetic:
    from grpo_stage.rollout.epochs import prompts_of_step, steps_of_epoch, steps_of_run

    training, finetuning = arguments.training, arguments.finetuning
    per_step = prompts_of_step(training)
    steps_per_epoch = steps_of_epoch(len(prompts), per_step, finetuning.num_iterations)
    num_steps = steps_of_run(training, steps_per_epoch)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    return Arithmetic(
        num_devices=training.world_size,
        prompts_per_step=per_step,
        completions_per_step=per_step * finetuning.num_generations,
        prompts_per_rollout=per_step * finetuning.steps_per_generation,
        uses_of_rollout=finetuning.steps_per_generation * finetuning.num_iterations,
        sampled_tokens_per_step=per_step * finetuning.num_generations * arguments.generating.max_new_tokens,
        num_prompts=len(prompts),
        mean_prompt_tokens=sum(lengths) / len(lengths),
        max_prompt_tokens=max(lengths),
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        num_epochs=num_steps / steps_per_epoch,
        is_upper_bound=finetuning.dynamic_sampling,
    )


def _grouped(values: Mapping[str, Any], written: Any) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The keys that are written, and those that matter and have a value by default, by group; secrets masked."""
    from grpo_stage.host.coercion import as_plain
    from grpo_stage.records.redaction import mask

    by_group = {group: keys.split() for group, keys in KEYS_THAT_MATTER.items()}
    known = {key for keys in by_group.values() for key in keys}
    by_group["others"] = [key for key in written if key not in known]
    said: dict[str, dict[str, Any]] = {}
    left: dict[str, dict[str, Any]] = {}
    for group, keys in by_group.items():
        for key in keys:
            if key in written and key in values:
                said.setdefault(group, {})[key] = as_plain(values[key])
            elif values.get(key) is not None:
                left.setdefault(group, {})[key] = as_plain(values[key])
    return mask(said), mask(left)


def _shown(prompt: "Prompt", tokenizer: "PreTrainedTokenizerBase") -> ShownPrompt:
    text = tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
    return ShownPrompt(text=str(text), token_ids=prompt.token_ids, reference=prompt.reference)


@contextlib.contextmanager
def _warnings_kept() -> Iterator[list[str]]:
    """A block in which this package's own warnings are collected as well as shown."""
    kept: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.startswith("llamafactory.grpo_stage"):
                kept.append(record.getMessage())

    keeper, logger = Keeper(logging.WARNING), logging.getLogger("llamafactory")
    logger.addHandler(keeper)
    try:
        yield kept
    finally:
        logger.removeHandler(keeper)


def _devices(count: int) -> str:
    return "one device" if count == 1 else f"{count} devices"


def _print(recipe: str, result: CheckResult) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(f"{recipe}: a run would start."))
    for sentence in result.in_words:
        console.print(Text(f"  {sentence}"))
    for number, prompt in enumerate(result.prompts, start=1):
        console.print(Text(f"\nPrompt {number}, {len(prompt.token_ids)} tokens, as the model reads it:", style="bold"))
        console.print(Text(prompt.text))
        console.print(Text(f"Its tokens: {' '.join(map(str, prompt.token_ids))}"))
        console.print(Text(f"Its reference: {prompt.reference!r}"))
    table = Table("", "written in the recipe", "left at its default", show_lines=True)
    for group in (*KEYS_THAT_MATTER, "others"):
        cells = [_lines(keys.get(group, {})) for keys in (result.written, result.defaults)]
        if any(cells):
            table.add_row(group, *(Text(cell) for cell in cells))
    console.print(table)
    if result.constant_answer is not None:
        console.print(Text(result.constant_answer.sentence))
    for finding in result.findings:
        console.print(Text(f"Found: {finding}"))
    for warning in result.warnings:
        console.print(Text(f"Warning: {warning}"))


def _lines(keys: Mapping[str, Any]) -> str:
    from grpo_stage.algorithm.conditions import as_yaml

    return "\n".join(f"{key}: {as_yaml(value)}" for key, value in keys.items())
