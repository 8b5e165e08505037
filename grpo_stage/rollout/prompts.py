"""Dataset rows as prompts."""

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from grpo_stage.types import Prompt, PromptImage


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The prompts of one dataset, and the number of rows that gave none or a shortened one."""

    prompts: list[Prompt]
    num_rows: int
    num_unreadable: int
    """Rows whose turns do not alternate."""
    num_overlong: int
    """Prompts of text that have more than `max_length` tokens: dropped or cut."""
    num_overlong_images: int = 0
    """Prompts with images that have more: dropped in any case."""


def build_prompts(
    records: Iterable[str],
    max_length: int,
    overlong: Literal["drop", "truncate"],
    dataset: str | None = None,
    first_index: int = 0,
) -> PromptSet:
    """Turn records, one JSON string a row, into prompts.

    Args:
        records: `{"token_ids", "messages", "reference", "columns"}` of each row, with `"images"` where it has some,
            or `null` if it is unreadable.
        max_length: the most tokens that a prompt may have, those of images included.
        overlong: `drop` leaves a longer prompt out, `truncate` keeps its last `max_length` tokens, unless it has
            images: a part of an image's tokens belongs to no image.
        dataset: the name of the evaluation dataset that the records come from.
        first_index: the index of the first prompt: indices of several evaluation datasets must differ.
    """
    prompts: list[Prompt] = []
    num_rows = num_unreadable = num_overlong = num_overlong_images = 0
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
            if "images" in row:
                num_overlong_images += 1
                continue
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
                images=tuple(map(_image, row.get("images", ()))),
            )
        )
    return PromptSet(
        prompts=prompts,
        num_rows=num_rows,
        num_unreadable=num_unreadable,
        num_overlong=num_overlong,
        num_overlong_images=num_overlong_images,
    )


def _image(record: dict[str, Any]) -> PromptImage:
    data = record["data"]
    return PromptImage(
        sha256=record["sha256"],
        num_bytes=record["num_bytes"],
        path=record["path"],
        data=None if data is None else base64.b64decode(data),
    )
