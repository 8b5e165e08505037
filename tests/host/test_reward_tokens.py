"""A reward model scores what the host's `stage: rm` would have trained it on, whatever the template."""

from collections.abc import Sequence
from typing import Any

import pytest
from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.data.processor import PairwiseDatasetProcessor
from llamafactory.data.template import TEMPLATES
from llamafactory.hparams.data_args import DataArguments
from transformers import AutoTokenizer

from grpo_stage.host.facade import closing_tokens
from grpo_stage.rewards.models.reward_model import ModelReward
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup


PROMPT, ANSWER = "What is 2 + 2?", "It is 4."
# With a line break after the end token, none, no end token at all, one that the host's processor adds.
NAMES = ["smollm2", "qwen", "gemma", "default", "alpaca", "llama3", "mistral", "deepseekcoder", "empty"]
EFFICIENT = ["glm4", "falcon", "fewshot", "gpt_oss", "solar"]


@pytest.fixture
def tokenizer(smollm2_tokenizer_dir: Any) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_tokenizer_dir)


def trained(template: Any, tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The prompt that the policy reads, and the tokens of prompt and answer that `stage: rm` trains on."""
    processor = PairwiseDatasetProcessor(template, tokenizer, None, DataArguments(cutoff_len=256))
    example = {
        "_prompt": [[{"role": "user", "content": PROMPT}]],
        "_response": [[{"role": "assistant", "content": ANSWER}, {"role": "assistant", "content": "5"}]],
        **{name: [None] for name in ("_system", "_tools", "_images", "_videos", "_audios")},
    }
    inputs = processor.preprocess_dataset(example)
    ids, labels = inputs["chosen_input_ids"][0], inputs["chosen_labels"][0]
    start = sum(label == -100 for label in labels)
    return tuple(ids[:start]), tuple(ids)


def scored(template: Any, tokenizer: Any, prompt: tuple[int, ...], completion: Completion) -> tuple[int, ...]:
    seen: list[tuple[int, ...]] = []

    def score(sequences: Sequence[tuple[int, ...]]) -> list[float]:
        seen.extend(sequences)
        return [0.0] * len(sequences)

    reward = ModelReward(score, max_tokens=1000, ending=closing_tokens(template, tokenizer))
    asked = Prompt(index=0, token_ids=prompt, messages=(), reference=None)
    reward([RolloutGroup(prompt=asked, completions=(completion,), policy_version=0)])
    return seen[0]


def completion_of(token_ids: Sequence[int], reason: FinishReason) -> Completion:
    return Completion(
        token_ids=tuple(token_ids),
        sampling_logprobs=(0.0,) * len(token_ids),
        finish_reason=reason,
        text=ANSWER,
    )


@pytest.mark.parametrize("name", [*NAMES, *EFFICIENT])
def test_a_completion_that_ended_is_scored_at_the_token_that_the_head_was_trained_on(tokenizer, name):
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template=name))
    assert template.efficient_eos == (name in EFFICIENT)
    prompt, expected = trained(template, tokenizer)
    answer = expected[len(prompt) :]
    ends = template.get_stop_token_ids(tokenizer)
    until_end = next((i for i, token in enumerate(answer) if token in ends), len(answer))
    for end in ends:  # the template's own, or another that ended it: the answer is the same
        sampled = completion_of([*answer[:until_end], end], FinishReason.STOP)
        assert scored(template, tokenizer, prompt, sampled) == expected


@pytest.mark.parametrize("name", ["smollm2", "glm4"])
def test_a_truncated_completion_is_scored_as_it_is(tokenizer, name):
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template=name))
    prompt, expected = trained(template, tokenizer)
    cut = expected[: len(prompt) + 2]
    sampled = completion_of(cut[len(prompt) :], FinishReason.LENGTH)
    assert scored(template, tokenizer, prompt, sampled) == cut


def test_every_template_closes_an_answer_as_the_host_does(tokenizer):
    """Compared as text: this tokenizer does not have all of their end tokens as tokens."""

    def text(token_ids: Sequence[int]) -> str:
        return "".join(tokenizer.convert_ids_to_tokens(token_ids))

    message = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]
    content = text(tokenizer.encode(ANSWER, add_special_tokens=False))
    for name, template in TEMPLATES.items():
        template.fix_special_tokens(tokenizer)
        _, answer = template.encode_oneturn(tokenizer, message)
        whole = [*answer, *([tokenizer.eos_token_id] if template.efficient_eos else [])]
        assert text(whole).endswith(content + text(closing_tokens(template, tokenizer))), name
