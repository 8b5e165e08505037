"""A trainer with a fake engine and a fake reward: for tests of the trainer alone."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, TrainingArguments

from grpo_stage.arguments import GRPOArguments
from grpo_stage.trainer import GRPOTrainer
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup, Sample, SamplingSettings, Step
from tests.host_processes import HostProcesses


VOCAB, MAX_NEW_TOKENS = 61, 6


class FakeTokenizer:
    pad_token_id = 0

    def save_pretrained(self, folder):
        pass


class FakeEngine:
    """Random completions that depend on (step, prompt, sample) alone; notes what it was asked for."""

    logprob_temperature = 1.0

    def on_step(self):
        pass

    def __init__(self, version_offset: int = 0) -> None:
        self.asked: list[tuple[int, list[int]]] = []
        self.version_offset = version_offset
        self.synced: list[int] = []

    def sync(self, policy, version):
        self.synced.append(version)

    def generate(self, prompts, sampling, step):
        self.asked.append((step, [prompt.index for prompt in prompts]))
        return [
            RolloutGroup(
                prompt=prompt,
                completions=tuple(
                    fake_completion(1000 * step + 100 * prompt.index + i) for i in range(sampling.num_generations)
                ),
                policy_version=self.synced[-1] + self.version_offset,
            )
            for prompt in prompts
        ]

    def sleep(self):
        pass

    def close(self):
        pass


def fake_completion(seed: int) -> Completion:
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, MAX_NEW_TOKENS + 1, (), generator=generator))
    return Completion(
        token_ids=tuple(torch.randint(VOCAB, (length,), generator=generator).tolist()),
        sampling_logprobs=(-4.0,) * length,
        finish_reason=FinishReason.LENGTH if length == MAX_NEW_TOKENS else FinishReason.STOP,
        text=f"{seed}",
    )


class ScoringEngine(FakeEngine):
    """Answers with the weights that it was given at the last sync, or at one before."""

    def __init__(self, backlog: int = 0) -> None:
        super().__init__()
        self.backlog = backlog
        self.given: list[torch.nn.Module] = []
        self.is_awake = False

    def sync(self, policy, version):
        super().sync(policy, version)
        self.given.append(copy.deepcopy(policy))
        self.is_awake = True

    def sleep(self):
        self.is_awake = False

    @torch.no_grad()
    def score(self, groups):
        assert self.is_awake
        model = self.given[max(0, len(self.given) - 1 - self.backlog)]
        scores = []
        for group in groups:
            for completion in group.completions:
                ids = torch.tensor([group.prompt.token_ids + completion.token_ids])
                logits = model(input_ids=ids).logits[0, -len(completion.token_ids) - 1 : -1]
                scores.append(logits.log_softmax(-1)[range(len(completion.token_ids)), completion.token_ids])
        return scores


class LengthRewards:
    """Rewards even token ids; `None` for every completion where `none` is set."""

    names = ("even",)
    weights = (1.0,)

    def __init__(self, none: bool = False) -> None:
        self.none = none

    def score(self, groups):
        return [
            [[None if self.none else sum(t % 2 == 0 for t in c.token_ids) / len(c.token_ids)] for c in g.completions]
            for g in groups
        ]

    def total(self, rewards):
        return rewards[0]

    def take_counters(self):
        return {}


def make_trainer(
    tmp_path: Path,
    *,
    num_prompts=5,
    engine=None,
    rewards=None,
    reference=None,
    bound=1e9,
    tests_slope=False,
    training=None,
    num_eval_prompts=0,
    shuffle=True,
    temperature=1.0,
    router_aux_loss_coef=None,
    change_model=lambda model: model,
    **grpo,
):
    """Of a small Llama; of a mixture of experts where `router_aux_loss_coef` is given, 0 included."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    if router_aux_loss_coef is None:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **shape))
    model = change_model(model)
    arguments = GRPOArguments(rollout_backend="hf", num_generations=4, **grpo)
    defaults = {
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    training = defaults | (training or {})
    engine, rewards = engine or FakeEngine(), rewards or LengthRewards()
    trainer = GRPOTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), report_to="none", disable_tqdm=True,
            lr_scheduler_type="constant", **training,
        ),
        grpo_args=arguments,
        sampling=SamplingSettings(num_generations=4, max_new_tokens=MAX_NEW_TOKENS, temperature=temperature),
        prompts=[
            Prompt(index=i, token_ids=(i + 1, i + 2, i + 3)[: i % 3 + 1], messages=(), reference=None)
            for i in range(num_prompts)
        ],
        eval_prompts=[
            Prompt(index=i, token_ids=(i + 7,), messages=(), reference=None) for i in range(num_eval_prompts)
        ],
        engine=engine,
        rewards=rewards,
        reference=reference(model) if reference else None,
        max_sampling_logprob_diff=bound,
        tests_slope=tests_slope,
        router_aux_loss_coef=router_aux_loss_coef or 0.0,
        recipe={"recipe_hash": "x", "recipe": {}},
        shuffle=shuffle,
        processing_class=FakeTokenizer(),
    )  # fmt: skip
    trainer.engine, trainer.rewards = engine, rewards  # for a test to look at
    return trainer


RANK = """
import os, sys
sys.path.insert(0, {root!r})
from grpo_stage.distributed import import_before_the_group, leave_process_group
import_before_the_group()
exec({code!r}, {{}})  # nothing refers to what is in it afterwards
leave_process_group()
threads = [open(f"/proc/self/task/{{each}}/comm").read().strip() for each in os.listdir("/proc/self/task")]
assert "pt_gloo_runloop" not in threads, "a thread of gloo's is left, and may abort the process as it exits"
"""


def outputs_of_two_ranks(host_processes: HostProcesses, code: str, folder: Path) -> list[str]:
    """What two processes of one run print that both execute `code`, kept in `folder`; neither may fail."""
    script = folder / "rank.py"
    script.write_text(RANK.format(code=code, root=str(Path(__file__).parents[2])))
    ranks = host_processes.run_ranks(2, str(script))
    outputs = [rank.stdout + rank.stderr for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    return outputs


def collect(trainer: GRPOTrainer) -> list[Step]:
    """The steps of one rollout."""
    trainer.collector.collect(trainer.state)
    queue, steps = trainer.collector.queue, []
    while queue:
        steps.append(queue.first())
        queue.drop_first()
    return steps


def groups_of(step: Step) -> list[list[Sample]]:
    """Samples of one prompt together."""
    return [list(group) for _, group in itertools.groupby(step.samples, key=lambda sample: sample.prompt.index)]


def watch_steps(trainer: GRPOTrainer, before: Callable[[Step], None]) -> None:
    """Have `before` see what each step trains on."""
    learn = trainer.learner.learn
    trainer.learner.learn = lambda model, step, number: (before(step), learn(model, step, number))[1]


def gradient_of(trainer: GRPOTrainer, step: Step) -> torch.Tensor:
    trainer.model.zero_grad()
    trainer.learner.learn(trainer.model, step, trainer.state.global_step)
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
