"""Small random vision-language models with a tokenizer and a processor of their own: ordinary checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipVisionConfig,
)


HIDDEN = 64
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}


def make_tokenizer(image_token: str, marks: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    """Bytes and a few words.

    Args:
        image_token: stands for a part of an image.
        marks: other tokens, by the names that a processor asks for.
    """
    named = {"image_token": image_token, **(marks or {})}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", *named.values()]
    tokenizer.train_from_iterator(
        ["How many squares are there? user assistant system You are a helpful assistant."] * 3,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=named
    )


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def make_qwen2_vl() -> tuple[Any, Any]:
    """Positions in three dimensions, and as many tokens as an image's size asks for."""
    marks = {
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
        "video_token": "<|video_pad|>",
    }
    tokenizer = make_tokenizer("<|image_pad|>", marks)
    start, end, video = tokenizer.convert_tokens_to_ids(list(marks.values()))
    config = Qwen2VLConfig(
        text_config=TEXT
        | special_ids(tokenizer)
        | {
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        },
        vision_config={"depth": 1, "embed_dim": HIDDEN, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    sizes = {"min_pixels": 28 * 28, "max_pixels": 84 * 84}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template="{{ messages }}"
    )
    return Qwen2VLForConditionalGeneration(config), processor


def make_llava() -> tuple[Any, Any]:
    """Positions in one dimension, and four tokens an image."""
    tokenizer = make_tokenizer("<image>")
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28,
        patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT, **special_ids(tokenizer), vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    size = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size), tokenizer, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template="{{ messages }}",
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def make_gemma3() -> tuple[Any, Any]:
    """The tokens of an image see each other, and a layer has a sliding window."""
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    turns = {"bot_token": "<start_of_turn>", "eot_token": "<end_of_turn>"}
    tokenizer = make_tokenizer("<image_soft_token>", marks | turns)
    vision = SiglipVisionConfig(
        hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=56,
        patch_size=14,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=TEXT
        | special_ids(tokenizer)
        | {"vocab_size": len(tokenizer), "head_dim": 32, "sliding_window": 16,
           "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=vision.to_dict(),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=True,
    )  # fmt: skip
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 56, "width": 56}), tokenizer, image_seq_length=4,
        chat_template="{{ messages }}",
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # 0 until it is trained
    return model, processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_vl": make_qwen2_vl,
    "llava": make_llava,
    "gemma3": make_gemma3,
}
"""By the host's template."""


def save(template: str, folder: Path) -> Path:
    """Write a model of the family."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = FAMILIES[template]()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
