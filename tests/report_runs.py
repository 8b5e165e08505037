"""Folders of runs that never ran, for the tests of `grpo-stage report`."""

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


PHASES = ("sync", "rollout", "reward", "logprobs", "update")


def log_line(step: int, total: int, noise: random.Random) -> dict[str, Any]:
    """A line of a run that learns: rewards rise, entropy falls, completions grow."""
    done = step / total
    reward = 0.1 + 0.7 / (1 + math.exp(-8 * (done - 0.4))) + noise.gauss(0, 0.04)
    times = {f"time/{name}": 0.4 + 0.3 * i + noise.random() * 0.2 for i, name in enumerate(PHASES)}
    line = {
        "current_steps": step,
        "total_steps": total,
        "percentage": round(100 * done, 2),
        "elapsed_time": _time(int(step * 6.5)),
        "remaining_time": _time(int((total - step) * 6.5)),
        "epoch": done,
        "lr": 3e-4 * (1 - done),
        "learning_rate": 3e-4 * (1 - done),
        "loss": noise.gauss(0, 0.01),
        "reward": reward,
        "reward_std": max(0.0, 0.4 - 0.3 * done + noise.gauss(0, 0.03)),
        "frac_reward_zero_std": min(1.0, max(0.0, 0.2 + 0.5 * done + noise.gauss(0, 0.1))),
        "rewards/accuracy/mean": reward - 0.05,
        "rewards/format/mean": min(1.0, reward + 0.1),
        "entropy": 1.6 - 1.2 * done + noise.gauss(0, 0.05),
        "kl": 0.08 * done + abs(noise.gauss(0, 0.004)),
        "grad_norm": abs(noise.gauss(0.6, 0.15)),
        "clip_ratio/low_mean": abs(noise.gauss(0, 0.002)),
        "clip_ratio/high_mean": abs(noise.gauss(0, 0.004)),
        "completions/mean_length": 90 + 140 * done + noise.gauss(0, 8),
        "completions/min_length": 20 + noise.gauss(0, 4),
        "completions/max_length": 256.0,
        "completions/clipped_ratio": min(1.0, max(0.0, 0.3 - 0.2 * done + noise.gauss(0, 0.03))),
        "sampling/sampling_logp_difference/mean": abs(noise.gauss(5e-6, 1e-6)),
        "num_tokens": 8000.0 * step,
        "rollout_tokens_per_second": noise.gauss(900, 50),
        "step_time": sum(times.values()) + 0.3,
        **times,
    }
    return line


def _time(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def write_lines(path: Path, records: Iterable[Mapping[str, Any] | str]) -> None:
    """Write a line for each record; a text is a line as it is."""
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            line = record if isinstance(record, str) else json.dumps(record)
            file.write(f"{line}\n")


def write_log(folder: Path, num_steps: int, seed: int = 0, eval_steps: int = 0) -> None:
    """A log in a folder that is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = random.Random(seed)

    def lines() -> Iterable[dict[str, Any]]:
        for step in range(1, num_steps + 1):
            yield (line := log_line(step, num_steps, noise))
            if eval_steps and step % eval_steps == 0:
                evaluation = {"eval_reward": line["reward"] - 0.06, "eval_rewards/accuracy/pass@4": 0.8}
                yield {"current_steps": step, "total_steps": num_steps, **evaluation}

    write_lines(folder / "trainer_log.jsonl", lines())


def completion(step: int, index: int = 0, text: str = "4", reward: float | None = 1.0, **more: Any) -> dict[str, Any]:
    """A line of completions.jsonl."""
    return {
        "step": step,
        "prompt_index": index,
        "prompt": f"What is {index} + 4?",
        "completion": text,
        "reference": str(index + 4),
        "rewards": {"accuracy": reward},
        "reward": reward,
        "advantage": 0.5,
        "num_tokens": 9,
        "finish_reason": "stop",
        "policy_version": step - 1,
        **more,
    }
