"""Try a recipe's rewards on its own dataset before a run: do they tell right from wrong, and do they pay attacks?

Scores completions that are made from the reference answers, or sampled from the model: right, wrong and broken ones,
and attacks, which a policy can write without solving the task. Needs no GPU, and without `--completions model` no
model either. Nothing is written but the file of `--json`.

Exit codes: 0, nothing is wrong; 3, something was found, such as an attack that is paid; 1, the recipe is refused or a
function failed.

    grpo-stage try-rewards yaml_examples/quickstart.yaml --rows 4
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
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
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

    from grpo_stage.host.run_arguments import RunArguments
    from grpo_stage.rewards.attacks import Task
    from grpo_stage.rewards.constant_answer import ConstantAnswer
    from grpo_stage.rewards.paid_attacks import AttackScore
    from grpo_stage.rewards.trial import TrialRow
    from grpo_stage.types import Completion, Prompt


NAME = "try-rewards"
HELP = "score right, wrong and sampled completions and attacks with a recipe's rewards, before a run"

SHOWN_CHARACTERS = 80
ROWS_READ = 1000
"""Rows of each dataset that are read, for the best constant answer and for the answers that attacks are made of."""
# The parser reads the model's config. A config of this type has no limit of positions and no quantization.
_STAND_IN_CONFIG = {"model_type": "t5"}
_IN_BYTES = (
    "No model is chosen, so that lengths are counted in bytes: `num_tokens`, and what `length`, `overlong` and "
    "`repetition` see, are not what they will be in a run. Name `model_name_or_path` to count its tokens."
)
_WITHOUT_REWARD_MODEL = (
    "The reward model is left out: one is asked here only if it is behind a server (`reward_model_type: api`) and "
    "`model_name_or_path` is named, whose tokens and template it reads. The total is that of the other functions."
)

_WITHOUT_TURNS = (
    "`environment` is not tried: it pays for what the model does with its tools, and a trial has no turns. Try it by "
    "`grpo-stage probe`."
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """The content of the `--json` file."""

    functions: Sequence[str]
    weights: Sequence[float]
    findings: Sequence[str]
    """What needs a person before a run; the exit code is `ATTENTION` with any."""
    notes: Sequence[str]
    attacks: "Sequence[AttackScore]"
    """The right and a wrong answer come first."""
    constant_answer: "ConstantAnswer | None"
    rows: "Sequence[TrialRow]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--rows", type=int, default=4, metavar="N", help="rows of the dataset (default: 4)")
    parser.add_argument(
        "--completions",
        choices=("reference", "model"),
        default="reference",
        help="made from the reference answers (default), or also sampled from the model, `num_generations` a row",
    )


def run(args: argparse.Namespace) -> int:
    if args.rows < 1:
        raise ValueError(f"`--rows {args.rows}` must be at least 1.")
    # Ctrl-C as an exception could be handled by a reward function.
    with quiet_host(), ending_at_once():
        configuration = read_recipe(args.config, args.overrides)
        with errors_explained(configuration):
            result = try_recipe(configuration, args.rows, samples=args.completions == "model")
    write_json(args.json, dataclasses.asdict(result))
    if str(args.json) != "-":
        show(result)
    return ATTENTION if result.findings else 0


def try_recipe(configuration: Mapping[str, Any], num_rows: int, samples: bool) -> TrialResult:
    """Score completions for a recipe's first rows.

    Args:
        configuration: the recipe.
        num_rows: of each dataset.
        samples: whether the model is loaded and sampled from as well.

    Raises:
        ValueError: if the recipe is refused.
        RewardError: if a function fails.
    """
    from grpo_stage.rewards.constant_answer import best_constant_answer
    from grpo_stage.rewards.loading import load_rewards
    from grpo_stage.rewards.options import ENVIRONMENT, REWARD_MODEL
    from grpo_stage.rewards.paid_attacks import attack_findings, attack_scores
    from grpo_stage.rewards.trial import SAMPLED, completions_for, findings_in, remarks_on, try_rewards
    from grpo_stage.types import TrainingProgress

    has_model = bool(configuration.get("model_name_or_path"))
    if samples and not has_model:
        raise ValueError("`--completions model` samples from `model_name_or_path`, which is missing. Name a model.")
    arguments = _parse(configuration, has_model, on_device=samples)
    names, weights, is_without_model = _functions(arguments, has_model)
    rewards = load_rewards(
        names,
        weights,
        cast(dict[str, Any] | None, arguments.finetuning.reward_kwargs),
        max_new_tokens=arguments.generating.max_new_tokens,
        timeout_s=arguments.finetuning.reward_timeout,
        fields=tuple(arguments.finetuning.reward_columns or ()),
        code_sandbox=arguments.finetuning.code_sandbox,
        announce=print,  # on stderr, as `run` has it
    )
    rewards.progress = TrainingProgress(max_steps=max(1, arguments.training.max_steps))
    with contextlib.closing(rewards):
        tokenizer, processor, template = _load_tokenizer(arguments, has_model)
        first, all_prompts = (
            _load_prompts(arguments, count, tokenizer, processor, template) for count in (num_rows, ROWS_READ)
        )
        rewards.check(all_prompts)
        num_rows = min(num_rows, len(first))
        prompts = [first[i * len(first) // num_rows] for i in range(num_rows)]  # of every dataset some
        asks_model = REWARD_MODEL in rewards.names
        if asks_model:
            from grpo_stage.host.reward_models import server_reward

            rewards.model = server_reward(arguments, template, tokenizer)
        tasks = _tasks(arguments, tokenizer, prompts, all_prompts)
        completions = [list(completions_for(task, tokenizer).items()) for task in tasks]
        if samples:
            for of_prompt, sampled in zip(
                completions, _sample(arguments, tokenizer, processor, template, prompts), strict=True
            ):
                of_prompt += [(SAMPLED, completion) for completion in sampled]
        rows = try_rewards(rewards, prompts, completions)
        # A server would be asked about a thousand completions.
        constant = None if asks_model else best_constant_answer(rewards, all_prompts, tokenizer)
    judged = [name for name in rewards.names if name != ENVIRONMENT]
    attacks = attack_scores(rows, dict(zip(rewards.names, rewards.weights, strict=True)))
    return TrialResult(
        functions=rewards.names,
        weights=rewards.weights,
        findings=[
            *(findings_in(rows, judged) if judged else []),
            *attack_findings(attacks),
            *([constant.warning] if constant and constant.warning else []),
        ],
        notes=[
            *remarks_on(rows),
            *([_WITHOUT_TURNS] if ENVIRONMENT in rewards.names else []),
            *([_WITHOUT_REWARD_MODEL] if is_without_model else []),
            *([] if has_model else [_IN_BYTES]),
        ],
        attacks=attacks,
        constant_answer=constant,
        rows=rows,
    )


def _tasks(
    arguments: "RunArguments",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: "Sequence[Prompt]",
    all_prompts: "Sequence[Prompt]",
) -> "list[Task]":
    from grpo_stage.rewards.answers.final_answer import final_answer
    from grpo_stage.rewards.attacks import Task

    references = [prompt.reference for prompt in all_prompts if prompt.reference]
    answers = tuple(dict.fromkeys(final_answer(text, is_reference=True).text for text in references))
    kwargs = cast(dict[str, dict[str, Any]], arguments.finetuning.reward_kwargs or {})
    return [
        Task(
            prompt.text,
            prompt.reference,
            answers,
            think_prefilled=bool(kwargs.get("format", {}).get("think_prefilled"))
            or tokenizer.decode(prompt.token_ids[-8:]).rstrip().endswith("<think>"),
        )
        for prompt in prompts
    ]


def _functions(arguments: "RunArguments", has_model: bool) -> tuple[list[str], list[float] | None, bool]:
    """Names and weights of the functions that are tried, and whether the reward model is left out of them.

    Raises:
        ValueError: if no function is left whose weight is not 0.
    """
    from grpo_stage.rewards.options import REWARD_MODEL

    finetuning = arguments.finetuning
    names = [name.strip() for name in cast(list[str], finetuning.reward_funcs)]
    weights = cast(list[float] | None, finetuning.reward_weights)
    if REWARD_MODEL not in names or (finetuning.reward_model_type == "api" and has_model):
        return names, weights, False
    others = [i for i, name in enumerate(names) if name != REWARD_MODEL]
    if not any(weights is None or weights[i] for i in others):
        remedy = (
            "Name `model_name_or_path`, whose tokens and template a reward server is sent"
            if finetuning.reward_model_type == "api"
            else "Serve the model (`llamafactory-cli api` with `stage: rm`) and write `reward_model_type: api`"
        )
        raise ValueError(
            f"`reward_funcs: {', '.join(names)}` leaves nothing to try: of reward models, only one behind a server is "
            f"asked here, and no other function has a weight. {remedy}, or add functions."
        )
    return [names[i] for i in others], None if weights is None else [weights[i] for i in others], True


def _parse(configuration: Mapping[str, Any], has_model: bool, on_device: bool) -> "RunArguments":
    """The arguments, parsed as for a run, with harmless values for keys that only a run needs."""
    with tempfile.TemporaryDirectory(prefix="grpo-stage-try-") as folder:
        values = dict(configuration)
        if not has_model:
            Path(folder, "config.json").write_text(json.dumps(_STAND_IN_CONFIG), encoding="utf-8")
            values["model_name_or_path"] = folder
        arguments = parse_without_run(values, on_device=on_device)

    data = arguments.data
    data.preprocessing_num_workers = None
    data.val_size, data.eval_dataset = 0.0, None
    if not has_model:
        # Rewards see no template. Many templates need the model's tokens or processor, and `cutoff_len` counts tokens.
        data.template, data.cutoff_len = "default", sys.maxsize
    return arguments


def _load_tokenizer(arguments: "RunArguments", has_model: bool) -> "tuple[PreTrainedTokenizerBase, Any, Any]":
    """The tokenizer, the processor and the template."""
    from transformers import ByT5Tokenizer

    from grpo_stage.host import facade

    module = facade.load_tokenizer(arguments.model) if has_model else {"tokenizer": ByT5Tokenizer(), "processor": None}
    tokenizer = module["tokenizer"]
    return tokenizer, module["processor"], facade.get_template_and_fix_tokenizer(tokenizer, arguments.data)


def _load_prompts(
    arguments: "RunArguments", num_rows: int, tokenizer: "PreTrainedTokenizerBase", processor: Any, template: Any
) -> "list[Prompt]":
    """The prompts of the first rows of each of the recipe's datasets."""
    from grpo_stage.host.datasets import load_prompts

    data = copy.copy(arguments.data)
    data.max_samples = min(num_rows, data.max_samples or num_rows)
    return load_prompts(
        template, tokenizer, processor, arguments.model, data, arguments.training, arguments.finetuning
    ).train


def _sample(
    arguments: "RunArguments",
    tokenizer: "PreTrainedTokenizerBase",
    processor: Any,
    template: Any,
    prompts: "Sequence[Prompt]",
) -> "list[tuple[Completion, ...]]":
    from grpo_stage.host import facade
    from grpo_stage.host.images import image_reader
    from grpo_stage.host.model_checks import refuse_unknown_tokens
    from grpo_stage.host.precision import autocast_dtype
    from grpo_stage.host.sampling import sampling_settings
    from grpo_stage.rollout.engines.hf import HFEngine

    for key in ("tools", "environment"):
        if getattr(arguments.finetuning, key):
            raise ValueError(
                f"`--completions model` is not possible with `{key}`: this command samples one turn, without tools, "
                "and the rewards would judge other completions than a run's. Use `grpo-stage probe`, which samples as "
                "a run does."
            )
    refuse_unknown_tokens(arguments, tokenizer, prompts)
    images = image_reader(arguments, template, tokenizer, processor, prompts)
    model = facade.load_model(tokenizer, arguments.model, arguments.finetuning, arguments.training.do_train)
    engine = HFEngine(tokenizer, autocast_dtype=autocast_dtype(arguments), images=images)
    with contextlib.closing(engine):
        engine.sync(model, version=0)
        groups = engine.generate(prompts, sampling_settings(arguments, model, template, tokenizer, images), step=0)
    return [group.completions for group in groups]


def show(result: TrialResult) -> None:
    """Print the result."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(_table_of_rows(result))
    if result.attacks:
        console.print(_table_of_attacks(result))
    if result.constant_answer is not None:
        console.print(Text(result.constant_answer.sentence))
    for finding in result.findings:
        console.print(Text(f"Found: {finding}"))
    for note in result.notes:
        console.print(Text(f"Note: {note}"))


def _table_of_rows(result: TrialResult) -> "Table":
    """What is made of each reference and what was sampled: attacks have a table of their own."""
    from rich.table import Column, Table
    from rich.text import Text

    from grpo_stage.rewards.trial import SHOWN_KINDS

    table = Table("prompt", Column("kind", no_wrap=True), "completion")
    _add_columns(table, result)
    last_index = None
    for row in result.rows:
        is_first = row.prompt_index != last_index
        if is_first:
            table.add_section()
        last_index = row.prompt_index
        if row.kind in SHOWN_KINDS or not row.reference:
            table.add_row(
                Text(_shortened(row.prompt) if is_first else ""),  # Text: brackets are no markup
                row.kind,
                Text(_shortened(row.completion)),
                *(_number(value) for value in row.rewards.values()),
                _number(row.reward),
            )
    return table


def _table_of_attacks(result: TrialResult) -> "Table":
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(Column("attack", no_wrap=True), "completion (the first prompt's)")
    _add_columns(table, result)
    table.add_column("paid by")
    for score in result.attacks:
        table.add_row(
            score.kind,
            Text(_shortened(score.completion)),
            *(_number(value) for value in score.rewards.values()),
            _number(score.reward),
            ", ".join(score.paid_by),
        )
    return table


def _add_columns(table: "Table", result: TrialResult) -> None:
    from rich.text import Text

    for name, weight in zip(result.functions, result.weights, strict=True):
        table.add_column(Text(f"{name}\nx {weight:g}"), justify="right")
    table.add_column("total", justify="right")


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{round(value, 2) + 0.0:.2f}"  # no -0.00
