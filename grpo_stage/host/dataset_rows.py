"""A row of the host's datasets as a prompt: what is read of the raw row, and how the host's template encodes it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from decimal import Decimal
from itertools import islice
from typing import TYPE_CHECKING, Any

from llamafactory.data.converter import DatasetConverter
from llamafactory.data.data_utils import Role
from llamafactory.data.parser import DatasetAttr
from llamafactory.data.processor.processor_utils import DatasetProcessor
from llamafactory.extras.constants import IMAGE_PLACEHOLDER

from grpo_stage import __version__
from grpo_stage.host.image_files import as_json, read
from grpo_stage.host.log import get_logger


if TYPE_CHECKING:
    pass


logger = get_logger(__name__)

ROW = "_grpo_row"
"""The one column of a converted and of a processed dataset."""
MEDIA_FIELDS = ("images", "videos", "audios")
REFUSED_MEDIA = ("videos", "audios")
SHOWN_FIELDS = 6
"""How many fields a message names of a value that is no reference."""
COLUMN_FIELDS = {
    "alpaca": ("prompt", "query", "response", "history"),
    "sharegpt": ("messages",),
    "openai": ("messages",),
}
"""The fields of `DatasetAttr` that name a column, beside those that all formats share."""


@dataclass
class PromptConverter:
    """A converter of the host that keeps the raw row, and accepts rows with a prompt and no answer.

    Dates and decimals of the raw row become strings; what JSON cannot hold (bytes, decoded media) becomes None.
    """

    host: DatasetConverter
    version: str = field(default=__version__)
    """Part of the key in the cache of `datasets`, which depends on a callable's attributes but not on its code."""

    def __call__(self, example: dict[str, Any]) -> dict[str, str]:
        row = dict(example)
        self._check_columns(row)
        aligned = self.host(self._with_answer(row))
        try:
            images = [as_json(image) for image in aligned["_images"] or ()]
        except ValueError as error:
            raise ValueError(f"A row of dataset {self.host.dataset_attr}: {error}. The row: {excerpt(row)}") from error
        return {
            ROW: _to_json(
                {
                    "prompt": aligned["_prompt"],
                    "response": aligned["_response"] or self._structured_answer(row),
                    "system": aligned["_system"] or "",
                    "tools": _as_text(aligned["_tools"]) or "",
                    "images": images,
                    "columns": row,
                }
            )
        }

    def _check_columns(self, row: dict[str, Any]) -> None:
        attr = self.host.dataset_attr
        fields = (*COLUMN_FIELDS.get(attr.formatting, ()), "system", "tools", *MEDIA_FIELDS)
        named = {name: getattr(attr, name) for name in fields if getattr(attr, name) is not None}
        for name, column in named.items():
            # Alpaca's `input` and `output` are default columns: a row with a prompt alone has neither.
            if column not in row and not (name in ("query", "response") and column == getattr(DatasetAttr, name)):
                raise ValueError(
                    f"Dataset {attr} has no column `{column}` (its {name}): it has {names(row)}. "
                    f"Name the right one as `{name}` under `columns` in dataset_info.json."
                )
        for name in REFUSED_MEDIA:
            if name in named and row[named[name]]:
                raise ValueError(
                    f"A row of dataset {attr} has {name}: prompts with {name} are not supported by `stage: grpo`, "
                    f"which knows text and images. Leave `{name}` out of its `columns` in dataset_info.json if the "
                    f"text alone makes sense, or remove such rows. The row: {excerpt(row)}"
                )

    def _with_answer(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row for the host's converter, with an empty answer if it has none."""
        attr = self.host.dataset_attr
        if attr.formatting == "alpaca":
            row = {attr.query: None, attr.response: None, **row}
            if not isinstance(row[attr.response], list | dict):
                row[attr.response] = _as_text(row[attr.response])  # the host ignores an answer that is a number
            for column in (attr.prompt, attr.query):
                if column is not None and not isinstance(row[column], str | None):
                    raise ValueError(
                        f"Column `{column}` of dataset {attr} must hold text, got {excerpt(row[column])}. "
                        "A conversation needs `formatting: sharegpt` or `openai` in dataset_info.json."
                    )
        elif attr.formatting in COLUMN_FIELDS:
            turns = row.get(attr.messages) or []
            if not turns:
                raise ValueError(f"A row of dataset {attr} has no messages in `{attr.messages}`: {excerpt(row)}")
            for tag in (attr.role_tag, attr.content_tag):
                if tag not in turns[-1]:
                    raise ValueError(
                        f"The messages of dataset {attr} have no key `{tag}` but {names(turns[-1])}. "
                        "Name the keys and roles under `tags` in dataset_info.json."
                    )
            if turns[-1][attr.role_tag] in (attr.user_tag, attr.observation_tag):
                answer = {attr.role_tag: attr.assistant_tag, attr.content_tag: ""}
                row = {**row, attr.messages: [*turns, answer]}
        return row

    def _structured_answer(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """An answer that is no text, which the host ignores; a later check shows whether it is needed."""
        attr = self.host.dataset_attr
        answer = row.get(attr.response) if attr.formatting == "alpaca" else None
        return [{"role": Role.ASSISTANT.value, "content": answer}] if isinstance(answer, list | dict) else []


@dataclass
class PromptProcessor(DatasetProcessor):
    """Encodes prompts as the host's unsupervised processor does, but uncut and with an empty answer.

    Under a reasoning template with thinking off, the host's prompt depends on whether the *answer* contains a thought.
    Sampling starts without an answer, so the prompt must not depend on it. The host's chat encodes in the same way.
    """

    reference_column: str | None
    reward_columns: dict[str, str]
    tools: str = ""
    """Of the run, as the host takes them: what every prompt tells of."""
    version: str = field(default=__version__)
    """As in `PromptConverter`."""

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {ROW: [json.dumps(self._record(json.loads(row)), ensure_ascii=False) for row in examples[ROW]]}

    def print_data_example(self, example: dict[str, Any]) -> None:
        record = json.loads(example[ROW])
        if record is None:
            print("(the first row was left out, see the warnings above)")
            return
        print(f"prompt_ids:\n{record['token_ids']}")
        print(f"prompt:\n{self.tokenizer.decode(record['token_ids'], skip_special_tokens=False)}")
        print(f"reference:\n{record['reference']}")

    def _record(self, row: dict[str, Any]) -> dict[str, Any] | None:
        prompt, system = row["prompt"], row["system"]
        if len(prompt) % 2 != 1:  # turns that do not alternate: the host has warned of them
            return None
        for message in prompt:
            if not isinstance(message["content"], str):
                raise ValueError(
                    f"A message's content must be text, got {excerpt(message['content'])} in the row "
                    f"{excerpt(row['columns'])}. Write `{IMAGE_PLACEHOLDER}` where an image belongs, and name the "
                    "images in a column of their own: `images` under `columns` in dataset_info.json."
                )
        if self.tools and row["tools"].strip() not in ("", "[]"):
            raise ValueError(
                "A row has tools of its own, and the run has `tools` or an `environment`: the model would be told of "
                "tools that nobody can call. Leave `tools` out of the `columns` of the dataset in dataset_info.json. "
                f"The row: {excerpt(row['columns'])}"
            )
        images = self._images(row)
        token_ids = self._encode(prompt, system, self.tools or row["tools"], [content for content, _ in images])
        if not token_ids or not prompt[-1]["content"].strip():
            raise ValueError(
                f"The prompt of this row is empty: {excerpt(row['columns'])}. Remove the row, or name the columns "
                "that hold the prompt under `columns` in dataset_info.json."
            )
        return {
            "token_ids": token_ids,
            "messages": [{"role": Role.SYSTEM.value, "content": system}, *prompt] if system else prompt,
            "reference": self._reference(row),
            "columns": row["columns"] | self._reward_columns(row["columns"]),
            **({"images": [image for _, image in images]} if images else {}),
        }

    def _images(self, row: dict[str, Any]) -> list[tuple[bytes, dict[str, Any]]]:
        """The contents of a row's images, and their records.

        Raises:
            ValueError: if they do not fit the model, the prompt or each other.
        """
        token = self.template.mm_plugin.image_token
        num_tags = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in row["prompt"])
        shown = f"The row: {excerpt(row['columns'])}"
        if num_tags != len(row["images"]) and (token is not None or row["images"]):
            raise ValueError(
                f"A prompt has {num_tags} times `{IMAGE_PLACEHOLDER}` and its row {len(row['images'])} images: each "
                f"image stands where one of them is. Mend the row, or name the column with the images: `images` under "
                f"`columns` in dataset_info.json. {shown}"
            )
        if not row["images"]:
            return []
        if token is None:
            raise ValueError(
                f"A row has images, and `template: {self.data_args.template}` knows none. Write the template of your "
                f"vision-language model (such as `qwen2_vl`), or leave `images` out of the `columns` of the dataset "
                f"in dataset_info.json if the text alone makes sense. {shown}"
            )
        if getattr(self.processor, "image_processor", None) is None:
            raise ValueError(
                "A row has images, and the model of `model_name_or_path` has no image processor (a "
                "preprocessor_config.json beside its weights): it reads text alone, or the file is missing. Name a "
                f"vision-language model, or bring the file. {shown}"
            )
        if self.tools or row["tools"].strip() not in ("", "[]"):
            raise ValueError(
                "A row has images, and its prompt tells of tools: both together are not possible in `stage: grpo`, "
                "since what a tool returns has no images and its turns were not verified with any. Leave `tools` and "
                f"`environment` out, or the images. {shown}"
            )
        try:
            return [read(image) for image in row["images"]]
        except ValueError as error:
            raise ValueError(f"An image of a row: {error}. Mend it, or remove the row. {shown}") from error

    def encode_messages(self, messages: list[dict[str, str]]) -> list[int]:
        """The prompt of a conversation whose first message may be the system's, with the tools of the run."""
        has_system = messages[0]["role"] == Role.SYSTEM.value
        system = messages[0]["content"] if has_system else ""
        return self._encode(messages[1:] if has_system else messages, system, self.tools)

    def _encode(
        self, prompt: list[dict[str, str]], system: str, tools: str, images: Sequence[bytes] = ()
    ) -> list[int]:
        plugin, pixels = self.template.mm_plugin, list(images)
        messages = [*prompt, {"role": Role.ASSISTANT.value, "content": ""}]
        messages = plugin.process_messages(messages, pixels, [], [], self.processor)
        token_ids, _ = self.template.encode_oneturn(self.tokenizer, messages, system, tools)
        token_ids, _ = plugin.process_token_ids(token_ids, None, pixels, [], [], self.tokenizer, self.processor)
        return token_ids

    def _reference(self, row: dict[str, Any]) -> str | None:
        """The row's answer as text; None if it is empty."""
        columns = row["columns"]
        if self.reference_column is None:
            # A rated (KTO) row whose answer is bad begins with an empty turn.
            answer = row["response"][0]["content"] if row["response"] else None
            if isinstance(answer, list | dict):
                raise ValueError(
                    f"The answer of this row is {_kind(answer)}, and a reference is text: {excerpt(answer)}. Name a "
                    f"field of it in `reference_column`: {_fields('answer', answer) or 'there is none in this row'}, "
                    f"where the column is called `answer`. The row: {excerpt(columns)}"
                )
            return _as_text(answer) or None
        try:
            value = _at(columns, self.reference_column)
        except LookupError as error:
            raise ValueError(
                f"`reference_column: {self.reference_column}` is no column of the dataset: {error.args[0]}. Every "
                "dataset of the run must have it."
            ) from error
        if isinstance(value, list | dict):
            raise ValueError(
                f"`reference_column: {self.reference_column}` holds {_kind(value)}, and a reference is text: "
                f"{excerpt(value)}. Name a field of it: "
                f"{_fields(self.reference_column, value) or 'there is none in this row'}. A function of your own can "
                "take the whole column, as an argument of its name."
            )
        return _as_text(value) or None

    def _reward_columns(self, columns: dict[str, Any]) -> dict[str, Any]:
        """The fields that `reward_columns` names, as columns, without those whose column this dataset lacks."""
        found = {}
        for name, path in self.reward_columns.items():
            if path not in columns and path.partition(".")[0] not in columns:
                continue
            try:
                found[name] = _at(columns, path)
            except LookupError as error:
                raise ValueError(
                    f"`reward_columns` has `{name}: {path}`, which is not there: {error.args[0]}."
                ) from error
        return found


def _at(columns: dict[str, Any], path: str) -> Any:
    """The value at a dotted path such as `reward_model.ground_truth` or `answers.0`; a column with that name wins.

    Raises:
        LookupError: naming the fields that exist.
    """
    if path in columns:
        return columns[path]
    value: Any = columns
    done: list[str] = []
    for key in path.split("."):
        place = f"`{'.'.join(done)}`" if done else "it"
        if value is None:
            return None
        if isinstance(value, list) and key.isdecimal():
            if int(key) >= len(value):
                return None
            value = value[int(key)]
        elif isinstance(value, dict):
            if key not in value:
                raise LookupError(f"{place} has {names(value) or 'no fields'}, and no `{key}`")
            value = value[key]
        else:
            raise LookupError(f"{place} holds {_kind(value)}, which has no field `{key}`: {excerpt(value)}")
        done.append(key)
    return value


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"a mapping with the fields {names(value)}" if value else "a mapping"
    return f"a list of {len(value)}" if isinstance(value, list) else f"{type(value).__name__}"


def _fields(path: str, value: Any) -> str:
    """The first paths below `path` that lead to a single value, for a message."""

    def walk(path: str, value: Any) -> Iterator[str]:
        if isinstance(value, list | dict):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(f"{path}.{key}", item)
        else:
            yield path

    return " or ".join(f"`reference_column: {leaf}`" for leaf in islice(walk(path, value), SHOWN_FIELDS))


def _as_text(value: Any) -> str | None:
    """A value of a dataset as text: lists and mappings (of tools) as JSON, numbers as Python writes them."""
    if value is None or isinstance(value, str):
        return value
    return _to_json(value) if isinstance(value, list | dict) else str(value)


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_json_default)


def _json_default(value: Any) -> str | None:
    return str(value) if isinstance(value, date | datetime | time | Decimal) else None


def names(mapping: dict[str, Any]) -> str:
    """For a message."""
    return ", ".join(f"`{name}`" for name in mapping)


def excerpt(value: Any) -> str:
    """A value, as far as a message has room for it."""
    text = _to_json(value)
    return text if len(text) <= 300 else f"{text[:300]}..."
