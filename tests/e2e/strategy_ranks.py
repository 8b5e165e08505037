"""What an optimizer step does to a small model, by as many processes as there are: argv names a file for the result.

The environment says how the weights are distributed, as the launchers do; or argv goes on with DeepSpeed configs as
JSON. Rewards, completions and what the losses compare with are the same everywhere.
"""

import copy
import dataclasses
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from grpo_stage.distributed import leave_process_group
from grpo_stage.rollout.engines.weights import PolicyWeights
from grpo_stage.types import Step
from grpo_stage.update import head, sharding


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.e2e.zero_launcher import leave_out_kernels
from tests.unit.trainer_on_fakes import VOCAB, collect, make_trainer


NUM_PROMPTS = 3  # of a step that has room for four: one process gets fewer than the other
LORA, AFTER_DROPPED, QUANTIZED = "lora", "after a dropped gradient", "quantized"
FAST: dict[str, Any] = {"max_tokens_per_micro_batch": 24}
PLAIN: dict[str, Any] = {**FAST, "disable_prompt_sharing": True, "disable_logit_chunking": True}
CASES: dict[str, dict[str, Any]] = {
    "full": {**FAST, "beta": 0.1},
    "full, clipped": {**FAST, "max_grad_norm": 0.3},
    "full, checkpointing, plain passes": {**PLAIN, "gradient_checkpointing": True},
    "full, tokens chosen over the step": {**FAST, "covariance_control": "kl_cov", "covariance_frac": 0.2},
    "full, after a gradient that was dropped": {**FAST, "max_grad_norm": 0.3, AFTER_DROPPED: True},
    "lora": {**FAST, "beta": 0.1, LORA: True},
    "lora, sequences weighed": {**FAST, "loss_type": "gspo", LORA: True},
    "lora, 4 bits": {**FAST, "max_grad_norm": 0.3, "beta": 0.1, LORA: True, QUANTIZED: True},
}
TRAINING = ("max_grad_norm", "gradient_checkpointing")
DELIVERED = ("full", "lora", "lora, 4 bits")
NOT_OF_A_RECIPE = (*TRAINING, LORA, AFTER_DROPPED, QUANTIZED)
Config = dict[str, Any] | None
"""Of DeepSpeed."""


def quantized(model: Any) -> torch.nn.Module:
    """A larger one, whose rows bitsandbytes' blocks on a CPU fit into; quantized as the host does it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**model.config.to_dict() | {"hidden_size": 64, "head_dim": 32}))
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_quant_storage=torch.float32,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})


def with_adapter(model: torch.nn.Module) -> torch.nn.Module:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)


def changed(case: dict[str, Any], model: torch.nn.Module) -> torch.nn.Module:
    if case.get(QUANTIZED):
        model = quantized(model)
    return with_adapter(model) if case.get(LORA) else model


def trainer_of(num_ranks: int, case: dict[str, Any], config: Config) -> Any:
    """One whose optimizer moves each weight by a hundred times its gradient."""
    training = {key: case[key] for key in TRAINING if key in case}
    training |= {"per_device_train_batch_size": 4 // num_ranks, "optim": "sgd", "learning_rate": 100.0}
    if config is not None:
        training |= {"deepspeed": copy.deepcopy(config), "use_cpu": False, "dataloader_pin_memory": False}
    if case.get("gradient_checkpointing"):
        training["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    options = {key: value for key, value in case.items() if key not in NOT_OF_A_RECIPE}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            Path(folder),
            num_prompts=NUM_PROMPTS,
            num_iterations=2,
            training={"max_grad_norm": 0.0} | training,
            change_model=partial(changed, case),
            **options,
        )
    if training.get("gradient_checkpointing"):
        trainer.model.gradient_checkpointing_enable(training["gradient_checkpointing_kwargs"])
    trainer._prepare_for_training(10, None, None)
    if not trainer.strategy.is_collective:
        trainer.prepare_models()
    return trainer


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    """The trained weights; on the first process."""
    sharded = trainer.sharded
    named = dict(trainer.model.named_parameters()) if sharded is None else sharded.state_dict(trainer.model)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    return {name: named[name].detach().clone() for name in trained if name in named}


def compared(step: Step) -> Step:
    """The step as if other policies had sampled it, and the reference were another."""

    def near(sample: Any, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + sum(sample.completion.token_ids))
        return sample.old_logprobs + 0.3 * torch.randn(len(sample.old_logprobs), generator=generator)

    samples = [dataclasses.replace(s, old_logprobs=near(s, 1), ref_logprobs=near(s, 2)) for s in step.samples]
    return dataclasses.replace(step, samples=tuple(samples))


def update_of(num_ranks: int, case: dict[str, Any], config: Config) -> tuple[dict[str, torch.Tensor], float]:
    """What a step adds to each trained weight, and the norm of its gradient."""
    trainer = trainer_of(num_ranks, case, config)
    step = compared(collect(trainer)[0])
    before = weights_of(trainer)
    model = trainer.model_wrapped
    if case.get(AFTER_DROPPED):
        trainer.learner.learn(model, step, trainer.state.global_step)
        trainer.strategy.drop_gradient(model)
        assert trainer._get_grad_norm(model) == 0
        trainer.optimizer.step()
        model.zero_grad()
    trainer.learner.learn(model, step, trainer.state.global_step)
    norm = trainer._clip_grad_norm(model) if trainer.args.max_grad_norm > 0 else None
    norm = float(trainer._get_grad_norm(model, norm))
    trainer.optimizer.step()
    after = weights_of(trainer)
    return {name: after[name] - tensor for name, tensor in before.items()}, norm


def held(p: Any) -> int:
    """Bytes of a weight in this process: all of it, or its shard."""
    if hasattr(p, "ds_tensor"):
        return max(p.nbytes, p.ds_tensor.nbytes)
    return sharding.shard(p).untyped_storage().nbytes()


def deliveries(num_ranks: int, cases: dict[str, dict[str, Any]], config: Config) -> dict[str, Any]:
    """What the engines get of a model, and how much of it is whole at once."""
    result = {}
    for name, case in cases.items():
        model = trainer_of(num_ranks, case, config).model
        whole, most = {}, 0
        for key, tensor in PolicyWeights(model, is_adapter=False).tensors():
            whole[key] = tensor.clone()
            here = sum(map(held, model.parameters()))
            most = max(most, here)
        sharding.rest(model)
        shards = sum(map(held, model.parameters()))
        for is_adapter in {False, LORA in case}:  # to servers one process alone delivers
            weights = PolicyWeights(model, is_adapter=is_adapter)
            with tempfile.TemporaryDirectory() as folder:
                weights.write(Path(folder)) if dist.get_rank() == 0 else weights.accompany()
        result[name] = {"weights": whole, "whole at once": most - shards}
    return result


def main(file: str, configs: list[Config]) -> None:
    head.MAX_LOGITS["cpu"] = 7 * VOCAB  # one process calls the output layer more often than the other
    num_ranks = int(os.environ["WORLD_SIZE"])
    results = []
    for config in configs:
        # What is kept in main memory matters to the gradient alone.
        offloads = config is not None and "offload_optimizer" in config["zero_optimization"]
        cases = {name: case for name, case in CASES.items() if AFTER_DROPPED in case or not offloads}
        if "ACCELERATE_USE_FSDP" in os.environ or (config is not None and config["zero_optimization"]["stage"] == 3):
            cases = {name: case for name, case in cases.items() if QUANTIZED not in case}  # refused
        updates = {name: update_of(num_ranks, case, config) for name, case in cases.items()}
        delivered = {name: case for name, case in cases.items() if name in DELIVERED and not offloads}
        results.append({"updates": updates, "deliveries": deliveries(num_ranks, delivered, config)})
        print(json.dumps({name: norm for name, (_, norm) in updates.items()}), flush=True)
    if dist.get_rank() == 0:
        torch.save(results, file)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        leave_out_kernels()
    main(sys.argv[1], [json.loads(each) for each in sys.argv[2:]] or [None])
    leave_process_group()
