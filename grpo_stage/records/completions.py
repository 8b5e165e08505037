"""Completions and their rewards: a table in the console, and all of them in a JSONL file."""

import json
import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_stage.distributed import all_gather
from grpo_stage.records.line_log import LineLog
from grpo_stage.types import Completion, Sample


COMPLETIONS_FILE = "completions.jsonl"


class CompletionsLog:
    """A log that one rank writes, with the completions of all ranks."""

    def __init__(self, output_dir: str, reward_names: Sequence[str], num_to_print: int, is_writer: bool) -> None:
        self._log = LineLog(os.path.join(output_dir, COMPLETIONS_FILE))
        self._reward_names = reward_names
        self._num_to_print = num_to_print
        self._is_writer = is_writer
        self._latest: list[dict[str, Any]] = []

    def drop_after(self, step: int) -> None:
        """Delete the lines of later steps than `step`: a resumed run replays them, a fresh run (step 0) has none."""
        if self._is_writer:
            self._log.keep(lambda record: record["step"] <= step)

    def record(self, step: int, samples: Sequence[Sample]) -> None:
        """Append a line for each sample of all ranks. Every rank must call it.

        Args:
            step: the optimizer step that trains on them first.
            samples: those of this rank.
        """
        ranks = all_gather([self._line(step, sample) for sample in samples])
        if self._is_writer:
            self._latest = [line for rank in ranks for line in rank]
            self._log.append([json.dumps(line, ensure_ascii=False) for line in self._latest])

    def _line(self, step: int, sample: Sample) -> dict[str, Any]:
        return {
            "step": step,
            "prompt_index": sample.prompt.index,
            "prompt": sample.prompt.text,
            **({"images": [image.name for image in sample.prompt.images]} if sample.prompt.images else {}),
            "completion": sample.completion.text,
            **({"turns": _turns(sample.completion)} if sample.completion.turns else {}),
            "reference": sample.prompt.reference,
            "rewards": dict(zip(self._reward_names, sample.rewards, strict=True)),
            "reward": sample.total_reward,
            "advantage": sample.advantage,
            "num_tokens": sample.completion.num_sampled,
            "finish_reason": sample.completion.finish_reason.value,
            "policy_version": sample.policy_version,
        }

    def print_table(self) -> None:
        """Show the best and the worst of the last rollout, alternating."""
        if not self._latest:
            return
        ranked = sorted(self._latest, key=lambda record: (record["reward"] is None, -(record["reward"] or 0.0)))
        best_first = [record for pair in zip(ranked, reversed(ranked), strict=True) for record in pair]
        table = Table(title=f"Completions of step {self._latest[0]['step']}", show_lines=True, title_justify="left")
        table.add_column("prompt", max_width=40)
        table.add_column("completion", max_width=60)
        for name in self._reward_names:
            table.add_column(name, justify="right")
        table.add_column("advantage", justify="right")
        for record in best_first[: min(self._num_to_print, len(ranked))]:
            # Text, not str: rich could take parts of a completion for markup.
            table.add_row(
                Text(_shortened(record["prompt"])),
                Text(_shortened(record["completion"])),
                *(_number(value) for value in record["rewards"].values()),
                _number(record["advantage"]),
            )
        Console().print(table)


def _turns(completion: Completion) -> list[dict[str, Any]]:
    """The turns for a reader: what is not told of a turn is 0 or does not apply."""
    return [
        {
            "role": "assistant" if turn.is_sampled else "tool",
            "text": turn.text,
            "num_tokens": turn.num_tokens,
            **({"num_calls": turn.num_calls} if turn.num_calls else {}),
            **({"num_errors": turn.num_errors} if turn.num_errors else {}),
            **({"is_cut": True} if turn.is_cut else {}),
        }
        for turn in completion.turns
    ]


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} [...] {text[-limit // 2 :]}"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"
