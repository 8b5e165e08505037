"""Short real runs of a random two-layer model, seconds each on an idle core: histories for `false_alarms.py`.

    python benchmarks/tiny_runs.py quickstart/model saves/tiny --seeds 3
    python benchmarks/false_alarms.py saves/tiny/*

Eleven kinds a seed: several rewards, LoRA and full tuning, a KL, several updates a rollout, an evaluation, batches of
2 x 4, dynamic sampling. `last_digit` is right about once in 50 completions, and so is no healthy run.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def digits(completions: Sequence[str]) -> list[float]:
    """The share of characters that are digits; no more than a half is paid."""
    return [min(0.5, sum(c.isdigit() for c in text) / max(1, len(text))) for text in completions]


def has_digit(completions: Sequence[str]) -> list[float]:
    return [float(any(c.isdigit() for c in text)) for text in completions]


def last_digit(completions: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 where the text has the reference's last digit."""
    return [float(reference[-1] in text) for text, reference in zip(completions, references, strict=True)]


def letters(completions: Sequence[str]) -> list[float]:
    """How many different characters the text has."""
    return [len(set(text)) / 20 for text in completions]


def starts_lower(completions: Sequence[str]) -> list[float]:
    return [float(text[:1].islower()) for text in completions]


KINDS: dict[str, dict[str, Any]] = {
    "digits": {"reward_funcs": ["digits"]},
    "has_digit": {"reward_funcs": ["has_digit"]},
    "last_digit": {"reward_funcs": ["last_digit"]},
    "letters": {"reward_funcs": ["letters"]},
    "kl": {"reward_funcs": ["starts_lower"], "beta": 0.04},
    "lora": {"reward_funcs": ["digits"], "finetuning_type": "lora", "lora_rank": 8, "learning_rate": 3e-3},
    "two_rewards": {"reward_funcs": ["digits", "repetition"], "reward_weights": [1.0, 0.5]},
    "iterations": {"reward_funcs": ["digits"], "num_iterations": 2, "steps_per_generation": 2},
    "evaluation": {
        "reward_funcs": ["letters"], "eval_strategy": "steps", "eval_steps": 4, "eval_num_generations": 2,
        "val_size": 16,
    },
    "small": {
        "reward_funcs": ["has_digit"], "per_device_train_batch_size": 2, "num_generations": 4, "max_steps": 80
    },
    "dynamic": {"reward_funcs": ["has_digit"], "dynamic_sampling": True},
}  # fmt: skip
VOCABULARY = 2048
HERE = Path(__file__).resolve()


def make_model(tokenizer: Path, folder: Path) -> None:
    """A random Llama with the first tokens of a byte-level tokenizer."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder / name)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    whole, merges = content["model"]["vocab"], content["model"]["merges"]
    content["model"]["vocab"] = {token: index for token, index in whole.items() if index < VOCABULARY}
    content["model"]["merges"] = [pair for pair in merges if whole.get("".join(pair), VOCABULARY) < VOCABULARY]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    own = AutoTokenizer.from_pretrained(folder)
    special = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(own), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, **special,
        )
    )  # fmt: skip
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)


def recipe(model: Path) -> dict[str, Any]:
    """What all runs of the model share."""
    return {
        "stage": "grpo", "do_train": True, "model_name_or_path": str(model), "template": "smollm2",
        "dataset": "addition", "dataset_dir": str(HERE.parents[1] / "yaml_examples" / "data"), "cutoff_len": 96,
        "finetuning_type": "full", "rollout_backend": "hf", "num_generations": 8, "max_new_tokens": 16,
        "per_device_train_batch_size": 8, "max_steps": 40, "logging_steps": 1, "save_strategy": "no",
        "use_cpu": True, "bf16": False, "dataloader_pin_memory": False, "report_to": "none",
        "lr_scheduler_type": "constant", "learning_rate": 1e-3, "disable_gradient_checkpointing": True,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="the quick start's model, whose tokenizer is taken")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    from grpo_stage.plugin.registration import install

    install()
    from llamafactory.train.tuner import run_exp

    model = args.output.with_name(f"{args.output.name}-model")
    if not model.exists():
        make_model(args.tokenizer, model)
    for seed in range(1, args.seeds + 1):
        for kind, keys in KINDS.items():
            names = [name if name == "repetition" else f"{HERE}:{name}" for name in keys["reward_funcs"]]
            folder = str(args.output / f"{kind}-{seed}")
            run_exp({**recipe(model), **keys, "reward_funcs": names, "seed": seed, "output_dir": folder})


if __name__ == "__main__":
    main()
