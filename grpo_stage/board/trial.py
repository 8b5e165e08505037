"""The Board's "try the rewards": the result of `grpo-stage try-rewards` as a table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grpo_stage.board.tables import number
from grpo_stage.board.tool_process import CONFIG, run_tool
from grpo_stage.rewards.trial import SHOWN_KINDS


Source = Literal["reference", "model"]


@dataclass(frozen=True, slots=True)
class Trial:
    """The state of a trial: its seconds so far, and at its end either a table or an error."""

    elapsed_s: float
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    error: str | None = None
    is_done: bool = False


def try_rewards(arguments: Mapping[str, Any], num_rows: int, source: Source) -> Iterator[Trial]:
    """Score completions of the run's first prompts; closing the iterator ends the process."""
    words = ["try-rewards", CONFIG, "--rows", str(num_rows), "--completions", source]
    for state in run_tool(words, arguments):
        if state.answer is None or not state.is_done:
            yield Trial(state.elapsed_s, error=state.error, is_done=state.is_done)
        else:
            headers, rows = rows_of(state.answer)
            notes = [*state.answer["findings"], *state.answer["notes"]]
            yield Trial(state.elapsed_s, headers, rows, notes, is_done=True)


def rows_of(found: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """The functions of a `TrialResult`, and what they give: prompt, kind, completion, a reward each, the total."""
    names = found["functions"]
    rows = [(row["prompt"], row) for row in found["rows"] if row["kind"] in SHOWN_KINDS or not row["reference"]]
    # The means of each attack stand below, with the number of prompts in the place of one.
    rows += [(f"{score['num_prompts']} x", score) for score in found["attacks"]]
    return names, [
        [
            prompt,
            row["kind"],
            row["completion"],
            *(number(row["rewards"][name]) for name in names),
            number(row["reward"]),
        ]
        for prompt, row in rows
    ]
