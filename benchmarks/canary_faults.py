"""How soon the canary finds each fault of delivery in half precision, and whether it is quiet without one.

    python benchmarks/canary_faults.py --engine vllm --tuning lora --rates 1e-3 1e-4 1e-5 --steps 200 [MODEL]

A model trains for real in bf16 (REINFORCE against the group's mean, AdamW) on its own completions, which an engine
samples that gets other weights than it should. Without a MODEL it is a random Llama of two layers. Prints a row a run:
the step at which the slope test stopped it, and the last slopes with their errors.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo_stage.monitors.canary import StaleRolloutError
from grpo_stage.monitors.slope_test import SlopeTest
from grpo_stage.rollout.engines.hf import HFEngine
from grpo_stage.rollout.engines.vllm import VLLMEngine
from grpo_stage.rollout.engines.vllm_settings import VLLMSettings
from grpo_stage.types import Prompt, RolloutEngine, RolloutGroup, SamplingSettings
from grpo_stage.update.attention import attention_of
from grpo_stage.update.batch import SharedPromptLayout, rows_of
from grpo_stage.update.logprobs import Forward


FAULTS = ("none", "one behind", "half", "twice", "base", "not delivered")
BREAKS_AT = 5
"""The sync from which `not delivered` is true: before it everything arrives."""
MAX_NEW_TOKENS, VOCABULARY, STOP = 16, 256, 2


class Run:
    """A policy that trains and an engine that samples for it."""

    def __init__(self, engine: RolloutEngine, model: torch.nn.Module, tuning: str, rate: float, device: str) -> None:
        self.engine, self.device, self.adapter = engine, torch.device(device), tuning == "lora"
        torch.manual_seed(0)
        self.policy: Any = copy.deepcopy(model)
        if self.adapter:
            self.policy = get_peft_model(
                self.policy, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)
            )
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        for parameter in self.trained:  # as the host does
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate)
        self.initial = [p.detach().clone() for p in self.trained]
        self.before = self.initial
        self.delivered = self.initial
        generator = torch.Generator().manual_seed(1)
        vocabulary = model.config.vocab_size
        self.prompts = [
            Prompt(
                index=i,
                token_ids=tuple(torch.randint(8, vocabulary, (3 + i,), generator=generator).tolist()),
                messages=(),
                reference=None,
            )
            for i in range(8)
        ]
        self.slope = SlopeTest(
            backend="engine",
            score=self.score,
            adapter_off=self.policy.disable_adapter if self.adapter else None,
            prompts=self.prompts,
        )
        self.sampling = SamplingSettings(
            num_generations=4, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, stop_token_ids=(STOP,), seed=0
        )

    def step(self, version: int, fault: str) -> dict[str, float]:
        with self._holding(self._weights(version, fault)):
            self.engine.sync(self.policy, version)
        self.before = [p.detach().clone() for p in self.trained]
        with self._holding(self.delivered if isinstance(self.engine, HFEngine) else self.before):
            groups = self.engine.generate(self.prompts, self.sampling, version)
        engine = _Holding(self) if isinstance(self.engine, HFEngine) else self.engine
        figures = self.slope.check(self.slope.ask(engine, groups, version), groups, version)
        self._learn(groups)
        return figures

    def score(self, groups: Any) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return tuple(each.detach().cpu() for each in self._logprobs(groups))

    def _weights(self, version: int, fault: str) -> list[torch.Tensor]:
        """What the engine gets in place of the policy's weights."""
        now = [p.detach().clone() for p in self.trained]
        share = {"half": 0.5, "twice": 2.0, "base": 0.0}.get(fault)
        if share is not None:
            # Of an adapter its product counts: B starts at 0, and A stays what it is.
            names = [name for name, p in self.policy.named_parameters() if p.requires_grad]
            now = [
                new if "lora_A" in name else old + share * (new - old)
                for name, old, new in zip(names, self.initial, now, strict=True)
            ]
        elif fault == "one behind":
            now = self.before
        elif fault == "not delivered" and version >= BREAKS_AT:
            now = self.delivered
        self.delivered = now
        return now

    @contextmanager
    def _holding(self, weights: list[torch.Tensor]) -> Iterator[None]:
        own = [p.data for p in self.trained]
        for parameter, data in zip(self.trained, weights, strict=True):
            parameter.data = data
        try:
            yield
        finally:
            for parameter, data in zip(self.trained, own, strict=True):
                parameter.data = data

    def _logprobs(self, groups: Any) -> list[torch.Tensor]:
        rows, layout = rows_of(groups), SharedPromptLayout(pad_token_id=0, device=self.device)
        result: dict[int, torch.Tensor] = {}
        for positions in layout.split(rows, max_tokens=1 << 14):
            batch = layout.tokens([rows[position] for position in positions])
            attending = attention_of(self.policy, batch.inputs.shared_prompts)
            with attending, torch.autocast(self.device.type, torch.bfloat16):
                logprobs = Forward(layout).statistics(self.policy, batch, 1.0).logprobs
            for own, position in zip(logprobs, positions, strict=True):
                result[position] = own[: len(rows[position].completion.token_ids)]
        return [result[position] for position in sorted(result)]

    def _learn(self, groups: list[RolloutGroup]) -> None:
        """Towards tokens of the lower half of the vocabulary."""
        half = self.policy.config.vocab_size // 2
        advantages = []
        for group in groups:
            rewards = torch.tensor([sum(t < half for t in c.token_ids) / len(c.token_ids) for c in group.completions])
            advantages += ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()
        logprobs = self._logprobs(groups)
        loss = -sum(a * each.mean() for a, each in zip(advantages, logprobs, strict=True)) / len(logprobs)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class _Holding:
    """The hf engine samples from the live policy: a fault of delivery is to give it other weights for the time."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def score(self, groups: Any) -> list[torch.Tensor]:
        with self._run._holding(self._run.delivered):
            return self._run.engine.score(groups)


def tiny_model(folder: Path, vocabulary: int = VOCABULARY, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
            num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.15,
            pad_token_id=0, bos_token_id=1, eos_token_id=STOP,
        )
    ).to(torch.bfloat16)  # fmt: skip
    model.save_pretrained(folder)
    return model


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """Any will do: completions' texts are not looked at."""
    words = {f"w{i}": i for i in range(vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0", eos_token=f"w{STOP}"
    )


def start_engine(kind: str, folder: str, tuning: str, vocabulary: int) -> RolloutEngine:
    tokenizer = tokenizer_of(vocabulary)
    if kind == "hf":
        return HFEngine(tokenizer, autocast_dtype=torch.bfloat16)
    settings = VLLMSettings(
        model_name_or_path=folder,
        adapter=tuning == "lora",
        max_model_len=128,
        max_lora_rank=8,
        gpu_memory_utilization=0.06,
        enforce_eager=True,
        dtype="bfloat16",
        logprob_temperature=None,
        options={"kv_cache_memory_bytes": 1 << 28},
    )
    return VLLMEngine(settings, tokenizer)


def run(
    engine: RolloutEngine, model: Any, tuning: str, rate: float, fault: str, steps: int, device: str
) -> tuple[int | None, dict[str, float]]:
    """The step that the slope test stopped at, None if it did not, and the last figures."""
    training = Run(engine, model, tuning, rate, device)
    figures: dict[str, float] = {}
    for version in range(steps):
        try:
            figures = training.step(version, fault)
        except StaleRolloutError:
            return version, figures
    return None, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--engine", choices=("hf", "vllm"), default="vllm")
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 1e-4, 1e-5])
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="rows as JSON lines")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            model: Any = tiny_model(Path(folder))
        else:
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        engine = start_engine(options.engine, options.model or folder, options.tuning, model.config.vocab_size)
        model = model.to(options.device)
        try:
            for rate in options.rates:
                for fault in options.faults:
                    started = time.perf_counter()
                    found, figures = run(engine, model, options.tuning, rate, fault, options.steps, options.device)
                    slopes = {name: round(value, 3) for name, value in figures.items()}
                    row = {
                        "engine": options.engine, "tuning": options.tuning, "rate": rate, "fault": fault,
                        "found": found, **slopes, "s": round(time.perf_counter() - started, 1),
                    }  # fmt: skip
                    print(json.dumps(row), flush=True)
                    if options.output:
                        with open(options.output, "a", encoding="utf-8") as file:
                            file.write(json.dumps(row) + "\n")
        finally:
            engine.close()


if __name__ == "__main__":
    main()
