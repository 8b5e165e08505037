"""Tool calls and their results in the format of the host's templates."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamafactory.data.data_utils import Role
from transformers import PreTrainedTokenizerBase

from grpo_stage.rollout.engines.decoding import completion_text
from grpo_stage.rollout.episodes import ToolCall
from grpo_stage.types import FinishReason


_CONTENT = "{{content}}"
_PROBE_NAME, _PROBE_ARGUMENTS = "probe", {"number": 17}
_CUT = " [cut]"
"""Stands at the end of results that were cut."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A template's; see `rollout.episodes.TurnFormat`. Made by `tool_format`."""

    template: Any
    tokenizer: PreTrainedTokenizerBase
    between: tuple[int, ...]
    """What the template writes behind the token that ends a call, such as a line break."""
    opening: int | None
    """The token that ends a call and begins its results, in templates such as `glm4`; None in others."""

    def text(self, token_ids: Sequence[int], finish_reason: FinishReason) -> str:
        return completion_text(self.tokenizer, token_ids, finish_reason)

    @property
    def example(self) -> tuple[int, ...]:
        """The tokens that tell a result."""
        return self._results(-1, "17")

    def calls(self, token_ids: Sequence[int]) -> Sequence[ToolCall]:
        if self.opening is not None and token_ids[-1] != self.opening:
            return ()
        return _calls_in(self.template, self.text(token_ids, FinishReason.STOP))

    def results(self, last_token: int, results: Sequence[str], most_tokens: int) -> tuple[tuple[int, ...], str] | None:
        whole = self._joiner.join(results)
        text = whole
        while len(token_ids := self._results(last_token, text)) > most_tokens:
            if not text:
                return None
            kept = len(text.removesuffix(_CUT)) * most_tokens // len(token_ids)
            text = whole[: max(0, kept - 1)] + _CUT if kept > 1 else ""
        return token_ids, text

    def _results(self, last_token: int, text: str) -> tuple[int, ...]:
        _, (opened, _) = _conversation(self.template, self.tokenizer, text)
        if self.opening is not None:
            return tuple(opened[1:] if last_token == self.opening else opened)
        return (*self.between, *opened)

    @property
    def _joiner(self) -> str:
        """Between the results of several calls in one turn, as the host joins those of a dataset."""
        slots = [slot for slot in self.template.format_observation.slots if isinstance(slot, str)]
        is_tagged = any("<tool_response>\n" in slot for slot in slots)
        return "\n</tool_response>\n<tool_response>\n" if is_tagged else "\n"


def tool_format(template: Any, name: str, tokenizer: PreTrainedTokenizerBase) -> ToolFormat:
    """The format of a template, found out by encoding a call and its result as the host does.

    Args:
        template: the host's.
        name: of the template, for messages.
        tokenizer: with the template's stop words.

    Raises:
        ValueError: if the template has no tools, or a call in it has no end.
    """
    remedy = (
        "Write a `template` that has tools, such as `qwen3` or `llama3`, or `tool_format`, which gives this one the "
        "tools of another; or leave `tools` and `environment` out."
    )
    try:
        (_, call), (results, _) = _conversation(template, tokenizer, "17")
    except Exception as error:  # the host's formatters raise whatever they come to
        raise ValueError(f"`template: {name}` cannot write a tool call ({error}). {remedy}") from error
    ends = set(template.get_stop_token_ids(tokenizer)) - {tokenizer.unk_token_id}
    end = max((i for i, token in enumerate(call) if token in ends), default=None)
    opening = results[0] if end is None and results and results[0] in ends else None
    if end is None and opening is None:
        raise ValueError(
            f"`template: {name}` ends a tool call with no token that ends a turn: the model would write on, and no "
            f"tool would be called. {remedy}"
        )
    found = ToolFormat(template, tokenizer, () if end is None else tuple(call[end + 1 :]), opening)
    text = str(tokenizer.decode(call[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    calls = _calls_in(template, text)
    if [(each.name, json.loads(each.arguments)) for each in calls] != [(_PROBE_NAME, _PROBE_ARGUMENTS)]:
        raise ValueError(
            f"`template: {name}` does not read the tool calls that it writes: {text!r:.200} is none to it. {remedy}"
        )
    return found


def described(template: Any, name: str, tokenizer: PreTrainedTokenizerBase, schemas: Sequence[Mapping]) -> str:
    """The schemas as the host takes them.

    Raises:
        ValueError: if the template tells the model nothing of them.
    """
    tools = json.dumps(schemas, ensure_ascii=False)
    messages = [{"role": Role.USER.value, "content": ""}, {"role": Role.ASSISTANT.value, "content": ""}]
    prompt, _ = template.encode_oneturn(tokenizer, messages, "", tools)
    text = tokenizer.decode(prompt, skip_special_tokens=False)
    for schema in schemas:
        if schema["function"]["name"] not in text:
            raise ValueError(
                f"`template: {name}` does not tell the model of its tools: the name of "
                f"`{schema['function']['name']}` is not in the prompt. Write a `template` that has tools, such as "
                "`qwen3`."
            )
    return tools


def _conversation(
    template: Any, tokenizer: PreTrainedTokenizerBase, results: str
) -> list[tuple[list[int], list[int]]]:
    """The tokens of a conversation with a call: (question, call), (results, answer), as the host encodes it."""
    call = json.dumps({"name": _PROBE_NAME, "arguments": _PROBE_ARGUMENTS})
    messages = [
        {"role": Role.USER.value, "content": ""},
        {"role": Role.FUNCTION.value, "content": call},
        {"role": Role.OBSERVATION.value, "content": results},
        {"role": Role.ASSISTANT.value, "content": ""},
    ]
    return template.encode_multiturn(tokenizer, messages, "", "")


def _calls_in(template: Any, text: str) -> Sequence[ToolCall]:
    """The calls in a turn, those in a finished thought left out."""
    written = template.remove_thought(text).strip()
    before = [slot.split(_CONTENT)[0] for slot in template.format_function.slots if _CONTENT in slot]
    for opened in before:  # such as [TOOL_CALLS], which the host's extraction does not expect
        written = written.removeprefix(opened.strip()).strip()
    try:
        calls = template.extract_tool(written)
    except Exception:  # the host's extraction of an answer that is JSON and no call raises whatever it comes to
        return ()
    if isinstance(calls, str):
        return ()
    return [ToolCall(name=each.name, arguments=each.arguments) for each in calls]
