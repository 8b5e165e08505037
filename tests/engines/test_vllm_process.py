"""What an engine does to the process it starts in, and how it ends.

The first test starts an interpreter, on a machine where vLLM never ran. The others fork one that has imported vLLM.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.host_processes import VLLM, HostProcesses


_STOPPED = "stopped by SIGTERM after 3"
PREAMBLE = """
import logging, os, random, signal, sys
import numpy as np, psutil, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM
from grpo_stage.rollout.engines import vllm_process
from grpo_stage.rollout.engines.vllm import VLLMEngine
from grpo_stage.rollout.engines.vllm_settings import VLLMSettings
from grpo_stage.survival.stop import StopRequested
from grpo_stage.types import Prompt, SamplingSettings

class Decoder:
    def decode(self, ids, **options):
        return " ".join(map(str, ids))

vllm_process._CPU_KV_CACHE_BYTES = 1 << 26  # as in tests/e2e/conftest.py
checkpoint = sys.argv[1]
torch.manual_seed(0)
policy = get_peft_model(LlamaForCausalLM.from_pretrained(checkpoint), LoraConfig(r=4, target_modules="all-linear"))
sampling = SamplingSettings(num_generations=2, max_new_tokens=8, temperature=1.0)

def prompt(index, length=10):
    return Prompt(index=index, token_ids=tuple(range(20, 20 + length)), messages=(), reference=None)

def start(**changed):
    settings = dict(
        model_name_or_path=checkpoint, adapter=True, max_model_len=256, max_lora_rank=4,
        gpu_memory_utilization=0.5, enforce_eager=False, dtype="auto", logprob_temperature=None,
    )
    return VLLMEngine(VLLMSettings(**settings | changed), Decoder())
"""


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty for the first of the tests, a machine where vLLM never ran; it takes 20 s to fill."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture
def environment(caches: Path, tmp_path: Path) -> dict[str, str]:
    """What a process has besides; no C++ compiler."""
    return {
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "CXX": "no-compiler-here",
        "TMPDIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }


def written(script: str, folder: Path) -> str:
    file = folder / "script.py"
    file.write_text(PREAMBLE + textwrap.dedent(script))
    return str(file)


def test_a_start_changes_nothing_that_the_trainer_depends_on(
    checkpoint: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    script = written(
        """
        os.environ["LOCAL_WORLD_SIZE"] = "4"
        logging.getLogger().setLevel(logging.INFO)

        def state():
            return {
                "environment": dict(os.environ),
                "python": random.getstate(),
                "numpy": str(np.random.get_state()),
                "torch": torch.get_rng_state().tolist(),
                "set_num_threads": torch.set_num_threads,
                "num_threads": torch.get_num_threads(),
                "default_dtype": torch.get_default_dtype(),
                "grad": torch.is_grad_enabled(),
                "matmul_precision": torch.get_float32_matmul_precision(),
                "affinity": os.sched_getaffinity(0),
                "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
                "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
                "children": psutil.Process().children(recursive=True),
            }

        def changed(before):
            after = state()
            return [key for key in before if before[key] != after[key]]

        before = state()
        engine = start()
        print("start changed", changed(before))
        engine.sync(policy, 1)
        (group,) = engine.generate([prompt(0)], sampling, 1)
        print("rollout changed", changed(before), len(group.completions))
        engine.close()
        print("close changed", changed(before), torch.distributed.is_initialized())
        second = start()
        second.sync(policy, 2)
        (again,) = second.generate([prompt(0)], sampling, 1)
        print("second", again.policy_version, again.completions == group.completions)
        torch.distributed.destroy_process_group()  # as the host does at a run's end
        second.close()
        print("closed")
        """,
        tmp_path,
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "TORCHINDUCTOR"))}
    result = subprocess.run(
        [sys.executable, script, str(checkpoint)],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "start changed []",
        "rollout changed [] 2",
        "close changed [] False",
        "second 2 True",
        "closed",
    ]


def test_a_process_that_ends_without_close_leaves_nothing(
    checkpoint: Path, environment: dict[str, str], host_processes: HostProcesses, tmp_path: Path
) -> None:
    """Runs that are killed are those of tests/e2e/test_interruptions.py."""
    script = written(
        """
        engine = start()
        engine.sync(policy, 1)
        engine.generate([prompt(0)], sampling, 1)
        assert not psutil.Process().children(recursive=True)
        print("ready", flush=True)
        raise SystemExit(3)
        """,
        tmp_path,
    )
    result = host_processes.run(script, str(checkpoint), modules=VLLM, **environment)
    assert result.stdout.splitlines() == ["ready"], result.stderr
    assert result.returncode == 3, result.stderr
    assert not list(tmp_path.glob("grpo-stage-adapter-*"))


def test_two_ranks_roll_out_their_own_prompts(
    checkpoint: Path, environment: dict[str, str], host_processes: HostProcesses, tmp_path: Path
) -> None:
    """Different prompts, lengths and numbers of calls on each; the trainer's process group serves before and after.

    Then both are one engine, with an adapter and with whole weights: they sample what each samples alone, the first
    one without a prompt as well, and stop together.
    """
    script = written(
        """
        import torch.distributed as dist

        def total(value):
            tensor = torch.tensor([float(value)])
            dist.all_reduce(tensor)
            return tensor.item()

        dist.init_process_group("gloo")
        rank = dist.get_rank()
        engine = start()
        sampled = []
        for version in range(2):
            engine.sync(policy, version)
            for _ in range(1 + rank):
                groups = engine.generate([prompt(10 * rank + i, 10 + i) for i in range(1 + 2 * rank)], sampling, 1)
                sampled.append((version, [(g.prompt.index, g.policy_version) for g in groups]))
            assert total(1) == 2
        engine.close()
        assert total(rank) == 1

        def scored(prompts):
            groups = engine.generate(prompts, sampling, 2)
            scores = torch.cat([torch.zeros(0), *engine.score(groups)])
            ids = [(g.prompt.index, g.policy_version, [c.token_ids for c in g.completions]) for g in groups]
            logprobs = [logprob for g in groups for c in g.completions for logprob in c.sampling_logprobs]
            return ids, torch.tensor(logprobs), scores

        class Stopper:
            calls = 0

            def __call__(self):
                self.calls += 1
                if rank == 1 and self.calls == 3:
                    raise StopRequested(signal.SIGTERM)

        randomized = {name: torch.randn_like(p) * 0.05 for name, p in policy.named_parameters() if "lora" in name}
        policy.load_state_dict(randomized, strict=False)
        whole = policy.merge_and_unload(safe_merge=True)
        prompts = [prompt(20 + i, 30 + 7 * i) for i in range(3 * rank)]
        for size, adapter in ((1, False), (2, False), (2, True)):
            if adapter:
                policy = get_peft_model(
                    LlamaForCausalLM.from_pretrained(checkpoint),
                    LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
                )
                policy.load_state_dict(randomized, strict=False)
            engine = start(adapter=adapter, tensor_parallel_size=size, timeout_s=300)
            engine.sync(policy if adapter else whole, 7)
            result = scored(prompts)
            if size == 1:
                alone = result
            differences = [(a - b).abs().max().item() if len(a) else 0.0 for a, b in zip(result[1:], alone[1:])]
            sampled.append((size, adapter, result[0] == alone[0], len(result[1]), max(differences) < 1e-4))
            if size > 1:
                engine.on_step = Stopper()
                try:
                    engine.generate(prompts, sampling, 2)
                except StopRequested as stop:
                    sampled.append(f"{stop} after {engine.on_step.calls}")
                engine.on_step = lambda: None
                assert scored(prompts)[0] == alone[0]
            engine.close()
        everyone = [None, None]
        dist.all_gather_object(everyone, sampled)
        if rank == 0:
            print(everyone)
        dist.destroy_process_group()
        """,
        tmp_path,
    )
    ranks = host_processes.run_ranks(2, script, str(checkpoint), modules=VLLM, **environment)
    for rank in ranks:
        assert rank.returncode == 0, rank.stderr
    first = [(version, [(0, version)]) for version in (0, 1)]
    second = [(version, [(10, version), (11, version), (12, version)]) for version in (0, 0, 1, 1)]
    together = [
        [(1, False, True, num_tokens, True)]
        + [each for adapter in (False, True) for each in ((2, adapter, True, num_tokens, True), _STOPPED)]
        for num_tokens in (0, 3 * 2 * 8)
    ]
    everyone = str([first + together[0], second + together[1]])
    assert [rank.stdout.splitlines() for rank in ranks] == [[everyone], []]
