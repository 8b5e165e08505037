"""`grpo-stage configuration-docs`: docs/configuration.md from the arguments' own help texts."""

import argparse
import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

from grpo_stage.algorithm.combinations import ONLY_WITH
from grpo_stage.algorithm.conditions import shown_condition
from grpo_stage.arguments import GRPOArguments
from grpo_stage.records.definitions import with_tables


NAME = "configuration-docs"
HELP = "print the page on every key of `stage: grpo`, as docs/configuration.md holds it"

_INTRODUCTION = """\
# Configuration

Made from the help texts in `grpo_stage/arguments.py` by `grpo-stage configuration-docs`; do not edit.

These keys exist for `stage: grpo` alone. All others are LLaMA-Factory's, under their own names: `cutoff_len` is the
room for the prompt, `max_new_tokens` the room for a completion; `temperature`, `top_p`, `top_k` and
`repetition_penalty` control sampling and are neutral (1.0, 1.0, 0, 1.0) unless you write them; `vllm_maxlen` (by
default `cutoff_len` + `max_new_tokens`), `vllm_gpu_util` (0.3), `vllm_enforce_eager`, `vllm_max_lora_rank` (from
`lora_rank`) and `vllm_config` configure the engine; `ref_model`, `ref_model_adapters` and
`ref_model_quantization_bit` name another reference; `per_device_train_batch_size` and `gradient_accumulation_steps`
count prompts; `moe_aux_loss_coef` weighs the loss that keeps the load of a mixture's experts even (TRL's
`router_aux_loss_coef`; off by default); without `disable_gradient_checkpointing`, checkpointing is off where memory
allows it; `disable_shuffling`, `plot_loss`, `val_size` and `eval_dataset` are as everywhere. `logging_steps` is 1
unless you write it. A host key that would have no effect in this stage is refused with the reason.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="write to this file instead")
    parser.add_argument("--metrics", type=Path, help="also write the tables of docs/metrics.md, this file, anew")


def run(arguments: argparse.Namespace) -> None:
    if arguments.output is None:
        print(configuration_page(), end="")
    else:
        arguments.output.write_text(configuration_page(), encoding="utf-8")
    if arguments.metrics is not None:
        page = arguments.metrics.read_text(encoding="utf-8")
        arguments.metrics.write_text(with_tables(page), encoding="utf-8")


def configuration_page() -> str:
    """The page as Markdown: a section for each group, in the order of the arguments."""
    hints = typing.get_type_hints(GRPOArguments)
    groups: dict[str, list[str]] = {}
    for spec in dataclasses.fields(GRPOArguments):
        entry = f"### `{spec.name}`\n\n{_kind(spec, hints[spec.name])}\n\n{spec.metadata['help']}\n"
        groups.setdefault(spec.metadata["group"], []).append(entry)
    sections = [f"## {group}\n\n" + "\n".join(entries) for group, entries in groups.items()]
    return "\n".join([_INTRODUCTION, *sections])


def _kind(spec: "dataclasses.Field[Any]", hint: Any) -> str:
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        kind = "One of " + ", ".join(f"`{option}`" for option in options)
    else:
        names = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "mapping"}
        kind = " or ".join(names[option] for option in options or [hint]).capitalize()
    bounds = [
        f"{words} {spec.metadata[bound]:g}"
        for bound, words in (("min", "at least"), ("max", "at most"), ("above", "above"))
        if bound in spec.metadata
    ]
    default = "none" if spec.default is None else f"`{json.dumps(spec.default)}`".replace('"', "")
    conditions = [f"`{key}: {shown_condition(allowed)}`" for key, allowed in ONLY_WITH.get(spec.name, {}).items()]
    only = f" Only with {' and '.join(conditions)}." if conditions else ""
    return f"{', '.join([kind, *bounds])}. Default: {default}.{only}"
