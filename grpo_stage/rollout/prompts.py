"""Dataset rows as prompts."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from grpo_stage.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The prompts of one dataset, and the number of rows that gave none or a shortened one."""

    prompts: list[Prompt]
    num_rows: int
    num_unreadable: int
    """Rows whose turns do not alternate."""
    num_overlong: int
    """Prompts of more than `max_length` tokens: dropped or cut."""


def build_prompts(
    records: Iterable[str],
    max_length: int,
    overlong: Literal["drop", "truncate"],
    dataset: str | None = None,
    first_index: int = 0,
) -> PromptSet:
    """Turn records, one JSON string a row, into prompts.

    Args:
        records: `{"token_ids", "messages", "reference", "columns"}` of each row, or `null` if it is unreadable.
        max_length: the most tokens that a prompt may have.
        overlong: `drop` leaves a longer prompt out, `truncate` keeps its last `max_length` tokens.
        dataset: the name of the evaluation dataset that the records come from.
        first_index: the index of the first prompt: indices of several evaluation datasets must differ.
    """
    prompts: list[Prompt] = []
    num_rows = num_unreadable = num_overlong = 0
    # Most ids recur thousands of times: one object for each keeps a large dataset at 8 bytes a token instead of 36.
    shared_ids: dict[int, int] = {}
    for record in records:
        num_rows += 1
        row: dict[str, Any] | None = json.loads(record)
        if row is None:
            num_unreadable += 1
            continue
        token_ids = row["token_ids"]
        if len(token_ids) > max_length:
            num_overlong += 1
            if overlong == "drop":
                continue
        prompts.append(
            Prompt(
                index=first_index + len(prompts),
                token_ids=tuple(shared_ids.setdefault(token, token) for token in token_ids[-max_length:]),
                messages=tuple(row["messages"]),
                reference=row["reference"],
                columns=row["columns"],
                dataset=dataset,
            )
        )
    return PromptSet(prompts=prompts, num_rows=num_rows, num_unreadable=num_unreadable, num_overlong=num_overlong)
