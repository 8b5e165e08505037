"""Seconds a step and memory of `stage: grpo` beside TRL's GRPOTrainer: the same model, LoRA, prompts and lengths.

    python benchmarks/compare_trl.py --shape cpu_quickstart [--ignore-eos] [--trl-1-16 FOLDER] [--json result.json]

TRL 0.24 is the one in the environment. TRL 1.16 needs datasets>=4.7, which the host refuses, so it has a folder:

    uv pip install --target FOLDER --no-deps trl==1.16.0 'datasets>=4.7'

On a CPU all sides sample with transformers' generate, in float32. The shapes `cuda_...` are for one GPU with vLLM in
the process, in bf16 with gradient checkpointing; TRL 0.24 knows no present vLLM and is left out of them. They take a
model of random weights:

    python benchmarks/compare_trl.py --make-model FOLDER
    python benchmarks/compare_trl.py --shape cuda_512 --model FOLDER --trl-1-16 FOLDER

Each side runs in a process of its own, and all are measured by the same callback:

    step_s                  from Trainer's on_step_begin to on_step_end: sampling, rewards, update and optimizer
    rollout_s               all before the first micro-batch: weights to the engine, sampling, rewards, advantages
    update_s                the rest
    peak_gib_above_model    the most that the process (the whole card) held, less what it held at on_train_begin, where
                            model, adapter and engine stand; our worker for rewards, another process, is left out

Seconds are medians over the steps after a first one. The reward is a number made from the text, so that no group
lacks an advantage: `stage: grpo` would leave out its update. `--ignore-eos` makes all completions equally long.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


REPOSITORY = Path(__file__).resolve().parent.parent
ADDITION = REPOSITORY / "yaml_examples" / "data" / "addition.jsonl"
SIDES = {"ours": "stage: grpo", "trl_1_16": "TRL 1.16", "trl_0_24": "TRL 0.24"}
NEVER_SAMPLED = "<empty_output>"
"""A token of SmolLM2 that no prompt and hardly any completion has: with `--ignore-eos` it is the end token."""
LORA_RANK, LEARNING_RATE, VLLM_SHARE = 16, 1e-6, 0.4


@dataclasses.dataclass(frozen=True)
class Shape:
    prompts: int
    completions: int
    """Of each prompt."""
    prompt_tokens: int
    """About as many, by worked examples in front of the question."""
    completion_tokens: int
    """At most."""
    micro_batch: int
    """Rows of the longest prompt and completion that go through the model at once; as many tokens on our side."""
    on_cuda: bool = False


SHAPES = {
    "smoke": Shape(1, 2, 40, 4, micro_batch=1),
    "cpu_quickstart": Shape(8, 8, 40, 16, micro_batch=8),
    "cpu_long_prompt": Shape(2, 8, 512, 64, micro_batch=8),
    "cuda_512": Shape(16, 8, 512, 512, micro_batch=16, on_cuda=True),
    "cuda_2048": Shape(16, 8, 2048, 256, micro_batch=8, on_cuda=True),
}


def number_of_text(completions: Sequence[str]) -> list[float]:
    """A reward in [0, 1) that differs wherever texts do."""
    return [zlib.crc32(completion.encode()) / 2**32 for completion in completions]


def main() -> None:
    args = parse_arguments()
    if args.make_model:
        from random_model import make_model

        make_model(args.make_model)
    elif args.worker:
        side, work_dir = args.worker
        (train_ours if side == "ours" else train_trl)(side, Path(work_dir), SHAPES[args.shape], args.steps + 1)
    else:
        compare(args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu_quickstart")
    parser.add_argument("--model", type=Path, default=REPOSITORY / "quickstart" / "model")
    parser.add_argument("--make-model", type=Path, metavar="FOLDER", help="write a model for the CUDA shapes, and end")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="by default all that there are")
    parser.add_argument("--trl-1-16", type=Path, metavar="FOLDER", help="see above")
    parser.add_argument("--steps", type=int, default=5, help="measured ones, after a first one")
    parser.add_argument("--ignore-eos", action="store_true", help="give the model an end token that it never samples")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(args: argparse.Namespace) -> None:
    shape = SHAPES[args.shape]
    if not (args.model / "config.json").is_file():
        sys.exit(f"{args.model} is no model: see `--help`, or `grpo-stage quickstart-model {args.model}`.")
    available = {"ours": True, "trl_1_16": args.trl_1_16 is not None, "trl_0_24": not shape.on_cuda}
    sides = args.sides or [side for side in SIDES if available[side]]
    if missing := [side for side in sides if not available[side]]:
        sys.exit(f"{missing} cannot run: `--help` says what they need.")

    results = {}
    with tempfile.TemporaryDirectory(prefix="grpo-stage-bench-") as folder:
        shared = Path(folder)
        prepare_model(args.model.resolve(), shared / "model", args.ignore_eos)
        write_dataset(shared, shape, (args.steps + 1) * shape.prompts)
        for side in sides:
            (shared / side).mkdir()
            command = [sys.executable, __file__, "--shape", args.shape, "--steps", str(args.steps)]
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "GRPO_STAGE_DISABLE": str(int(side != "ours"))}
            if side == "trl_1_16":
                environment["PYTHONPATH"] = f"{args.trl_1_16.resolve()}{os.pathsep}{environment.get('PYTHONPATH', '')}"
            print(f"== {SIDES[side]}", flush=True)
            subprocess.run([*command, "--worker", side, str(shared / side)], env=environment, check=True)
            results[side] = json.loads((shared / side / "result.json").read_text(encoding="utf-8"))

    settings = {"name": args.shape, **dataclasses.asdict(shape), "steps": args.steps, "ignore_eos": args.ignore_eos}
    report = json.dumps({"shape": settings, **results}, indent=2)
    print(report)
    if args.json:
        args.json.write_text(report + "\n", encoding="utf-8")
    print_table(settings, results)


# What all sides share


def prepare_model(model: Path, folder: Path, ignore_eos: bool) -> None:
    """Link the model's files, with another end token if that is asked for."""
    from transformers import AutoTokenizer

    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    if not ignore_eos:
        return
    token_id = AutoTokenizer.from_pretrained(model).get_vocab().get(NEVER_SAMPLED)
    if token_id is None:
        sys.exit(f"{model} has no token {NEVER_SAMPLED}; random weights hardly ever sample the end token anyway.")
    for name, end in (("config", token_id), ("generation_config", token_id), ("tokenizer_config", NEVER_SAMPLED)):
        file = folder / f"{name}.json"
        keys = ("eos_token", "pad_token") if end == NEVER_SAMPLED else ("eos_token_id", "pad_token_id")
        content = json.loads(file.read_text(encoding="utf-8")) | dict.fromkeys(keys, end)
        file.unlink()
        file.write_text(json.dumps(content), encoding="utf-8")


def write_dataset(shared: Path, shape: Shape, num_rows: int) -> None:
    """Prompts as text, in the model's chat format if it has one; every nineteenth sum, small and large ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "model")
    sums = [json.loads(line) for line in ADDITION.read_text(encoding="utf-8").splitlines()]

    def as_prompt(text: str) -> str:
        if tokenizer.chat_template is None:
            return text
        message = {"role": "user", "content": text}
        return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)

    def row(first: int) -> dict[str, Any]:
        examples, number = "", first
        while True:
            prompt = as_prompt(examples + sums[first % len(sums)]["question"])
            tokens = len(tokenizer(prompt)["input_ids"])
            if tokens >= shape.prompt_tokens:
                return {"prompt": prompt, "answer": "-", "tokens": tokens}
            number += 7
            examples += "{question} {answer}\n".format_map(sums[number % len(sums)])

    rows = [row(19 * i) for i in range(num_rows)]
    print(f"Prompts of {min(each['tokens'] for each in rows)} to {max(each['tokens'] for each in rows)} tokens.")
    (shared / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    entry = {"file_name": "rows.json", "columns": {"prompt": "prompt", "response": "answer"}}
    (shared / "dataset_info.json").write_text(json.dumps({"rows": entry}), encoding="utf-8")


def read_rows(work_dir: Path) -> tuple[list[dict[str, Any]], int]:
    """And the tokens of the longest prompt."""
    rows = json.loads((work_dir.parent / "rows.json").read_text(encoding="utf-8"))
    return rows, max(row["tokens"] for row in rows)


def trainer_arguments(work_dir: Path, shape: Shape, num_steps: int) -> dict[str, Any]:
    """Trainer's own, which both sides have."""
    return {
        "output_dir": str(work_dir / "output"),
        "num_generations": shape.completions,
        "temperature": 1.0,
        "beta": 0.0,
        "loss_type": "dapo",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_steps": num_steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 42,
        "use_cpu": not shape.on_cuda,
        "bf16": shape.on_cuda,
        "dataloader_pin_memory": False,
    }


# The sides, each in its process


def train_ours(_: str, work_dir: Path, shape: Shape, num_steps: int) -> None:
    from llamafactory.train.tuner import run_exp
    from measuring import measured_run

    from grpo_stage.collector import Collector

    longest = read_rows(work_dir)[1]
    recipe = trainer_arguments(work_dir, shape, num_steps) | {
        "model_name_or_path": str(work_dir.parent / "model"),
        "stage": "grpo",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": LORA_RANK,
        "lora_target": "all",
        "disable_gradient_checkpointing": not shape.on_cuda,
        "use_reentrant_gc": False,
        "dataset": "rows",
        "dataset_dir": str(work_dir.parent),
        "disable_shuffling": True,
        "template": "empty",  # the prompts are in the chat format already
        "cutoff_len": longest + 1,
        "rollout_backend": "vllm" if shape.on_cuda else "hf",
        "max_new_tokens": shape.completion_tokens,
        "reward_funcs": f"{Path(__file__).resolve()}:{number_of_text.__name__}",
        "max_tokens_per_micro_batch": shape.micro_batch * (longest + shape.completion_tokens),
        "per_device_train_batch_size": shape.prompts,
        **({"vllm_gpu_util": VLLM_SHARE} if shape.on_cuda else {}),
    }
    run_exp(recipe, [measured_run(Collector, "collect", work_dir, shape.on_cuda)])


def train_trl(side: str, work_dir: Path, shape: Shape, num_steps: int) -> None:
    if side == "trl_0_24":
        repair_trl()
    import trl
    from datasets import Dataset
    from measuring import measured_run
    from peft import LoraConfig
    from transformers import AutoTokenizer

    assert trl.__version__.startswith(side.removeprefix("trl_").replace("_", ".")), f"this is TRL {trl.__version__}"
    model, (rows, longest) = str(work_dir.parent / "model"), read_rows(work_dir)
    vllm = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": VLLM_SHARE,
        "vllm_max_model_length": longest + shape.completion_tokens + 1,
        "vllm_importance_sampling_correction": False,  # as in our recipe; a pass less
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    measured = measured_run(trl.GRPOTrainer, "_generate_and_score_completions", work_dir, shape.on_cuda)
    lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: number_of_text(completions),
        args=trl.GRPOConfig(
            **trainer_arguments(work_dir, shape, num_steps),
            per_device_train_batch_size=shape.micro_batch,  # completions; one optimizer step trains on all
            gradient_accumulation_steps=shape.prompts * shape.completions // shape.micro_batch,
            max_completion_length=shape.completion_tokens,
            shuffle_dataset=False,
            gradient_checkpointing=shape.on_cuda,
            model_init_kwargs={"dtype": "bfloat16" if shape.on_cuda else "float32"},
            **({"max_prompt_length": None} if side == "trl_0_24" else {}),
            **(vllm if shape.on_cuda else {}),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=lora,
        callbacks=[measured],
    )
    trainer.train()


def repair_trl() -> None:
    """Make trl 0.24 train on transformers 5: its import flags became tuples (always true), and a class lost a dict."""
    import transformers
    from trl import import_utils

    for name, value in list(vars(import_utils).items()):
        if name.endswith("_available") and isinstance(value, tuple):
            setattr(import_utils, name, value[0])
    import_utils._vllm_available = False  # any later vllm lacks what it imports
    transformers.PreTrainedModel.warnings_issued = {}


def print_table(settings: dict[str, Any], results: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    others = [result for side, result in results.items() if side != "ours"]
    is_comparison = "ours" in results and bool(others)
    title = "{name}: {prompts} prompts of {prompt_tokens} tokens x {completions} completions of {completion_tokens}"
    table = Table("", *(SIDES[side] for side in results), "ours / best TRL", title=title.format_map(settings))
    for key in next(iter(results.values())):
        best = min((result[key] for result in others), default=0.0)
        ratio = f"{results['ours'][key] / best:.2f}" if is_comparison and best > 0 and key != "mean_length" else ""
        table.add_row(key, *(f"{result[key]:.3f}" for result in results.values()), ratio)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
