"""The fast way through a model against the plain one: shared prompts, logits in chunks, over families of models."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from grpo_stage.types import Completion, FinishReason, Prompt
from grpo_stage.update import exactness, head
from grpo_stage.update.attention import Family, SharedPrompts, attention_of
from grpo_stage.update.batch import PaddedLayout, Row, SharedPromptLayout
from grpo_stage.update.head import OutputLayer, statistics_of_logits
from grpo_stage.update.logprobs import Forward
from grpo_stage.update.strategies.replicated import ReplicatedParameters


CPU = torch.device("cpu")
PLAIN = PaddedLayout(0, CPU)
SHARED = SharedPromptLayout(0, CPU)
STRATEGY = ReplicatedParameters(Accelerator(cpu=True))
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA2 = {
    "head_dim": 8,
    "sliding_window": 7,
    "attn_logit_softcapping": 0.5,
    "final_logit_softcapping": 3.0,
}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama_tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "mistral": MistralConfig(**SIZES, sliding_window=6),
    "phi3": Phi3Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, **GEMMA2),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=7, sliding_window_pattern=2),
    "cohere": CohereConfig(**SIZES, logit_scale=0.3),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
}
GROUPS = [(13, [3, 9, 1, 12]), (1, [4, 2]), (20, [150, 5, 70, 1, 40])]
"""Length of a prompt and of its completions."""


def make_rows(groups=GROUPS, seed=0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 97, (count,), generator=generator).tolist())

    rows = []
    for prompt_length, lengths in groups:
        prompt = Prompt(index=0, token_ids=ids(prompt_length), messages=(), reference=None)
        for n in lengths:
            completion = Completion(
                token_ids=ids(n), sampling_logprobs=(0.0,) * n, finish_reason=FinishReason.STOP, text=""
            )
            rows.append(Row(prompt, completion))
    order = torch.randperm(len(rows), generator=generator).tolist()
    return [rows[i] for i in order]


def make_model(config, attention="sdpa") -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.data.mul_(30 if "q_proj" in name else 3)  # so that attention is far from even
    return model


def adapted(model: nn.Module, **settings) -> nn.Module:
    model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **settings))
    return model.train()


def measure(model: nn.Module, rows: list[Row], forward: Forward, max_tokens=10_000) -> tuple[list, torch.Tensor]:
    """Log-probabilities, entropies and collisions of each row, and the gradient of a sum that weighs each token and
    each entropy differently."""
    model.zero_grad()
    found = {}
    for positions in forward.layout.split(rows, max_tokens):
        batch = forward.layout.tokens([rows[position] for position in positions])
        with attention_of(model, batch.inputs.shared_prompts):
            statistics = forward.statistics(model, batch, 0.7)
            loss = torch.zeros(())
            for row, position in enumerate(positions):
                n = len(rows[position].completion.token_ids)
                own = [each[row, :n] for each in statistics]
                assert all((each[row, n:] == 0).all() for each in statistics)
                loss = loss + (own[0] * (torch.arange(n) + position).sin()).sum() + own[1].square().sum() / 9
                found[position] = torch.stack([each.detach() for each in own])
            loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return [found[i] for i in range(len(rows))], gradient


def check_equal(model: nn.Module, rows: list[Row], forward: Forward, max_tokens: int = 10_000) -> None:
    expected, slope = measure(model, rows, Forward(PLAIN, is_chunked=False))
    actual, own_slope = measure(model, rows, forward, max_tokens)
    for own, plain in zip(actual, expected, strict=True):
        assert torch.allclose(own, plain, atol=1e-5)
    assert (own_slope - slope).norm() <= 1e-5 * slope.norm()
    assert slope.norm() > 0.1


def attention_for(name: str) -> str:
    return "eager" if name == "gemma2" else "sdpa"  # sdpa in transformers leaves the soft cap of the scores out


@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_entropies_and_gradient_are_those_of_padded_rows(name, is_chunked, monkeypatch):
    monkeypatch.setitem(head.MAX_LOGITS, "cpu", 97 * 40)
    model = make_model(MODELS[name], attention_for(name))
    check_equal(model, make_rows(), Forward(SHARED, is_chunked))
    check_equal(model, make_rows(), Forward(SHARED, is_chunked), max_tokens=60)
    check_equal(model, make_rows(), Forward(PLAIN, is_chunked))


@pytest.mark.parametrize("seed", range(6))
def test_random_groups(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    groups = [
        (draw(1, [3, 40, 300][draw(0, 2)]), [draw(1, [2, 30, 140][draw(0, 2)]) for _ in range(draw(1, 9))])
        for _ in range(draw(1, 4))
    ]
    check_equal(make_model(MODELS["qwen3"]), make_rows(groups, seed), Forward(SHARED), max_tokens=draw(1, 600))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "lora_of_the_head", "head_trained_whole"],
)
def test_adapters_in_the_body_and_in_the_head(settings, monkeypatch):
    monkeypatch.setitem(head.MAX_LOGITS, "cpu", 97 * 40)
    check_equal(adapted(make_model(MODELS["llama"]), **settings), make_rows(), Forward(SHARED), max_tokens=200)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["body", "with_head"])
def test_an_adapter_on_4_bit_layers(targets, monkeypatch):
    """QLoRA, with bitsandbytes' own layers for the CPU, which compute in float32 here; the head is one of them."""
    monkeypatch.setitem(head.MAX_LOGITS, "cpu", 97 * 40)
    model = make_model(MODELS["llama"])
    for name, layer in [each for each in model.named_modules() if isinstance(each[1], nn.Linear)]:
        quantized = Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32)
        quantized.load_state_dict(layer.state_dict())
        model.set_submodule(name, quantized.to("cpu"))  # which quantizes
    assert model.lm_head.weight.dtype == torch.uint8
    model.requires_grad_(False)
    check_equal(adapted(model, target_modules=targets), make_rows(), Forward(SHARED), max_tokens=200)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_attends_alike_in_the_backward_pass(use_reentrant):
    model = adapted(make_model(MODELS["gemma3"]), target_modules="all-linear")
    expected = measure(model, make_rows(), Forward(SHARED))[1]
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert torch.allclose(measure(model, make_rows(), Forward(SHARED))[1], expected, atol=1e-6)
    assert model.config._attn_implementation == "sdpa", "given back"


def test_half_precision_is_within_its_rounding():
    model = make_model(MODELS["llama"]).bfloat16()
    expected, _ = measure(model, make_rows(), Forward(PLAIN, is_chunked=False))
    actual, _ = measure(model, make_rows(), Forward(SHARED))
    difference = torch.cat([(a - b).abs().flatten() for a, b in zip(actual, expected, strict=True)])
    assert difference.mean() < exactness.HALF_PRECISION_TOLERANCE / 3


# The output layer


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_chunks_of_any_size_give_the_statistics_and_slopes_of_whole_logits(num_tokens, temperature, softcap):
    torch.manual_seed(0)
    layer = nn.Linear(8, 31, bias=True)
    output = OutputLayer(layer, 31, scale=1.5, softcap=softcap)
    hidden = (2 * torch.randn(num_tokens, 8)).requires_grad_()
    targets = torch.randint(31, (num_tokens,))
    weights = torch.randn(2, num_tokens)

    def slopes(statistics):
        total = (weights[0] * statistics.logprobs + weights[1] * statistics.entropies).sum()
        return torch.autograd.grad(total, [hidden, *layer.parameters()])

    expected = statistics_of_logits(output(hidden), targets, temperature)
    of_expected = slopes(expected)
    for max_logits in (1, 31 * 7, 31 * 40):
        actual = output.statistics(hidden, targets, temperature, max_logits)
        for own, whole in zip([*actual, *slopes(actual)], [*expected, *of_expected], strict=True):
            assert torch.allclose(own, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_statistics_and_slopes_are_those_of_liger(temperature, missing_tool):
    """Its function of the same purpose: a kernel on some GPUs, and in torch elsewhere."""
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction
    except ModuleNotFoundError:
        missing_tool("liger-kernel is not installed, with which the output layer is compared")
    torch.manual_seed(0)
    layer = nn.Linear(8, 31, bias=False)
    hidden = (2 * torch.randn(700, 8)).requires_grad_()  # more than one of its chunks of 512
    targets = torch.randint(31, (700,))
    weights = torch.randn(2, 700)

    def slopes(logprobs, entropies):
        total = (weights[0] * logprobs + weights[1] * entropies).sum()
        return torch.autograd.grad(total, [hidden, layer.weight])

    own = OutputLayer(layer, 31).statistics(hidden, targets, temperature, max_logits=31 * 90)
    losses, entropies = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, layer.weight, targets, temperature, return_entropy=True
    )
    for mine, theirs in zip(
        [*own[:2], *slopes(*own[:2])], [-losses, entropies, *slopes(-losses, entropies)], strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_no_more_logits_are_held_than_allowed(monkeypatch):
    class Counting(nn.Linear):
        largest = 0

        def forward(self, hidden):
            logits = super().forward(hidden)
            Counting.largest = max(Counting.largest, logits.numel())
            return logits

    output = OutputLayer(Counting(8, 31), 31)
    hidden = torch.randn(100, 8, requires_grad=True)
    output.statistics(hidden, torch.zeros(100, dtype=torch.long), 1.0, max_logits=31 * 10).logprobs.sum().backward()
    assert Counting.largest == 31 * 10


def test_the_backward_pass_computes_in_the_precision_of_the_forward_pass():
    layer = nn.Linear(8, 31)
    hidden, targets = torch.randn(20, 8, requires_grad=True), torch.arange(20)
    slopes = []
    for max_logits in (31 * 20, 31 * 3):
        with torch.autocast("cpu", torch.bfloat16):
            statistics = OutputLayer(layer, 31).statistics(hidden, targets, 1.0, max_logits)
        slopes.append(torch.autograd.grad(statistics.logprobs.sum(), hidden)[0])
    assert torch.equal(*slopes)


# The attention


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_each_token_sees_its_prompt_and_its_own_completion_up_to_itself(window, softcap):
    families = [Family(30, (200, 0, 3, 50)), Family(1, (4,)), Family(140, (2, 2, 120))]
    torch.manual_seed(0)
    total = sum(family.length for family in families)
    query, key, value = torch.randn(1, 4, total, 8), torch.randn(1, 2, total, 8), torch.randn(1, 2, total, 8)
    actual = SharedPrompts(families, CPU).attend(
        query, key, value, scaling=0.7, sliding_window=window, softcap=softcap
    )
    start = 0
    for family in families:
        prompt = range(start, start + family.prompt)
        own_start = prompt.stop
        for completion in (0, *family.completions):
            own = range(own_start, own_start + completion)
            own_start = own.stop
            seen = torch.tensor([*prompt, *own])
            q, k, v = query[0][:, seen], key[0].repeat_interleave(2, 0)[:, seen], value[0].repeat_interleave(2, 0)
            scores = q @ k.transpose(1, 2) * 0.7
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            distance = torch.arange(len(seen)).unsqueeze(1) - torch.arange(len(seen))
            hidden = (distance < 0) | (distance >= (window or 10**9))
            expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, seen]
            assert torch.allclose(actual[0, seen].transpose(0, 1), expected, atol=1e-5)
        start = own_start


# What is not exact is found, and done the plain way


def settled(model: nn.Module, forward: Forward, lengths=(9, 14)) -> Forward:
    prompts = [row.prompt for row in make_rows([(length, [1]) for length in lengths])]
    exactness.settle(forward, PLAIN, model, prompts, nullcontext, STRATEGY)
    return forward


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_given_up_for_models_that_can(name, caplog):
    forward = settled(make_model(MODELS[name], attention_for(name)), Forward(SHARED))
    assert (forward.layout, forward.is_chunked) == (SHARED, True)
    assert not [record for record in caplog.records if "grpo_stage" in record.name]


def test_one_prompt_and_short_prompts_are_enough_to_compare():
    for lengths in ((9,), (1, 1), (1,)):
        assert settled(make_model(MODELS["llama"]), Forward(SHARED), lengths).layout is SHARED


@pytest.mark.parametrize(
    ("name", "attention", "change"),
    [
        ("gemma2", "sdpa", None),  # leaves out the soft cap, which we do not
        ("mamba", "eager", None),
        ("llama", "sdpa", "mixes"),
        ("qwen2_moe", "sdpa", None),  # does not hand on its sliding window, which is longer than what is compared
    ],
)
def test_a_model_that_cannot_share_prompts_is_trained_in_plain_rows(name, attention, change, caplog):
    others = {
        "mamba": MambaConfig(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0),
        "qwen2_moe": Qwen2MoeConfig(
            **SIZES, use_sliding_window=True, sliding_window=300, max_window_layers=2, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        ),
    }  # fmt: skip
    config = MODELS.get(name) or others[name]
    model = make_model(config, attention)
    if change == "mixes":  # as a convolution or a state over the stream would
        layer = model.model.layers[0].mlp
        own = layer.forward
        layer.forward = lambda x: own(x + 0.5 * x.roll(1, dims=1))
    forward = settled(model, Forward(SHARED))
    assert (forward.layout, forward.is_chunked) == (PLAIN, True)
    assert sum("Sharing prompts is not exact for" in each.message for each in caplog.records) == 1


def test_a_model_with_a_head_of_its_own_computes_its_own_logits(caplog):
    model = make_model(MODELS["llama"])
    own = model.forward

    def forward(**kwargs):
        output = own(**kwargs)
        output.logits = output.logits * 0.5
        return output

    model.forward = forward
    way = settled(model, Forward(SHARED))
    assert (way.layout, way.is_chunked) == (SHARED, False)
    assert sum("Logits in parts are not exact for" in each.message for each in caplog.records) == 1


def test_what_the_recipe_switches_off_stays_off():
    model = make_model(MODELS["llama"])
    for layout, is_chunked in itertools.product((PLAIN, SHARED), (True, False)):
        way = settled(model, Forward(layout, is_chunked))
        assert (way.layout, way.is_chunked) == (layout, is_chunked)


def test_a_leak_into_the_shortest_completion_alone_is_found(monkeypatch):
    """It is judged by the completion that differs most, over its own tokens."""
    model = make_model(MODELS["llama"])
    plain = exactness._logprobs

    def leaky(forward, **kwargs):
        logprobs = plain(forward, **kwargs).clone()
        if forward.layout is SHARED:
            logprobs[1, 1:5] += 3e-4
        return logprobs

    monkeypatch.setattr(exactness, "_logprobs", leaky)
    assert settled(model, Forward(SHARED)).layout is PLAIN


def test_a_kernel_without_a_backward_pass_is_found_before_the_run(monkeypatch):
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            raise RuntimeError("head size is not supported in the backward pass")

    attend = SharedPrompts.attend
    monkeypatch.setattr(SharedPrompts, "attend", lambda self, *args, **kw: OneWay.apply(attend(self, *args, **kw)))
    assert settled(make_model(MODELS["llama"]), Forward(SHARED)).layout is PLAIN


def test_the_attention_of_every_part_of_a_model_is_given_back():
    config = Gemma3Config(text_config=SIZES | {"head_dim": 8})
    model = nn.Module()
    model.config = config
    config._attn_implementation = {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"}
    with attention_of(model, SharedPrompts([Family(2, (1,))], CPU)):
        assert config.text_config._attn_implementation == "grpo_stage_shared_prompts"
    assert (config._attn_implementation, config.text_config._attn_implementation) == ("sdpa", "eager")
