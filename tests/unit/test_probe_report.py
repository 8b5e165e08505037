"""What `grpo-stage probe` concludes from samples, and how `grpo-stage sweep` plans and compares runs."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from grpo_stage.forecast.contrast import Contrasts
from grpo_stage.forecast.report import Advice, ProbeReport, define_right, learnable, make_report
from grpo_stage.survival.budget import VARIABLE, Budget, BudgetCallback, budget_callbacks
from grpo_stage.tools import sweep
from grpo_stage.tools.sweep_result import binned, run_result, setting_results
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup, ScoredGroup


def groups(
    rewards: Sequence[Sequence[float | None]], lengths: Sequence[int] = (3,), cap: int = 8
) -> list[ScoredGroup]:
    """Prompts with these rewards; completions take the lengths in turn, and are cut at `cap`."""
    made = []
    for index, of in enumerate(rewards):
        own = [min(lengths[i % len(lengths)], cap + 1) for i in range(len(of))]
        completions = tuple(
            Completion(
                token_ids=(1,) * min(length, cap),
                sampling_logprobs=(0.0,) * min(length, cap),
                finish_reason=FinishReason.LENGTH if length > cap else FinishReason.STOP,
                text="",
            )
            for length in own
        )
        prompt = Prompt(index=index, token_ids=(1,), messages=({"role": "user", "content": "?"},), reference="1")
        group = RolloutGroup(prompt=prompt, completions=completions, policy_version=0)
        made.append(ScoredGroup(group=group, rewards=tuple((one,) for one in of), total_rewards=tuple(of)))
    return made


def report(of: list[ScoredGroup], name: str = "accuracy", **changes) -> ProbeReport:
    settings = {
        "threshold": None,
        "num_generations": 8,
        "max_new_tokens": 8,
        "seconds": 2.0,
        "contrasts": None,
        "constant_answer": None,
        "seed": 0,
        **changes,
    }
    return make_report(of, [name], **settings)


def advice(found: ProbeReport) -> list[Advice]:
    return [verdict.advice for verdict in found.verdicts]


# What is right


@pytest.mark.parametrize(
    ("name", "totals", "threshold", "words", "right"),
    [
        ("accuracy", [1.0, 0.0, None], None, "`accuracy` is 1", [True, False, None]),
        ("accuracy", [1.0, 0.2, 0.0], 0.2, "at least 0.2 (--right-at)", [True, True, False]),
        ("own", [-1.0, 0.5, 0.5], None, "the total reward is 0.5, the best seen", [False, True, True]),
        ("own", [i / 20 for i in range(21)], None, "at least 0.5, halfway", [i >= 10 for i in range(21)]),
        ("own", [0.3, 0.3], None, "every completion earns 0.3", [False, False]),
        ("own", [None, None], None, "no completion has a reward", [None, None]),
    ],
)
def test_what_counts_as_right_is_said(name, totals, threshold, words: str, right) -> None:
    said, found = define_right(groups([totals]), [name], threshold)
    assert words in said
    assert found == [right]


# Verdicts


HALF = [0.0, 1.0] * 8


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([HALF] * 20, [Advice.LEARN]),
        ([[0.0] * 16] * 40, [Advice.COLD_START]),
        ([[1.0] * 16] * 40, [Advice.HARDER_PROMPTS]),
        ([[0.0, 1.0]], [Advice.LEARN]),  # one prompt, two samples
        ([[None] * 4] * 3, [Advice.REWARD]),
        ([[0.0] * 16] * 30 + [HALF] * 10, [Advice.LEARN]),
    ],
)
def test_the_verdict_follows_from_the_share_of_live_groups(rewards, expected: list[Advice]) -> None:
    found = report(groups(rewards))
    assert advice(found) == expected
    assert any(verdict.needs_attention for verdict in found.verdicts) == (expected != [Advice.LEARN])


def test_equal_rewards_of_an_unknown_scale_are_neither_hard_nor_easy() -> None:
    assert advice(report(groups([[0.3] * 16] * 40), name="own")) == [Advice.REWARD]
    assert advice(report(groups([[0.3] * 16] * 40), name="own", threshold=0.3)) == [Advice.HARDER_PROMPTS]


def test_a_tempting_constant_answer_is_a_verdict() -> None:
    found = report(groups([HALF] * 20), constant_answer=("The answer '1' ...", True))
    assert advice(found) == [Advice.LEARN, Advice.BALANCE_ANSWERS]
    assert advice(report(groups([HALF] * 20), constant_answer=("The best one", False))) == [Advice.LEARN]


@pytest.mark.parametrize(
    ("lengths", "length_95", "words"),
    [
        ((1, 2, 3, 4), 4, None),
        ((3, 3, 3, 9), None, "cannot be told, since fewer ended: try `max_new_tokens=16`"),
    ],
)
def test_truncation_says_what_would_end_most_or_that_it_cannot_be_told(lengths, length_95, words) -> None:
    found = report(groups([HALF] * 20, lengths))
    assert found.length_95 == length_95
    assert found.truncated == (0.25 if words else 0.0)
    assert advice(found) == ([Advice.RAISE_MAX_NEW_TOKENS] if words else []) + [Advice.LEARN]
    if words:
        assert words in found.verdicts[0].text


# Figures


def test_the_figures_are_those_of_the_samples() -> None:
    found = report(groups([[1.0, 0.0, 0.0, 0.0], [1.0] * 4, [0.0] * 4, [None, None, 1.0, 1.0]]))
    assert found.accuracy.value == pytest.approx((0.25 + 1 + 0 + 1) / 4)
    assert found.accuracy.low < found.accuracy.value < found.accuracy.high
    assert {k: one.value for k, one in found.pass_at_k.items()} == {
        1: pytest.approx(0.5625),
        2: pytest.approx((0.5 + 1 + 0 + 1) / 4),  # of [1, 0, 0, 0] half of the pairs hold the 1
    }
    assert (found.always_right, found.always_wrong, found.mixed) == (0.5, 0.25, 0.25)
    assert found.rewards == [(0.0, 0.0, 0.5), (1.0, 1.0, 0.5)]
    assert found.no_reward == 2 / 16
    assert found.tokens_per_second == 16 * 3 / 2.0
    assert [one.size for one in found.sizes] == [2, 4, 8, 16, 32, 64]
    assert learnable(found) == [0]


def test_the_deviation_is_in_units_of_the_reward() -> None:
    plain, wide = (report(groups([[low, high] * 8] * 20), "own") for low, high in ((0.0, 1.0), (-2.0, 3.0)))
    for one, other in zip(plain.sizes, wide.sizes, strict=True):
        assert other.std.value == pytest.approx(5 * one.std.value)
        assert other.dead == one.dead


def test_the_best_size_depends_on_what_gradients_say_and_has_an_interval() -> None:
    """Where prompts have hardly anything in common a step needs many; where noise is all, large groups are better."""
    chosen = {}
    for contrast in (0.001, 3.0):
        betas = np.eye(6) * contrast + 0.1 * contrast
        noise = np.ones(6)
        measured = Contrasts(products=betas + np.diag(noise / 4.0), noise=noise, spread=np.full(6, 4.0))
        found = report(groups([HALF] * 40), contrasts=measured, num_generations=12)
        assert found.choice is not None
        assert found.choice.low <= found.choice.best <= found.choice.high
        assert found.choice.contrast.value == pytest.approx(1.1 * contrast)
        assert found.choice.agreement.value == pytest.approx(0.1 / 1.1)
        assert [one.size for one in found.sizes] == [2, 4, 8, 12, 16, 32, 64]
        assert advice(found)[-1] is Advice.GROUP_SIZE
        assert "the recipe's 12 carry" in found.verdicts[-1].text
        chosen[contrast] = found.choice.best
    assert chosen[3.0] <= 4 < 32 <= chosen[0.001]


# Sweep


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["num_generations=4,8"], [{"num_generations": 4}, {"num_generations": 8}]),
        (["a=1,2", "b=x"], [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]),
        (["a+b=4+16,8+8"], [{"a": 4, "b": 16}, {"a": 8, "b": 8}]),
        (['f=["accuracy,format", accuracy]'], [{"f": "accuracy,format"}, {"f": "accuracy"}]),
        (["lr=1e-5,true"], [{"lr": "1e-5"}, {"lr": True}]),
    ],
)
def test_settings_are_every_value_with_every_other(texts: list[str], expected: list[dict]) -> None:
    assert sweep.combinations(texts) == expected


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["num_generations"], "is no `key=value,value`"),
        (["seed=1,2"], "the sweep itself sets `seed`"),
        (["a=1", "a=2"], "names `a` twice"),
        (["a=1,1"], "gives one setting twice"),
        (["a+b=1+2,3"], "gives 1 values for 2 keys"),
    ],
)
def test_settings_that_cannot_be_are_refused(texts: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sweep.combinations(texts)


def test_runs_are_planned_seed_by_seed_in_folders_of_their_own(tmp_path: Path) -> None:
    settings = [{"reward_funcs": "a/b:f"}, {"reward_funcs": "a b:f"}]
    planned = sweep.plan({"seed": 5, "max_steps": 3}, settings, 2, Budget("tokens", 100), tmp_path)
    assert [(one.setting, one.seed) for one in planned] == [
        ("reward_funcs=a/b:f", 5),
        ("reward_funcs=a b:f", 5),
        ("reward_funcs=a/b:f", 6),
        ("reward_funcs=a b:f", 6),
    ]
    assert len({one.name for one in planned}) == 4
    assert planned[2].name.replace("seed=6", "seed=5") == planned[0].name
    assert {one.recipe["max_steps"] for one in planned} == {sweep.UNBOUNDED_STEPS}
    assert planned[3].recipe["output_dir"] == str(tmp_path / planned[3].name)
    assert sweep.plan({}, settings, 1, Budget("steps", 7), tmp_path)[0].recipe["max_steps"] == 7


@pytest.mark.parametrize("text", ["tokens", "tokens=0", "tokens=x", "tokens=inf", "hours=3"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no budget"):
        Budget.parse(text)


LOG = [{"num_tokens": 40.0 * i, "step_time": 2.0, "reward": i / 10, "frac_reward_zero_std": 0.5} for i in range(1, 11)]


def test_a_run_ends_with_the_step_that_reaches_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, num_steps in (("tokens=121", 4), ("tokens=120", 3), ("seconds=5", 3), ("steps=2", 2)):
        callback = BudgetCallback(Budget.parse(text))
        state, control = type("State", (), {}), type("Control", (), {"should_training_stop": False})
        stopped = []
        for i in range(len(LOG)):
            state.log_history = [{"eval_reward": 0.0}, *LOG[: i + 1]]  # an evaluation spends nothing
            callback.on_log(None, state, control)
            stopped.append(control.should_training_stop)
        assert stopped.index(True) + 1 == num_steps
    monkeypatch.delenv(VARIABLE, raising=False)
    assert budget_callbacks() == []
    monkeypatch.setenv(VARIABLE, "tokens=2e3")
    assert [str(one._budget) for one in budget_callbacks()] == ["tokens=2000"]


def test_a_run_is_measured_over_the_last_fifth_of_its_budget_or_by_its_last_evaluation() -> None:
    found = run_result("a=1", 3, Budget("tokens", 400), [*LOG, {"train_loss": 0.0}])
    assert found.reward == pytest.approx((0.9 + 1.0) / 2)
    assert (found.num_steps, found.num_tokens, found.step_seconds) == (10, 400, 20.0)
    assert found.curve[0] == (40.0, 0.1)
    evaluated = run_result("a=1", 3, Budget("tokens", 400), [{"eval_reward": 0.1}, *LOG, {"eval_reward": 0.7}])
    assert (evaluated.reward, evaluated.metric) == (0.7, "eval_reward")
    long_steps = run_result("a=1", 3, Budget("tokens", 400), LOG[:5])  # none ended in the last fifth
    assert long_steps.reward == 0.5
    with pytest.raises(ValueError, match="no step with a reward"):
        run_result("a=1", 3, Budget("tokens", 400), [])


def test_settings_have_student_s_interval_and_are_compared_seed_by_seed() -> None:
    def run(setting: str, seed: int, reward: float):
        lines = [{**LOG[0], "reward": reward, "num_tokens": 400.0}]
        return run_result(setting, seed, Budget("tokens", 400), lines)

    best = [run("b", seed, reward) for seed, reward in ((1, 0.5), (2, 0.7), (3, 0.9))]
    other = [run("a", seed, reward) for seed, reward in ((1, 0.4), (2, 0.6), (3, 0.8))]
    first, second = setting_results([*other, *best, run("c", 9, 0.1)])[:2]
    assert (first.setting, second.setting) == ("a", "b")
    assert second.reward == pytest.approx(0.7)
    assert second.half_width == pytest.approx(4.30265 * 0.2 / math.sqrt(3), rel=1e-4)  # t of 2 degrees of freedom
    assert (second.behind_best, second.behind_best_half_width) == (0.0, None)
    assert first.behind_best == pytest.approx(0.1)
    assert first.behind_best_half_width == pytest.approx(0.0, abs=1e-12)  # the seeds differ, the difference does not
    alone = setting_results([*best, run("c", 9, 0.1)])[1]
    assert (alone.half_width, alone.behind_best_half_width) == (None, None)
    assert alone.behind_best == pytest.approx(0.6)


def test_curves_are_averaged_over_equal_parts_of_the_budget() -> None:
    found = binned([(5.0, 1.0), (6.0, 3.0), (100.0, 5.0), (104.0, 7.0)], 100)
    assert found[0] is None
    assert found[1] == 2.0
    assert found[-1] == 6.0  # the step that crossed the limit as well
    assert found.count(None) == len(found) - 2
