"""What a rollout with vLLM takes beside the engine alone on the same requests: what of the time is the stage's own.

    python benchmarks/rollout_ratio.py quickstart/model [--prompts 8] [--group 8] [--prompt 45] [--completion 16]
                                       [--reward-ms 20] [--all]

Prints a line for each value of `vllm_lora` (an adapter of rank 16 on all linear layers). Both ways of a line run in
one engine, in turn, with an empty prefix cache: `stage` is `VLLMEngine.generate`, whose completions are ready for
rewards; `engine` is `vllm.LLM.generate` with the requests that it made; `ratio` is engine / stage of the medians.
`sync` is the delivery of the weights, which comes once a rollout. The completions' lengths are drawn evenly from 1 to
the stated one.

`overlap` says what rewards beside generation would save, for a function in a process of its own that is called once
after the rollout, against a call for each group as soon as its last completion is there: `rewards_...` for a function
that takes `--reward-ms` a completion, `call...` for one that takes as long for a call of any number of completions.
It is computed from when each request ended; nobody is called.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import now
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_stage.rollout.engines import vllm as own_engine
from grpo_stage.rollout.engines.vllm import VLLMEngine
from grpo_stage.rollout.engines.vllm_settings import VLLMSettings
from grpo_stage.types import Prompt, SamplingSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="completions a prompt")
    parser.add_argument("--prompt", type=int, default=45, help="tokens")
    parser.add_argument("--completion", type=int, default=16, help="tokens at most")
    parser.add_argument("--repeats", type=int, default=5, help="after a first one that warms up")
    parser.add_argument("--reward-ms", type=float, default=20)
    parser.add_argument("--all", action="store_true", help="the seconds of every repeat as well")
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    policy = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    for vllm_lora in ("native", "merged"):
        settings = VLLMSettings(
            model_name_or_path=str(args.model),
            adapter=vllm_lora == "native",
            max_model_len=args.prompt + args.completion,
            max_lora_rank=16,
            gpu_memory_utilization=0.3,
            enforce_eager=False,
            dtype=str(dtype).removeprefix("torch."),
            logprob_temperature=None,
        )
        engine = VLLMEngine(settings, AutoTokenizer.from_pretrained(args.model))
        try:
            seconds, ends = measure(engine, policy, args)
        finally:
            engine.close()
        medians = {name: median(each[1:]) for name, each in seconds.items()}
        result = {"vllm_lora": vllm_lora, "ratio": medians["engine"] / medians["stage"]}
        result |= {f"{name}_s": each for name, each in medians.items()}
        result |= {"overlap": overlap(ends, args.group, args.reward_ms / 1000)}
        print(json.dumps(result | ({"all_s": seconds} if args.all else {})), flush=True)


def measure(
    engine: VLLMEngine, policy: Any, args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[int, float]]:
    """Seconds of each repeat by name; and when each request of the last one ended, by its number."""
    sampling = SamplingSettings(num_generations=args.group, max_new_tokens=args.completion, temperature=1.0)
    generate, step = engine._llm.generate, engine._llm.llm_engine.step
    make_params = own_engine._sampling_params
    requests: list[Any] = []
    ends: dict[int, float] = {}
    lengths = torch.Generator()

    def with_length(*arguments: Any) -> Any:
        params = make_params(*arguments)
        params.max_tokens = int(torch.randint(1, args.completion + 1, (), generator=lengths))
        return params

    def noted(*arguments: Any, **keywords: Any) -> Any:
        requests[:] = [arguments, keywords]
        return generate(*arguments, **keywords)

    def step_noted() -> Any:
        outputs = step()
        ends.update({int(output.request_id): now() for output in outputs if output.finished})
        return outputs

    own_engine._sampling_params, engine._llm.generate = with_length, noted
    seconds: dict[str, list[float]] = {"sync": [], "stage": [], "engine": []}
    for number in range(args.repeats + 1):
        lengths.manual_seed(number)
        prompts = [
            Prompt(index=i, token_ids=tuple(ids), messages=(), reference=None)
            for i, ids in enumerate(torch.randint(300, 9000, (args.prompts, args.prompt)).tolist())
        ]
        started = now()
        engine.sync(policy, number)
        seconds["sync"].append(now() - started)
        started = now()
        engine.generate(prompts, sampling, number)
        seconds["stage"].append(now() - started)
        arguments, keywords = requests
        assert engine._llm.reset_prefix_cache()
        ends.clear()
        engine._llm.llm_engine.step = step_noted
        started = now()
        generate(*arguments, **keywords)
        seconds["engine"].append(now() - started)
        del engine._llm.llm_engine.step
    own_engine._sampling_params = make_params
    first = min(ends)
    return seconds, {request - first: end - started for request, end in ends.items()}


def overlap(ends: dict[int, float], group: int, reward_s: float) -> dict[str, float]:
    """Seconds from the rollout's start to the last reward."""
    of_groups = sorted(max(ends[i] for i in range(start, start + group)) for start in range(0, len(ends), group))
    of_completions = of_calls = 0.0
    for end in of_groups:  # one process: a group waits for the one before
        of_completions = max(of_completions, end) + group * reward_s
        of_calls = max(of_calls, end) + reward_s
    last = of_groups[-1]
    return {
        "first_group_s": of_groups[0],
        "last_group_s": last,
        "rewards_after_s": last + len(ends) * reward_s,
        "rewards_by_group_s": of_completions,
        "call_after_s": last + reward_s,
        "calls_by_group_s": of_calls,
    }


if __name__ == "__main__":
    main()
