"""What rewards see of the tokens that were sampled."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from grpo_stage.rewards.loading import load_rewards
from grpo_stage.rollout.engines.decoding import completion_text
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup


TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
ANSWER = "<think>one , and one </think>\n<answer>2</answer>"


def byte_level() -> Any:
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece() -> Any:
    pieces = [(char, -1.0) for char in "<unk>▁\n/,andothiker2sw"]
    tokenizer = Tokenizer(Unigram([("<0>", 0.0), *dict(pieces).items()], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)


def slow() -> Any:
    return ByT5Tokenizer()


def with_special_tokens(tokenizer: Any) -> Any:
    """The chat's, and the tags."""
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<pad>"})
    tokenizer.add_special_tokens({"additional_special_tokens": [*TAGS, "<|im_start|>"]})
    return tokenizer


@pytest.fixture(params=[byte_level, sentencepiece, slow])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return with_special_tokens(request.param())


def text_of(tokenizer: Any, text: str, finish_reason: FinishReason = FinishReason.STOP) -> str:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert set(tokenizer.all_special_ids) & set(token_ids)
    return completion_text(tokenizer, token_ids, finish_reason)


def test_tags_that_are_special_tokens_are_text(tokenizer: Any) -> None:
    assert text_of(tokenizer, f"{ANSWER}<|im_end|>") == ANSWER
    assert text_of(tokenizer, "<think>one", FinishReason.LENGTH) == "<think>one"


def test_only_the_end_token_is_left_out(tokenizer: Any) -> None:
    assert text_of(tokenizer, "2<|im_start|>and<|im_end|>") == "2<|im_start|>and"
    assert text_of(tokenizer, "2<|im_end|>", FinishReason.LENGTH) == "2<|im_end|>", "no stop token of this run"
    assert text_of(tokenizer, "<|im_end|>") == ""


def test_an_end_token_that_closes_a_tag_is_text(tokenizer: Any) -> None:
    """The template `glm4v` has `</answer>` among its stop words."""
    assert text_of(tokenizer, ANSWER) == ANSWER
    assert text_of(tokenizer, "2</answer>") == "2", "there is none to close"
    tokenizer.eos_token = "</answer>"
    assert text_of(tokenizer, ANSWER) == ANSWER.removesuffix("</answer>")


def test_rewards_read_what_was_sampled() -> None:
    text = text_of(with_special_tokens(byte_level()), f"{ANSWER}<|im_end|>")
    completion = Completion(token_ids=(1,), sampling_logprobs=(0.0,), finish_reason=FinishReason.STOP, text=text)
    prompt = Prompt(index=0, token_ids=(1,), messages=(), reference="2")
    names = ["format", "tag_count", "exact_match", "accuracy"]
    rewards = load_rewards(names, None, None, max_new_tokens=8, timeout_s=60.0)
    try:
        scores = rewards.score([RolloutGroup(prompt=prompt, completions=(completion,), policy_version=0)])
    finally:
        rewards.close()
    assert scores == [[[1.0, 1.0, 1.0, 1.0]]]
