"""A model of random weights in the shape of Qwen2.5-1.5B, for measurements where nothing can be downloaded."""

from pathlib import Path


def make_model(folder: Path, **sizes: int) -> None:
    """Write it in bf16, with a tokenizer that has a token for each byte and many that no text has."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    own = {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        **sizes,
    }
    config = Qwen2Config(**own, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0, dtype=torch.bfloat16)
    words = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<{number}>" for number in range(len(words), config.vocab_size)]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
