"""What only a GPU can run, as far as a CPU can tell: the order of the calls, and that vLLM has what is called."""

import dataclasses
import importlib
import inspect
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedTokenizerFast

from grpo_stage.host.precision import canary_bound
from grpo_stage.rollout.engines import vllm_delivery, vllm_process, vllm_start, vllm_together
from grpo_stage.rollout.engines.table import ENGINES
from grpo_stage.rollout.engines.vllm_options import OWNED_OPTIONS, OWNED_OPTIONS_ON_CPU, known_options
from grpo_stage.rollout.engines.weights import checkpoint_weights
from grpo_stage.survival.stop import StopRequested
from grpo_stage.types import SamplingSettings

from .conftest import vllm_engine


class RecordingLLM:
    """Stands in for `vllm.LLM`: notes what is called, and holds the adapters it is given."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.calls: list[Any] = []
        self._adapters: set[int] = set()
        self.llm_engine = SimpleNamespace(
            list_loras=lambda: set(self._adapters),
            remove_lora=self._adapters.discard,
            add_lora=self._add_lora,
        )

    def _add_lora(self, request: Any) -> bool:
        self.calls.append("deliver")
        self._adapters.add(request.lora_int_id)
        return True

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights"
        self.calls.append("deliver")
        list(kwargs["weights_iterator"])
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").debug("%s: Processed", "Linear")

    def apply_model(self, function: Callable[..., Any]) -> list[set[str]]:
        return [set()]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset cache")
        return True

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake up", *tags))


@pytest.fixture
def recorded(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Callable[..., Any]]:
    monkeypatch.setattr(vllm_process, "start", lambda arguments, options: RecordingLLM(arguments | options))
    monkeypatch.setattr(vllm_process, "release", lambda llm, owns_process_group: None)
    monkeypatch.setattr(vllm_delivery, "unserved_modules", lambda llm, adapter_id, adapted: [])
    return lambda **changed: vllm_engine(checkpoint, tokenizer, **changed)


@pytest.mark.parametrize(("adapter", "level"), [(True, 1), (False, 1), (False, 2)])
def test_an_engine_wakes_up_in_the_order_that_needs_least_memory(
    adapter: bool, level: int, recorded: Callable[..., Any], make_policy: Callable[..., PeftModel]
) -> None:
    engine = recorded(adapter=adapter, sleep_level=level)
    policy = make_policy() if adapter else make_policy().get_base_model()
    policy = policy if adapter else AutoModelForCausalLM.from_config(policy.config)
    llm = engine._llm
    engine.sync(policy, version=0)
    assert llm.calls == ["deliver", "reset cache"]
    llm.calls.clear()
    engine.sleep()
    engine.sleep()
    engine.sync(policy, version=1)
    engine.sync(policy, version=2)
    assert llm.calls == [
        ("sleep", level),
        ("wake up", "weights"),
        "deliver",
        ("wake up", "kv_cache"),
        "reset cache",
        "deliver",
        "reset cache",
    ]


def test_a_sleeping_engine_does_not_sample(
    recorded: Callable[..., Any], make_policy: Callable[..., PeftModel]
) -> None:
    engine = recorded(sleep_level=1)
    engine.sync(make_policy(), version=0)
    engine.sleep()
    with pytest.raises(RuntimeError, match="before sync"):
        engine.generate([], SamplingSettings(num_generations=2, max_new_tokens=1, temperature=1.0), step=0)


def test_without_a_level_an_engine_stays_awake(
    recorded: Callable[..., Any], make_policy: Callable[..., PeftModel]
) -> None:
    engine = recorded()
    engine.sync(make_policy(), version=0)
    engine.sleep()
    assert engine._llm.calls == ["deliver", "reset cache"]
    assert engine._llm.arguments["enable_sleep_mode"] is False


def test_vllm_has_the_arguments_that_are_passed(recorded: Callable[..., Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for adapter in (True, False):
        arguments = recorded(
            adapter=adapter, sleep_level=1, quantization="bitsandbytes", tensor_parallel_size=2, timeout_s=60
        )._llm.arguments
        assert set(arguments) - known == set()
        assert arguments["hf_token"] is arguments["download_dir"] is None
        assert arguments["enable_sleep_mode"] is True
        assert arguments["quantization"] == "bitsandbytes"
        assert arguments.get("enable_lora", False) is adapter


def test_the_arguments_read_out_of_vllms_source_are_those_it_has() -> None:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    assert known_options() == {field.name for field in dataclasses.fields(EngineArgs)}
    assert {*OWNED_OPTIONS, *OWNED_OPTIONS_ON_CPU} <= known_options()
    inspect.signature(LLM.__init__).bind(None, "model", **dict.fromkeys(known_options() - {"model"}))


@pytest.mark.parametrize(("own", "used"), [(None, False), ("1", True)])
def test_vllms_first_model_runner_is_used_unless_the_user_wants_the_second(
    own: str | None, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm
    from vllm import envs
    from vllm.config import VllmConfig

    def start(**arguments: Any) -> bool:
        envs.disable_envs_cache()
        assert envs.VLLM_USE_V2_MODEL_RUNNER is used, "and no None, which leaves the choice to vLLM"
        return VllmConfig.use_v2_model_runner.fget(SimpleNamespace())

    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    if own is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", own)
    monkeypatch.setattr(vllm_process, "is_on_cpu", lambda: False)
    monkeypatch.setattr(vllm, "LLM", start, raising=False)
    with vllm_process.process_unchanged():
        assert vllm_process.start({}, {}) is used


def test_vllm_quantizes_only_files_that_it_quantizes_as_the_host_does() -> None:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    keys = SimpleNamespace(compute_dtype=torch.bfloat16)

    def alike(quantization: BitsAndBytesConfig = nf4, **config: Any) -> bool:
        files = LlamaConfig(**{"dtype": torch.bfloat16} | config)
        model = SimpleNamespace(config=SimpleNamespace(quantization_config=quantization))
        request: Any = SimpleNamespace(keys=keys, policy=model, load_config=lambda: files)
        return vllm_start._quantizes_alike(request)

    assert alike()
    assert not alike(dtype=torch.float32)
    assert not alike(dtype=None)
    assert not alike(num_local_experts=8)
    assert not alike(BitsAndBytesConfig(load_in_8bit=True))
    stored = {"quantization_config": nf4.to_dict(), "dtype": torch.float32}
    assert alike(nf4, **stored)
    other = BitsAndBytesConfig(**nf4.to_dict() | {"bnb_4bit_quant_storage": torch.bfloat16})
    assert not alike(other, **stored)


def test_vllm_sleeps_at_these_levels_and_wakes_up_by_these_tags() -> None:
    from vllm import LLM
    from vllm.v1.executor.abstract import Executor

    inspect.signature(LLM.sleep).bind(None, level=2)
    inspect.signature(LLM.wake_up).bind(None, tags=["weights"])
    executor = SimpleNamespace(is_sleeping=False, sleeping_tags=set(), collective_rpc=lambda *_, **__: None)
    for level in (1, 2):
        Executor.sleep(executor, level=level)  # type: ignore[arg-type]
        assert executor.sleeping_tags == {"weights", "kv_cache"}
        Executor.wake_up(executor, tags=["weights"])  # type: ignore[arg-type]
        assert executor.is_sleeping
        Executor.wake_up(executor, tags=["kv_cache"])  # type: ignore[arg-type]
        assert not executor.is_sleeping


def test_vllm_quantizes_to_four_bits_as_the_host_does(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`vllm_base: auto` has it read the files of a 4-bit base: bit for bit the trainer's, where that is nf4."""
    from bitsandbytes.functional import dequantize_4bit
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import bitsandbytes_loader, get_model_loader

    loader: Any = get_model_loader(LoadConfig(load_format="bitsandbytes"))
    monkeypatch.setattr(bitsandbytes_loader, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(bitsandbytes_loader, "get_tensor_model_parallel_world_size", lambda: 1)
    loader.target_modules = loader.unsharded_weights_modules = [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.o_proj",
    ]
    states: dict[str, Any] = {}
    weights = dict(loader._unquantized_generator([str(checkpoint / "model.safetensors")], True, states))
    host = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_quant_storage=torch.float32,
    )
    policy = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=host)
    trainers = dict(checkpoint_weights(policy))
    assert len(states) == 2
    for name, state in states.items():
        assert torch.equal(dequantize_4bit(weights[name], state), trainers[name])


def test_neighboring_ranks_share_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that those of a node do, as `refuse_ranks` takes for granted."""
    import vllm.config
    from vllm.distributed import parallel_state

    groups: dict[str, Any] = {}

    def init_group(ranks: Any, local_rank: int, backend: str, group_name: str, **_: Any) -> Any:
        groups[group_name] = ranks
        return SimpleNamespace(rank_in_group=0)

    for name in ("_TP", "_DCP", "_PCP", "_PP", "_DP", "_EP", "_EPLB"):
        monkeypatch.setattr(parallel_state, name, None)
    monkeypatch.setattr(parallel_state, "init_model_parallel_group", init_group)
    monkeypatch.setattr(parallel_state, "get_world_group", lambda: SimpleNamespace(local_rank=0, device_group=None))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    parallel = SimpleNamespace(data_parallel_size=1, enable_elastic_ep=False, enable_eplb=False)
    config = SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace(is_moe=False))
    monkeypatch.setattr(vllm.config, "get_current_vllm_config", lambda: config)
    parallel_state.initialize_model_parallel(2, backend="gloo")
    assert groups["tp"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups["dp"] == [[i] for i in range(8)], "and no two of them wait for each other at each step"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 12), (12, 4), (12, 2), (12, 1), (9, 3), (8, 8)])
def test_heads_are_shared_out_where_vllm_can(
    heads: int, kv_heads: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import ModelConfig
    from vllm.model_executor.layers import linear

    def is_refused(refuse: Callable[[], object], *errors: type[Exception]) -> bool:
        try:
            refuse()
        except errors:
            return True
        return False

    monkeypatch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: size)
    monkeypatch.setattr(linear.ColumnParallelLinear, "__init__", lambda *_, **__: None)
    by_vllm = is_refused(lambda: linear.QKVParallelLinear(64, 8, heads, kv_heads), AssertionError)
    architecture = SimpleNamespace(total_num_attention_heads=heads)
    parallel = SimpleNamespace(
        tensor_parallel_size=size, enable_expert_parallel=False, pipeline_parallel_size=1,
        decode_context_parallel_size=1,
    )  # fmt: skip
    config: Any = SimpleNamespace(model_arch_config=architecture, multimodal_config=None)
    if heads % size:
        with pytest.raises(ValueError, match=r"must be divisible by tensor parallel size"):
            ModelConfig.verify_with_parallel_config(config, parallel)
        assert by_vllm
    keys = dict.fromkeys(("vllm_config", "structured_outputs", "model_quantization", "model_positions"))
    facts = {"rollout_backend": "vllm", "vllm_tensor_parallel": size, "model_name_or_path": "a/model"}
    values = SimpleNamespace(**keys, **facts, model_heads=heads, model_kv_heads=kv_heads)
    assert is_refused(lambda: ENGINES["vllm"].refuse_unfit(values), ValueError) == by_vllm


def test_a_rank_keeps_the_answers_to_its_own_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks of an engine ask it for the same, in the order of their ranks."""
    ranks = [(["a", "b"], [1, 2]), ([], []), (["c"], [3]), (["d", "e"], [4, 5])]

    def all_gather(values: list[Any], value: Any, group: Any) -> None:
        assert value == ranks[group]
        values[:] = ranks

    monkeypatch.setattr(vllm_together.distributed, "all_gather_object", all_gather)
    for rank, (requests, params) in enumerate(ranks):
        group = SimpleNamespace(world_size=len(ranks), rank_in_group=rank, cpu_group=rank)
        monkeypatch.setattr(vllm_together, "_group", lambda group=group: group)
        answers = vllm_together.ask(lambda asked, how: list(zip(asked, how, strict=True)), requests, params)
        assert answers == list(zip(requests, params, strict=True))


def test_a_stop_of_one_rank_is_a_stop_of_all_that_share_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(cpu_group="ranks of the engine")
    monkeypatch.setattr(vllm_together, "_group", lambda: group)
    own: list[int] = []

    def stop() -> None:
        raise StopRequested(signal.SIGINT)

    for of_another, check, raised in ((0, lambda: None, None), (0, stop, "SIGINT"), (15, lambda: None, "SIGTERM")):

        def all_reduce(tensor: Any, op: Any, group: Any, of_another: int = of_another) -> None:
            assert group == "ranks of the engine"
            assert op == torch.distributed.ReduceOp.MAX
            own.append(int(tensor))
            tensor.fill_(max(int(tensor), of_another))

        monkeypatch.setattr(vllm_together.distributed, "all_reduce", all_reduce)
        with pytest.raises(StopRequested, match=f"stopped by {raised}") if raised else nullcontext():
            vllm_together.check(check)
    assert own == [0, signal.SIGINT, 0], "each is asked, whether it stops or not"


def test_a_part_of_a_weight_is_not_quantized_by_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be in other blocks than the trainer's whole weight."""
    monkeypatch.setattr(vllm_start, "_quantizes_alike", lambda request: True)
    monkeypatch.setattr(vllm_start, "write_base", lambda policy, folder: None)
    for size, quantization in ((1, "bitsandbytes"), (2, None)):
        with vllm_start._model_to_start_from(of_four_bits("native", size)) as (_, kept):
            assert kept == quantization


def test_vllm_picks_its_bitsandbytes_loader_by_that_argument(checkpoint: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(model=str(checkpoint), quantization="bitsandbytes", skip_tokenizer_init=True)
    assert arguments.create_load_config().load_format == "bitsandbytes"


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_an_output_layers_adapter_counts_in_every_row_of_logits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own would take those alone that it samples from."""
    module = importlib.import_module(f"vllm.lora.punica_wrapper.punica_{kind}")
    wrapper = getattr(module, f"PunicaWrapper{kind.upper()}")
    names = list(inspect.signature(inspect.unwrap(wrapper.add_lora_logits)).parameters)
    assert names[:6] == ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale"]
    monkeypatch.setattr(wrapper, "add_lora_logits", inspect.unwrap(wrapper.add_lora_logits))
    vllm_process._add_one_adapter_to_all_logits(wrapper)
    logits, hidden = torch.randn(7, 10), torch.randn(7, 4)  # the vocabulary is padded to 12
    a, b = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 12, 2)
    expected = logits + 0.5 * (hidden @ a[0, 0].T @ b[0, 0].T)[:, :10]
    wrapper.add_lora_logits(None, logits, hidden, a, b, 0.5)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    ("dtype", "device", "keys", "bound"),
    [
        (torch.float32, "cpu", {}, 2e-4),
        (torch.float32, "cpu", {"tf32": True}, 2e-4),  # it is of GPUs
        (torch.float32, "cuda", {"rollout_backend": "hf"}, 2e-4),
        (torch.float32, "cuda", {"rollout_backend": "hf", "tf32": True}, 0.5),
        (torch.float32, "cuda", {}, 0.5),  # its attention rounds: 0.0019 in a sound run
        (torch.float32, "cpu", {"is_loaded_in_8bit": True}, 0.5),
        (torch.bfloat16, "cpu", {}, 0.5),
        (torch.float32, "cpu", {"bf16": True}, 0.5),
        (torch.float32, "cpu", {"fp16": True}, 0.5),
    ],
)
def test_the_bound_is_tight_where_nothing_is_rounded(
    dtype: torch.dtype, device: str, keys: dict[str, Any], bound: float
) -> None:
    keys = {"rollout_backend": "vllm", "tf32": None, "bf16": False, "fp16": False, **keys}
    embeddings = SimpleNamespace(weight=torch.zeros(1, dtype=dtype))
    model = SimpleNamespace(
        device=torch.device(device), get_input_embeddings=lambda: embeddings,
        is_loaded_in_8bit=keys.pop("is_loaded_in_8bit", False),
    )  # fmt: skip
    arguments: Any = SimpleNamespace(
        training=SimpleNamespace(**keys), finetuning=SimpleNamespace(**keys, pure_bf16=False)
    )
    assert canary_bound(arguments, model) == bound


@pytest.mark.parametrize(("vllm_lora", "quantization"), [("native", "bitsandbytes"), ("merged", None)])
def test_four_bits_cannot_hold_a_merged_adapter(
    vllm_lora: str, quantization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the engine starts from the trainer's base, dequantized, where it would quantize the files as the trainer."""
    written: list[Path] = []
    monkeypatch.setattr(vllm_start, "_quantizes_alike", lambda request: True)
    monkeypatch.setattr(vllm_start, "write_base", lambda policy, folder: written.append(folder))
    with vllm_start._model_to_start_from(of_four_bits(vllm_lora)) as (path, kept):
        assert kept == quantization
        assert [path] == ([str(folder) for folder in written] or ["files"])
    assert bool(written) == (vllm_lora == "merged")


def test_an_adapter_in_float32_is_refused_on_a_gpu() -> None:
    keys = SimpleNamespace(vllm_sleep=0, finetuning_type="lora", vllm_lora="native")
    request: Any = SimpleNamespace(keys=keys, device_type="cuda", compute_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"float32.*half precision alone.*`bf16: true`"):
        ENGINES["vllm"].build(request)


def of_four_bits(vllm_lora: str, tensor_parallel: int = 1) -> Any:
    """What an engine on a GPU is asked for, beside a base of 4 bits."""
    keys = SimpleNamespace(
        **{"vllm_base": "auto", "vllm_lora": vllm_lora, "model_name_or_path": "files"},
        vllm_tensor_parallel=tensor_parallel,
    )
    return SimpleNamespace(
        keys=keys, changes_to_files=("quantized",), device_type="cuda", local_process_index=0, policy=None,
        images=None, announce=lambda message: None,
    )  # fmt: skip
