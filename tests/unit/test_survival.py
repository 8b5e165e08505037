"""What may befall a run and must not harm it: stop signals, hangs, too little memory, losses that are not finite."""

import asyncio
import dataclasses
import functools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grpo_stage import workflow
from grpo_stage.rewards.errors import RewardError
from grpo_stage.survival import checkpoints, descendants
from grpo_stage.survival import stop as stop_module
from grpo_stage.survival.stop import SafeStop, StopRequested
from grpo_stage.survival.watchdog import HangError, Watchdog
from grpo_stage.types import EngineLostError, FinishReason
from grpo_stage.update.reference import InitialWeightsReference

from .processes import wait_until_gone
from .trainer_on_fakes import (
    FakeEngine,
    LengthRewards,
    ScoringEngine,
    collect,
    gradient_of,
    make_trainer,
    outputs_of_two_ranks,
    relative,
)


# Losses and gradients that are not finite


class SpoiltSteps:
    """Makes the gradient of the given optimizer steps (from 0) infinite, or their loss nan."""

    def __init__(self, trainer, steps, what):
        self.trainer, self.steps, self.what = trainer, steps, what
        if what == "gradient":
            trainer.model.lm_head.weight.register_hook(lambda g: g * float("inf") if self.now else None)
        else:
            trainer.model.lm_head.register_forward_hook(lambda *call: call[2] * float("nan") if self.now else None)

    @property
    def now(self):
        return self.trainer.state.global_step in self.steps


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_kept(tmp_path, what):
    trainer = make_trainer(tmp_path)
    SpoiltSteps(trainer, {1}, what)
    weights = []
    trainer.add_callback(snapshots(weights))
    trainer.train()

    log = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["skipped_steps"] for line in log] == [0, 1, 0]
    assert torch.equal(weights[1], weights[0]), "weight decay and momentum leave them alone, too"
    assert not torch.equal(weights[2], weights[1])
    assert all(torch.isfinite(each).all() for each in weights)
    assert log[1]["reward"] == log[1]["rewards/even/mean"], "the rollout was sound, and is logged"
    kept = json.loads((tmp_path / "skipped_step_2_rank0.json").read_text())
    assert kept["step"] == 2
    assert [sample["prompt"] for sample in kept["samples"]][::4] == trainer.engine.asked[1][1]
    assert all(sample["completion"]["token_ids"] and "advantage" in sample for sample in kept["samples"])
    assert not list(tmp_path.glob("skipped_step_[13]*"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_steps_that_are_not_finite_in_a_row_end_the_run(tmp_path, what):
    trainer = make_trainer(tmp_path, num_prompts=12, max_skipped_steps=2)
    SpoiltSteps(trainer, {0, 2, 3, 4}, what)  # the first is followed by a sound one: the row starts anew
    with pytest.raises(FloatingPointError, match=r"step 5 is not finite.*2 steps before \(`max_skipped_steps: 2`\)"):
        trainer.train()
    assert torch.isfinite(trainer.model.lm_head.weight).all()


def test_a_run_whose_every_step_was_skipped_is_no_success(tmp_path):
    trainer = make_trainer(tmp_path)  # three steps, and five may be skipped
    SpoiltSteps(trainer, {0, 1, 2}, "loss")
    with pytest.raises(FloatingPointError, match=r"None of the 3 steps .* nothing was learned.*learning_rate"):
        trainer.train()


class SameRewards(LengthRewards):
    def score(self, groups):
        return [[[0.5] for _ in group.completions] for group in groups]


class TruncatedEngine(FakeEngine):
    def generate(self, *args):
        return [
            dataclasses.replace(
                group,
                completions=tuple(
                    dataclasses.replace(each, finish_reason=FinishReason.LENGTH) for each in group.completions
                ),
            )
            for group in super().generate(*args)
        ]


@pytest.mark.parametrize(
    "options",
    [
        {"rewards": SameRewards()},
        {"rewards": SameRewards(), "beta": 0.1, "reference": InitialWeightsReference},
        {"rewards": SameRewards(), "advantage_estimator": "reinforce_plus_plus"},
        {"engine": TruncatedEngine(), "mask_truncated_completions": True},
    ],
    ids=["equal rewards", "and a KL", "and no groups", "nothing that the loss uses"],
)
def test_a_run_without_anything_to_learn_from_is_no_success(tmp_path, options):
    trainer = make_trainer(tmp_path, **options)
    with pytest.raises(RuntimeError, match=r"In none of the 3 steps .*nothing was learned.*`reward_funcs`"):
        trainer.train()


@pytest.mark.parametrize("spoilt", [{0}, {2}, {0, 1}], ids=str)
def test_a_run_that_learned_nothing_for_two_reasons_names_both(tmp_path, spoilt):
    trainer = make_trainer(tmp_path, rewards=SameRewards(), disable_zero_advantage_skipping=True)
    SpoiltSteps(trainer, spoilt, "loss")
    both = rf"^{len(spoilt)} of the 3 steps were skipped.*learning_rate.* none of the others .*`reward_funcs`"
    with pytest.raises(FloatingPointError, match=both):
        trainer.train()


def test_fp16_may_skip_as_many_steps_more_as_its_loss_scale_can_be_halved(tmp_path):
    trainer = make_trainer(tmp_path, max_skipped_steps=1)
    learner, step = trainer.learner, collect(trainer)[0]
    learner._scales_loss = True
    SpoiltSteps(trainer, {0}, "gradient")
    for _ in range(17):
        learner.learn(trainer.model, step, 0)
        assert not all(p.grad.isfinite().all() for p in trainer.model.parameters()), "the scaler lowers its scale"
    with pytest.raises(FloatingPointError, match=r"the 17 steps before .`max_skipped_steps: 1`, and 16 more"):
        learner.learn(trainer.model, step, 0)


def test_a_resumed_run_whose_last_step_is_skipped_has_learned_before(tmp_path):
    training = {"save_strategy": "steps", "save_steps": 2}
    SpoiltSteps(whole := make_trainer(tmp_path, training=training), {2}, "loss")
    whole.train()
    SpoiltSteps(resumed := make_trainer(tmp_path, training=training), {2}, "loss")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3


def snapshots(weights):
    from transformers import TrainerCallback

    class Snapshots(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append(model.lm_head.weight.detach().clone())

    return Snapshots()


# Memory that runs out


class SmallMemory:
    """Raises what CUDA raises for a pass of more than `limit` tokens."""

    def __init__(self, model, limit):
        self.limit, self.refused = limit, 0
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        if kwargs["input_ids"].numel() > self.limit:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_out_of_memory_in_the_update_halves_the_budget_and_gives_the_same_gradient(tmp_path, caplog):
    ample, scarce = make_trainer(tmp_path / "ample"), make_trainer(tmp_path / "scarce")
    memory = SmallMemory(scarce.model, limit=20)
    data = collect(ample)[0]
    assert relative(gradient_of(scarce, data), gradient_of(ample, data)) < 1e-5
    assert memory.refused >= 1
    assert scarce.learner.budget.max_tokens <= 20
    said = [record for record in caplog.records if record.name.endswith("token_budget")]
    assert len(said) == memory.refused
    assert "on rank 0" in caplog.text
    assert f"max_tokens_per_micro_batch: {scarce.learner.budget.max_tokens}" in caplog.text

    once = [trainer.tracker.take() for trainer in (ample, scarce)]
    assert once[1]["entropy"] == pytest.approx(once[0]["entropy"], rel=1e-5), "what failed is not counted"
    gradient_of(scarce, data)
    assert memory.refused == len(said), "the budget stays"


def test_out_of_memory_in_old_and_reference_passes_halves_the_budget(tmp_path):
    from grpo_stage.update.reference import InitialWeightsReference

    settings = {"num_iterations": 2, "beta": 0.1, "reference": InitialWeightsReference}
    ample, scarce = (make_trainer(tmp_path / name, **settings) for name in ("ample", "scarce"))
    memory = SmallMemory(scarce.model, limit=20)
    for theirs, ours in zip(collect(ample), collect(scarce), strict=True):
        for a, b in zip(theirs.samples, ours.samples, strict=True):
            assert torch.allclose(a.old_logprobs, b.old_logprobs, atol=1e-6)
            assert torch.allclose(a.ref_logprobs, b.ref_logprobs, atol=1e-6)
    assert memory.refused >= 1


def test_one_rank_that_runs_out_of_memory_takes_the_other_through_the_step_again(host_processes, tmp_path):
    """In its very first pass, where DDP would broadcast buffers, and in the last."""
    code = f"""
import os, sys, torch
from pathlib import Path
from tests.unit.trainer_on_fakes import make_trainer

def run(name, fails):
    folder = Path({str(tmp_path)!r}, name, os.environ["RANK"])
    trainer = make_trainer(folder, num_prompts=8, max_tokens_per_micro_batch=40)
    calls = []
    def forward(module, args, kwargs):
        if module.training and torch.is_grad_enabled():
            calls.append(kwargs["input_ids"].shape[0])
            if os.environ["RANK"] == "1" and len(calls) in fails:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    trainer.model.register_forward_pre_hook(forward, with_kwargs=True)
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

ample, scarce = run("ample", ()), run("scarce", (1, 5))
print("weights differ by", ((ample - scarce).norm() / ample.norm()).item())
"""
    outputs = outputs_of_two_ranks(host_processes, code, tmp_path)
    assert "Out of memory on rank 1" in outputs[1]
    assert "Out of memory" not in outputs[0]
    for output in outputs:
        assert float(output.split("weights differ by")[1].split()[0]) < 1e-4


def test_a_single_completion_that_does_not_fit_ends_the_run_with_the_remedies(tmp_path):
    trainer = make_trainer(tmp_path)
    SmallMemory(trainer.model, limit=1)
    with pytest.raises(RuntimeError, match=r"single completion of \d+ tokens.*`max_new_tokens`.*`vllm_gpu_util`"):
        trainer.train()


def test_an_error_that_is_not_about_memory_is_not_taken_for_one(tmp_path):
    trainer = make_trainer(tmp_path)

    def fail(*call):
        raise RuntimeError("shapes do not match")

    trainer.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.train()


# Stops


def strike(trainer, where, at_step):
    """Send this process SIGTERM once, at the given place of a step (from 0)."""
    sent = []

    def send():
        if trainer.state.global_step == at_step and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    if where == "rollout":
        plain = trainer.engine.generate

        def generate(prompts, sampling, step):
            groups = plain(prompts, sampling, step)
            send()
            trainer.engine.on_step()
            assert not (sent and trainer.state.global_step == at_step), "the rollout is left"
            return groups

        trainer.engine.generate = generate
    elif where == "reward":
        score = trainer.rewards.score

        def slow_score(groups):
            send()
            return score(groups)

        trainer.rewards.score = slow_score
    else:
        trainer.model.register_forward_hook(
            lambda *call: send() if trainer.collector.queue and torch.is_grad_enabled() else None
        )


RUN = {"num_iterations": 2, "steps_per_generation": 2, "max_tokens_per_micro_batch": 10}
UNTIMED = re.compile(r"time|seconds?|per_second|runtime|memory/|tflops|mfu")


def untimed(history):
    return [{key: value for key, value in line.items() if not UNTIMED.search(key)} for line in history]


def logged_run(folder, logging_steps):
    training = {"num_train_epochs": 1.5, "logging_steps": logging_steps}
    return make_trainer(folder, training=training, engine=ScoringEngine(), tests_slope=True, **RUN)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run that nothing happened to, by its `logging_steps`."""

    @functools.cache
    def run(logging_steps):
        trainer = logged_run(tmp_path_factory.mktemp("whole"), logging_steps)
        trainer.train()
        return trainer

    return run


@pytest.mark.parametrize("logging_steps", [1, 3])
@pytest.mark.parametrize(
    ("where", "at_step"),
    [("rollout", 0), ("rollout", 4), ("reward", 0), ("reward", 4), ("update", 0), ("update", 4), ("update", 5)],
)
def test_a_stopped_run_saves_and_goes_on_as_if_nothing_had_happened(
    tmp_path, whole_run, where, at_step, logging_steps
):
    """Steps 0 and 4 begin with a rollout; the data of step 5 waits in the buffer."""
    whole = whole_run(logging_steps)
    stopped = logged_run(tmp_path / "stopped", logging_steps)
    strike(stopped, where, at_step)
    before = {each: signal.getsignal(each) for each in stop_module.STOP_SIGNALS}
    with pytest.raises(StopRequested, match="stopped by SIGTERM") as request:
        stopped.train()
    assert {each: signal.getsignal(each) for each in stop_module.STOP_SIGNALS} == before
    assert stopped.state.global_step == at_step

    resumed = logged_run(tmp_path / "stopped", logging_steps)
    if at_step == 0:
        assert request.value.checkpoint is None
        resumed.train()
    else:
        assert request.value.checkpoint == str(tmp_path / "stopped" / f"checkpoint-{at_step}")
        resumed.train(resume_from_checkpoint=request.value.checkpoint)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    mine, reference = untimed(resumed.state.log_history), untimed(whole.state.log_history)
    for line in (*mine, *reference):
        line.pop("train_loss", None)  # Trainer's own: over the steps since the resume
    assert mine == reference


def test_a_stop_needs_no_second_checkpoint_where_one_was_just_saved(tmp_path):
    trainer = make_trainer(tmp_path, training={"save_strategy": "steps", "save_steps": 1})
    strike(trainer, "rollout", 1)
    with pytest.raises(StopRequested) as request:
        trainer.train()
    assert request.value.checkpoint == str(tmp_path / "checkpoint-1")
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_stop_saves_what_is_needed_to_go_on_under_save_only_model_too(tmp_path):
    training = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trainer = make_trainer(tmp_path, training=training)
    strike(trainer, "update", 1)
    with pytest.raises(StopRequested) as request:
        trainer.train()
    resumed = make_trainer(tmp_path, training=training)
    resumed.train(resume_from_checkpoint=request.value.checkpoint)
    assert resumed.state.global_step == 3


@pytest.mark.parametrize("first", stop_module.STOP_SIGNALS)
def test_the_first_signal_asks_and_the_second_acts(first):
    code = f"""
import os, signal, time
from grpo_stage.survival import stop
safe_stop = stop.SafeStop()
stop.SAME_REQUEST_S = 0.3
with safe_stop.listening():
    os.kill(os.getpid(), {int(first)})
    os.kill(os.getpid(), {int(first)})  # the same request, passed on twice
    assert safe_stop.signal == {int(first)}
    try:
        safe_stop.check()
    except stop.StopRequested:
        print("asked", flush=True)
    time.sleep(0.4)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
    print("still here", flush=True)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "asked\n", result.stderr
    assert result.returncode == -signal.SIGINT
    assert "Once more stops at once" in result.stderr


EARLY = """
import atexit, os, signal, sys, time
from grpo_stage.survival import stop
stop.LEAVING_S = 0.3
stop.end_at_once()
"""


def ends_with(code: str, *command: str) -> tuple[int, str, str]:
    result = subprocess.run(
        [*command, sys.executable, "-c", EARLY + code], capture_output=True, text=True, timeout=60, check=False
    )
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize("sign", stop_module.STOP_SIGNALS)
def test_a_stop_before_training_ends_the_process_at_once_with_a_line(sign):
    for code in (
        f"os.kill(os.getpid(), {int(sign)})",
        f"os.kill(os.getpid(), {int(sign)}); os.kill(os.getpid(), {int(sign)})",
        # `datasets` catches everything while it hashes, and numpy while it is imported.
        f"""
for _ in range(20):
    try:
        os.kill(os.getpid(), {int(sign)})
        time.sleep(0.2)
    except:
        pass
print("still here", flush=True)
""",
    ):
        returncode, out, err = ends_with(code)
        assert (returncode, out) == (128 + sign, "")
        assert err.strip() == f"Stopped by {sign.name} outside of training: nothing is lost."


def test_what_a_process_that_is_stopped_has_started_ends_with_it():
    returncode, out, _ = ends_with("""
child = os.fork()
if child == 0:
    os.setsid()
    time.sleep(60)
print(child, flush=True)
atexit.register(time.sleep, 60)
os.kill(os.getpid(), signal.SIGTERM)
""")
    assert returncode == 128 + signal.SIGTERM
    assert wait_until_gone([int(out)], seconds=10) == []


def test_a_process_that_is_stopped_takes_its_temporary_folders_along(tmp_path):
    returncode, out, _ = ends_with(f"""
import tempfile
with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}) as folder:
    print(os.listdir({str(tmp_path)!r}) == [os.path.basename(folder)], flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
""")
    assert (returncode, out) == (128 + signal.SIGTERM, "True\n")
    assert list(tmp_path.iterdir()) == []


def test_a_forked_process_ends_as_it_would_without_us():
    returncode, out, err = ends_with("""
child = os.fork()
if child == 0:
    time.sleep(60)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert (returncode, out, err) == (0, f"{-signal.SIGTERM}\n", "")


def test_a_hangup_that_nohup_ignores_stays_ignored():
    hangup = "os.kill(os.getpid(), signal.SIGHUP)"
    code = f"{hangup}\nwith stop.SafeStop().listening():\n    {hangup}"
    assert ends_with(code + "\nprint('done')", "nohup")[:2] == (0, "done\n")
    assert ends_with(code)[0] == 128 + signal.SIGHUP


def test_another_stage_gets_its_signals_back():
    code = "stop.leave()\nassert signal.getsignal(signal.SIGINT) is signal.default_int_handler\nstop.leave()\n"
    assert ends_with(code + "os.kill(os.getpid(), signal.SIGTERM)")[0] == -signal.SIGTERM


def test_a_block_inside_another_keeps_a_request_for_the_rest_of_it():
    safe_stop = SafeStop()
    with safe_stop.listening():
        with safe_stop.listening():
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopRequested):
            safe_stop.check_together()


@pytest.mark.parametrize(
    ("sign", "has_terminal", "code"),
    [("SIGTERM", False, 128 + 15), ("SIGINT", False, 128 + 2), ("SIGHUP", False, 128 + 1), ("SIGINT", True, 0)],
)
def test_the_launcher_waits_for_torchrun_and_passes_on_what_a_terminal_does_not(sign, has_terminal, code, tmp_path):
    """Ctrl-C reaches torchrun without us; the stand-in for it ends with 1 when it is asked, as torchrun does."""
    ready, struck = str(tmp_path / "ready"), str(tmp_path / "struck")
    torchrun = f"""
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
open({ready!r}, "w").close()
while not os.path.exists({struck!r}):
    time.sleep(0.02)
time.sleep({0.5 if has_terminal else 30})
"""
    launcher = f"""
import threading
def strike():
    while not os.path.exists({ready!r}):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.{sign})
    open({struck!r}, "w").close()
threading.Thread(target=strike).start()
sys.exit(stop.run_and_pass_on([sys.executable, "-c", {torchrun!r}]).returncode)
"""
    if not has_terminal:
        returncode, _, err = ends_with(f"os.setsid()\n{launcher}")
        assert returncode == code, err
        return
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", EARLY + launcher])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    os.close(terminal)


def test_signals_that_others_than_python_handle_are_given_back():
    code = "import faulthandler\nstop.leave()\nassert faulthandler.is_enabled()\nos.abort()\n"
    returncode, _, err = ends_with(code, "env", "PYTHONFAULTHANDLER=1")
    assert returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in err


def test_what_may_not_be_killed_is_left(monkeypatch):
    def refuse(pid, sign):
        raise PermissionError

    monkeypatch.setattr(descendants, "descendants_of", lambda pid: [1, 2])
    monkeypatch.setattr(os, "kill", refuse)
    assert not descendants.kill_descendants(os.getpid())


@pytest.mark.parametrize(
    ("argv", "starts"),
    [
        (["/bin/llamafactory-cli", "train", "RECIPE"], True),
        (["/x/llamafactory/launcher.py", "RECIPE"], True),
        (["/bin/llamafactory-cli", "train", "--stage", "grpo"], True),
        (["/bin/llamafactory-cli", "train", "--stage=grpo"], True),
        (["/bin/llamafactory-cli", "train", "other.yaml", "stage=grpo"], True),
        (["/bin/llamafactory-cli", "train", "--stage", "sft", "--output_dir", "grpo"], False),
        (["/bin/llamafactory-cli", "chat", "RECIPE"], False),
        (["/bin/llamafactory-cli", "train", "absent.yaml"], False),
        (["-c"], False),
        ([], False),
    ],
)
@pytest.mark.parametrize(
    "text", ["### method\nstage: grpo\n", '{"do_train": true, "stage": "grpo"}', "stage:  'grpo'"]
)
def test_a_command_line_that_trains_with_the_stage_is_known(tmp_path, argv, starts, text):
    from grpo_stage._autoload import starts_run

    (tmp_path / "run.yaml").write_text(text)
    assert starts_run([str(tmp_path / "run.yaml") if word == "RECIPE" else word for word in argv]) is starts
    (tmp_path / "run.yaml").write_text("stage: sft\noutput_dir: saves/grpo\n")
    assert not starts_run(["llamafactory-cli", "train", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(("module", "starts"), [("llamafactory.launcher", True), ("llamafactory.cli", False)])
def test_a_module_that_is_run_by_its_name_is_known_before_its_file_is(tmp_path, monkeypatch, module, starts):
    """As `accelerate launch -m llamafactory.launcher run.yaml` starts its processes."""
    from grpo_stage._autoload import starts_run

    (tmp_path / "run.yaml").write_text("stage: grpo\n")
    words = ["-m", str(tmp_path / "run.yaml")]
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-m", module, *words[1:]])
    assert starts_run(words) is starts


def test_a_request_in_an_interruptible_block_does_not_wait_for_its_end():
    safe_stop = SafeStop()

    def wait():
        with safe_stop.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with safe_stop.listening():
        started = time.monotonic()
        with pytest.raises(StopRequested):
            wait()
        with pytest.raises(StopRequested):  # one that came before is honored at the start
            wait()
        assert time.monotonic() - started < 2


SCORES = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: 0.4, 6: 0.3}


def scripted(trainer, strike_at=None):
    """Evaluations that give the scores above; a stop comes in the one after the given step."""

    def evaluate(*args, **kwargs):
        step = trainer.state.global_step
        if step == strike_at:
            os.kill(os.getpid(), signal.SIGTERM)
            trainer.stop.check()
        metrics = {"eval_reward": SCORES[step]}
        trainer.log(dict(metrics))
        trainer.control = trainer.callback_handler.on_evaluate(
            trainer.args, trainer.state, trainer.control, metrics=metrics
        )
        return metrics

    trainer.evaluate = evaluate
    return trainer


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward"}
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, **BEST}


@pytest.mark.parametrize(
    ("training", "strike_at"),
    [
        (EVERY_STEP, 2),
        (EVERY_STEP, 4),  # it stops the run early
        (EVERY_STEP | {"save_strategy": "best", "save_steps": 500}, 2),  # it finds the best
        ({"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 3}, 3),  # it comes after the save
        ({"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 3}, 6),  # it is the run's last act
        ({"eval_strategy": "steps", "eval_steps": 2}, 6),
        ({"eval_strategy": "epoch", "save_strategy": "epoch", **BEST}, 3),
    ],
)
def test_a_run_stopped_in_an_evaluation_makes_up_for_it(tmp_path, training, strike_at):
    from transformers import EarlyStoppingCallback

    def prepare(folder, strike_at=None):
        trainer = make_trainer(tmp_path / folder, num_eval_prompts=1, training={"num_train_epochs": 2} | training)
        if training is EVERY_STEP:
            trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
        return scripted(trainer, strike_at)

    whole = prepare("whole")
    whole.train()
    with pytest.raises(StopRequested) as request:
        prepare("stopped", strike_at).train()
    resumed = prepare("stopped")
    resumed.train(resume_from_checkpoint=request.value.checkpoint)

    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    best = [Path(each.state.best_model_checkpoint or "none").name for each in (resumed, whole)]
    assert best[0] == best[1]
    assert resumed.state.global_step == whole.state.global_step == (4 if training is EVERY_STEP else 6)
    mine, reference = (
        [line for line in untimed(each.state.log_history) if "train_loss" not in line] for each in (resumed, whole)
    )
    assert mine == reference


def test_a_finished_run_is_not_finished_twice(tmp_path):
    training = {"save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer(tmp_path, training=training)
    trainer.train()
    checkpoint = str(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="is finished: it is at step 3 of 3"):
        make_trainer(tmp_path / "elsewhere", training=training).train(resume_from_checkpoint=checkpoint)
    killed_before_its_end = make_trainer(tmp_path, training=training)
    output = killed_before_its_end.train(resume_from_checkpoint=checkpoint)
    assert output.global_step == 3
    assert killed_before_its_end.engine.asked == []
    for ours, theirs in zip(killed_before_its_end.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for part in (checkpoints.RESULTS, checkpoints.MODEL_CARD):
        checkpoints.mark_done(str(tmp_path), 3, part)
    with pytest.raises(ValueError, match="is finished: it is at step 3 of 3"):
        make_trainer(tmp_path, training=training).train(resume_from_checkpoint=checkpoint)
    longer = make_trainer(tmp_path, training=training | {"num_train_epochs": 2})
    assert longer.train(resume_from_checkpoint=checkpoint).global_step == 6


def test_a_stop_passes_through_a_reward_function_in_this_process(tmp_path):
    """What catches everything that a function raises must not catch the stop, nor the end of a time limit."""
    from grpo_stage.rewards.function import RewardFunction

    for error in (StopRequested(signal.SIGINT), HangError("too long")):

        def stopped(completions, error=error):
            raise error

        function = RewardFunction.bind("stopped", stopped, {"error": error})
        with pytest.raises(type(error)):
            function.evaluate({"completions": ["a"]}, 1, asyncio.run)


def test_a_signal_after_the_last_safe_point_has_nothing_to_stop():
    safe_stop = SafeStop()
    with safe_stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    safe_stop.check()


# The end of a run, after its last step


class End:
    """What `workflow._run` does with a trainer, its parts noted as they are done."""

    def __init__(self, folder, monkeypatch, training=None, evaluate=None, fails=()):
        self.trainer = scripted(
            make_trainer(folder, num_eval_prompts=1, training={"do_eval": True} | (training or {}))
        )
        self.done = []
        score = self.trainer.evaluate

        def evaluation(**of_training):
            if of_training:
                return score()
            self.done.append("evaluation")
            return evaluate(self.trainer) if evaluate else {"eval_reward": 0.5}

        def note(part):
            self.done.append(part)
            if part in fails:
                raise OSError(28, "No space left on device")

        self.trainer.evaluate = evaluation
        monkeypatch.setattr(workflow.facade, "create_modelcard_and_push", lambda *_: note("model card"))
        save_model = self.trainer.save_model
        self.trainer.save_model = lambda *args, **kwargs: (
            save_model(*args, **kwargs) if kwargs else (note("model"), save_model())
        )

    def run(self, checkpoint=None):
        arguments = SimpleNamespace(
            training=SimpleNamespace(do_train=True, do_eval=True, resume_from_checkpoint=checkpoint),
            finetuning=SimpleNamespace(plot_loss=False, dynamic_sampling=False, num_generations=4),
            model=None,
            data=None,
        )
        workflow._run(self.trainer, arguments)
        return self.done


def stop_in_it(trainer):
    os.kill(os.getpid(), signal.SIGHUP)
    trainer.stop.check()


def fail_in_it(trainer):
    raise RewardError("even", "raised ZeroDivisionError", prompt="p", completion="c", traceback="")


@pytest.mark.parametrize(("evaluate", "error"), [(stop_in_it, StopRequested), (fail_in_it, RewardError)])
@pytest.mark.parametrize("training", [{}, {"save_strategy": "steps", "save_steps": 3}, EVERY_STEP])
def test_what_is_left_of_the_end_is_made_up_for_and_no_more(tmp_path, monkeypatch, training, evaluate, error):
    first = End(tmp_path, monkeypatch, training, evaluate)
    with pytest.raises(error) as caught:
        first.run()
    assert first.done == ["model", "evaluation"]
    checkpoint = tmp_path / "checkpoint-3"
    said = caught.value.checkpoint if error is StopRequested else caught.value.__notes__[0]
    assert str(checkpoint) in said
    second = End(tmp_path, monkeypatch, training)
    assert second.run(str(checkpoint)) == ["evaluation", "model card"]
    assert second.trainer.engine.asked == []
    for ours, theirs in zip(second.trainer.model.parameters(), first.trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), "the best one, where that is loaded at the end"
    with pytest.raises(ValueError, match="is finished"):
        End(tmp_path, monkeypatch, training).run(str(checkpoint))


def test_a_stop_that_comes_with_the_last_step_is_honored_before_the_model_is_saved(tmp_path, monkeypatch):
    end = End(tmp_path, monkeypatch)
    strike(end.trainer, "update", 2)
    end.trainer.learner.gradient._gather = lambda value: [value]  # the last safe point of training is over
    with pytest.raises(StopRequested) as request:
        end.run()
    assert end.done == []
    again = End(tmp_path, monkeypatch)
    assert again.run(request.value.checkpoint) == ["model", "evaluation", "model card"]
    assert again.trainer.state.log_history[-1]["train_loss"] == pytest.approx(
        end.trainer.state.log_history[-1]["train_loss"], rel=1e-4
    )


def test_a_folder_that_takes_no_model_is_named_with_what_is_kept(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=rf"Training is done.*No space left.*{tmp_path / 'checkpoint-3'}`"):
        End(tmp_path, monkeypatch, fails=("model",)).run()
    assert End(tmp_path, monkeypatch).run(str(tmp_path / "checkpoint-3")) == ["model", "evaluation", "model card"]


def test_a_run_that_trains_on_has_an_end_of_its_own(tmp_path, monkeypatch):
    training = {"save_strategy": "steps", "save_steps": 1}
    assert End(tmp_path, monkeypatch, training).run() == ["model", "evaluation", "model card"]
    assert End(tmp_path, monkeypatch, training).run(str(tmp_path / "checkpoint-2")) == [
        *("model", "evaluation", "model card")
    ]


# Hangs


class HangingEngine(ScoringEngine):
    def __init__(self, where, step):
        super().__init__()
        self.where, self.step = where, step

    def sync(self, policy, version):
        super().sync(policy, version)
        if (self.where, self.step) == ("sync", version):
            time.sleep(60)

    def generate(self, prompts, sampling, step):
        if (self.where, self.step) == ("rollout", step):
            while True:
                pass
        return super().generate(prompts, sampling, step)

    def score(self, groups):
        if (self.where, self.step) == ("canary", self.synced[-1]):
            time.sleep(60)
        return super().score(groups)


class HangingRewards(LengthRewards):
    calls = 0

    def score(self, groups):
        self.calls += 1
        if self.calls == 3:
            time.sleep(60)
        return super().score(groups)


@pytest.mark.parametrize(
    ("where", "key"),
    [
        *(("sync", "sync_timeout"), ("rollout", "rollout_timeout"), ("canary", "rollout_timeout")),
        ("reward", "reward_timeout"),
    ],
)
def test_a_hang_ends_the_run_with_the_stacks_and_a_checkpoint_that_goes_on(tmp_path, where, key):
    whole = make_trainer(tmp_path / "whole", training={"num_train_epochs": 2})
    whole.train()

    # The first answers for the canary take seconds where the processor is shared.
    limits = {"sync_timeout": 30.0, "rollout_timeout": 30.0, "reward_timeout": 30.0}
    limits[key] = 5.0 if where == "canary" else 0.2
    hanging = make_trainer(
        tmp_path / "hanging",
        training={"num_train_epochs": 2},
        engine=HangingEngine(where, 2),
        rewards=HangingRewards() if where == "reward" else None,
        tests_slope=where == "canary",
        **limits,
    )
    started = time.monotonic()
    with pytest.raises(HangError, match=rf"{where} took .*`{key}`.*stacks_{where}_rank0") as error:
        hanging.train()
    assert time.monotonic() - started < 20
    checkpoint = tmp_path / "hanging" / "checkpoint-2"
    assert str(checkpoint) in error.value.__notes__[0]
    stacks = (tmp_path / "hanging" / f"stacks_{where}_rank0.txt").read_text()
    assert "test_survival.py" in stacks

    resumed = make_trainer(tmp_path / "hanging", training={"num_train_epochs": 2})
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_hang_in_native_code_ends_the_process_from_outside(host_processes, tmp_path):
    """A mutex that is locked twice: no signal and no exception gets through to that thread."""
    code = f"""
import ctypes, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from grpo_stage.survival import watchdog
from tests.unit.trainer_on_fakes import FakeEngine, make_trainer

class Engine(FakeEngine):
    def generate(self, prompts, sampling, step):
        if step == 2:
            mutex, libc = (ctypes.c_char * 64)(), ctypes.CDLL(None)
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)
        return super().generate(prompts, sampling, step)

watchdog.GRACE_S = 0.5
make_trainer(Path({str(tmp_path)!r}), engine=Engine(), rollout_timeout=0.5).train()
"""
    (tmp_path / "script.py").write_text(code)
    result = host_processes.run(str(tmp_path / "script.py"), timeout=120)
    assert result.returncode == 1, result.stderr
    assert "The rollout took longer than 0.5 s (`rollout_timeout`)" in result.stderr
    assert f"What was trained until then is in {tmp_path / 'checkpoint-2'}" in result.stderr
    assert (
        "pthread" in (tmp_path / "stacks_rollout_rank0.txt").read_text()
        or "generate" in (tmp_path / "stacks_rollout_rank0.txt").read_text()
    )

    whole, resumed = make_trainer(tmp_path / "whole"), make_trainer(tmp_path)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_stays_within_its_limit_is_left_alone(tmp_path):
    interrupted = []
    watchdog = Watchdog(str(tmp_path), 0, interrupted.append, interrupted.append)
    for _ in range(3):
        with watchdog.limit("rollout", 0.2, "rollout_timeout"):
            pass
    time.sleep(0.4)
    assert interrupted == []
    assert list(tmp_path.iterdir()) == []


def test_a_failing_reward_leaves_a_checkpoint(tmp_path):
    class Failing(HangingRewards):
        def score(self, groups):
            self.calls += 1
            if self.calls == 3:
                raise RewardError("even", "raised ZeroDivisionError", prompt="p", completion="c", traceback="")
            return LengthRewards.score(self, groups)

    with pytest.raises(RewardError) as error:
        make_trainer(tmp_path, rewards=Failing()).train()
    assert str(tmp_path / "checkpoint-2") in error.value.__notes__[0]
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3


def test_an_engine_that_is_lost_leaves_a_checkpoint(tmp_path):
    class Lost(FakeEngine):
        def generate(self, prompts, sampling, step):
            if step == 2:
                raise EngineLostError("None of the servers answers")
            return super().generate(prompts, sampling, step)

    with pytest.raises(EngineLostError) as error:
        make_trainer(tmp_path, engine=Lost()).train()
    assert str(tmp_path / "checkpoint-2") in error.value.__notes__[0]
