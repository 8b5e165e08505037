"""Forecasts of memory: against real tensors and optimizers, published sizes, and numbers worked out by hand."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

from grpo_stage.memory import trace as tracing
from grpo_stage.memory.engine import hf_engine, kv_bytes_per_token, kv_parts, vllm_on_gpu
from grpo_stage.memory.optimizers import Trained, galore_states, state_bytes
from grpo_stage.memory.parts import GIB
from grpo_stage.memory.plan import Others, Trainee, grpo, ppo
from grpo_stage.memory.ppo import critic_of, generalized_advantages
from grpo_stage.memory.remedies import next_remedies
from grpo_stage.memory.sizes import Quantization, Sizes, sizes_of
from grpo_stage.memory.trace import LiveBytes, Load, Trace, trace
from grpo_stage.tools.plan import size_of
from grpo_stage.update.attention import attention_of
from grpo_stage.update.batch import SharedPromptLayout
from grpo_stage.update.head import OutputLayer


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 512,
}
LOAD = Load(num_prompts=2, group_size=4, prompt_length=30, completion_length=20, max_tokens=512, device_type="cpu")


def make_model(device: str = "meta", layers: int = 2, adapted: bool = False, **others):
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SIZES | others, num_hidden_layers=layers)).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if adapted:
            model.enable_input_require_grads()
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    return model


# Weights and states


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_of_a_real_model(tied):
    real = make_model("cpu", tie_word_embeddings=tied)
    sizes = sizes_of(make_model(tie_word_embeddings=tied))
    own = {p.data_ptr(): p.nbytes for p in real.parameters()}
    assert (sizes.trained, sizes.frozen, sizes.adapters) == (sum(own.values()), 0, 0)
    assert sizes.num_parameters == sum(own.values()) / 4


def test_adapters_are_counted_beside_the_base():
    real = make_model("cpu", adapted=True)
    sizes = sizes_of(make_model(adapted=True))
    assert sizes.adapters == sizes.gradients == sum(p.nbytes for p in real.parameters() if p.requires_grad)
    assert sizes.frozen == sum(p.nbytes for p in real.parameters() if not p.requires_grad)
    assert sizes.trained == 0


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad"])
def test_states_are_those_of_a_real_optimizer(optim, tmp_path):
    model = make_model("cpu")
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(tmp_path, optim=optim, use_cpu=True))
    optimizer = kind(model.parameters(), **settings)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    forecast = state_bytes(optim, sizes_of(model).trainable)
    assert forecast == sum(each.nbytes for each in tensors if each.dim() > 0)


def test_states_in_8_bits_and_projected_ones_by_hand():
    matrix = Trained("w", torch.Size([128, 64]), 4)  # 8192 elements: 32 blocks of 256
    norm = Trained("n", torch.Size([64]), 4)
    embedding = Trained("e", torch.Size([128, 64]), 4, is_embedding=True)
    assert state_bytes("adamw_8bit", [matrix]) == 2 * (8192 + 32 * 4)
    assert state_bytes("adamw_8bit", [norm, embedding]) == 2 * 4 * (64 + 8192), "small ones and embeddings: 32 bits"
    assert state_bytes("lion_8bit", [matrix]) == 8192 + 32 * 4
    assert galore_states(16)(matrix) == 4 * (2 * 16 * 128 + 16 * 64)
    assert galore_states(16)(norm) == 2 * 4 * 64
    assert state_bytes("some_new_one", [matrix]) is None


def test_a_quantized_base_by_hand():
    """All linear layers but the output layer; a scale a block of 64, in one byte and a float32 for 256 of them."""
    model, linear = make_model(adapted=True), 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 176)
    others = 2 * 500 * 64 + 5 * 64
    sizes = sizes_of(model, Quantization(4))
    assert sizes.frozen == linear / 2 + linear / 64 * (1 + 4 / 256) + 4 * others
    assert sizes_of(model, Quantization(4, has_double=False)).frozen == linear / 2 + linear / 64 * 4 + 4 * others
    rows = 2 * (2 * 64 + 2 * 32 + 2 * 176 + 64)
    assert sizes_of(model, Quantization(8)).frozen == linear + 4 * rows + 4 * others
    assert sizes.largest_dequantized == 4 * 64 * 176


# Activations


def real_pass(model, load):
    """What a micro-batch of a real model holds: bytes of the tensors that are saved, and the most at one time."""
    rows = load.micro_batches()[0]
    batch = SharedPromptLayout(0, torch.device("cpu")).tokens(rows)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for module in base.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    weights = [*model.parameters(), *model.buffers()]
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    live = LiveBytes(weights)
    with attention_of(base, batch.inputs.shared_prompts), live:
        with saved_tensors_hooks(note, lambda x: x):
            hidden = base.base_model(
                input_ids=batch.inputs.input_ids,
                position_ids=batch.inputs.position_ids,
                use_cache=False,
                shared_prompts=batch.inputs.shared_prompts,
            ).last_hidden_state.flatten(0, 1)
        targets = batch.completion_ids[batch.completion_mask.bool()]
        statistics = OutputLayer.of(base).statistics(hidden[batch.inputs.predictors], targets, 1.0)
        statistics.logprobs.sum().backward()
    of_weights = {each.untyped_storage().data_ptr() for each in weights}
    return sum(size for key, size in saved.items() if key not in of_weights), live.peak


@pytest.mark.parametrize("adapted", [False, True])
def test_a_forecast_is_what_a_real_pass_holds(adapted):
    forecast = trace(make_model(adapted=adapted), LOAD, None, checkpointing=False)
    kept, peak = real_pass(make_model("cpu", adapted=adapted), LOAD)
    assert forecast.kept == pytest.approx(kept, rel=0.15)
    assert forecast.peak == pytest.approx(peak, rel=0.1)


def test_layers_that_are_not_traced_are_drawn_out(monkeypatch):
    """With 3 layers the output layer holds the most, with 12 the gradients that the backward pass collects."""
    load = dataclasses.replace(LOAD, num_prompts=1, completion_length=60, chunks_logits=False)
    model = make_model(layers=12, vocab_size=700)
    drawn = trace(model, load, None, checkpointing=True)
    monkeypatch.setattr(tracing, "FEW_LAYERS", 100)
    whole = trace(model, load, None, checkpointing=True)
    assert dataclasses.astuple(drawn) == pytest.approx(dataclasses.astuple(whole), rel=1e-3)
    assert (drawn.peak, drawn.head) == (pytest.approx(whole.peak, rel=1e-3), 0.0)
    assert trace(make_model(layers=3, vocab_size=700), load, None, checkpointing=True).head > 0
    assert len(model.model.layers) == 12
    assert all(parameter.is_meta for parameter in model.parameters())


def test_activations_grow_with_tokens_and_layers_and_shrink_with_checkpointing():
    def peak(layers=2, checkpointing=False, autocast=None, **changes):
        load = Load(**{field: getattr(LOAD, field) for field in LOAD.__slots__} | changes)
        return trace(make_model(layers=layers), load, autocast, checkpointing=checkpointing).peak

    plain = peak()
    assert peak(completion_length=10) < plain < peak(completion_length=40)
    assert plain < peak(layers=3)
    assert peak(checkpointing=True) < plain
    assert peak(shares_prompts=False) > plain, "each completion has a prompt of its own"
    assert peak(autocast=torch.bfloat16) < plain


def test_flops_are_six_for_each_weight_and_token():
    """Forward 2, backward 4, for the weights of matrix products: those of layers for all tokens of the stream, those
    of the output layer for the completions'. All logits are one chunk, which is not computed twice."""
    load = Load(num_prompts=1, group_size=1, prompt_length=4, completion_length=300, max_tokens=512, device_type="cpu")
    found = trace(make_model(), load, None, checkpointing=False).flops
    of_layers, of_head = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 176), 500 * 64
    products = 6 * (of_layers * 303 + of_head * 300)
    assert products <= found <= 1.5 * products, "the attention's own products come on top"


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_mixture_of_experts_in_float32(autocast):
    """Each token goes through two of eight experts; the hand count is of all products but the attention's own."""
    shape = {**SIZES, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, num_hidden_layers=5, dtype=torch.float32)).train()
    load = Load(num_prompts=1, group_size=1, prompt_length=4, completion_length=300, max_tokens=512, device_type="cpu")
    found = trace(model, load, autocast, checkpointing=False)
    of_layer = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 8 + 2 * 3 * 64 * 32
    products = 6 * (5 * of_layer * 303 + 500 * 64 * 300)
    assert products <= found.flops <= 1.5 * products


def test_a_critic_has_no_logits():
    policy = make_model()
    critic = critic_of(policy)
    assert sizes_of(critic).num_parameters == sizes_of(policy).num_parameters - 500 * 64 + 64
    values = trace(critic, LOAD, None, checkpointing=False, gives_values=True)
    assert values.peak < trace(policy, LOAD, None, checkpointing=False).peak
    assert policy.lm_head.weight.shape == (500, 64)


# Phases, PPO


def trainee(**changes):
    sizes = Sizes(10, frozen=100.0, trained=40.0, adapters=0.0, largest_dequantized=0.0,
                  trainable=(Trained("w", torch.Size([10]), 4),))  # fmt: skip
    micro_batch = Trace(forward=30.0, of_head=50.0, backward=25.0, kept=30.0, flops=0.0)
    parts = {"sizes": sizes, "states": 80.0, "micro_batch": micro_batch, "is_only_micro_batch": False}
    return Trainee(**parts | changes)


def test_phases_follow_one_another_by_hand():
    asleep, awake = (
        Others(process=7.0, engine=vllm_on_gpu(100.0, 1.0, 1000.0, 0.5, False, level), reference=3.0)
        for level in (1, 0)
    )
    resting = 100 + 40 + 80 + 7 + 3
    for others, left in ((asleep, 0.2 * GIB), (awake, 500)):
        rollout, update, optimizer = grpo(trainee(), others).phases
        assert rollout.total == resting + 500
        assert update.total == resting + 40 + 50 + left
        assert optimizer.total == resting + 40 + left
    assert grpo(trainee(), awake).peak.name == "update"


def test_ppo_adds_the_critic_and_not_its_activations_by_hand():
    others = Others(process=7.0, engine=hf_engine_of_nothing())
    both = ppo(trainee(), trainee(), others, "PPO")
    alone = grpo(trainee(), others).peak.total
    assert alone == 7 + 220 + 40 + 50
    # The critic's weights and states stay; its gradients and activations are gone when the policy learns.
    assert [phase.total for phase in both.phases] == [7 + 440, *(7 + 440 + 90, 7 + 440 + 40) * 2]
    assert both.peak.total - alone == 220
    only = trainee(is_only_micro_batch=True)
    assert grpo(only, others).peak.total == 7 + 220 + 50, "gradients come while activations go"


def hf_engine_of_nothing():
    from grpo_stage.memory.engine import Engine

    return Engine()


def test_generalized_advantages_by_hand():
    """gamma 1, lambda .95: delta = (1, 2, 4 - 3 = 1 + reward 2), from the end."""
    values = torch.tensor([0.0, 1.0, 3.0])
    last = 5.0 - 3.0
    middle = 2.0 + 0.95 * last
    first = 1.0 + 0.95 * middle
    assert generalized_advantages(5.0, values).tolist() == pytest.approx([first, middle, last])


# Engines


def test_keys_and_values_are_those_that_are_published():
    """Llama 3 8B: 128 KiB a token in bf16; DeepSeek-V3's latent attention: 576 numbers a layer, 61 layers."""
    llama = SimpleNamespace(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128
    )
    assert kv_bytes_per_token(llama, 2, is_vllm=True) == 128 * 1024
    deepseek = SimpleNamespace(
        hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, kv_lora_rank=512,
        qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
    )  # fmt: skip
    assert kv_bytes_per_token(deepseek, 2, is_vllm=True) == 2 * 61 * 576
    assert kv_bytes_per_token(deepseek, 2, is_vllm=False) == 2 * 61 * 128 * (128 + 64 + 128)
    assert (kv_parts(llama), kv_parts(deepseek)) == (8, 1)


def test_an_engine_that_cannot_start_says_why():
    engine = vllm_on_gpu(16 * GIB, 1 * GIB, 24 * GIB, 0.3, True, 0)
    assert "vLLM cannot start: `vllm_gpu_util: 0.3` gives it 7.2 GiB" in engine.problem
    assert "17.0 GiB, which is 0.71 of the device" in engine.problem
    assert not vllm_on_gpu(16 * GIB, 1 * GIB, 24 * GIB, 0.75, True, 0).problem


def test_the_cache_of_generate_by_hand():
    config = SimpleNamespace(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, vocab_size=10,
        intermediate_size=16,
    )  # fmt: skip
    engine = hf_engine(config, 4, num_prompts=1, num_rows=5, prompt_length=6, completion_length=4)
    assert engine.kv_cache == 5 * 10 * (4 * 3 * 2 * 1 * 4)
    assert engine.left_in_update == 0


# The command


@pytest.mark.parametrize("text", ["24", "GB", "0GB", "-3GB", "24 TB", "24GBs"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"is no size of a device's memory.*`--device 24GB`"):
        size_of(text)


def test_sizes_are_read_as_cards_are_sold():
    assert (size_of("24GB"), size_of("24 gib"), size_of("512MB")) == (24 * GIB, 24 * GIB, GIB / 2)


def test_remedies_that_cost_least_come_first():
    values = {
        "rollout_backend": "vllm", "vllm_sleep": 0, "vllm_gpu_util": 0.3, "finetuning_type": "full",
        "max_tokens_per_micro_batch": 4096, "optim": "adamw_torch", "pure_bf16": False, "quantization_bit": None,
        "max_new_tokens": 512, "checkpointing_is_off": True,
    }  # fmt: skip
    keys = [next(iter(remedy.keys)) for remedy in next_remedies(values, "cuda")]
    assert keys == [
        "vllm_sleep", "disable_gradient_checkpointing", "max_tokens_per_micro_batch", "max_tokens_per_micro_batch",
        "vllm_gpu_util", "optim", "pure_bf16", "finetuning_type", "max_new_tokens",
    ]  # fmt: skip
    assert next(next_remedies(values, "cuda")).keys == {"vllm_sleep": 2}
    lora = values | {"finetuning_type": "lora"}
    assert next(next_remedies(lora, "cuda")).keys == {"vllm_sleep": 1}, "level 2 forgets the base"
    assert {"quantization_bit": 4} in [remedy.keys for remedy in next_remedies(lora, "cuda")]
    on_cpu = [next(iter(remedy.keys)) for remedy in next_remedies(lora, "cpu")]
    assert not {"vllm_sleep", "vllm_gpu_util", "quantization_bit"} & set(on_cpu)
