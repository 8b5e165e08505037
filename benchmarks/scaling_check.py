"""The simulation of `grpo-stage plan --layout` beside measured and published runs: `scaling_check.py [NAME ...]`.

Prints the rows of docs/scaling.md with their errors. No weights are loaded; models are shapes.
"""

import dataclasses
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_stage.layout.cards import CARDS, Card
from grpo_stage.layout.costs import EngineCost, ModelCost, Rates, Work, sync_seconds, update_cost
from grpo_stage.layout.simulation import Draw, fixed, roll_out, simulate, uniform
from grpo_stage.layout.syntax import Layout, parse_layout
from grpo_stage.memory.model_cost import model_cost
from grpo_stage.memory.sizes import sizes_of


def _dense(
    kind: str, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        **more,
    }


_TIED = {"tie_word_embeddings": True}
SHAPES = {
    "SmolLM2-135M": _dense("llama", 576, 1536, 30, 9, 3, 49152, **_TIED),
    "Qwen3-0.6B": _dense("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128, **_TIED),
    "Qwen2.5-1.5B": _dense("qwen2", 1536, 8960, 28, 12, 2, 151936, **_TIED),
    "Qwen3-1.7B": _dense("qwen3", 2048, 6144, 28, 16, 8, 151936, head_dim=128, **_TIED),
    "Qwen2.5-3B": _dense("qwen2", 2048, 11008, 36, 16, 2, 151936, **_TIED),
    "Qwen2.5-7B": _dense("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Llama-3.1-8B": _dense("llama", 4096, 14336, 32, 32, 8, 128256),
    "Llama-3.3-70B": _dense("llama", 8192, 28672, 80, 64, 8, 128256),
    "Qwen3-32B": _dense("qwen3", 5120, 25600, 64, 64, 8, 151936, head_dim=128),
    "Qwen2.5-32B": _dense("qwen2", 5120, 27648, 64, 40, 8, 152064),
    "Qwen2.5-72B": _dense("qwen2", 8192, 29568, 80, 64, 8, 152064),
    "Qwen3-30B-A3B": _dense(
        "qwen3_moe", 2048, 6144, 48, 32, 4, 151936, head_dim=128, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8,
    ),
    "Qwen3-235B-A22B": _dense(
        "qwen3_moe", 4096, 12288, 94, 64, 4, 151936, head_dim=128, moe_intermediate_size=1536, num_experts=128,
        num_experts_per_tok=8,
    ),
    "DeepSeek-V3": _dense(
        "deepseek_v3", 7168, 18432, 61, 128, 128, 129280, moe_intermediate_size=2048, n_routed_experts=256,
        num_experts_per_tok=8, n_shared_experts=1, n_group=8, topk_group=4, first_k_dense_replace=3, kv_lora_rank=512,
        q_lora_rank=1536, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
    ),
}  # fmt: skip
"""As published in the models' config.json."""
H20 = Card(name="H20", memory=96 * 2.0**30, flops=148e12, memory_bandwidth=4000e9, link=450e9, network=200e9)
H800 = dataclasses.replace(CARDS["H100"], name="H800", link=200e9)
"""Cards of published runs; NVIDIA has no public data sheets of them, so these are figures as commonly reported."""
CPU = Card(name="2 cores", memory=24 * 2.0**30, flops=0.14e12, memory_bandwidth=20e9, link=1e9, network=1e9)
"""0.11 to 0.17 TFLOP/s of matrix products in float32 (docs/performance.md); the bandwidth is assumed."""


@cache
def cost(name: str, *, lora: bool = False, itemsize: int = 2) -> ModelCost:
    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype={2: torch.bfloat16, 4: torch.float32}[itemsize])
        if lora:
            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    sizes = sizes_of(model)
    weights = float(itemsize * sizes.num_parameters)
    return model_cost(model, config, sizes, itemsize, engine_weights=weights, delivers_adapter=lora)


@dataclass(frozen=True)
class Row:
    """One figure."""

    what: str
    figure: float
    """Measured or published."""
    predict: Callable[[], float]
    source: str
    is_calibration: bool = False


def layout_of(text: str, card: Card | None = None) -> Layout:
    """A layout, with another card in the place of the one that it names."""
    layout = parse_layout(text)
    return layout if card is None else dataclasses.replace(layout, card=card, engine_card=card)


def update(
    name: str, card: Card, prompt: int, completion: int, groups: int, size: int, *, rates: Rates | None = None,
    lora: bool = True, itemsize: int = 2, **work: Any,
) -> Callable[[], float]:  # fmt: skip
    """Seconds of an update on one card."""

    def seconds() -> float:
        load = Work(num_prompts=groups, group_size=size, prompt_length=prompt, **work)
        model = cost(name, lora=lora, itemsize=itemsize)
        layout = layout_of("train 1xH200", card)
        return update_cost(layout, model, load, rates or Rates(), [[completion] * size] * groups).total

    return seconds


def rollout(
    name: str, card: Card, prompt: int, draw: Draw, groups: int, size: int, *, rates: Rates | None = None,
    itemsize: int = 2, num_cards: int = 1,
) -> Callable[[], float]:  # fmt: skip
    """Seconds of a rollout on one engine."""

    def seconds() -> float:
        random_ = random.Random(0)
        model = cost(name, itemsize=itemsize)
        engine = EngineCost(
            card=card, num_cards=num_cards, model=model, rates=rates or Rates(), memory=0.95 * card.memory
        )
        drawn = [[draw(random_) for _ in range(size)] for _ in range(groups)]
        return roll_out([engine], prompt, drawn).total

    return seconds


def token(name: str, card: Card, context: int, *, num_cards: int = 1, itemsize: float = 2) -> Callable[[], float]:
    """Milliseconds of a token of a single completion."""

    def milliseconds() -> float:
        model = cost(name)
        smaller = itemsize / 2
        model = dataclasses.replace(
            model, engine_weights=model.engine_weights * smaller, engine_experts=model.engine_experts * smaller
        )
        engine = EngineCost(card=card, num_cards=num_cards, model=model, rates=Rates(), memory=card.memory)
        return 1e3 * engine.decode(1, context).total

    return milliseconds


def prefill(name: str, card: Card, length: int, num_cards: int) -> Callable[[], float]:
    """Milliseconds to the first token."""

    def milliseconds() -> float:
        engine = EngineCost(card=card, num_cards=num_cards, model=cost(name), rates=Rates(), memory=card.memory)
        return 1e3 * (engine.prefill(length) + Rates().token_s)

    return milliseconds


def sync(name: str, layout: str, *, card: Card | None = None, lora: bool = False) -> Callable[[], float]:
    """Seconds of a delivery."""
    return lambda: sync_seconds(layout_of(layout, card), cost(name, lora=lora), Rates())


def exponential(mean: float, longest: int) -> Draw:
    """Lengths of a published mean and longest; how they spread is not published."""
    return lambda random_: max(1, min(longest, round(random_.expovariate(1 / mean))))


def step(
    name: str,
    layout: str,
    work: Work,
    draw: Draw,
    *,
    card: Card | None = None,
    part: str = "step",
    util: float = 0.9,
    rates: Rates | None = None,
) -> Callable[[], float]:
    """Seconds of a step, or of a part of it."""

    def seconds() -> float:
        place = layout_of(layout, card)
        model = cost(name)
        outcome = simulate(place, model, work, util * place.engine_card.memory, draw, num_steps=2, rates=rates)
        return float(getattr(outcome, part))

    return seconds


def nemo(cards: int, *, ahead: bool = False) -> Work:
    """NeMo-RL's performance recipes: 2,048 completions, 4 optimizer steps, 2 passes of log-probabilities."""
    return Work(
        num_prompts=64 // cards if cards <= 64 else 1, group_size=32 if cards <= 64 else 32 * 64 // cards,
        prompt_length=150, num_optimizer_steps=4, num_scorings=2, max_tokens=4096, checkpointing=True,
        shares_prompts=False, runs_ahead=ahead,
    )  # fmt: skip


def easyr1(ranks: int = 8) -> Work:
    """EasyR1's defaults: 512 prompts x 5, 4 optimizer steps, a reference and old log-probabilities."""
    return Work(
        num_prompts=512 // ranks, group_size=5, prompt_length=375, num_optimizer_steps=4, num_scorings=2,
        max_tokens=2700, shares_prompts=False,
    )  # fmt: skip


def verl(ranks: int) -> Work:
    """verl's fully asynchronous document, its synchronous rows: 512 prompts x 16, 16 optimizer steps."""
    return Work(
        num_prompts=512 // ranks, group_size=16, prompt_length=150, num_optimizer_steps=16, num_scorings=0,
        max_tokens=30000, shares_prompts=False,
    )  # fmt: skip


H200, H100, A100, R4090 = (CARDS[name] for name in ("H200", "H100", "A100", "4090"))
_OURS = "docs/gpu.md"
_MICRO = "the update alone, one group, LoRA without autocast, an H200"
_CPU = "docs/performance.md"
_TT = "tenstorrent/tt-inference-server issues 143, 125, 340, 356: vLLM on GPUs"
_NEMO = "NeMo-RL docs/about/performance-summary.md, v0.4"
_EASY = "EasyR1 assets/baselines.md"
_VERL = "verl docs/advance/fully_async.md"
_SHARED, _AGAIN = "shared", "checkpointing"
_GROUPS = (
    (64, 512, 8, "", _AGAIN, 0.273),
    (64, 512, 8, _SHARED, _AGAIN, 0.262),
    (512, 512, 8, "", _AGAIN, 0.443),
    (512, 512, 8, _SHARED, _AGAIN, 0.293),
    (1024, 256, 8, "", _AGAIN, 0.533),
    (1024, 256, 8, _SHARED, _AGAIN, 0.267),
    (512, 512, 16, "", _AGAIN, 0.850),
    (512, 512, 16, _SHARED, _AGAIN, 0.537),
    (512, 512, 8, "", "", 0.322),
    (512, 512, 8, _SHARED, "", 0.216),
    (1024, 256, 8, "", "", 0.383),
    (1024, 256, 8, _SHARED, "", 0.150),
)
"""Prompt, completion, completions, how prompts and activations are handled, and seconds on an H200."""
CPU_RATES = Rates(update=0.75, layer_s=0.0, prefill=0.23, memory=1.0, token_s=0.0, sequence_s=0.0)
"""Of the two rows marked as calibration."""
VERL_RATES = Rates(update=0.5)
"""An H20 has a seventh of an H100's FLOP/s and more of its bandwidth, so a larger share of them is reached."""


def verl_lengths(random_: random.Random) -> int:
    """The document says the longest, and no mean: fitted to its rows of 32 cards."""
    return 28672 if random_.random() < 0.01 else max(1, round(random_.expovariate(1 / 550)))


ROWS = {
    "ours": [
        Row(
            "1.5B LoRA, update, 128 x (520 + 512), s",
            5.4,
            update("Qwen2.5-1.5B", H200, 520, 512, 16, 8, shares_prompts=False, max_tokens=16384),
            _OURS,
            True,
        ),
        Row("the same, rollout, s", 3.3, rollout("Qwen2.5-1.5B", H200, 520, fixed(512), 16, 8), _OURS, True),
        Row("135M, rollout, 64 x (45 + 16), s", 0.11, rollout("SmolLM2-135M", H200, 45, uniform(16), 8, 8), _OURS),
        Row(
            "135M LoRA, update, s",
            0.23,
            update("SmolLM2-135M", H200, 45, 8, 8, 8, shares_prompts=False, checkpointing=False),
            _OURS,
        ),
        Row("135M LoRA, sync, s", 0.07, sync("SmolLM2-135M", "train 1xH200", lora=True), _OURS, True),
        Row("135M full, sync, s", 0.09, sync("SmolLM2-135M", "train 1xH200"), _OURS),
        *(
            Row(
                f"1.5B LoRA, {prompt}/{own}, G {size}, {shares or 'plain'}, {again or 'no checkpointing'}, s",
                figure,
                update(
                    "Qwen2.5-1.5B",
                    H200,
                    prompt,
                    own,
                    1,
                    size,
                    shares_prompts=bool(shares),
                    checkpointing=bool(again),
                    max_tokens=20000,
                ),
                _MICRO,
                (prompt, size, shares) == (64, 8, ""),
            )
            for prompt, own, size, shares, again, figure in _GROUPS
        ),
    ],
    "cpu": [
        Row(
            "135M LoRA, update, 8 x 8, 45 + 16, s",
            6.9,
            update("SmolLM2-135M", CPU, 45, 16, 8, 8, rates=CPU_RATES, itemsize=4, checkpointing=False),
            _CPU,
            True,
        ),
        Row(
            "135M LoRA, update, 2 x 8, 520 + 64, s",
            9.5,
            update("SmolLM2-135M", CPU, 520, 64, 2, 8, rates=CPU_RATES, itemsize=4, checkpointing=False),
            _CPU,
        ),
        Row(
            "135M, vLLM rollout, 8 x 8, 45 + 1..16, s",
            7.73,
            rollout("SmolLM2-135M", CPU, 45, uniform(16), 8, 8, rates=CPU_RATES, itemsize=4),
            _CPU,
            True,
        ),
        Row(
            "135M, vLLM rollout, 64 x 64 tokens, s",
            22.5,
            rollout("SmolLM2-135M", CPU, 45, fixed(64), 8, 8, rates=CPU_RATES, itemsize=4),
            _CPU,
        ),
    ],
    "decode": [
        Row("Qwen3-1.7B, A100, ms a token", 4.6, token("Qwen3-1.7B", A100, 192), _TT, True),
        Row("Qwen2.5-7B, 4090, ms a token", 17.1, token("Qwen2.5-7B", R4090, 192), _TT),
        Row("Qwen2.5-72B, 2 x H100, ms a token", 30.9, token("Qwen2.5-72B", H100, 192, num_cards=2), _TT),
        Row("the same after 8,192 tokens", 31.3, token("Qwen2.5-72B", H100, 8256, num_cards=2), _TT),
        Row(
            "DeepSeek-R1 in 4 bits, 8 x H100, ms a token",
            16.1,
            token("DeepSeek-V3", H100, 192, num_cards=8, itemsize=0.5),
            _TT,
        ),
        Row("72B, 2 x H100, ms to the first token, 4,096", 505, prefill("Qwen2.5-72B", H100, 4096, 2), _TT),
        Row("the same, 8,192", 1064, prefill("Qwen2.5-72B", H100, 8192, 2), _TT),
    ],
    "sync": [
        Row(
            "72B, whole weights, s",
            28.8,
            sync("Qwen2.5-72B", "train 32xH100 fsdp; serve 8x4xH100"),
            "verl, before delta_sharded",
        ),
        Row(
            "7B, whole weights, s",
            0.3,
            sync("Qwen2.5-7B", "train 12xH100 fsdp; serve 4xH100"),
            "verl docs/advance/one_step_off.md",
        ),
        Row("0.6B, whole weights, s", 0.18, sync("Qwen3-0.6B", "train 1xH100; serve 1xH100"), "TRL #5892"),
    ],
    "steps": [
        Row(
            "8B, 16 H100, s",
            97.7,
            step("Llama-3.1-8B", "train 16xH100 zero2", nemo(16), exponential(910, 3946)),
            _NEMO,
        ),
        Row(
            "8B, 8 + 8, one step off, s",
            74.6,
            step("Llama-3.1-8B", "train 8xH100 zero2; serve 8xH100", nemo(8, ahead=True), exponential(979, 3946)),
            _NEMO,
        ),
        Row(
            "32B, 32 H100, s",
            393,
            step("Qwen3-32B", "train 32xH100 fsdp; colocate 8x4", nemo(32), exponential(3056, 3946)),
            _NEMO,
        ),
        Row(
            "32B, 32 + 32, one step off, s",
            215,
            step("Qwen3-32B", "train 32xH100 fsdp; serve 8x4xH100", nemo(32, ahead=True), exponential(3057, 3946)),
            _NEMO,
        ),
        Row(
            "30B-A3B, 32 H100, s",
            225,
            step("Qwen3-30B-A3B", "train 32xH100 fsdp; colocate 8x4", nemo(32), exponential(3004, 3946)),
            _NEMO,
        ),
        Row(
            "235B-A22B, 128 H100, s",
            506,
            step(
                "Qwen3-235B-A22B",
                "train 128xH100 fsdp; colocate 8x16",
                dataclasses.replace(nemo(128), num_prompts=1, group_size=4),
                exponential(5521, 8042),
            ),
            _NEMO,
        ),
        Row(
            "DeepSeek-V3, 256 H100, s",
            154,
            step(
                "DeepSeek-V3",
                "train 256xH100 fsdp; colocate 8x32",
                dataclasses.replace(nemo(256), num_prompts=1, group_size=2),
                exponential(595, 1386),
            ),
            _NEMO,
        ),
        Row(
            "VL-3B as text, 8 H100, s",
            120,
            step("Qwen2.5-3B", "train 8xH100 fsdp; colocate 4x2", easyr1(), exponential(300, 2048), util=0.6),
            _EASY,
        ),
        Row(
            "VL-7B as text, 8 H100, s",
            145,
            step("Qwen2.5-7B", "train 8xH100 fsdp; colocate 4x2", easyr1(), exponential(300, 2048), util=0.6),
            _EASY,
        ),
        Row(
            "VL-32B as text, 8 H100, s",
            530,
            step("Qwen2.5-32B", "train 8xH100 fsdp; colocate 1x8", easyr1(), exponential(300, 2048), util=0.6),
            _EASY,
        ),
    ],
    "verl": [
        *(
            Row(
                f"7B, {ranks} H20, {part}, s",
                figure,
                step(
                    "Qwen2.5-7B",
                    f"train {ranks}xH100 fsdp",
                    verl(ranks),
                    verl_lengths,
                    card=H20,
                    part=part,
                    rates=VERL_RATES,
                ),
                _VERL,
                ranks == 32,
            )
            for ranks, part, figure in (
                (32, "update", 313.8),
                (32, "rollout", 357.4),
                (64, "update", 133.4),
                (64, "rollout", 150.7),
                (128, "update", 113.8),
                (128, "rollout", 177.9),
            )
        ),
    ],
}


def main(names: list[str]) -> None:
    for name in names or list(ROWS):
        print(f"\n| {name} | figure | simulated | error | source |\n|---|---|---|---|---|")
        for row in ROWS[name]:
            found = row.predict()
            error = "calibration" if row.is_calibration else f"{100 * (found / row.figure - 1):+.0f} %"
            print(f"| {row.what} | {row.figure:g} | {found:.3g} | {error} | {row.source} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
