"""How a run samples: the host's generation keys, and the tokens that end a completion."""

from collections.abc import Mapping
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.types import ImageReader, SamplingSettings


def sampling_settings(
    arguments: RunArguments,
    model: Any,
    template: Any,
    tokenizer: PreTrainedTokenizerBase,
    images: ImageReader | None = None,
) -> SamplingSettings:
    generating = arguments.generating
    return SamplingSettings(
        num_generations=arguments.finetuning.num_generations,
        max_new_tokens=generating.max_new_tokens,
        temperature=generating.temperature,
        top_p=generating.top_p,
        top_k=max(generating.top_k, 0),
        min_p=arguments.finetuning.min_p,
        structured_outputs=cast(Mapping[str, Any] | None, arguments.finetuning.structured_outputs),
        repetition_penalty=generating.repetition_penalty,
        stop_token_ids=(
            *stop_token_ids(model, template, tokenizer),
            *(() if images is None else (images.placeholder,)),  # it can be sampled, and then has no image
        ),
        seed=arguments.training.seed,
    )


def stop_token_ids(model: Any, template: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a completion: the model's own EOS ids, the tokenizer's, and the template's stop words.

    A stop word that the tokenizer lacks has the id of the unknown token, which ends nothing. In GPT-2 and similar
    models the unknown token is also EOS; then it does end a completion.
    """
    configured = model.generation_config.eos_token_id
    own = configured if isinstance(configured, list) else [configured]
    known_words = [
        token_id
        for word, token_id in zip(
            template.stop_words, tokenizer.convert_tokens_to_ids(template.stop_words), strict=True
        )
        if token_id != tokenizer.unk_token_id or word == tokenizer.unk_token
    ]
    return tuple(sorted({*own, tokenizer.eos_token_id, *known_words} - {None}))
