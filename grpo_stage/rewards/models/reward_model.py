"""The reward `reward_model`: every completion scored by a model that the host's `stage: rm` trained.

A score is what the model's value head says of the last token of prompt and completion, on the very tokens that the
policy read and sampled. Where a completion ended, that is the last token that the template closes an answer with: no
other one did `stage: rm` train the head on. The scores come from one of three (`reward_model_type`):

    full    a model of its own                     `value_head.ValueHeadScorer`
    lora    an adapter on the policy's base        the same, on what `adapter_on_policy.AdapterOnPolicy` yields
    api     one behind the host's reward server    `server.ServerScorer`
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from traceback import format_exc

from grpo_stage.rewards.errors import RewardError
from grpo_stage.rewards.models.server import RewardServerError
from grpo_stage.rewards.options import REWARD_MODEL
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup
from grpo_stage.update.token_budget import OutOfMemory, TokenBudget


Tokens = tuple[int, ...]

_NO_MEMORY = (
    "ran out of memory with a single completion of {} tokens, prompt included: there is nothing left to split. Lower "
    "`max_new_tokens` or `cutoff_len`, give vLLM less (`vllm_gpu_util`, `vllm_sleep`), or load less of a model "
    "(`reward_model_quantization_bit`, or `reward_model_type: api` on another device)"
)


class ModelReward:
    """The reward `reward_model`, scored by `score` in batches of like length under a token budget."""

    name = REWARD_MODEL

    def __init__(self, score: Callable[[Sequence[Tokens]], Sequence[float]], max_tokens: int, ending: Tokens) -> None:
        """
        Args:
            score: a number for each sequence of prompt and completion tokens.
            max_tokens: the most tokens, padding included, of one call of `score`; a longer completion goes alone.
                Lowered when memory runs out.
            ending: the tokens that the template closes an answer with.
        """
        self._score = score
        self._budget = TokenBudget(
            max_tokens,
            lambda now, before: (
                f"Out of memory in a pass of the reward model: it is done again with batches of {now} tokens instead "
                f"of {before}, which changes nothing but the speed."
            ),
        )
        self._ending = ending

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[float | None]]:
        """[P][G]

        Raises:
            RewardError: if there is no finite score for a completion.
        """
        rows = [(group.prompt, completion) for group in groups for completion in group.completions]
        tokens = [prompt.token_ids + self._closed(completion) for prompt, completion in rows]
        scores = [math.nan] * len(rows)
        waiting = sorted(range(len(rows)), key=lambda row: len(tokens[row]), reverse=True)
        while waiting:
            length = len(tokens[waiting[0]])
            chosen = waiting[: max(1, self._budget.max_tokens // length)]
            first = rows[chosen[0]]
            try:
                values = self._budget.attempt(partial(self._score, [tokens[row] for row in chosen]))
            except RewardServerError as error:
                raise self._error(str(error), *first) from error
            except Exception as error:  # a model's forward pass may raise anything; the run ends with a checkpoint
                problem = f"raised {type(error).__name__} in a batch of {len(chosen)} completions"
                raise self._error(problem, *first, format_exc()) from error
            if not isinstance(values, OutOfMemory):
                for row, value in zip(chosen, values, strict=True):
                    scores[row] = value
                waiting = waiting[len(chosen) :]
            elif len(chosen) > 1:
                self._budget.shrink(len(chosen) * length)
            else:
                raise self._error(_NO_MEMORY.format(length), *first) from values.error
        for row, score in enumerate(scores):
            if not math.isfinite(score):
                raise self._error(f"gave {score}: a score is finite", *rows[row])
        flat = iter(scores)
        return [[next(flat) for _ in group.completions] for group in groups]

    def _closed(self, completion: Completion) -> Tokens:
        """The tokens with the template's ending, whichever end token was sampled; unchanged if none was."""
        if completion.finish_reason is not FinishReason.STOP:
            return completion.token_ids
        content = completion.token_ids[:-1]
        # Some templates close an answer with more than the end token, such as `\n<eos>`: the policy may have sampled
        # the beginning of that.
        sampled = max(n for n in range(len(self._ending) + 1) if content[len(content) - n :] == self._ending[:n])
        return content + self._ending[sampled:]

    def _error(self, problem: str, prompt: Prompt, completion: Completion, traceback: str = "") -> RewardError:
        return RewardError(self.name, problem, prompt=prompt.text, completion=completion.text, traceback=traceback)
