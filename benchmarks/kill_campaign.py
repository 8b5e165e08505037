"""A short run that is killed or stopped at random moments, again and again, and goes on by the same command.

    python benchmarks/kill_campaign.py --folder saves/kill_campaign [--kills 60] [--seed 0] [--minutes 25]

The run is `llamafactory-cli train` on a tiny random model: dynamic sampling, two uses of every rollout, evaluations, a
save every two steps, a reward function that leaves programs behind, and the final evaluation. A trial is one run until
its end, with an interruption of each of its processes; then the next trial begins, in a folder of its own. Each trial
is compared with a run that was left alone: log lines but for times, completions, the model's bytes, the results of the
final evaluation. After each process none of what it has started may be left. Exits with 1 where anything differs.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


SIGNALS = ("SIGKILL", "SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
TIMES = re.compile(r"time|per_second|runtime|percentage|train_loss|memory/|tflops|mfu")
BEFORE = "in the first second"
MARK = "GRPO_STAGE_KILL_CAMPAIGN"
REWARD = '''
import subprocess


def shorter(completion_ids, references):
    """Fewer tokens are better; every call leaves a program in a session of its own, and a daemon."""
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    subprocess.run(["sh", "-c", "(setsid sleep 1000 &) &"], check=True)
    return [-float(sum(token % 7 == 3 for token in ids)) for ids in completion_ids]
'''
RECIPE: dict[str, Any] = {
    "stage": "grpo",
    "do_train": True,
    "do_eval": True,
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "all",
    "template": "smollm2",
    "dataset": "sums",
    "val_size": 4,
    "cutoff_len": 64,
    "rollout_backend": "hf",
    "num_generations": 4,
    "max_new_tokens": 16,
    "num_iterations": 2,
    "dynamic_sampling": True,
    "per_device_train_batch_size": 2,
    "learning_rate": 1.0e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 12,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "eval_num_generations": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 3,
    "log_completions": True,
    "plot_loss": True,
    "use_cpu": True,
    "report_to": "none",
    "disable_gradient_checkpointing": True,
    "dataloader_pin_memory": False,
    "seed": 7,
}


@dataclass
class Interruption:
    trial: int
    sign: str
    after_s: float
    phase: str
    exit_code: int
    left: list[int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=25.0, help="begin no further trial after that long")
    args = parser.parse_args()
    if args.folder.exists():
        sys.exit(f"{args.folder} is there already: remove it, or name another --folder.")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, in what it starts as well
    began, chance, folder = time.monotonic(), random.Random(args.seed), args.folder.absolute()
    write_inputs(folder)
    reference = Run(folder, "whole")
    seconds = reference.to_its_end()
    expected = reference.outcome()
    load_s = seconds - reference.training_s
    print(f"left alone: {seconds:.1f} s, {reference.training_s:.1f} s of them training and the end", flush=True)

    kills: list[Interruption] = []
    trials, differing = 0, []
    while len(kills) < args.kills and time.monotonic() - began < 60 * args.minutes:
        trials += 1
        run = Run(folder, f"trial_{trials}")
        while len(kills) < args.kills:
            # One in six in the imports, the data and the model; the others in training, its saves and its end.
            is_early = chance.random() < 1 / 6
            after = chance.uniform(0, load_s) if is_early else chance.uniform(0, 1.1 * reference.training_s)
            kill = run.interrupt(trials, chance.choice(SIGNALS), after, is_early)
            if kill is None:
                break
            kills.append(kill)
            print(
                f"{len(kills):3}  trial {trials:2}  {kill.sign:7}  {kill.phase:28}  exit {kill.exit_code:4}"
                f"{f'  LEFT RUNNING: {kill.left}' if kill.left else ''}",
                flush=True,
            )
        run.to_its_end()
        different = [name for name, value in run.outcome().items() if value != expected[name]]
        print(f"trial {trials} ended: {'DIFFERENT ' + ', '.join(different) if different else 'the same'}", flush=True)
        differing += [f"trial {trials}: {name}" for name in different]
    wrong = [kill for kill in kills if kill.left or kill.exit_code not in expected_codes(kill)]
    print(
        f"{len(kills)} interruptions in {trials} trials, {(time.monotonic() - began) / 60:.1f} min: "
        f"{trials - len({each.partition(':')[0] for each in differing})} trials equal to the run left alone; "
        f"{len(wrong)} with another exit code or processes left"
    )
    for each in (*differing, *wrong):
        print(each)
    sys.exit(1 if differing or wrong else 0)


def expected_codes(kill: Interruption) -> set[int]:
    number = int(signal.Signals[kill.sign])
    if kill.sign == "SIGKILL":
        return {-number}
    # The interpreter's own start and end, where Python has no handlers.
    has_no_handler = kill.phase == BEFORE or "model card" in kill.phase
    return {128 + number} | ({-number} if has_no_handler else set())


class Run:
    """One output folder, and the command that is given again and again."""

    def __init__(self, folder: Path, name: str) -> None:
        self.output, self.log = folder / name, folder / f"{name}.log"
        self.mark = f"{name}-{os.getpid()}"
        self.training_s = 0.0
        recipe = folder / f"{name}.yaml"
        values = RECIPE | {
            "model_name_or_path": str(folder / "model"),
            "dataset_dir": str(folder / "data"),
            "reward_funcs": f"{folder / 'reward.py'}:shorter",
            "output_dir": str(self.output),
        }
        recipe.write_text(json.dumps(values, indent=1).replace("\n}", "\n}\n"))
        self.command = [str(Path(sys.executable).with_name("llamafactory-cli")), "train", str(recipe)]

    def start(self) -> "subprocess.Popen[bytes]":
        environment = os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def to_its_end(self) -> float:
        """Seconds; a run that is at its end already ends with an error that says so."""
        began = time.monotonic()
        position = self.log.stat().st_size if self.log.exists() else 0
        process = self.start()
        self.await_training(process, position)
        trains_from = time.monotonic()
        code = process.wait()
        self.training_s = time.monotonic() - trains_from
        said = self.log.read_bytes()[position:]
        if code != 0 and b" is finished: it is at step" not in said:
            sys.exit(f"{self.output.name} ended with exit code {code}: see {self.log}")
        if left := self.left_running():
            sys.exit(f"{self.output.name} left {left} running")
        return time.monotonic() - began

    def interrupt(self, trial: int, sign: str, after: float, is_early: bool) -> Interruption | None:
        """None where the process came to its end before."""
        position = self.log.stat().st_size if self.log.exists() else 0
        process = self.start()
        if not is_early:
            self.await_training(process, position)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after)
        if process.poll() is not None:
            if process.returncode != 0 and b" is finished: it is at step" not in self.log.read_bytes()[position:]:
                sys.exit(f"{self.output.name} ended with exit code {process.returncode}: see {self.log}")
            return None
        phase = self.phase(is_early, after)
        process.send_signal(signal.Signals[sign])
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            sys.exit(f"{self.output.name} did not end within 60 s of {sign} in {phase}: see {self.log}")
        if code == 0:  # the signal came after the last thing that could be left
            return None
        return Interruption(trial, sign, after, phase, code, self.left_running())

    def await_training(self, process: "subprocess.Popen[bytes]", position: int) -> None:
        while process.poll() is None and b"completions an optimizer step" not in self.log.read_bytes()[position:]:
            time.sleep(0.02)

    def phase(self, is_early: bool, after: float) -> str:
        if is_early:
            return f"{after:.1f} s after the start" if after > 1 else BEFORE
        log = self.output / "trainer_log.jsonl"
        lines = log.read_bytes().splitlines() if log.exists() else []
        done = self.output / "grpo_finished.json"
        if done.exists():
            return f"end: {', '.join(json.loads(done.read_bytes())['parts'])} done"
        if any(self.output.glob(".tmp-*")):
            return f"in a save, log at line {len(lines)}"
        return f"log at line {len(lines)}"

    def left_running(self, patience_s: float = 10.0) -> list[int]:
        """Processes that this run started, found by a mark in their environment."""
        deadline = time.monotonic() + patience_s
        while (found := marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def outcome(self) -> dict[str, Any]:
        steps = [int(path.name.removeprefix("checkpoint-")) for path in self.output.glob("checkpoint-*")]

        def lines(name: str) -> list[dict[str, Any]]:
            records = [json.loads(line) for line in (self.output / name).read_text().splitlines()]
            return [untimed(record) for record in records]

        return {
            "trainer_log.jsonl": lines("trainer_log.jsonl"),
            "completions.jsonl": hashlib.sha256((self.output / "completions.jsonl").read_bytes()).hexdigest(),
            "adapter": hashlib.sha256((self.output / "adapter_model.safetensors").read_bytes()).hexdigest(),
            "eval_results.json": untimed(json.loads((self.output / "eval_results.json").read_text())),
            "all_results.json": untimed(json.loads((self.output / "all_results.json").read_text())),
            "files": sorted(path.name for path in self.output.iterdir() if not path.name.startswith("checkpoint-")),
            # A stop saves a checkpoint of its own step, so that others may be the last three.
            "checkpoints": (len(steps), max(steps)),
        }


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not TIMES.search(key)}


def marked(mark: str) -> list[int]:
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
        except OSError:  # gone, or another user's
            continue
    return found


def write_inputs(folder: Path) -> None:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from grpo_stage.tools.quickstart_model import load_tokenizer

    (folder / "data").mkdir(parents=True)
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(24)]
    (folder / "data/sums.json").write_text(json.dumps(rows))
    columns = {"prompt": "question", "response": "answer"}
    info = {"sums": {"file_name": "sums.json", "columns": columns}}
    (folder / "data/dataset_info.json").write_text(json.dumps(info))
    (folder / "reward.py").write_text(REWARD)
    tokenizer = load_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            **special,
        )
    )
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
