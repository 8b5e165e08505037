"""What one update costs: seconds and peak memory by completions, completion tokens and prompt tokens.

    python benchmarks/cost_slopes.py [--model quickstart/model] [--layers 6] [--picture costs.png] > costs.jsonl
    python benchmarks/cost_slopes.py --head [--picture head.png] > head.jsonl

An update is forward and backward of one group under LoRA, in one micro-batch, through the stage's own passes: in both
layouts (shared prompts and padded rows), with logits in chunks and whole. One length changes at a time, the others
stay at `MIDDLE`. The last line of a series has the slopes of straight lines through it; `r2` says how well the seconds
lie on theirs. Memory is what the process (on CUDA torch) held at most above what it held before. `--layers` keeps the
model's first layers alone: all of SmolLM2-135M's take 29 GB at the longest prompt. `--head` is the output layer alone,
by the size of the vocabulary: with chunks its memory should stay flat.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measuring import ProcessMemory, now

from grpo_stage.types import Completion, FinishReason, Prompt
from grpo_stage.update.attention import attention_of
from grpo_stage.update.batch import PaddedLayout, Row, SharedPromptLayout
from grpo_stage.update.head import OutputLayer, statistics_of_logits
from grpo_stage.update.logprobs import Forward


LAYOUTS = {"shared prompts": SharedPromptLayout, "padded rows": PaddedLayout}
LABELS = {"seconds": "seconds", "peak_gib": "peak memory, GiB"}
ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
MIDDLE = {"completions": 8, "completion_tokens": 64, "prompt_tokens": 256}
SERIES = {
    "completions": [4, 8, 16, 32],
    "completion_tokens": [32, 64, 128, 256],
    "prompt_tokens": [64, 256, 512, 1024, 2048],
}
VOCABULARIES, HEAD_HIDDEN, HEAD_TOKENS = [2**15, 2**16, 2**17, 2**18], 576, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("quickstart/model"))
    parser.add_argument("--layers", type=int, help="of the model; all by default")
    parser.add_argument("--head", action="store_true", help="the output layer alone")
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes by this, to see that it runs")
    parser.add_argument("--repeats", type=int, default=3, help="updates at each point, after a first one; the median")
    parser.add_argument("--picture", type=Path, help="draw the series here")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = None if args.head else load_model(args.model, args.layers)
    series = []
    for is_chunked, layout in product((True, False), ["head"] if args.head else LAYOUTS):
        names = {"layout": layout, "logits": "in parts" if is_chunked else "whole"}
        for axis, values in ({"vocabulary": VOCABULARIES} if args.head else SERIES).items():
            points: list[dict[str, Any]] = []
            for value in (max(1, value // args.shrink) for value in values):
                if args.head:
                    run = head_pass(is_chunked, value, HEAD_TOKENS // args.shrink)
                else:
                    sizes = {name: max(2, middle // args.shrink) for name, middle in MIDDLE.items()} | {axis: value}
                    run = update(model, Forward(LAYOUTS[layout](0, DEVICE), is_chunked), **sizes)
                points.append(names | {axis: value} | measured(run, args.repeats))
                print(json.dumps(points[-1]), flush=True)
            print(json.dumps(names | {"by": axis} | slopes(points, axis)), flush=True)
            series.append((axis, points))
    if args.picture:
        draw(series, args.picture)


def load_model(folder: Path, num_layers: int | None) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(DEVICE)
    del model.model.layers[num_layers:]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def update(
    model: Any, forward: Forward, completions: int, completion_tokens: int, prompt_tokens: int
) -> Callable[[], None]:
    def random_ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(model.config.vocab_size, (length,)).tolist())

    prompt = Prompt(index=0, token_ids=random_ids(prompt_tokens), messages=(), reference=None)
    completion = partial(Completion, sampling_logprobs=(), finish_reason=FinishReason.LENGTH, text="")
    rows = [Row(prompt, completion(token_ids=random_ids(completion_tokens))) for _ in range(completions)]

    def run() -> None:
        batch = forward.layout.tokens(rows)
        with attention_of(model, batch.inputs.shared_prompts):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_CUDA):
                logprobs = forward.statistics(model, batch, temperature=1.0).logprobs
            logprobs.mean().backward()
        model.zero_grad()

    return run


def head_pass(is_chunked: bool, vocabulary: int, num_tokens: int) -> Callable[[], None]:
    """Log-probabilities from a frozen layer, and the gradient of its hidden states."""
    layer = torch.nn.Linear(HEAD_HIDDEN, vocabulary, bias=False, device=DEVICE).requires_grad_(False)
    hidden = torch.randn(num_tokens, HEAD_HIDDEN, device=DEVICE, requires_grad=True)
    targets = torch.randint(vocabulary, (num_tokens,), device=DEVICE)

    def run() -> None:
        if is_chunked:
            statistics = OutputLayer(layer, vocabulary).statistics(hidden, targets, temperature=1.0)
        else:
            statistics = statistics_of_logits(layer(hidden), targets, temperature=1.0)
        statistics.logprobs.mean().backward()

    return run


def measured(run: Callable[[], None], repeats: int) -> dict[str, float]:
    run()
    memory, before = ProcessMemory(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats() if ON_CUDA else None
    seconds = []
    for _ in range(repeats):
        started = now()
        run()
        seconds.append(now() - started)
    peak_gib = (torch.cuda.max_memory_allocated() - before) / 2**30 if ON_CUDA else memory.peak_gib()
    return {"seconds": median(seconds), "peak_gib": peak_gib}


def slopes(points: list[dict[str, Any]], axis: str) -> dict[str, float]:
    values, seconds, gib = ([point[key] for point in points] for key in (axis, "seconds", "peak_gib"))
    return {
        "seconds_per_one": float(np.polyfit(values, seconds, 1)[0]),
        "gib_per_one": float(np.polyfit(values, gib, 1)[0]),
        "r2": float(np.corrcoef(values, seconds)[0, 1] ** 2),
        "gib_last_by_first": gib[-1] / gib[0],
    }


def draw(series: list[tuple[str, list[dict[str, Any]]]], file: Path) -> None:
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(axis for axis, _ in series))
    _, panels = plt.subplots(2, len(names), figsize=(4.5 * len(names), 7), squeeze=False, layout="constrained")
    for axis, points in series:
        for row, key in zip(panels, LABELS, strict=True):
            panel, label = row[names.index(axis)], f"{points[0]['layout']}, logits {points[0]['logits']}"
            panel.plot([point[axis] for point in points], [point[key] for point in points], "o-", label=label)
            panel.set(xlabel=axis.replace("_", " "), ylabel=LABELS[key])
    for panel in panels.flat:
        panel.set(xlim=0, ylim=0)
    panels[0, 0].legend()
    plt.savefig(file)


if __name__ == "__main__":
    main()
