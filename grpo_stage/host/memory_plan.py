"""A recipe -> what its run holds on a device, and what PPO with a critic would."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from grpo_stage.host import facade
from grpo_stage.host.empty_model import dtype_of_files, empty_model, empty_policy
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.layout.costs import ModelCost
from grpo_stage.layout.syntax import Layout
from grpo_stage.memory.engine import Engine, hf_engine, kv_bytes_per_token, kv_parts, vllm_on_cpu, vllm_on_gpu
from grpo_stage.memory.model_cost import model_cost
from grpo_stage.memory.optimizers import galore_states, state_bytes
from grpo_stage.memory.parts import GIB, Budget
from grpo_stage.memory.plan import CONTEXT, USABLE, Others, Trainee, grpo, ppo
from grpo_stage.memory.ppo import critic_of
from grpo_stage.memory.sharding import gathered_bytes, sharded
from grpo_stage.memory.sizes import Quantization, Sizes, sizes_of
from grpo_stage.memory.trace import Load, Trace, trace
from grpo_stage.update.activations import OF_A_LOGIT, OF_ADAM
from grpo_stage.update.activations import USABLE as USABLE_FOR_ACTIVATIONS
from grpo_stage.update.head import MAX_LOGITS
from grpo_stage.update.output_layer import compute_output_layer_in_float32


HF_TOKENS = 16384
"""How many tokens the `hf` engine has in its cache at once (`rollout/engines/hf.py`)."""
_CPU_CACHE = 1.0 * GIB
"""vLLM's on a CPU (`rollout/engines/vllm_process.py`)."""
_UNKNOWN_STATES = ("use_badam", "use_apollo", "use_adam_mini", "use_muon")


@dataclass(frozen=True, slots=True)
class Device:
    """One of the devices that a run is planned for."""

    type: str
    """`cuda` or `cpu`."""
    capacity: float
    """Bytes."""
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What is known of a run's memory."""

    device: Device
    num_parameters: int
    num_trained: int
    budgets: tuple[Budget, ...]
    """GRPO first, then PPO in its forms, if no layout is planned."""
    kept: Trace
    recomputed: Trace
    """A micro-batch of the policy, with its activations kept, and with gradient checkpointing."""
    checkpointing: bool
    num_micro_batches: int
    micro_batch_tokens: int
    update_flops: float
    """Of an optimizer step's forward and backward passes on one device."""
    cost: ModelCost
    """What the model costs in a pass."""
    problems: tuple[str, ...]
    """Why the run cannot start, memory aside."""
    notes: tuple[str, ...]

    @property
    def grpo(self) -> Budget:
        return self.budgets[0]

    @property
    def limit(self) -> float:
        """Bytes that can be filled."""
        return USABLE * self.device.capacity

    @property
    def fits(self) -> bool:
        return not self.problems and self.grpo.peak.total <= self.limit


def make_plan(
    arguments: RunArguments,
    precision: Mapping[str, bool],
    device: Device,
    *,
    prompt_length: int | None = None,
    completion_length: int | None = None,
    layout: Layout | None = None,
) -> MemoryPlan:
    """Plan a run without loading weights.

    Args:
        arguments: parsed for any device.
        precision: the recipe's `bf16`, `fp16` and `pure_bf16`.
        device: where it is to run.
        prompt_length: in tokens; None is `cutoff_len`, the longest.
        completion_length: in tokens; None is `max_new_tokens`, the longest.
        layout: how weights are divided over devices and where the engine is; None is on each device, undivided.

    Raises:
        ValueError: if the model's activations cannot be forecast.
    """
    planner = _Planner(arguments, precision, device, prompt_length, completion_length, layout)
    return planner.plan()


class _Planner:
    def __init__(
        self,
        arguments: RunArguments,
        precision: Mapping[str, bool],
        device: Device,
        prompt_length: int | None,
        completion_length: int | None,
        layout: Layout | None,
    ) -> None:
        self.arguments, self.device, self.layout = arguments, device, layout
        self.finetuning, self.training = arguments.finetuning, arguments.training
        self.engine_size = self.finetuning.vllm_tensor_parallel
        """How many devices that train hold the engine together."""
        if layout is not None:
            self.engine_size = layout.engine_size if layout.is_colocated else 1
        self.finetuning.pure_bf16 = bool(precision.get("pure_bf16"))
        self.autocast = torch.bfloat16 if precision.get("bf16") else torch.float16 if precision.get("fp16") else None
        half = torch.bfloat16 if self.finetuning.pure_bf16 else self.autocast
        arguments.model.compute_dtype = half or torch.float32
        self.file_dtype = dtype_of_files(arguments.model)
        self.compute_dtype = self.autocast or self.file_dtype
        self.config = facade.load_config(arguments.model).get_text_config()
        bits = arguments.model.quantization_bit
        self.quantization = (
            None if bits is None else Quantization(bits, has_double=arguments.model.double_quantization)
        )
        self.notes: list[str] = []
        self.prompts = self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps
        self.load = Load(
            num_prompts=self.prompts,
            group_size=self.finetuning.num_generations,
            prompt_length=prompt_length or arguments.data.cutoff_len,
            completion_length=completion_length or arguments.generating.max_new_tokens,
            max_tokens=self.finetuning.max_tokens_per_micro_batch,
            device_type=device.type,
            shares_prompts=not self.finetuning.disable_prompt_sharing,
            chunks_logits=not self.finetuning.disable_logit_chunking,
        )

    def plan(self) -> MemoryPlan:
        policy = empty_policy(self.arguments)
        if self.finetuning.cast_lm_head_to_fp32:
            compute_output_layer_in_float32(policy)
        sizes = sizes_of(policy, self.quantization)
        if self.layout is not None and self.layout.sharding != "none":
            policy.to(self.compute_dtype)  # as weights are gathered: autocast makes no copies of them
        kept, recomputed = (
            trace(policy, self.load, self.autocast, checkpointing=checkpointing) for checkpointing in (False, True)
        )
        others = Others(
            process=CONTEXT[self.device.type],
            engine=self._engine(sizes),
            reference=self._reference(sizes),
            reward_model=self._reward_model(),
        )
        checkpointing = self._checkpointing(sizes, kept, others)
        trainee = self._trainee(sizes, recomputed if checkpointing else kept)
        budgets = [grpo(trainee, others)]
        itemsize = self.compute_dtype.itemsize
        if self.layout is None:
            budgets += self._ppo(policy, trainee, others, checkpointing)
        elif self.layout.sharding != "none":
            gathered = gathered_bytes(policy, itemsize)
            count = self.layout.num_trainers
            budgets = [sharded(budgets[0], self.layout.sharding, count, sizes, itemsize, gathered)]
        chunks = self.load.micro_batches()
        passes = sum(map(len, chunks)) / len(chunks[0])
        return MemoryPlan(
            device=self.device,
            num_parameters=sizes.num_parameters,
            num_trained=sum(each.numel for each in sizes.trainable),
            budgets=tuple(budgets),
            kept=kept,
            recomputed=recomputed,
            checkpointing=checkpointing,
            num_micro_batches=len(chunks),
            micro_batch_tokens=int(self.load.inputs(chunks[0]).input_ids.numel()),
            update_flops=passes * trainee.micro_batch.flops,
            cost=model_cost(
                policy,
                self.config,
                sizes,
                itemsize,
                engine_weights=self._engine_weights(sizes),
                delivers_adapter=isinstance(policy, PeftModel) and self.finetuning.vllm_lora == "native",
            ),
            problems=tuple(filter(None, [others.engine.problem])),
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def _ppo(self, policy: Any, trainee: Trainee, others: Others, checkpointing: bool) -> list[Budget]:
        critic = critic_of(policy)
        of_critic = self._trainee(
            sizes_of(critic, self.quantization),
            trace(critic, self.load, self.autocast, checkpointing=checkpointing, gives_values=True),
        )
        budgets = [ppo(trainee, of_critic, others, "PPO, critic a model of its own")]
        if self.finetuning.finetuning_type in ("lora", "oft"):
            shared = _on_the_same_base(of_critic)
            budgets.append(ppo(trainee, shared, others, "PPO, critic an adapter on the policy's base"))
        return budgets

    def _trainee(self, sizes: Sizes, micro_batch: Trace) -> Trainee:
        buckets = sizes.gradients if self.device.count > 1 else 0.0
        return Trainee(
            sizes=sizes,
            states=self._states(sizes),
            micro_batch=micro_batch,
            is_only_micro_batch=len(self.load.micro_batches()) == 1,
            buckets=buckets,
        )

    def _states(self, sizes: Sizes) -> float:
        optim = str(getattr(self.training.optim, "value", self.training.optim))
        unknown = next((key for key in _UNKNOWN_STATES if getattr(self.finetuning, key)), None)
        if self.finetuning.use_galore:
            size = galore_states(self.finetuning.galore_rank)
            return float(sum(size(each) for each in sizes.trainable))
        states = None if unknown else state_bytes(optim, sizes.trainable)
        if states is None:
            named = f"`{unknown}: true`" if unknown else f"`optim: {optim}`"
            self.notes.append(f"The states of {named} are not known here; AdamW's are counted, which take more.")
            states = state_bytes("adamw_torch", sizes.trainable)
            assert states is not None
        return states

    def _reference(self, sizes: Sizes) -> float:
        finetuning = self.finetuning
        if finetuning.beta == 0.0:
            return 0.0
        if finetuning.ref_model is not None:
            other = facade.arguments_for(self.arguments.model, finetuning.ref_model)
            weights = sizes_of(empty_model(other)).frozen + sizes_of(empty_model(other)).trained
            is_float32 = finetuning.finetuning_type == "full" and not finetuning.pure_bf16
            return weights * (4 / dtype_of_files(other).itemsize if is_float32 else 1)
        is_lora = finetuning.finetuning_type in ("lora", "oft")
        starts_at_base = self.arguments.model.adapter_name_or_path is None or finetuning.create_new_adapter
        if is_lora and starts_at_base and not finetuning.pissa_init and not finetuning.sync_ref_model:
            return 0.0  # the base with the adapter switched off
        return sizes.trained + sizes.adapters

    def _reward_model(self) -> float:
        finetuning = self.finetuning
        if finetuning.reward_model is None or finetuning.reward_model_type == "api":
            return 0.0
        if finetuning.reward_model_type == "lora":
            self.notes.append("The reward model is an adapter on the policy; its few megabytes are not counted.")
            return 0.0
        sizes = sizes_of(empty_model(facade.arguments_for(self.arguments.model, finetuning.reward_model)))
        return sizes.weights

    def _engine(self, sizes: Sizes) -> Engine:
        load, generating = self.load, self.arguments.generating
        if self.layout is not None and not self.layout.is_colocated:
            return Engine()
        if self.finetuning.rollout_backend == "hf":
            count = self.prompts * self.finetuning.steps_per_generation * load.group_size
            rows = max(1, min(count, HF_TOKENS // (load.prompt_length + generating.max_new_tokens)))
            return hf_engine(
                self.config,
                self.compute_dtype.itemsize,
                num_prompts=-(-rows // load.group_size),
                num_rows=rows,
                prompt_length=load.prompt_length,
                completion_length=load.completion_length,
            )
        if self.finetuning.rollout_backend == "vllm_server":
            self.notes.append("The servers that sample hold the model a second time, on devices of their own.")
            return Engine()
        if self.device.type == "cpu":
            cache = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", 0)) * GIB or _CPU_CACHE
            return vllm_on_cpu(4.0 * sizes.num_parameters / self.engine_size, cache)
        if self.finetuning.rollout_ahead and self.layout is None:
            self.notes.append(
                "vLLM is counted on the GPU that trains; with `rollout_ahead` it has another where there are twice as "
                "many GPUs as processes."
            )
        weights = self._engine_weights(sizes)
        model, length = self.arguments.model, self.arguments.model.vllm_maxlen
        itemsize = self.compute_dtype.itemsize
        kv = length * kv_bytes_per_token(self.config, itemsize, is_vllm=True)
        return vllm_on_gpu(
            weights / self.engine_size,
            kv / min(self.engine_size, kv_parts(self.config)),
            self.device.capacity,
            model.vllm_gpu_util,
            not model.vllm_enforce_eager,
            self.finetuning.vllm_sleep,
        )

    def _engine_weights(self, sizes: Sizes) -> float:
        is_four_bit = self.quantization is not None and self.quantization.bits == 4
        if is_four_bit and self.finetuning.vllm_base == "auto" and self.engine_size == 1:
            return sizes.frozen
        return sizes.num_parameters * float(self.compute_dtype.itemsize)

    def _checkpointing(self, sizes: Sizes, kept: Trace, others: Others) -> bool:
        """As the recipe says, or as the run will decide (`update/activations.py`)."""
        if "disable_gradient_checkpointing" in self.arguments.given:
            return not self.arguments.model.disable_gradient_checkpointing
        kind = self.device.type
        held = sizes.weights + others.process + others.reference + others.reward_model + others.engine.left_in_update
        needed = kept.kept + OF_A_LOGIT * MAX_LOGITS[kind] + OF_ADAM * sum(each.numel for each in sizes.trainable)
        return needed > USABLE_FOR_ACTIVATIONS[kind] * (self.device.capacity - held)


def _on_the_same_base(critic: Trainee) -> Trainee:
    """A critic that shares the frozen weights of the policy: its own are an adapter and the last layer."""
    return dataclasses.replace(critic, sizes=dataclasses.replace(critic.sizes, frozen=0.0))


def this_device(uses_cpu: bool) -> Device:
    """The GPU of this machine if it has one and the recipe uses it, or else its main memory."""
    if torch.cuda.is_available() and not uses_cpu:
        return Device("cuda", float(torch.cuda.mem_get_info()[1]), torch.cuda.device_count())
    import psutil

    return Device("cpu", min(float(psutil.virtual_memory().total), _limit_of_container()))


def _limit_of_container() -> float:
    try:
        return float(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no such file, or `max`
        return float("inf")
