"""What an alarm does to a run: it warns, stops it, or sends it back to go on with a remedy."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from grpo_stage.host.recovery import Recoveries
from grpo_stage.monitors import table
from grpo_stage.monitors.alarm import Alarm, History, Watch
from grpo_stage.monitors.alarms import Alarms, AlarmStop, RecoveryRequested
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.survival import checkpoints
from grpo_stage.trainer import GRPOTrainer
from grpo_stage.update.terms.entropy_bonus import EntropyBonus
from grpo_stage.update.terms.kl_penalty import KLPenalty

from .conftest import completions, trainer_log


RATE, LOWER_RATE = 1e-3, 2.5e-4


class TooFast(Watch):
    """Finds a fault in step 4 and after it while the learning rate is high."""

    skips_prompts = False
    others: ClassVar[dict[str, Any]] = {"kl_estimator": "k2"}  # without effect unless there is a `beta`

    def judge(self, history: History) -> Alarm | None:
        if self.settings["learning_rate"] <= LOWER_RATE or history.step < 4:
            return None
        return Alarm(
            monitor="too_fast",
            step=history.step,
            onset=3,
            seen=f"The learning rate is {self.settings['learning_rate']}.",
            meaning="That is too much.",
            remedy="Lower it.",
            settings={"learning_rate": LOWER_RATE, **self.others},
            skips_prompts=self.skips_prompts,
        )


@pytest.fixture
def watched(recipe, monkeypatch):
    """A recipe of six steps whose learning rate `TooFast` finds too high."""
    monkeypatch.setattr(table, "WATCHES", MappingProxyType({"too_fast": TooFast}))
    monkeypatch.setattr("grpo_stage.host.checks.WATCHES", table.WATCHES)

    def make(**changes: Any) -> dict[str, Any]:
        saves = {"save_strategy": "steps", "save_steps": 2}
        return recipe(**{"max_steps": 6, "log_completions": True, "learning_rate": RATE, **saves, **changes})

    return make


def alarms(output_dir: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(output_dir, "alarms.jsonl").read_text().splitlines()]


def rates(output_dir: str) -> list[float]:
    """The learning rate that each step of the log was taken with."""
    return [line["learning_rate"] for line in trainer_log(output_dir) if "loss" in line]


def weights(output_dir: str) -> dict[str, torch.Tensor]:
    return load_file(Path(output_dir, "adapter_model.safetensors"))


def assert_same(one: str, other: str) -> None:
    assert completions(one) == completions(other)
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def prompts_by_step(output_dir: str) -> list[list[int]]:
    """The prompts that each step of the log has sampled."""
    steps: dict[int, list[int]] = {}
    for line in completions(output_dir):
        steps.setdefault(line["step"], []).append(line["prompt_index"])
    return [sorted(set(indices)) for _, indices in sorted(steps.items())]


def test_a_run_goes_back_to_before_the_fault_and_on_with_the_remedy(watched, run_exp, tmp_path, monkeypatch):
    """And a resume of it goes on with the remedy, as if it had not been interrupted."""
    monkeypatch.setattr(TooFast, "skips_prompts", True)
    arguments = watched(on_alarm="recover")
    run_exp(arguments)
    out = arguments["output_dir"]
    assert rates(out) == [RATE] * 2 + [LOWER_RATE] * 4
    (noted,) = json.loads(Path(out, "recoveries.json").read_text())
    assert noted == {
        **{"alarms": ["too_fast"], "step": 4, "resumed_step": 2},
        "settings": {"learning_rate": LOWER_RATE},
        "num_prompts_to_skip": 8,
    }
    abandoned = Path(out, "before-recovery-1")
    assert rates(str(abandoned)) == [RATE] * 4
    dealt = prompts_by_step(str(abandoned))
    assert len(dealt) == 4
    after = prompts_by_step(out)
    assert after[:2] == dealt[:2]
    assert set(after[2]) == set(range(10)) - {index for step in dealt for index in step}, "what the epoch has left"
    checkpoints.verify(abandoned / "checkpoint-4")
    (alarm,) = alarms(out)
    assert (alarm["step"], alarm["action"], alarm["remedy"]) == (4, "recover", "Lower it.")

    for name, later in (("late", ("checkpoint-6",)), ("early", ("checkpoint-4", "checkpoint-6"))):
        killed = watched(on_alarm="recover", output_dir=str(tmp_path / name))
        shutil.copytree(out, killed["output_dir"], ignore=shutil.ignore_patterns(*later, "grpo_finished.json"))
        run_exp(killed)
        assert rates(killed["output_dir"]) == rates(out)
        assert_same(killed["output_dir"], out)


@pytest.mark.parametrize(
    ("before", "remedy"),
    [
        (
            {},
            {"beta": 0.04, "entropy_target": 9.0, "answer_balance": 0.5, "max_grad_norm": 0.3},
        ),
        (
            {"beta": 0.04, "entropy_coef": 0.02, "num_iterations": 2, "steps_per_generation": 2},
            {"beta": 0.12, "entropy_coef": 0.01, "num_iterations": 1, "steps_per_generation": 1},
        ),
    ],
    ids=["first", "stronger"],
)
def test_every_kind_of_remedy_is_in_force_from_the_checkpoint_on(watched, run_exp, monkeypatch, before, remedy):
    """What a checkpoint knows of a coefficient does not take the place of the remedy's."""
    made: list[Any] = []
    start = GRPOTrainer.training_step

    def step(trainer: GRPOTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer not in made:
            made.append(trainer)
        return start(trainer, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "training_step", step)
    monkeypatch.setattr(TooFast, "others", remedy)
    arguments = watched(on_alarm="recover", **before)
    run_exp(arguments)
    (noted,) = json.loads(Path(arguments["output_dir"], "recoveries.json").read_text())
    assert noted["settings"] == {"learning_rate": LOWER_RATE, **remedy}
    assert len(rates(arguments["output_dir"])) == 6
    _, second = made
    assert {key: getattr(second.grpo_args, key, None) or getattr(second.args, key) for key in remedy} == remedy
    (penalty,) = [term for term in second.learner.objective.terms if isinstance(term, KLPenalty)]
    assert penalty.beta == remedy["beta"]
    (bonus,) = [term for term in second.learner.objective.terms if isinstance(term, EntropyBonus)]
    assert bonus.state_dict()["entropy_keys"] == [remedy.get("entropy_coef", 0.0), remedy.get("entropy_target")]
    assert bonus.coefficient == remedy.get("entropy_coef", 4 * second.grpo_args.entropy_coef_delta)


def test_without_a_sound_checkpoint_a_run_starts_anew(watched, run_exp, tmp_path):
    """It is then the run that the remedied recipe gives from the start."""
    arguments = watched(on_alarm={"too_fast": "recover"}, save_steps=5)
    run_exp(arguments)
    slow = watched(learning_rate=LOWER_RATE, output_dir=str(tmp_path / "slow"))
    run_exp(slow)
    assert rates(arguments["output_dir"]) == [LOWER_RATE] * 6
    assert_same(arguments["output_dir"], slow["output_dir"])
    assert not Path(slow["output_dir"], "alarms.jsonl").exists()

    run_exp({**arguments, "overwrite_output_dir": True, "on_alarm": "warn"})
    assert rates(arguments["output_dir"]) == [RATE] * 6, "a new run forgets the recoveries of the one before"
    assert not Path(arguments["output_dir"], "recoveries.json").exists(), "and so do its resumes"


def test_an_alarm_stops_a_run_that_can_go_on_afterwards(watched, run_exp, caplog):
    arguments = watched(on_alarm="stop")
    with pytest.raises(SystemExit) as stop:
        run_exp(arguments)
    assert stop.value.code == 3
    out = arguments["output_dir"]
    checkpoints.verify(Path(out, "checkpoint-4"))
    assert rates(out) == [RATE] * 4
    run_exp(arguments)
    assert rates(out) == [RATE] * 6
    assert [(line["step"], line["action"]) for line in alarms(out)] == [(4, "stop")], "it was told once"


def test_a_run_that_may_not_go_back_again_stops(watched, run_exp, monkeypatch):
    attempts = []

    def judge(watch: Watch, history: History) -> Alarm | None:
        if watch not in attempts:
            attempts.append(watch)
        assert len(attempts) <= 2
        found = {"seen": "It.", "meaning": "It.", "remedy": "It.", "settings": {"learning_rate": RATE / 2}}
        return Alarm(monitor="too_fast", step=history.step, onset=1, **found) if history.step == 2 else None

    monkeypatch.setattr(TooFast, "judge", judge)
    arguments = watched(on_alarm="recover", max_recoveries=1)
    with pytest.raises(SystemExit):
        run_exp(arguments)
    assert [line["action"] for line in alarms(arguments["output_dir"])] == ["recover", "stop"]


def test_an_alarm_that_only_warns_lets_the_run_end(watched, run_exp):
    arguments = watched(save_strategy="no")
    run_exp(arguments)
    out = arguments["output_dir"]
    assert [(line["step"], line["action"]) for line in alarms(out)] == [(4, "warn")]
    assert [line.get("alarms/too_fast") for line in trainer_log(out) if "loss" in line] == [None] * 4 + [1.0, None]


def test_a_fault_that_comes_again_at_once_is_gone_back_from_further(tmp_path, monkeypatch):
    asked = []
    saved = (2, 4, 40)

    def newest(_, before):
        asked.append(before)
        steps = [step for step in saved if step < before]
        return tmp_path / f"checkpoint-{steps[-1]}" if steps else None

    monkeypatch.setattr(checkpoints, "newest_whole", newest)
    recoveries = Recoveries(str(tmp_path), 5, True, [])
    monkeypatch.setattr(recoveries, "_put_aside", lambda step: None)
    for step, onset in ((7, 4), (7, 4), (9, 8), (60, 45)):
        words = {"seen": "", "meaning": "", "remedy": ""}
        recoveries.add(RecoveryRequested([Alarm(monitor="a", step=step, onset=onset, **words)]))
    noted = json.loads((tmp_path / "recoveries.json").read_text())
    assert [each["resumed_step"] for each in noted] == [4, 2, 0, 40]
    assert asked == [5, 4, 2, 46]


def test_advice_ends_a_run_only_where_it_is_named(tmp_path):
    advice = type("Advice", (TooFast,), {"is_advice": True})
    line = {"step": 4, "reward": 0.5}
    for on_alarm, stops in (("stop", False), ({"too_fast": "stop"}, True)):
        watches = {"too_fast": advice({"learning_rate": RATE})}
        found = Alarms(watches, on_alarm, dict, True, str(tmp_path), 0, MetricTracker())
        found.judge([line])
        with pytest.raises(AlarmStop) if stops else nullcontext():
            found.act()


def test_an_unknown_monitor_or_action_is_refused(watched, run_exp, monkeypatch):
    with pytest.raises(ValueError, match=r"names the monitor `too_slow`, which is not known.*too_fast"):
        run_exp(watched(on_alarm={"too_slow": "stop"}))
    with pytest.raises(ValueError, match=r"`on_alarm: halt` is no action: an alarm can warn, stop, recover"):
        run_exp(watched(on_alarm="halt"))
    with pytest.raises(ValueError, match=r"`on_alarm: stop` would have no effect with `logging_strategy: no`"):
        run_exp(watched(on_alarm="stop", logging_strategy="no"))
    monkeypatch.setattr(TooFast, "has_remedy", False)
    with pytest.raises(ValueError, match=r"`too_fast: recover`, and no key .* mends .*Write `too_fast: stop` or"):
        run_exp(watched(on_alarm={"too_fast": "recover"}))
    with pytest.raises(ValueError, match=r"`max_recoveries: 5` would have no effect with `on_alarm: warn`"):
        run_exp(watched(max_recoveries=5))
