"""Seconds a step, memory and reward of `stage: grpo` beside TRL's GRPOTrainer, on one task.

    python benchmarks/compare_trl.py [--steps 5] [--sides ours trl] [--rollout-backend hf] [--json result.json]

Both sides train the same model with the same LoRA on the same prompts (the host's template, in the same order), group
size, lengths, objective and reward, and sample with transformers' generate. Each runs in a process of its own.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


REPOSITORY = Path(__file__).resolve().parent.parent
ADDITION = REPOSITORY / "yaml_examples" / "data" / "addition.jsonl"
PROMPT_LENGTH = 64
MICRO_BATCH = 8
"""Completions that go through the model at once, on both sides."""


def equals_answer(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """1 where the completion's only number is the answer: simple enough to be the same on both sides."""
    return [
        float(re.findall(r"\d+", completion) == [reference])
        for completion, reference in zip(completions, answer, strict=True)
    ]


def main() -> None:
    args = parse_arguments()
    if args.worker_dir:
        train_with_trl(args)
        return

    if not args.model.is_dir():
        sys.exit(f"{args.model} is no folder: make the model with `grpo-stage quickstart-model {args.model}`.")

    results = {}
    with tempfile.TemporaryDirectory(prefix="grpo-stage-bench-") as folder:
        for side in args.sides:
            work_dir = Path(folder) / side
            work_dir.mkdir()
            write_dataset(work_dir, args.steps * args.prompts)
            command = our_command(args, work_dir) if side == "ours" else trl_command(work_dir)
            print(f"== {side}: {' '.join(command)}", flush=True)
            peak_gib = run_measured(command, plugin=side == "ours")
            results[side] = {**summary(read_log(work_dir)), "peak_memory_gib": peak_gib}

    print_table(args, results)
    report = {"settings": {k: str(v) for k, v in vars(args).items() if k != "worker_dir"}, "results": results}
    print(json.dumps(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPOSITORY / "quickstart" / "model")
    parser.add_argument("--sides", nargs="+", choices=("ours", "trl"), default=["ours", "trl"])
    parser.add_argument("--rollout-backend", choices=("hf", "vllm"), default="hf", help="ours; TRL always uses hf")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step")
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--worker-dir", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_dataset(work_dir: Path, num_rows: int) -> None:
    """Every nineteenth sum, so that a short run meets small and large numbers."""
    rows = ADDITION.read_text(encoding="utf-8").splitlines()
    chosen = [rows[(19 * i) % len(rows)] for i in range(num_rows)]
    (work_dir / "addition.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    entry = {"file_name": "addition.jsonl", "columns": {"prompt": "question", "response": "answer"}}
    (work_dir / "dataset_info.json").write_text(json.dumps({"addition": entry}), encoding="utf-8")


def run_measured(command: list[str], plugin: bool) -> float:
    """Run to the end; returns the process's peak resident memory in GiB."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GRPO_STAGE_DISABLE": "0" if plugin else "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{command[0]} ended with {process.returncode}: there is nothing to compare.")

    return usage.ru_maxrss / 2**20


# Ours


def our_command(args: argparse.Namespace, work_dir: Path) -> list[str]:
    recipe = {
        "model_name_or_path": str(args.model.resolve()),
        "disable_gradient_checkpointing": True,
        "stage": "grpo",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": args.lora_rank,
        "lora_target": "all",
        "dataset": "addition",
        "dataset_dir": str(work_dir),
        "disable_shuffling": True,
        "template": "smollm2",
        "cutoff_len": PROMPT_LENGTH,
        "rollout_backend": args.rollout_backend,
        "num_generations": args.num_generations,
        "max_new_tokens": args.max_new_tokens,
        "temperature": 1.0,
        "reward_funcs": f"{Path(__file__).resolve()}:{equals_answer.__name__}",
        "loss_type": "dapo",
        "max_tokens_per_micro_batch": MICRO_BATCH * (PROMPT_LENGTH + args.max_new_tokens),
        "output_dir": str(work_dir / "output"),
        "per_device_train_batch_size": args.prompts,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": args.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": args.seed,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    path = work_dir / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return [str(Path(sys.executable).with_name("llamafactory-cli")), "train", str(path)]


# TRL


def trl_command(work_dir: Path) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--worker-dir", str(work_dir)]


def train_with_trl(args: argparse.Namespace) -> None:
    repair_trl()
    import time

    from datasets import load_dataset
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="smollm2"))

    def prompt_of(row: dict[str, str]) -> dict[str, str]:
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": ""}]
        return {"prompt": tokenizer.decode(template.encode_oneturn(tokenizer, messages)[0])}

    class TimedTrainer(GRPOTrainer):
        step_s = rollout_s = 0.0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            loss = super().training_step(*args, **kwargs)
            self.step_s += time.perf_counter() - started
            return loss

        def take_times(self) -> dict[str, float]:
            """Of the micro-steps since the last call, which make one optimizer step."""
            times = {
                "step_time": self.step_s,
                "time/rollout": self.rollout_s,
                "time/update": self.step_s - self.rollout_s,
            }
            self.step_s = self.rollout_s = 0.0
            return times

        def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            outputs = super()._generate_and_score_completions(*args, **kwargs)
            self.rollout_s += time.perf_counter() - started
            return outputs

    class LogWriter(TrainerCallback):
        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "reward" in logs:
                with log_path(args.worker_dir).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(logs | trainer.take_times()) + "\n")

    log_path(args.worker_dir).parent.mkdir()
    dataset = load_dataset(
        "json", data_files=str(args.worker_dir / "addition.jsonl"), split="train", cache_dir=str(args.worker_dir)
    )
    trainer = TimedTrainer(
        model=str(args.model),
        reward_funcs=lambda completions, answer, **kwargs: equals_answer(completions, answer),
        args=GRPOConfig(
            output_dir=str(args.worker_dir / "output"),
            per_device_train_batch_size=MICRO_BATCH,  # completions; one optimizer step trains on all
            gradient_accumulation_steps=args.prompts * args.num_generations // MICRO_BATCH,
            num_generations=args.num_generations,
            max_prompt_length=PROMPT_LENGTH,
            max_completion_length=args.max_new_tokens,
            temperature=1.0,
            beta=0.0,
            loss_type="dapo",
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            max_steps=args.steps,
            shuffle_dataset=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=dataset.map(prompt_of),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[LogWriter()],
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


# The report


def log_path(work_dir: Path) -> Path:
    return work_dir / "output" / "trainer_log.jsonl"


def read_log(work_dir: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in log_path(work_dir).read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "reward" in record]


def summary(records: list[dict[str, Any]]) -> dict[str, float]:
    """Means over all steps but the first, which warms up; where there is only one, that one."""
    steady = records[1:] or records

    def mean(*names: str) -> float:
        return sum(record.get(name, 0.0) for record in steady for name in names) / len(steady)

    return {
        "step_s": mean("step_time"),
        "rollout_s": mean("time/sync", "time/rollout", "time/reward"),
        "update_s": mean("time/update"),
        "first_step_s": records[0]["step_time"],
        "mean_length": mean("completions/mean_length"),
        "reward_first": records[0]["reward"],
        "reward_last": records[-1]["reward"],
    }


def print_table(args: argparse.Namespace, results: dict[str, dict[str, float]]) -> None:
    from importlib.metadata import version

    from rich.console import Console
    from rich.table import Table

    titles = {"ours": f"stage: grpo ({args.rollout_backend})", "trl": f"TRL {version('trl')} (hf)"}
    rows = {
        "seconds a step": "step_s",
        "  rollout and scoring": "rollout_s",
        "  update": "update_s",
        "first step": "first_step_s",
        "peak memory, GiB": "peak_memory_gib",
        "mean completion tokens": "mean_length",
        "mean reward, first step": "reward_first",
        "mean reward, last step": "reward_last",
    }
    table = Table(
        "",
        *(titles[side] for side in results),
        title=f"{args.prompts} prompts x {args.num_generations} completions of at most {args.max_new_tokens} tokens, "
        f"LoRA r={args.lora_rank}, {args.steps} steps",
    )
    for label, key in rows.items():
        table.add_row(label, *(f"{result[key]:.2f}" for result in results.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
