"""Each watch fires on its failure, says what to do, and stays quiet on healthy runs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from grpo_stage.arguments import GRPOArguments, grpo_field_names
from grpo_stage.monitors.alarm import Alarm, History, Series
from grpo_stage.monitors.remedies import kept_entropy, legal, lower_rate, stronger_anchor
from grpo_stage.monitors.statistics import (
    current,
    last_step,
    level_at_start,
    mann_kendall,
    may_rise,
    may_rise_lately,
    movement,
    slope,
)
from grpo_stage.monitors.table import WATCHES
from tests.unit.simulated_histories import (
    FAILING,
    HEALTHY,
    Run,
    constant,
    curriculum,
    few,
    linear,
    lines_of,
    one_answer_lines,
)


HISTORIES = Path(__file__).with_name("histories")
SETTINGS = {
    "learning_rate": 3e-4,
    "max_grad_norm": 1.0,
    "max_new_tokens": 64,
    "num_iterations": 4,
    **{
        name: getattr(GRPOArguments(reward_funcs="accuracy"), name) for name in ("beta", "loss_type", "entropy_target")
    },
}


def first_alarms(
    lines: Iterable[Mapping[str, Any]], settings: Mapping[str, Any] = SETTINGS, names: Iterable[str] = WATCHES
) -> dict[str, Alarm]:
    """The first alarm of each watch of `names`, judged line by line as in a run."""
    watches = {name: WATCHES[name](settings) for name in names}
    history, alarms = History(), {}
    for line in lines:
        history.add(line)
        for name, watch in watches.items():
            if name not in alarms and (alarm := watch.judge(history)) is not None:
                alarms[name] = alarm
    return alarms


@cache
def failing_lines(name: str, seed: int) -> Sequence[Mapping[str, float]]:
    return one_answer_lines(seed) if name == "one_answer" else lines_of(FAILING[name], seed)


# Healthy runs


@pytest.mark.parametrize("kind", HEALTHY)
def test_a_healthy_run_gives_no_alarm(kind: str) -> None:
    assert first_alarms(lines_of(HEALTHY[kind], seed=0)) == {}


@pytest.mark.parametrize("name", sorted(path.stem for path in HISTORIES.glob("healthy_*.jsonl")))
def test_a_healthy_run_that_was_seen_gives_no_alarm(name: str) -> None:
    assert first_alarms(history(name)) == {}


# Failures


@pytest.mark.parametrize("name", WATCHES)
def test_each_watch_fires_on_its_failure_and_names_a_sound_step_before(name: str) -> None:
    lines = failing_lines(name, 0)
    alarm = first_alarms(lines, names=[name])[name]
    assert alarm.monitor == name
    assert 0 <= alarm.onset < alarm.step <= lines[-1]["current_steps"]
    assert any(character.isdigit() for character in alarm.seen)
    assert len(alarm.meaning) > 60
    assert len(alarm.remedy) > 60


@pytest.mark.parametrize("name", WATCHES)
def test_settings_of_an_alarm_are_keys_of_a_run_that_can_be_run(name: str) -> None:
    for keys in ({}, {"loss_type": "gspo", "beta": 0.1}, {"entropy_target": 0.3}, {"loss_type": "vespo"}):
        own = vars(GRPOArguments(reward_funcs="accuracy", **keys))  # type: ignore[arg-type]
        settings = {**SETTINGS, **{key: own[key] for key in grpo_field_names()}, **keys}
        alarm = first_alarms(failing_lines(name, 0), settings, [name]).get(name)
        if alarm is None:
            assert keys  # what an entropy is, depends on the target
            continue
        changes = {key: value for key, value in alarm.settings.items() if key in grpo_field_names()}
        assert alarm.settings.keys() - changes.keys() <= {"learning_rate", "max_grad_norm"}
        GRPOArguments(**{"reward_funcs": "accuracy", **keys, **changes}).validate(given=[*changes])
        assert alarm.settings.get("learning_rate", 1e-4) == 1e-4
        assert all(settings.get(key) != value for key, value in alarm.settings.items())


@pytest.mark.parametrize("name", sorted(path.stem for path in HISTORIES.glob("gcd_*.jsonl")))
def test_one_answer_for_all_prompts_is_seen_by_step_10(name: str) -> None:
    alarm = first_alarms(history(name))["one_answer"]
    assert alarm.step <= 10


def history(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HISTORIES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", WATCHES)
def test_a_watch_says_nothing_without_its_metrics(name: str) -> None:
    lines: list[dict[str, Any]] = [{"current_steps": i, "loss": 0.1, "note": "text", "is_on": True} for i in range(80)]
    assert first_alarms([{}, *lines, {"step": 81, "eval_loss": 1.0}]) == {}


def test_no_line_is_judged_twice() -> None:
    lines = [dict(line) for line in one_answer_lines(0)]
    history = History(lines)
    watch = WATCHES["one_answer"](SETTINGS)
    assert watch.judge(history) is not None
    history.add({"current_steps": lines[-1]["current_steps"] + 1, "eval_reward": 0.5})
    assert watch.judge(history) is None


# What tells a fault from health


def test_low_entropy_is_no_fault_of_a_policy_that_knows_the_answers() -> None:
    collapsing = FAILING["entropy_collapse"]
    assert "entropy_collapse" in first_alarms(lines_of(collapsing, 3))
    solved = Run(steps=60, entropy=collapsing.entropy, rate=constant(0.95))
    assert "entropy_collapse" not in first_alarms(lines_of(solved, 3))


def test_a_collapse_is_forecast_with_the_step_at_which_it_is_complete() -> None:
    alarm = first_alarms(lines_of(Run(rate=constant(0.3), entropy=lambda step: 0.7 * 0.955**step), 1))[
        "entropy_collapse"
    ]
    # 0.7 x 0.955^n is 0.07 at step 50
    assert alarm.step < 45
    forecast = int(alarm.seen.split(" at step ")[1].split(",")[0])
    assert forecast == pytest.approx(50, abs=8)
    assert alarm.onset == pytest.approx(15, abs=5)


def test_a_policy_that_begins_with_one_answer_and_learns_others_is_left_alone() -> None:
    lines = [
        {
            "current_steps": step,
            "completions/same_answer_frac": 1.0 - 0.02 * step,
            "completions/same_reference_frac": 0.1,
        }
        for step in range(1, 30)
    ]
    assert first_alarms(lines) == {}
    stuck = [{**line, "completions/same_answer_frac": 1.0} for line in lines]
    assert first_alarms(stuck)["one_answer"].step == 5


def test_one_answer_is_right_where_the_references_are_one() -> None:
    lines = [
        {"current_steps": i, "completions/same_answer_frac": 1.0, "completions/same_reference_frac": 0.95}
        for i in range(20)
    ]
    assert first_alarms(lines) == {}


def test_groups_that_are_all_right_are_no_dead_groups() -> None:
    right = Run(steps=100, rate=constant(0.999), references=few(1, 1, 1))
    assert first_alarms(lines_of(right, 0)) == {}


def test_longer_completions_that_earn_more_are_no_fault() -> None:
    grows = FAILING["length_explosion"]
    assert "length_explosion" in first_alarms(lines_of(grows, 0))
    earning = Run(steps=150, length=grows.length, rate=linear(0.2, 0.6, 150), prompts=16)
    assert first_alarms(lines_of(earning, 0)) == {}


def test_longer_completions_that_earn_more_in_training_alone_are() -> None:
    run = Run(
        steps=150, length=linear(200, 700, 150), rate=linear(0.2, 0.7, 150), prompts=16,
        evaluated=constant(0.2), eval_steps=10,
    )  # fmt: skip
    assert "held-out `eval_reward` went from" in first_alarms(lines_of(run, 0))["length_explosion"].seen


def test_completions_that_are_all_cut_are_a_fault_where_none_earns_anything() -> None:
    cut = {"completions/clipped_ratio": constant(0.98)}
    alarm = first_alarms(lines_of(Run(steps=40, rate=constant(0.01), shares=cut), 0))["truncation"]
    assert (alarm.step, alarm.onset) == (20, 0)
    assert alarm.settings == {}
    assert "truncation" not in first_alarms(lines_of(Run(steps=40, rate=constant(0.3), shares=cut), 0))


def test_a_reward_that_is_given_up_is_named() -> None:
    run = Run(steps=100, prompts=16, rate=linear(0.2, 0.8, 100), others={"rewards/format/mean": linear(0.9, 0.2, 100)})
    assert "`format` fell from" in first_alarms(lines_of(run, 0))["reward_hacking"].seen


@pytest.mark.parametrize(("num_lines", "level", "expected"), [(19, 1, True), (20, 1, False), (19, 0, False)])
def test_the_first_lines_on_harder_prompts_do_not_show_whether_a_reward_rises(
    num_lines: int, level: int, expected: bool
) -> None:
    lines = [(0, 0.8)] * 30 + [(level, 0.3)] * num_lines
    history = History({"step": i, "reward": reward, "curriculum/level": at} for i, (at, reward) in enumerate(lines, 1))
    assert may_rise_lately(history, "reward") == may_rise(history, "reward", 30) == expected


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # The fault begins at step 100, on level 3; then the policy fails and the prompts become easier again.
        ("entropy_explosion", {"entropy": lambda step: 0.5 if step < 100 else 5.0}),
        ("reward_collapse", {}),
        # The prompts stay what they are: the policy earns less, though not so little.
        ("length_explosion", {"length": lambda step: 300 + 8.0 * max(0, step - 100), "rate": constant(0.45)}),
        ("entropy_collapse", {"entropy": lambda step: 0.5 if step < 100 else 0.01, "rate": constant(0.45)}),
        ("kl_explosion", {"others": {"kl": lambda step: 0.02 if step < 100 else 3.0}, "rate": constant(0.45)}),
    ],
)
def test_a_fault_within_a_curriculum_is_seen(name: str, changes: dict[str, Any]) -> None:
    levels = {0: 0, 25: 1, 50: 2, 75: 3} | ({} if "rate" in changes else {108: 2, 114: 1, 120: 0})
    rate = {"rate": lambda step: 0.5 if step < 100 else 0.01}
    run = curriculum(levels, **{"steps": 160, **rate, **changes})
    alarm = first_alarms(lines_of(run, 0), names=[name])[name]
    assert 90 <= alarm.onset < alarm.step <= 140


def test_prompts_that_become_harder_are_no_collapse_of_the_reward() -> None:
    harder = Run(steps=120, rate=lambda step: 0.7 if step < 60 else 0.2)
    assert "reward_collapse" not in first_alarms(lines_of(harder, seed=0))
    alarm = first_alarms(failing_lines("reward_collapse", 0), names=["reward_collapse"])["reward_collapse"]
    assert 50 < alarm.onset < 60 <= alarm.step <= 70, "ten lines after the fall"


@pytest.mark.parametrize(
    ("left", "is_gone"), [([0.04] * 10, True), ([0.1] * 10, False), ([0.0] * 9 + [0.2], False), ([0.02] * 9, False)]
)
def test_a_reward_is_gone_where_a_tenth_is_left_of_it_in_ten_lines(left: list[float], is_gone: bool) -> None:
    rewards = [0.0] + [0.5, 0.52] * 10 + left
    lines = [{"current_steps": step, "reward": reward} for step, reward in enumerate(rewards, start=1)]
    assert bool(first_alarms(lines, names=["reward_collapse"])) == is_gone


def test_a_harder_level_of_a_curriculum_is_no_collapse() -> None:
    """Within a level the reward may collapse as in any run."""
    levels = [0.0] * 21 + [1.0] * 31
    rewards = [0.0] + [0.5, 0.52] * 10 + [0.01] * 10 + [0.3] * 11 + [0.005] * 10
    lines = [
        {"current_steps": step, "reward": reward, "curriculum/level": level}
        for step, (reward, level) in enumerate(zip(rewards, levels, strict=True), start=1)
    ]
    assert not first_alarms(lines[:31], names=["reward_collapse"])
    assert first_alarms(lines, names=["reward_collapse"])["reward_collapse"].step == 52


def test_what_is_left_of_other_levels_is_no_collapse_and_a_few_prompts_of_them_hide_none() -> None:
    """Once a level is used up prompts of others come."""
    rewards = [0.0] + [0.5, 0.52] * 10 + [0.01] * 10
    for rest, is_gone in ((2.5, False), (1.2, True)):
        levels = [1.0] * 21 + [rest] * 10
        lines = [
            {"current_steps": step, "reward": reward, "curriculum/level": level}
            for step, (reward, level) in enumerate(zip(rewards, levels, strict=True), start=1)
        ]
        assert bool(first_alarms(lines, names=["reward_collapse"])) == is_gone


def test_a_spike_is_no_spike_beside_others_as_large() -> None:
    """Where most groups are all right most gradients are tiny."""
    lines = [{"current_steps": i, "grad_norm": (0.5 if i % 8 == 0 else 0.001)} for i in range(1, 120)]
    assert first_alarms(lines) == {}
    assert first_alarms([*lines, {"current_steps": 120, "grad_norm": 20.0}])["gradient_spikes"].onset == 119
    assert first_alarms([*lines, {"current_steps": 120, "grad_norm": 6.0}]) == {}
    twice = [*lines, {"current_steps": 120, "grad_norm": 6.0}, *lines[:3], {"current_steps": 125, "grad_norm": 6.0}]
    assert first_alarms(twice)["gradient_spikes"].seen.endswith("the last spike was at step 120.")


def test_the_canarys_slope_is_reported_before_it_stops_the_run() -> None:
    sound = [{"current_steps": i, "sampling/slope/start": 0.6, "sampling/slope_error/start": 0.02} for i in range(9)]
    behind = [
        {"current_steps": i, "sampling/slope/start": 0.3, "sampling/slope_error/start": 0.02} for i in range(9, 13)
    ]
    assert first_alarms(sound) == {}
    alarm = first_alarms([*sound, *behind])["engine_drift"]
    assert (alarm.step, alarm.onset) == (11, 8)
    unsure = [{**line, "sampling/slope_error/start": 0.1} for line in behind]
    assert first_alarms([*sound, *unsure]) == {}


def test_memory_that_fills_a_cache_is_no_leak() -> None:
    fills = [{"current_steps": i, "memory/update": 4 + 3 * (1 - 0.9**i)} for i in range(150)]
    jumps = [{"current_steps": i, "memory/update": 4.0 + (i > 70) + 0.001 * i} for i in range(150)]
    longer = [
        {"current_steps": i, "memory/update": 4 + 0.05 * i, "completions/max_length": 100.0 + 5 * i}
        for i in range(150)
    ]
    for lines in (fills, jumps, longer):
        assert first_alarms(lines) == {}


# Remedies


def test_a_remedy_that_the_run_forbids_is_left_out() -> None:
    assert legal({}, {"epsilon": -1.0}) == {}
    assert kept_entropy({"loss_type": "gspo"}, 0.25) == {"entropy_target": 0.25}
    assert kept_entropy({"entropy_target": 0.2}, 0.25) == {"covariance_control": "clip_cov"}
    assert kept_entropy({"entropy_target": 0.2, "loss_type": "luspo"}, 0.25) == {}
    assert kept_entropy({"entropy_target": 0.2, "covariance_control": "kl_cov"}, 0.25) == {}
    assert stronger_anchor({"beta": 0.04}) == {"beta": 0.2}
    assert stronger_anchor({}) == {"beta": 0.04}
    assert stronger_anchor({"disable_zero_advantage_skipping": True}) == {}
    assert lower_rate({"learning_rate": 1e-6}) == {"learning_rate": 3.3e-7}
    assert lower_rate({}) == {}


# Statistics


def test_movement_counts_in_standard_errors() -> None:
    assert movement([0.0] * 5) == 0
    assert movement([1.0] * 9) == 0
    steady = movement([float(i) for i in range(30)])  # differences of 1: noise 0.71, error 0.32
    assert steady == pytest.approx(20 / (0.5**0.5 * (2 / 10) ** 0.5))
    assert movement([*[0.0] * 9, *[1.0] * 9][::-1]) < 0
    assert movement([0.0, 0.0, 0.5, 0.5, 1.0, 1.0]) > 2


def test_mann_kendall_is_exact_for_few_values() -> None:
    assert mann_kendall([1, 2, 3, 4, 5]) == pytest.approx(1 / 120)
    assert mann_kendall([5, 4, 3, 2, 1]) == pytest.approx(-1 / 120)
    assert mann_kendall([1.0, 1.0, 1.0]) == 1.0


def test_a_slope_is_that_of_most_points() -> None:
    assert slope(Series(range(9), [0, 1, 2, 3, 400, 5, 6, 7, 8])) == pytest.approx(1)


def test_parts_of_a_history() -> None:
    history = History({"step": i, "a": float(i)} for i in range(1, 9))
    assert level_at_start(history, "a") == 3
    assert level_at_start(history, "b") is None
    assert list(current(history, "a", 2).values) == [7, 8]
    assert last_step(history.series("a"), lambda value: value < 5) == 4
    assert last_step(history.series("a"), lambda value: value < 0) == 0
    assert may_rise_lately(history, "a")
    history.add({"step": 9, "b": 1.0})
    assert len(current(history, "a", 2)) == 0
