"""The plan of a run's memory beside what its steps hold, and GRPO beside PPO: `memory_plan.py FOLDER [NAME ...]`.

Makes models of random weights in several widths and depths, with the tokenizer of `grpo-stage quickstart-model`, and
measures them as `grpo-stage profile` does, in float32 on a CPU, full and LoRA. One JSON line a run in
FOLDER/memory.jsonl; runs that are there are not repeated.

    grpo-stage quickstart-model FOLDER/smollm2-135m
    python benchmarks/memory_plan.py FOLDER
"""

import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

from grpo_stage.tools import profile, profile_step
from grpo_stage.tools.profile import FOR_A_MEASUREMENT
from grpo_stage.tools.recipe_file import quiet_host, read_recipe


REAL = "smollm2-135m"
SHAPES = {
    "llama-12m": ("llama", 192, 512, 6, 6, 3, True, None),
    "qwen2-deep-57m": ("qwen2", 384, 1024, 24, 6, 2, True, None),
    "llama-60m": ("llama", 512, 1408, 8, 8, 4, False, None),
    "llama-22m": ("llama", 512, 1408, 8, 8, 4, False, 2048),
    "qwen2-deep-39m": ("qwen2", 384, 1024, 24, 6, 2, True, 2048),
    "qwen2-wide-63m": ("qwen2", 1024, 4096, 4, 16, 4, True, 2048),
}
"""Architecture, width, inner width, layers, heads, heads of keys, whether the embeddings are tied, and the vocabulary:
None is all of the tokenizer's, a number its first tokens, with which any text can be written and little time goes into
logits."""


def make_model(folder: Path, name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    kind, hidden, inner, layers, heads, kv_heads, tied, vocabulary = SHAPES[name]
    AutoTokenizer.from_pretrained(folder / REAL).save_pretrained(folder / name)
    if vocabulary is not None:
        file = folder / name / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        model, whole = content["model"], dict(content["model"]["vocab"])
        model["vocab"] = {token: index for token, index in whole.items() if index < vocabulary}
        model["merges"] = [pair for pair in model["merges"] if whole["".join(pair)] < vocabulary]
        file.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    config = AutoConfig.for_model(
        kind,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=len(tokenizer),
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder / name)


def run(recipe: dict, line: dict, file: Path) -> None:
    """Measure in this process, which is forked from one that has loaded the libraries and nothing else."""
    with tempfile.TemporaryDirectory() as output:
        values = {**recipe, **FOR_A_MEASUREMENT, "output_dir": output}
        found = profile_step.measure(values, is_ppo=line["name"] == "PPO")
    measured = profile.compared(recipe, line["name"], found)
    line = {**line, **dataclasses.asdict(measured), "peak": measured.peak, "error": measured.error}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")


def main() -> None:
    os.environ.update(profile.MALLOC)
    if "--started" not in sys.argv:  # the C library reads them at its start
        os.execv(sys.executable, [sys.executable, *sys.argv, "--started"])
    folder, *names = [Path(sys.argv[1]), *sys.argv[2:-1]]
    file = folder / "memory.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    with quiet_host():
        import grpo_stage.memory.ppo
        import grpo_stage.workflow  # noqa: F401

        for tuning in ("full", "lora"):
            for name in names or [*SHAPES, REAL]:
                if not (folder / name).exists():
                    make_model(folder, name)
                for method in ("GRPO", "PPO"):
                    line = {"model": name, "tuning": tuning, "name": method}
                    if any(all(each[key] == value for key, value in line.items()) for each in done):
                        continue
                    overrides = (
                        f"model_name_or_path={folder / name}",
                        f"finetuning_type={tuning}",
                        "rollout_backend=hf",
                        "per_device_train_batch_size=4",
                        "max_new_tokens=8",
                    )
                    recipe = read_recipe(Path("yaml_examples/quickstart.yaml"), overrides)
                    process = multiprocessing.get_context("fork").Process(target=run, args=(recipe, line, file))
                    process.start()
                    process.join()


if __name__ == "__main__":
    main()
