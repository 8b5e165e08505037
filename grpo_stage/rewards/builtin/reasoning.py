"""The scorer of a generated puzzle: `reasoning_gym`."""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

from grpo_stage.rewards.answers.final_answer import answer_tag
from grpo_stage.rewards.builtin.context import RewardContext


COLUMN = "reasoning_gym_entry"
"""The column that says how the row's puzzle is made again, as JSON: task, settings and index."""


@functools.cache
def puzzles(task: str, settings: str) -> Any:
    """The dataset of a task of reasoning-gym, with its settings as JSON; puzzles are made when they are asked for."""
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **json.loads(settings))


def reasoning_gym(context: RewardContext) -> Callable[..., list[float]]:
    """The score that a task of the package reasoning-gym gives the answer itself, for `dataset: reasoning_gym:...`.

    Range [0, 1] in nearly all tasks; some give a little for an answer that is near. The answer is what stands in the
    last `<answer>...</answer>`, or all that the model wrote last where there are no such tags. Each row's puzzle is
    made again from its task, settings and index, since a scorer may need what a dataset's file does not hold.
    """

    def score(
        completions: Sequence[str], reasoning_gym_entry: Sequence[str], final_turns: Sequence[str] | None = None
    ) -> list[float]:
        scores = []
        for text, kept in zip(final_turns or completions, reasoning_gym_entry, strict=True):
            entry = json.loads(kept)
            made = puzzles(entry["task"], json.dumps(entry["settings"], sort_keys=True))
            tagged = answer_tag(text)
            answer = (text if tagged is None else tagged).strip()
            scores.append(float(made.score_answer(answer, made[entry["index"]])))
        return scores

    return score
