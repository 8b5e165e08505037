"""The text of a completion: what rewards, evaluation and logs see, whichever engine sampled it."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from grpo_stage.types import FinishReason


def completion_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], finish_reason: FinishReason) -> str:
    """All that was sampled, without the token that ended it.

    Special tokens stay in the text: with `add_special_tokens: <think>,</think>` they are what a reward looks for. An
    end token that closes a tag of the completion (the template `glm4v` ends one at `</answer>`) is content, and stays.

    Args:
        tokenizer: the policy's.
        token_ids: of the completion; after `FinishReason.STOP` the last one is the end token.
        finish_reason: why it ended.
    """
    if finish_reason is not FinishReason.STOP:
        return _decoded(tokenizer, token_ids)
    text, end = _decoded(tokenizer, token_ids[:-1]), str(tokenizer.convert_ids_to_tokens(token_ids[-1]))
    closes_tag = token_ids[-1] != tokenizer.eos_token_id and end.startswith("</") and f"<{end[2:]}" in text
    return text + end if closes_tag else text


def _decoded(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text as it was sampled: no space is taken from before a comma."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
