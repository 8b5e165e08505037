"""The tools of a run: loaded, told to the model, and put between the sampler and its engine."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from grpo_stage.host.log import get_logger
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.host.tool_format import ToolFormat, described, tool_format
from grpo_stage.rewards.user_tools import ToolSet, load_tools
from grpo_stage.rewards.workers.tool_process import Request
from grpo_stage.rewards.workers.tool_worker import ToolWorker
from grpo_stage.rollout.episodes import Episodes, EpisodeSettings, reset_request
from grpo_stage.types import RolloutEngine


logger = get_logger(__name__)

ENVIRONMENT = "environment"
"""The reward that an environment gives, in `reward_funcs`."""
_RESETS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class ToolUse:
    """All that a run needs for its tools."""

    tools: ToolSet
    text: str
    """What prompts tell of them, as the host's templates take it."""
    turns: ToolFormat
    settings: EpisodeSettings
    worker: ToolWorker

    def around(self, engine: RolloutEngine) -> RolloutEngine:
        """The engine with tools."""
        return Episodes(engine, self.turns, self.worker, self.settings)  # type: ignore[return-value]  # read-only

    def first_texts(self, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
        """What `reset` of the environment says of each row, empty where it says nothing.

        Raises:
            ValueError: if it fails for a row.
        """
        for start in range(0, len(rows), _RESETS_AT_ONCE):
            part = rows[start : start + _RESETS_AT_ONCE]
            requests: list[Request] = [reset_request(i, columns) for i, columns in enumerate(part)]
            replies = self.worker.run(requests)
            self.worker.end(range(len(part)))
            for i, (columns, reply) in enumerate(zip(part, replies, strict=True)):
                if reply.is_error:
                    if self.tools.is_game:
                        raise ValueError(f"`environment`: {reply.value}")
                    shown = json.dumps(columns, ensure_ascii=False, default=str)
                    raise ValueError(
                        f"`environment`: its `reset` failed for row {start + i + 1}: {reply.value} It is called with "
                        f"the columns of a row as arguments, so that it names those that it uses and ends with "
                        f"`**row`. The row: {shown:.300}"
                    )
                yield reply.value or ""


def load_tool_use(arguments: RunArguments, template: Any, tokenizer: PreTrainedTokenizerBase) -> ToolUse | None:
    """The tools of a run; None if it has none. To be closed by its `worker`.

    Raises:
        ValueError: for what is no tool, and for a template without tools.
    """
    finetuning = arguments.finetuning
    names = cast(list[str], finetuning.tools)
    if not names and finetuning.environment is None:
        return None
    tools = load_tools(names, finetuning.environment, Path.cwd(), logger.info_rank0)
    is_asked = ENVIRONMENT in cast(list[str], finetuning.reward_funcs)
    if finetuning.environment is not None and is_asked != tools.has_reward:
        raise ValueError(
            f"`environment: {finetuning.environment}` has a method `get_reward`, and `reward_funcs` does not name "
            "`environment`, so that it would have no effect. Add `environment` to `reward_funcs`, with a weight where "
            "there are `reward_weights`, or leave the method out."
            if tools.has_reward
            else f"`environment: {finetuning.environment}` has no method `get_reward`, which the reward `environment` "
            "asks for. Write `def get_reward(self) -> float`, or name other `reward_funcs`."
        )
    name = arguments.data.template or "the tokenizer's own"
    turns = tool_format(template, name, tokenizer)
    return ToolUse(
        tools,
        described(template, name, tokenizer, tools.schemas),
        turns,
        EpisodeSettings(
            tools=tools.names,
            max_turns=finetuning.max_turns,
            max_turn_tokens=turn_room(arguments),
            has_environment=tools.has_environment,
            has_reward=tools.has_reward,
        ),
        ToolWorker(tools.load, finetuning.tool_timeout),
    )


def turn_room(arguments: RunArguments) -> int:
    """Tokens that a turn may have; `max_new_tokens` is, once it is parsed, that of a whole completion."""
    room, finetuning = arguments.generating.max_new_tokens, arguments.finetuning
    return room // finetuning.max_turns if finetuning.completion_limit == "turn" else room
