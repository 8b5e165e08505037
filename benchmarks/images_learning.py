"""A small random vision-language model learns to count squares, by GRPO alone: the curve of docs/images.md.

    python benchmarks/images_learning.py runs/squares --picture docs/images_learning.png

Qwen2-VL's architecture in small: nothing of it is trained before, neither what reads images nor what answers. Answers
are one token, of a vocabulary of a few words. The images that `eval_reward` is measured on are never trained on.
"""

import argparse
import json
import runpy
import shutil
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)


EXAMPLES = Path(__file__).resolve().parents[1] / "yaml_examples"
SPECIALS = ("<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>")  # fmt: skip
WORDS = ("1", "2", "3", "4", "How", "many", "squares?", "system", "user", "assistant", "You", "are", "a", "helpful",
         "assistant.")  # fmt: skip
NUM_ROWS, NUM_HELD_OUT = 480, 80


def write_model(folder: Path) -> None:
    """The model with its tokenizer and processor."""
    vocabulary = {word: i for i, word in enumerate((*SPECIALS, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Fuse()
    words.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )  # fmt: skip
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
        },
        vision_config={"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2},
        image_token_id=vocabulary["<|image_pad|>"], video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"], vision_end_token_id=vocabulary["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    sizes = {"min_pixels": 28 * 28, "max_pixels": 112 * 112}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template="{{ messages }}"
    )
    processor.save_pretrained(folder)


def write_data(folder: Path) -> None:
    script = runpy.run_path(str(EXAMPLES / "data" / "make_squares.py"))
    rows = list(script["write"](folder, NUM_ROWS))
    columns = {"prompt": "question", "response": "answer", "images": "images"}
    info = {}
    for name, part in (("squares", rows[NUM_HELD_OUT:]), ("held_out", rows[:NUM_HELD_OUT])):
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
        info[name] = {"file_name": f"{name}.json", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def recipe(folder: Path, num_steps: int, seed: int) -> dict[str, object]:
    return {
        "stage": "grpo", "do_train": True, "model_name_or_path": str(folder / "model"), "finetuning_type": "full",
        "freeze_vision_tower": False, "freeze_multi_modal_projector": False, "template": "qwen2_vl",
        "dataset": "squares", "eval_dataset": "held_out", "dataset_dir": str(folder / "data"), "cutoff_len": 64,
        "rollout_backend": "hf", "num_generations": 16, "max_new_tokens": 1, "reward_funcs": "accuracy",
        "per_device_train_batch_size": 8, "learning_rate": 1.0e-3, "lr_scheduler_type": "constant",
        "max_steps": num_steps, "eval_strategy": "steps", "eval_steps": 50, "eval_num_generations": 2,
        "logging_steps": 5, "save_strategy": "no", "plot_loss": True, "log_completions": True, "seed": seed,
        "output_dir": str(folder / "out"), "overwrite_output_dir": True, "report_to": "none", "use_cpu": True,
        "bf16": False, "disable_gradient_checkpointing": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--picture", type=Path, help="where the curve of the run goes")
    arguments = parser.parse_args()
    write_model(arguments.folder / "model")
    write_data(arguments.folder / "data")

    from llamafactory.train.tuner import run_exp

    run_exp(recipe(arguments.folder.resolve(), arguments.steps, arguments.seed))
    if arguments.picture is not None:
        shutil.copy(arguments.folder / "out" / "training_reward.png", arguments.picture)


if __name__ == "__main__":
    main()
