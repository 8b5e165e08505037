"""The host's dataset loader, extended to give prompts with whole references and every column of the row.

`get_dataset(stage="ppo")` loads, mixes, samples and splits. While it runs, three of its functions are replaced: the
converter, which alone sees the raw row; the processor, which encodes; and the split. Between them, and in the result,
a row is one JSON string, so that datasets with different columns can be mixed.
"""

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from datasets.exceptions import DatasetsError
from llamafactory.data import converter, loader
from llamafactory.data.parser import DatasetAttr

from grpo_stage.host.dataset_files import check_files, defect_of
from grpo_stage.host.dataset_rows import ROW, PromptConverter, PromptProcessor, names
from grpo_stage.host.generated_datasets import generated, is_generated
from grpo_stage.host.image_files import refuse_changed
from grpo_stage.host.log import get_logger
from grpo_stage.rollout.prompts import PromptSet, build_prompts
from grpo_stage.types import Prompt


if TYPE_CHECKING:
    from llamafactory.data.template import Template
    from llamafactory.hparams import DataArguments, ModelArguments
    from transformers import PreTrainedTokenizer, ProcessorMixin, Seq2SeqTrainingArguments

    from grpo_stage.arguments import GRPOArguments
    from grpo_stage.host.tool_use import ToolUse


logger = get_logger(__name__)


@dataclass(frozen=True)
class PromptData:
    """The prompts of a run."""

    train: list[Prompt]
    evaluation: list[Prompt]
    """Empty if the run has neither `val_size` nor `eval_dataset`."""


def load_prompts(
    template: "Template",
    tokenizer: "PreTrainedTokenizer",
    processor: "ProcessorMixin | None",
    model_args: "ModelArguments",
    data_args: "DataArguments",
    training_args: "Seq2SeqTrainingArguments",
    finetuning_args: "GRPOArguments",
    tool_use: "ToolUse | None" = None,
) -> PromptData:
    """Load the run's datasets as the host does, and encode their prompts with its template.

    With tools, prompts tell of them; with an environment, each ends with what `reset` says of its row.

    Raises:
        ValueError: if there is no dataset, a row cannot be a prompt, or no row is left.
    """
    if data_args.dataset is None:
        raise ValueError("No prompts to train on: name a dataset of dataset_info.json in `dataset`.")
    check_files(_named(data_args), data_args.dataset_dir)
    data_args = copy.copy(data_args)
    data_args.eval_on_each_dataset = True  # otherwise the host merges them, and a prompt's dataset is unknown
    reward_columns = cast(dict[str, str], finetuning_args.reward_columns or {})
    tools = "" if tool_use is None else tool_use.text
    dataset_kwargs = cast(dict[str, Any], finetuning_args.dataset_kwargs or {})
    with (
        _prompt_pipeline(finetuning_args.reference_column, reward_columns, tools),
        generated(
            data_args, dataset_kwargs, training_args.seed, finetuning_args.curriculum_threshold > 0
        ) as data_args,
    ):
        try:
            datasets = loader.get_dataset(
                template, model_args, data_args, training_args, stage="ppo", tokenizer=tokenizer, processor=processor
            )
        except StopIteration as error:
            raise ValueError(
                _defect(data_args)
                or "The dataset that was loaded last has no rows: look at its file, and at `max_samples`."
            ) from error
        except (DatasetsError, UnicodeDecodeError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise ValueError(
                _defect(data_args)
                or f"`dataset: {','.join(data_args.dataset)}` cannot be loaded: {reason}. Mend the file, or leave out "
                "the dataset that it belongs to."
            ) from error

    held_out = datasets.get("eval_dataset") or {}
    if not isinstance(held_out, dict):  # the prompts that `val_size` splits off
        held_out = {None: held_out}
    cutoff_len, overlong = data_args.cutoff_len, finetuning_args.overlong_prompts
    records: Callable[[Any], Iterable[str]] = list
    if tool_use is not None and tool_use.settings.has_environment:
        encoder = PromptProcessor(template, tokenizer, processor, data_args, None, {}, tools)
        records = partial(_with_first_texts, encoder=encoder, tool_use=tool_use)
    train = build_prompts(records(datasets["train_dataset"][ROW]), cutoff_len, overlong)
    _report_rows(train, "training", cutoff_len, overlong)
    evaluation: list[Prompt] = []
    for name, dataset in held_out.items():
        rows = records(dataset[ROW])
        prompt_set = build_prompts(rows, cutoff_len, overlong, dataset=name, first_index=len(evaluation))
        _report_rows(prompt_set, f"evaluation ({name})" if name else "evaluation", cutoff_len, overlong)
        evaluation += prompt_set.prompts
    _check_reward_columns(reward_columns, [*train.prompts, *evaluation])
    refuse_changed([*train.prompts, *evaluation])
    return PromptData(train=train.prompts, evaluation=evaluation)


def _with_first_texts(records: Iterable[str], encoder: "PromptProcessor", tool_use: "ToolUse") -> list[str]:
    """The records with the text that `reset` of the environment has for each row at the end of its prompt."""
    rows = [json.loads(record) for record in records]
    texts = tool_use.first_texts([row["columns"] for row in rows if row is not None])
    for row in rows:
        if row is not None and (text := next(texts)):
            *before, last = row["messages"]
            row["messages"] = [*before, {**last, "content": last["content"] + text}]
            row["token_ids"] = encoder.encode_messages(row["messages"])
    return [json.dumps(row, ensure_ascii=False) for row in rows]


def _defect(data_args: "DataArguments") -> str | None:
    """The first defect in the files of the run's datasets; None if there is none."""
    defects = (defect_of(key, name, data_args.dataset_dir) for key, name in _named(data_args))
    return next(filter(None, defects), None)


def _named(data_args: "DataArguments") -> list[tuple[str, str]]:
    """The datasets that have files of their own, with their keys."""
    named = [(key, name) for key in ("dataset", "eval_dataset") for name in getattr(data_args, key) or ()]
    return [(key, name) for key, name in named if not is_generated(name)]


def _check_split(dataset: Any, val_size: float) -> None:
    """Refuse a split that leaves no rows: the error of `datasets` names no key."""
    num_rows = len(dataset)
    num_held_out = int(val_size) if val_size >= 1 else math.ceil(val_size * num_rows)
    if num_held_out >= num_rows:
        raise ValueError(
            f"`val_size: {val_size}` holds out {num_held_out} rows, and `dataset` has {num_rows}: none would be left "
            f"to train on. Write a lower number, a share such as `val_size: 0.1`, or name rows of their own in "
            "`eval_dataset`."
        )


@contextmanager
def _prompt_pipeline(
    reference_column: str | None, reward_columns: Mapping[str, str], tools: str = ""
) -> Iterator[None]:
    """Let the host's loader use our converter and processor."""
    host_get_converter, host_get_processor = converter.get_dataset_converter, loader._get_dataset_processor
    host_split = loader.split_dataset

    def get_converter(name: str, dataset_attr: DatasetAttr, data_args: "DataArguments") -> PromptConverter:
        return PromptConverter(host_get_converter(name, dataset_attr, data_args))

    def get_processor(
        data_args: "DataArguments",
        stage: str,
        template: "Template",
        tokenizer: "PreTrainedTokenizer",
        processor: "ProcessorMixin | None",
        do_generate: bool = False,
    ) -> PromptProcessor:
        columns = dict(reward_columns)
        return PromptProcessor(template, tokenizer, processor, data_args, reference_column, columns, tools)

    def split(dataset: Any, eval_dataset: Any, data_args: "DataArguments", seed: int) -> Any:
        if dataset is not None and data_args.val_size > 1e-6:  # as the host does
            _check_split(dataset, data_args.val_size)
        return host_split(dataset, eval_dataset, data_args, seed)

    converter.get_dataset_converter, loader._get_dataset_processor = get_converter, get_processor
    loader.split_dataset = split
    try:
        yield
    finally:
        converter.get_dataset_converter, loader._get_dataset_processor = host_get_converter, host_get_processor
        loader.split_dataset = host_split


def _check_reward_columns(reward_columns: Mapping[str, str], prompts: list[Prompt]) -> None:
    for name, path in reward_columns.items():
        if not any(name in prompt.columns for prompt in prompts):
            raise ValueError(
                f"`reward_columns` has `{name}: {path}`, and no dataset of the run has the column "
                f"`{path.partition('.')[0]}`: the first row has {names(dict(prompts[0].columns))}. Name one of those."
            )


def _report_rows(prompt_set: PromptSet, split: str, cutoff_len: int, overlong_prompts: str) -> None:
    """Log how many rows gave no prompt or a shortened one, and refuse to go on without prompts."""
    num_rows, num_overlong, num_unreadable = prompt_set.num_rows, prompt_set.num_overlong, prompt_set.num_unreadable
    longer = f"{num_overlong} of {num_rows} {split} prompts: longer than `cutoff_len` ({cutoff_len} tokens)"
    broken = f"{num_unreadable} of {num_rows} {split} rows: turns that do not alternate, the user's first"
    remedy = "Raise `cutoff_len`, or keep the end of such prompts with `overlong_prompts: truncate`."
    of_images = (
        f"{prompt_set.num_overlong_images} of {num_rows} {split} prompts with images: longer than `cutoff_len` "
        f"({cutoff_len} tokens, those of the images included)"
    )
    remedy_of_images = "Raise `cutoff_len`, or lower `image_max_pixels`; no part of an image is cut off."
    if not prompt_set.prompts:
        both = f"dropped {of_images}. {remedy_of_images} " if prompt_set.num_overlong_images else ""
        raise ValueError(f"No {split} prompt is left. Dropped {longer}; {both}dropped {broken}. {remedy}")
    if prompt_set.num_overlong_images:
        logger.warning_rank0(f"Dropped {of_images}. {remedy_of_images}")
    if num_overlong and overlong_prompts == "drop":
        logger.warning_rank0(f"Dropped {longer}. {remedy}")
    elif num_overlong:
        logger.warning_rank0(f"Cut the beginning of {longer}. Raise `cutoff_len` to keep them whole.")
    if num_unreadable:
        logger.warning_rank0(f"Dropped {broken}.")
