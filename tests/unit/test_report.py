"""`grpo-stage report`: what it reads out of a run's folder, and what it makes of it."""

import base64
import hashlib
import json
import math
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_stage.monitors.alarm import Alarm, History, Series, Watch
from grpo_stage.records.definitions import definition_of, with_tables
from grpo_stage.report import charts
from grpo_stage.report.charts import sections_of, thinned
from grpo_stage.report.completions import completions_of
from grpo_stage.report.facts import change_of, duration, facts_of, number, share
from grpo_stage.report.page import page_of
from grpo_stage.report.run_folder import read_run
from grpo_stage.survival.run_lock import LOCK_FILE
from grpo_stage.tools.cli import main
from tests.report_runs import completion, write_lines, write_log


DOCS = Path(__file__).parents[2] / "docs"
EVIL = "</script><script>document.title='evil'</script><img src=x onerror=\"document.title='evil'\">"
TOKEN = "hf_abcdefghijklmnop1234"


class Falling(Watch):
    """Fires while the reward is below one half."""

    def judge(self, history: History) -> Alarm | None:
        value = history.series("reward").values[-1]
        if value >= self.settings["temperature"] / 2:
            return None
        return Alarm(monitor="low", step=history.step, onset=0, seen=f"{value}", meaning="m", remedy="r")


class Demanding(Watch):
    def judge(self, history: History) -> Alarm | None:
        assert self.settings["max_new_tokens"]
        return None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "a-run"


def write_checkpoint(folder: Path, step: int, **recipe: Any) -> None:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    state = {"recipe": recipe, "rows": {"num": 40, "blocks": ["a"]}, "reward_code": {"accuracy": "grpo-stage 0.1"}}
    (checkpoint / "grpo_state.json").write_text(json.dumps(state))


def report(folder: Path, **watches: type[Watch]) -> Any:
    return facts_of([folder], watches)


# What is a run, and how it ended


def test_a_folder_that_is_no_run_is_refused_with_the_runs_in_it(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        read_run(tmp_path / "nowhere", {})
    write_log(tmp_path / "seed-1", 2)
    assert main(["report", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "no trainer_log.jsonl" in said
    assert "There are runs in it: seed-1." in said


@pytest.mark.parametrize(
    ("files", "state", "words"),
    [
        ({"grpo_finished.json": '{"step": 9, "parts": ["results"]}'}, "finished", "Finished at step 9"),
        ({}, "failed", "Ended at step 9 of 12 without its end"),
        ({"checkpoint-9/x": ""}, "stopped", "Stopped at step 9 of 12 with a checkpoint"),
        ({"checkpoint-6/x": ""}, "failed", "goes on from checkpoint-6"),
        ({LOCK_FILE: "{}"}, "failed", "Its process was killed"),
        ({"stacks_rollout_rank0.txt": ""}, "failed", "after a hang (see stacks_rollout_rank0.txt)"),
    ],
)
def test_how_a_run_ended(folder: Path, files: dict[str, str], state: str, words: str) -> None:
    write_log(folder, 12)
    lines = (folder / "trainer_log.jsonl").read_text().splitlines()[:9]
    (folder / "trainer_log.jsonl").write_text("\n".join(lines) + "\n")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    outcome = read_run(folder, {}).outcome
    assert (outcome.state, words in outcome.text) == (state, True), outcome


def test_a_run_that_owns_its_folder_is_still_running(folder: Path) -> None:
    import subprocess
    import sys

    write_log(folder, 3)
    code = (
        f"from grpo_stage.survival.run_lock import owned\nwith owned({str(folder)!r}): print(1, flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        outcome = read_run(folder, {}).outcome
        process.communicate(b"\n")
    assert outcome.state == "running"
    assert read_run(folder, {}).outcome.state == "stopped"  # the lock is gone with its owner


def test_what_is_damaged_or_no_number_is_counted_and_said(folder: Path) -> None:
    write_log(folder, 6)
    log = folder / "trainer_log.jsonl"
    odd = ['{"current_steps": 7, "rew', "[1]", "[" * 100_000, '{"current_steps": "8"}', '{"current_steps": true}']
    write_lines(log, [*odd, '{"current_steps": 7, "loss": NaN, "kl": Infinity, "entropy": 1%s}' % ("0" * 400)])
    write_lines(folder / "completions.jsonl", ["{", completion(1), completion(2, reward=math.nan), '{"step": 1}'])
    write_lines(folder / "alarms.jsonl", ["nonsense", '{"monitor": 1, "step": 2}', '{"monitor": "kl", "step": 2}'])
    run = report(folder).runs[0]
    assert "5 damaged lines of trainer_log.jsonl are left out." in run.notes
    assert "2 damaged lines of completions.jsonl are left out." in run.notes
    assert "2 damaged lines of alarms.jsonl are left out." in run.notes
    assert {note for note in run.notes if "NaN" in note} == {
        f"{name} was NaN or infinite 1 time, first at step 7." for name in ("loss", "kl", "entropy")
    }
    assert [alarm.monitor for alarm in run.alarms] == ["kl"]
    json.dumps(facts_of([folder], {}).as_dict(), allow_nan=False)


def test_the_time_of_all_processes_of_a_run_counts(folder: Path) -> None:
    folder.mkdir()
    times = ["0:00:30", "0:01:00", "0:00:10", "1 day, 0:00:00"]
    write_lines(
        folder / "trainer_log.jsonl", [{"current_steps": i, "elapsed_time": t} for i, t in enumerate(times, start=1)]
    )
    assert read_run(folder, {}).log.elapsed_s == 60 + 24 * 3600


def test_without_a_log_trainers_own_is_read(folder: Path) -> None:
    folder.mkdir()
    state = {"max_steps": 8, "log_history": [{"step": 1, "reward": 0.25}, {"step": 2, "reward": 0.75}, 3]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    run = read_run(folder, {})
    assert (list(run.log.history.series("reward").values), run.steps) == ([0.25, 0.75], 2)
    assert (run.log.total_steps, run.log.num_damaged) == (8, 1)


# Alarms


def test_written_alarms_are_shown_and_the_log_is_not_judged_again(folder: Path) -> None:
    write_log(folder, 20)
    alarm = {"monitor": "kl", "step": 9, "onset": 7, "seen": f"s {TOKEN}", "meaning": "m", "remedy": "r"}
    write_lines(folder / "alarms.jsonl", [{**alarm, "settings": {"beta": 0.1}, "time": "now"}])
    run = report(folder, low=Falling).runs[0]
    assert not run.alarms_are_judged_now
    assert [(each.monitor, each.step, each.onset, each.settings) for each in run.alarms] == [
        ("kl", 9, 7, {"beta": "0.1"})
    ]
    assert "1 alarm: kl, first at step 9." in run.sentences
    assert TOKEN not in page_of(facts_of([folder], {}))


def test_a_run_without_alarms_is_judged_now_and_one_fault_is_one_alarm(folder: Path) -> None:
    folder.mkdir()
    rewards = [0.9] * 5 + [0.1, 0.6] * 20 + [0.9] * 40 + [0.1] + [0.9] * 300 + [0.1] + [0.9] * 30 + [0.1]
    write_lines(
        folder / "trainer_log.jsonl", [{"current_steps": i, "reward": r} for i, r in enumerate(rewards, start=1)]
    )
    run = report(folder, low=Falling, demanding=Demanding).runs[0]
    assert run.alarms_are_judged_now
    assert [alarm.step for alarm in run.alarms] == [6, 86, 387]
    # A setting that the folder does not tell silences one watch alone, and that is said.
    assert [note for note in run.notes if "demanding" in note] == [
        "demanding did not judge this run: its folder does not tell 'max_new_tokens'."
    ]


# Settings, versions, differences


def test_settings_come_from_every_file_that_has_them_and_hold_no_secret(folder: Path) -> None:
    write_log(folder, 4)
    write_checkpoint(folder, 2, learning_rate=9.0)
    write_checkpoint(folder, 10, learning_rate=1e-4, dataset="sums", finetuning_type="lora", reward_funcs=["accuracy"])
    board = {"learning_rate": 3.0, "beta": 0.1, "hub_token": TOKEN, "swanlab_api_key": "verysecret", "note": TOKEN}
    (folder / "training_args.yaml").write_text(yaml.safe_dump(board))
    (folder / "adapter_config.json").write_text('{"r": 8, "base_model_name_or_path": "m/verysecret"}')
    (folder / "README.md").write_text(
        "# x\n\n### Training hyperparameters\n\n- learning_rate: 5\n- optimizer: Use adamw and more\n\n"
        "### Framework versions\n\n- PEFT 0.18.1\n- Pytorch 2.11.0\n"
    )
    run = report(folder).runs[0]
    assert run.settings["learning_rate"] == "0.0001"  # what the newest checkpoint says, not the others
    assert (run.settings["beta"], run.settings["lora_rank"]) == ("0.1", "8")
    assert run.settings["optimizer"] == "Use adamw and more"
    assert run.versions == {"PEFT": "0.18.1", "Pytorch": "2.11.0", "reward accuracy": "grpo-stage 0.1"}
    assert run.sentences[0] == "GRPO of m/*** with lora of rank 8 on sums (40 prompts), rewarded by accuracy."
    page = page_of(facts_of([folder], {}))
    assert TOKEN not in page
    assert "verysecret" not in page


def test_what_a_run_wrote_at_its_start_is_read(folder: Path) -> None:
    write_log(folder, 4)
    record = {
        "recipe": {"model_name_or_path": "m", "num_generations": 4},
        "versions": {"peft": "0.18.1", "python": "3.12.1"},
        "rows": 40,
        "datasets": {"sums": {"files": {"sums.json": "sha256:ab"}}},
        "reward_code": [{"spec": "mine.py:even", "sha256": "cd"}],
    }
    (folder / "grpo_run.json").write_text(json.dumps(record))
    (folder / "adapter_config.json").write_text('{"peft_version": "0.17"}')
    run = report(folder).runs[0]
    assert run.settings == {"model_name_or_path": "m", "num_generations": "4"}
    hashes = {"data sums: sums.json": "sha256:ab", "reward mine.py:even": "cd"}
    assert run.versions == {**hashes, "peft": "0.18.1", "python": "3.12.1"}
    assert "(40 prompts)" in run.sentences[0]
    for damaged in ("{", "[]", '{"recipe": 1, "versions": [], "datasets": {"a": 2}, "reward_code": [3]}'):
        (folder / "grpo_run.json").write_text(damaged)
        assert report(folder).runs[0].versions == {"PEFT": "0.17"}


def test_only_what_differs_between_runs_is_listed(tmp_path: Path) -> None:
    for name, rate in (("one", 1), ("two", 2)):
        write_log(tmp_path / name, 4)
        write_checkpoint(tmp_path / name, 4, learning_rate=rate, beta=0.04, **({"seed": 7} if rate == 2 else {}))
    facts = facts_of([tmp_path / "one", tmp_path / "two"], {})
    assert [(row.name, list(row.values)) for row in facts.differences] == [
        ("learning_rate", ["1", "2"]),
        ("seed", ["–", "7"]),  # noqa: RUF001
    ]
    same = facts_of([tmp_path / "one", tmp_path / "one"], {})
    assert same.differences == []
    assert [run.name for run in same.runs] == ["one (1)", "one (2)"]


# Curves


def test_a_thinned_curve_keeps_means_and_extremes_of_all_its_parts() -> None:
    values = [float(i % 7) for i in range(1000)]
    values[500] = math.nan
    curve = thinned(Series(list(range(1, 1001)), values), 50)
    assert len(curve["x"]) == len(curve["y"]) == len(curve["low"]) == 50
    assert (curve["x"][-1], curve["num"]) == (1000, 999)
    assert (set(curve["low"]), set(curve["high"])) == ({0.0}, {6.0})
    assert curve["y"][0] == pytest.approx(sum(values[:19]) / 19, rel=1e-4)
    assert thinned(Series([1, 2], [1e308, -1e308]), 50) == {"x": [1, 2], "y": [1e308, -1e308], "num": 2}
    assert all(math.isfinite(y) for y in thinned(Series(list(range(99)), [1.7e308] * 99), 4)["y"])


def test_each_reward_has_its_plot_with_the_evaluation_beside_it_and_nothing_is_lost() -> None:
    names = (
        *(
            "reward",
            "eval_reward",
            "rewards/a/mean",
            "eval_rewards/a/mean@4",
            "rewards/b/mean",
            "eval_rewards/a/pass@2",
        ),
        *("entropy", "time/sync", "time/update", "my/own", "never_finite"),
    )
    history = History()
    for step in range(1, 4):
        history.add({"current_steps": step, **dict.fromkeys(names, 1.0), "never_finite": math.nan})
    history.add({"current_steps": 4, "time/update": 2.0})
    sections = sections_of([history, history])
    plots = {plot.title: plot for section in sections for plot in section.charts}
    drawn = {title: sorted({curve.metric for curve in plot.curves}) for title, plot in plots.items()}
    assert drawn == {
        "Total reward": ["eval_reward", "reward"],
        "Reward of a": ["eval_rewards/a/mean@4", "rewards/a/mean"],
        "Reward of b": ["rewards/b/mean"],
        "a at the evaluation: pass@k and maj@n": ["eval_rewards/a/pass@2"],
        "Entropy": ["entropy"],
        "Seconds of a step by phase": ["time/sync", "time/update"],
        "my/own": ["my/own"],
    }
    assert [curve.run for curve in plots["Entropy"].curves] == [0, 1]
    stacked = [plot for section in sections for plot in section.charts if plot.is_stacked]
    assert [[(curve.run, curve.y) for curve in plot.curves] for plot in stacked] == [
        [(run, [1.0, 1.0, 1.0, 0.0]), (run, [1.0, 1.0, 1.0, 2.0])] for run in (0, 1)
    ]
    assert (sections[-1].title, sections[-1].is_folded) == ("All other metrics", True)


def test_any_number_of_metrics_fits_on_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "MAX_NUMBERS", 30_000)
    history = History()
    for step in range(1, 100):
        history.add({"current_steps": step, **{f"odd/{i}": step / 3 for i in range(200)}})
    (section,) = sections_of([history])
    assert (len(section.charts), section.num_left_out) == (charts.MAX_OTHERS, 50)
    numbers = sum(4 * len(curve.x) for plot in section.charts for curve in plot.curves)
    assert 25_000 <= numbers <= 30_000


def test_time_counts_a_rollout_once_however_often_it_is_used(folder: Path) -> None:
    write_checkpoint(folder, 8, steps_per_generation=2, num_iterations=2)
    # Every 4 steps: a rollout of 30 s used by 4 updates of 10 s, so that a step takes 18 s and 2 of it are unnamed.
    line = {"time/rollout": 30.0, "time/update": 10.0, "step_time": 19.5}
    lines = [{"current_steps": step, **line, "memory/update": step / 4, "memory/sync": 0.0} for step in (8, 4)]
    write_lines(folder / "trainer_log.jsonl", lines[::-1])
    phases = {phase.name: (phase.seconds, round(phase.share, 4)) for phase in report(folder).runs[0].phases}
    assert report(folder).runs[0].memory == {"update": 2.0}
    assert phases == {"update": (80.0, 0.5128), "rollout": (60.0, 0.3846), "other": (16.0, 0.1026)}


def test_the_start_and_the_end_are_means_of_a_tenth_each() -> None:
    history = History({"current_steps": i, "reward": float(i)} for i in range(1, 101))
    change = change_of(history, "reward")
    assert change is not None
    assert (change.start, change.end) == (5.5, 95.5)
    assert change_of(history, "kl") is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-0.0, "0"), (0.0875, "0.0875"), (0.5, "0.5"), (1234.5, "1,234"), (3e-7, "3e-07")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_shares_and_durations_are_short() -> None:
    assert [share(value) for value in (0.0, 0.004, 0.25, 0.998, 1.0)] == ["0 %", "0.4 %", "25 %", "99.8 %", "100 %"]
    assert [duration(value) for value in (0, 59.6, 3600, 93784)] == ["0 s", "1 min", "1 h", "1 d 2 h"]


# Completions


@pytest.fixture
def learning(folder: Path) -> Path:
    """40 steps of 3 prompts, of which the first is sampled most; half of the last completions are the same text."""
    folder.mkdir()

    def lines() -> Iterator[dict[str, Any]]:
        for step in range(1, 41):
            for prompt in (0, 1 + step % 2):
                for sample in range(4):
                    right = sample < step / 10
                    text = (
                        "the same"
                        if step > 36 and sample < 2
                        else f"step {step} sample {sample} of {prompt} says {right}"
                    )
                    yield completion(step, prompt, text, float(right), finish_reason="length" if sample else "stop")

    write_lines(folder / "completions.jsonl", lines())
    return folder


def test_the_most_sampled_prompt_is_followed_over_time_with_what_changed(learning: Path) -> None:
    followed = completions_of(learning).over_time
    assert [thread[0].prompt for thread in followed] == [f"What is {i} + 4?" for i in (0, 2, 1)]
    first = followed[0]
    assert [shown.step for shown in first] == [1, 11, 21, 30, 40]
    assert [shown.group_mean for shown in first] == [0.25, 0.5, 0.75, 0.75, 1.0]
    assert first[0].changes == ()
    rebuilt = ["".join(text for kind, text in shown.changes if kind != "gone") for shown in first[1:]]
    assert rebuilt == [shown.completion for shown in first[1:]]
    assert ("new", "21 ") in first[2].changes


def test_best_worst_and_most_frequent_are_those_of_the_end(learning: Path) -> None:
    found = completions_of(learning)
    assert (found.num, found.last_steps) == (320, (37, 40))
    assert [(shown.step, shown.reward) for shown in found.best] == [(40, 1.0), (40, 1.0), (39, 1.0)]
    assert len({shown.prompt for shown in found.best}) == 3  # each prompt once
    assert [shown.reward for shown in found.worst] == [1.0, 1.0, 1.0]
    (frequent,) = found.frequent
    assert (frequent.completion, frequent.share, frequent.num_prompts) == ("the same", 0.5, 3)
    assert [step for step, _ in found.groups] == [1, 9, 17, 24, 32, 40]
    assert found.groups[1][1][0].rewards == [1.0, 0.0, 0.0, 0.0]


def test_completions_without_rewards_or_indices_are_shown(folder: Path) -> None:
    folder.mkdir()
    write_lines(
        folder / "completions.jsonl",
        [{"step": 1, "completion": text, "rewards": {}, "reward": None} for text in ("\ud800 half", "two")],
    )
    found = completions_of(folder)
    assert (found.num, found.best, found.worst) == (2, [], [])
    assert found.groups[0][1][0].rewards == [None, None]
    page_of(facts_of([folder], {})).encode()


def test_a_large_file_is_read_in_little_memory_and_gives_a_small_page(folder: Path) -> None:
    write_log(folder, 3)
    long = "x" * 480_000
    write_lines(folder / "completions.jsonl", (completion(step, step % 5, long + str(step)) for step in range(60)))
    assert (folder / "completions.jsonl").stat().st_size > 28e6
    tracemalloc.start()
    found = completions_of(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.num == 60
    assert peak < 8e6
    assert len(page_of(facts_of([folder], {}))) < 1.5e6


# The page


def test_no_text_of_a_run_becomes_part_of_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "run &lt;b&gt; <b>"
    write_log(folder, 4)
    write_lines(folder / "trainer_log.jsonl", [{"current_steps": 5, EVIL: 1.0, f"rewards/{EVIL[:20]}/mean": 1.0}])
    own = {**dict.fromkeys(("prompt", "reference"), EVIL), "rewards": {EVIL: 1.0}}
    write_lines(folder / "completions.jsonl", [{**completion(i, 0, f"{EVIL} {i}"), **own} for i in (1, 2)])
    texts = dict.fromkeys(("monitor", "seen", "meaning", "remedy"), EVIL)
    write_lines(folder / "alarms.jsonl", [{**texts, "step": 2, "settings": {EVIL: EVIL}}])
    write_checkpoint(folder, 4, dataset=EVIL, **{EVIL: EVIL})
    page = page_of(facts_of([folder, folder], {}))
    assert "<img" not in page
    assert "<b>&lt;b&gt;" not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert EVIL[9:40] not in page
    data = re.search(r'<script type="application/json" id="curves">(.*?)</script>', page)
    assert data is not None
    assert json.loads(data[1])["alarms"][0]["text"] == f"{EVIL}: {EVIL}"


def test_the_page_asks_for_nothing(folder: Path) -> None:
    write_log(folder, 4)
    page = page_of(facts_of([folder], {}))
    assert "default-src 'none'" in page
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[0]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in page
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_the_command_writes_the_page_and_the_same_facts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(folder, 4)
    write_lines(folder / "alarms.jsonl", [])
    (folder / "grpo_finished.json").write_text('{"step": 4, "parts": ["results"]}')
    assert main(["report", str(folder), "--json", "-"]) == 0
    output = capsys.readouterr()
    facts = json.loads(output.out)
    assert facts["runs"][0]["outcome"]["state"] == "finished"
    assert facts["runs"][0]["sentences"][1].startswith("The reward went from ")
    assert "The page is " in output.err
    assert "a-run" in (folder / "report.html").read_text()
    write_lines(folder / "alarms.jsonl", [{"monitor": "kl", "step": 2}])
    assert main(["report", str(folder), "--output", str(folder / "new" / "page.html")]) == 3
    assert (folder / "new" / "page.html").exists()


# Definitions


def test_the_tables_of_the_docs_are_those_of_the_code() -> None:
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    assert with_tables(page) == page, "run: make docs"


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("rewards/my reward/std", "sample standard deviation"),
        ("eval_rewards/accuracy/pass@16", "at least one of k"),
        ("eval_rewards/accuracy/frac_not_applicable", "returned None"),
        ("eval_completions/clipped_ratio", "max_new_tokens"),
        ("eval_sums_reward", "the prompts of one dataset"),
    ],
)
def test_a_metric_is_defined_by_its_name(metric: str, words: str) -> None:
    assert words in definition_of(metric)
    assert definition_of("rewards/a/b/std") == definition_of("unknown") == ""
